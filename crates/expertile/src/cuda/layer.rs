//! The whole layer on a Hopper: permute, GEMM 1, activation, GEMM 2, unpermute, in the caller's workspace.
//!
//! How a call is cut ([`LayerChoice`]) depends on the number of tokens. Whatever calls of up to `max_tokens` tokens can
//! choose is compiled when the layer is prepared; a launch only looks its kernels up.

mod choice;

pub use choice::{LayerChoice, LayerParts};

use super::activation::{Activate, ActivateBuffers, ActivateConfig, activation_definitions};
use super::arguments::{RoutingBuffers, RowsBuffers, Tensor2, require_aligned};
use super::device::{Device, Stream};
use super::gemm::{Gemm, GemmBuffers, GemmConfig, GemmKernel};
use super::permute::{Permute, PermuteConfig, QuantizePermute, QuantizePermuteConfig};
use super::route::{self, Route, RouteConfig};
use super::unpermute::{Unpermute, UnpermuteBuffers, UnpermuteConfig};
use super::weights::Weights;
use crate::activation::Activation;
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::gemm::{ActivationFormat, WeightFormat};
use crate::layer::{LayerShape, Stage};
use crate::layout::Padding;
use crate::quantize::ScaleFormat;
use choice::{Choices, Offsets};
use std::collections::HashMap;
use std::hash::Hash;

/// The layout's alignment on Hopper, whatever the shape: the GEMM's tiles start anywhere, so padding serves only the copies
/// of e4m3 rows' scales (16 bytes, 4 rows), and the less there is the fewer zeros are written. 8 keeps a cache line's
/// worth of a column of scales together.
pub const ALIGNMENT: usize = 8;

/// What the layer is specialised for, its weights apart.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LayerConfig {
    /// Slots per token, 1 to 32.
    pub topk: usize,
    /// Type of the ids: [`Dtype::I32`] or [`Dtype::I64`].
    pub ids: Dtype,
    /// `G`; `E` without an expert map.
    pub global_experts: usize,
    /// Type of the hidden states: [`Dtype::Bf16`], or with e4m3 activations [`Dtype::F16`].
    pub input: Dtype,
    /// Type of the result: [`Dtype::Bf16`], [`Dtype::F16`] or [`Dtype::F32`].
    pub output: Dtype,
    /// The activation between the GEMMs.
    pub activation: Activation,
    /// What the GEMMs' activations are made of; the weights are the same.
    pub activations: ActivationFormat,
    /// `apply_router_weight_on_input`: weights multiply the input instead of the output; only with `topk` 1 and e4m3.
    pub weight_on_input: bool,
    /// Whether K may be split, by the size of a call, where few experts have few rows: up to twice as fast there. **A token's result then
    /// depends on how many tokens the call has**: sums are added up in another order for some numbers than for others. Without it,
    /// which is the usual, a result has the same bits whatever other tokens there are.
    pub split_k: bool,
}

/// What one call works on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(C)]
pub struct LayerBuffers {
    /// `[M, H]`; columns next to each other, every row on 16 bytes.
    pub hidden_states: Tensor2,
    /// `topk_ids [M, topk]` and the expert map, if there is one.
    pub routing: RoutingBuffers,
    /// `[M, topk]` f32; columns next to each other.
    pub topk_weights: Tensor2,
    /// `[M, H]`, row-major, 16-byte aligned.
    pub output: u64,
    /// [`Layer::workspace_bytes`] of at least as many tokens, 256-byte aligned.
    pub workspace: u64,
}

impl LayerConfig {
    /// What goes with the activations.
    fn weight_format(&self) -> WeightFormat {
        match self.activations {
            ActivationFormat::E4m3 => WeightFormat::E4m3,
            ActivationFormat::Bf16 => WeightFormat::Bf16,
        }
    }

