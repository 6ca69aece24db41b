//! The whole layer in the caller's workspace: shared expert, permute, GEMM 1, activation, GEMM 2, unpermute.
//!
//! The workspace holds the layout, the packed operand of the GEMM at hand, and two buffers that the stages use in turn:
//! `front` (permuted rows, then activated ones) and `back` (`gate | up`, then the rows of GEMM 2). A shared expert uses
//! them before the others do, and leaves its rows in a buffer of its own.

mod shared;

use super::gemm::{Activations, PackedWeights, grouped_gemm_with_bias, grouped_gemm_workspace_bytes};
use super::unpermute::{SharedRows, unpermute_with_shared};
use super::workspace::{Carver, Sizing};
use super::{Cpu, Isa, activate, activate_quantize, permute_convert, quantize_permute, quantize_rows};
use crate::activation::Activation;
use crate::dtype::{E4m3, Float};
use crate::error::{Error, Result, checked_mul, require_exact, require_len};
use crate::gemm::{ActivationFormat, WeightFormat};
use crate::layer::{LayerConfig, LayerShape, Stage, StageCost, stage_cost};
use crate::layout::{Layout, Padding};
use crate::matrix::MatrixRef;
use crate::plan::{Plan, TokenExperts};
use crate::quantize::{Group, ScaleFormat, ScaleLayout, ScaleRounding, Scales, ScalesMut};
use crate::routing::Routing;
use half::bf16;
use rayon::prelude::*;
pub use shared::SharedExpert;
use shared::{Shared, SharedSpace};
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// What [`Layer::run_observed`] reports after each stage.
#[derive(Debug)]
pub struct StageDone<'a> {
    /// The stage.
    pub stage: Stage,
    /// How long it took.
    pub elapsed: Duration,
    /// What it could not do without.
    pub cost: StageCost,
    /// The layout of this call.
    pub layout: &'a Layout<'a>,
    /// After GEMM 2, its rows `[M_sum, H]` (padding rows hold nothing in particular); else `None`.
    pub rows: Option<&'a [bf16]>,
}

/// The quantized activations' scales on the CPU: one f32 per 128 values, row by row.
const SCALES: ScaleLayout = ScaleLayout::RowMajor;

fn scale_format() -> Result<ScaleFormat> {
    ScaleFormat::new(Group::G128, SCALES, ScaleRounding::Exact)
}

/// The alignment of a layout that asks for none: the GEMM takes any, and padding is memory.
pub const ALIGNMENT: usize = 1;

/// What a call with a number of tokens does. Plain data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerChoice {
    /// The buffer's rows: the tight bound.
    pub plan: Plan,
    /// The instruction set of the kernels.
    pub isa: Isa,
    /// Threads that the work may be spread over.
    pub threads: usize,
    /// Bytes of workspace of such a call.
    pub workspace_bytes: usize,
}

impl fmt::Display for LayerChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { plan, isa, threads, workspace_bytes } = self;
        write!(
            f,
            "{} rows aligned to {}, {isa} on {threads} threads, {workspace_bytes} bytes of workspace",
            plan.m_sum(),
            plan.alignment()
        )
    }
}

/// An expert layer: prepacked weights and how to compute with them. Cheap to clone: clones share the weights.
#[derive(Debug, Clone)]
pub struct Layer {
    cpu: Cpu,
    shape: LayerShape,
    config: LayerConfig,
    max_tokens: usize,
    w13: Arc<PackedWeights>,
    w2: Arc<PackedWeights>,
    /// `[E, 2 I]` (`[E, I]` without a gate) and `[E, H]`.
    b13: Option<Arc<[f32]>>,
    b2: Option<Arc<[f32]>>,
    shared: Option<Shared>,
}

impl Layer {
    /// A layer of `w13 [E, 2 I, H]` (gate rows first, then up; `[E, I, H]` for an activation without a gate) and
    /// `w2 [E, H, I]`, for calls of up to `max_tokens` tokens. Nothing is compiled or allocated on a CPU, so any number is as
    /// good as another.
    ///
    /// # Errors
    /// As [`LayerConfig::check`]; [`Error::Shape`] if the two do not fit each other, [`Error::WeightFormat`] if their formats
    /// differ or e4m3 activations meet bf16 weights, [`Error::Value`] if e4m3 activations meet an `H` or `I` that 128 does not
    /// divide, if one block scale of `w13` serves rows of both gate and up, or for `max_tokens` 0.
    pub fn prepare(
        cpu: &Cpu,
        w13: PackedWeights,
        w2: PackedWeights,
        config: LayerConfig,
        max_tokens: usize,
    ) -> Result<Self> {
        let shape = check(&w13, &w2, &config, max_tokens)?;
        let (w13, w2) = (Arc::new(w13), Arc::new(w2));
        Ok(Self { cpu: cpu.clone(), shape, config, max_tokens, w13, w2, b13: None, b2: None, shared: None })
    }

