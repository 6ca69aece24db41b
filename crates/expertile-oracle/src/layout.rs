//! Where each row goes, found by sorting the slots by expert.

use crate::plan::round_up;

/// The lists of a layout, as the definitions name them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    /// `[E]`: live rows per local expert.
    pub expert_num_tokens: Vec<i32>,
    /// `[E]`: first row of each expert's segment, the aligned sum of the segments before it.
    pub expert_start: Vec<i32>,
    /// `[E]`: `expert_start + expert_num_tokens`.
    pub psum: Vec<i32>,
    /// `[M_sum]`: local expert of each row, -1 on padding.
    pub m_indices: Vec<i32>,
    /// `[M, topk]`: row of each slot, -1 for an empty or non-local one.
    pub inv_perm: Vec<i32>,
}

/// The local expert that a global id stands for: none for a negative id, none if the map says a negative value.
///
/// # Panics
/// If the id lies past the map.
#[must_use]
pub fn local_expert(id: i64, expert_map: Option<&[i32]>) -> Option<usize> {
    if id < 0 {
        return None;
    }
    match expert_map {
        None => Some(id as usize),
        Some(map) if map[id as usize] < 0 => None,
        Some(map) => Some(map[id as usize] as usize),
    }
}

/// The layout of `ids [M, topk]` over `local_experts`, in a buffer of `m_sum` rows.
///
/// Stable order: the live slots, sorted by (expert, slot number), stand one after another; where a new expert begins,
/// the row number is rounded up to `alignment`.
///
/// # Panics
/// If the rows do not fit `m_sum`, or an id stands for no expert.
#[must_use]
pub fn layout(ids: &[i64], expert_map: Option<&[i32]>, local_experts: usize, alignment: usize, m_sum: usize) -> Layout {
    let mut pairs = Vec::new();
    for (slot, &id) in ids.iter().enumerate() {
        if let Some(expert) = local_expert(id, expert_map) {
            assert!(expert < local_experts, "slot {slot}: expert {expert} of {local_experts}");
            pairs.push((expert, slot));
        }
    }
    pairs.sort_unstable();

    let mut layout = Layout {
        expert_num_tokens: Vec::new(),
        expert_start: Vec::new(),
        psum: Vec::new(),
        m_indices: vec![-1; m_sum],
        inv_perm: vec![-1; ids.len()],
    };
    let mut row = 0;
    for expert in 0..local_experts {
        row = round_up(row as u128, alignment as u128) as usize;
        let start = row;
        for &(_, slot) in pairs.iter().filter(|(owner, _)| *owner == expert) {
            layout.m_indices[row] = expert as i32;
            layout.inv_perm[slot] = row as i32;
            row += 1;
        }
        layout.expert_start.push(start as i32);
        layout.psum.push(row as i32);
        layout.expert_num_tokens.push((row - start) as i32);
    }
    assert!(round_up(row as u128, alignment as u128) <= m_sum as u128, "{row} rows of {alignment} in {m_sum}");
    layout
}

impl Layout {
    /// The slot (`token * topk + k`) that stands in each row, `None` on padding: `inv_perm` read backwards.
    #[must_use]
    pub fn slot_of_row(&self) -> Vec<Option<usize>> {
        let mut slots = vec![None; self.m_indices.len()];
        for (slot, &row) in self.inv_perm.iter().enumerate() {
            if row >= 0 {
                slots[row as usize] = Some(slot);
            }
        }
        slots
    }

    /// Rows of `x [M, width]` to their places: `[M_sum, width]`, `padding` where no slot stands.
    #[must_use]
    pub fn permute<T: Copy>(&self, x: &[T], width: usize, topk: usize, padding: T) -> Vec<T> {
        let mut rows = Vec::new();
        for slot in self.slot_of_row() {
            match slot {
                Some(slot) => rows.extend_from_slice(&x[slot / topk * width..][..width]),
                None => rows.extend(vec![padding; width]),
            }
        }
        rows
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_small_layout_is_as_written_by_hand() {
        let map = [2, -1, 0];
        // Global 0 is local 2, global 2 is local 0, global 1 lives elsewhere.
        let ids = [0, 2, 2, 1, -1, 0, 2, -7];
        let made = layout(&ids, Some(&map), 3, 4, 12);
        assert_eq!(made.expert_num_tokens, [3, 0, 2]);
        assert_eq!(made.expert_start, [0, 4, 4]);
        assert_eq!(made.psum, [3, 4, 6]);
        assert_eq!(made.m_indices, [0, 0, 0, -1, 2, 2, -1, -1, -1, -1, -1, -1]);
        assert_eq!(made.inv_perm, [4, 0, 1, -1, -1, 5, 2, -1]);
        let rows = made.permute(&['a', 'b', 'c', 'd'], 1, 2, '.');
        assert_eq!(rows.iter().collect::<String>(), "abd.ac......");
    }
}
