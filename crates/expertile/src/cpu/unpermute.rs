//! Rows back to their tokens: a weighted sum in slot order.

use super::Cpu;
use super::arch::multiversion;
use super::arch::stream::prefetch;
use super::permute::live;
use crate::dtype::{Float, MatrixRef};
use crate::error::{Error, Result, checked_mul, require_len};
use crate::layout::Layout;
use rayon::prelude::*;

/// Columns summed at a time: their f32 sums stay in the first-level cache.
const COLUMNS: usize = 512;

/// `out[m, :] = sum over slots k of topk_weights[m, k] * rows[inv_perm[m, k], :]`.
///
/// `rows` is `[M_sum, H]`, `topk_weights` `[M, topk]` (ones if absent), `out` `[M, H]`. The sum is f32, starts at zero and
/// runs in slot order, each product and each sum rounded once, with one cast at the end. Empty slots are skipped, never
/// multiplied by zero; a token with no live slot gives zeros.
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
    const VALUES_PER_TASK: usize = 1 << 16;
    let hidden = rows.cols();
    let (tokens, topk) = (layout.tokens(), layout.topk());
    rows.require_shape("rows", layout.m_sum(), hidden)?;
    if hidden == 0 {
        return Err(Error::value("hidden", 0, "at least 1"));
    }
    if let Some(weights) = topk_weights {
        weights.require_shape("topk_weights", tokens, topk)?;
    }
    let needed = checked_mul("M * H", tokens, hidden)?;
    require_len("out", out.len(), needed)?;
    let by_size = VALUES_PER_TASK.div_ceil(hidden.saturating_mul(topk));
    let tokens_per_task = by_size.min(tokens.div_ceil(4 * cpu.threads()).max(1));
    let slots =
        |token: usize| layout.inv_perm().get(token * topk..).map_or(&[][..], |rest| &rest[..topk.min(rest.len())]);
    cpu.install(|| {
        out[..needed].par_chunks_mut(tokens_per_task * hidden).enumerate().for_each(|(task, out)| {
            for (offset, out) in out.chunks_exact_mut(hidden).enumerate() {
                let token = task * tokens_per_task + offset;
                reduce_token(cpu.isa(), rows, slots(token), slots(token + 1), topk_weights, token, out);
            }
        });
    });
    Ok(())
}

multiversion! {
    fn reduce_token<T: Float, O: Float>(
        isa: Isa,
        rows: MatrixRef<'_, T>,
        slots: &[i32],
        next_slots: &[i32],
        topk_weights: Option<MatrixRef<'_, f32>>,
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
