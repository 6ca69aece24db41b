//! The whole layer on CUDA tensors: weights where they are (MXFP4 and int4 arranged), calls on torch's current stream,
//! all in torch's memory.

use super::expanded::Expanded;
use super::gpu::{self, Gpu, current_stream, found_by_a_kernel};
use super::{lock, matrix, ptr, routing};
use crate::array::{Apart, Array, Element, place};
use crate::autograd::written;
use crate::error::{Actual, Wrong, exception, optional_size, size};
use crate::gemm::format;
use crate::layer::{biases, gate_up_order, named_activation, named_activations};
use crate::placed_rows::{Rows, require_out};
use crate::tensor::{self, Form};
use expertile::cuda::{Biases, DeviceBuffer, DevicePtr, ExpandedLayer, Layer, LayerCall, STATE_BYTES, Stream, Weights};
use expertile::gemm::{WEIGHT_BLOCK, WeightFormat};
use expertile::layer::LayerShape;
use expertile::{ActivationFormat, Dtype, LayerConfig, int4, mxfp4};
use half::{bf16, f16};
use pyo3::prelude::*;
use std::ops::Range;
use std::sync::{Arc, Mutex};

/// States that a layer has ready: 32 KiB of device memory. One for each stream that calls it, one for each call that
/// was captured into a graph.
const STATES: usize = 512;

/// Weights on a GPU, used in place unless they have 4 bits, and what calls of them have been prepared: what
/// `expertile.torch.Layer` documents.
#[pyclass(frozen, module = "expertile._native")]
pub(crate) struct CudaLayer {
    gpu: Arc<Gpu>,
    shape: LayerShape,
    /// Of a call only its ids and tensors say more: `topk`, `global_experts` and types.
    config: LayerConfig,
    w13: Weights,
    w2: Weights,
    biases: Biases,
    /// Where the weights and their scales are: nothing may be written there.
    held: Vec<Range<u64>>,
    /// Keeps that memory alive.
    _tensors: Vec<Py<PyAny>>,
    /// Never dropped before the layer: a captured graph launches their kernels.
    prepared: Mutex<Vec<Arc<Layer>>>,
    states: Mutex<States>,
    expanded: Expanded,
}

struct States {
    memory: DeviceBuffer,
    used: Vec<State>,
}

/// Who has a state, and the call that used it last.
struct State {
    /// None for a captured call.
    stream: Option<Stream>,
    layer: Arc<Layer>,
    tokens: usize,
}

