//! The grouped GEMM: the live rows of every expert times that expert's weights.
//!
//! `D[r, n] = sum_k A[r, k] * sfa[r, k/128] * B[e, n, k] * sfb[e, n/128, k/128]`, bf16 out; 4-bit weights have
//! `sfb[e, n, k/32]`, and a sum of every 32 of K is scaled by itself. Work is cut into (rows of
//! one expert) x (32 output columns); each such piece is computed by one task in a fixed order, so the result does not
//! depend on the number of threads. Padding rows are neither read nor written, and cost nothing.
//!
//! With AVX-512 BF16 a subnormal bf16 counts as zero, and a sum's roundings are those of `vdpbf16ps`; on every
//! instruction set the error stays within that of summing in f32.

mod memory;
mod packing;
mod tiles;
mod unpacking;

pub use packing::{PackedWeights, PackedWeightsBuilder};

use super::arch::Isa;
use super::arch::gemm::{multiply, multiply_block, multiply_decoded, multiply_e4m3, multiply_e4m3_block};
use super::arch::nibbles::{multiply_nibbles, multiply_nibbles_decoded};
use super::arch::panel::{
    BLOCK_GROUPS, BLOCK_PAIRS, BlockScales, BytePanel, GROUP_PAIRS, GroupScale, NibbleGroup, PANEL, Scratch, Sums,
};
use super::{Cpu, disjoint::Disjoint};
use crate::dtype::{E4m3, Float};
use crate::error::{Error, Result, checked_add, checked_mul, require_exact, require_len};
use crate::gemm::{ActivationFormat, WEIGHT_BLOCK};
use crate::layout::{Layout, Segments};
use crate::quantize::{Group, Scales};
use half::bf16;
use packing::{Panel, PanelWeights};
use rayon::prelude::*;
use std::ops::Range;
use tiles::{BLOCK_ROWS, PackedRows, ROW_BLOCK_WORDS, RowBlock};

#[cfg(test)]
mod tests;

/// The permuted rows, `[M_sum, K]` row-major.
#[derive(Debug, Clone, Copy)]
pub enum Activations<'a> {
    /// bf16, for weights of any format.
    Bf16(&'a [bf16]),
    /// e4m3 with one scale per 128 of K, for weights of any format but bf16.
    E4m3 {
        /// The values.
        rows: &'a [E4m3],
        /// Their scales, one per group of 128.
        scales: Scales<'a>,
    },
}

impl Activations<'_> {
    /// What the rows are made of.
    #[must_use]
    pub fn format(&self) -> ActivationFormat {
        match self {
            Self::Bf16(_) => ActivationFormat::Bf16,
            Self::E4m3 { .. } => ActivationFormat::E4m3,
        }
    }
}

/// Alignment of the workspace's parts.
const WORKSPACE_ALIGN_BYTES: usize = 64;

/// Bytes of workspace that [`grouped_gemm`] needs for `live_rows` rows of `k` values.
///
/// # Errors
/// [`Error::Value`] if `k` is zero, [`Error::Overflow`] if the size does not fit.
pub fn grouped_gemm_workspace_bytes(live_rows: usize, k: usize, activations: ActivationFormat) -> Result<usize> {
    let what = "workspace bytes of the grouped GEMM";
    if k == 0 {
        return Err(Error::value("k", k, "at least 1"));
    }
    let words = ROW_BLOCK_WORDS + k.div_ceil(2) + scale_words(activations, k);
    let bytes = checked_mul(what, checked_mul(what, live_rows, words)?, size_of::<u32>())?;
    // The caller's bytes may start anywhere.
    checked_add(what, bytes, WORKSPACE_ALIGN_BYTES)
}

/// Scales of one row in the workspace.
fn scale_words(activations: ActivationFormat, k: usize) -> usize {
    match activations {
        ActivationFormat::Bf16 => 0,
        ActivationFormat::E4m3 => k.div_ceil(WEIGHT_BLOCK),
    }
}

/// Multiplies the live rows of every expert by its weights: `out [M_sum, N]`, padding rows untouched.
///
/// # Errors
/// As [`grouped_gemm_with_bias`].
pub fn grouped_gemm(
    cpu: &Cpu,
    layout: &Layout<'_>,
    activations: Activations<'_>,
    weights: &PackedWeights,
    workspace: &mut [u8],
    out: &mut [bf16],
) -> Result<()> {
    grouped_gemm_with_bias(cpu, layout, activations, weights, None, workspace, out)
}

