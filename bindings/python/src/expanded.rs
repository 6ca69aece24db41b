//! The experts alone on the CPU, on rows that a dispatcher has expanded and sorted.

use crate::array::{Apart, Array};
use crate::autograd::written;
use crate::error::exception;
use crate::limits;
use crate::placed_rows::{List, Rows, require_out, rows_format};
use crate::pool::{cpu, work};
use expertile::cpu::{Layer, TokenRows};
use expertile::{ActivationFormat, Dtype, LayerConfig, Layout};
use half::bf16;
use pyo3::prelude::*;
use std::ops::Range;

/// Rows of `psum` to live rows of `out [M_sum, H]`, experts of about `rows_at_once` rows before it looks whether it has
/// been interrupted.
pub(crate) fn run(
    py: Python<'_>,
    layer: &Layer,
    rows: &Rows<'_>,
    out: &Array<'_>,
    rows_at_once: Option<usize>,
) -> PyResult<()> {
    let (m_sum, hidden, experts) = (rows.m_sum, layer.shape().hidden(), layer.shape().local_experts());
    require_out(out, m_sum, hidden)?;
    let ready = rows_format(&rows.rows)?;
    if ready == ActivationFormat::E4m3 && layer.config().activation_format == ActivationFormat::Bf16 {
        return Err(rows.rows.dtype_error("bfloat16, for a layer of bf16 activations"));
    }
    let List::Psum { alignment, .. } = rows.list else { unreachable!("callers bring a psum") };
    let apart = Apart::check(&[out], &rows.arrays())?;
    let psum = rows.list().copied_list(py)?;
    let mut space = limits::vec("psum", 3 * experts + m_sum)?;
    space.resize(3 * experts + m_sum, 0);
    // The whole list first: nothing is written if it does not fit.
    let layout = Layout::from_psum(&psum, alignment, m_sum, &mut space).map_err(exception)?;
    let segments: Vec<Range<usize>> = (0..experts).map(|expert| layout.expert_rows(expert)).collect();

    let cpu = cpu()?;
    let config = LayerConfig { input: Dtype::Bf16, ..*layer.config() };
    let layer = layer.with_config(config, usize::MAX).map_err(exception)?.on(&cpu);
    rows.rows.require_contiguous()?;
    let results = out.contiguous_mut::<bf16>(apart)?;
    let products = 3 * hidden * layer.shape().intermediate();
    let at_once = rows_at_once.unwrap_or(limits::PRODUCTS_AT_ONCE * cpu.threads() / products.max(1)).max(1);
    let done = parts(&segments, at_once).into_iter().try_for_each(|experts| {
        let part = Part::new(&segments, experts, alignment);
        part.run(py, &layer, rows, &mut *results)?;
        py.check_signals()
    });
    // Also after an interruption, which leaves rows that are done.
    written(py, &[out])?;
    done
}

/// Experts that follow each other, of about so many rows together, and at least one.
fn parts(segments: &[Range<usize>], at_once: usize) -> Vec<Range<usize>> {
    let mut parts: Vec<Range<usize>> = Vec::new();
    let mut rows = 0;
    for (expert, segment) in segments.iter().enumerate() {
        match parts.last_mut() {
            Some(last) if rows + segment.len() <= at_once => last.end = expert + 1,
            _ => {
                parts.push(expert..expert + 1);
                rows = 0;
            }
        }
        rows += segment.len();
    }
    parts
}

/// Some of the experts, whose rows are a buffer of their own: the others have none.
struct Part {
    rows: Range<usize>,
    psum: Vec<i32>,
    alignment: usize,
}

impl Part {
    fn new(segments: &[Range<usize>], experts: Range<usize>, alignment: usize) -> Self {
        let (first, end) = (segments[experts.start].start, segments[experts.end - 1].end);
        let rows = first..end.next_multiple_of(alignment);
        let of_expert = |(expert, segment): (usize, &Range<usize>)| match expert {
            _ if expert < experts.start => 0,
            _ if expert < experts.end => (segment.end - first) as i32,
            _ => rows.len() as i32,
        };
        Self { psum: segments.iter().enumerate().map(of_expert).collect(), rows, alignment }
    }

    fn run(&self, py: Python<'_>, layer: &Layer, rows: &Rows<'_>, results: &mut [bf16]) -> PyResult<()> {
        let (m_sum, hidden) = (self.rows.len(), layer.shape().hidden());
        if m_sum == 0 {
            return Ok(());
        }
        let bytes = layer.expanded_workspace_bytes(m_sum).map_err(exception)?;
        let len = 3 * self.psum.len() + m_sum;
        let (mut workspace, mut space) = (limits::vec("workspace", bytes)?, limits::vec("psum", len)?);
        let out = &mut results[self.rows.start * hidden..self.rows.end * hidden];
        let part = || self.rows.clone();
        let rows = match &rows.scale {
            None => TokenRows::Bf16(rows.rows.matrix_rows(part())?),
            Some(scales) => {
                TokenRows::E4m3 { rows: rows.rows.matrix_rows(part())?, scales: scales.matrix_rows(part())? }
            }
        };
        work(py, || {
            workspace.resize(bytes, 0u8);
            space.resize(len, 0);
            let layout = Layout::from_psum(&self.psum, self.alignment, m_sum, &mut space).map_err(exception)?;
            match rows {
                // Quantized there, for e4m3 activations.
                TokenRows::Bf16(rows) => layer.run_expanded(rows, &layout, &mut workspace, out),
                ready => layer.run_expanded_ready(ready, &layout, &mut workspace, out),
            }
            .map_err(exception)
        })
    }
}
