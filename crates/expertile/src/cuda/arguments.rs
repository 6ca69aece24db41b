//! What callers hand over: device addresses as integers, in plain data. Nothing here owns or touches device memory.

use crate::error::{Error, Result, checked_add, checked_mul};
use crate::layout::Layout;
use crate::plan::Plan;

/// A matrix in device memory. Strides are in elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(C)]
pub struct Tensor2 {
    /// Address of element `[0, 0]`; 0 where an optional matrix is absent.
    pub address: u64,
    /// Elements from one row to the next.
    pub row_stride: usize,
    /// Elements from one column to the next.
    pub col_stride: usize,
}

/// Where the routing is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(C)]
pub struct RoutingBuffers {
    /// `topk_ids [M, topk]`, i32 or i64.
    pub ids: Tensor2,
    /// `expert_map [G]` i32; 0 if ids are local.
    pub expert_map: u64,
    /// `G`; `E` without a map.
    pub global_experts: usize,
}

/// Where the layout's lists go (or, for steps after it, are). All i32, and all of them written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(C)]
pub struct LayoutBuffers {
    /// `[E]`
    pub expert_num_tokens: u64,
    /// `[E]`
    pub expert_start: u64,
    /// `[E]`
    pub psum: u64,
    /// `[M_sum]`
    pub m_indices: u64,
    /// `[M_sum]`: the token of each row, -1 on padding: what a GEMM that gathers its own rows reads.
    pub row_tokens: u64,
    /// `[M, topk]`
    pub inv_perm: u64,
    /// `[4]`: live rows, rows up to the end of the last segment, entries of the worklist, and 0, which a
    /// GEMM counts up from and leaves as it was.
    pub header: u64,
    /// `[tiles, 2]`: (expert, first row) of every row tile that holds a live row, ascending. A GEMM that walks it does no
    /// work for padding, however large the buffer. Room for as many tiles as any routing of the plan can have.
    pub worklist: u64,
}

impl LayoutBuffers {
    /// Bytes that [`LayoutBuffers::carve`] takes, a multiple of 16.
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
    /// As [`LayoutBuffers::space_bytes`]; [`Error::Value`] if `address` is not aligned.
    pub fn carve(address: u64, plan: &Plan, row_tile: usize) -> Result<Self> {
        Self::space_bytes(plan, row_tile)?;
        require_aligned("layout", address, 16)?;
        let mut next = address;
        let mut list = |words: usize| {
            let start = next;
            next += (words as u64 * 4).next_multiple_of(16);
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

/// Rows on their way to their places.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(C)]
pub struct RowsBuffers {
    /// `[M, H]`; its columns stand next to each other.
    pub x: Tensor2,
    /// Scales of rows that come quantized, `[M, H / group]`: f32, or UE8M0 bytes for the packed layout.
    pub x_scales: Tensor2,
    /// `topk_weights [M, 1]` f32, where they multiply the input.
    pub weights: Tensor2,
    /// `[M_sum, H]`, 16-byte aligned.
    pub out: u64,
    /// Scales as their format says, 16-byte aligned.
    pub scales: u64,
}

/// Fails unless an address is there and a multiple of `alignment`.
pub(super) fn require_aligned(argument: &'static str, address: u64, alignment: u64) -> Result<()> {
    if address == 0 || !address.is_multiple_of(alignment) {
        return Err(Error::Value {
            argument,
            actual: i128::from(address),
            expected: format!("a device address that is a multiple of {alignment}"),
        });
    }
    Ok(())
}

/// Fails unless the columns of a matrix, if there are several, stand next to each other.
pub(super) fn require_columns(argument: &'static str, matrix: &Tensor2, cols: usize) -> Result<()> {
    if matrix.col_stride != 1 && cols > 1 {
        return Err(Error::Stride {
            argument,
            actual: vec![matrix.row_stride, matrix.col_stride],
            expected: "columns next to each other on a GPU".into(),
        });
    }
    Ok(())
}

/// Fails unless a number fits the kernels' `int`.
pub(super) fn require_int(argument: &'static str, value: usize) -> Result<i32> {
    i32::try_from(value).map_err(|_| Error::value(argument, value, format!("at most {}", i32::MAX)))
}

/// The kernels' `RouteArgs`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct RouteArgs {
    pub(super) ids: u64,
    pub(super) expert_map: u64,
    pub(super) ids_row_stride: i64,
    pub(super) ids_col_stride: i64,
    pub(super) layout: LayoutBuffers,
    pub(super) status: u64,
    pub(super) barrier: u64,
    pub(super) chunk_counts: u64,
    pub(super) second_header: u64,
    pub(super) second_worklist: u64,
    pub(super) tokens: i32,
    pub(super) experts: i32,
    pub(super) ids_limit: i32,
    pub(super) alignment: i32,
    pub(super) m_sum: i32,
    pub(super) row_tile: i32,
    pub(super) worklist_capacity: i32,
    pub(super) second_row_tile: i32,
    pub(super) second_capacity: i32,
    pub(super) reserved: i32,
}

/// Another worklist of the same layout, for a GEMM whose row tile is another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct SecondWorklist {
    /// As [`LayoutBuffers::header`], for the GEMM: the first two words are not written.
    pub(super) header: u64,
    /// As [`LayoutBuffers::worklist`].
    pub(super) worklist: u64,
    pub(super) row_tile: usize,
}

impl SecondWorklist {
    const HEADER_BYTES: usize = 16;