    fn check(&self, shape: &LayerShape, weights: WeightFormat) -> Result<()> {
        let expected = self.weight_format();
        if weights != expected {
            let expected = match expected {
                WeightFormat::E4m3 => "e4m3, for e4m3 activations",
                WeightFormat::Bf16 => "bf16, for bf16 activations on a GPU",
            };
            return Err(Error::WeightFormat { argument: "w13", actual: weights.name(), expected });
        }
        if self.weight_on_input && self.topk != 1 {
            return Err(Error::value("topk", self.topk, "1, where router weights multiply the input"));
        }
        let dtype = |argument, actual, expected| Err(Error::Dtype { argument, actual, expected });
        if !matches!(self.output, Dtype::Bf16 | Dtype::F16 | Dtype::F32) {
            return dtype("output", self.output, "bf16, f16 or f32");
        }
        match (self.activations, self.input) {
            (ActivationFormat::E4m3, Dtype::Bf16 | Dtype::F16) => {
                ScaleFormat::HOPPER.groups(shape.hidden())?;
                ScaleFormat::HOPPER.groups(shape.intermediate()).map_err(|_| {
                    let expected =
                        "a positive multiple of the group, 128: gate and up have row blocks of scales of their own";
                    Error::value("intermediate", shape.intermediate(), expected)
                })?;
                Ok(())
            }
            (ActivationFormat::E4m3, input) => dtype("hidden_states", input, "bf16 or f16 on a GPU"),
            (ActivationFormat::Bf16, Dtype::Bf16) if self.weight_on_input => {
                let expected = "e4m3, where router weights multiply the input on a GPU";
                Err(Error::WeightFormat { argument: "w13", actual: weights.name(), expected })
            }
            (ActivationFormat::Bf16, Dtype::Bf16) => Ok(()),
            (ActivationFormat::Bf16, input) => dtype("hidden_states", input, "bf16, with bf16 weights on a GPU"),
        }
    }

    fn route(&self, row_tile: usize) -> RouteConfig {
        RouteConfig { topk: self.topk, ids: self.ids, row_tile }
    }

    fn quantize_permute(&self, shape: &LayerShape, row_tile: usize) -> QuantizePermuteConfig {
        QuantizePermuteConfig {
            route: self.route(row_tile),
            hidden: shape.hidden(),
            input: self.input,
            format: ScaleFormat::HOPPER,
            padding: Padding::Untouched,
            weighted: self.weight_on_input,
            aligned: true,
        }
    }

    fn activate(&self, shape: &LayerShape) -> ActivateConfig {
        let quantized = self.activations == ActivationFormat::E4m3;
        ActivateConfig {
            intermediate: shape.intermediate(),
            activation: self.activation,
            format: quantized.then_some(ScaleFormat::HOPPER),
        }
    }

    fn unpermute(&self, shape: &LayerShape) -> UnpermuteConfig {
        UnpermuteConfig {
            hidden: shape.hidden(),
            topk: self.topk,
            input: Dtype::Bf16,
            output: self.output,
            weighted: !self.weight_on_input,
            aligned: true,
        }
    }
}

/// The way from hidden states to rows in their places, one for each row tile: kernels are shared.
#[derive(Debug)]
enum Entry {
    /// Quantized, routing included.
    Quantized(HashMap<usize, QuantizePermute>),
    /// As they are, after the routing.
    Plain { route: HashMap<usize, Route>, permute: Box<Permute> },
}