#[pymethods]
impl CudaLayer {
    /// Weights are in halves; biases are on the CPU, and `gate_up` is their order.
    #[new]
    #[pyo3(signature = (
        w13, w2, w13_scale, w2_scale, activations, alignment, alpha, beta, limit, weight_on_input, *,
        activation="swiglu", w13_bias=None, w2_bias=None, gate_up="halves", e4m3_copy=false
    ))]
    fn new(
        py: Python<'_>,
        w13: &Bound<'_, PyAny>,
        w2: &Bound<'_, PyAny>,
        w13_scale: Option<&Bound<'_, PyAny>>,
        w2_scale: Option<&Bound<'_, PyAny>>,
        activations: &str,
        alignment: Option<&Bound<'_, PyAny>>,
        alpha: f32,
        beta: f32,
        limit: Option<f32>,
        weight_on_input: bool,
        activation: &str,
        w13_bias: Option<&Bound<'_, PyAny>>,
        w2_bias: Option<&Bound<'_, PyAny>>,
        gate_up: &str,
        e4m3_copy: bool,
    ) -> PyResult<Self> {
        let arrays = [Some(w13), Some(w2), w13_scale, w2_scale].into_iter().zip(["w13", "w2", "w13_scale", "w2_scale"]);
        let arrays: Vec<_> = arrays.map(|(array, name)| Array::optional(name, array)).collect::<PyResult<_>>()?;
        let [Some(w13), Some(w2), w13_scale, w2_scale] = &arrays[..] else { unreachable!("four arrays") };
        let device = Array::common_device(&[Some(w13), Some(w2), w13_scale.as_ref(), w2_scale.as_ref()])?;
        let Some(ordinal) = device else {
            return Err(Wrong::new("w13", "is on the CPU", "the CPU", "a CUDA device").value());
        };
        let activation_format = named_activations(activations)?;
        let activation = named_activation(activation, (alpha, beta, limit))?;
        let Pair { sizes13, sizes2, shape, format } =
            Pair::new((w13, w13_scale.as_ref()), (w2, w2_scale.as_ref()), activation.is_gated())?;
        let config = LayerConfig {
            activation,
            alignment: optional_size("alignment", alignment)?,
            weight_on_input,
            ..LayerConfig::new(1, shape.local_experts(), activation_format)
        };
        Layer::check_config(&shape, &config, format).map_err(exception)?;
        if e4m3_copy && (format, activation_format) != (WeightFormat::Mxfp4, ActivationFormat::E4m3) {
            let found = format!("is True for {format} weights and {activation_format} activations");
            return Err(Wrong::new("e4m3_copy", found, 1, "it for mxfp4 weights and e4m3 activations").value());
        }
        let w13_in_place = in_place(w13, sizes13, ("w13_scale", w13_scale.as_ref()), format)?;
        let w2_in_place = in_place(w2, sizes2, ("w2_scale", w2_scale.as_ref()), format)?;
        let (b13, b2) = biases(&shape, gate_up_order(gate_up)?, w13_bias, w2_bias)?;
        let gpu = gpu::gpu(py, ordinal)?;
        let memory = gpu.device.upload(&[0u8; STATES * STATE_BYTES]).map_err(exception)?;
        let biases = Biases::upload(&gpu.device, &shape, b13.as_deref(), b2.as_deref()).map_err(exception)?;
        let (w13_ready, w13_memory) = arranged(py, &gpu, w13_in_place, sizes13, activation_format)?;
        let (w2_ready, w2_memory) = arranged(py, &gpu, w2_in_place, sizes2, activation_format)?;
        let (w13_ready, w13_copy) = copied(py, &gpu, w13_ready, sizes13, e4m3_copy)?;
        let (w2_ready, w2_copy) = copied(py, &gpu, w2_ready, sizes2, e4m3_copy)?;
        let of_arranged = [w13_memory, w2_memory, w13_copy, w2_copy].into_iter().flatten().collect::<Vec<_>>();
        // Of what was arranged, the layer reads nothing any more.
        let tensors: Vec<&Array<'_>> =
            if of_arranged.is_empty() { arrays.iter().flatten().collect() } else { of_arranged.iter().collect() };
        let bytes = |array: &&Array<'_>| {
            let len = array.shape().iter().product::<usize>() * array.item_bytes();
            array.address()..array.address() + len as u64
        };
        Ok(Self {
            shape,
            config,
            w13: w13_ready,
            w2: w2_ready,
            biases,
            held: tensors.iter().map(bytes).collect(),
            _tensors: tensors.iter().map(|array| array.object().clone().unbind()).collect(),
            prepared: Mutex::default(),
            states: Mutex::new(States { memory, used: Vec::new() }),
            expanded: Expanded::new(&gpu)?,
            gpu,
        })
    }

    #[getter]
    fn local_experts(&self) -> usize {
        self.shape.local_experts()
    }

    #[getter]
    fn hidden(&self) -> usize {
        self.shape.hidden()
    }

    #[getter]
    fn intermediate(&self) -> usize {
        self.shape.intermediate()
    }

    /// Bytes of the weights, scales and a copy in e4m3 included.
    #[getter]
    fn weight_bytes(&self) -> usize {
        self.w13.bytes() + self.w2.bytes()
    }

    /// Queues the blocks that MXFP4 or int4 weights were made of to `w13 [E, N, H / 2]`, gate's rows first, and `w2 [E, H, I /
    /// 2]`.
    fn unpack(&self, py: Python<'_>, w13: &Bound<'_, PyAny>, w2: &Bound<'_, PyAny>) -> PyResult<()> {
        let (w13, w2) = (Array::output("w13", w13)?, Array::output("w2", w2)?);
        let targets = [(&self.w13, &w13), (&self.w2, &w2)];
        let mut to = [DevicePtr::default(); 2];
        for ((weights, out), to) in targets.iter().zip(&mut to) {
            self.require_here(out)?;
            self.require_apart(out)?;
            let shape = [weights.experts(), weights.n(), weights.k() / 2];
            out.require_shape(&shape)?;
            *to = DevicePtr::new(out.require_device_memory::<u8>(shape.iter().product(), 4)?);
        }
        Apart::check(&[&w13, &w2], &[])?;
        let stream = current_stream(py, self.gpu.ordinal)?;
        for ((weights, _), to) in targets.iter().zip(to) {
            #[allow(unsafe_code)]
            // SAFETY: tensors of as many bytes as was checked, which torch hands on in stream order; the weights live as
            // long as `self`, whose memory torch hands on likewise.
            unsafe {
                match weights.format() {
                    WeightFormat::Int4 => weights.unpack_int4(&self.gpu.device, stream, to, None),
                    _ => weights.unpack_mxfp4(&self.gpu.device, stream, to, None),
                }
            }
            .map_err(exception)?;
        }
        written(py, &[&w13, &w2])
    }

    /// Compiles (or loads) everything that calls of up to `max_tokens` tokens can launch.
    fn prepare(
        &self,
        py: Python<'_>,
        max_tokens: &Bound<'_, PyAny>,
        topk: &Bound<'_, PyAny>,
        global_experts: Option<&Bound<'_, PyAny>>,
        ids: &Bound<'_, PyAny>,
        input: &Bound<'_, PyAny>,
        output: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        let max_tokens = size("max_tokens", max_tokens)?;
        let config = LayerConfig {
            topk: size("topk", topk)?,
            global_experts: optional_size("global_experts", global_experts)?.unwrap_or(self.shape.local_experts()),
            ids: dtype("ids_dtype", Element::of_torch(ids)?, ids)?,
            input: dtype("dtype", Element::of_torch(input)?, input)?,
            output: dtype("out_dtype", Element::of_torch(output)?, output)?,
            ..self.config
        };
        if self.find(&config, max_tokens).is_some() {
            return Ok(());
        }
        let weights = (self.w13.clone(), self.w2.clone());
        let prepare = || Layer::prepare_with_biases(&self.gpu.device, weights, self.biases.clone(), config, max_tokens);
        let layer = py.detach(prepare).map_err(exception)?;
        lock(&self.prepared).push(Arc::new(layer));
        Ok(())
    }

    /// Bytes of workspace for a call of as many tokens, whatever it was prepared for of what has that `topk`.
    fn workspace_bytes(&self, tokens: &Bound<'_, PyAny>, topk: &Bound<'_, PyAny>) -> PyResult<usize> {
        let (tokens, topk) = (size("tokens", tokens)?, size("topk", topk)?);
        let prepared = lock(&self.prepared).clone();
        let fits = prepared.iter().filter(|layer| layer.config().topk == topk && layer.max_tokens() >= tokens);
        let bytes = fits.map(|layer| layer.workspace_bytes(tokens)).max_by_key(|bytes| bytes.clone().ok());
        match bytes {
            Some(bytes) => bytes.map_err(exception),
            None => Err(Wrong::number("tokens", tokens, prepared_for(&prepared, |config| config.topk == topk)).value()),
        }
    }

    /// Queues a call; returns `out`, or the tensor that was made in its place, of the type of `hidden_states`.
    #[pyo3(signature = (hidden_states, topk_ids, topk_weights, expert_map=None, workspace=None, out=None))]
    fn run<'py>(
        &self,
        py: Python<'py>,
        hidden_states: &Bound<'py, PyAny>,
        topk_ids: &Bound<'py, PyAny>,
        topk_weights: &Bound<'py, PyAny>,
        expert_map: Option<&Bound<'py, PyAny>>,
        workspace: Option<&Bound<'py, PyAny>>,
        out: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let hidden_states = Array::new("hidden_states", hidden_states)?;
        let topk_ids = Array::new("topk_ids", topk_ids)?;
        let topk_weights = Array::new("topk_weights", topk_weights)?;
        let expert_map = Array::optional("expert_map", expert_map)?;
        self.require_here(&hidden_states)?;
        let inputs = [Some(&hidden_states), Some(&topk_ids), Some(&topk_weights), expert_map.as_ref()];
        Array::common_device(&inputs)?;

        let (tokens, _) = hidden_states.matrix_shape("[M, H]")?;
        hidden_states.require_shape(&[tokens, self.shape.hidden()])?;
        let (_, topk) = topk_ids.matrix_shape("[M, topk]")?;
        topk_ids.require_shape(&[tokens, topk])?;
        topk_weights.require_shape(&[tokens, topk])?;
        topk_weights.require_dtype::<f32>()?;
        let routing = routing(&topk_ids, expert_map.as_ref(), self.shape.local_experts())?;
        let input = hidden_states.element();
        let given = out.map(|out| Array::output("out", out)).transpose()?;
        let output = given.as_ref().map_or(input, Array::element);
        let config = LayerConfig {
            topk,
            global_experts: routing.global_experts,
            ids: dtype("topk_ids", topk_ids.element(), topk_ids.object())?,
            input: dtype("hidden_states", input, hidden_states.object())?,
            output: dtype("out", output, given.as_ref().map_or(hidden_states.object(), Array::object))?,
            ..self.config
        };
        let layer = self.find(&config, tokens).ok_or_else(|| self.not_prepared(&config, tokens))?;
        let needed = layer.workspace_bytes(tokens).map_err(exception)?;

        let stream = current_stream(py, self.gpu.ordinal)?;
        let memory = tensor::given_or_made(py, "workspace", workspace, Some(self.gpu.ordinal), || {
            Ok(Form::list(Element::U8, needed))
        })?;
        let made = || tensor::empty(py, self.gpu.ordinal, Form::row_major(input, tokens, self.shape.hidden()));
        let out = given.map_or_else(made, Ok)?;
        out.require_shape(&[tokens, self.shape.hidden()])?;
        for array in [&out, &memory] {
            self.require_here(array)?;
            self.require_apart(array)?;
        }
        Apart::check(&[&out, &memory], &inputs)?;
        let call = LayerCall {
            tokens,
            hidden_states: matrix(&hidden_states)?,
            routing,
            topk_weights: matrix(&topk_weights)?,
            output: DevicePtr::new(out.require_aligned(16)?),
            workspace: DevicePtr::new(memory.require_device_memory::<u8>(needed, 256)?),
            state: DevicePtr::default(),
        };
        if tokens > 0 {
            self.launch(py, stream, &layer, call)?;
        }
        written(py, &[&out, &memory])?;
        Ok(out.into_object())
    }

    /// Compiles (or loads) everything that `run_expanded` of up to `max_rows` rows can launch.
    fn prepare_expanded(&self, py: Python<'_>, max_rows: &Bound<'_, PyAny>) -> PyResult<()> {
        let max_rows = size("max_rows", max_rows)?;
        self.expanded.prepare(max_rows, || {
            let weights = (self.w13.clone(), self.w2.clone());
            let (biases, config) = (self.biases.clone(), self.config);
            py.detach(|| ExpandedLayer::prepare(&self.gpu.device, weights, biases, config, max_rows)).map_err(exception)
        })
    }

    /// Queues the experts alone, on rows in their places; returns `out`, or the tensor that was made in its place.
    #[pyo3(signature = (rows, scale, psum, alignment, expected_rows=None, out=None))]
    fn run_expanded<'py>(
        &self,
        py: Python<'py>,
        rows: &Bound<'py, PyAny>,
        scale: Option<&Bound<'py, PyAny>>,
        psum: &Bound<'py, PyAny>,
        alignment: &Bound<'py, PyAny>,
        expected_rows: Option<&Bound<'py, PyAny>>,
        out: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let (experts, hidden) = (self.shape.local_experts(), self.shape.hidden());
        let rows = Rows::new(rows, scale, (Some(psum), None), alignment, (experts, hidden))?;
        if rows.scale.is_some() && self.config.activation_format == ActivationFormat::Bf16 {
            return Err(rows.rows.dtype_error("bfloat16, for a layer of bf16 activations"));
        }
        rows.require_whole_segments()?;
        let inputs = rows.arrays();
        Array::common_device(&inputs)?;
        self.require_here(&rows.rows)?;
        let expected_rows = optional_size("expected_rows", expected_rows)?;
        let made = || tensor::empty(py, self.gpu.ordinal, Form::row_major(Element::Bf16, rows.m_sum, hidden));
        let out = out.map_or_else(made, |out| Array::output("out", out))?;
        require_out(&out, rows.m_sum, hidden)?;
        self.require_here(&out)?;
        self.require_apart(&out)?;
        Apart::check(&[&out], &inputs)?;
        let layer = self.expanded.find(rows.m_sum)?;
        if rows.m_sum > 0 {
            self.expanded.launch(py, &self.gpu, &layer, &rows, expected_rows, &out)?;
        }
        written(py, &[&out])?;
        Ok(out.into_object())
    }

    /// Waits for the current stream and raises what its kernels found wrong with ids since the last time.
    fn check(&self, py: Python<'_>) -> PyResult<()> {
        let stream = current_stream(py, self.gpu.ordinal)?;
        let calls: Vec<(Arc<Layer>, LayerCall)> = {
            let states = lock(&self.states);
            let call = |(index, state): (usize, &State)| {
                let state_ptr = states.memory.ptr().byte_add(index * STATE_BYTES);
                let call = LayerCall { tokens: state.tokens, state: state_ptr, ..LayerCall::default() };
                (state.layer.clone(), call)
            };
            states.used.iter().enumerate().map(call).collect()
        };
        // All of them: each says what it found once.
        let check = |(layer, call): &(Arc<Layer>, LayerCall)| {
            #[allow(unsafe_code)]
            // SAFETY: the stream is torch's, and the state was made ready with the layer, which outlives the check.
            unsafe {
                layer.check_launch(stream, call)
            }
        };
        let all = || calls.iter().map(check).fold(self.expanded.check(stream), expertile::Result::and);
        py.detach(all).map_err(found_by_a_kernel)
    }
}