    /// Bytes that [`SecondWorklist::carve`] takes.
    pub(super) fn space_bytes(plan: &Plan, row_tile: usize) -> Result<usize> {
        let list = checked_mul("bytes of a worklist", 8, worklist_capacity(plan, row_tile)?)?;
        checked_add("bytes of a worklist", Self::HEADER_BYTES, list)
    }

    /// Header and list from `address` (16-byte aligned) on.
    pub(super) fn carve(address: u64, row_tile: usize) -> Self {
        Self { header: address, worklist: address + Self::HEADER_BYTES as u64, row_tile }
    }
}

impl RouteArgs {
    /// The same, with a second worklist.
    pub(super) fn with_second(self, plan: &Plan, second: Option<&SecondWorklist>) -> Result<Self> {
        let Some(second) = second else { return Ok(self) };
        Ok(Self {
            second_header: second.header,
            second_worklist: second.worklist,
            second_row_tile: require_int("row_tile", second.row_tile)?,
            second_capacity: require_int("worklist", worklist_capacity(plan, second.row_tile)?)?,
            ..self
        })
    }
}

/// The kernels' `RowsArgs`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct RowsArgs {
    pub(super) x: u64,
    pub(super) x_row_stride: i64,
    pub(super) x_scales: u64,
    pub(super) x_scales_row_stride: i64,
    pub(super) x_scales_col_stride: i64,
    pub(super) weights: u64,
    pub(super) weights_row_stride: i64,
    pub(super) out: u64,
    pub(super) scales: u64,
    pub(super) token_scales: u64,
    pub(super) queue: u64,
    pub(super) row_tokens: u64,
    pub(super) inv_perm: u64,
    pub(super) tokens: i32,
    pub(super) m_sum: i32,
}

impl RowsArgs {
    pub(super) fn new(rows: &RowsBuffers, layout: &LayoutBuffers, plan: &Plan) -> Result<Self> {
        Ok(Self {
            x: rows.x.address,
            x_row_stride: rows.x.row_stride as i64,
            x_scales: rows.x_scales.address,
            x_scales_row_stride: rows.x_scales.row_stride as i64,
            x_scales_col_stride: rows.x_scales.col_stride as i64,
            weights: rows.weights.address,
            weights_row_stride: rows.weights.row_stride as i64,
            out: rows.out,
            scales: rows.scales,
            token_scales: 0,
            queue: 0,
            row_tokens: layout.row_tokens,
            inv_perm: layout.inv_perm,
            tokens: require_int("tokens", plan.tokens())?,
            m_sum: require_int("m_sum", plan.m_sum())?,
        })
    }
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
            let lists = LayoutBuffers::carve(4096, &plan, tile).unwrap();
            let end = 4096 + LayoutBuffers::space_bytes(&plan, tile).unwrap() as u64;
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
                let next = spans.get(index + 1).map_or(end, |&(next, _)| next);
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
        assert!(matches!(LayoutBuffers::space_bytes(&plan, 0), Err(Error::Value { argument: "row_tile", .. })));
        assert!(matches!(LayoutBuffers::carve(8, &plan, 128), Err(Error::Value { argument: "layout", actual: 8, .. })));
    }
}
