//! Tokens that another program, or another rank, has made ready: they come quantized or converted, with ids, and go
//! back by slots or by sums. Between dispatch and combine this is the layer.

use super::{ActivationFormat, Layer, SCALES, StageDone, Stages};
use crate::cpu::unpermute::{SharedRows, unpermute};
use crate::cpu::workspace::{Carver, Sizing};
use crate::cpu::{RowScales, permute_quantized, permute_rows};
use crate::dtype::{Dtype, E4m3, Float};
use crate::error::{Error, Result, checked_mul, require_len};
use crate::layout::{Layout, Padding};
use crate::matrix::MatrixRef;
use crate::quantize::ScalesMut;
use crate::routing::Routing;
use half::bf16;
use rayon::prelude::*;

/// Tokens as GEMM 1 reads them.
#[derive(Debug, Clone, Copy)]
pub enum TokenRows<'a> {
    /// `[M, H]`, for bf16 activations.
    Bf16(MatrixRef<'a, bf16>),
    /// For e4m3 activations.
    E4m3 {
        /// `[M, H]`
        rows: MatrixRef<'a, E4m3>,
        /// `[M, ceil(H / 128)]`: what [`quantize_rows`](crate::cpu::quantize_rows) writes with exact row-major scales.
        scales: MatrixRef<'a, f32>,
    },
}

impl TokenRows<'_> {
    /// Fails unless they are those of so many tokens, for a layer of such activations.
    pub(super) fn require(
        &self,
        argument: &'static str,
        format: ActivationFormat,
        tokens: usize,
        hidden: usize,
    ) -> Result<()> {
        let (expected, actual) = match (format, self) {
            (ActivationFormat::Bf16, Self::Bf16(rows)) => {
                return rows.require_shape(argument, tokens, hidden);
            }
            (ActivationFormat::E4m3, Self::E4m3 { rows, scales }) => {
                rows.require_shape(argument, tokens, hidden)?;
                return scales.require_shape("token_scales", tokens, SCALES.groups(hidden)?);
            }
            (ActivationFormat::Bf16, Self::E4m3 { .. }) => (Dtype::Bf16, Dtype::E4m3),
            (ActivationFormat::E4m3, Self::Bf16(_)) => (Dtype::E4m3, Dtype::Bf16),
        };
        Err(Error::Dtype { argument, actual, expected: expected.as_prepared() })
    }
}

impl Layer {
    /// Bytes that [`Layer::run_slots`] and [`Layer::run_sums`] need for any routing of that many tokens.
    ///
    /// # Errors
    /// As [`Layer::workspace_bytes`].
    pub fn received_workspace_bytes(&self, tokens: usize) -> Result<usize> {
        Ok(self.received_sizing(tokens)?.bytes())
    }

    fn received_sizing(&self, tokens: usize) -> Result<Sizing> {
        let plan = self.plan(tokens)?;
        let slots = checked_mul("M * topk", tokens, self.config.topk)?;
        let sizing = Sizing::new().add::<i32>(Layout::space_len(&plan)?)?.add::<i32>(slots)?;
        self.stage_sizes(plan.m_sum())?.add_to(sizing)
    }

