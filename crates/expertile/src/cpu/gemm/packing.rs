//! Weights in the order the kernels read them, and how they get there.
//!
//! The N output columns of an expert are one segment, or gate's and up's; a segment is cut into panels of 32 columns,
//! the last one filled up with zeros, so that up starts at a panel of its own. A panel holds its K dimension in pairs,
//! `[ceil(K/2)][32][2]`, so that a kernel streams it from the first byte to the last. e4m3 panels keep one scale per
//! block of 128 of K: a panel never straddles two blocks of 128 rows, because rows with their own scales must start on
//! a multiple of 32 of their segment. The order does not depend on the instruction set.

mod nibbles;

use super::memory::AlignedBytes;
use crate::cpu::Cpu;
use crate::cpu::arch::panel::{
    Ahead, BLOCK_PAIRS, ByteLine, BytePanel, GROUP_PAIRS, NibbleGroup, PANEL, PairLine, ScaleKind, e4m3_is_special,
    e4m3_position,
};
use crate::dtype::{E4m3, Float};
use crate::error::{Error, Result, checked_mul, require_exact};
use crate::gemm::{GateUpOrder, WEIGHT_BLOCK, WeightFormat};
use crate::matrix::MatrixRef;
use crate::weights::RowLedger;
use bytemuck::allocation::try_zeroed_vec;
use half::{bf16, f16};
use rayon::prelude::*;
use std::ops::Range;

/// Prepacked weights of all experts, `[E, N, K]`; knows its format.
pub struct PackedWeights {
    shape: Shape,
    bytes: AlignedBytes,
    /// `[E, panels, blocks of K]`; empty but for e4m3.
    scales: Vec<f32>,
    /// As `scales`: which lines of a block hold special bytes.
    special: Vec<u64>,
    /// `[E, N]`: what a column's sums are multiplied by; empty if no rows came with scales of their own.
    column_scales: Vec<f32>,
    /// Whether no block scale serves rows on both sides of row `N / 2`, in every expert.
    half_starts_a_block: bool,
    /// What the scales of int4 weights are made of; the first rows say it.
    int4_scales: Option<ScaleKind>,
}

/// How far ahead of their use streamed weights are asked for: the way from memory takes as long as multiplying a
/// hundred lines. (Measured: twice as far is no better, half as far costs e4m3 a tenth; so does bringing e4m3 into L1
/// at once, or bf16 into L2 only.)
const STREAM_AHEAD_BYTES: usize = 8192;

/// Format and extents of packed weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Shape {
    format: WeightFormat,
    experts: usize,
    /// Gate and up, or one.
    segments: usize,
    /// Output columns of a segment.
    segment: usize,
    k: usize,
}

impl Shape {
    fn new(format: WeightFormat, experts: usize, n: usize, k: usize) -> Result<Self> {
        for (argument, actual) in [("experts", experts), ("n", n), ("k", k)] {
            if actual == 0 {
                return Err(Error::value(argument, actual, "at least 1"));
            }
        }
        Self { format, experts, segments: 1, segment: n, k }.check_k()
    }

    fn gate_up(format: WeightFormat, experts: usize, intermediate: usize, k: usize) -> Result<Self> {
        for (argument, actual) in [("experts", experts), ("intermediate", intermediate), ("k", k)] {
            if actual == 0 {
                return Err(Error::value(argument, actual, "at least 1"));
            }
        }
        checked_mul("2 I", intermediate, 2)?;
        Self { format, experts, segments: 2, segment: intermediate, k }.check_k()
    }

    fn check_k(self) -> Result<Self> {
        match self.format {
            WeightFormat::Mxfp4 => drop(crate::mxfp4::groups(self.k)?),
            WeightFormat::Int4 => drop(crate::int4::groups(self.k)?),
            WeightFormat::Bf16 | WeightFormat::E4m3 => {}
        }
        Ok(self)
    }

    /// Output columns of an expert.
    fn n(self) -> usize {
        self.segments * self.segment
    }

    fn pairs(self) -> usize {
        self.k.div_ceil(2)
    }

    fn segment_panels(self) -> usize {
        self.segment.div_ceil(PANEL)
    }

