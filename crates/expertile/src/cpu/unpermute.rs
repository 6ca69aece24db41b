//! Rows back to their tokens: a weighted sum in slot order.

use super::Cpu;
use super::arch::multiversion;
use super::arch::stream::prefetch;
use super::rows::{live, tokens_per_task};
use crate::dtype::Float;
use crate::error::{Error, Result, checked_mul, require_len};
use crate::layout::Layout;
use crate::matrix::MatrixRef;
use crate::routing::{Routing, require_slots};
use rayon::prelude::*;

/// Columns summed at a time: their f32 sums stay in the first-level cache.
const COLUMNS: usize = 512;

/// `out[m, :] = sum over slots k of topk_weights[m, k] * rows[inv_perm[m, k], :]`.
///
/// `rows` is `[M_sum, H]`, `topk_weights` `[M, topk]` (ones if absent), `out` `[M, H]`. The sum is f32, starts at zero
/// and runs in slot order, each product and each sum rounded once, with one cast at the end. Empty slots are skipped,
/// never multiplied by zero; a token with no live slot gives zeros.
///
/// # Errors
/// [`Error::Shape`] unless `rows` has `M_sum` rows and the weights are `[M, topk]`, [`Error::Value`] for `H = 0`,
/// [`Error::BufferTooSmall`] for a short `out`, [`Error::Overflow`].
pub fn unpermute<T: Float, O: Float>(
    cpu: &Cpu,
    rows: MatrixRef<'_, T>,
    layout: &Layout<'_>,
    topk_weights: Option<MatrixRef<'_, f32>>,
    out: &mut [O],
) -> Result<()> {
    unpermute_with_shared(cpu, rows, layout, topk_weights, None, out)
}

/// What every token's sum ends with.
#[derive(Clone, Copy)]
pub(super) struct SharedRows<'a, T> {
    /// `[M, H]`.
    pub(super) rows: MatrixRef<'a, T>,
    /// `[M]`: their weights; ones if absent.
    pub(super) weights: Option<&'a [f32]>,
}

impl<T: Copy> SharedRows<'_, T> {
    fn weight(&self, token: usize) -> f32 {
        self.weights.map_or(1.0, |weights| weights[token])
    }
}

/// [`unpermute`], with a row of its own added to every token's sum after its slots.
///
/// # Errors
/// As [`unpermute`]; [`Error::Shape`] unless the shared rows are `[M, H]`.
pub(super) fn unpermute_with_shared<T: Float, O: Float>(
    cpu: &Cpu,
    rows: MatrixRef<'_, T>,
    layout: &Layout<'_>,
    topk_weights: Option<MatrixRef<'_, f32>>,
    shared: Option<SharedRows<'_, T>>,
    out: &mut [O],
) -> Result<()> {
    rows.require_shape("rows", layout.m_sum(), rows.cols())?;
    if let Some(SharedRows { rows: shared, .. }) = shared {
        shared.require_shape("shared_rows", layout.tokens(), rows.cols())?;
    }
    reduce(cpu, rows, layout.inv_perm(), (layout.tokens(), layout.topk()), topk_weights, shared, out)
}

