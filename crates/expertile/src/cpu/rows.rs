//! Rows on the CPU: which are live, how tokens are shared among threads, rows gathered from strided ones.

use super::Cpu;
use super::arch::stream;
use crate::dtype::RowElement;
use crate::layout::Layout;
use crate::matrix::MatrixRef;
use rayon::prelude::*;

/// Tokens of a task, each of which moves so many values: enough that a task outweighs its scheduling, few enough that
/// all threads have tasks.
pub(super) fn tokens_per_task(cpu: &Cpu, tokens: usize, values_of_a_token: usize) -> usize {
    const VALUES_PER_TASK: usize = 1 << 16;
    let by_size = VALUES_PER_TASK.div_ceil(values_of_a_token.max(1));
    by_size.min(tokens.div_ceil(4 * cpu.threads()).max(1))
}

/// The rows of slots that have one.
pub(super) fn live(rows: &[i32]) -> impl Iterator<Item = usize> + '_ {
    rows.iter().filter_map(|&row| usize::try_from(row).ok())
}

/// Calls `work` with every token that has a live slot and the rows of its slots, each token once.
pub(super) fn each_token<S>(
    cpu: &Cpu,
    layout: &Layout<'_>,
    cols: usize,
    space: impl Fn() -> S + Sync + Send,
    work: impl Fn(&mut S, usize, &[i32]) + Sync + Send,
) {
    if layout.m_sum() == 0 {
        // Without rows nothing bounds their width, and even no row would have its space.
        return;
    }
    let topk = layout.topk();
    let tokens_per_task = tokens_per_task(cpu, layout.tokens(), cols.saturating_mul(topk));
    cpu.install(|| {
        layout.inv_perm().par_chunks(tokens_per_task * topk).enumerate().for_each_init(
            &space,
            |space, (task, slots)| {
                for (offset, rows) in slots.chunks_exact(topk).enumerate() {
                    if live(rows).next().is_some() {
                        work(space, task * tokens_per_task + offset, rows);
                    }
                }
                stream::fence();
            },
        );
    });
}

/// Room to gather a row into, where its elements do not stand next to each other.
pub(super) fn gather_space<T: RowElement>(x: MatrixRef<'_, T>) -> Vec<T> {
    if x.is_row_contiguous() { Vec::new() } else { vec![T::zeroed(); x.cols()] }
}

pub(super) fn gather<'s, T: RowElement>(x: MatrixRef<'s, T>, token: usize, space: &'s mut [T]) -> &'s [T] {
    match x.row(token) {
        Some(row) => row,
        None => {
            for (col, value) in space.iter_mut().enumerate() {
                *value = x.get(token, col);
            }
            space
        }
    }
}