impl CudaLayer {
    /// What has been prepared for such calls: the last, if it takes as many tokens.
    fn find(&self, config: &LayerConfig, tokens: usize) -> Option<Arc<Layer>> {
        let prepared = lock(&self.prepared);
        prepared.iter().rev().find(|layer| layer.max_tokens() >= tokens && layer.config() == config).cloned()
    }

    /// Why a call finds nothing: the first of its arguments that no prepared call has.
    fn not_prepared(&self, config: &LayerConfig, tokens: usize) -> PyErr {
        let prepared = lock(&self.prepared).clone();
        let as_prepared = "as prepare() was told";
        let near: Vec<_> = prepared.iter().filter(|layer| layer.config().topk == config.topk).collect();
        if near.is_empty() {
            let known = prepared_for(&prepared, |_| true);
            return Wrong::number("topk", config.topk, known).value();
        }
        let near: Vec<_> =
            near.into_iter().filter(|layer| layer.config().global_experts == config.global_experts).collect();
        if near.is_empty() {
            let expected = format!("the number of global experts, {as_prepared}");
            return Wrong::number("global_experts", config.global_experts, expected).value();
        }
        type Pick = fn(&LayerConfig) -> Dtype;
        let types: [(&str, Pick); 3] =
            [("topk_ids", |config| config.ids), ("hidden_states", |config| config.input), ("out", |c| c.output)];
        let mut near = near;
        for (argument, pick) in types {
            let fits: Vec<_> = near.iter().copied().filter(|layer| pick(layer.config()) == pick(config)).collect();
            if fits.is_empty() {
                let expected = format!("{}, {as_prepared}", pick(near[0].config()));
                let actual = pick(config).to_string();
                return Wrong::new(argument, format_args!("has dtype {actual}"), &actual[..], expected).of_type();
            }
            near = fits;
        }
        let most = near.iter().map(|layer| layer.max_tokens()).max().unwrap_or(0);
        let found = format_args!("has {tokens} tokens");
        Wrong::new("hidden_states", found, tokens, format!("at most {most}, {as_prepared}")).value()
    }

