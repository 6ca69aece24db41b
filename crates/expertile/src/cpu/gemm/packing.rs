//! Weights in the order the kernels read them, and how they get there.
//!
//! The N output columns of an expert are cut into panels of 32; a panel holds its K dimension in pairs,
//! `[ceil(K/2)][32][2]`, so that a kernel streams it from the first byte to the last. e4m3 panels keep one scale per
//! block of 128 of K: a panel never straddles two blocks of 128 rows, because a segment with its own scales must start on
//! a multiple of 32. The order does not depend on the instruction set.

use super::memory::AlignedBytes;
use crate::cpu::Cpu;
use crate::cpu::arch::gemm::{
    Ahead, BLOCK_PAIRS, ByteLine, BytePanel, PANEL, PairLine, e4m3_is_special, e4m3_position,
};
use crate::dtype::{E4m3, MatrixRef};
use crate::error::{Error, Result, checked_mul, require_len};
use crate::gemm::{WEIGHT_BLOCK, WeightFormat};
use bytemuck::allocation::try_zeroed_vec;
use half::bf16;
use rayon::prelude::*;
use std::borrow::Cow;
use std::ops::Range;

/// Prepacked weights of all experts, `[E, N, K]`; knows its format.
pub struct PackedWeights {
    shape: Shape,
    bytes: AlignedBytes,
    /// `[E, panels, blocks of K]`; empty for bf16.
    scales: Vec<f32>,
    /// As `scales`: which lines of a block hold special bytes.
    special: Vec<u64>,
}

/// How far ahead of their use streamed weights are asked for: the way from memory takes as long as multiplying a hundred
/// lines. (Measured: twice as far is no better, half as far costs e4m3 a tenth; so does bringing e4m3 into L1 at once, or
/// bf16 into L2 only.)
const STREAM_AHEAD_BYTES: usize = 8192;

/// Format and extents of packed weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Shape {
    format: WeightFormat,
    experts: usize,
    n: usize,
    k: usize,
}

impl Shape {
    fn new(format: WeightFormat, experts: usize, n: usize, k: usize) -> Result<Self> {
        for (argument, actual) in [("experts", experts), ("n", n), ("k", k)] {
            if actual == 0 {
                return Err(Error::value(argument, actual, "at least 1"));
            }
        }
        Ok(Self { format, experts, n, k })
    }

    fn pairs(self) -> usize {
        self.k.div_ceil(2)
    }

    fn panels(self) -> usize {
        self.n.div_ceil(PANEL)
    }

    fn blocks(self) -> usize {
        self.k.div_ceil(WEIGHT_BLOCK)
    }

    fn line_bytes(self) -> usize {
        2 * PANEL * self.format.bytes()
    }

    fn panel_bytes(self) -> usize {
        self.pairs() * self.line_bytes()
    }

    fn bytes(self) -> Result<usize> {
        let what = "bytes of the packed weights";
        let panel = checked_mul(what, self.pairs(), self.line_bytes())?;
        checked_mul(what, checked_mul(what, self.experts, self.panels())?, panel)
    }

    fn scales(self) -> Result<usize> {
        match self.format {
            WeightFormat::Bf16 => Ok(0),
            WeightFormat::E4m3 => {
                let panels = checked_mul("scales of the packed weights", self.experts, self.panels())?;
                checked_mul("scales of the packed weights", panels, self.blocks())
            }
        }
    }
}