/// An expert layer on a device: weights, and everything that its calls launch.
///
/// ```no_run
/// # #![allow(unsafe_code)]
/// use expertile::cuda::{Device, Layer, LayerBuffers, LayerConfig, Stream, Weights};
/// use expertile::{Activation, ActivationFormat, Dtype};
/// # use expertile::E4m3;
/// # fn run(w13: &[E4m3], w13_scales: &[f32], w2: &[E4m3], w2_scales: &[f32], buffers: LayerBuffers) -> expertile::Result<()> {
/// let (experts, hidden, intermediate, topk) = (256, 7168, 2048, 8);
/// let device = Device::open(0)?;
/// let w13 = Weights::upload_e4m3(&device, w13, w13_scales, (experts, 2 * intermediate, hidden))?;
/// let w2 = Weights::upload_e4m3(&device, w2, w2_scales, (experts, hidden, intermediate))?;
/// let config = LayerConfig {
///     topk,
///     ids: Dtype::I32,
///     global_experts: experts,
///     input: Dtype::Bf16,
///     output: Dtype::Bf16,
///     activation: Activation::default(),
///     activations: ActivationFormat::E4m3,
///     weight_on_input: false,
///     split_k: false,
/// };
/// let layer = Layer::prepare(&device, w13, w2, config, 16384)?; // compiles; nothing afterwards does
/// println!("{}", layer.choice(64)?);
///
/// // Once for a workspace of `layer.workspace_bytes(...)`; then call after call, eager or captured in a graph.
/// let stream = Stream(0);
/// unsafe {
///     layer.initialise_workspace(stream, buffers.workspace)?;
///     layer.launch(stream, 64, &buffers)?;
///     layer.check(stream, 64, &buffers)?; // waits, and says what was wrong with the ids
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Layer {
    device: Device,
    shape: LayerShape,
    config: LayerConfig,
    max_tokens: usize,
    w13: Weights,
    w2: Weights,
    entry: Entry,
    /// By how the work is cut, and whether the activation is inside.
    gemms: HashMap<(GemmKernel, bool), Gemm>,
    choices: Choices,
    activate: Activate,
    unpermute: Unpermute,
}

/// A call, checked.
#[derive(Debug, Clone, Copy)]
pub(super) struct Call<'a> {
    choice: LayerChoice,
    parts: LayerParts,
    buffers: &'a LayerBuffers,
}

impl Layer {
    /// A layer of `w13 [E, 2 I, H]` (gate rows first, then up) and `w2 [E, H, I]`, for calls of up to `max_tokens` tokens.
    ///
    /// This is the warm-up: what such calls can choose is compiled (or loaded) here, several kernels at a time, and nothing
    /// afterwards.
    ///
    /// # Errors
    /// [`Error::Name`] for an activation other than SwiGLU, [`Error::Parameter`] as [`Activation::check`], [`Error::Shape`] if
    /// the two do not fit each other, [`Error::WeightFormat`] if their formats differ from each other or from the activations', [`Error::Value`] for a width, `topk`, number of experts or `max_tokens` that the kernels do
    /// not take, [`Error::Dtype`] for types they do not take, [`Error::Device`] unless the device is a Hopper,
    /// [`Error::Kernel`] if a kernel does not compile, [`Error::Cuda`].
    pub fn prepare(device: &Device, w13: Weights, w2: Weights, config: LayerConfig, max_tokens: usize) -> Result<Self> {
        let what = |weights: &Weights| ([weights.experts(), weights.n(), weights.k()], weights.format());
        activation_definitions(&config.activation)?;
        let shape = LayerShape::of_weights(what(&w13), what(&w2), config.activation.is_gated())?;
        config.check(&shape, w13.format())?;
        let choices = Choices::new(&shape, &config, max_tokens, device.info().multiprocessors as usize)?;
        let format = config.weight_format();
        Ok(Self {
            device: device.clone(),
            shape,
            config,
            max_tokens,
            w13,
            w2,
            entry: Entry::prepare(device, &shape, &config, &choices.row_tiles)?,
            activate: Activate::prepare(device, config.activate(&shape))?,
            unpermute: Unpermute::prepare(device, config.unpermute(&shape))?,
            gemms: each_at_once(&choices.gemms, |(kernel, activated)| {
                let activation = activated.then_some(config.activation);
                Gemm::prepare(device, GemmConfig { format, kernel, activation })
            })?,
            choices,
        })
    }

