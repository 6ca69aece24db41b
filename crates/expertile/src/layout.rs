//! Where each row goes: the expert-aligned layout, with its alignment.
//!
//! Inside an expert, rows stand in ascending slot order (`token * topk + slot`), so the same routing gives the same
//! layout bit for bit, on every backend and every run. A layout borrows the caller's `i32` space
//! ([`Layout::space_len`]); nothing is allocated.

use crate::error::{Error, Result, checked_add, checked_mul, require_len};
use crate::plan::{Plan, round_up};
use crate::routing::{Routing, require_experts};

mod segments;

pub use segments::Segments;

/// What becomes of the activation rows that are padding. (Scales of padding are always zero.)
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Padding {
    /// Left as they were.
    #[default]
    Untouched,
    /// Set to zero.
    Zero,
}

/// What a list of a layout has elements for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Extent {
    /// The layout as a whole.
    Layout,
    /// Each of the `E` local experts.
    Expert,
    /// Each of the `M_sum` rows.
    Row,
    /// Each of the `M * topk` slots.
    Slot,
    /// Each of the `M_sum / A` tiles of as many rows as the alignment.
    Tile,
}

/// A list in a layout's memory. All lists stand one right behind the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct List {
    /// Its name.
    pub name: &'static str,
    /// What it has elements for.
    pub per: Extent,
    /// Elements, of 4 bytes, for each.
    pub words: usize,
}

impl List {
    /// Its elements in a layout of this plan.
    ///
    /// # Errors
    /// [`Error::Overflow`] if they cannot be counted.
    pub fn len(&self, plan: &Plan) -> Result<usize> {
        let count = match self.per {
            Extent::Layout => 1,
            Extent::Expert => plan.local_experts(),
            Extent::Row => plan.m_sum(),
            Extent::Slot => checked_mul("M * topk", plan.tokens(), plan.topk())?,
            Extent::Tile => plan.m_sum() / plan.alignment(),
        };
        checked_mul("elements of a layout", self.words, count)
    }
}

/// The layout of one call.
///
/// | list | shape | meaning |
/// |---|---|---|
/// | `expert_num_tokens` | `[E]` | live rows per local expert, unaligned |
/// | `expert_start` | `[E]` | first row of an expert's segment, a multiple of the alignment |
/// | `psum` | `[E]` | `expert_start + expert_num_tokens` (an empty expert stores its start) |
/// | `m_indices` | `[M_sum]` | local expert of each row, -1 on padding |
/// | `inv_perm` | `[M, topk]` | row of each slot, -1 for an empty or non-local one |
#[derive(Debug, Clone, Copy)]
pub struct Layout<'a> {
    tokens: usize,
    topk: usize,
    alignment: usize,
    live_rows: usize,
    expert_num_tokens: &'a [i32],
    expert_start: &'a [i32],
    psum: &'a [i32],
    m_indices: &'a [i32],
    inv_perm: &'a [i32],
}

/// The lists of a layout while they are being written.
struct Lists<'a> {
    expert_num_tokens: &'a mut [i32],
    expert_start: &'a mut [i32],
    psum: &'a mut [i32],
    m_indices: &'a mut [i32],
    inv_perm: &'a mut [i32],
}

impl<'a> Lists<'a> {
    fn carve(space: &'a mut [i32], plan: &Plan) -> Result<Self> {
        require_len("space", space.len(), Layout::space_len(plan)?)?;
        let mut rest = space;
        let mut next = |list: &List| {
            let (taken, others) = std::mem::take(&mut rest).split_at_mut(list.len(plan)?);
            rest = others;
            Ok(taken)
        };
        let [expert_num_tokens, expert_start, psum, m_indices, inv_perm] = &Layout::LISTS;
        Ok(Self {
            expert_num_tokens: next(expert_num_tokens)?,
            expert_start: next(expert_start)?,
            psum: next(psum)?,
            m_indices: next(m_indices)?,
            inv_perm: next(inv_perm)?,
        })
    }

