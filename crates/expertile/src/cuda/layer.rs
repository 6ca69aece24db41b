//! The whole layer on a Hopper: permute, GEMM 1, activation, GEMM 2, unpermute, in the caller's workspace.
//!
//! How a call is cut ([`LayerChoice`]) depends on the number of tokens. Whatever calls of up to `max_tokens` tokens can
//! choose is compiled when the layer is prepared; a launch only looks its kernels up.

mod choice;
mod config;
mod expanded;
mod launch;
mod received;
mod run;

pub use choice::{LayerChoice, LayerParts};
pub use expanded::{ExpandedCall, ExpandedChoice, ExpandedLayer};
pub(in crate::cuda) use received::{ReceivedCall, ReceivedEntry};
pub use run::{CapturedLayer, Workspace};

use super::activation::Activate;
use super::call::{DeviceMatrix, RoutingPtrs};
use super::definitions::activation_definitions;
use super::driver::{Device, DeviceBuffer, DevicePtr, Stream};
use super::few_tokens::FewTokens;
use super::gemm::{Gemm, GemmConfig, GemmKey, JoinedConfig, JoinedGemms};
use super::prepare::{each_at_once, each_of};
use super::route;
use super::unpermute::Unpermute;
use super::weights::Weights;
#[cfg(doc)]
use crate::activation::Activation;
#[cfg(doc)]
use crate::error::Error;
use crate::error::{Result, require_exact};
use crate::gemm::WeightFormat;
use crate::layer::{LayerConfig, LayerShape, Stage};
use choice::{Choices, Offsets};
use config::WeightKind;
use expanded::Expanded;
use launch::Entry;
use std::collections::HashMap;
use std::sync::Arc;

/// The layout's alignment on Hopper, whatever the shape: the GEMM's tiles start anywhere, so padding serves only the
/// copies of e4m3 rows' scales (16 bytes, 4 rows), and the less there is the fewer zeros are written. 8 keeps a cache
/// line's worth of a column of scales together.
pub const ALIGNMENT: usize = 8;

/// What one call works on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LayerCall {
    /// `M`
    pub tokens: usize,
    /// `[M, H]`; columns next to each other, every row on 16 bytes.
    pub hidden_states: DeviceMatrix,
    /// `topk_ids [M, topk]` and the expert map, if there is one.
    pub routing: RoutingPtrs,
    /// `[M, topk]`; columns next to each other.
    pub topk_weights: DeviceMatrix<f32>,
    /// `[M, H]`, row-major, 16-byte aligned.
    pub output: DevicePtr,
    /// [`super::STATE_BYTES`], 16-byte aligned, initialised once. Calls that share it follow each other.
    pub state: DevicePtr,
    /// [`Layer::workspace_bytes`] of at least as many tokens, 256-byte aligned, whatever is in it.
    pub workspace: DevicePtr,
}

/// What a layer adds to its GEMMs' f32 sums, in device memory. Cheap to clone: clones share the memory.
#[derive(Debug, Clone, Default)]
pub struct Biases {
    /// `[E, 2 I]`
    b13: Option<Arc<DeviceBuffer<f32>>>,
    /// `[E, H]`
    b2: Option<Arc<DeviceBuffer<f32>>>,
}

impl Biases {
    /// Copies `b13 [E, 2 I]` (gate's first, then up's) and `b2 [E, H]` to the device.
    /// [`crate::GateUpOrder::to_halves`] brings an interleaved one into order.
    ///
    /// # Errors
    /// [`Error::Shape`] unless each has exactly that many values; [`Error::Cuda`].
    pub fn upload(device: &Device, shape: &LayerShape, b13: Option<&[f32]>, b2: Option<&[f32]>) -> Result<Self> {
        let upload = |argument, bias: Option<&[f32]>, width| {
            let Some(bias) = bias else { return Ok(None) };
            require_exact(argument, bias.len(), &[shape.local_experts(), width])?;
            Ok(Some(Arc::new(device.upload(bias)?)))
        };
        Ok(Self { b13: upload("b13", b13, shape.w13_rows())?, b2: upload("b2", b2, shape.hidden())? })
    }

