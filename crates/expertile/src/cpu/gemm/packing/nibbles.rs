//! 4-bit weights into panels: MXFP4, and int4.

use super::{PackedWeights, PackedWeightsBuilder, Shape};
use crate::cpu::Cpu;
use crate::cpu::arch::panel::{GROUP_PAIRS, GroupScale, NibbleGroup, ScaleKind, nibble_position};
use crate::error::{Error, Result, require_exact};
use crate::gemm::{GateUpOrder, WeightFormat};
use crate::int4::Int4Scales;
use crate::matrix::MatrixRef;
use crate::{int4, mxfp4};
use half::{bf16, f16};
use std::ops::Range;

impl PackedWeights {
    /// Packs MXFP4 weights, `blocks [experts, n, k / 2]` with `scales [experts, n, k / 32]`: see [`crate::mxfp4`].
    ///
    /// # Errors
    /// As [`PackedWeights::pack_bf16`]; [`Error::Value`] unless 32 divides `k`, and for a scale of 255, which is NaN.
    pub fn pack_mxfp4(cpu: &Cpu, blocks: &[u8], scales: &[u8], experts: usize, n: usize, k: usize) -> Result<Self> {
        let shape = Shape::new(WeightFormat::Mxfp4, experts, n, k)?;
        PackedWeightsBuilder::pack_all_mxfp4(cpu, shape, blocks, scales, GateUpOrder::Halves)
    }

    /// Packs MXFP4 weights of gate and up, `blocks [experts, 2 intermediate, k / 2]` with
    /// `scales [experts, 2 intermediate, k / 32]`; whatever the order of the rows, which is that of the scales too,
    /// GEMM 1 gives gate's columns first, then up's.
    ///
    /// # Errors
    /// As [`PackedWeights::pack_mxfp4`].
    pub fn pack_gate_up_mxfp4(
        cpu: &Cpu,
        blocks: &[u8],
        scales: &[u8],
        experts: usize,
        intermediate: usize,
        k: usize,
        order: GateUpOrder,
    ) -> Result<Self> {
        let shape = Shape::gate_up(WeightFormat::Mxfp4, experts, intermediate, k)?;
        PackedWeightsBuilder::pack_all_mxfp4(cpu, shape, blocks, scales, order)
    }
}

impl PackedWeights {
    /// Packs int4 weights, `blocks [experts, n, k / 2]` with `scales [experts * n, k / 32]`: see [`crate::int4`].
    ///
    /// # Errors
    /// As [`PackedWeights::pack_bf16`]; [`Error::Value`] unless 32 divides `k`, and for a scale that is not finite.
    pub fn pack_int4(
        cpu: &Cpu,
        blocks: &[u8],
        scales: Int4Scales<'_>,
        experts: usize,
        n: usize,
        k: usize,
    ) -> Result<Self> {
        let shape = Shape::new(WeightFormat::Int4, experts, n, k)?;
        shape.bytes()?;
        require_exact("blocks", blocks.len(), &[experts, n, k / 2])?;
        scales.check(experts * n, k / int4::GROUP, 0)?;
        let mut builder = PackedWeightsBuilder::sized(cpu, shape)?;
        for (expert, blocks) in blocks.chunks_exact(n * k / 2).enumerate() {
            builder.add_int4_rows(expert, 0, MatrixRef::new(blocks, n, k / 2)?, scales.every(expert * n, 1, n))?;
        }
        builder.finish()
    }
}

impl PackedWeightsBuilder {
    fn pack_all_mxfp4(
        cpu: &Cpu,
        shape: Shape,
        blocks: &[u8],
        scales: &[u8],
        order: GateUpOrder,
    ) -> Result<PackedWeights> {
        shape.bytes()?;
        let (experts, n, width, groups) = (shape.experts, shape.n(), shape.k / 2, shape.k / mxfp4::GROUP);
        require_exact("blocks", blocks.len(), &[experts, n, width])?;
        require_exact("scales", scales.len(), &[experts, n, groups])?;
        let mut builder = Self::sized(cpu, shape)?;
        for (expert, (blocks, scales)) in
            blocks.chunks_exact(n * width).zip(scales.chunks_exact(n * groups)).enumerate()
        {
            let (blocks, scales) = (MatrixRef::new(blocks, n, width)?, MatrixRef::new(scales, n, groups)?);
            builder.add_all_mxfp4_rows(expert, blocks, scales, order)?;
        }
        builder.finish()
    }