    /// A layer of the same weights for other calls: another `topk`, other types, another number of tokens.
    ///
    /// # Errors
    /// As [`Layer::prepare`] and [`Layer::with_shared_expert`].
    pub fn with_config(&self, config: LayerConfig, max_tokens: usize) -> Result<Self> {
        let shape = check(&self.w13, &self.w2, &config, max_tokens)?;
        let shared = self.shared.as_ref().map(|shared| shared.with_config(&shape, &config)).transpose()?;
        Ok(Self { shape, config, max_tokens, shared, ..self.clone() })
    }

    /// The same layer on other threads or another instruction set.
    #[must_use]
    pub fn on(&self, cpu: &Cpu) -> Self {
        Self { cpu: cpu.clone(), ..self.clone() }
    }

    /// The same with biases: `b13 [E, 2 I]` (gate's first, then up's; `[E, I]` without a gate) and `b2 [E, H]`, each added to
    /// its GEMM's f32 sums before anything else happens to them. [`crate::GateUpOrder::to_halves`] brings an interleaved one
    /// into order.
    ///
    /// # Errors
    /// [`Error::Shape`] unless each has exactly that many values.
    pub fn with_biases(self, b13: Option<Vec<f32>>, b2: Option<Vec<f32>>) -> Result<Self> {
        let experts = self.shape.local_experts();
        if let Some(b13) = &b13 {
            require_exact("b13", b13.len(), &[experts, self.shape.w13_rows()])?;
        }
        if let Some(b2) = &b2 {
            require_exact("b2", b2.len(), &[experts, self.shape.hidden()])?;
        }
        Ok(Self { b13: b13.map(Arc::from), b2: b2.map(Arc::from), ..self })
    }

    /// The same with an expert that every token visits, in [`Layer::run`]: what it says is added to the routed sum in f32,
    /// before the one rounding to the output's type. Router weights do not touch it, on the input neither.
    /// [`Layer::run_expanded`] leaves it out: its rows are slots, not tokens.
    ///
    /// With e4m3 activations, its activations are e4m3 if its weights are, else bf16.
    ///
    /// # Errors
    /// As [`Layer::prepare`], for weights of one expert and the layer's activation; [`Error::Shape`] unless its `H` is the
    /// layer's and a gate has `H` values.
    pub fn with_shared_expert(self, shared: SharedExpert) -> Result<Self> {
        let shared = Shared::new(Arc::new(shared), &self.shape, &self.config)?;
        Ok(Self { shared: Some(shared), ..self })
    }

    /// The sizes of the shared expert, if there is one: `E` = 1.
    #[must_use]
    pub fn shared_shape(&self) -> Option<&LayerShape> {
        self.shared.as_ref().map(|shared| &shared.shape)
    }

    /// The layer's sizes.
    #[must_use]
    pub fn shape(&self) -> &LayerShape {
        &self.shape
    }

    /// How it computes, and what its calls are made of.
    #[must_use]
    pub fn config(&self) -> &LayerConfig {
        &self.config
    }

    /// Where it runs.
    #[must_use]
    pub fn cpu(&self) -> &Cpu {
        &self.cpu
    }

    /// The most tokens of a call.
    #[must_use]
    pub fn max_tokens(&self) -> usize {
        self.max_tokens
    }

    /// What its weights are made of.
    #[must_use]
    pub fn weight_format(&self) -> WeightFormat {
        self.w13.format()
    }

    /// What a call with that many tokens does.
    ///
    /// # Errors
    /// [`Error::Value`] for more tokens than the layer was prepared for; as [`Plan::tight`]; [`Error::Overflow`].
    pub fn choice(&self, tokens: usize) -> Result<LayerChoice> {
        let (plan, workspace_bytes) = (self.plan(tokens)?, self.workspace_bytes(tokens)?);
        Ok(LayerChoice { plan, isa: self.cpu.isa(), threads: self.cpu.threads(), workspace_bytes })
    }

    /// Bytes that [`Layer::run`] needs for any routing of that many tokens.
    ///
    /// # Errors
    /// As [`Layer::choice`].
    pub fn workspace_bytes(&self, tokens: usize) -> Result<usize> {
        let plan = self.plan(tokens)?;
        let sizing = Sizing::new().add::<i32>(Layout::space_len(&plan)?)?;
        let sizing = match &self.shared {
            Some(shared) => shared.size(sizing, tokens)?,
            None => sizing,
        };
        Ok(self.call_sizes(plan.m_sum(), tokens)?.add_to(sizing)?.bytes())
    }