    /// Fails for biases of another device, or of a layer of another shape.
    fn check(&self, device: &Device, shape: &LayerShape) -> Result<()> {
        for (argument, bias, width) in [("b13", &self.b13, shape.w13_rows()), ("b2", &self.b2, shape.hidden())] {
            if let Some(bias) = bias {
                require_exact(argument, bias.len(), &[shape.local_experts(), width])?;
                bias.require(argument, device, bias.len())?;
            }
        }
        Ok(())
    }
}

/// What a layer multiplies by and adds.
#[derive(Debug, Clone)]
struct LayerWeights {
    w13: Weights,
    w2: Weights,
    biases: Biases,
}

impl LayerWeights {
    /// Weights that fit each other and the configuration, arranged for it, and the layer's sizes.
    fn ready(
        device: &Device,
        (w13, w2): (Weights, Weights),
        biases: Biases,
        config: &LayerConfig,
    ) -> Result<(LayerShape, Self)> {
        let what = |weights: &Weights| ([weights.experts(), weights.n(), weights.k()], weights.format());
        let shape = LayerShape::of_weights(what(&w13), what(&w2), config.activation.is_gated())?;
        Layer::check_config(&shape, config, w13.format())?;
        biases.check(device, &shape)?;
        let [w13, w2] = [w13, w2].map(|weights| weights.arrange(device, config.activation_format));
        Ok((shape, Self { w13: w13?, w2: w2?, biases }))
    }
}

/// An expert layer on a device: weights, and everything that its calls launch.
///
/// Two doors: [`Layer::run`] is safe, over [`super::DeviceBuffer`]s, on the default stream; [`Layer::launch`] takes
/// raw addresses and the caller's stream, for engines that bring their own.
///
/// ```no_run
/// use expertile::cuda::{Device, Ids, Layer, LayerInputs, Weights};
/// use expertile::{ActivationFormat, LayerConfig};
/// # use expertile::E4m3;
/// # use half::bf16;
/// # struct Host { w13: Vec<E4m3>, w13_scales: Vec<f32>, w2: Vec<E4m3>, w2_scales: Vec<f32> }
/// # fn run(host: Host, x: &[bf16], ids: &[i32], topk_weights: &[f32], output: &mut [bf16]) -> expertile::Result<()> {
/// let (experts, hidden, intermediate, topk, tokens) = (256, 7168, 2048, 8, 64);
/// let device = Device::open(0)?;
/// let w13 = Weights::upload_e4m3(&device, &host.w13, &host.w13_scales, (experts, 2 * intermediate, hidden))?;
/// let w2 = Weights::upload_e4m3(&device, &host.w2, &host.w2_scales, (experts, hidden, intermediate))?;
/// let config = LayerConfig::new(topk, experts, ActivationFormat::E4m3);
/// let layer = Layer::prepare(&device, w13, w2, config, 16384)?; // compiles; nothing afterwards does
/// println!("{}", layer.choice(tokens)?);
///
/// let (x, ids, topk_weights) = (device.upload(x)?, device.upload(ids)?, device.upload(topk_weights)?);
/// let (mut workspace, mut out) = (layer.workspace(tokens)?, device.allocate(tokens * hidden)?);
/// let inputs = LayerInputs {
///     tokens,
///     hidden_states: &x,
///     topk_ids: Ids::I32(&ids),
///     topk_weights: &topk_weights,
///     expert_map: None,
/// };
/// layer.run(&inputs, &mut workspace, &mut out)?; // queues, and returns
/// layer.check(&mut workspace)?; // waits, and reports ids that are no expert's
/// out.download(output)?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Layer {
    device: Device,
    shape: LayerShape,
    config: LayerConfig,
    max_tokens: usize,
    weights: LayerWeights,
    entry: Entry,
    gemms: HashMap<GemmKey, Gemm>,
    /// Both GEMMs in one launch.
    joined: HashMap<GemmKey, JoinedGemms>,
    /// By the most tokens of a call.
    few_tokens: HashMap<usize, FewTokens>,
    choices: Choices,
    activate: Activate,
    unpermute: Unpermute,
    expanded: Expanded,
}