    /// Writes `m_indices` from starts and counts.
    fn mark_rows(&mut self) {
        self.m_indices.fill(-1);
        for (expert, (&start, &end)) in self.expert_start.iter().zip(&*self.psum).enumerate() {
            self.m_indices[start as usize..end as usize].fill(expert as i32);
        }
    }

    fn finish(self, tokens: usize, topk: usize, alignment: usize) -> Layout<'a> {
        Layout {
            tokens,
            topk,
            alignment,
            live_rows: self.expert_num_tokens.iter().map(|&count| count as usize).sum(),
            expert_num_tokens: self.expert_num_tokens,
            expert_start: self.expert_start,
            psum: self.psum,
            m_indices: self.m_indices,
            inv_perm: self.inv_perm,
        }
    }
}

impl<'a> Layout<'a> {
    /// The lists in the order in which they stand in a layout's space, from its first element on.
    pub const LISTS: [List; 5] = [
        List { name: "expert_num_tokens", per: Extent::Expert, words: 1 },
        List { name: "expert_start", per: Extent::Expert, words: 1 },
        List { name: "psum", per: Extent::Expert, words: 1 },
        List { name: "m_indices", per: Extent::Row, words: 1 },
        List { name: "inv_perm", per: Extent::Slot, words: 1 },
    ];

    /// What stands behind the lists in memory that a GPU's steps share with its GEMM. The spare word is in front of the
    /// header or behind everything, so that header and worklist start on 8 bytes.
    pub const DEVICE_LISTS: [List; 4] = [
        List { name: "spare", per: Extent::Layout, words: 1 },
        List { name: "header", per: Extent::Layout, words: 4 },
        List { name: "worklist", per: Extent::Tile, words: 2 },
        List { name: "row_tokens", per: Extent::Row, words: 1 },
    ];

    /// How many `i32` a layout of this plan takes: `3 E + M_sum + M * topk`.
    ///
    /// # Errors
    /// [`Error::Overflow`] if that does not fit.
    pub fn space_len(plan: &Plan) -> Result<usize> {
        total_len(&Self::LISTS, plan)
    }

    /// The same, with what a GPU adds.
    ///
    /// # Errors
    /// [`Error::Overflow`] if that does not fit.
    pub fn device_space_len(plan: &Plan) -> Result<usize> {
        checked_add("elements of a layout", Self::space_len(plan)?, total_len(&Self::DEVICE_LISTS, plan)?)
    }

    /// Lays a routing out: a stable counting sort of its slots by expert.
    ///
    /// # Errors
    /// [`Error::Shape`] if the routing is not the plan's `[M, topk]` over `E` experts, [`Error::BufferTooSmall`] if
    /// `space` is shorter than [`Layout::space_len`], [`Error::MSum`] if the routing needs more rows than the plan has.
    /// On an error, what `space` holds is unspecified; it is scratch until a layout exists.
    pub fn build(plan: &Plan, routing: &Routing<'_>, space: &'a mut [i32]) -> Result<Self> {
        let (tokens, topk, local_experts) = (plan.tokens(), plan.topk(), plan.local_experts());
        if (routing.tokens(), routing.topk()) != (tokens, topk) {
            return Err(Error::shape(
                "topk_ids",
                &[routing.tokens(), routing.topk()],
                format!("[{tokens}, {topk}], as planned"),
            ));
        }
        if routing.local_experts() != local_experts {
            return Err(Error::value("local_experts", routing.local_experts(), format!("{local_experts}, as planned")));
        }
        let mut lists = Lists::carve(space, plan)?;
        routing.count_expert_num_tokens(lists.expert_num_tokens)?;
        let alignment = plan.alignment();
        write_starts(&mut lists, alignment, plan.m_sum())?;
        // While ranking, psum is each expert's cursor; it ends where it belongs.
        lists.psum.copy_from_slice(lists.expert_start);
        for token in 0..tokens {
            for slot in 0..topk {
                lists.inv_perm[token * topk + slot] = match routing.local_expert(token, slot) {
                    Some(expert) => {
                        let row = lists.psum[expert];
                        lists.psum[expert] += 1;
                        row
                    }
                    None => -1,
                };
            }
        }
        lists.mark_rows();
        Ok(lists.finish(tokens, topk, alignment))
    }