/// [`grouped_gemm`] with `bias [E, N]` added to the f32 sums, before they are rounded.
///
/// # Errors
/// [`Error::WeightFormat`] for e4m3 activations with bf16 weights, [`Error::Value`] if layout and weights differ in
/// `E`, if e4m3 activations come in groups of 32, or if their K is no multiple of 64, [`Error::BufferTooSmall`] if
/// `activations`, `activation_scales`, `workspace` (see [`grouped_gemm_workspace_bytes`]) or `out` are shorter than
/// their shapes, [`Error::Dtype`] if the scales are not of their format's type, [`Error::Shape`] unless the bias holds
/// exactly `E * N` values. Nothing is written on an error.
pub fn grouped_gemm_with_bias(
    cpu: &Cpu,
    layout: &Layout<'_>,
    activations: Activations<'_>,
    weights: &PackedWeights,
    bias: Option<&[f32]>,
    workspace: &mut [u8],
    out: &mut [bf16],
) -> Result<()> {
    let extent = Extent { experts: layout.local_experts(), m_sum: layout.m_sum(), live_rows: layout.live_rows() };
    let segments = (0..extent.experts).map(|expert| (expert, layout.expert_rows(expert)));
    check(extent, activations, weights, workspace.len(), out.len())?;
    if let Some(bias) = bias {
        require_exact("bias", bias.len(), &[weights.experts(), weights.n()])?;
    }
    multiply_segments(cpu, extent, segments, activations, weights, bias, workspace, out);
    Ok(())
}

/// [`grouped_gemm`] of rows that came in their places.
///
/// # Errors
/// As [`grouped_gemm_with_bias`].
pub fn grouped_gemm_of_segments(
    cpu: &Cpu,
    segments: &Segments<'_>,
    activations: Activations<'_>,
    weights: &PackedWeights,
    workspace: &mut [u8],
    out: &mut [bf16],
) -> Result<()> {
    let extent = Extent { experts: segments.local_experts(), m_sum: segments.m_sum(), live_rows: segments.live_rows() };
    check(extent, activations, weights, workspace.len(), out.len())?;
    multiply_segments(cpu, extent, segments.iter(), activations, weights, None, workspace, out);
    Ok(())
}

/// How many experts, rows and live rows there are.
#[derive(Debug, Clone, Copy)]
struct Extent {
    experts: usize,
    m_sum: usize,
    live_rows: usize,
}

/// The product, checked.
fn multiply_segments(
    cpu: &Cpu,
    Extent { m_sum, live_rows, .. }: Extent,
    segments: impl Iterator<Item = (usize, Range<usize>)>,
    activations: Activations<'_>,
    weights: &PackedWeights,
    bias: Option<&[f32]>,
    workspace: &mut [u8],
    out: &mut [bf16],
) {
    let k = weights.k();
    let start = workspace.as_ptr().align_offset(WORKSPACE_ALIGN_BYTES);
    let words = live_rows * (ROW_BLOCK_WORDS + k.div_ceil(2) + scale_words(activations.format(), k));
    let words: &mut [u32] = bytemuck::cast_slice_mut(&mut workspace[start..start + words * size_of::<u32>()]);
    let (blocks, words) = words.split_at_mut(live_rows * ROW_BLOCK_WORDS);
    let (pairs, scales) = words.split_at_mut(live_rows * k.div_ceil(2));
    let blocks = tiles::cut_into_blocks(segments, bytemuck::cast_slice_mut(blocks));
    // A sum of every 32 of K is scaled by itself with 4 bits: too short for kernels that take a whole block.
    let step_pairs = cpu.isa().step_pairs().filter(|_| weights.format().bits() > 4);
    cpu.install(|| {
        let scales = bytemuck::cast_slice_mut(scales);
        let rows = tiles::pack_rows(blocks, step_pairs, activations, (m_sum, k), pairs, scales);
        let (out, panels) = (Disjoint::new(out), weights.panels());
        (0..blocks.len() * panels).into_par_iter().for_each_init(
            || ([[0.0; PANEL]; BLOCK_ROWS], Scratch::NEW),
            |(sums, scratch), task| {
                let (block, panel) = (&blocks[task / panels], task % panels);
                let sums = &mut sums[..block.rows().len()];
                sums.fill([0.0; PANEL]);
                let weights_of_panel = weights.panel(block.expert(), panel);
                match step_pairs {
                    Some(_) => multiply_rows(cpu.isa(), block, rows, &weights_of_panel, sums, scratch),
                    None => multiply_tiles(cpu.isa(), block, rows, &weights_of_panel, sums),
                }
                store(block, panel, weights, bias, sums, &out);
            },
        );
    });
}