/// The same for rows that someone else permuted: from `inv_perm [M, topk]` instead of a layout.
///
/// A slot is empty if its row is negative, or if a `routing` is given and names no local expert there, whatever
/// `inv_perm` holds then: others leave such slots unwritten.
///
/// # Errors
/// As [`unpermute`]; [`Error::Shape`] unless the routing is `[M, topk]`, [`Error::SlotRow`] for a row that `rows` does
/// not have.
pub fn unpermute_slots<T: Float, O: Float>(
    cpu: &Cpu,
    rows: MatrixRef<'_, T>,
    inv_perm: MatrixRef<'_, i32>,
    routing: Option<&Routing<'_>>,
    topk_weights: Option<MatrixRef<'_, f32>>,
    out: &mut [O],
) -> Result<()> {
    let (tokens, topk) = (inv_perm.rows(), inv_perm.cols());
    if topk == 0 {
        return Err(Error::value("topk", 0, "at least 1"));
    }
    if let Some(routing) = routing.filter(|routing| (routing.tokens(), routing.topk()) != (tokens, topk)) {
        let actual = [routing.tokens(), routing.topk()];
        return Err(Error::shape("topk_ids", &actual, format!("[{tokens}, {topk}], as inv_perm")));
    }
    // A matrix of strides 0 has any number of slots in a few bytes: nothing is walked or allocated before they are
    // known to be as many as `out` has tokens for.
    require_operands(rows.cols(), (tokens, topk), topk_weights, out.len())?;
    let count = require_slots(tokens, topk)?;
    let mut live = Vec::new();
    let bytes = count.saturating_mul(size_of::<i32>());
    live.try_reserve_exact(count).map_err(|_| Error::Memory { what: "the list of live slots", bytes })?;
    for token in 0..tokens {
        for slot in 0..topk {
            let row = inv_perm.get(token, slot);
            let empty = row < 0 || routing.is_some_and(|routing| routing.local_expert(token, slot).is_none());
            if !empty && row as usize >= rows.rows() {
                return Err(Error::SlotRow { token, slot, row, rows: rows.rows() });
            }
            live.push(if empty { -1 } else { row });
        }
    }
    reduce(cpu, rows, &live, (tokens, topk), topk_weights, None::<SharedRows<'_, T>>, out)
}

/// Sums `rows` into `out`; `inv_perm [M, topk]` holds rows that exist, or negative values.
pub(super) fn reduce<T: Float, S: Float, O: Float>(
    cpu: &Cpu,
    rows: MatrixRef<'_, T>,
    inv_perm: &[i32],
    (tokens, topk): (usize, usize),
    topk_weights: Option<MatrixRef<'_, f32>>,
    shared: Option<SharedRows<'_, S>>,
    out: &mut [O],
) -> Result<()> {
    let hidden = rows.cols();
    let needed = require_operands(hidden, (tokens, topk), topk_weights, out.len())?;
    let tokens_per_task = tokens_per_task(cpu, tokens, hidden.saturating_mul(topk));
    let slots = |token: usize| inv_perm.get(token * topk..).map_or(&[][..], |rest| &rest[..topk.min(rest.len())]);
    cpu.install(|| {
        out[..needed].par_chunks_mut(tokens_per_task * hidden).enumerate().for_each(|(task, out)| {
            for (offset, out) in out.chunks_exact_mut(hidden).enumerate() {
                let token = task * tokens_per_task + offset;
                reduce_token(cpu.isa(), rows, slots(token), slots(token + 1), topk_weights, shared, token, out);
            }
        });
    });
    Ok(())
}

/// `M * H`, if `out` holds as many and the weights are `[M, topk]`.
fn require_operands(
    hidden: usize,
    (tokens, topk): (usize, usize),
    topk_weights: Option<MatrixRef<'_, f32>>,
    out: usize,
) -> Result<usize> {
    if hidden == 0 {
        return Err(Error::value("hidden", 0, "at least 1"));
    }
    if let Some(weights) = topk_weights {
        weights.require_shape("topk_weights", tokens, topk)?;
    }
    let needed = checked_mul("M * H", tokens, hidden)?;
    require_len("out", out, needed)?;
    Ok(needed)
}

multiversion! {
    fn reduce_token<T: Float, S: Float, O: Float>(
        isa: Isa,
        rows: MatrixRef<'_, T>,
        slots: &[i32],
        next_slots: &[i32],
        topk_weights: Option<MatrixRef<'_, f32>>,
        shared: Option<SharedRows<'_, S>>,
        token: usize,
        out: &mut [O],
    ) {
        for (block, out) in out.chunks_mut(COLUMNS).enumerate() {
            let columns = block * COLUMNS..block * COLUMNS + out.len();
            // Rows of a token stand far apart, which no hardware prefetcher guesses: ask one token ahead.
            for row in live(next_slots).filter_map(|row| rows.row(row)) {
                prefetch(&row[columns.clone()]);
            }
            let mut sums = [0.0f32; COLUMNS];
            let sums = &mut sums[..out.len()];
            let mut terms = slots.iter().enumerate().filter_map(|(slot, &row)| {
                let row = usize::try_from(row).ok()?;
                Some((row, topk_weights.map_or(1.0, |weights| weights.get(token, slot))))
            });
            while let Some(first) = terms.next() {
                let four = [Some(first), terms.next(), terms.next(), terms.next()];
                add_terms(sums, rows, columns.start, four);
            }
            if let Some(shared) = shared {
                let term = Some((token, shared.weight(token)));
                add_terms(sums, shared.rows, columns.start, [term, None, None, None]);
            }
            for (out, &sum) in out.iter_mut().zip(&*sums) {
                *out = O::from_f32(sum);
            }
        }
    }
}

/// Adds up to four weighted rows to `sums`, in order. Four at a time read and write the sums a quarter as often.
#[inline(always)]
fn add_terms<T: Float>(
    sums: &mut [f32],
    rows: MatrixRef<'_, T>,
    first_column: usize,
    terms: [Option<(usize, f32)>; 4],
) {
    let slice = |row: usize| rows.row(row).map(|values| &values[first_column..][..sums.len()]);
    if let [Some((a, wa)), Some((b, wb)), Some((c, wc)), Some((d, wd))] = terms
        && let (Some(a), Some(b), Some(c), Some(d)) = (slice(a), slice(b), slice(c), slice(d))
    {
        for ((((sum, a), b), c), d) in sums.iter_mut().zip(a).zip(b).zip(c).zip(d) {
            let sum_ab = (*sum + wa * a.to_f32()) + wb * b.to_f32();
            *sum = (sum_ab + wc * c.to_f32()) + wd * d.to_f32();
        }
        return;
    }
    for (row, weight) in terms.into_iter().flatten() {
        match rows.row(row) {
            Some(values) => {
                for (sum, value) in sums.iter_mut().zip(&values[first_column..]) {
                    *sum += weight * value.to_f32();
                }
            }
            None => {
                for (col, sum) in sums.iter_mut().enumerate() {
                    *sum += weight * rows.get(row, first_column + col).to_f32();
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_that_no_local_expert_answers_for_are_skipped_whatever_row_they_name() {
        let rows = [1.0f32, 2.0, 10.0, 20.0, 100.0, 200.0];
        let rows = MatrixRef::new(&rows, 3, 2).unwrap();
        let ids = [0, 2, 1, -1];
        let map = [0, 1, -1];
        let routing = Routing::new(MatrixRef::new(&ids[..], 2, 2).unwrap(), 2, Some(&map)).unwrap();
        let inv_perm = [2, i32::MAX, 1, 77];
        let inv_perm = MatrixRef::new(&inv_perm, 2, 2).unwrap();
        let mut out = [7.0f32; 4];
        unpermute_slots(&Cpu::new(), rows, inv_perm, Some(&routing), None, &mut out).unwrap();
        assert_eq!(out, [100.0, 200.0, 10.0, 20.0]);
    }

    #[test]
    fn a_row_past_the_buffer_is_named_and_nothing_is_written() {
        let rows = MatrixRef::new(&[1.0f32, 2.0], 2, 1).unwrap();
        let mut out = [7.0f32; 2];
        let inv_perm = MatrixRef::new(&[0, 2], 2, 1).unwrap();
        let error = unpermute_slots(&Cpu::new(), rows, inv_perm, None, None, &mut out).unwrap_err();
        assert_eq!(error, Error::SlotRow { token: 1, slot: 0, row: 2, rows: 2 });
        assert_eq!(out, [7.0; 2]);
    }
}
