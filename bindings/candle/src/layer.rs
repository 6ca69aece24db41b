//! A prepared layer, and candle's door to it.

#[cfg(feature = "cuda")]
use crate::cuda;
use crate::error::refused;
use crate::weights::{Place as Placed, Weights};
use crate::{cpu, operands};
use candle_core::{CpuStorage, CudaStorage, CustomOp3, DeviceLocation, Error, Layout, Result, Shape, Tensor};
use expertile::{LayerConfig, LayerShape};
#[cfg(feature = "cuda")]
use std::sync::Arc;

/// The experts of a layer, ready for calls. Cheap to clone: clones share the weights.
///
/// It is also a [`CustomOp3`] of `hidden_states`, `topk_ids` and `topk_weights`, which is how
/// [`forward`](Self::forward) calls it.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use expertile_candle::{ActivationFormat, Layer, LayerConfig, Weights};
///
/// # fn main() -> candle_core::Result<()> {
/// let (device, experts, hidden, intermediate, topk) = (Device::Cpu, 8, 64, 32, 2);
/// let random = |shape: &[usize]| Tensor::randn(0f32, 0.1, shape, &device)?.to_dtype(DType::BF16);
/// let (w13, w2) = (random(&[experts, 2 * intermediate, hidden])?, random(&[experts, hidden, intermediate])?);
/// let config = LayerConfig::new(topk, experts, ActivationFormat::Bf16);
/// let layer = Layer::prepare(Weights::bf16(&w13, &w2)?, config, 1024)?;
///
/// let x = random(&[3, hidden])?;
/// let topk_ids = Tensor::new(&[[0u32, 1], [3, 1], [2, 7]], &device)?;
/// let topk_weights = Tensor::new(&[[0.6f32, 0.4], [0.5, 0.5], [0.9, 0.1]], &device)?;
/// assert_eq!(layer.forward(&x, &topk_ids, &topk_weights)?.dims(), &[3, hidden]);
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct Layer {
    place: Place,
}

#[derive(Debug, Clone)]
enum Place {
    Cpu(expertile::cpu::Layer),
    #[cfg(feature = "cuda")]
    Cuda(Arc<cuda::Layer>),
}

impl Layer {
    /// A layer of these weights, where they are, for calls of up to `max_tokens` tokens. On a GPU this compiles (or
    /// loads) what such calls can launch.
    ///
    /// `config` says what a call's tensors are: `config.input` is the type of `hidden_states`, `config.output` the
    /// result's, `config.ids` that of `topk_ids`, where I32 also stands for candle's U32.
    ///
    /// # Errors
    /// If the configuration and the weights do not fit each other or the device; `config.global_experts` has to be the
    /// weights' number of experts, as there is no expert map.
    pub fn prepare(weights: Weights, config: LayerConfig, max_tokens: usize) -> Result<Self> {
        let experts = weights.shape().local_experts();
        if config.global_experts != experts {
            let actual = format_args!("is {}", config.global_experts);
            return Err(refused("global_experts", actual, format_args!("{experts}, the experts of the weights")));
        }
        let place = match weights.place {
            Placed::Cpu { w13, w2 } => Place::Cpu(cpu::prepare(w13, w2, config, max_tokens)?),
            #[cfg(feature = "cuda")]
            Placed::Cuda(weights) => Place::Cuda(Arc::new(cuda::Layer::prepare(weights, config, max_tokens)?)),
        };
        Ok(Self { place })
    }

    /// Runs the experts: `hidden_states [M, H]`, `topk_ids [M, topk]` (U32, I32 or I64) and `topk_weights [M, topk]`
    /// (F32) to `[M, H]`, contiguous. On a GPU the call is queued on the stream of the tensors' device.
    ///
    /// On the CPU every operand may be any view. On a GPU the columns of `hidden_states` and `topk_weights` stand next
    /// to each other and rows of `hidden_states` start on 16 bytes; other views are refused, not copied.
    ///
    /// There is no backward pass: `backward` through the result returns candle's error for that.
    ///
    /// # Errors
    /// For a device, type, shape, view or number of tokens that does not fit the layer, and on the CPU for an id that
    /// is no expert's. On a GPU only a kernel can see the ids, and treats a slot with a bad one as empty:
    /// [`check`](Self::check) reports it.
    pub fn forward(&self, hidden_states: &Tensor, topk_ids: &Tensor, topk_weights: &Tensor) -> Result<Tensor> {
        let here = self.location();
        let arguments = [hidden_states, topk_ids, topk_weights];
        for (argument, tensor) in ["hidden_states", "topk_ids", "topk_weights"].into_iter().zip(arguments) {
            let location = tensor.device().location();
            if location != here {
                let expected = format_args!("{here:?}, where the layer's weights are");
                return Err(refused(argument, format_args!("is on {location:?}"), expected));
            }
        }
        hidden_states.apply_op3(topk_ids, topk_weights, self.clone())
    }

