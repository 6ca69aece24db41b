//! Which experts a token goes to: ids, the expert map, counts.
//!
//! Shapes: `topk_ids` is `[M, topk]`, a negative id is an empty slot; `expert_map` is `[G]` and turns a global id into
//! a local one (negative: not on this rank). Without a map the ids are local. This module never looks at a backend;
//! the routers that *choose* the ids are in [`router`].

pub mod router;

use crate::error::{Error, Result, require_len};
use crate::matrix::MatrixRef;

/// `topk_ids [M, topk]`, i32 or i64, with any strides.
#[derive(Debug, Clone, Copy)]
pub enum TopkIds<'a> {
    /// 32-bit ids.
    I32(MatrixRef<'a, i32>),
    /// 64-bit ids.
    I64(MatrixRef<'a, i64>),
}

impl<'a> From<MatrixRef<'a, i32>> for TopkIds<'a> {
    fn from(ids: MatrixRef<'a, i32>) -> Self {
        Self::I32(ids)
    }
}

impl<'a> From<MatrixRef<'a, i64>> for TopkIds<'a> {
    fn from(ids: MatrixRef<'a, i64>) -> Self {
        Self::I64(ids)
    }
}

impl TopkIds<'_> {
    /// `M`.
    #[must_use]
    pub fn tokens(&self) -> usize {
        match self {
            Self::I32(ids) => ids.rows(),
            Self::I64(ids) => ids.rows(),
        }
    }

    /// Slots per token.
    #[must_use]
    pub fn topk(&self) -> usize {
        match self {
            Self::I32(ids) => ids.cols(),
            Self::I64(ids) => ids.cols(),
        }
    }

    /// The id at `[token, slot]`; panics outside the matrix.
    #[must_use]
    #[inline]
    pub fn get(&self, token: usize, slot: usize) -> i64 {
        match self {
            Self::I32(ids) => i64::from(ids.get(token, slot)),
            Self::I64(ids) => ids.get(token, slot),
        }
    }
}

/// Checked routing: every id is an empty slot or stands for an expert, every entry of the map is a local expert or
/// none.
///
/// Checking costs one pass over the ids; afterwards nothing downstream can go out of bounds because of them.
#[derive(Debug, Clone, Copy)]
pub struct Routing<'a> {
    ids: TopkIds<'a>,
    local_experts: usize,
    expert_map: Option<&'a [i32]>,
}

impl<'a> Routing<'a> {
    /// Ids over `local_experts` experts, or over `expert_map.len()` global ones.
    ///
    /// # Errors
    /// [`Error::Value`] if `topk` or `local_experts` is zero or does not fit i32, [`Error::MapEntry`] for an entry
    /// `>= local_experts`, [`Error::ExpertId`] for an id `>= local_experts` (without a map) or `>= expert_map.len()`,
    /// [`Error::Overflow`] if `M * topk` exceeds i32 (which is found before an id is looked at).
    pub fn new(ids: impl Into<TopkIds<'a>>, local_experts: usize, expert_map: Option<&'a [i32]>) -> Result<Self> {
        let ids = ids.into();
        if ids.topk() == 0 {
            return Err(Error::value("topk", 0, "at least 1"));
        }
        require_experts(local_experts)?;
        require_slots(ids.tokens(), ids.topk())?;
        if let Some(map) = expert_map {
            let outside = |&(_, &value): &(usize, &i32)| i64::from(value) >= local_experts as i64;
            if let Some((index, &value)) = map.iter().enumerate().find(outside) {
                return Err(Error::MapEntry { index, value, local_experts });
            }
        }
        let limit = expert_map.map_or(local_experts, <[i32]>::len);
        for token in 0..ids.tokens() {
            for slot in 0..ids.topk() {
                let id = ids.get(token, slot);
                if id >= limit as i64 {
                    return Err(Error::ExpertId { token, slot, id, limit });
                }
            }
        }
        Ok(Self { ids, local_experts, expert_map })
    }

    /// `M`.
    #[must_use]
    pub fn tokens(&self) -> usize {
        self.ids.tokens()
    }

    /// Slots per token.
    #[must_use]
    pub fn topk(&self) -> usize {
        self.ids.topk()
    }

    /// `E`.
    #[must_use]
    pub fn local_experts(&self) -> usize {
        self.local_experts
    }

    /// `G`: the length of the map, or `E` without one.
    #[must_use]
    pub fn global_experts(&self) -> usize {
        self.expert_map.map_or(self.local_experts, <[i32]>::len)
    }