    /// The layer's sizes.
    #[must_use]
    pub fn shape(&self) -> &LayerShape {
        &self.shape
    }

    /// What it is specialised for.
    #[must_use]
    pub fn config(&self) -> &LayerConfig {
        &self.config
    }

    /// The most tokens of a call.
    #[must_use]
    pub fn max_tokens(&self) -> usize {
        self.max_tokens
    }

    /// The weights: `w13`, then `w2`.
    #[must_use]
    pub fn weights(&self) -> [&Weights; 2] {
        [&self.w13, &self.w2]
    }

    /// What a call with that many tokens does.
    ///
    /// # Errors
    /// [`Error::Value`] for more tokens than the layer was prepared for.
    pub fn choice(&self, tokens: usize) -> Result<LayerChoice> {
        Ok(self.choose(tokens)?.0)
    }

    fn choose(&self, tokens: usize) -> Result<(LayerChoice, Offsets)> {
        if tokens > self.max_tokens {
            return Err(Error::value("tokens", tokens, format!("at most {}, as prepared", self.max_tokens)));
        }
        let multiprocessors = self.device.info().multiprocessors as usize;
        let tiles = self.choices.tiles(tokens);
        LayerChoice::with_offsets(&self.shape, &self.config, tokens, tiles, multiprocessors)
    }

    /// Bytes of workspace that serve calls of up to that many tokens, a multiple of 256.
    ///
    /// # Errors
    /// As [`Layer::choice`].
    pub fn workspace_bytes(&self, tokens: usize) -> Result<usize> {
        Ok(self.choices.workspace_bytes(&self.choice(tokens)?))
    }

    /// Where the parts of a call's workspace are, for who wants to look at what is between the steps.
    ///
    /// # Errors
    /// As [`Layer::choice`]; [`Error::Value`] unless `workspace` is 256-byte aligned.
    pub fn parts(&self, tokens: usize, workspace: u64) -> Result<LayerParts> {
        let (choice, offsets) = self.choose(tokens)?;
        offsets.at(workspace, &choice)
    }

    /// Readies a workspace; once, before its first call. Calls of different numbers of tokens may share it.
    ///
    /// # Safety
    /// As [`Route::initialise_workspace`].
    ///
    /// # Errors
    /// As [`Route::initialise_workspace`].
    #[allow(unsafe_code)]
    pub unsafe fn initialise_workspace(&self, stream: Stream, workspace: u64) -> Result<()> {
        require_aligned("workspace", workspace, choice::PART_BYTES as u64)?;
        // SAFETY: the caller's promise.
        unsafe { route::initialise_workspace(&self.device, stream, workspace) }
    }

    /// Queues the call: `output`, every element. Stages follow each other on the stream; nothing else is waited for.
    ///
    /// # Safety
    /// As [`Route::launch`]; the workspace was initialised, and the layer outlives the launch (for a graph: its replays).
    ///
    /// # Errors
    /// [`Error::Value`] and [`Error::Stride`] for what does not fit the layer or the kernels, before anything is queued;
    /// [`Error::Cuda`].
    #[allow(unsafe_code)]
    pub unsafe fn launch(&self, stream: Stream, tokens: usize, buffers: &LayerBuffers) -> Result<()> {
        let call = self.call(tokens, buffers)?;
        // SAFETY: the caller's promise.
        Stage::ALL.into_iter().try_for_each(|stage| unsafe { self.launch_stage(stream, &call, stage) })
    }

    /// As [`Route::check`]: waits for the stream and says what was wrong with the ids of calls since the last time.
    ///
    /// # Safety
    /// As [`Route::check`].
    ///
    /// # Errors
    /// As [`Route::check`] and [`Layer::choice`].
    #[allow(unsafe_code)]
    pub unsafe fn check(&self, stream: Stream, tokens: usize, buffers: &LayerBuffers) -> Result<()> {
        let LayerChoice { plan, .. } = self.choice(tokens)?;
        require_aligned("workspace", buffers.workspace, choice::PART_BYTES as u64)?;
        // SAFETY: the caller's promise.
        unsafe { route::check(&self.device, self.config.topk, stream, &plan, &buffers.routing, buffers.workspace) }
    }