    /// Accepts rows that a dispatcher delivers already expanded and sorted: `psum [E]` of a buffer of `m_sum` rows.
    ///
    /// `expert_start[e] = round_up(psum[e - 1], alignment)`, and `inv_perm` is empty (`M = 0`): there is nothing to
    /// unpermute here.
    ///
    /// # Errors
    /// [`Error::Alignment`] if `alignment` is zero, [`Error::Value`] if there are no experts or `m_sum` is no multiple
    /// of `alignment`, [`Error::Count`] if an end lies before its segment's start, [`Error::MSum`] if one lies past
    /// `m_sum`, [`Error::BufferTooSmall`] if `space` is shorter than `3 E + M_sum`. Nothing is written on an error.
    pub fn from_psum(psum: &[i32], alignment: usize, m_sum: usize, space: &'a mut [i32]) -> Result<Self> {
        require_experts(psum.len())?;
        let plan = Plan::with_m_sum(0, 1, psum.len(), alignment, m_sum)?;
        let mut previous_end = 0usize;
        for (expert, &end) in psum.iter().enumerate() {
            previous_end = segments::rows_of_expert(expert, end, previous_end, alignment)?.end;
            let needed = round_up(previous_end, alignment)?;
            if needed > m_sum {
                return Err(Error::MSum { m_sum, needed, alignment });
            }
        }
        let mut lists = Lists::carve(space, &plan)?;
        lists.psum.copy_from_slice(psum);
        let mut start = 0;
        for (expert, &end) in psum.iter().enumerate() {
            lists.expert_start[expert] = start as i32;
            lists.expert_num_tokens[expert] = end - start as i32;
            start = round_up(end as usize, alignment)?;
        }
        lists.mark_rows();
        Ok(lists.finish(0, 1, alignment))
    }

    /// `M`; 0 for a layout from [`Layout::from_psum`].
    #[must_use]
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Slots per token.
    #[must_use]
    pub fn topk(&self) -> usize {
        self.topk
    }

    /// `E`.
    #[must_use]
    pub fn local_experts(&self) -> usize {
        self.expert_num_tokens.len()
    }

    /// `A`: what every expert's segment starts on a multiple of.
    #[must_use]
    pub fn alignment(&self) -> usize {
        self.alignment
    }

    /// Rows of the permuted buffer.
    #[must_use]
    pub fn m_sum(&self) -> usize {
        self.m_indices.len()
    }

    /// Rows that are not padding.
    #[must_use]
    pub fn live_rows(&self) -> usize {
        self.live_rows
    }