    /// The local expert of a slot, `None` for an empty or non-local one; panics outside `[M, topk]`.
    #[must_use]
    #[inline]
    pub fn local_expert(&self, token: usize, slot: usize) -> Option<usize> {
        let id = usize::try_from(self.ids.get(token, slot)).ok()?;
        match self.expert_map {
            None => Some(id),
            Some(map) => usize::try_from(map[id]).ok(),
        }
    }

    /// The local expert of every slot `[M, topk]`, row by row; `None` for an empty or non-local one.
    pub fn slots(&self) -> impl Iterator<Item = Option<usize>> + '_ {
        (0..self.tokens()).flat_map(move |token| (0..self.topk()).map(move |slot| self.local_expert(token, slot)))
    }

    /// How many of the `E` experts have a token.
    #[must_use]
    pub fn active_experts(&self) -> usize {
        let mut active = vec![false; self.local_experts];
        self.slots().flatten().for_each(|expert| active[expert] = true);
        active.into_iter().filter(|&active| active).count()
    }

    /// Writes `expert_num_tokens [E]`: live rows per local expert, unaligned.
    ///
    /// # Errors
    /// [`Error::BufferTooSmall`] if `counts` holds fewer than `E`.
    pub fn count_expert_num_tokens(&self, counts: &mut [i32]) -> Result<()> {
        require_len("expert_num_tokens", counts.len(), self.local_experts)?;
        let (tokens, topk) = (self.tokens(), self.topk());
        counts[..self.local_experts].fill(0);
        for token in 0..tokens {
            for slot in 0..topk {
                if let Some(expert) = self.local_expert(token, slot) {
                    counts[expert] += 1;
                }
            }
        }
        Ok(())
    }
}

/// `M * topk`, which is counted in i32.
pub(crate) fn require_slots(tokens: usize, topk: usize) -> Result<usize> {
    let slots = tokens.checked_mul(topk).filter(|&slots| i32::try_from(slots).is_ok());
    slots.ok_or_else(|| Error::Overflow { what: "M * topk", detail: format!("{tokens} * {topk} > {}", i32::MAX) })
}

pub(crate) fn require_experts(local_experts: usize) -> Result<()> {
    if local_experts == 0 || i32::try_from(local_experts).is_err() {
        return Err(Error::value("local_experts", local_experts, format!("1 to {}", i32::MAX)));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ids(data: &[i64], topk: usize) -> TopkIds<'_> {
        MatrixRef::new(data, data.len() / topk, topk).unwrap().into()
    }

    #[test]
    fn counts_follow_the_map_and_skip_empty_slots() {
        let map = [-1, 1, 0, -1];
        let data = [1, 2, -1, 3, 2, 2];
        let routing = Routing::new(ids(&data, 2), 2, Some(&map)).unwrap();
        let mut counts = [9; 3];
        routing.count_expert_num_tokens(&mut counts).unwrap();
        assert_eq!(counts, [3, 1, 9]);
        let slots: Vec<_> = routing.slots().collect();
        assert_eq!(slots, [Some(1), Some(0), None, None, Some(0), Some(0)]);
        assert_eq!(routing.active_experts(), 2);
        assert_eq!(Routing::new(ids(&data, 2), 9, None).unwrap().active_experts(), 3);
    }

    #[test]
    fn an_id_past_the_experts_or_the_map_is_named() {
        let error = Routing::new(ids(&[0, 1, 2, 0], 2), 2, None).unwrap_err();
        assert_eq!(error, Error::ExpertId { token: 1, slot: 0, id: 2, limit: 2 });
        let map = [0, -1, 1];
        let error = Routing::new(ids(&[0, 3], 2), 2, Some(&map)).unwrap_err();
        assert_eq!(error, Error::ExpertId { token: 0, slot: 1, id: 3, limit: 3 });
    }

    #[test]
    fn a_map_entry_past_the_local_experts_is_named() {
        let error = Routing::new(ids(&[0], 1), 2, Some(&[0, 2])).unwrap_err();
        assert_eq!(error, Error::MapEntry { index: 1, value: 2, local_experts: 2 });
    }

    #[test]
    fn no_experts_and_no_slots_are_errors() {
        let error = Routing::new(ids(&[0], 1), 0, None).unwrap_err();
        assert!(error.to_string().starts_with("local_experts is 0"), "{error}");
        let empty = MatrixRef::new(&[] as &[i32], 3, 0).unwrap();
        let error = Routing::new(empty, 1, None).unwrap_err();
        assert!(error.to_string().starts_with("topk is 0"), "{error}");
    }
}