    /// Bytes that [`Layer::run_expanded`] needs for a buffer of `m_sum` rows.
    ///
    /// # Errors
    /// [`Error::Overflow`].
    pub fn expanded_workspace_bytes(&self, m_sum: usize) -> Result<usize> {
        Ok(self.stage_sizes(m_sum)?.add_to(Sizing::new())?.bytes())
    }

    fn plan(&self, tokens: usize) -> Result<Plan> {
        LayerConfig::require_tokens(tokens, self.max_tokens)?;
        let alignment = self.config.alignment.unwrap_or(ALIGNMENT);
        Plan::tight(tokens, self.config.topk, self.shape.local_experts(), alignment, TokenExperts::MayRepeat)
    }

    /// Runs the layer: `hidden_states [M, H]`, `routing` and `topk_weights` `[M, topk]` to `output [M, H]`.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::Value`], [`Error::Dtype`], [`Error::BufferTooSmall`] for operands that do not fit each other or
    /// what was prepared; nothing is written to `output` then.
    pub fn run<T: Float, O: Float>(
        &self,
        hidden_states: MatrixRef<'_, T>,
        routing: &Routing<'_>,
        topk_weights: MatrixRef<'_, f32>,
        workspace: &mut [u8],
        output: &mut [O],
    ) -> Result<()> {
        self.run_observed(hidden_states, routing, topk_weights, workspace, output, &mut |_| {})
    }

    /// [`Layer::run`], telling `observe` about every stage when it is done.
    ///
    /// # Errors
    /// As [`Layer::run`].
    pub fn run_observed<T: Float, O: Float>(
        &self,
        hidden_states: MatrixRef<'_, T>,
        routing: &Routing<'_>,
        topk_weights: MatrixRef<'_, f32>,
        workspace: &mut [u8],
        output: &mut [O],
        observe: &mut (dyn FnMut(&StageDone<'_>) + Send),
    ) -> Result<()> {
        // Entering a pool costs microseconds: once for the call, not once for every stage.
        self.cpu.install(|| self.run_stages(hidden_states, routing, topk_weights, workspace, output, observe))
    }

    fn run_stages<T: Float, O: Float>(
        &self,
        hidden_states: MatrixRef<'_, T>,
        routing: &Routing<'_>,
        topk_weights: MatrixRef<'_, f32>,
        workspace: &mut [u8],
        output: &mut [O],
        observe: &mut (dyn FnMut(&StageDone<'_>) + Send),
    ) -> Result<()> {
        let (tokens, topk) = (routing.tokens(), routing.topk());
        let hidden = self.shape.hidden();
        self.config.require_types(T::DTYPE, O::DTYPE)?;
        for (argument, actual, prepared) in [
            ("local_experts", routing.local_experts(), self.shape.local_experts()),
            ("topk", topk, self.config.topk),
            ("global_experts", routing.global_experts(), self.config.global_experts),
        ] {
            if actual != prepared {
                return Err(Error::value(argument, actual, format!("{prepared}, as prepared")));
            }
        }
        hidden_states.require_shape("hidden_states", tokens, hidden)?;
        topk_weights.require_shape("topk_weights", tokens, topk)?;
        require_len("output", output.len(), checked_mul("M * H", tokens, hidden)?)?;
        let on_input = self.config.weight_on_input;
        let plan = self.plan(tokens)?;
        let mut carver = Carver::new(workspace, self.workspace_bytes(tokens)?)?;
        let started = Instant::now();
        let layout = Layout::build(&plan, routing, carver.take(Layout::space_len(&plan)?))?;
        let shared = self.shared.as_ref().map(|shared| (shared, shared.carve(&mut carver, tokens)));
        let sizes = self.call_sizes(plan.m_sum(), tokens)?;
        let mut stages = self.stages(&layout, size_of::<T>(), sizes, &mut carver, observe);
        stages.done(Stage::Routing, started, None);
        let shared = match shared {
            Some((shared, space)) => Some(stages.shared(shared, hidden_states, space)?),
            None => None,
        };
        stages.permute(hidden_states, on_input.then_some(topk_weights))?;
        stages.experts()?;
        stages.unpermute((!on_input).then_some(topk_weights), shared, output)
    }

    /// Runs only the experts on rows that a dispatcher delivers expanded and sorted ([`Layout::from_psum`]):
    /// `rows [M_sum, H]` to `out [M_sum, H]`, live rows only.
    ///
    /// # Errors
    /// [`Error::Shape`] if `rows` or the layout's experts do not fit, [`Error::BufferTooSmall`]; nothing is written to
    /// `out` then.
    pub fn run_expanded<T: Float>(
        &self,
        rows: MatrixRef<'_, T>,
        layout: &Layout<'_>,
        workspace: &mut [u8],
        out: &mut [bf16],
    ) -> Result<()> {
        let (m_sum, hidden) = (layout.m_sum(), self.shape.hidden());
        let prepared = self.config.input;
        if T::DTYPE != prepared {
            return Err(Error::Dtype { argument: "rows", actual: T::DTYPE, expected: prepared.as_prepared() });
        }
        rows.require_shape("rows", m_sum, hidden)?;
        if layout.local_experts() != self.shape.local_experts() {
            let expected = self.shape.local_experts().to_string();
            return Err(Error::value("local_experts", layout.local_experts(), expected));
        }
        require_len("out", out.len(), checked_mul("M_sum * H", m_sum, hidden)?)?;
        let mut carver = Carver::new(workspace, self.expanded_workspace_bytes(m_sum)?)?;
        let mut observe = |_: &StageDone<'_>| {};
        let sizes = self.stage_sizes(m_sum)?;
        let mut stages = self.stages(layout, size_of::<T>(), sizes, &mut carver, &mut observe);
        stages.buffers.take(&self.cpu, layout, self.config.activation_format, rows)?;
        stages.experts()?;
        let done = &stages.buffers.back[..m_sum * hidden];
        for expert in 0..layout.local_experts() {
            let live = layout.expert_rows(expert);
            let range = live.start * hidden..live.end * hidden;
            out[range.clone()].copy_from_slice(&done[range]);
        }
        Ok(())
    }

    /// Sizes for the routed experts' `m_sum` rows.
    fn stage_sizes(&self, m_sum: usize) -> Result<StageSizes> {
        StageSizes::new(&self.shape, self.config.activation_format, m_sum)
    }

    /// Sizes that serve the routed experts and, before them, the shared one.
    fn call_sizes(&self, m_sum: usize, tokens: usize) -> Result<StageSizes> {
        let sizes = self.stage_sizes(m_sum)?;
        match &self.shared {
            Some(shared) => Ok(sizes.or(&StageSizes::new(&shared.shape, shared.activations, tokens)?)),
            None => Ok(sizes),
        }
    }

    fn stages<'a>(
        &'a self,
        layout: &'a Layout<'a>,
        input_bytes: usize,
        sizes: StageSizes,
        carver: &mut Carver<'a>,
        observe: &'a mut (dyn FnMut(&StageDone<'_>) + Send),
    ) -> Stages<'a> {
        let buffers = Buffers {
            front: carver.take(sizes.front),
            scales: carver.take(sizes.scales),
            back: carver.take(sizes.back),
            gemm: carver.take(sizes.gemm),
        };
        Stages { layer: self, cpu: &self.cpu, layout, input_bytes, observe, buffers }
    }
}

