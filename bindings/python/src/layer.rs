//! The whole layer on the CPU.

use crate::array::{Apart, Array, Element, Native};
use crate::autograd::written;
use crate::error::{Actual, Wrong, exception, optional_size, size};
use crate::expanded;
use crate::limits;
use crate::operands::Ids;
use crate::placed_rows::Rows;
use crate::pool::{cpu, work};
use expertile::cpu::{Layer, PackedWeights, PackedWeightsBuilder};
use expertile::gemm::{WEIGHT_BLOCK, WeightFormat};
use expertile::int4::Int4Scales;
use expertile::layer::LayerShape;
use expertile::quantize::ue8m0_value;
use expertile::{Activation, ActivationFormat, E4m3, Float, GateUpOrder, LayerConfig, MatrixRef, Routing, mxfp4};
use half::{bf16, f16};
use pyo3::prelude::*;
use std::borrow::Cow;

/// Prepacked weights and how to compute with them: what `expertile.torch.Layer` documents.
#[pyclass(frozen, name = "Layer", module = "expertile._native")]
pub(crate) struct PyLayer(pub(crate) Layer);

#[pymethods]
impl PyLayer {
    /// Packs as many rows at once as take a fraction of a second, or `rows_at_once`; then it looks whether it has been
    /// interrupted.
    #[new]
    #[pyo3(signature = (
        w13, w2, w13_scale, w2_scale, activations, alignment, alpha, beta, limit, weight_on_input, *,
        activation="swiglu", w13_bias=None, w2_bias=None, gate_up="halves", rows_at_once=None
    ))]
    fn new(
        py: Python<'_>,
        w13: &Bound<'_, PyAny>,
        w2: &Bound<'_, PyAny>,
        w13_scale: Option<&Bound<'_, PyAny>>,
        w2_scale: Option<&Bound<'_, PyAny>>,
        activations: &str,
        alignment: &Bound<'_, PyAny>,
        alpha: f32,
        beta: f32,
        limit: Option<f32>,
        weight_on_input: bool,
        activation: &str,
        w13_bias: Option<&Bound<'_, PyAny>>,
        w2_bias: Option<&Bound<'_, PyAny>>,
        gate_up: &str,
        rows_at_once: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Self> {
        let activations = named_activations(activations)?;
        let alignment = size("alignment", alignment)?;
        let activation = named_activation(activation, (alpha, beta, limit))?;
        let at_once = optional_size("rows_at_once", rows_at_once)?;
        let order = gate_up_order(gate_up)?;
        let segments = if activation.is_gated() { 2 } else { 1 };
        if segments == 1 && order != GateUpOrder::Halves {
            return Err(Wrong::word("gate_up", gate_up, "halves for an activation without a gate").value());
        }
        let w13 = pack(py, ("w13", w13), ("w13_scale", w13_scale), (segments, order), at_once)?;
        let w2 = pack(py, ("w2", w2), ("w2_scale", w2_scale), (1, GateUpOrder::Halves), at_once)?;
        // Of a call only its ids and tensors say more.
        let config = LayerConfig {
            activation,
            alignment: Some(alignment),
            weight_on_input,
            ..LayerConfig::new(1, w13.experts(), activations)
        };
        let layer = Layer::prepare(&cpu()?, w13, w2, config, usize::MAX).map_err(exception)?;
        let (b13, b2) = biases(layer.shape(), order, w13_bias, w2_bias)?;
        layer.with_biases(b13, b2).map(Self).map_err(exception)
    }

    #[getter]
    fn local_experts(&self) -> usize {
        self.0.shape().local_experts()
    }

    #[getter]
    fn hidden(&self) -> usize {
        self.0.shape().hidden()
    }

    #[getter]
    fn intermediate(&self) -> usize {
        self.0.shape().intermediate()
    }

    /// Bytes of the packed weights, scales included.
    #[getter]
    fn weight_bytes(&self) -> usize {
        self.0.w13().bytes() + self.0.w2().bytes()
    }

    /// Writes the weights as they were packed, bit for bit, to `w13 [E, N, H]`, in the order `gate_up`, and
    /// `w2 [E, H, I]`.
    #[pyo3(signature = (w13, w2, *, gate_up="halves"))]
    fn unpack(&self, py: Python<'_>, w13: &Bound<'_, PyAny>, w2: &Bound<'_, PyAny>, gate_up: &str) -> PyResult<()> {
        let order = gate_up_order(gate_up)?;
        let (w13, w2) = (Array::output("w13", w13)?, Array::output("w2", w2)?);
        let apart = Apart::check(&[&w13, &w2], &[])?;
        let segments = if self.0.config().activation.is_gated() { 2 } else { 1 };
        let (packed13, packed2) = (self.0.w13(), self.0.w2());
        check_unpacked(packed13, &w13)?;
        check_unpacked(packed2, &w2)?;
        let done = unpack(py, packed13, (segments, order), &w13, apart)
            .and_then(|()| unpack(py, packed2, (1, GateUpOrder::Halves), &w2, apart));
        written(py, &[&w13, &w2])?;
        done
    }

    /// Bytes that `run` needs for any routing of `[tokens, topk]`.
    fn workspace_bytes(&self, tokens: &Bound<'_, PyAny>, topk: &Bound<'_, PyAny>) -> PyResult<usize> {
        let config = LayerConfig { topk: size("topk", topk)?, ..*self.0.config() };
        let layer = self.0.with_config(config, usize::MAX).map_err(exception)?;
        layer.workspace_bytes(size("tokens", tokens)?).map_err(exception)
    }

    /// `hidden_states [M, H]` to `out [M, H]`, `tokens_at_once` before it looks whether it has been interrupted.
    #[pyo3(signature = (hidden_states, topk_ids, topk_weights, expert_map, workspace, out, *, tokens_at_once=None))]
    fn run(
        &self,
        py: Python<'_>,
        hidden_states: &Bound<'_, PyAny>,
        topk_ids: &Bound<'_, PyAny>,
        topk_weights: &Bound<'_, PyAny>,
        expert_map: Option<&Bound<'_, PyAny>>,
        workspace: &Bound<'_, PyAny>,
        out: &Bound<'_, PyAny>,
        tokens_at_once: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<()> {
        let experts = self.local_experts().into_pyobject(py)?.into_any();
        let call = Call {
            layer: &self.0,
            hidden_states: Array::new("hidden_states", hidden_states)?,
            ids: Ids::new(topk_ids, expert_map, &experts)?,
            weights: Array::new("topk_weights", topk_weights)?,
            workspace: Array::output("workspace", workspace)?,
            out: Array::output("out", out)?,
            tokens_at_once: optional_size("tokens_at_once", tokens_at_once)?,
        };
        let (tokens, hidden) = call.hidden_states.matrix_shape("[M, H]")?;
        call.out.require_shape(&[tokens, hidden])?;
        let [ids, map] = call.ids.arrays();
        let inputs = [Some(&call.hidden_states), Some(&call.weights), ids, map];
        let apart = Apart::check(&[&call.out, &call.workspace], &inputs)?;
        let done = call.ids.routing(py, |routing| call.from(py, &routing, apart));
        // Also after an interruption, which leaves rows that are done.
        written(py, &[&call.out, &call.workspace])?;
        done
    }

    /// The experts alone: `rows [M_sum, H]` in their places to live rows of `out [M_sum, H]`, experts of about
    /// `rows_at_once` rows before it looks whether it has been interrupted.
    #[pyo3(signature = (rows, scale, psum, alignment, out, *, rows_at_once=None))]
    fn run_expanded(
        &self,
        py: Python<'_>,
        rows: &Bound<'_, PyAny>,
        scale: Option<&Bound<'_, PyAny>>,
        psum: &Bound<'_, PyAny>,
        alignment: &Bound<'_, PyAny>,
        out: &Bound<'_, PyAny>,
        rows_at_once: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<()> {
        let rows = Rows::new(rows, scale, (Some(psum), None), alignment, (self.local_experts(), self.hidden()))?;
        let at_once = optional_size("rows_at_once", rows_at_once)?;
        expanded::run(py, &self.0, &rows, &Array::output("out", out)?, at_once)
    }
}

/// What rows are made of, by its name.
pub(crate) fn named_activations(name: &str) -> PyResult<ActivationFormat> {
    match name {
        "bf16" => Ok(ActivationFormat::Bf16),
        "e4m3" => Ok(ActivationFormat::E4m3),
        other => Err(Wrong::word("activations", other, "one of bf16, e4m3").value()),
    }
}

/// The activation of that name; only SwiGLU has parameters.
pub(crate) fn named_activation(name: &str, parameters: (f32, f32, Option<f32>)) -> PyResult<Activation> {
    let (alpha, beta, limit) = parameters;
    let activation = match name {
        "swiglu" => Activation::Swiglu { alpha, beta, limit },
        "geglu_tanh" => Activation::GegluTanh,
        "relu2" => Activation::Relu2,
        other => return Err(Wrong::word("activation", other, "one of swiglu, geglu_tanh, relu2").value()),
    };
    if name != "swiglu" && parameters != (1.0, 0.0, None) {
        let found = format!("is \"{name}\" with alpha, beta or a limit");
        return Err(Wrong::new("activation", found, name, "swiglu for those").value());
    }
    activation.check().map_err(exception)?;
    Ok(activation)
}

/// The order of that name.
pub(crate) fn gate_up_order(name: &str) -> PyResult<GateUpOrder> {
    match name {
        "halves" => Ok(GateUpOrder::Halves),
        "interleaved" => Ok(GateUpOrder::Interleaved),
        other => Err(Wrong::word("gate_up", other, "one of halves, interleaved").value()),
    }
}

/// Elements of a row as tensors hold it: two values to a byte for those of 4 bits.
fn width_of(packed: &PackedWeights) -> usize {
    if packed.format().bits() == 4 { packed.k() / 2 } else { packed.k() }
}

/// Fails unless the weights can be written there as they were packed: `[E, N, K]` of their type, contiguous.
pub(crate) fn check_unpacked(packed: &PackedWeights, out: &Array<'_>) -> PyResult<()> {
    out.require_shape(&[packed.experts(), packed.n(), width_of(packed)])?;
    match packed.format() {
        WeightFormat::Bf16 => out.require_dtype::<bf16>()?,
        WeightFormat::E4m3 => out.require_dtype::<E4m3>()?,
        WeightFormat::Mxfp4 | WeightFormat::Int4 => out.require_dtype::<u8>()?,
    }
    out.require_contiguous()
}

/// Writes the weights as they were packed, bit for bit, in the order in which rows of `segments` are to stand.
pub(crate) fn unpack(
    py: Python<'_>,
    packed: &PackedWeights,
    order: (usize, GateUpOrder),
    out: &Array<'_>,
    apart: Apart,
) -> PyResult<()> {
    match packed.format() {
        WeightFormat::Bf16 => {
            unpack_experts(py, packed, order, out.contiguous_mut(apart)?, |expert, first_row, out| {
                packed.unpack_bf16_rows(&cpu()?, expert, first_row, out).map_err(exception)
            })
        }
        WeightFormat::E4m3 => {
            unpack_experts(py, packed, order, out.contiguous_mut(apart)?, |expert, first_row, out| {
                packed.unpack_e4m3_rows(&cpu()?, expert, first_row, out).map_err(exception)
            })
        }
        WeightFormat::Mxfp4 => {
            unpack_experts(py, packed, order, out.contiguous_mut(apart)?, |expert, first_row, out| {
                let rows = out.len() / width_of(packed);
                let mut scales = limits::vec("scales", rows * (packed.k() / mxfp4::GROUP))?;
                scales.resize(rows * (packed.k() / mxfp4::GROUP), 0);
                packed.unpack_mxfp4_rows(&cpu()?, expert, first_row, out, &mut scales).map_err(exception)
            })
        }
        WeightFormat::Int4 => {
            unpack_experts(py, packed, order, out.contiguous_mut(apart)?, |expert, first_row, out| {
                packed.unpack_int4_rows(&cpu()?, expert, first_row, out).map_err(exception)
            })
        }
    }
}

/// Writes all rows of every expert, in the order in which rows of `segments` are to stand; `rows(expert, first row, out)`
/// unpacks some. It looks between two experts whether it has been interrupted.
fn unpack_experts<T: Copy + Send>(
    py: Python<'_>,
    packed: &PackedWeights,
    (segments, order): (usize, GateUpOrder),
    out: &mut [T],
    rows: impl Fn(usize, usize, &mut [T]) -> PyResult<()> + Sync,
) -> PyResult<()> {
    let (n, k) = (packed.n(), width_of(packed));
    for (expert, out) in out.chunks_exact_mut(n * k).enumerate() {
        work(py, || {
            if segments == 1 || order == GateUpOrder::Halves {
                return rows(expert, 0, out);
            }
            let mut halves = out.to_vec();
            rows(expert, 0, &mut halves)?;
            let (gate, up) = halves.split_at(n / 2 * k);
            let pairs = gate.chunks_exact(k).zip(up.chunks_exact(k));
            for (out, (gate, up)) in out.chunks_exact_mut(2 * k).zip(pairs) {
                out[..k].copy_from_slice(gate);
                out[k..].copy_from_slice(up);
            }
            Ok(())
        })?;
        py.check_signals()?;
    }
    Ok(())
}

/// The layer's biases, as f32: `[E, 2 I]`, brought into halves, and `[E, H]`.
#[allow(clippy::type_complexity)]
pub(crate) fn biases(
    shape: &LayerShape,
    order: GateUpOrder,
    w13_bias: Option<&Bound<'_, PyAny>>,
    w2_bias: Option<&Bound<'_, PyAny>>,
) -> PyResult<(Option<Vec<f32>>, Option<Vec<f32>>)> {
    let experts = shape.local_experts();
    let mut b13 = bias("w13_bias", w13_bias, &[experts, shape.w13_rows()])?;
    if let Some(values) = b13.as_mut().filter(|_| shape.is_gated()) {
        for values in values.chunks_exact_mut(shape.w13_rows()) {
            values.copy_from_slice(&order.to_halves(values).map_err(exception)?);
        }
    }
    Ok((b13, bias("w2_bias", w2_bias, &[experts, shape.hidden()])?))
}

/// A bias of the layer, as f32.
fn bias(name: &'static str, bias: Option<&Bound<'_, PyAny>>, shape: &[usize]) -> PyResult<Option<Vec<f32>>> {
    let Some(bias) = Array::optional(name, bias)? else { return Ok(None) };
    bias.require_shape(shape)?;
    let values = match bias.element() {
        Element::F32 => bias.contiguous::<f32>()?.to_vec(),
        Element::Bf16 => bias.contiguous::<bf16>()?.iter().map(|value| value.to_f32()).collect(),
        Element::F16 => bias.contiguous::<f16>()?.iter().map(|value| value.to_f32()).collect(),
        _ => return Err(bias.dtype_error("float32, bfloat16 or float16")),
    };
    Ok(Some(values))
}

/// Packs `[E, N, K]` in one segment, or two (gate and up): bf16, or e4m3 with block scales `[E, ceil(N / 128), ceil(K /
/// 128)]`; for gate and up, `N = 2 I`, there are `ceil(I / 128)` row blocks for each of the two, gate's first whatever
/// the order of the rows. Or blocks `[E, N, K / 2]`, uint8, of MXFP4 or int4 with scales `[E, N, K / 32]`, whose type says
/// which of the two. Weights may have any strides.
pub(crate) fn pack(
    py: Python<'_>,
    (name, weights): (&'static str, &Bound<'_, PyAny>),
    (scale_name, scale): (&'static str, Option<&Bound<'_, PyAny>>),
    (segments, order): (usize, GateUpOrder),
    rows_at_once: Option<usize>,
) -> PyResult<PackedWeights> {
    let weights = Array::new(name, weights)?;
    let &[experts, n, k] = weights.shape() else { return Err(weights.shape_error("[E, N, K]")) };
    if !n.is_multiple_of(segments) {
        return Err(weights.shape_error("[E, 2 I, H]"));
    }
    let scale = Array::optional(scale_name, scale)?;
    // Of whole blocks, so that each part has scales of its own.
    let rows_at_once = rows_at_once.unwrap_or_else(|| limits::at_once(k)).max(WEIGHT_BLOCK);
    let rows_at_once = rows_at_once - rows_at_once % WEIGHT_BLOCK;
    let stack = Stack { experts, segments, segment: n / segments, k, order, rows_at_once };
    match (weights.element(), &scale) {
        (Element::Bf16, None) => {
            let weights = weights.stack::<bf16>()?;
            stack.pack(py, WeightFormat::Bf16, |builder, part| {
                builder.add_bf16_rows(part.expert, part.first_row, part.matrix(weights)?)
            })
        }
        (Element::E4m3, Some(scale)) => {
            let blocks = stack.segments * stack.segment.div_ceil(WEIGHT_BLOCK);
            scale.require_shape(&[experts, blocks, k.div_ceil(WEIGHT_BLOCK)])?;
            let (weights, scale) = (weights.stack()?, widened(scale)?);
            stack.pack(py, WeightFormat::E4m3, |builder, part| {
                let (rows, scales) = (part.matrix(weights)?, part.scales(&scale)?);
                builder.add_e4m3_rows(part.expert, part.first_row, rows, scales)
            })
        }
        (Element::Bf16, Some(scale)) => {
            Err(Wrong::new(scale_name, "is given", scale.object(), format!("none for bfloat16 {name}")).value())
        }
        (Element::E4m3, None) => {
            let expected = format!("block scales for float8_e4m3fn {name}");
            Err(Wrong::new(scale_name, "is None", Actual::Nothing, expected).value())
        }
        (Element::U8, Some(scale)) => {
            let (stack, width) = (Stack { k: 2 * k, ..stack }, k);
            // Of MXFP4 and int4 alike.
            let groups = mxfp4::groups(2 * k).map_err(exception)?;
            scale.require_shape(&[experts, n, groups])?;
            match scale.element() {
                Element::U8 | Element::E8m0 => {}
                Element::Bf16 => {
                    let (weights, scales) = (weights.stack::<u8>()?, scale.stack::<bf16>()?);
                    return stack.pack(py, WeightFormat::Int4, |builder, part| {
                        let (blocks, scales) = (part.matrix_of(weights, width)?, part.matrix_of(scales, groups)?);
                        builder.add_int4_rows(part.expert, part.first_row, blocks, Int4Scales::Bf16(scales))
                    });
                }
                Element::F16 => {
                    let (weights, scales) = (weights.stack::<u8>()?, scale.stack::<f16>()?);
                    return stack.pack(py, WeightFormat::Int4, |builder, part| {
                        let (blocks, scales) = (part.matrix_of(weights, width)?, part.matrix_of(scales, groups)?);
                        builder.add_int4_rows(part.expert, part.first_row, blocks, Int4Scales::F16(scales))
                    });
                }
                _ => return Err(scale.dtype_error("uint8 or float8_e8m0fnu (MXFP4), bfloat16 or float16 (int4)")),
            }
            let (weights, scales) = (weights.stack::<u8>()?, scale.stack::<u8>()?);
            stack.pack(py, WeightFormat::Mxfp4, |builder, part| {
                let (blocks, scales) = (part.matrix_of(weights, width)?, part.matrix_of(scales, groups)?);
                builder.add_mxfp4_rows(part.expert, part.first_row, blocks, scales)
            })
        }
        (Element::U8, None) => {
            let expected = format!("scales for the uint8 blocks of {name}");
            Err(Wrong::new(scale_name, "is None", Actual::Nothing, expected).value())
        }
        _ => Err(weights.dtype_error("bfloat16, float8_e4m3fn or uint8")),
    }
}

/// Extents of the weights of all experts: gate and up, or one segment of output rows.
#[derive(Clone, Copy)]
struct Stack {
    experts: usize,
    segments: usize,
    segment: usize,
    k: usize,
    /// Of the rows, if they are gate's and up's.
    order: GateUpOrder,
    /// How many are packed at a time.
    rows_at_once: usize,
}

/// Some rows of one expert's segment.
#[derive(Clone, Copy)]
struct Part {
    stack: Stack,
    expert: usize,
    /// Within the expert.
    first_row: usize,
    rows: usize,
}

impl Stack {
    /// Packs part after part; between two of them it looks whether it has been interrupted.
    fn pack(
        self,
        py: Python<'_>,
        format: WeightFormat,
        mut pack: impl FnMut(&mut PackedWeightsBuilder, Part) -> expertile::Result<()> + Send,
    ) -> PyResult<PackedWeights> {
        let Self { experts, segments, segment, k, rows_at_once, .. } = self;
        let cpu = cpu()?;
        let builder = match segments {
            2 => PackedWeightsBuilder::gate_up(&cpu, format, experts, segment, k),
            _ => PackedWeightsBuilder::new(&cpu, format, experts, segment, k),
        };
        let mut builder = builder.map_err(exception)?;
        for (expert, segment_index) in (0..experts).flat_map(|expert| (0..segments).map(move |index| (expert, index))) {
            for rows in limits::stretches(segment, rows_at_once) {
                let first_row = segment_index * segment + rows.start;
                let part = Part { stack: self, expert, first_row, rows: rows.len() };
                work(py, || pack(&mut builder, part).map_err(exception))?;
                py.check_signals()?;
            }
        }
        builder.finish().map_err(exception)
    }
}

impl Part {
    /// Its rows, of the weights of all experts.
    fn matrix<T: Copy>(self, weights: (&[T], [usize; 3])) -> expertile::Result<MatrixRef<'_, T>> {
        self.matrix_of(weights, self.stack.k)
    }

    /// The same, of rows of so many elements.
    fn matrix_of<T: Copy>(
        self,
        (weights, strides): (&[T], [usize; 3]),
        width: usize,
    ) -> expertile::Result<MatrixRef<'_, T>> {
        let Stack { segment, order, .. } = self.stack;
        let [of_expert, of_row, of_column] = strides;
        let (row, step) = match order {
            GateUpOrder::Halves => (self.first_row, 1),
            GateUpOrder::Interleaved => (self.first_row % segment * 2 + self.first_row / segment, 2),
        };
        let start = self.expert * of_expert + row * of_row;
        MatrixRef::with_strides(&weights[start..], self.rows, width, step * of_row, of_column)
    }

    /// Its block scales, of those of all experts: each segment's row blocks are its own.
    fn scales(self, scales: &[f32]) -> expertile::Result<MatrixRef<'_, f32>> {
        let Stack { segments, segment, k, .. } = self.stack;
        let (rows, columns) = (self.rows.div_ceil(WEIGHT_BLOCK), k.div_ceil(WEIGHT_BLOCK));
        let blocks_before = self.first_row / segment * segment.div_ceil(WEIGHT_BLOCK);
        let row = self.expert * segments * segment.div_ceil(WEIGHT_BLOCK)
            + blocks_before
            + self.first_row % segment / WEIGHT_BLOCK;
        MatrixRef::new(&scales[row * columns..(row + rows) * columns], rows, columns)
    }
}

