//! The experts alone, on rows that a dispatcher has expanded and sorted.

use super::{ActivationFormat, Buffers, Layer, SCALES, StageDone, Stages, TokenRows};
use crate::cpu::workspace::{Carver, Sizing};
use crate::cpu::{Cpu, quantize_rows};
use crate::dtype::{E4m3, Float};
use crate::error::{Error, Result, checked_mul, require_len};
use crate::layout::Layout;
use crate::matrix::MatrixRef;
use crate::quantize::ScalesMut;
use half::bf16;
use rayon::prelude::*;

impl Layer {
    /// Bytes that [`Layer::run_expanded`] needs for a buffer of `m_sum` rows.
    ///
    /// # Errors
    /// [`Error::Overflow`].
    pub fn expanded_workspace_bytes(&self, m_sum: usize) -> Result<usize> {
        Ok(self.stage_sizes(m_sum)?.add_to(Sizing::new())?.bytes())
    }

    /// Runs only the experts on rows that a dispatcher delivers expanded and sorted ([`Layout::from_psum`]):
    /// `rows [M_sum, H]` to `out [M_sum, H]`, live rows only.
    ///
    /// # Errors
    /// [`Error::Dtype`], [`Error::Shape`] and [`Error::Value`] if `rows` or the layout's experts do not fit,
    /// [`Error::BufferTooSmall`]; nothing is written to `out` then.
    pub fn run_expanded<T: Float>(
        &self,
        rows: MatrixRef<'_, T>,
        layout: &Layout<'_>,
        workspace: &mut [u8],
        out: &mut [bf16],
    ) -> Result<()> {
        let prepared = self.config.input;
        if T::DTYPE != prepared {
            return Err(Error::Dtype { argument: "rows", actual: T::DTYPE, expected: prepared.as_prepared() });
        }
        rows.require_shape("rows", layout.m_sum(), self.shape.hidden())?;
        self.run_in_places(layout, size_of::<T>(), workspace, out, |stages| {
            stages.buffers.take(&self.cpu, layout, self.config.activation_format, rows)
        })
    }

    /// The same of rows as GEMM 1 reads them: e4m3 rows with their scales, for a layer of e4m3 activations.
    ///
    /// # Errors
    /// As [`Layer::run_expanded`].
    pub fn run_expanded_ready(
        &self,
        rows: TokenRows<'_>,
        layout: &Layout<'_>,
        workspace: &mut [u8],
        out: &mut [bf16],
    ) -> Result<()> {
        rows.require("rows", self.config.activation_format, layout.m_sum(), self.shape.hidden())?;
        self.run_in_places(layout, 0, workspace, out, |stages| {
            stages.buffers.take_ready(&self.cpu, layout, rows);
            Ok(())
        })
    }

    /// `fill` brings the rows to where GEMM 1 reads them.
    fn run_in_places(
        &self,
        layout: &Layout<'_>,
        input_bytes: usize,
        workspace: &mut [u8],
        out: &mut [bf16],
        fill: impl FnOnce(&mut Stages<'_>) -> Result<()>,
    ) -> Result<()> {
        let (m_sum, hidden) = (layout.m_sum(), self.shape.hidden());
        if layout.local_experts() != self.shape.local_experts() {
            let expected = self.shape.local_experts().to_string();
            return Err(Error::value("local_experts", layout.local_experts(), expected));
        }
        require_len("out", out.len(), checked_mul("M_sum * H", m_sum, hidden)?)?;
        let mut carver = Carver::new(workspace, self.expanded_workspace_bytes(m_sum)?)?;
        let mut observe = |_: &StageDone<'_>| {};
        let sizes = self.stage_sizes(m_sum)?;
        let mut stages = self.stages(layout, input_bytes, sizes, &mut carver, &mut observe);
        fill(&mut stages)?;
        stages.experts()?;
        let done = &stages.buffers.back[..m_sum * hidden];
        for expert in 0..layout.local_experts() {
            let live = layout.expert_rows(expert);
            let range = live.start * hidden..live.end * hidden;
            out[range.clone()].copy_from_slice(&done[range]);
        }
        Ok(())
    }
}

impl Buffers<'_> {
    /// Converts or quantizes rows that are already in the layout's order into `front`.
    pub(super) fn take<T: Float>(
        &mut self,
        cpu: &Cpu,
        layout: &Layout<'_>,
        activations: ActivationFormat,
        rows: MatrixRef<'_, T>,
    ) -> Result<()> {
        match activations {
            ActivationFormat::Bf16 => {
                let out: &mut [bf16] = bytemuck::cast_slice_mut(self.front);
                cpu.install(|| {
                    let experts = layout.m_indices();
                    let all = out.par_chunks_exact_mut(rows.cols()).zip(experts).enumerate();
                    all.filter(|(_, (_, expert))| **expert >= 0).for_each(|(row, (out, _))| match rows.row(row) {
                        Some(from) => out.iter_mut().zip(from).for_each(|(to, from)| *to = from.to_bf16()),
                        None => out.iter_mut().enumerate().for_each(|(col, to)| *to = rows.get(row, col).to_bf16()),
                    });
                });
                Ok(())
            }
            ActivationFormat::E4m3 => {
                let out: &mut [E4m3] = bytemuck::cast_slice_mut(self.front);
                quantize_rows(cpu, rows, layout, out, ScalesMut::f32(SCALES, self.scales))
            }
        }
    }

    /// Copies rows that are already in the layout's order, and are as GEMM 1 reads them, into `front`.
    fn take_ready(&mut self, cpu: &Cpu, layout: &Layout<'_>, rows: TokenRows<'_>) {
        fn copy<T: Copy + Send + Sync>(cpu: &Cpu, layout: &Layout<'_>, from: MatrixRef<'_, T>, to: &mut [T]) {
            if from.cols() == 0 {
                return;
            }
            cpu.install(|| {
                let all = to.par_chunks_exact_mut(from.cols()).zip(layout.m_indices()).enumerate();
                all.filter(|(_, (_, expert))| **expert >= 0).for_each(|(row, (to, _))| match from.row(row) {
                    Some(from) => to.copy_from_slice(from),
                    None => to.iter_mut().enumerate().for_each(|(col, to)| *to = from.get(row, col)),
                });
            });
        }
        match rows {
            TokenRows::Bf16(rows) => copy(cpu, layout, rows, bytemuck::cast_slice_mut(self.front)),
            TokenRows::E4m3 { rows, scales } => {
                copy(cpu, layout, rows, bytemuck::cast_slice_mut(self.front));
                copy(cpu, layout, scales, self.scales);
            }
        }
    }
}