/// The sizes of a layer of these weights; fails if one cannot be prepared of them.
fn check(w13: &PackedWeights, w2: &PackedWeights, config: &LayerConfig, max_tokens: usize) -> Result<LayerShape> {
    if config.activation_format == ActivationFormat::E4m3 && w13.format() != WeightFormat::E4m3 {
        let actual = w13.format().name();
        return Err(Error::WeightFormat { argument: "w13", actual, expected: "e4m3, for e4m3 activations" });
    }
    config.activation.check()?;
    let shape = fit(w13, w2, &config.activation, config.activation_format)?;
    config.check()?;
    if max_tokens == 0 {
        return Err(Error::value("max_tokens", 0, "at least 1"));
    }
    Ok(shape)
}

/// The sizes of a layer of these weights; fails if they do not fit each other, the activation or the activations' format.
fn fit(
    w13: &PackedWeights,
    w2: &PackedWeights,
    activation: &Activation,
    activations: ActivationFormat,
) -> Result<LayerShape> {
    let what = |weights: &PackedWeights| ([weights.experts(), weights.n(), weights.k()], weights.format());
    let shape = LayerShape::of_weights(what(w13), what(w2), activation.is_gated())?;
    let intermediate = shape.intermediate();
    if activations == ActivationFormat::E4m3 {
        let format = scale_format()?;
        format.groups(shape.hidden())?;
        let expected = "a positive multiple of the group, 128";
        format.groups(intermediate).map_err(|_| Error::value("intermediate", intermediate, expected))?;
    }
    if activation.is_gated() && !w13.halves_have_own_blocks() {
        let expected = "a multiple of 128, or a w13 packed as gate and up: each has row blocks of scales of its own";
        return Err(Error::value("intermediate", intermediate, expected));
    }
    Ok(shape)
}

/// Elements of the front buffer (bytes), its scales, the back buffer and the GEMM's own workspace.
#[derive(Clone, Copy)]
struct StageSizes {
    front: usize,
    scales: usize,
    back: usize,
    gemm: usize,
}