impl PackedWeights {
    /// Packs bf16 weights `[experts, n, k]`, row-major.
    ///
    /// # Errors
    /// [`Error::Value`] if an extent is zero, [`Error::BufferTooSmall`] if `weights` is shorter, [`Error::Overflow`] if the
    /// size does not fit, [`Error::Memory`] if there is no memory for it.
    pub fn pack_bf16(cpu: &Cpu, weights: &[bf16], experts: usize, n: usize, k: usize) -> Result<Self> {
        Shape::new(WeightFormat::Bf16, experts, n, k)?.bytes()?;
        let len = checked_mul("n * k", n, k)?;
        require_len("weights", weights.len(), checked_mul("experts * n * k", experts, len)?)?;
        let mut builder = PackedWeightsBuilder::new(WeightFormat::Bf16, experts, n, k)?;
        for (expert, weights) in weights.chunks_exact(len).take(experts).enumerate() {
            builder.pack_bf16_rows(cpu, expert, 0, MatrixRef::new(weights, n, k)?)?;
        }
        builder.finish()
    }

    /// Packs e4m3 weights `[experts, n, k]` with f32 block scales `[experts, ceil(n/128), ceil(k/128)]`, both row-major.
    ///
    /// # Errors
    /// [`Error::Value`] if an extent is zero, [`Error::BufferTooSmall`] if `weights` or `scales` is shorter,
    /// [`Error::Overflow`] if the size does not fit, [`Error::Memory`] if there is no memory for it.
    pub fn pack_e4m3(cpu: &Cpu, weights: &[E4m3], scales: &[f32], experts: usize, n: usize, k: usize) -> Result<Self> {
        Shape::new(WeightFormat::E4m3, experts, n, k)?.bytes()?;
        let len = checked_mul("n * k", n, k)?;
        require_len("weights", weights.len(), checked_mul("experts * n * k", experts, len)?)?;
        let (rows, cols) = (n.div_ceil(WEIGHT_BLOCK), k.div_ceil(WEIGHT_BLOCK));
        require_len("scales", scales.len(), checked_mul("scales", experts, rows * cols)?)?;
        let mut builder = PackedWeightsBuilder::new(WeightFormat::E4m3, experts, n, k)?;
        let parts = weights.chunks_exact(len).zip(scales.chunks_exact(rows * cols)).take(experts);
        for (expert, (weights, scales)) in parts.enumerate() {
            let (weights, scales) = (MatrixRef::new(weights, n, k)?, MatrixRef::new(scales, rows, cols)?);
            builder.pack_e4m3_rows(cpu, expert, 0, weights, scales)?;
        }
        builder.finish()
    }

    /// What the weights are made of.
    #[must_use]
    pub fn format(&self) -> WeightFormat {
        self.shape.format
    }

    /// `E`.
    #[must_use]
    pub fn experts(&self) -> usize {
        self.shape.experts
    }

    /// `N`: output columns.
    #[must_use]
    pub fn n(&self) -> usize {
        self.shape.n
    }

    /// `K`: columns of the activations.
    #[must_use]
    pub fn k(&self) -> usize {
        self.shape.k
    }

    /// Bytes held, scales and the padding of N and K included.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes.as_slice().len() + size_of_val(&*self.scales) + size_of_val(&*self.special)
    }

    /// Panels to an expert.
    pub(super) fn panels(&self) -> usize {
        self.shape.panels()
    }

    /// One panel of an expert.
    pub(super) fn panel(&self, expert: usize, panel: usize) -> Panel<'_> {
        let panel = expert * self.shape.panels() + panel;
        let len = self.shape.panel_bytes();
        let onwards = &self.bytes.as_slice()[panel * len..];
        let weights = match self.shape.format {
            WeightFormat::Bf16 => PanelWeights::Bf16(bytemuck::cast_slice(&onwards[..len])),
            WeightFormat::E4m3 => {
                let blocks = self.shape.blocks();
                let blocks = panel * blocks..(panel + 1) * blocks;
                let (lines, special) = (bytemuck::cast_slice(&onwards[..len]), &self.special[blocks.clone()]);
                PanelWeights::E4m3(BytePanel { lines, special }, &self.scales[blocks])
            }
        };
        Panel { weights, line_bytes: self.shape.line_bytes(), onwards }
    }
}