    fn require_here(&self, array: &Array<'_>) -> PyResult<()> {
        if array.device() == Some(self.gpu.ordinal) {
            return Ok(());
        }
        let actual = place(array.device());
        let expected = format!("{}, where the weights are", place(Some(self.gpu.ordinal)));
        Err(Wrong::new(array.argument(), format_args!("is on {actual}"), &actual[..], expected).value())
    }

    /// Fails if a contiguous array that is to be written has memory of the weights.
    fn require_apart(&self, array: &Array<'_>) -> PyResult<()> {
        array.require_contiguous()?;
        let len = array.shape().iter().product::<usize>() * array.item_bytes();
        let (start, end) = (array.address(), array.address() + len as u64);
        if self.held.iter().any(|held| start < held.end && held.start < end) {
            let found = "shares memory with the weights";
            return Err(Wrong::new(array.argument(), found, array.object(), "memory of its own").value());
        }
        Ok(())
    }

    fn launch(&self, py: Python<'_>, stream: Stream, layer: &Arc<Layer>, call: LayerCall) -> PyResult<()> {
        #[allow(unsafe_code)]
        // SAFETY: the stream is torch's current one.
        let capturing = unsafe { self.gpu.device.is_capturing(stream) }.map_err(exception)?;
        let known = lock(&self.states).of((!capturing).then_some(stream), layer, call.tokens);
        // With all of them in use, one of the call's own, readied by the call: what its kernels find is not kept.
        let own = match known {
            Some(_) => None,
            None => Some(tensor::empty(py, self.gpu.ordinal, Form::list(Element::U8, STATE_BYTES))?),
        };
        let state = match (&own, known) {
            (Some(own), _) => ptr(own),
            (None, known) => known.unwrap_or_default(),
        };
        let call = LayerCall { state, ..call };
        #[allow(unsafe_code)]
        // SAFETY: every address is a live tensor's of the size and type that was checked, what is written overlaps
        // nothing else, and torch hands memory on in stream order. The state is this stream's or this captured call's
        // alone, and was zero when it was new. The weights live as long as `self`, which users keep as long as graphs
        // that captured a call of it, as they do with every tensor of a graph.
        unsafe {
            if own.is_some() {
                layer.initialise_state(stream, state).map_err(exception)?;
            }
            layer.launch(stream, &call)
        }
        .map_err(exception)
    }
}