    /// What the expert of each live slot says to its token, in slot order: `out [live slots, H]`. Returns how many
    /// those are. A slot is live if `routing` has a local expert for it, through any map. Router weights and a shared
    /// expert have no part in it.
    ///
    /// [`unpermute_slots`](crate::cpu::unpermute_slots) of these rows gives the bits of [`Layer::run`].
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::Value`], [`Error::Dtype`], [`Error::BufferTooSmall`] for operands that do not fit
    /// each other or what was prepared; nothing is written to `out` then.
    pub fn run_slots(
        &self,
        tokens: TokenRows<'_>,
        routing: &Routing<'_>,
        workspace: &mut [u8],
        out: &mut [bf16],
    ) -> Result<usize> {
        let hidden = self.shape.hidden();
        let live = routing.slots().flatten().count();
        require_len("out", out.len(), checked_mul("live slots * H", live, hidden)?)?;
        self.run_received(tokens, routing, workspace, |rows, layout, list| {
            let live_rows = layout.inv_perm().iter().filter(|&&row| row >= 0);
            list.iter_mut().zip(live_rows).for_each(|(to, &row)| *to = row);
            self.cpu.install(|| {
                out.par_chunks_exact_mut(hidden).zip(&list[..live]).for_each(|(out, &row)| {
                    let row = rows.row(row as usize).expect("the rows of GEMM 2 are contiguous");
                    out.copy_from_slice(row);
                });
            });
            Ok(())
        })?;
        Ok(live)
    }

    /// The weighted sum over each token's live slots, in f32: `out [M, H]`, zeros for a token without one. Without
    /// weights every weight is 1. A shared expert has no part in it.
    ///
    /// # Errors
    /// As [`Layer::run_slots`].
    pub fn run_sums(
        &self,
        tokens: TokenRows<'_>,
        routing: &Routing<'_>,
        topk_weights: Option<MatrixRef<'_, f32>>,
        workspace: &mut [u8],
        out: &mut [f32],
    ) -> Result<()> {
        if let Some(weights) = topk_weights {
            weights.require_shape("topk_weights", routing.tokens(), routing.topk())?;
        }
        require_len("out", out.len(), checked_mul("M * H", routing.tokens(), self.shape.hidden())?)?;
        self.run_received(tokens, routing, workspace, |rows, layout, _| {
            unpermute(&self.cpu, rows, layout, topk_weights, out)
        })
    }

    /// Permute, GEMM 1, activation, GEMM 2; `finish` gets the rows, the layout, and room for an integer of every slot.
    fn run_received(
        &self,
        tokens: TokenRows<'_>,
        routing: &Routing<'_>,
        workspace: &mut [u8],
        finish: impl FnOnce(MatrixRef<'_, bf16>, &Layout<'_>, &mut [i32]) -> Result<()> + Send,
    ) -> Result<()> {
        let (count, topk, hidden) = (routing.tokens(), routing.topk(), self.shape.hidden());
        for (argument, actual, prepared) in
            [("local_experts", routing.local_experts(), self.shape.local_experts()), ("topk", topk, self.config.topk)]
        {
            if actual != prepared {
                return Err(Error::value(argument, actual, format!("{prepared}, as prepared")));
            }
        }
        tokens.require("tokens", self.config.activation_format, count, hidden)?;
        let plan = self.plan(count)?;
        let mut carver = Carver::new(workspace, self.received_workspace_bytes(count)?)?;
        let layout = Layout::build(&plan, routing, carver.take(Layout::space_len(&plan)?))?;
        let list = carver.take(count * topk);
        let mut observe = |_: &StageDone<'_>| {};
        let sizes = self.stage_sizes(plan.m_sum())?;
        let mut stages = self.stages(&layout, 0, sizes, &mut carver, &mut observe);
        self.cpu.install(|| {
            stages.permute_ready(tokens)?;
            stages.experts()?;
            finish(MatrixRef::new(&*stages.buffers.back, layout.m_sum(), hidden)?, &layout, list)
        })
    }

    /// Bytes that [`Layer::run_shared`] needs.
    pub(in crate::cpu) fn shared_workspace_bytes(&self, tokens: usize) -> Result<usize> {
        let Some(shared) = &self.shared else { return Ok(0) };
        let sizing = shared.size(Sizing::new(), tokens)?;
        Ok(self.call_sizes(0, tokens)?.add_to(sizing)?.bytes())
    }

    /// What the shared expert says to every token, if there is one.
    pub(in crate::cpu) fn run_shared<'s, T: Float>(
        &self,
        x: MatrixRef<'_, T>,
        workspace: &'s mut [u8],
    ) -> Result<Option<SharedRows<'s, bf16>>> {
        let Some(shared) = &self.shared else { return Ok(None) };
        let mut carver = Carver::new(workspace, self.shared_workspace_bytes(x.rows())?)?;
        let space = shared.carve(&mut carver, x.rows());
        let mut buffers = self.call_sizes(0, x.rows())?.carve(&mut carver);
        shared.run(&self.cpu, &self.config.activation, x, &mut buffers, space).map(Some)
    }
}

impl Stages<'_> {
    /// Ready tokens to their experts' rows.
    fn permute_ready(&mut self, tokens: TokenRows<'_>) -> Result<()> {
        let (cpu, layout, buffers) = (self.cpu, self.layout, &mut self.buffers);
        match tokens {
            TokenRows::Bf16(rows) => {
                let out: &mut [bf16] = bytemuck::cast_slice_mut(buffers.front);
                permute_rows(cpu, rows, layout, Padding::Untouched, out)
            }
            TokenRows::E4m3 { rows, scales } => {
                let out: &mut [E4m3] = bytemuck::cast_slice_mut(buffers.front);
                let sink = ScalesMut::f32(SCALES, buffers.scales);
                permute_quantized(cpu, rows, RowScales::F32(scales), layout, Padding::Untouched, out, sink)
            }
        }
    }
}