    /// `[E]`: live rows per local expert.
    #[must_use]
    pub fn expert_num_tokens(&self) -> &'a [i32] {
        self.expert_num_tokens
    }

    /// `[E]`: first row of each expert's segment.
    #[must_use]
    pub fn expert_start(&self) -> &'a [i32] {
        self.expert_start
    }

    /// `[E]`: end of each expert's live rows.
    #[must_use]
    pub fn psum(&self) -> &'a [i32] {
        self.psum
    }

    /// `[M_sum]`: local expert of each row, -1 on padding.
    #[must_use]
    pub fn m_indices(&self) -> &'a [i32] {
        self.m_indices
    }

    /// `[M, topk]`: row of each slot, -1 for an empty or non-local one.
    #[must_use]
    pub fn inv_perm(&self) -> &'a [i32] {
        self.inv_perm
    }

    /// The live rows of one expert; panics for `expert >= E`.
    #[must_use]
    pub fn expert_rows(&self, expert: usize) -> std::ops::Range<usize> {
        self.expert_start[expert] as usize..self.psum[expert] as usize
    }

    /// The runs of padding rows, in order; some may be empty.
    pub fn padding(&self) -> impl Iterator<Item = std::ops::Range<usize>> + use<'a> {
        let next_starts = self.expert_start[1..].iter().map(|&start| start as usize);
        let ends = self.psum.iter().map(|&end| end as usize);
        ends.zip(next_starts.chain([self.m_sum()])).map(|(end, next_start)| end..next_start)
    }

    /// The same layout for some of its tokens: experts, rows and padding are all there, `inv_perm` is theirs alone. For
    /// callers who move the rows of a large call in several steps; panics for tokens past `M`.
    #[must_use]
    pub fn of_tokens(&self, tokens: std::ops::Range<usize>) -> Self {
        let inv_perm = &self.inv_perm[tokens.start * self.topk..tokens.end * self.topk];
        Self { tokens: tokens.len(), inv_perm, ..*self }
    }

    /// Whether a GEMM that reads one expert per tile of `row_tile` rows (from `m_indices`) may take this layout.
    ///
    /// # Errors
    /// [`Error::Alignment`] unless the alignment is a positive multiple of `row_tile`: another tile would straddle two
    /// experts and multiply rows by the wrong weights.
    pub fn check_row_tile(&self, row_tile: usize) -> Result<()> {
        if row_tile == 0 || !self.alignment.is_multiple_of(row_tile) {
            return Err(Error::Alignment {
                actual: self.alignment,
                expected: format!("a multiple of the GEMM's row tile, {row_tile}"),
            });
        }
        Ok(())
    }

    /// `psum` for a GEMM that finds each segment's start by rounding the end before it up to its own row tile.
    ///
    /// # Errors
    /// [`Error::Alignment`] unless the alignment equals `row_tile`: any other would look for rows in the wrong place.
    pub fn psum_for_row_tile(&self, row_tile: usize) -> Result<&'a [i32]> {
        if row_tile == 0 || self.alignment != row_tile {
            return Err(Error::Alignment {
                actual: self.alignment,
                expected: format!("the GEMM's row tile, {row_tile}"),
            });
        }
        Ok(self.psum)
    }
}

fn total_len(lists: &[List], plan: &Plan) -> Result<usize> {
    lists.iter().try_fold(0, |all, list| checked_add("elements of a layout", all, list.len(plan)?))
}