    /// Adds all rows of an expert, segment by segment.
    fn add_all_mxfp4_rows(
        &mut self,
        expert: usize,
        blocks: MatrixRef<'_, u8>,
        scales: MatrixRef<'_, u8>,
        order: GateUpOrder,
    ) -> Result<()> {
        let Shape { segment: len, .. } = self.weights.shape;
        let (first, step) = order.first_and_step(len);
        self.pack_whole(blocks, order, |builder, first_row, blocks, segment| {
            builder.add_mxfp4_rows(expert, first_row, blocks, scales.every(first[segment], step, len))
        })
    }

    /// Adds MXFP4 rows of gate and up, `blocks [2 intermediate, k / 2]` with `scales [2 intermediate, k / 32]`, as all
    /// rows of an expert; both are in that order.
    ///
    /// # Errors
    /// As [`PackedWeightsBuilder::add_mxfp4_rows`]; [`Error::Shape`] unless this is a builder of gate and up, of such
    /// rows.
    pub fn add_gate_up_mxfp4_rows(
        &mut self,
        expert: usize,
        blocks: MatrixRef<'_, u8>,
        scales: MatrixRef<'_, u8>,
        order: GateUpOrder,
    ) -> Result<()> {
        self.ledger.require_format(WeightFormat::Mxfp4)?;
        let (n, k) = (self.weights.shape.n(), self.weights.shape.k);
        self.check_gate_up_blocks(blocks)?;
        scales.require_shape("scales", n, k / mxfp4::GROUP)?;
        mxfp4::require_numbers(n, scales.cols(), 0, |row, group| scales.get(row, group))?;
        self.add_all_mxfp4_rows(expert, blocks, scales, order)
    }

    /// Adds MXFP4 rows, `blocks [R, k / 2]` with `scales [R, k / 32]`, as rows `first_row..first_row + R` of an expert:
    /// see [`crate::mxfp4`].
    ///
    /// # Errors
    /// [`Error::WeightFormat`] if this is a builder of another format, [`Error::Value`] if there is no such expert, and
    /// for a scale of 255, which is NaN; [`Error::Shape`] if the rows do not fit, [`Error::Count`] if one of them has
    /// come before.
    pub fn add_mxfp4_rows(
        &mut self,
        expert: usize,
        first_row: usize,
        blocks: MatrixRef<'_, u8>,
        scales: MatrixRef<'_, u8>,
    ) -> Result<()> {
        self.ledger.require_format(WeightFormat::Mxfp4)?;
        let (rows, groups) = (blocks.rows(), self.weights.shape.k / mxfp4::GROUP);
        self.check_blocks(blocks)?;
        scales.require_shape("scales", rows, groups)?;
        mxfp4::require_numbers(rows, groups, first_row, |row, group| scales.get(row, group))?;
        self.ledger.add(expert, first_row, rows, self.weights.shape.k)?;
        self.for_each_panel(expert, first_row..first_row + rows, |bytes, columns, row| {
            pack_panel(blocks, scales, row, columns, bytemuck::cast_slice_mut(bytes));
        });
        Ok(())
    }