    /// Whether a stage has launches of its own: routing is part of permute where rows are quantized, and the activation may
    /// be of GEMM 1.
    pub(super) fn has_stage(&self, call: &Call<'_>, stage: Stage) -> bool {
        match stage {
            Stage::Routing => matches!(self.entry, Entry::Plain { .. }),
            Stage::Activation => !call.choice.activation_inside_gemm1,
            Stage::Shared => false,
            _ => true,
        }
    }

    /// Checks everything that a call's launches ask for.
    pub(super) fn call<'a>(&self, tokens: usize, buffers: &'a LayerBuffers) -> Result<Call<'a>> {
        let (choice, offsets) = self.choose(tokens)?;
        let call = Call { choice, parts: offsets.at(buffers.workspace, &choice)?, buffers };
        self.check_routing(&buffers.routing)?;
        if tokens > 0 {
            require_aligned("output", buffers.output, 16)?;
            check_matrix("hidden_states", &buffers.hidden_states, self.shape.hidden(), tokens, (2, 16))?;
            check_matrix("topk_weights", &buffers.topk_weights, self.config.topk, tokens, (4, 4))?;
            let ids_bytes = if self.config.ids == Dtype::I64 { 8 } else { 4 };
            require_aligned("topk_ids", buffers.routing.ids.address, ids_bytes)?;
        }
        Ok(call)
    }

    fn check_routing(&self, routing: &RoutingBuffers) -> Result<()> {
        let (experts, global) = (self.shape.local_experts(), self.config.global_experts);
        if routing.global_experts != global {
            return Err(Error::value("global_experts", routing.global_experts, format!("{global}, as prepared")));
        }
        if routing.expert_map == 0 && global != experts {
            return Err(Error::value("global_experts", global, format!("{experts} without an expert map")));
        }
        if routing.expert_map != 0 {
            require_aligned("expert_map", routing.expert_map, 4)?;
        }
        Ok(())
    }

    /// Queues one stage of a call.
    ///
    /// # Safety
    /// As [`Layer::launch`]; the stages before it were queued.
    #[allow(unsafe_code)]
    pub(super) unsafe fn launch_stage(&self, stream: Stream, call: &Call<'_>, stage: Stage) -> Result<()> {
        if call.choice.plan.tokens() == 0 || !self.has_stage(call, stage) {
            return Ok(());
        }
        // SAFETY: the caller's promise; the parts were carved for this call.
        unsafe {
            match stage {
                Stage::Routing => self.entry.route(stream, call),
                // No layer on a GPU has one.
                Stage::Shared => Ok(()),
                Stage::Permute => self.entry.permute(stream, call),
                Stage::Gemm1 => self.gemm1(stream, call),
                Stage::Activation => self.activate.launch(stream, &call.activation(self.shape.local_experts())),
                Stage::Gemm2 => self.gemm2(stream, call),
                Stage::Unpermute => self.unpermute.launch(stream, &call.unpermute()),
            }
        }
    }

    /// # Safety
    /// As [`Layer::launch_stage`].
    #[allow(unsafe_code)]
    unsafe fn gemm1(&self, stream: Stream, call: &Call<'_>) -> Result<()> {
        let LayerParts { front, front_scales, activated, activated_scales, back, .. } = call.parts;
        let inside = call.choice.activation_inside_gemm1;
        let (out, out_scales) = if inside { (activated, activated_scales) } else { (back, 0) };
        let buffers = GemmBuffers { rows: front, scales: front_scales, out, out_scales, ..call.gemm() };
        // SAFETY: the caller's promise.
        unsafe { prepared(&self.gemms, &(call.choice.gemm1, inside)).launch(stream, &self.w13, &buffers) }
    }

    /// # Safety
    /// As [`Layer::launch_stage`].
    #[allow(unsafe_code)]
    unsafe fn gemm2(&self, stream: Stream, call: &Call<'_>) -> Result<()> {
        let LayerParts { activated, activated_scales, back, second_worklist, .. } = call.parts;
        let mut buffers = GemmBuffers { rows: activated, scales: activated_scales, out: back, ..call.gemm() };
        if let Some(second) = second_worklist {
            (buffers.header, buffers.worklist) = (second.header, second.worklist);
        }
        // SAFETY: the caller's promise.
        unsafe { prepared(&self.gemms, &(call.choice.gemm2, false)).launch(stream, &self.w2, &buffers) }
    }
}