impl StageSizes {
    /// What experts of that shape need for so many rows.
    fn new(shape: &LayerShape, activations: ActivationFormat, rows: usize) -> Result<Self> {
        let widest_front = shape.hidden().max(shape.intermediate());
        let widest_back = shape.hidden().max(shape.w13_rows());
        let values = checked_mul("M_sum * max(H, I)", rows, widest_front)?;
        let (front, scales) = match activations {
            ActivationFormat::Bf16 => (checked_mul("front bytes", values, 2)?, 0),
            ActivationFormat::E4m3 => (values, values / Group::G128.size()),
        };
        let back = checked_mul("M_sum * max(H, 2 I)", rows, widest_back)?;
        let gemm = grouped_gemm_workspace_bytes(rows, widest_front, activations)?;
        Ok(Self { front, scales, back, gemm })
    }

    /// The larger of each.
    fn or(&self, other: &Self) -> Self {
        Self {
            front: self.front.max(other.front),
            scales: self.scales.max(other.scales),
            back: self.back.max(other.back),
            gemm: self.gemm.max(other.gemm),
        }
    }

    fn add_to(&self, sizing: Sizing) -> Result<Sizing> {
        sizing.add::<u8>(self.front)?.add::<f32>(self.scales)?.add::<bf16>(self.back)?.add::<u8>(self.gemm)
    }
}

/// The buffers that stages use in turn.
struct Buffers<'a> {
    front: &'a mut [u8],
    scales: &'a mut [f32],
    back: &'a mut [bf16],
    gemm: &'a mut [u8],
}

impl Buffers<'_> {
    /// Brings rows that already stand in their place into `front`.
    fn take<T: Float>(
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
                quantize_rows(cpu, rows, layout, scale_format()?, out, ScalesMut::F32(self.scales))
            }
        }
    }

    /// The rows in `front` times `weights`, to `out` or to `back`.
    fn multiply(
        &mut self,
        cpu: &Cpu,
        layout: &Layout<'_>,
        activations: ActivationFormat,
        (weights, bias): (&PackedWeights, Option<&[f32]>),
        out: Option<&mut [bf16]>,
    ) -> Result<()> {
        let values = layout.m_sum() * weights.k();
        let rows = match activations {
            ActivationFormat::Bf16 => Activations::Bf16(&bytemuck::cast_slice(self.front)[..values]),
            ActivationFormat::E4m3 => Activations::E4m3 {
                rows: &bytemuck::cast_slice(self.front)[..values],
                scales: Scales::F32(self.scales),
                format: scale_format()?,
            },
        };
        grouped_gemm_with_bias(cpu, layout, rows, weights, bias, self.gemm, out.unwrap_or(self.back))
    }

    /// `back` to `front`.
    fn activate(
        &mut self,
        cpu: &Cpu,
        layout: &Layout<'_>,
        activations: ActivationFormat,
        intermediate: usize,
        activation: &Activation,
    ) -> Result<()> {
        match activations {
            ActivationFormat::Bf16 => {
                let out: &mut [bf16] = bytemuck::cast_slice_mut(self.front);
                activate(cpu, layout, intermediate, self.back, activation, out)
            }
            ActivationFormat::E4m3 => {
                let out: &mut [E4m3] = bytemuck::cast_slice_mut(self.front);
                let (scales, format) = (ScalesMut::F32(self.scales), scale_format()?);
                activate_quantize(cpu, layout, intermediate, self.back, activation, format, out, scales)
            }
        }
    }
}

/// A call under way: the layer, the layout, and the parts of the workspace.
struct Stages<'a> {
    layer: &'a Layer,
    cpu: &'a Cpu,
    layout: &'a Layout<'a>,
    input_bytes: usize,
    observe: &'a mut (dyn FnMut(&StageDone<'_>) + Send),
    buffers: Buffers<'a>,
}

