//! The whole layer on the CPU.

use crate::array::{Apart, Array, Element, Native};
use crate::error::{exception, size};
use crate::permute::Ids;
use crate::pool::cpu;
use expertile::cpu::{Layer, LayerOptions, PackedWeights};
use expertile::quantize::ue8m0_value;
use expertile::{Activation, ActivationFormat, Float, GateUpOrder, MatrixRef, Routing};
use half::{bf16, f16};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use std::borrow::Cow;

/// Prepacked weights and how to compute with them: what `expertile.torch.Layer` documents.
#[pyclass(frozen, name = "Layer", module = "expertile._native")]
pub(crate) struct PyLayer(Layer);

#[pymethods]
impl PyLayer {
    #[new]
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
    ) -> PyResult<Self> {
        let activations = match activations {
            "bf16" => ActivationFormat::Bf16,
            "e4m3" => ActivationFormat::E4m3,
            other => {
                return Err(PyValueError::new_err(format!("activations is \"{other}\", expected one of bf16, e4m3")));
            }
        };
        let alignment = size("alignment", alignment)?;
        let w13 = pack(py, ("w13", w13), ("w13_scale", w13_scale), true)?;
        let w2 = pack(py, ("w2", w2), ("w2_scale", w2_scale), false)?;
        let activation = Activation::Swiglu { alpha, beta, limit };
        let options = LayerOptions { activation, activations, alignment, weight_on_input };
        Layer::new(w13, w2, options).map(Self).map_err(exception)
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

    /// Bytes that `run` needs for any routing of `[tokens, topk]`.
    fn workspace_bytes(&self, tokens: &Bound<'_, PyAny>, topk: &Bound<'_, PyAny>) -> PyResult<usize> {
        self.0.workspace_bytes(size("tokens", tokens)?, size("topk", topk)?).map_err(exception)
    }

    /// `hidden_states [M, H]` to `out [M, H]`.
    fn run(
        &self,
        py: Python<'_>,
        hidden_states: &Bound<'_, PyAny>,
        topk_ids: &Bound<'_, PyAny>,
        topk_weights: &Bound<'_, PyAny>,
        expert_map: Option<&Bound<'_, PyAny>>,
        workspace: &Bound<'_, PyAny>,
        out: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        let experts = self.local_experts().into_pyobject(py)?.into_any();
        let call = Call {
            layer: &self.0,
            hidden_states: Array::new("hidden_states", hidden_states)?,
            ids: Ids::new(topk_ids, expert_map, &experts)?,
            weights: Array::new("topk_weights", topk_weights)?,
            workspace: Array::new("workspace", workspace)?,
            out: Array::new("out", out)?,
        };
        let (tokens, hidden) = call.hidden_states.matrix_shape("[M, H]")?;
        call.out.require_shape(&[tokens, hidden])?;
        let [ids, map] = call.ids.arrays();
        let inputs = [Some(&call.hidden_states), Some(&call.weights), ids, map];
        let apart = Apart::check(&[&call.out, &call.workspace], &inputs)?;
        call.ids.routing(|routing| call.from(py, &routing, apart))
    }
}

/// Packs `[E, N, K]` bf16, or e4m3 with block scales `[E, ceil(N / 128), ceil(K / 128)]`; for gate and up, `N = 2 I`, there are
/// `ceil(I / 128)` row blocks for each of the two.
fn pack(
    py: Python<'_>,
    (name, weights): (&'static str, &Bound<'_, PyAny>),
    (scale_name, scale): (&'static str, Option<&Bound<'_, PyAny>>),
    gate_up: bool,
) -> PyResult<PackedWeights> {
    let weights = Array::new(name, weights)?;
    let &[experts, n, k] = weights.shape() else { return Err(weights.shape_error("[E, N, K]")) };
    if gate_up && !n.is_multiple_of(2) {
        return Err(weights.shape_error("[E, 2 I, H]"));
    }
    let scale = Array::optional(scale_name, scale)?;
    let cpu = cpu()?;
    match (weights.element(), &scale) {
        (Element::Bf16, None) => {
            let weights = weights.contiguous::<bf16>()?;
            py.detach(|| match gate_up {
                true => PackedWeights::pack_gate_up_bf16(&cpu, weights, experts, n / 2, k, GateUpOrder::Halves),
                false => PackedWeights::pack_bf16(&cpu, weights, experts, n, k),
            })
            .map_err(exception)
        }
        (Element::E4m3, Some(scale)) => {
            let blocks = if gate_up { 2 * (n / 2).div_ceil(128) } else { n.div_ceil(128) };
            scale.require_shape(&[experts, blocks, k.div_ceil(128)])?;
            let (weights, scale) = (weights.contiguous()?, widened(scale)?);
            py.detach(|| match gate_up {
                true => PackedWeights::pack_gate_up_e4m3(&cpu, weights, &scale, experts, n / 2, k, GateUpOrder::Halves),
                false => PackedWeights::pack_e4m3(&cpu, weights, &scale, experts, n, k),
            })
            .map_err(exception)
        }
        (Element::Bf16, Some(_)) => {
            Err(PyValueError::new_err(format!("{scale_name} is given, expected none for bfloat16 {name}")))
        }
        (Element::E4m3, None) => {
            Err(PyValueError::new_err(format!("{scale_name} is None, expected block scales for float8_e4m3fn {name}")))
        }
        _ => Err(weights.dtype_error("bfloat16 or float8_e4m3fn")),
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
        let rows = self.hidden_states.matrix::<T>()?;
        let weights: MatrixRef<'_, f32> = self.weights.matrix()?;
        let workspace = self.workspace.contiguous_mut::<u8>(apart)?;
        let out = self.out.contiguous_mut::<O>(apart)?;
        py.detach(|| self.layer.run(&cpu, rows, routing, weights, workspace, out)).map_err(exception)
    }
}