fn check(
    Extent { experts, m_sum, live_rows }: Extent,
    activations: Activations<'_>,
    weights: &PackedWeights,
    workspace: usize,
    out: usize,
) -> Result<()> {
    let k = weights.k();
    if experts != weights.experts() {
        let expected = format!("{}, as many as the weights have", weights.experts());
        return Err(Error::value("local_experts", experts, expected));
    }
    let len = match activations {
        Activations::Bf16(rows) => rows.len(),
        Activations::E4m3 { rows, scales } => {
            let format = scales.format();
            if !weights.format().goes_with(ActivationFormat::E4m3) {
                let actual = weights.format().name();
                let expected = "e4m3, mxfp4 or int4, for e4m3 activations";
                return Err(Error::WeightFormat { argument: "weights", actual, expected });
            }
            if format.group() != Group::G128 {
                return Err(Error::value("group", format.group().size(), "128, as the weights' blocks"));
            }
            scales.check("activation_scales", m_sum, k)?;
            rows.len()
        }
    };
    require_len("activations", len, checked_mul("M_sum * K", m_sum, k)?)?;
    require_len("out", out, checked_mul("M_sum * N", m_sum, weights.n())?)?;
    let needed = grouped_gemm_workspace_bytes(live_rows, k, activations.format())?;
    require_len("workspace", workspace, needed)
}

/// One panel's product with a block's rows to `sums`, which are zero, by a kernel that takes all of them at once.
fn multiply_rows(
    isa: Isa,
    block: &RowBlock,
    rows: PackedRows<'_>,
    panel: &Panel<'_>,
    sums: &mut [Sums],
    scratch: &mut Scratch,
) {
    let all = block.all();
    match panel.weights {
        PanelWeights::Bf16(lines) => {
            let ahead = panel.ahead(0, lines.len(), 0, 1);
            multiply_block(isa, rows.pairs(block, &all, 0, lines.len()), lines, sums, ahead);
        }
        PanelWeights::E4m3(bytes, scales) => {
            let (count, row_scales) = (bytes.lines.len(), rows.scales(block, &all, 0, scales.len()));
            let (pairs, ahead) = (rows.pairs(block, &all, 0, count), panel.ahead(0, count, 0, 1));
            let scales = BlockScales { panel: scales, rows: row_scales };
            multiply_e4m3_block(isa, pairs, bytes, scales, sums, scratch, ahead);
        }
        PanelWeights::Mxfp4(_) | PanelWeights::Int4Bf16(_) | PanelWeights::Int4F16(_) => {
            unreachable!("4-bit weights are multiplied by tiles of rows")
        }
    }
}