/// One panel of an expert.
pub(super) struct Panel<'a> {
    pub(super) weights: PanelWeights<'a>,
    line_bytes: usize,
    /// All weights from this panel on: what follows it is read next.
    onwards: &'a [u8],
}

/// One panel's weights.
#[derive(Clone, Copy)]
pub(super) enum PanelWeights<'a> {
    Bf16(&'a [PairLine]),
    /// With one scale per block of K.
    E4m3(BytePanel<'a>, &'a [f32]),
}

impl<'a> Panel<'a> {
    /// What to ask for while one of `tiles` tiles is multiplied by `pairs` pairs from `block` on.
    ///
    /// Several tiles go through a block at a time, and share the next one. A single tile streams through the panel; what
    /// is e4m3 takes its time to be decoded and multiplied, and waits in L2 meanwhile.
    pub(super) fn ahead(&self, block: usize, pairs: usize, tile: usize, tiles: usize) -> Ahead<'a> {
        let soon = tiles > 1 || matches!(self.weights, PanelWeights::Bf16(_));
        let distance = if tiles > 1 { BLOCK_PAIRS * self.line_bytes } else { STREAM_AHEAD_BYTES };
        let len = pairs * self.line_bytes;
        let start = block * BLOCK_PAIRS * self.line_bytes + distance;
        let [start, end] = [tile, tile + 1].map(|tile| (start + tile * len / tiles).min(self.onwards.len()));
        Ahead { bytes: &self.onwards[start..end], soon }
    }
}

impl std::fmt::Debug for PackedWeights {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("PackedWeights").field(&self.shape).finish()
    }
}

/// Packs weights that come in parts: expert by expert, gate and up apart.
pub struct PackedWeightsBuilder {
    weights: PackedWeights,
    /// `[E, N]`: which rows have come.
    packed: Vec<bool>,
}

impl PackedWeightsBuilder {
    /// Room for `[experts, n, k]` of `format`.
    ///
    /// # Errors
    /// [`Error::Value`] if an extent is zero, [`Error::Overflow`] if the size does not fit, [`Error::Memory`] if there is
    /// no memory for it.
    pub fn new(format: WeightFormat, experts: usize, n: usize, k: usize) -> Result<Self> {
        let shape = Shape::new(format, experts, n, k)?;
        let (bytes, scales) = (shape.bytes()?, shape.scales()?);
        let rows = checked_mul("experts * n", experts, n)?;
        let no_memory = |()| Error::Memory { what: "packed_weights", bytes };
        let weights = PackedWeights {
            shape,
            bytes: AlignedBytes::zeroed(bytes).ok_or(()).map_err(no_memory)?,
            scales: try_zeroed_vec(scales).map_err(no_memory)?,
            special: try_zeroed_vec(scales).map_err(no_memory)?,
        };
        Ok(Self { weights, packed: try_zeroed_vec(rows).map_err(no_memory)? })
    }

    /// Packs `rows [R, k]` as rows `first_row..first_row + R` of an expert.
    ///
    /// # Errors
    /// [`Error::WeightFormat`] if this is a builder of e4m3, [`Error::Value`] if there is no such expert,
    /// [`Error::Shape`] if the rows do not fit, [`Error::Count`] if one of them has come before.
    pub fn pack_bf16_rows(
        &mut self,
        cpu: &Cpu,
        expert: usize,
        first_row: usize,
        rows: MatrixRef<'_, bf16>,
    ) -> Result<()> {
        self.require_format(WeightFormat::Bf16)?;
        self.mark_packed(expert, first_row, rows.rows(), rows.cols())?;
        self.for_each_panel(cpu, expert, first_row..first_row + rows.rows(), |bytes, columns, row| {
            let lines: &mut [PairLine] = bytemuck::cast_slice_mut(bytes);
            for (column, row) in columns.zip(row..) {
                let row = contiguous(rows, row);
                let (whole, odd) = row.as_chunks::<2>();
                for (line, [even, odd]) in lines.iter_mut().zip(whole) {
                    line[column] = u32::from(even.to_bits()) | u32::from(odd.to_bits()) << 16;
                }
                if let &[last] = odd {
                    lines[whole.len()][column] = u32::from(last.to_bits());
                }
            }
        });
        Ok(())
    }

