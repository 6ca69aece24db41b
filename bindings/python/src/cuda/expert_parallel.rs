//! The layer over several GPUs: torch's group joins the ranks, calls run on torch's current stream in torch's memory.

use super::gpu::{self, Gpu, current_stream};
use super::layer::{Pair, dtype, in_place};
use super::matrix;
use crate::array::{Apart, Array, Element};
use crate::autograd::written;
use crate::error::{Wrong, exception, size};
use crate::expert_parallel::{PyExchange, parallel};
use crate::layer::{biases, gate_up_order, named_activations};
use crate::tensor::{self, Form};
use expertile::cuda::{
    DeviceBuffer, DeviceMatrix, DevicePtr, ExpertParallelCall, ExpertParallelLayer, Link, Nccl, STATE_BYTES,
};
use expertile::exchange::Exchange;
use expertile::{Activation, Error, LayerConfig};
use pyo3::prelude::*;
use std::sync::Arc;
use std::time::Duration;

/// Weights of a rank's experts, and the way to the others: what `expertile.torch.ExpertParallelLayer` documents.
#[pyclass(frozen, module = "expertile._native")]
pub(crate) struct CudaExpertParallelLayer {
    gpu: Arc<Gpu>,
    layer: ExpertParallelLayer,
    state: DeviceBuffer,
    /// Keeps the weights' memory alive.
    _tensors: Vec<Py<PyAny>>,
}