/// Scales as f32, which holds all values of the other types.
fn widened<'a>(scale: &'a Array<'_>) -> PyResult<Cow<'a, [f32]>> {
    let wide = match scale.element() {
        Element::F32 => return scale.contiguous().map(Cow::Borrowed),
        Element::Bf16 => scale.contiguous::<bf16>()?.iter().map(|value| value.to_f32()).collect(),
        Element::F16 => scale.contiguous::<f16>()?.iter().map(|value| value.to_f32()).collect(),
        Element::E8m0 => scale.contiguous::<u8>()?.iter().map(|&byte| ue8m0_value(byte)).collect(),
        _ => return Err(scale.dtype_error("float32, bfloat16, float16 or float8_e8m0fnu")),
    };
    Ok(Cow::Owned(wide))
}

struct Call<'a, 'py> {
    layer: &'a Layer,
    hidden_states: Array<'py>,
    ids: Ids<'py>,
    weights: Array<'py>,
    workspace: Array<'py>,
    out: Array<'py>,
    tokens_at_once: Option<usize>,
}

impl Call<'_, '_> {
    fn from(&self, py: Python<'_>, routing: &Routing<'_>, apart: Apart) -> PyResult<()> {
        match self.hidden_states.element() {
            Element::Bf16 => self.to::<bf16>(py, routing, apart),
            Element::F16 => self.to::<f16>(py, routing, apart),
            Element::F32 => self.to::<f32>(py, routing, apart),
            _ => Err(self.hidden_states.dtype_error("bfloat16, float16 or float32")),
        }
    }