impl States {
    /// The stream's state, or a new one; none if there are no more.
    fn of(&mut self, stream: Option<Stream>, layer: &Arc<Layer>, tokens: usize) -> Option<DevicePtr> {
        let known = stream.and_then(|stream| self.used.iter().position(|state| state.stream == Some(stream)));
        let index = known.unwrap_or(self.used.len());
        if known.is_none() {
            if index == STATES {
                return None;
            }
            self.used.push(State { stream, layer: layer.clone(), tokens });
        }
        let state = &mut self.used[index];
        state.tokens = tokens;
        if !Arc::ptr_eq(&state.layer, layer) {
            state.layer = layer.clone();
        }
        Some(self.memory.ptr().byte_add(index * STATE_BYTES))
    }
}

/// What the tensors of a layer's weights say, which fit each other.
pub(super) struct Pair {
    pub(super) sizes13: [usize; 3],
    pub(super) sizes2: [usize; 3],
    pub(super) shape: LayerShape,
    pub(super) format: WeightFormat,
}

impl Pair {
    /// Of matrices and their scales.
    pub(super) fn new(
        w13: (&Array<'_>, Option<&Array<'_>>),
        w2: (&Array<'_>, Option<&Array<'_>>),
        gated: bool,
    ) -> PyResult<Self> {
        let what = |(array, scale): (&Array<'_>, Option<&Array<'_>>), scale_name, expected| {
            let &[experts, n, width] = array.shape() else { return Err(array.shape_error(expected)) };
            let format = weights_format(array, (scale_name, scale))?;
            // Two values to a byte.
            let k = if format.has_groups() { 2 * width } else { width };
            Ok(([experts, n, k], format))
        };
        let (of13, of2) = (what(w13, "w13_scale", "[E, 2 I, H]")?, what(w2, "w2_scale", "[E, H, I]")?);
        let shape = LayerShape::of_weights(of13, of2, gated).map_err(exception)?;
        Ok(Self { sizes13: of13.0, sizes2: of2.0, shape, format: of13.1 })
    }
}