/// Adds one panel's product with a block's rows to `sums`, a tile of rows at a time.
///
/// With several tiles, a block of K at a time: the first tile brings its weights into the cache (and decodes them) for
/// the others, and each tile asks for its share of the next block's.
fn multiply_tiles(isa: Isa, block: &RowBlock, rows: PackedRows<'_>, panel: &Panel<'_>, sums: &mut [Sums]) {
    let tiles = block.tile_count();
    let run = if tiles > 1 { 1 } else { rows.k_blocks };
    match panel.weights {
        PanelWeights::Bf16(lines) => {
            for (k_block, lines) in (0..).step_by(run).zip(lines.chunks(run * BLOCK_PAIRS)) {
                for (index, tile) in block.tiles().enumerate() {
                    let pairs = rows.pairs(block, &tile, k_block, lines.len());
                    let ahead = panel.ahead(k_block, lines.len(), index, tiles);
                    multiply(isa, pairs, lines, &mut sums[tile], ahead);
                }
            }
        }
        PanelWeights::E4m3(bytes, scales) => {
            let mut kept = [[0; PANEL]; BLOCK_PAIRS];
            let blocks = bytes.lines.chunks(run * BLOCK_PAIRS).zip(bytes.special.chunks(run)).zip(scales.chunks(run));
            for (k_block, ((lines, special), scales)) in (0..).step_by(run).zip(blocks) {
                let kept = if run == 1 { &mut kept[..lines.len()] } else { &mut [] };
                for (index, tile) in block.tiles().enumerate() {
                    let pairs = rows.pairs(block, &tile, k_block, lines.len());
                    let ahead = panel.ahead(k_block, lines.len(), index, tiles);
                    let row_scales = rows.scales(block, &tile, k_block, scales.len());
                    let scales = BlockScales { panel: scales, rows: row_scales };
                    if index == 0 {
                        multiply_e4m3(isa, pairs, BytePanel { lines, special }, scales, &mut sums[tile], kept, ahead);
                    } else {
                        multiply_decoded(isa, pairs, kept, scales, &mut sums[tile], ahead);
                    }
                }
            }
        }
        PanelWeights::Mxfp4(groups) => multiply_group_tiles(isa, block, rows, panel, groups, sums),
        PanelWeights::Int4Bf16(groups) => multiply_group_tiles(isa, block, rows, panel, groups, sums),
        PanelWeights::Int4F16(groups) => multiply_group_tiles(isa, block, rows, panel, groups, sums),
    }
}

/// The same for 4-bit weights.
fn multiply_group_tiles<S: GroupScale>(
    isa: Isa,
    block: &RowBlock,
    rows: PackedRows<'_>,
    panel: &Panel<'_>,
    groups: &[NibbleGroup<S>],
    sums: &mut [Sums],
) {
    let tiles = block.tile_count();
    let run = if tiles > 1 { 1 } else { rows.k_blocks };
    let mut kept = [[0; PANEL]; BLOCK_PAIRS];
    for (k_block, groups) in (0..).step_by(run).zip(groups.chunks(run * BLOCK_GROUPS)) {
        let (count, blocks) = (groups.len() * GROUP_PAIRS, groups.len().div_ceil(BLOCK_GROUPS));
        let kept = if run == 1 { &mut kept[..count] } else { &mut [] };
        for (index, tile) in block.tiles().enumerate() {
            let pairs = rows.pairs(block, &tile, k_block, count);
            let ahead = panel.ahead(k_block, count, index, tiles);
            let row_scales = rows.scales(block, &tile, k_block, blocks);
            if index == 0 {
                multiply_nibbles(isa, pairs, groups, row_scales, &mut sums[tile], kept, ahead);
            } else {
                multiply_nibbles_decoded(isa, pairs, kept, groups, row_scales, &mut sums[tile], ahead);
            }
        }
    }
}

/// Scales a block's sums, adds the bias, rounds them to bf16 and writes them to their rows.
fn store(
    block: &RowBlock,
    panel: usize,
    weights: &PackedWeights,
    bias: Option<&[f32]>,
    sums: &mut [Sums],
    out: &Disjoint<'_, bf16>,
) {
    let (n, columns) = (weights.n(), weights.columns(panel));
    if let Some(scales) = weights.column_scales(block.expert(), columns.clone()) {
        for sums in &mut *sums {
            sums.iter_mut().zip(scales).for_each(|(sum, scale)| *sum *= scale);
        }
    }
    if let Some(bias) = bias {
        let bias = &bias[block.expert() * n..][columns.clone()];
        for sums in &mut *sums {
            sums.iter_mut().zip(bias).for_each(|(sum, bias)| *sum += bias);
        }
    }
    for (row, sums) in block.rows().zip(sums) {
        // SAFETY: only this task has this expert's rows of this block in the columns of this panel: panels have
        // columns of their own.
        #[allow(unsafe_code)]
        let out = unsafe { out.part(row * n + columns.start, columns.len()) };
        for (out, &mut sum) in out.iter_mut().zip(sums) {
            *out = <bf16 as Float>::from_f32(sum);
        }
    }
}