/// Writes `expert_start` from the counts, or says how many rows they need.
fn write_starts(lists: &mut Lists<'_>, alignment: usize, m_sum: usize) -> Result<()> {
    let mut start = 0usize;
    let mut needed = 0usize;
    for (slot, &count) in lists.expert_start.iter_mut().zip(&*lists.expert_num_tokens) {
        if needed <= m_sum {
            *slot = start as i32;
        }
        needed = checked_add("M_sum", start, round_up(count as usize, alignment)?)?;
        start = needed;
    }
    if needed > m_sum {
        return Err(Error::MSum { m_sum, needed, alignment });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::matrix::MatrixRef;
    use crate::plan::TokenExperts;

    #[test]
    fn a_small_layout_is_as_written_by_hand() {
        let ids = [2, 0, 0, -1, 2, 0];
        let routing = Routing::new(MatrixRef::new(&ids[..], 3, 2).unwrap(), 3, None).unwrap();
        let plan = Plan::with_m_sum(3, 2, 3, 4, 12).unwrap();
        let mut space = vec![7; Layout::space_len(&plan).unwrap()];
        let layout = Layout::build(&plan, &routing, &mut space).unwrap();
        assert_eq!(layout.expert_num_tokens(), [3, 0, 2]);
        assert_eq!(layout.expert_start(), [0, 4, 4]);
        assert_eq!(layout.psum(), [3, 4, 6]);
        assert_eq!(layout.m_indices(), [0, 0, 0, -1, 2, 2, -1, -1, -1, -1, -1, -1]);
        assert_eq!(layout.inv_perm(), [4, 0, 1, -1, 5, 2]);
        assert_eq!(layout.live_rows(), 5);
        assert_eq!(Layout::space_len(&plan).unwrap(), 3 * 3 + 12 + 6);
        assert_eq!(Layout::device_space_len(&plan).unwrap(), 3 * 3 + 12 + 6 + 1 + 4 + 2 * 3 + 12);
        let psum = layout.psum().to_vec();
        let mut space = vec![7; 9 + 12];
        let again = Layout::from_psum(&psum, 4, 12, &mut space).unwrap();
        assert_eq!(again.m_indices(), layout.m_indices());
        assert_eq!(again.expert_start(), layout.expert_start());
        assert_eq!(again.expert_num_tokens(), layout.expert_num_tokens());
        assert_eq!((again.tokens(), again.inv_perm().len()), (0, 0));
        let last = layout.of_tokens(1..3);
        assert_eq!((last.tokens(), last.topk(), last.m_sum(), last.live_rows()), (2, 2, 12, 5));
        assert_eq!(last.inv_perm(), [1, -1, 5, 2]);
        assert_eq!(last.psum(), layout.psum());
    }

    #[test]
    fn a_gemm_of_another_row_tile_is_refused() {
        let mut space = [0; 11];
        let layout = Layout::from_psum(&[5], 8, 8, &mut space).unwrap();
        assert!(layout.check_row_tile(8).is_ok() && layout.check_row_tile(4).is_ok());
        assert!(matches!(layout.check_row_tile(16), Err(Error::Alignment { actual: 8, .. })));
        assert!(matches!(layout.check_row_tile(0), Err(Error::Alignment { .. })));
        assert_eq!(layout.psum_for_row_tile(8).unwrap(), [5]);
        assert!(matches!(layout.psum_for_row_tile(4), Err(Error::Alignment { actual: 8, .. })));
    }

    #[test]
    fn a_routing_that_does_not_fit_its_plan_is_an_error() {
        let ids = [0, 0, 0, 0];
        let matrix = MatrixRef::new(&ids[..], 4, 1).unwrap();
        let routing = Routing::new(matrix, 2, None).unwrap();
        let plan = Plan::with_m_sum(4, 1, 2, 2, 2).unwrap();
        let mut space = [0; 64];
        let error = Layout::build(&plan, &routing, &mut space).unwrap_err();
        assert_eq!(error, Error::MSum { m_sum: 2, needed: 4, alignment: 2 });
        let plan = Plan::tight(4, 1, 3, 2, TokenExperts::Distinct).unwrap();
        let error = Layout::build(&plan, &routing, &mut space).unwrap_err();
        assert!(error.to_string().starts_with("local_experts is 2"), "{error}");
        let plan = Plan::tight(2, 2, 2, 2, TokenExperts::Distinct).unwrap();
        let error = Layout::build(&plan, &routing, &mut space).unwrap_err();
        assert!(error.to_string().starts_with("topk_ids has shape [4, 1]"), "{error}");
        let plan = Plan::tight(4, 1, 2, 2, TokenExperts::Distinct).unwrap();
        let error = Layout::build(&plan, &routing, &mut space[..3]).unwrap_err();
        assert!(matches!(error, Error::BufferTooSmall { argument: "space", .. }), "{error}");
    }

    #[test]
    fn a_psum_that_runs_backwards_or_past_the_buffer_is_an_error_and_writes_nothing() {
        let mut space = [7; 30];
        for (psum, start) in [
            (&[-1, 4][..], "psum[0] is -1"),
            (&[5, 7], "psum[1] is 7, expected at least 8"),
            (&[5, 17], "m_sum is 16, expected at least 24"),
            (&[], "local_experts is 0"),
        ] {
            let error = Layout::from_psum(psum, 8, 16, &mut space).unwrap_err();
            assert!(error.to_string().starts_with(start), "{error}");
        }
        assert_eq!(space, [7; 30]);
    }
}