/// What weights are made of: of bytes their scales say it, which have to be there.
pub(super) fn weights_format(
    array: &Array<'_>,
    (scale_name, scale): (&'static str, Option<&Array<'_>>),
) -> PyResult<WeightFormat> {
    match array.element() {
        Element::U8 => {
            let Some(scale) = scale else {
                let expected = format!("scales for the uint8 blocks of {}", array.argument());
                return Err(Wrong::new(scale_name, "is None", Actual::Nothing, expected).value());
            };
            match scale.element() {
                Element::Bf16 | Element::F16 => Ok(WeightFormat::Int4),
                Element::U8 | Element::E8m0 => Ok(WeightFormat::Mxfp4),
                _ => Err(scale.dtype_error("uint8 or float8_e8m0fnu (MXFP4), bfloat16 or float16 (int4)")),
            }
        }
        Element::Bf16 | Element::E4m3 => format(array),
        _ => Err(array.dtype_error("bfloat16, float8_e4m3fn or uint8")),
    }
}

/// Memory of torch's for weights, and its address.
fn weight_memory<'py>(py: Python<'py>, gpu: &Gpu, bytes: usize) -> PyResult<(Array<'py>, DevicePtr)> {
    let memory = tensor::empty(py, gpu.ordinal, Form::list(Element::U8, bytes))?;
    let address = DevicePtr::new(memory.require_device_memory::<u8>(bytes, 128)?);
    Ok((memory, address))
}