    fn panels(self) -> usize {
        self.segments * self.segment_panels()
    }

    /// The output columns of a panel.
    fn columns(self, panel: usize) -> Range<usize> {
        let (segment, panel) = (panel / self.segment_panels(), panel % self.segment_panels());
        let start = panel * PANEL;
        let end = self.segment.min(start + PANEL);
        segment * self.segment + start..segment * self.segment + end
    }

    /// The panel that holds a column.
    fn panel_of(self, column: usize) -> usize {
        column / self.segment * self.segment_panels() + column % self.segment / PANEL
    }

    /// Cuts rows into those of one segment each.
    fn by_segment(self, rows: Range<usize>) -> impl Iterator<Item = Range<usize>> {
        let parts = (0..self.segments).map(move |segment| {
            let (start, end) = (segment * self.segment, (segment + 1) * self.segment);
            rows.start.max(start)..rows.end.min(end)
        });
        parts.filter(|part| !part.is_empty())
    }

    fn blocks(self) -> usize {
        self.k.div_ceil(WEIGHT_BLOCK)
    }

    /// Bytes of a K-pair, with its share of what stands among the values.
    fn line_bytes(self) -> usize {
        match self.format {
            WeightFormat::E4m3 => size_of::<ByteLine>(),
            WeightFormat::Bf16 => size_of::<PairLine>(),
            WeightFormat::Mxfp4 => size_of::<NibbleGroup<u8>>() / GROUP_PAIRS,
            WeightFormat::Int4 => size_of::<NibbleGroup<bf16>>() / GROUP_PAIRS,
        }
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
            WeightFormat::Bf16 | WeightFormat::Mxfp4 | WeightFormat::Int4 => Ok(0),
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
    /// [`Error::Value`] if an extent is zero, [`Error::Shape`] unless there are exactly as many `weights`,
    /// [`Error::Overflow`] if the size does not fit, [`Error::Memory`] if there is no memory for it.
    pub fn pack_bf16(cpu: &Cpu, weights: &[bf16], experts: usize, n: usize, k: usize) -> Result<Self> {
        let shape = Shape::new(WeightFormat::Bf16, experts, n, k)?;
        PackedWeightsBuilder::pack_all_bf16(cpu, shape, weights, GateUpOrder::Halves)
    }

    /// Packs e4m3 weights `[experts, n, k]` with f32 block scales `[experts, ceil(n/128), ceil(k/128)]`, both
    /// row-major.
    ///
    /// # Errors
    /// [`Error::Value`] if an extent is zero, [`Error::Shape`] unless there are exactly as many `weights` and
    /// `scales`, [`Error::Overflow`] if the size does not fit, [`Error::Memory`] if there is no memory for it.
    pub fn pack_e4m3(cpu: &Cpu, weights: &[E4m3], scales: &[f32], experts: usize, n: usize, k: usize) -> Result<Self> {
        let shape = Shape::new(WeightFormat::E4m3, experts, n, k)?;
        PackedWeightsBuilder::pack_all_e4m3(cpu, shape, weights, scales, GateUpOrder::Halves)
    }

    /// Packs bf16 weights `[experts, 2 intermediate, k]` of gate and up, row-major; whatever their order, GEMM 1 gives
    /// gate's columns first, then up's.
    ///
    /// # Errors
    /// As [`PackedWeights::pack_bf16`].
    pub fn pack_gate_up_bf16(
        cpu: &Cpu,
        weights: &[bf16],
        experts: usize,
        intermediate: usize,
        k: usize,
        order: GateUpOrder,
    ) -> Result<Self> {
        let shape = Shape::gate_up(WeightFormat::Bf16, experts, intermediate, k)?;
        PackedWeightsBuilder::pack_all_bf16(cpu, shape, weights, order)
    }

    /// Packs e4m3 weights `[experts, 2 intermediate, k]` of gate and up with block scales
    /// `[experts, 2 ceil(intermediate/128), ceil(k/128)]`: `ceil(intermediate/128)` row blocks for each of gate and
    /// up, also where 128 does not divide `intermediate`. Gate's row blocks come first, then up's, whatever the order
    /// of the rows.
    ///
    /// # Errors
    /// As [`PackedWeights::pack_e4m3`].
    pub fn pack_gate_up_e4m3(
        cpu: &Cpu,
        weights: &[E4m3],
        scales: &[f32],
        experts: usize,
        intermediate: usize,
        k: usize,
        order: GateUpOrder,
    ) -> Result<Self> {
        let shape = Shape::gate_up(WeightFormat::E4m3, experts, intermediate, k)?;
        PackedWeightsBuilder::pack_all_e4m3(cpu, shape, weights, scales, order)
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
        self.shape.n()
    }

    /// `K`: columns of the activations.
    #[must_use]
    pub fn k(&self) -> usize {
        self.shape.k
    }

    /// Bytes held, scales and the padding of N and K included.
    #[must_use]
    pub fn bytes(&self) -> usize {
        let scales = size_of_val(&*self.scales) + size_of_val(&*self.column_scales);
        self.bytes.as_slice().len() + scales + size_of_val(&*self.special)
    }

    /// Whether the upper half of an expert's rows has block scales of its own: gate's and up's, each counted from its
    /// first row.
    pub(crate) fn halves_have_own_blocks(&self) -> bool {
        let half = self.n() / 2;
        self.shape.format != WeightFormat::E4m3 || half.is_multiple_of(WEIGHT_BLOCK) || self.half_starts_a_block
    }

    /// Panels to an expert.
    pub(super) fn panels(&self) -> usize {
        self.shape.panels()
    }

    /// The output columns of a panel.
    pub(super) fn columns(&self, panel: usize) -> Range<usize> {
        self.shape.columns(panel)
    }

    /// What the sums of those columns are multiplied by, if by anything.
    pub(super) fn column_scales(&self, expert: usize, columns: Range<usize>) -> Option<&[f32]> {
        self.column_scales.get(expert * self.n()..).filter(|rest| !rest.is_empty()).map(|rest| &rest[columns])
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
            WeightFormat::Mxfp4 => PanelWeights::Mxfp4(bytemuck::cast_slice(&onwards[..len])),
            WeightFormat::Int4 if self.int4_scales == Some(ScaleKind::F16) => {
                PanelWeights::Int4F16(bytemuck::cast_slice(&onwards[..len]))
            }
            WeightFormat::Int4 => PanelWeights::Int4Bf16(bytemuck::cast_slice(&onwards[..len])),
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
    /// With their scales among them.
    Mxfp4(&'a [NibbleGroup<u8>]),
    Int4Bf16(&'a [NibbleGroup<bf16>]),
    Int4F16(&'a [NibbleGroup<f16>]),
}

impl<'a> Panel<'a> {
    /// What to ask for while one of `tiles` tiles is multiplied by `pairs` pairs from `block` on.
    ///
    /// Several tiles go through a block at a time, and share the next one. A single tile streams through the panel;
    /// what has to be decoded takes its time, and waits in L2 meanwhile.
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

/// Packs weights that come in parts: expert by expert, gate and up apart. It owns the [`Cpu`] that packs them.
pub struct PackedWeightsBuilder {
    cpu: Cpu,
    weights: PackedWeights,
    ledger: RowLedger,
    /// `[E]`: whether scales of rows from `N / 2` on serve no row before it.
    half_started: Vec<bool>,
}

impl PackedWeightsBuilder {
    /// Room for `[experts, n, k]` of `format`.
    ///
    /// # Errors
    /// [`Error::Value`] if an extent is zero, [`Error::Overflow`] if the size does not fit, [`Error::Memory`] if there
    /// is no memory for it.
    pub fn new(cpu: &Cpu, format: WeightFormat, experts: usize, n: usize, k: usize) -> Result<Self> {
        Self::sized(cpu, Shape::new(format, experts, n, k)?)
    }

    /// Room for gate and up, `[experts, 2 intermediate, k]` of `format`: rows `0..intermediate` are gate's, the others
    /// up's, and each of the two may have any number of rows.
    ///
    /// # Errors
    /// As [`PackedWeightsBuilder::new`].
    pub fn gate_up(cpu: &Cpu, format: WeightFormat, experts: usize, intermediate: usize, k: usize) -> Result<Self> {
        Self::sized(cpu, Shape::gate_up(format, experts, intermediate, k)?)
    }

    fn sized(cpu: &Cpu, shape: Shape) -> Result<Self> {
        let (bytes, scales) = (shape.bytes()?, shape.scales()?);
        let rows = checked_mul("experts * n", shape.experts, shape.n())?;
        let no_memory = |()| Error::Memory { what: "packed_weights", bytes };
        let weights = PackedWeights {
            shape,
            bytes: AlignedBytes::zeroed(bytes).ok_or(()).map_err(no_memory)?,
            scales: try_zeroed_vec(scales).map_err(no_memory)?,
            special: try_zeroed_vec(scales).map_err(no_memory)?,
            column_scales: Vec::new(),
            half_starts_a_block: false,
            int4_scales: None,
        };
        let ledger = RowLedger::new(shape.format, shape.n(), shape.k, try_zeroed_vec(rows).map_err(no_memory)?);
        let half_started = try_zeroed_vec(shape.experts).map_err(no_memory)?;
        Ok(Self { cpu: cpu.clone(), weights, ledger, half_started })
    }

    fn pack_all_bf16(cpu: &Cpu, shape: Shape, weights: &[bf16], order: GateUpOrder) -> Result<PackedWeights> {
        shape.bytes()?;
        let (experts, n, k) = (shape.experts, shape.n(), shape.k);
        require_exact("weights", weights.len(), &[experts, n, k])?;
        let mut builder = Self::sized(cpu, shape)?;
        for (expert, weights) in weights.chunks_exact(n * k).enumerate() {
            builder.pack_whole(MatrixRef::new(weights, n, k)?, order, |builder, first_row, rows, _| {
                builder.add_bf16_rows(expert, first_row, rows)
            })?;
        }
        builder.finish()
    }

    fn pack_all_e4m3(
        cpu: &Cpu,
        shape: Shape,
        weights: &[E4m3],
        scales: &[f32],
        order: GateUpOrder,
    ) -> Result<PackedWeights> {
        shape.bytes()?;
        let (experts, n, k) = (shape.experts, shape.n(), shape.k);
        let (rows, cols) = (shape.segments * shape.segment.div_ceil(WEIGHT_BLOCK), shape.blocks());
        require_exact("weights", weights.len(), &[experts, n, k])?;
        require_exact("scales", scales.len(), &[experts, rows, cols])?;
        let mut builder = Self::sized(cpu, shape)?;
        let parts = weights.chunks_exact(n * k).zip(scales.chunks_exact(rows * cols));
        for (expert, (weights, scales)) in parts.enumerate() {
            let scales = MatrixRef::new(scales, rows, cols)?;
            builder.pack_whole(MatrixRef::new(weights, n, k)?, order, |builder, first_row, rows, segment| {
                let blocks = shape.segment.div_ceil(WEIGHT_BLOCK);
                builder.add_e4m3_rows(expert, first_row, rows, scales.every(segment * blocks, 1, blocks))
            })?;
        }
        builder.finish()
    }

    /// Packs all rows of an expert, segment by segment: `pack(self, first row, rows, segment)`.
    fn pack_whole<T: Copy>(
        &mut self,
        rows: MatrixRef<'_, T>,
        order: GateUpOrder,
        mut pack: impl FnMut(&mut Self, usize, MatrixRef<'_, T>, usize) -> Result<()>,
    ) -> Result<()> {
        let Shape { segments, segment: len, .. } = self.weights.shape;
        let (first, step) = order.first_and_step(len);
        for (segment, first) in first.into_iter().enumerate().take(segments) {
            pack(self, segment * len, rows.every(first, step, len), segment)?;
        }
        Ok(())
    }

    /// Adds `rows [2 intermediate, k]` of gate and up as all rows of an expert, rounded to the nearest bf16.
    ///
    /// # Errors
    /// As [`PackedWeightsBuilder::add_bf16_rows`]; [`Error::Shape`] unless this is a builder of gate and up, of such
    /// rows.
    pub fn add_gate_up_bf16_rows<T: Float>(
        &mut self,
        expert: usize,
        rows: MatrixRef<'_, T>,
        order: GateUpOrder,
    ) -> Result<()> {
        self.require_gate_up(&rows)?;
        self.pack_whole(rows, order, |builder, first_row, rows, _| builder.add_bf16_rows(expert, first_row, rows))
    }

    /// Adds `rows [2 intermediate, k]` of gate and up as all rows of an expert, with block scales
    /// `[2 ceil(intermediate/128), ceil(k/128)]`: gate's row blocks, then up's, whatever the order of the rows.
    ///
    /// # Errors
    /// As [`PackedWeightsBuilder::add_e4m3_rows`]; [`Error::Shape`] unless this is a builder of gate and up, of such
    /// rows.
    pub fn add_gate_up_e4m3_rows(
        &mut self,
        expert: usize,
        rows: MatrixRef<'_, E4m3>,
        scales: MatrixRef<'_, f32>,
        order: GateUpOrder,
    ) -> Result<()> {
        self.require_gate_up(&rows)?;
        let Shape { segment, .. } = self.weights.shape;
        let blocks = segment.div_ceil(WEIGHT_BLOCK);
        scales.require_shape("scales", 2 * blocks, self.weights.shape.blocks())?;
        self.pack_whole(rows, order, |builder, first_row, rows, segment| {
            builder.add_e4m3_rows(expert, first_row, rows, scales.every(segment * blocks, 1, blocks))
        })
    }

    fn require_gate_up<T: Copy>(&self, rows: &MatrixRef<'_, T>) -> Result<()> {
        let Shape { segments, k, .. } = self.weights.shape;
        let n = self.weights.shape.n();
        if segments != 2 {
            let expected = "those of a builder that was made for gate and up";
            return Err(Error::shape("rows", &[rows.rows(), rows.cols()], expected));
        }
        rows.require_shape("rows", n, k)
    }

    /// Adds `rows [R, k]`, rounded to the nearest bf16, as rows `first_row..first_row + R` of an expert.
    ///
    /// # Errors
    /// [`Error::WeightFormat`] if this is a builder of e4m3, [`Error::Value`] if there is no such expert,
    /// [`Error::Shape`] if the rows do not fit, [`Error::Count`] if one of them has come before.
    pub fn add_bf16_rows<T: Float>(&mut self, expert: usize, first_row: usize, rows: MatrixRef<'_, T>) -> Result<()> {
        self.ledger.require_format(WeightFormat::Bf16)?;
        self.ledger.add(expert, first_row, rows.rows(), rows.cols())?;
        self.for_each_panel(expert, first_row..first_row + rows.rows(), |bytes, columns, row| {
            pack_bf16_panel(rows, row, columns, bytemuck::cast_slice_mut(bytes));
        });
        Ok(())
    }

    /// Adds `rows [R, k]` with block scales `[ceil(R/128), ceil(k/128)]` as rows `first_row..first_row + R` of an
    /// expert.
    ///
    /// The blocks of 128 rows are counted from `first_row`, which must be a multiple of 32 (for up: of its own rows);
    /// gate and up, each with its own scales, are two such parts.
    ///
    /// # Errors
    /// [`Error::WeightFormat`] if this is a builder of bf16, [`Error::Value`] if there is no such expert or
    /// `first_row` is no multiple of 32, [`Error::Shape`] if rows or scales do not fit or belong to both gate and up,
    /// [`Error::Count`] if a row has come before.
    pub fn add_e4m3_rows(
        &mut self,
        expert: usize,
        first_row: usize,
        rows: MatrixRef<'_, E4m3>,
        scales: MatrixRef<'_, f32>,
    ) -> Result<()> {
        let shape = self.weights.shape;
        self.check_e4m3_rows(first_row, &rows)?;
        scales.require_shape("scales", rows.rows().div_ceil(WEIGHT_BLOCK), shape.blocks())?;
        self.ledger.add(expert, first_row, rows.rows(), rows.cols())?;
        self.half_started[expert] |= 2 * first_row == shape.n();
        self.pack_e4m3(expert, first_row, rows, |row, block| scales.get(row / WEIGHT_BLOCK, block));
        Ok(())
    }

    /// Adds `rows [R, k]` with a scale for each of them (a channel's) as rows `first_row..first_row + R` of an expert.
    /// `first_row` is a multiple of 32, for up of its own rows.
    ///
    /// A column's f32 sum is multiplied by its scale once, before a bias is added.
    ///
    /// # Errors
    /// As [`PackedWeightsBuilder::add_e4m3_rows`]; [`Error::Shape`] unless there are `R` scales.
    pub fn add_e4m3_channel_rows(
        &mut self,
        expert: usize,
        first_row: usize,
        rows: MatrixRef<'_, E4m3>,
        scales: &[f32],
    ) -> Result<()> {
        let n = self.weights.shape.n();
        self.check_e4m3_rows(first_row, &rows)?;
        require_exact("scales", scales.len(), &[rows.rows()])?;
        self.ledger.add(expert, first_row, rows.rows(), rows.cols())?;
        let part = first_row..first_row + rows.rows();
        // No scale serves two rows, those before and after the middle neither.
        self.half_started[expert] |= part.contains(&(n / 2));
        let column_scales = &mut self.weights.column_scales;
        if column_scales.is_empty() {
            column_scales.resize(self.ledger.rows(), 1.0);
        }
        column_scales[expert * n..][part].copy_from_slice(scales);
        self.pack_e4m3(expert, first_row, rows, |_, _| 1.0);
        Ok(())
    }

    /// Fails unless e4m3 rows may start at `first_row`.
    fn check_e4m3_rows(&self, first_row: usize, rows: &MatrixRef<'_, E4m3>) -> Result<()> {
        self.ledger.require_format(WeightFormat::E4m3)?;
        let shape = self.weights.shape;
        if first_row < shape.n() && !(first_row % shape.segment).is_multiple_of(PANEL) {
            let of = if shape.segments == 2 { " of gate's or up's rows" } else { "" };
            return Err(Error::value("first_row", first_row, format!("a multiple of {PANEL}{of}")));
        }
        let part = first_row..first_row.saturating_add(rows.rows());
        if part.end <= shape.n() && shape.by_segment(part.clone()).count() > 1 {
            let room = shape.segment - first_row;
            let expected = format!("[R, {}] with R at most {room}, the rest of gate's rows", shape.k);
            return Err(Error::shape("rows", &[rows.rows(), rows.cols()], expected));
        }
        Ok(())
    }

    /// Packs e4m3 rows that were checked; `scale(row, block of K)` is that of the part's rows from `row` on.
    fn pack_e4m3(
        &mut self,
        expert: usize,
        first_row: usize,
        rows: MatrixRef<'_, E4m3>,
        scale: impl Fn(usize, usize) -> f32 + Sync,
    ) {
        let shape = self.weights.shape;
        let part = first_row..first_row + rows.rows();
        if part.is_empty() {
            return;
        }
        self.for_each_panel(expert, part.clone(), |bytes, columns, row| {
            pack_e4m3_panel(rows, row..row + columns.len(), bytemuck::cast_slice_mut(bytes));
        });
        let panels = shape.panel_of(part.start)..shape.panel_of(part.end - 1) + 1;
        self.note_blocks(expert, panels, scale);
    }

    /// Notes, for the panels of a part, the scales of their blocks and which of their lines hold special bytes.
    fn note_blocks(&mut self, expert: usize, panels: Range<usize>, part_scale: impl Fn(usize, usize) -> f32 + Sync) {
        let PackedWeights { shape, bytes, scales, special, .. } = &mut self.weights;
        let (start, blocks) = (expert * shape.panels() + panels.start, shape.blocks());
        let bytes = bytes.as_slice()[start * shape.panel_bytes()..].par_chunks(shape.panel_bytes());
        let scales = scales[start * blocks..][..panels.len() * blocks].par_chunks_mut(blocks);
        let special = special[start * blocks..][..panels.len() * blocks].par_chunks_mut(blocks);
        self.cpu.install(|| {
            bytes.zip(scales).zip(special).enumerate().for_each(|(panel, ((bytes, scales), special))| {
                let lines: &[ByteLine] = bytemuck::cast_slice(bytes);
                let blocks = lines.chunks(BLOCK_PAIRS).zip(scales).zip(special);
                for (block, ((lines, scale), special)) in blocks.enumerate() {
                    *scale = part_scale(panel * PANEL, block);
                    *special = lines.iter().rev().fold(0, |mask, line| mask << 1 | u64::from(is_special(line)));
                }
            });
        });
    }

    /// The packed weights.
    ///
    /// # Errors
    /// [`Error::Count`] if rows of an expert are missing.
    pub fn finish(mut self) -> Result<PackedWeights> {
        self.ledger.finish()?;
        self.weights.half_starts_a_block = self.half_started.iter().all(|&started| started);
        Ok(self.weights)
    }

    /// Runs `pack(panel's bytes, columns of the panel, first of the new rows)` for every panel that `rows` touch.
    fn for_each_panel(
        &mut self,
        expert: usize,
        rows: Range<usize>,
        pack: impl Fn(&mut [u8], Range<usize>, usize) + Sync,
    ) {
        let shape = self.weights.shape;
        let len = shape.panel_bytes();
        for part in shape.by_segment(rows.clone()) {
            let panels = shape.panel_of(part.start)..shape.panel_of(part.end - 1) + 1;
            let start = (expert * shape.panels() + panels.start) * len;
            let bytes = &mut self.weights.bytes.as_mut_slice()[start..][..panels.len() * len];
            self.cpu.install(|| {
                bytes.par_chunks_mut(len).zip(panels.into_par_iter()).for_each(|(bytes, panel)| {
                    let own = shape.columns(panel);
                    let (start, end) = (part.start.max(own.start), part.end.min(own.end));
                    pack(bytes, start - own.start..end - own.start, start - rows.start);
                });
            });
        }
    }
}

/// Packs rows from `first` on as `columns` of a panel.
fn pack_bf16_panel<T: Float>(rows: MatrixRef<'_, T>, first: usize, columns: Range<usize>, lines: &mut [PairLine]) {
    let pair = |even: T, odd: T| u32::from(even.to_bf16().to_bits()) | u32::from(odd.to_bf16().to_bits()) << 16;
    if !rows.is_row_contiguous() {
        // What a line takes stands nearer together than what a column takes: in a transposed tensor, next to each
        // other.
        let (pairs, k) = (rows.cols() / 2, rows.cols());
        for (pair_index, line) in lines.iter_mut().take(pairs).enumerate() {
            for (row, value) in (first..).zip(&mut line[columns.clone()]) {
                *value = pair(rows.get(row, 2 * pair_index), rows.get(row, 2 * pair_index + 1));
            }
        }
        if k % 2 == 1 {
            for (row, value) in (first..).zip(&mut lines[pairs][columns]) {
                *value = u32::from(rows.get(row, k - 1).to_bf16().to_bits());
            }
        }
        return;
    }
    for (column, row) in columns.zip(first..) {
        let row = rows.row(row).unwrap_or_default();
        let (whole, odd) = row.as_chunks::<2>();
        for (line, &[even, odd]) in lines.iter_mut().zip(whole) {
            line[column] = pair(even, odd);
        }
        if let &[last] = odd {
            lines[whole.len()][column] = u32::from(last.to_bf16().to_bits());
        }
    }
}

/// Packs `part` of the rows as a panel's first columns.
fn pack_e4m3_panel(rows: MatrixRef<'_, E4m3>, part: Range<usize>, lines: &mut [ByteLine]) {
    if !rows.is_row_contiguous() {
        // As for bf16: a line at a time.
        for col in 0..rows.cols() {
            for (column, row) in part.clone().enumerate() {
                lines[col / 2][e4m3_position(column, col % 2)] = rows.get(row, col).0;
            }
        }
        return;
    }
    // A block of K at a time, so that the lines that the columns take turns to write stay in the L1 cache.
    for (block, lines) in lines.chunks_mut(BLOCK_PAIRS).enumerate() {
        for (column, row) in part.clone().enumerate() {
            let row = rows.row(row).unwrap_or_default();
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