impl Layer {
    /// A layer of `w13 [E, 2 I, H]` (gate rows first, then up) and `w2 [E, H, I]`, for calls of up to `max_tokens`
    /// tokens. mxfp4 and int4 weights are arranged here, in memory of their own ([`Weights::arrange`]).
    ///
    /// This is the warm-up: what such calls can choose is compiled (or loaded) here, several kernels at a time, and
    /// nothing afterwards.
    ///
    /// # Errors
    /// [`Error::Name`] for an activation other than SwiGLU, [`Error::Parameter`] as [`Activation::check`],
    /// [`Error::Shape`] if the two do not fit each other, [`Error::WeightFormat`] if their formats differ from each
    /// other or from the activations', [`Error::Value`] for a width, `topk`, number of experts or `max_tokens` that
    /// the kernels do not take, [`Error::Dtype`] for types they do not take, [`Error::Device`] unless the device is a
    /// Hopper, [`Error::Kernel`] if a kernel does not compile, [`Error::Cuda`].
    pub fn prepare(device: &Device, w13: Weights, w2: Weights, config: LayerConfig, max_tokens: usize) -> Result<Self> {
        Self::prepare_with_biases(device, (w13, w2), Biases::default(), config, max_tokens)
    }

    /// The same with biases, each added to its GEMM's f32 sums before anything else happens to them.
    ///
    /// # Errors
    /// As [`Layer::prepare`]; [`Error::Shape`] for biases of another layer, [`Error::Device`] for those of another
    /// device.
    pub fn prepare_with_biases(
        device: &Device,
        weights: (Weights, Weights),
        biases: Biases,
        config: LayerConfig,
        max_tokens: usize,
    ) -> Result<Self> {
        let (shape, weights) = LayerWeights::ready(device, weights, biases, &config)?;
        Self::with_weights(device, shape, weights, config, max_tokens)
    }

    fn with_weights(
        device: &Device,
        shape: LayerShape,
        weights: LayerWeights,
        config: LayerConfig,
        max_tokens: usize,
    ) -> Result<Self> {
        let biased = [weights.biases.b13.is_some(), weights.biases.b2.is_some()];
        let e4m3_copy = [&weights.w13, &weights.w2].map(|weights| weights.e4m3_copy().is_some());
        let kind = WeightKind { format: weights.w13.format(), biased, e4m3_copy };
        let spread = weights.w13.is_spread() || weights.w2.is_spread();
        let choices = Choices::new(&shape, &config, kind, max_tokens, device.info().multiprocessors as usize)?;
        Ok(Self {
            device: device.clone(),
            shape,
            config,
            max_tokens,
            weights,
            entry: Entry::prepare(device, &shape, &config, &choices.row_tiles)?,
            activate: Activate::prepare(device, config.activate(&shape))?,
            unpermute: Unpermute::prepare(device, config.unpermute(&shape))?,
            gemms: each_at_once(&choices.gemms, |key: GemmKey| {
                let (format, activation_format) = (key.format(kind.format), config.activation_format);
                let activation = key.activated.then_some(config.activation);
                Gemm::prepare(device, GemmConfig { format, activation_format, kernel: key.kernel, activation })
            })?,
            joined: each_at_once(&choices.joined, |key: GemmKey| {
                let (format, kernel) = (key.format(kind.format), key.kernel);
                let LayerConfig { activation_format, activation, .. } = config;
                JoinedGemms::prepare(device, JoinedConfig { format, activation_format, spread, kernel, activation })
            })?,
            few_tokens: each_of(&choices.few_tokens, |kernel| {
                Ok((kernel.tokens(), FewTokens::prepare(device, kernel)?))
            })?,
            choices,
            expanded: Expanded::default(),
        })
    }

    /// The same with biases: as [`Biases::upload`] and [`Layer::prepare_with_biases`]. Calls may choose other kernels
    /// then, which are compiled here.
    ///
    /// # Errors
    /// As [`Biases::upload`]; [`Error::Kernel`].
    pub fn with_biases(self, b13: Option<Vec<f32>>, b2: Option<Vec<f32>>) -> Result<Self> {
        let Self { device, shape, config, max_tokens, weights, .. } = self;
        let biases = Biases::upload(&device, &shape, b13.as_deref(), b2.as_deref())?;
        Self::with_weights(&device, shape, LayerWeights { biases, ..weights }, config, max_tokens)
    }