#[pymethods]
impl CudaExpertParallelLayer {
    #[new]
    #[pyo3(signature = (
        w13, w2, w13_scale, w2_scale, activations, placement, capacity, topk, ids, input, output, exchange, rank, *,
        link, dispatch, combine, alpha, beta, limit, weight_on_input, time_limit, w13_bias=None, w2_bias=None,
        gate_up="halves"
    ))]
    fn new(
        py: Python<'_>,
        w13: &Bound<'_, PyAny>,
        w2: &Bound<'_, PyAny>,
        w13_scale: Option<&Bound<'_, PyAny>>,
        w2_scale: Option<&Bound<'_, PyAny>>,
        activations: &str,
        placement: Vec<Vec<usize>>,
        capacity: &Bound<'_, PyAny>,
        topk: &Bound<'_, PyAny>,
        ids: &Bound<'_, PyAny>,
        input: &Bound<'_, PyAny>,
        output: &Bound<'_, PyAny>,
        exchange: Py<PyAny>,
        rank: usize,
        link: &str,
        dispatch: Option<&str>,
        combine: &str,
        alpha: f32,
        beta: f32,
        limit: Option<f32>,
        weight_on_input: bool,
        time_limit: f64,
        w13_bias: Option<&Bound<'_, PyAny>>,
        w2_bias: Option<&Bound<'_, PyAny>>,
        gate_up: &str,
    ) -> PyResult<Self> {
        let arrays = [Some(w13), Some(w2), w13_scale, w2_scale].into_iter().zip(["w13", "w2", "w13_scale", "w2_scale"]);
        let arrays: Vec<_> = arrays.map(|(array, name)| Array::optional(name, array)).collect::<PyResult<_>>()?;
        let [Some(w13), Some(w2), w13_scale, w2_scale] = &arrays[..] else { unreachable!("four arrays") };
        let device = Array::common_device(&[Some(w13), Some(w2), w13_scale.as_ref(), w2_scale.as_ref()])?;
        let Some(ordinal) = device else {
            return Err(Wrong::new("w13", "is on the CPU", "the CPU", "a CUDA device").value());
        };
        let Pair { sizes13, sizes2, shape, format } =
            Pair::new((w13, w13_scale.as_ref()), (w2, w2_scale.as_ref()), true)?;
        let activation_format = named_activations(activations)?;
        let ranks = placement.len();
        let parallel = parallel(placement, dispatch, combine)?;
        let experts = parallel.placement.global_experts();
        let config = LayerConfig {
            ids: dtype("ids_dtype", Element::of_torch(ids)?, ids)?,
            input: dtype("dtype", Element::of_torch(input)?, input)?,
            output: dtype("out_dtype", Element::of_torch(output)?, output)?,
            activation: Activation::Swiglu { alpha, beta, limit },
            weight_on_input,
            ..LayerConfig::new(size("topk", topk)?, experts, activation_format)
        };
        let capacity = size("capacity", capacity)?;
        let time_limit = Duration::try_from_secs_f64(time_limit).map_err(|_| {
            Wrong::new("time_limit", format_args!("is {time_limit}"), &time_limit.to_string()[..], "seconds").value()
        })?;
        let w13_in_place = in_place(w13, sizes13, ("w13_scale", w13_scale.as_ref()), format)?;
        let w2_in_place = in_place(w2, sizes2, ("w2_scale", w2_scale.as_ref()), format)?;
        let (b13, b2) = biases(&shape, gate_up_order(gate_up)?, w13_bias, w2_bias)?;
        let gpu = gpu::gpu(py, ordinal)?;
        let stream = current_stream(py, ordinal)?;
        let exchange: Arc<dyn Exchange> = Arc::new(PyExchange { exchange, rank, ranks });
        let device = &gpu.device;
        let layer = py.detach(|| {
            // Weights of 4 bits are arranged on the default stream; what torch has queued comes before.
            if format.has_groups() {
                #[allow(unsafe_code)]
                // SAFETY: torch's current stream is a live stream of the device.
                unsafe {
                    device.synchronize(stream)?;
                }
            }
            let link = match link {
                "nccl" => Link::Nccl(Arc::new(Nccl::join(device, &*exchange, time_limit)?)),
                "nccl-windows" => Link::Nccl(Arc::new(Nccl::join(device, &*exchange, time_limit)?.with_windows())),
                "mapped" => Link::Mapped,
                other => {
                    let (argument, actual, expected) = ("link", other.to_owned(), "mapped, nccl, nccl-windows");
                    return Err(Error::Name { argument, actual, expected });
                }
            };
            let weights = (w13_in_place, w2_in_place);
            let layer = ExpertParallelLayer::prepare(device, weights, config, parallel, capacity, exchange, link)?;
            Ok(layer.with_biases(b13, b2)?.with_time_limit(time_limit))
        });
        let layer = layer.map_err(exception)?;
        let state = gpu.device.upload(&[0u8; STATE_BYTES]).map_err(exception)?;
        // Of weights of 4 bits the layer has a copy.
        let held = arrays.iter().flatten().filter(|_| !format.has_groups());
        let tensors = held.map(|array| array.object().clone().unbind()).collect();
        Ok(Self { gpu, layer, state, _tensors: tensors })
    }

    #[getter]
    fn choice(&self) -> PyResult<String> {
        self.layer.choice(self.layer.max_tokens()).map(|choice| choice.to_string()).map_err(exception)
    }

    /// Bytes of workspace for calls of that capacity.
    fn workspace_bytes(&self, capacity: &Bound<'_, PyAny>) -> PyResult<usize> {
        self.layer.workspace_bytes(size("capacity", capacity)?).map_err(exception)
    }

    /// Queues a call; returns `out`, or the tensor that was made in its place.
    #[pyo3(signature = (hidden_states, topk_ids, topk_weights, capacity, workspace=None, out=None))]
    fn run<'py>(
        &self,
        py: Python<'py>,
        hidden_states: &Bound<'py, PyAny>,
        topk_ids: &Bound<'py, PyAny>,
        topk_weights: &Bound<'py, PyAny>,
        capacity: &Bound<'py, PyAny>,
        workspace: Option<&Bound<'py, PyAny>>,
        out: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let (config, hidden) = (*self.layer.config(), self.layer.shape().hidden());
        let hidden_states = Array::new("hidden_states", hidden_states)?;
        let topk_ids = Array::new("topk_ids", topk_ids)?;
        let topk_weights = Array::new("topk_weights", topk_weights)?;
        let inputs = [Some(&hidden_states), Some(&topk_ids), Some(&topk_weights)];
        Array::common_device(&inputs)?;
        let (tokens, _) = hidden_states.matrix_shape("[M, H]")?;
        hidden_states.require_shape(&[tokens, hidden])?;
        topk_ids.require_shape(&[tokens, config.topk])?;
        topk_weights.require_shape(&[tokens, config.topk])?;
        topk_weights.require_dtype::<f32>()?;
        for (array, expected) in [(&hidden_states, config.input), (&topk_ids, config.ids)] {
            let actual = dtype(array.argument(), array.element(), array.object())?;
            if actual != expected {
                let shown = actual.to_string();
                let expected = format!("{expected}, as prepared");
                return Err(
                    Wrong::new(array.argument(), format_args!("has dtype {shown}"), &shown[..], expected).of_type()
                );
            }
        }
        let capacity = size("capacity", capacity)?;
        let needed = self.layer.workspace_bytes(capacity).map_err(exception)?;
        let ordinal = self.gpu.ordinal;
        let stream = current_stream(py, ordinal)?;
        let memory =
            tensor::given_or_made(py, "workspace", workspace, Some(ordinal), || Ok(Form::list(Element::U8, needed)))?;
        let given = out.map(|out| Array::output("out", out)).transpose()?;
        let element = match config.output {
            expertile::Dtype::F32 => Element::F32,
            expertile::Dtype::F16 => Element::F16,
            _ => Element::Bf16,
        };
        let out = given.map_or_else(|| tensor::empty(py, ordinal, Form::row_major(element, tokens, hidden)), Ok)?;
        out.require_shape(&[tokens, hidden])?;
        out.require_contiguous()?;
        if out.element() != element {
            let expected = format!("{}, as prepared", config.output);
            return Err(Wrong::new("out", "has another dtype", out.object(), expected).of_type());
        }
        Array::common_device(&[Some(&hidden_states), Some(&out), Some(&memory)])?;
        Apart::check(&[&out, &memory], &inputs)?;
        if hidden_states.device() != Some(ordinal) {
            let expected = format!("cuda:{ordinal}, where the weights are");
            return Err(Wrong::new("hidden_states", "is elsewhere", hidden_states.object(), expected).value());
        }
        let call = ExpertParallelCall {
            tokens,
            capacity,
            hidden_states: if tokens > 0 { matrix(&hidden_states)? } else { DeviceMatrix::default() },
            topk_ids: if tokens > 0 { matrix(&topk_ids)? } else { DeviceMatrix::default() },
            topk_weights: if tokens > 0 { matrix(&topk_weights)? } else { DeviceMatrix::default() },
            output: DevicePtr::new(if tokens > 0 { out.require_aligned(16)? } else { 0 }),
            state: self.state.ptr(),
            workspace: DevicePtr::new(memory.require_device_memory::<u8>(needed, 256)?),
        };
        #[allow(unsafe_code)]
        // SAFETY: every address is a live tensor's of the size and type that was checked, what is written overlaps
        // nothing else, and torch hands memory on in stream order. The weights live as long as `self`, which users keep
        // as long as graphs that captured a call of it.
        unsafe { self.layer.launch(stream, &call) }.map_err(exception)?;
        written(py, &[&out, &memory])?;
        Ok(out.into_object())
    }

    /// Waits for the current stream, up to the time limit, and raises what calls found wrong since the last time.
    fn check(&self, py: Python<'_>) -> PyResult<()> {
        let stream = current_stream(py, self.gpu.ordinal)?;
        let (state, capacity) = (self.state.ptr(), self.layer.max_tokens());
        let call = ExpertParallelCall { state, capacity, ..ExpertParallelCall::default() };
        #[allow(unsafe_code)]
        // SAFETY: the stream is torch's, and the state was zero when it was new.
        py.detach(|| unsafe { self.layer.check_launch(stream, &call) }).map_err(exception)
    }
}