    /// Adds int4 rows, `blocks [R, k / 2]` with `scales [R, k / 32]`, as rows `first_row..first_row + R` of an expert:
    /// see [`crate::int4`]. All scales of the weights are of one type.
    ///
    /// # Errors
    /// As [`PackedWeightsBuilder::add_mxfp4_rows`]; [`Error::Value`] for a scale that is not finite,
    /// [`Error::WeightFormat`] for scales of another type than those before.
    pub fn add_int4_rows(
        &mut self,
        expert: usize,
        first_row: usize,
        blocks: MatrixRef<'_, u8>,
        scales: Int4Scales<'_>,
    ) -> Result<()> {
        self.ledger.require_format(WeightFormat::Int4)?;
        let (rows, k) = (blocks.rows(), self.weights.shape.k);
        self.check_blocks(blocks)?;
        scales.check(rows, k / int4::GROUP, first_row)?;
        let kind = match scales {
            Int4Scales::Bf16(_) => ScaleKind::Bf16,
            Int4Scales::F16(_) => ScaleKind::F16,
        };
        if self.weights.int4_scales.is_some_and(|before| before != kind) {
            let expected = if kind == ScaleKind::F16 { "bf16, as those before" } else { "f16, as those before" };
            return Err(Error::WeightFormat { argument: "scales", actual: scales.name(), expected });
        }
        self.ledger.add(expert, first_row, rows, k)?;
        self.weights.int4_scales = Some(kind);
        self.for_each_panel(expert, first_row..first_row + rows, |bytes, columns, row| match scales {
            Int4Scales::Bf16(scales) => {
                pack_panel::<bf16>(blocks, scales, row, columns, bytemuck::cast_slice_mut(bytes))
            }
            Int4Scales::F16(scales) => pack_panel::<f16>(blocks, scales, row, columns, bytemuck::cast_slice_mut(bytes)),
        });
        Ok(())
    }

    /// Adds int4 rows of gate and up, as [`PackedWeightsBuilder::add_gate_up_mxfp4_rows`] does.
    ///
    /// # Errors
    /// As [`PackedWeightsBuilder::add_int4_rows`]; [`Error::Shape`] unless this is a builder of gate and up, of such
    /// rows.
    pub fn add_gate_up_int4_rows(
        &mut self,
        expert: usize,
        blocks: MatrixRef<'_, u8>,
        scales: Int4Scales<'_>,
        order: GateUpOrder,
    ) -> Result<()> {
        self.ledger.require_format(WeightFormat::Int4)?;
        let (n, Shape { segment: len, k, .. }) = (self.weights.shape.n(), self.weights.shape);
        self.check_gate_up_blocks(blocks)?;
        scales.check(n, k / int4::GROUP, 0)?;
        let (first, step) = order.first_and_step(len);
        self.pack_whole(blocks, order, |builder, first_row, blocks, segment| {
            builder.add_int4_rows(expert, first_row, blocks, scales.every(first[segment], step, len))
        })
    }

    /// Fails unless they are all rows of an expert's gate and up.
    fn check_gate_up_blocks(&self, blocks: MatrixRef<'_, u8>) -> Result<()> {
        let Shape { segments, k, .. } = self.weights.shape;
        if segments != 2 {
            let expected = "those of a builder that was made for gate and up";
            return Err(Error::shape("blocks", &[blocks.rows(), blocks.cols()], expected));
        }
        blocks.require_shape("blocks", self.weights.shape.n(), k / 2)
    }

    /// Fails unless rows of two values to a byte are as long as those of the weights.
    fn check_blocks(&self, blocks: MatrixRef<'_, u8>) -> Result<()> {
        let width = self.weights.shape.k / 2;
        if blocks.cols() == width {
            return Ok(());
        }
        let expected = format!("[R, {width}]: two values to a byte");
        Err(Error::shape("blocks", &[blocks.rows(), blocks.cols()], expected))
    }
}

/// Packs rows from `first` on as `columns` of a panel, which holds zeros there.
fn pack_panel<S: GroupScale>(
    blocks: MatrixRef<'_, u8>,
    scales: MatrixRef<'_, S>,
    first: usize,
    columns: Range<usize>,
    groups: &mut [NibbleGroup<S>],
) {
    for (index, group) in groups.iter_mut().enumerate() {
        for (column, row) in columns.clone().zip(first..) {
            group.scales[column] = scales.get(row, index);
            let [(even_at, up), (odd_at, _)] = [0, 1].map(|parity| nibble_position(column, parity));
            for (pair, line) in group.lines.iter_mut().enumerate() {
                let byte = blocks.get(row, index * GROUP_PAIRS + pair);
                line[even_at] |= (byte & 15) << up;
                line[odd_at] |= (byte >> 4) << up;
            }
        }
    }
}