    /// Waits for this thread's calls on a GPU, and reports what was wrong with their ids. On the CPU a call has
    /// reported everything when it returns.
    ///
    /// # Errors
    /// For an id that was no expert's, since the last time.
    pub fn check(&self) -> Result<()> {
        match &self.place {
            Place::Cpu(_) => Ok(()),
            #[cfg(feature = "cuda")]
            Place::Cuda(layer) => layer.check(),
        }
    }

    /// The layer's sizes.
    #[must_use]
    pub fn shape(&self) -> &LayerShape {
        match &self.place {
            Place::Cpu(layer) => layer.shape(),
            #[cfg(feature = "cuda")]
            Place::Cuda(layer) => layer.shape(),
        }
    }

    /// What it computes, and what its calls are made of.
    #[must_use]
    pub fn config(&self) -> &LayerConfig {
        match &self.place {
            Place::Cpu(layer) => layer.config(),
            #[cfg(feature = "cuda")]
            Place::Cuda(layer) => layer.config(),
        }
    }

    /// The most tokens of a call.
    #[must_use]
    pub fn max_tokens(&self) -> usize {
        match &self.place {
            Place::Cpu(layer) => layer.max_tokens(),
            #[cfg(feature = "cuda")]
            Place::Cuda(layer) => layer.max_tokens(),
        }
    }

    /// Where its weights are, and where the tensors of its calls have to be.
    #[must_use]
    pub fn location(&self) -> DeviceLocation {
        match &self.place {
            Place::Cpu(_) => DeviceLocation::Cpu,
            #[cfg(feature = "cuda")]
            Place::Cuda(layer) => layer.location(),
        }
    }

    /// `M`, and the result's shape.
    fn sizes(&self, hidden_states: &Layout, topk_ids: &Layout, topk_weights: &Layout) -> Result<(usize, Shape)> {
        let (shape, config) = (self.shape(), self.config());
        let tokens = operands::tokens(shape, config, hidden_states, topk_ids, topk_weights)?;
        if tokens > self.max_tokens() {
            let expected = format_args!("at most {}, as prepared", self.max_tokens());
            return Err(refused("tokens", format_args!("is {tokens}"), expected));
        }
        Ok((tokens, (tokens, shape.hidden()).into()))
    }

    fn elsewhere(&self, location: &str) -> Error {
        refused("hidden_states", format_args!("is on {location}"), format_args!("{:?}", self.location()))
    }
}

impl CustomOp3 for Layer {
    fn name(&self) -> &'static str {
        "expertile"
    }

    fn cpu_fwd(
        &self,
        hidden_states: &CpuStorage,
        hidden_states_layout: &Layout,
        topk_ids: &CpuStorage,
        topk_ids_layout: &Layout,
        topk_weights: &CpuStorage,
        topk_weights_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (_, shape) = self.sizes(hidden_states_layout, topk_ids_layout, topk_weights_layout)?;
        let hidden_states = (hidden_states, hidden_states_layout);
        let (topk_ids, topk_weights) = ((topk_ids, topk_ids_layout), (topk_weights, topk_weights_layout));
        match &self.place {
            Place::Cpu(layer) => Ok((cpu::forward(layer, hidden_states, topk_ids, topk_weights)?, shape)),
            #[cfg(feature = "cuda")]
            Place::Cuda(_) => Err(self.elsewhere("Cpu")),
        }
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        hidden_states: &CudaStorage,
        hidden_states_layout: &Layout,
        topk_ids: &CudaStorage,
        topk_ids_layout: &Layout,
        topk_weights: &CudaStorage,
        topk_weights_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let (tokens, shape) = self.sizes(hidden_states_layout, topk_ids_layout, topk_weights_layout)?;
        let hidden_states = (hidden_states, hidden_states_layout);
        let (topk_ids, topk_weights) = ((topk_ids, topk_ids_layout), (topk_weights, topk_weights_layout));
        match &self.place {
            Place::Cuda(layer) => Ok((layer.forward(tokens, hidden_states, topk_ids, topk_weights)?, shape)),
            Place::Cpu(_) => Err(self.elsewhere("a GPU")),
        }
    }

    #[cfg(not(feature = "cuda"))]
    fn cuda_fwd(
        &self,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        Err(self.elsewhere("a GPU"))
    }
}