    /// Packs `rows [R, k]` with block scales `[ceil(R/128), ceil(k/128)]` as rows `first_row..first_row + R` of an expert.
    ///
    /// The blocks of 128 rows are counted from `first_row`, which must be a multiple of 32: gate and up, each with its own
    /// scales, are two such parts.
    ///
    /// # Errors
    /// [`Error::WeightFormat`] if this is a builder of bf16, [`Error::Value`] if there is no such expert or `first_row` is
    /// no multiple of 32, [`Error::Shape`] if rows or scales do not fit, [`Error::Count`] if a row has come before.
    pub fn pack_e4m3_rows(
        &mut self,
        cpu: &Cpu,
        expert: usize,
        first_row: usize,
        rows: MatrixRef<'_, E4m3>,
        scales: MatrixRef<'_, f32>,
    ) -> Result<()> {
        self.require_format(WeightFormat::E4m3)?;
        if !first_row.is_multiple_of(PANEL) {
            return Err(Error::value("first_row", first_row, format!("a multiple of {PANEL}")));
        }
        scales.require_shape("scales", rows.rows().div_ceil(WEIGHT_BLOCK), self.weights.shape.blocks())?;
        self.mark_packed(expert, first_row, rows.rows(), rows.cols())?;
        self.for_each_panel(cpu, expert, first_row..first_row + rows.rows(), |bytes, columns, row| {
            pack_e4m3_panel(rows, row..row + columns.len(), bytemuck::cast_slice_mut(bytes));
        });
        let first_panel = first_row / PANEL;
        self.note_blocks(cpu, expert, first_panel..first_panel + rows.rows().div_ceil(PANEL), scales);
        Ok(())
    }

    /// Notes, for the panels of a part, the scales of their blocks and which of their lines hold special bytes.
    fn note_blocks(&mut self, cpu: &Cpu, expert: usize, panels: Range<usize>, part_scales: MatrixRef<'_, f32>) {
        let PackedWeights { shape, bytes, scales, special } = &mut self.weights;
        let (start, blocks) = (expert * shape.panels() + panels.start, shape.blocks());
        let bytes = bytes.as_slice()[start * shape.panel_bytes()..].par_chunks(shape.panel_bytes());
        let scales = scales[start * blocks..][..panels.len() * blocks].par_chunks_mut(blocks);
        let special = special[start * blocks..][..panels.len() * blocks].par_chunks_mut(blocks);
        cpu.install(|| {
            bytes.zip(scales).zip(special).enumerate().for_each(|(panel, ((bytes, scales), special))| {
                let lines: &[ByteLine] = bytemuck::cast_slice(bytes);
                let blocks = lines.chunks(BLOCK_PAIRS).zip(scales).zip(special);
                for (block, ((lines, scale), special)) in blocks.enumerate() {
                    *scale = part_scales.get(panel * PANEL / WEIGHT_BLOCK, block);
                    *special = lines.iter().rev().fold(0, |mask, line| mask << 1 | u64::from(is_special(line)));
                }
            });
        });
    }

    /// The packed weights.
    ///
    /// # Errors
    /// [`Error::Count`] if rows of an expert are missing.
    pub fn finish(self) -> Result<PackedWeights> {
        let n = self.weights.shape.n;
        for (expert, packed) in self.packed.chunks_exact(n).enumerate() {
            let count = packed.iter().filter(|&&packed| packed).count();
            if count != n {
                return Err(Error::Count {
                    argument: "packed_rows",
                    expert,
                    actual: count as i64,
                    expected: format!("{n}: every row of every expert"),
                });
            }
        }
        Ok(self.weights)
    }

