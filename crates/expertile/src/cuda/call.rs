//! Operands of the unsafe calls: typed addresses with their strides. Nothing here owns or touches device memory.

use super::driver::DevicePtr;
use crate::error::{Error, Result, checked_add, checked_mul};
use crate::layout::Layout;
use crate::plan::Plan;

/// A matrix in device memory. Strides are in elements.
#[derive(Debug)]
pub struct DeviceMatrix<T = u8> {
    /// Address of element `[0, 0]`.
    pub ptr: DevicePtr<T>,
    /// Elements from one row to the next.
    pub row_stride: usize,
    /// Elements from one column to the next.
    pub col_stride: usize,
}

impl<T> DeviceMatrix<T> {
    /// A matrix of rows of `cols` elements, one behind the other.
    #[must_use]
    pub const fn row_major(ptr: DevicePtr<T>, cols: usize) -> Self {
        Self { ptr, row_stride: cols, col_stride: 1 }
    }
}

// Not derived: a derive would ask the same of `T`.
impl<T> Clone for DeviceMatrix<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for DeviceMatrix<T> {}

impl<T> PartialEq for DeviceMatrix<T> {
    fn eq(&self, other: &Self) -> bool {
        (self.ptr, self.row_stride, self.col_stride) == (other.ptr, other.row_stride, other.col_stride)
    }
}

impl<T> Eq for DeviceMatrix<T> {}

impl<T> Default for DeviceMatrix<T> {
    /// Of no element.
    fn default() -> Self {
        Self::row_major(DevicePtr::default(), 0)
    }
}

/// Where the routing is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RoutingPtrs {
    /// `topk_ids [M, topk]`, i32 or i64 as prepared.
    pub ids: DeviceMatrix,
    /// `expert_map [G]`, unless ids are local.
    pub expert_map: Option<DevicePtr<i32>>,
    /// `G`; `E` without a map.
    pub global_experts: usize,
}

impl RoutingPtrs {
    /// Ids below this are those of an expert.
    pub(super) fn limit(&self, local_experts: usize) -> usize {
        if self.expert_map.is_some() { self.global_experts } else { local_experts }
    }
}

/// Where the layout's lists go (or, for steps after it, are). All i32, and all of them written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(C)]
pub struct LayoutPtrs {
    /// `[E]`
    pub expert_num_tokens: DevicePtr<i32>,
    /// `[E]`
    pub expert_start: DevicePtr<i32>,
    /// `[E]`
    pub psum: DevicePtr<i32>,
    /// `[M_sum]`
    pub m_indices: DevicePtr<i32>,
    /// `[M_sum]`: the token of each row, -1 on padding: what a GEMM that gathers its own rows reads.
    pub row_tokens: DevicePtr<i32>,
    /// `[M, topk]`
    pub inv_perm: DevicePtr<i32>,
    /// `[4]`: live rows, rows up to the end of the last segment, entries of the worklist, and 0, which a
    /// GEMM counts up from and leaves as it was.
    pub header: DevicePtr<i32>,
    /// `[tiles, 2]`: (expert, first row) of every row tile that holds a live row, ascending. A GEMM that walks it does
    /// no work for padding, however large the buffer. Room for as many tiles as any routing of the plan can have.
    pub worklist: DevicePtr<i32>,
}

impl LayoutPtrs {
    /// Bytes that [`LayoutPtrs::carve`] takes, a multiple of 16.
    ///
    /// # Errors
    /// [`Error::Value`] if `row_tile` is zero, [`Error::Overflow`].
    pub fn space_bytes(plan: &Plan, row_tile: usize) -> Result<usize> {
        let what = "bytes of a layout";
        let words =
            checked_add(what, Layout::space_len(plan)?, 4 + plan.m_sum() + 2 * worklist_capacity(plan, row_tile)?)?;
        // Each of the eight lists starts on 16 bytes.
        checked_add(what, checked_mul(what, words, 4)?, 8 * 16)
    }

    /// Lists one behind the other from `address` (16-byte aligned), each on 16 bytes.
    ///
    /// # Errors
    /// As [`LayoutPtrs::space_bytes`]; [`Error::Value`] if `address` is not aligned.
    pub fn carve(address: DevicePtr, plan: &Plan, row_tile: usize) -> Result<Self> {
        Self::space_bytes(plan, row_tile)?;
        address.require_aligned("layout", 16)?;
        let mut next = address;
        let mut list = |words: usize| {
            let start = next.cast();
            next = next.byte_add((words * 4).next_multiple_of(16));
            start
        };
        let experts = plan.local_experts();
        Ok(Self {
            expert_num_tokens: list(experts),
            expert_start: list(experts),
            psum: list(experts),
            m_indices: list(plan.m_sum()),
            row_tokens: list(plan.m_sum()),
            inv_perm: list(plan.tokens() * plan.topk()),
            header: list(4),
            worklist: list(2 * worklist_capacity(plan, row_tile)?),
        })
    }
}

