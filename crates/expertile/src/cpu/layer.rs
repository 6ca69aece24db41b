//! The whole layer in the caller's workspace: shared expert, permute, GEMM 1, activation, GEMM 2, unpermute.
//!
//! The workspace holds the layout, the packed operand of the GEMM at hand, and two buffers that the stages use in turn:
//! `front` (permuted rows, then activated ones) and `back` (`gate | up`, then the rows of GEMM 2). A shared expert uses
//! them before the others do, and leaves its rows in a buffer of its own.

mod expanded;
mod received;
mod shared;

use super::gemm::{Activations, PackedWeights, grouped_gemm_with_bias, grouped_gemm_workspace_bytes};
use super::unpermute::{SharedRows, unpermute_with_shared};
use super::workspace::{Carver, Sizing};
use super::{Cpu, Isa, activate, activate_quantize, permute_convert, quantize_permute};
use crate::activation::Activation;
use crate::dtype::{E4m3, Float};
use crate::error::{Error, Result, checked_mul, require_exact, require_len};
use crate::gemm::{ActivationFormat, WeightFormat};
use crate::layer::{LayerConfig, LayerShape, Stage, StageCost, stage_cost};
use crate::layout::{Layout, Padding};
use crate::matrix::MatrixRef;
use crate::plan::{Plan, TokenExperts};
use crate::quantize::{Group, ScaleFormat, Scales, ScalesMut};
use crate::routing::Routing;
use half::bf16;
pub use received::TokenRows;
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

/// The quantized activations' scales on the CPU.
const SCALES: ScaleFormat = ScaleFormat::ROW_MAJOR;

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
    /// `w2 [E, H, I]`, for calls of up to `max_tokens` tokens. Nothing is compiled or allocated on a CPU, so any
    /// number is as good as another.
    ///
    /// # Errors
    /// As [`LayerConfig::check`]; [`Error::Shape`] if the two do not fit each other, [`Error::WeightFormat`] if their
    /// formats differ or e4m3 activations meet bf16 weights, [`Error::Value`] if e4m3 activations meet an `H` or `I`
    /// that 64 does not divide, if one block scale of `w13` serves rows of both gate and up, or for `max_tokens` 0.
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

    /// The packed weights of GEMM 1.
    #[must_use]
    pub fn w13(&self) -> &PackedWeights {
        &self.w13
    }

    /// The packed weights of GEMM 2.
    #[must_use]
    pub fn w2(&self) -> &PackedWeights {
        &self.w2
    }

    /// The same layer on other threads or another instruction set.
    #[must_use]
    pub fn on(&self, cpu: &Cpu) -> Self {
        Self { cpu: cpu.clone(), ..self.clone() }
    }

    /// The same with biases: `b13 [E, 2 I]` (gate's first, then up's; `[E, I]` without a gate) and `b2 [E, H]`, each
    /// added to its GEMM's f32 sums before anything else happens to them. [`crate::GateUpOrder::to_halves`] brings an
    /// interleaved one into order.
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

    /// The same with an expert that every token visits, in [`Layer::run`]: what it says is added to the routed sum in
    /// f32, before the one rounding to the output's type. Router weights do not touch it, on the input neither.
    /// [`Layer::run_expanded`] leaves it out: its rows are slots, not tokens.
    ///
    /// With e4m3 activations, its activations are e4m3 if its weights are, else bf16.
    ///
    /// # Errors
    /// As [`Layer::prepare`], for weights of one expert and the layer's activation; [`Error::Shape`] unless its `H` is
    /// the layer's and a gate has `H` values.
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

    /// Whether there is a `b13`, and a `b2`.
    pub(super) fn has_biases(&self) -> [bool; 2] {
        [self.b13.is_some(), self.b2.is_some()]
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

    /// Runs the layer: `hidden_states [M, H]`, `routing` and `topk_weights` `[M, topk]` to `output [M, H]`.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::Value`], [`Error::Dtype`], [`Error::BufferTooSmall`] for operands that do not fit
    /// each other or what was prepared; nothing is written to `output` then.
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

    fn plan(&self, tokens: usize) -> Result<Plan> {
        LayerConfig::require_tokens(tokens, self.max_tokens)?;
        let alignment = self.config.alignment.unwrap_or(ALIGNMENT);
        Plan::tight(tokens, self.config.topk, self.shape.local_experts(), alignment, TokenExperts::MayRepeat)
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
        Stages { layer: self, cpu: &self.cpu, layout, input_bytes, observe, buffers: sizes.carve(carver) }
    }
}

/// The sizes of a layer of these weights; fails if one cannot be prepared of them.
fn check(w13: &PackedWeights, w2: &PackedWeights, config: &LayerConfig, max_tokens: usize) -> Result<LayerShape> {
    if !w13.format().goes_with(config.activation_format) {
        let actual = w13.format().name();
        return Err(Error::WeightFormat {
            argument: "w13",
            actual,
            expected: "e4m3, mxfp4 or int4, for e4m3 activations",
        });
    }
    config.activation.check()?;
    let shape = fit(w13, w2, &config.activation, config.activation_format)?;
    config.check()?;
    if max_tokens == 0 {
        return Err(Error::value("max_tokens", 0, "at least 1"));
    }
    Ok(shape)
}

/// The sizes of a layer of these weights; fails if they do not fit each other, the activation or the activations'
/// format.
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
        SCALES.groups(shape.hidden())?;
        let expected = "a positive multiple of 64: groups of 128, the last one half at least";
        SCALES.groups(intermediate).map_err(|_| Error::value("intermediate", intermediate, expected))?;
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
            ActivationFormat::E4m3 => {
                let groups = widest_front.div_ceil(Group::G128.size());
                (values, checked_mul("M_sum * max(H, I) / 128", rows, groups)?)
            }
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

    /// Takes what [`StageSizes::add_to`] counted.
    fn carve<'a>(&self, carver: &mut Carver<'a>) -> Buffers<'a> {
        Buffers {
            front: carver.take(self.front),
            scales: carver.take(self.scales),
            back: carver.take(self.back),
            gemm: carver.take(self.gemm),
        }
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
                scales: Scales::f32(SCALES, self.scales),
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
                let scales = ScalesMut::f32(SCALES, self.scales);
                activate_quantize(cpu, layout, intermediate, self.back, activation, out, scales)
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
                let scales = ScalesMut::f32(SCALES, buffers.scales);
                quantize_permute(cpu, x, weights, layout, Padding::Untouched, out, scales)?;
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
mod tests;