    fn to<T: Native + Float>(&self, py: Python<'_>, routing: &Routing<'_>, apart: Apart) -> PyResult<()> {
        match self.out.element() {
            Element::Bf16 => self.run::<T, bf16>(py, routing, apart),
            Element::F16 => self.run::<T, f16>(py, routing, apart),
            Element::F32 => self.run::<T, f32>(py, routing, apart),
            _ => Err(self.out.dtype_error("bfloat16, float16 or float32")),
        }
    }

    fn run<T: Native + Float, O: Native + Float>(
        &self,
        py: Python<'_>,
        routing: &Routing<'_>,
        apart: Apart,
    ) -> PyResult<()> {
        let cpu = cpu()?;
        let (tokens, topk) = (routing.tokens(), routing.topk());
        let rows = self.hidden_states.matrix::<T>()?;
        let weights: MatrixRef<'_, f32> = self.weights.matrix()?;
        let workspace = self.workspace.contiguous_mut::<u8>(apart)?;
        let out = self.out.contiguous_mut::<O>(apart)?;
        let shape = self.layer.shape();
        // Of local ids, and of the caller's.
        let config = LayerConfig { topk, input: T::DTYPE, output: O::DTYPE, ..*self.layer.config() };
        let local = self.layer.with_config(config, usize::MAX).map_err(exception)?.on(&cpu);
        let hidden = shape.hidden();
        let of_token = (topk * 3).saturating_mul(hidden).saturating_mul(shape.intermediate());
        let at_once =
            self.tokens_at_once.unwrap_or((limits::PRODUCTS_AT_ONCE * cpu.threads()) / of_token.max(1)).max(1);
        if tokens <= at_once {
            let config = LayerConfig { global_experts: routing.global_experts(), ..config };
            let layer = local.with_config(config, usize::MAX).map_err(exception)?;
            return work(py, || layer.run(rows, routing, weights, workspace, out).map_err(exception));
        }
        self.hidden_states.require_shape(&[tokens, hidden])?;
        self.weights.require_shape(&[tokens, topk])?;
        let needed = local.workspace_bytes(tokens).map_err(exception)?;
        if workspace.len() < needed {
            return Err(Wrong::short("workspace", workspace.len(), needed).value());
        }
        // A row's result does not depend on the rows beside it.
        for first in (0..tokens).step_by(at_once) {
            let part = first..tokens.min(first + at_once);
            let (rows, weights) =
                (self.hidden_states.matrix_rows::<T>(part.clone())?, self.weights.matrix_rows(part.clone())?);
            let expert = |slot: usize| routing.local_expert(part.start + slot / topk, slot % topk);
            let mut ids: Vec<i32> = limits::vec("topk_ids", part.len() * topk)?;
            ids.extend((0..part.len() * topk).map(|slot| expert(slot).map_or(-1, |expert| expert as i32)));
            let ids = MatrixRef::new(&ids, part.len(), topk).map_err(exception)?;
            let routing = Routing::new(ids, shape.local_experts(), None).map_err(exception)?;
            let out = &mut out[part.start * hidden..part.end * hidden];
            work(py, || local.run(rows, &routing, weights, workspace, out).map_err(exception))?;
            py.check_signals()?;
        }
        Ok(())
    }
}