/// Weights as calls read them: MXFP4 and int4 arranged in memory of torch's, which comes with it.
pub(super) fn arranged<'py>(
    py: Python<'py>,
    gpu: &Gpu,
    weights: Weights,
    [experts, n, k]: [usize; 3],
    activation_format: ActivationFormat,
) -> PyResult<(Weights, Option<Array<'py>>)> {
    if !weights.format().has_groups() {
        return Ok((weights, None));
    }
    let bytes = Weights::arranged_bytes(weights.format(), (experts, n, k)).map_err(exception)?;
    let (memory, address) = weight_memory(py, gpu, bytes)?;
    let stream = current_stream(py, gpu.ordinal)?;
    #[allow(unsafe_code)]
    // SAFETY: a live tensor of as many bytes, on torch's current stream, which torch hands memory on in the order of; the
    // layer keeps it. Of the weights' own memory the caller holds the tensors during the call, which waits.
    let arranged = py.detach(|| unsafe { weights.arrange_in(&gpu.device, stream, activation_format, address) });
    Ok((arranged.map_err(exception)?, Some(memory)))
}

/// Arranged MXFP4 weights, if they are to have one with a copy in e4m3, in memory of torch's, which comes with it.
fn copied<'py>(
    py: Python<'py>,
    gpu: &Gpu,
    weights: Weights,
    [experts, n, k]: [usize; 3],
    wanted: bool,
) -> PyResult<(Weights, Option<Array<'py>>)> {
    if !wanted {
        return Ok((weights, None));
    }
    let bytes = Weights::e4m3_copy_bytes((experts, n, k)).map_err(exception)?;
    let (memory, address) = weight_memory(py, gpu, bytes)?;
    let stream = current_stream(py, gpu.ordinal)?;
    #[allow(unsafe_code)]
    // SAFETY: a live tensor of as many bytes, on torch's current stream, which torch hands memory on in the order of; the
    // layer keeps it. The call waits for the copy, and of the arranged weights the layer keeps the memory likewise.
    let copied = py.detach(|| unsafe { weights.with_e4m3_copy_in(&gpu.device, stream, address) });
    Ok((copied.map_err(exception)?, Some(memory)))
}