impl Stages<'_> {
    fn done(&mut self, stage: Stage, started: Instant, rows: Option<usize>) {
        let elapsed = started.elapsed();
        let Layer { shape, config, w13, shared, .. } = self.layer;
        let cost = match shared {
            Some(shared) if stage == Stage::Shared => shared.cost(self.layout.tokens(), self.input_bytes),
            _ => stage_cost(stage, shape, self.layout, w13.format(), config.activation_format, self.input_bytes),
        };
        let rows = rows.map(|len| &self.buffers.back[..len]);
        (self.observe)(&StageDone { stage, elapsed, cost, layout: self.layout, rows });
    }

    /// The shared expert over all tokens.
    fn shared<'s, T: Float>(
        &mut self,
        shared: &Shared,
        x: MatrixRef<'_, T>,
        space: SharedSpace<'s>,
    ) -> Result<SharedRows<'s, bf16>> {
        let started = Instant::now();
        let rows = shared.run(self.cpu, &self.layer.config.activation, x, &mut self.buffers, space)?;
        self.done(Stage::Shared, started, None);
        Ok(rows)
    }

    fn permute<T: Float>(&mut self, x: MatrixRef<'_, T>, weights: Option<MatrixRef<'_, f32>>) -> Result<()> {
        let started = Instant::now();
        let (cpu, layout, buffers) = (self.cpu, self.layout, &mut self.buffers);
        match self.layer.config.activation_format {
            ActivationFormat::Bf16 => {
                let out: &mut [bf16] = bytemuck::cast_slice_mut(buffers.front);
                permute_convert(cpu, x, weights, layout, Padding::Untouched, out)?;
            }
            ActivationFormat::E4m3 => {
                let out: &mut [E4m3] = bytemuck::cast_slice_mut(buffers.front);
                let scales = ScalesMut::F32(buffers.scales);
                quantize_permute(cpu, x, weights, layout, scale_format()?, Padding::Untouched, out, scales)?;
            }
        }
        self.done(Stage::Permute, started, None);
        Ok(())
    }

    /// GEMM 1, activation, GEMM 2.
    fn experts(&mut self) -> Result<()> {
        let (cpu, layout) = (self.cpu, self.layout);
        let Layer { shape, w13, w2, b13, b2, config, .. } = self.layer;
        let activations = config.activation_format;
        let started = Instant::now();
        self.buffers.multiply(cpu, layout, activations, (w13, b13.as_deref()), None)?;
        self.done(Stage::Gemm1, started, None);
        let started = Instant::now();
        self.buffers.activate(cpu, layout, activations, shape.intermediate(), &config.activation)?;
        self.done(Stage::Activation, started, None);
        let started = Instant::now();
        self.buffers.multiply(cpu, layout, activations, (w2, b2.as_deref()), None)?;
        self.done(Stage::Gemm2, started, Some(layout.m_sum() * shape.hidden()));
        Ok(())
    }

    fn unpermute<O: Float>(
        &mut self,
        weights: Option<MatrixRef<'_, f32>>,
        shared: Option<SharedRows<'_, bf16>>,
        output: &mut [O],
    ) -> Result<()> {
        let started = Instant::now();
        let rows = MatrixRef::new(&*self.buffers.back, self.layout.m_sum(), self.layer.shape.hidden())?;
        unpermute_with_shared(self.cpu, rows, self.layout, weights, shared, output)?;
        self.done(Stage::Unpermute, started, None);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::{Isa, unpermute};
    use crate::dtype::Dtype;
    use expertile_oracle::{activation::SWIGLU, compare, layer as oracle};

    const EXPERTS: usize = 3;
    const HIDDEN: usize = 256;
    const INTERMEDIATE: usize = 128;
    const TOKENS: usize = 5;
    const F32: LayerConfig =
        LayerConfig { input: Dtype::F32, output: Dtype::F32, ..LayerConfig::new(2, EXPERTS, ActivationFormat::Bf16) };
    const IDS: [i64; 2 * TOKENS] = [0, 2, 2, 0, -1, 2, 0, -1, -1, -1];

    /// Values spread over a few powers of two, different for every seed.
    fn values(seed: u32, len: usize) -> Vec<f32> {
        let mut state = seed.wrapping_mul(0x9e37_79b9) | 1;
        let next = |_| {
            state ^= state << 13;
            state ^= state >> 17;
            state ^= state << 5;
            bf16::from_f32((state >> 8) as f32 / (1 << 23) as f32 - 1.0).to_f32()
        };
        (0..len).map(next).collect()
    }

    fn to_bf16(values: &[f32]) -> Vec<bf16> {
        values.iter().map(|&value| bf16::from_f32(value)).collect()
    }

    fn bf16_layer(cpu: &Cpu, w13: &[f32], w2: &[f32]) -> Layer {
        let w13 = PackedWeights::pack_bf16(cpu, &to_bf16(w13), EXPERTS, 2 * INTERMEDIATE, HIDDEN).unwrap();
        let w2 = PackedWeights::pack_bf16(cpu, &to_bf16(w2), EXPERTS, HIDDEN, INTERMEDIATE).unwrap();
        Layer::prepare(cpu, w13, w2, F32, TOKENS).unwrap()
    }

    /// e4m3 weights with every block scale 0.5, and what they stand for.
    fn e4m3_layer(cpu: &Cpu, w13: &mut [f32], w2: &mut [f32], activations: ActivationFormat) -> Layer {
        let pack = |values: &mut [f32], n: usize, k: usize| {
            let bytes: Vec<E4m3> = values.iter().map(|&value| E4m3::from_f32(2.0 * value)).collect();
            values.iter_mut().zip(&bytes).for_each(|(value, byte)| *value = 0.5 * byte.to_f32());
            let scales = vec![0.5; EXPERTS * n.div_ceil(128) * k.div_ceil(128)];
            PackedWeights::pack_e4m3(cpu, &bytes, &scales, EXPERTS, n, k).unwrap()
        };
        let (w13, w2) = (pack(w13, 2 * INTERMEDIATE, HIDDEN), pack(w2, HIDDEN, INTERMEDIATE));
        Layer::prepare(cpu, w13, w2, LayerConfig { activation_format: activations, ..F32 }, TOKENS).unwrap()
    }

    fn expected(x: &[f32], weights: &[f32], w13: &[f32], w2: &[f32]) -> Vec<f64> {
        let row = |weights: &[f32], n: usize, e: usize, j: usize, row: &mut [f64]| {
            let len = row.len();
            row.iter_mut().zip(&weights[(e * n + j) * len..]).for_each(|(to, &from)| *to = f64::from(from));
        };
        let layer = oracle::Layer {
            hidden: HIDDEN,
            intermediate: INTERMEDIATE,
            activation: SWIGLU,
            weight_on_input: false,
            w13_row: &|e, j, to| row(w13, 2 * INTERMEDIATE, e, j, to),
            w2_row: &|e, j, to| row(w2, HIDDEN, e, j, to),
            b13: None,
            b2: None,
            shared: None,
        };
        layer.run(x, &IDS, 2, Some(weights), None).output
    }

    fn run(layer: &Layer, x: &[f32], weights: &[f32]) -> Vec<f64> {
        let ids = MatrixRef::new(&IDS[..], TOKENS, 2).unwrap();
        let routing = Routing::new(ids, EXPERTS, None).unwrap();
        let mut workspace = vec![0xff; layer.workspace_bytes(TOKENS).unwrap()];
        let mut output = vec![f32::NAN; TOKENS * HIDDEN];
        let x = MatrixRef::new(x, TOKENS, HIDDEN).unwrap();
        let weights = MatrixRef::new(weights, TOKENS, 2).unwrap();
        layer.run(x, &routing, weights, &mut workspace, &mut output).unwrap();
        output.into_iter().map(f64::from).collect()
    }

    #[test]
    fn every_format_gives_the_oracles_numbers_on_every_instruction_set() {
        let (x, weights) = (values(1, TOKENS * HIDDEN), values(2, 2 * TOKENS));
        for isa in Isa::available() {
            let cpu = &Cpu::with_isa(isa);
            let mut w13 = values(3, EXPERTS * 2 * INTERMEDIATE * HIDDEN);
            let mut w2 = values(4, EXPERTS * HIDDEN * INTERMEDIATE);
            let check = |layer: Layer, w13: &[f32], w2: &[f32], tolerance: compare::Tolerance| {
                let (ours, exact) = (run(&layer, &x, &weights), expected(&x, &weights, w13, w2));
                let whole = compare::difference(&ours, &exact);
                let (row, worst) = compare::worst(&compare::by_row(&ours, &exact, HIDDEN)).unwrap();
                assert!(whole < tolerance.whole, "{isa}: {whole}");
                assert!(worst < tolerance.row, "{isa}: row {row} is off by {worst}");
            };
            check(bf16_layer(cpu, &w13, &w2), &w13, &w2, compare::BF16_LAYER);
            let layer = e4m3_layer(cpu, &mut w13, &mut w2, ActivationFormat::Bf16);
            check(layer, &w13, &w2, compare::BF16_LAYER);
            let layer = e4m3_layer(cpu, &mut w13, &mut w2, ActivationFormat::E4m3);
            check(layer, &w13, &w2, compare::E4M3_LAYER);
        }
    }

    #[test]
    fn expanded_rows_come_out_as_the_layers_own_rows_do() {
        let cpu = &Cpu::new();
        let (x, weights) = (values(1, TOKENS * HIDDEN), values(2, 2 * TOKENS));
        let layer = bf16_layer(
            cpu,
            &values(3, EXPERTS * 2 * INTERMEDIATE * HIDDEN),
            &values(4, EXPERTS * HIDDEN * INTERMEDIATE),
        );
        let routing = Routing::new(MatrixRef::new(&IDS[..], TOKENS, 2).unwrap(), EXPERTS, None).unwrap();
        let plan = Plan::tight(TOKENS, 2, EXPERTS, 4, TokenExperts::Distinct).unwrap();
        let mut space = vec![0; Layout::space_len(&plan).unwrap()];
        let built = Layout::build(&plan, &routing, &mut space).unwrap();
        let mut rows = vec![bf16::NAN; plan.m_sum() * HIDDEN];
        let x_rows = MatrixRef::new(&x[..], TOKENS, HIDDEN).unwrap();
        permute_convert(cpu, x_rows, None, &built, Padding::Untouched, &mut rows).unwrap();

        let expanded = layer.with_config(LayerConfig { input: Dtype::Bf16, ..F32 }, TOKENS).unwrap();
        let mut space = vec![0; 3 * EXPERTS + plan.m_sum()];
        let given = Layout::from_psum(built.psum(), 4, plan.m_sum(), &mut space).unwrap();
        let mut workspace = vec![0; expanded.expanded_workspace_bytes(plan.m_sum()).unwrap()];
        let mut out = vec![bf16::NAN; plan.m_sum() * HIDDEN];
        let rows = MatrixRef::new(&rows[..], plan.m_sum(), HIDDEN).unwrap();
        expanded.run_expanded(rows, &given, &mut workspace, &mut out).unwrap();
        for (row, &expert) in built.m_indices().iter().enumerate() {
            let untouched = out[row * HIDDEN..][..HIDDEN].iter().all(|value| value.is_nan());
            assert_eq!(untouched, expert < 0, "row {row}");
        }
        let mut output = vec![0.0f32; TOKENS * HIDDEN];
        let out = MatrixRef::new(&out[..], plan.m_sum(), HIDDEN).unwrap();
        let weights_matrix = MatrixRef::new(&weights[..], TOKENS, 2).unwrap();
        unpermute(cpu, out, &built, Some(weights_matrix), &mut output).unwrap();
        let output: Vec<f64> = output.into_iter().map(f64::from).collect();
        assert_eq!(output, run(&layer, &x, &weights));
    }

    #[test]
    fn operands_that_do_not_fit_are_refused_before_anything_is_written() {
        let cpu = &Cpu::new();
        let layer = bf16_layer(
            cpu,
            &values(3, EXPERTS * 2 * INTERMEDIATE * HIDDEN),
            &values(4, EXPERTS * HIDDEN * INTERMEDIATE),
        );
        let x = vec![0.0f32; TOKENS * HIDDEN];
        let weights = [1.0; 2 * TOKENS];
        let routing = Routing::new(MatrixRef::new(&IDS[..], TOKENS, 2).unwrap(), EXPERTS, None).unwrap();
        let refuse = |hidden: usize, slots: usize, workspace: usize, output: usize, start: &str| {
            let x = MatrixRef::new(&x[..], TOKENS, hidden).unwrap();
            let weights = MatrixRef::new(&weights[..], TOKENS, slots).unwrap();
            let mut output = vec![7.0f32; output];
            let error = layer.run(x, &routing, weights, &mut vec![0; workspace], &mut output).unwrap_err();
            assert!(error.to_string().starts_with(start), "{error}");
            assert!(output.iter().all(|&value| value == 7.0));
        };
        let (workspace, output) = (layer.workspace_bytes(TOKENS).unwrap(), TOKENS * HIDDEN);
        refuse(HIDDEN - 1, 2, workspace, output, "hidden_states has shape [5, 255]");
        refuse(HIDDEN, 1, workspace, output, "topk_weights has shape [5, 1]");
        refuse(HIDDEN, 2, workspace - 1, output, "workspace holds");
        refuse(HIDDEN, 2, workspace, output - 1, "output holds");
    }

    #[test]
    fn weights_that_do_not_fit_each_other_or_the_activations_are_refused() {
        let cpu = &Cpu::new();
        let bf16_weights =
            |n: usize, k: usize| PackedWeights::pack_bf16(cpu, &vec![bf16::ONE; n * k], 1, n, k).unwrap();
        let e4m3_weights = |n: usize, k: usize| {
            let scales = vec![1.0; n.div_ceil(128) * k.div_ceil(128)];
            PackedWeights::pack_e4m3(cpu, &vec![E4m3(0); n * k], &scales, 1, n, k).unwrap()
        };
        let refuse = |w13, w2, config, start: &str| {
            let error = Layer::prepare(cpu, w13, w2, config, 1).unwrap_err();
            assert!(error.to_string().starts_with(start), "{error}");
        };
        let plain = LayerConfig::new(2, 1, ActivationFormat::Bf16);
        let e4m3 = LayerConfig { activation_format: ActivationFormat::E4m3, ..plain };
        refuse(bf16_weights(64, 128), bf16_weights(128, 64), plain, "w13 has shape [1, 64, 128]");
        refuse(bf16_weights(128, 128), e4m3_weights(128, 64), plain, "w2 is packed as e4m3, expected bf16");
        refuse(bf16_weights(256, 128), bf16_weights(128, 128), e4m3, "w13 is packed as bf16, expected e4m3");
        refuse(e4m3_weights(128, 128), e4m3_weights(128, 64), e4m3, "intermediate is 64");
        refuse(e4m3_weights(256, 64), e4m3_weights(64, 128), e4m3, "hidden is 64");
        let unaligned = LayerConfig { alignment: Some(0), ..plain };
        refuse(bf16_weights(128, 128), bf16_weights(128, 64), unaligned, "alignment is 0");
    }
}