/// The rows of a permute: where they are read, and where they and their scales are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RowsPtrs {
    /// `[M, H]`; its columns stand next to each other.
    pub x: DeviceMatrix,
    /// Scales of rows that come quantized, `[M, H / group]`: f32, or UE8M0 bytes for the packed layout.
    pub x_scales: Option<DeviceMatrix>,
    /// `topk_weights [M, 1]` f32, where they multiply the input.
    pub weights: Option<DeviceMatrix<f32>>,
    /// `[M_sum, H]`, 16-byte aligned.
    pub out: DevicePtr,
    /// Scales as their format says, 16-byte aligned; absent for rows without scales.
    pub scales: Option<DevicePtr>,
}

/// Row tiles that any routing of a plan can have: each holds a live row, and all but the last of an expert are full.
pub(super) fn worklist_capacity(plan: &Plan, row_tile: usize) -> Result<usize> {
    if row_tile == 0 {
        return Err(Error::value("row_tile", 0, "at least 1"));
    }
    let slots = checked_mul("M * topk", plan.tokens(), plan.topk())?;
    let of_slots = checked_add("row tiles", slots.min(plan.local_experts()), slots / row_tile)?;
    // A tile that divides the alignment has its own part of the buffer.
    let fits = plan.alignment().is_multiple_of(row_tile);
    Ok(if fits { of_slots.min(plan.m_sum() / row_tile) } else { of_slots })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::TokenExperts;

    #[test]
    fn lists_are_carved_inside_their_space_without_overlap() {
        for (tokens, topk, experts, alignment, tile) in
            [(1, 1, 1, 1, 1), (7, 3, 5, 12, 4), (64, 8, 256, 128, 64), (33, 4, 16, 8, 192)]
        {
            let plan = Plan::tight(tokens, topk, experts, alignment, TokenExperts::Distinct).unwrap();
            let lists = LayoutPtrs::carve(DevicePtr::new(4096), &plan, tile).unwrap();
            let end = 4096 + LayoutPtrs::space_bytes(&plan, tile).unwrap() as u64;
            let spans = [
                (lists.expert_num_tokens, experts),
                (lists.expert_start, experts),
                (lists.psum, experts),
                (lists.m_indices, plan.m_sum()),
                (lists.row_tokens, plan.m_sum()),
                (lists.inv_perm, tokens * topk),
                (lists.header, 4),
                (lists.worklist, 2 * worklist_capacity(&plan, tile).unwrap()),
            ];
            for (index, &(start, words)) in spans.iter().enumerate() {
                let next = spans.get(index + 1).map_or(end, |&(next, _)| next.address());
                let start = start.address();
                assert!(start % 16 == 0 && start + 4 * words as u64 <= next, "list {index} of {spans:?} up to {end}");
            }
        }
    }

    #[test]
    fn the_worklist_has_room_for_every_routing_whatever_the_row_tile() {
        for (tokens, topk, experts, alignment, tile) in
            [(9, 2, 3, 8, 16), (40, 1, 4, 16, 8), (12, 3, 5, 8, 64), (1, 1, 1, 8, 3)]
        {
            let plan = Plan::tight(tokens, topk, experts, alignment, TokenExperts::MayRepeat).unwrap();
            let slots = tokens * topk;
            // As many experts as possible with one row past a whole number of tiles, the rest on the first.
            let worst = (0..=slots.min(experts))
                .map(|spread| {
                    let first = slots - spread;
                    first.div_ceil(tile) + if first == 0 { spread } else { spread.min(experts - 1) }
                })
                .max()
                .unwrap();
            assert!(
                worklist_capacity(&plan, tile).unwrap() >= worst,
                "{slots} slots, {experts} experts, tiles of {tile}"
            );
        }
    }

    #[test]
    fn a_row_tile_of_zero_and_an_odd_address_are_refused() {
        let plan = Plan::tight(4, 2, 4, 128, TokenExperts::Distinct).unwrap();
        assert!(matches!(LayoutPtrs::space_bytes(&plan, 0), Err(Error::Value { argument: "row_tile", .. })));
        assert!(matches!(
            LayoutPtrs::carve(DevicePtr::new(8), &plan, 128),
            Err(Error::Value { argument: "layout", actual: 8, .. })
        ));
    }
}