    /// Whether layers of this shape, configuration and weight format exist on a GPU: what [`Layer::prepare`] refuses
    /// for another reason than its weights or the device. It needs no device.
    ///
    /// # Errors
    /// As [`Layer::prepare`].
    pub fn check_config(shape: &LayerShape, config: &LayerConfig, weights: WeightFormat) -> Result<()> {
        activation_definitions(&config.activation)?;
        config.check_on_gpu(shape, weights)
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
        [&self.weights.w13, &self.weights.w2]
    }

    /// What a call with that many tokens does.
    ///
    /// # Errors
    /// [`Error::Value`] for more tokens than the layer was prepared for.
    pub fn choice(&self, tokens: usize) -> Result<LayerChoice> {
        Ok(self.choose(tokens)?.0)
    }

    fn choose(&self, tokens: usize) -> Result<(LayerChoice, Offsets)> {
        LayerConfig::require_tokens(tokens, self.max_tokens)?;
        let multiprocessors = self.device.info().multiprocessors as usize;
        let found = self.choices.of_tokens(tokens);
        LayerChoice::with_offsets(&self.shape, &self.config, tokens, found, multiprocessors)
    }

    /// Bytes of workspace that serve calls of up to that many tokens, a multiple of 256.
    ///
    /// # Errors
    /// As [`Layer::choice`].
    pub fn workspace_bytes(&self, tokens: usize) -> Result<usize> {
        Ok(self.choices.workspace_bytes(&self.choice(tokens)?))
    }

    /// Addresses of the intermediate buffers in a call's workspace, for inspection.
    ///
    /// # Errors
    /// As [`Layer::choice`]; [`Error::Value`] unless `workspace` is 256-byte aligned.
    pub fn parts(&self, tokens: usize, workspace: DevicePtr) -> Result<LayerParts> {
        let (choice, offsets) = self.choose(tokens)?;
        offsets.at(workspace, &choice)
    }

    /// Readies the state of calls; once, before the first. Calls of different numbers of tokens, and of other layers,
    /// may share it.
    ///
    /// # Safety
    /// As [`super::Route::initialise_state`].
    ///
    /// # Errors
    /// As [`super::Route::initialise_state`].
    #[allow(unsafe_code)]
    pub unsafe fn initialise_state(&self, stream: Stream, state: DevicePtr) -> Result<()> {
        state.require_aligned("state", 16)?;
        // SAFETY: the caller's promise.
        unsafe { route::initialise_state(&self.device, stream, state) }
    }

    /// Queues the call: `output`, every element. Stages follow each other on the stream; nothing else is waited for.
    ///
    /// # Safety
    /// As [`super::Route::launch`]; the state was initialised, and the layer outlives the launch (for a graph: its
    /// replays).
    ///
    /// # Errors
    /// [`Error::Value`] and [`Error::Stride`] for what does not fit the layer or the kernels, before anything is
    /// queued; [`Error::Cuda`].
    #[allow(unsafe_code)]
    pub unsafe fn launch(&self, stream: Stream, call: &LayerCall) -> Result<()> {
        let call = self.call(call)?;
        // SAFETY: the caller's promise.
        Stage::ALL.into_iter().try_for_each(|stage| unsafe { self.launch_stage(stream, &call, stage) })
    }

    /// As [`super::Route::check`]: waits for the stream, and reports what was wrong with the ids of calls since the
    /// last time.
    ///
    /// # Safety
    /// As [`super::Route::check`].
    ///
    /// # Errors
    /// As [`super::Route::check`] and [`Layer::choice`].
    #[allow(unsafe_code)]
    pub unsafe fn check_launch(&self, stream: Stream, call: &LayerCall) -> Result<()> {
        let LayerChoice { plan, .. } = self.choice(call.tokens)?;
        call.state.require_aligned("state", 16)?;
        // SAFETY: the caller's promise.
        unsafe { route::check(&self.device, stream, &plan, self.config.global_experts, call.state) }
    }

    /// Its device.
    #[must_use]
    pub fn device(&self) -> &Device {
        &self.device
    }
}