/// Weights `[E, N, K]` and their scales where they are.
pub(super) fn in_place(
    weights: &Array<'_>,
    [experts, n, k]: [usize; 3],
    (scale_name, scale): (&'static str, Option<&Array<'_>>),
    format: WeightFormat,
) -> PyResult<Weights> {
    let len = experts * n * k;
    let (values, scales) = match (format, scale) {
        (WeightFormat::Bf16, None) => (weights.require_device_memory::<bf16>(len, 16)?, None),
        (WeightFormat::E4m3, Some(scale)) => {
            scale.require_shape(&[experts, n.div_ceil(WEIGHT_BLOCK), k.div_ceil(WEIGHT_BLOCK)])?;
            let blocks = scale.shape().iter().product();
            let values = weights.require_device_memory::<u8>(len, 16)?;
            (values, Some(DevicePtr::new(scale.require_device_memory::<f32>(blocks, 4)?)))
        }
        (WeightFormat::Bf16, Some(scale)) => {
            let expected = format!("none for bfloat16 {}", weights.argument());
            return Err(Wrong::new(scale_name, "is given", scale.object(), expected).value());
        }
        (WeightFormat::Mxfp4, Some(scale)) => {
            let groups = mxfp4::groups(k).map_err(exception)?;
            scale.require_shape(&[experts, n, groups])?;
            let blocks = DevicePtr::new(weights.require_device_memory::<u8>(len / 2, 16)?);
            let scales = DevicePtr::new(scale.require_device_memory::<u8>(experts * n * groups, 1)?);
            #[allow(unsafe_code)]
            // SAFETY: tensors of that many bytes, as was checked, which the caller holds until they are arranged.
            return unsafe { Weights::from_device_mxfp4((experts, n, k), blocks, scales) }.map_err(exception);
        }
        (WeightFormat::Int4, Some(scale)) => {
            let groups = int4::groups(k).map_err(exception)?;
            scale.require_shape(&[experts, n, groups])?;
            let scale_type = dtype(scale_name, scale.element(), scale.object())?;
            let blocks = DevicePtr::new(weights.require_device_memory::<u8>(len / 2, 16)?);
            let scale_len = experts * n * groups;
            let scales = match scale_type {
                Dtype::F16 => scale.require_device_memory::<f16>(scale_len, 2)?,
                _ => scale.require_device_memory::<bf16>(scale_len, 2)?,
            };
            let scales = (scale_type, DevicePtr::new(scales));
            #[allow(unsafe_code)]
            // SAFETY: tensors of that many bytes, as was checked, which the caller holds until they are arranged.
            return unsafe { Weights::from_device_int4((experts, n, k), blocks, scales) }.map_err(exception);
        }
        (WeightFormat::Mxfp4 | WeightFormat::Int4, None) => unreachable!("scales say what weights of 4 bits are"),
        (WeightFormat::E4m3, None) => {
            let expected = format!("block scales for float8_e4m3fn {}", weights.argument());
            return Err(Wrong::new(scale_name, "is None", Actual::Nothing, expected).value());
        }
    };
    #[allow(unsafe_code)]
    // SAFETY: tensors of that many elements, as was checked, which the layer keeps alive.
    unsafe { Weights::from_device(format, (experts, n, k), DevicePtr::new(values), scales) }.map_err(exception)
}

pub(super) fn dtype(argument: &'static str, element: Element, object: &Bound<'_, PyAny>) -> PyResult<Dtype> {
    match element {
        Element::Bf16 => Ok(Dtype::Bf16),
        Element::F16 => Ok(Dtype::F16),
        Element::F32 => Ok(Dtype::F32),
        Element::I32 => Ok(Dtype::I32),
        Element::I64 => Ok(Dtype::I64),
        _ => {
            let expected = match argument {
                "topk_ids" | "ids_dtype" => "int32 or int64",
                _ => "bfloat16, float16 or float32",
            };
            let found = object.getattr("dtype").unwrap_or_else(|_| object.clone());
            Err(Wrong::new(argument, format_args!("is {found}"), &found, expected).of_type())
        }
    }
}

/// What calls have been prepared for, of what `of` chooses.
fn prepared_for(prepared: &[Arc<Layer>], of: impl Fn(&LayerConfig) -> bool) -> String {
    let known: Vec<String> = prepared
        .iter()
        .filter(|layer| of(layer.config()))
        .map(|layer| format!("up to {} tokens of topk {}", layer.max_tokens(), layer.config().topk))
        .collect();
    match known.is_empty() {
        true => "prepare(max_tokens, topk) to have been called for it".into(),
        false => format!("what prepare() was called for: {}", known.join(", ")),
    }
}