impl Entry {
    fn prepare(device: &Device, shape: &LayerShape, config: &LayerConfig, row_tiles: &[usize]) -> Result<Self> {
        if config.activations == ActivationFormat::E4m3 {
            let prepare = |tile| QuantizePermute::prepare(device, config.quantize_permute(shape, tile));
            return Ok(Self::Quantized(each(row_tiles, prepare)?));
        }
        let permute = PermuteConfig {
            topk: config.topk,
            hidden: shape.hidden(),
            dtype: Dtype::Bf16,
            scales: None,
            padding: Padding::Untouched,
            alignment_bytes: 16,
        };
        Ok(Self::Plain {
            route: each(row_tiles, |tile| Route::prepare(device, config.route(tile)))?,
            permute: Box::new(Permute::prepare(device, permute)?),
        })
    }

    /// # Safety
    /// As [`Layer::launch_stage`].
    #[allow(unsafe_code)]
    unsafe fn route(&self, stream: Stream, call: &Call<'_>) -> Result<()> {
        let Self::Plain { route, .. } = self else { return Ok(()) };
        let LayerChoice { plan, row_tile, .. } = call.choice;
        let LayerBuffers { routing, workspace, .. } = call.buffers;
        // SAFETY: the caller's promise.
        unsafe {
            let parts = &call.parts;
            let route = prepared(route, &row_tile);
            route.launch_with(stream, &plan, routing, &parts.layout, parts.second_worklist.as_ref(), *workspace)
        }
    }

    /// # Safety
    /// As [`Layer::launch_stage`].
    #[allow(unsafe_code)]
    unsafe fn permute(&self, stream: Stream, call: &Call<'_>) -> Result<()> {
        let LayerChoice { plan, row_tile, .. } = call.choice;
        let LayerBuffers { routing, workspace, .. } = call.buffers;
        let (rows, layout) = (call.rows(), &call.parts.layout);
        let lists = (layout, call.parts.second_worklist.as_ref());
        // SAFETY: the caller's promise.
        unsafe {
            match self {
                Self::Quantized(steps) => {
                    prepared(steps, &row_tile).launch_with(stream, &plan, routing, &rows, lists, *workspace)
                }
                Self::Plain { permute, .. } => permute.launch(stream, &plan, &rows, layout),
            }
        }
    }
}