    fn require_format(&self, format: WeightFormat) -> Result<()> {
        let actual = self.weights.shape.format;
        if actual != format {
            return Err(Error::WeightFormat { argument: "builder", actual: actual.name(), expected: format.name() });
        }
        Ok(())
    }

    /// Notes that these rows come now; fails before noting anything.
    fn mark_packed(&mut self, expert: usize, first_row: usize, rows: usize, cols: usize) -> Result<()> {
        let Shape { experts, n, k, .. } = self.weights.shape;
        if expert >= experts {
            return Err(Error::value("expert", expert, format!("below {experts}")));
        }
        if cols != k || first_row > n || rows > n - first_row {
            let room = n.saturating_sub(first_row);
            return Err(Error::shape("rows", &[rows, cols], format!("[R, {k}] with R at most {room}")));
        }
        let packed = &mut self.packed[expert * n + first_row..][..rows];
        if let Some(row) = packed.iter().position(|&packed| packed) {
            return Err(Error::Count {
                argument: "packed_rows",
                expert,
                actual: (first_row + row) as i64,
                expected: "a row that was not packed before".into(),
            });
        }
        packed.fill(true);
        Ok(())
    }

    /// Runs `pack(panel's bytes, columns of the panel, first of the new rows)` for every panel that `rows` touch.
    fn for_each_panel(
        &mut self,
        cpu: &Cpu,
        expert: usize,
        rows: Range<usize>,
        pack: impl Fn(&mut [u8], Range<usize>, usize) + Sync,
    ) {
        let shape = self.weights.shape;
        let panels = rows.start / PANEL..rows.end.div_ceil(PANEL).max(rows.start / PANEL);
        let len = shape.panel_bytes();
        let start = (expert * shape.panels() + panels.start) * len;
        let bytes = &mut self.weights.bytes.as_mut_slice()[start..][..panels.len() * len];
        cpu.install(|| {
            bytes.par_chunks_mut(len).zip(panels.into_par_iter()).for_each(|(bytes, panel)| {
                let first = panel * PANEL;
                let columns = rows.start.max(first) - first..rows.end.min(first + PANEL) - first;
                pack(bytes, columns.clone(), first + columns.start - rows.start);
            });
        });
    }
}

/// Packs `part` of the rows as a panel's first columns.
fn pack_e4m3_panel(rows: MatrixRef<'_, E4m3>, part: Range<usize>, lines: &mut [ByteLine]) {
    let rows: Vec<_> = part.map(|row| contiguous(rows, row)).collect();
    // A block of K at a time, so that the lines that the columns take turns to write stay in the L1 cache.
    for (block, lines) in lines.chunks_mut(BLOCK_PAIRS).enumerate() {
        for (column, row) in rows.iter().enumerate() {
            let [even_at, odd_at] = [0, 1].map(|parity| e4m3_position(column, parity));
            let start = block * WEIGHT_BLOCK;
            let (whole, odd) = row[start..row.len().min(start + WEIGHT_BLOCK)].as_chunks::<2>();
            for (line, &[even, odd]) in lines.iter_mut().zip(whole) {
                line[even_at] = even.0;
                line[odd_at] = odd.0;
            }
            if let &[last] = odd {
                lines[whole.len()][even_at] = last.0;
            }
        }
    }
}

/// Whether a line holds a special byte; looks at all of them, which vector code does faster than stopping.
fn is_special(line: &ByteLine) -> bool {
    line.iter().fold(false, |any, &byte| any | e4m3_is_special(byte))
}

/// A row whose elements stand next to each other, copied if they do not.
fn contiguous<'a, T: Copy>(rows: MatrixRef<'a, T>, row: usize) -> Cow<'a, [T]> {
    match rows.row(row) {
        Some(row) => Cow::Borrowed(row),
        None => Cow::Owned((0..rows.cols()).map(|col| rows.get(row, col)).collect()),
    }
}