impl Call<'_> {
    fn rows(&self) -> RowsBuffers {
        RowsBuffers {
            x: self.buffers.hidden_states,
            weights: self.buffers.topk_weights,
            out: self.parts.front,
            scales: self.parts.front_scales,
            ..RowsBuffers::default()
        }
    }

    /// What both GEMMs share, but for the worklist where their row tiles differ.
    fn gemm(&self) -> GemmBuffers {
        let LayerParts { layout, .. } = self.parts;
        GemmBuffers {
            header: layout.header,
            worklist: layout.worklist,
            psum: layout.psum,
            m_sum: self.choice.plan.m_sum(),
            alignment: self.choice.plan.alignment(),
            ..GemmBuffers::default()
        }
    }

    fn activation(&self, local_experts: usize) -> ActivateBuffers {
        let LayerParts { layout, activated, activated_scales, back, .. } = self.parts;
        let plan = &self.choice.plan;
        ActivateBuffers {
            gate_up: back,
            psum: layout.psum,
            out: activated,
            scales: activated_scales,
            local_experts,
            alignment: plan.alignment(),
            m_sum: plan.m_sum(),
        }
    }

    fn unpermute(&self) -> UnpermuteBuffers {
        UnpermuteBuffers {
            rows: self.parts.back,
            inv_perm: self.parts.layout.inv_perm,
            weights: self.buffers.topk_weights,
            out: self.buffers.output,
            tokens: self.choice.plan.tokens(),
            m_sum: self.choice.plan.m_sum(),
        }
    }
}

/// Fails unless a matrix of 2- or 4-byte elements has its columns next to each other and its rows where kernels read them.
fn check_matrix(
    argument: &'static str,
    matrix: &Tensor2,
    cols: usize,
    rows: usize,
    (element_bytes, row_bytes): (usize, usize),
) -> Result<()> {
    require_aligned(argument, matrix.address, row_bytes as u64)?;
    let actual = || vec![matrix.row_stride, matrix.col_stride];
    if matrix.col_stride != 1 && cols > 1 {
        return Err(Error::Stride {
            argument,
            actual: actual(),
            expected: "columns next to each other on a GPU".into(),
        });
    }
    if rows > 1 && !(matrix.row_stride * element_bytes).is_multiple_of(row_bytes) {
        return Err(Error::Stride { argument, actual: actual(), expected: format!("rows {row_bytes} bytes apart") });
    }
    Ok(())
}

fn each<K: Copy + Eq + Hash, V>(keys: &[K], prepare: impl Fn(K) -> Result<V>) -> Result<HashMap<K, V>> {
    keys.iter().map(|&key| Ok((key, prepare(key)?))).collect()
}

/// As [`each`], all at once: compiling takes a second or so for each.
pub(super) fn each_at_once<K, V>(keys: &[K], prepare: impl Fn(K) -> Result<V> + Sync) -> Result<HashMap<K, V>>
where
    K: Copy + Eq + Hash + Send,
    V: Send,
{
    std::thread::scope(|scope| {
        let prepare = &prepare;
        let threads: Vec<_> = keys.iter().map(|&key| (key, scope.spawn(move || prepare(key)))).collect();
        let join = |(key, thread): (K, std::thread::ScopedJoinHandle<'_, Result<V>>)| {
            let value = thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
            Ok((key, value))
        };
        threads.into_iter().map(join).collect()
    })
}

/// What `choices` found has been prepared, and a call chooses nothing else.
fn prepared<'a, K: Eq + Hash, V>(all: &'a HashMap<K, V>, key: &K) -> &'a V {
    all.get(key).expect("every choice of up to max_tokens tokens is prepared")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Blocks of scales that gate and up share are refused with the reason, whatever the number of blocks.
    #[test]
    fn e4m3_takes_an_intermediate_size_that_blocks_of_scales_divide() {
        let config = LayerConfig {
            topk: 2,
            ids: Dtype::I32,
            global_experts: 4,
            input: Dtype::Bf16,
            output: Dtype::Bf16,
            activation: Activation::SWIGLU,
            activations: ActivationFormat::E4m3,
            weight_on_input: false,
            split_k: false,
        };
        let check = |intermediate| config.check(&LayerShape::new(256, intermediate, 4).unwrap(), WeightFormat::E4m3);
        assert_eq!(check(128), Ok(()));
        for intermediate in [64, 96, 192] {
            let error = check(intermediate).unwrap_err().to_string();
            let start = format!("intermediate is {intermediate}, expected a positive multiple of the group, 128: gate");
            assert!(error.starts_with(&start), "{error}");
        }
    }
}
