//! Rows to their place.

use crate::array::{Apart, Array, Element};
use crate::cuda;
use crate::error::{exception, size};
use crate::plan::counts;
use crate::pool::cpu;
use expertile::cpu::{self, RowScales};
use expertile::{
    Group, Layout, MatrixRef, Padding, Plan, Routing, ScaleFormat, ScaleLayout, ScaleRounding, ScalesMut, TopkIds,
};
use half::{bf16, f16};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

/// `topk_ids` and what they are read with.
pub(crate) struct Ids<'py> {
    pub(crate) ids: Array<'py>,
    pub(crate) map: Option<Array<'py>>,
    pub(crate) local_experts: usize,
}

impl<'py> Ids<'py> {
    pub(crate) fn new(
        topk_ids: &Bound<'py, PyAny>,
        expert_map: Option<&Bound<'py, PyAny>>,
        local_experts: &Bound<'py, PyAny>,
    ) -> PyResult<Self> {
        Ok(Self {
            ids: Array::new("topk_ids", topk_ids)?,
            map: Array::optional("expert_map", expert_map)?,
            local_experts: size("local_num_experts", local_experts)?,
        })
    }

    pub(crate) fn arrays(&self) -> [Option<&Array<'py>>; 2] {
        [Some(&self.ids), self.map.as_ref()]
    }

    /// Checks the ids and hands the routing to `work`.
    pub(crate) fn routing<R>(&self, work: impl FnOnce(Routing<'_>) -> PyResult<R>) -> PyResult<R> {
        let ids = match self.ids.element() {
            Element::I32 => TopkIds::I32(self.ids.matrix()?),
            Element::I64 => TopkIds::I64(self.ids.matrix()?),
            _ => return Err(self.ids.dtype_error("int32 or int64")),
        };
        let map = self.map.as_ref().map(Array::vector::<i32>).transpose()?;
        work(Routing::new(ids, self.local_experts, map.as_deref()).map_err(exception)?)
    }
}

/// Where a layout's lists go, and how many rows it may have.
pub(crate) struct Place<'py> {
    pub(crate) ids: Ids<'py>,
    alignment: usize,
    m_sum: usize,
    pub(crate) lists: Array<'py>,
}

impl<'py> Place<'py> {
    fn new(
        ids: Ids<'py>,
        alignment: &Bound<'py, PyAny>,
        m_sum: &Bound<'py, PyAny>,
        lists: &Bound<'py, PyAny>,
    ) -> PyResult<Self> {
        Ok(Self {
            ids,
            alignment: size("alignment", alignment)?,
            m_sum: size("m_sum", m_sum)?,
            lists: Array::new("layout", lists)?,
        })
    }

    /// The plan of this call.
    pub(crate) fn plan(&self) -> PyResult<Plan> {
        let (tokens, topk) = self.ids.ids.matrix_shape("[M, topk]")?;
        Plan::with_m_sum(tokens, topk, self.ids.local_experts, self.alignment, self.m_sum).map_err(exception)
    }

    /// `H`, of rows that are one to a token.
    fn hidden(&self, x: &Array<'_>) -> PyResult<usize> {
        let (tokens, _) = self.ids.ids.matrix_shape("[M, topk]")?;
        let (_, hidden) = x.matrix_shape("[M, H]")?;
        x.require_shape(&[tokens, hidden])?;
        Ok(hidden)
    }

    /// Builds the layout (which must have these counts, if some are given) and hands it to `work`.
    fn layout<R>(
        &self,
        apart: Apart,
        expected_counts: Option<&[i32]>,
        work: impl FnOnce(&Layout<'_>) -> PyResult<R>,
    ) -> PyResult<R> {
        self.ids.routing(|routing| {
            let plan =
                Plan::with_m_sum(routing.tokens(), routing.topk(), routing.local_experts(), self.alignment, self.m_sum)
                    .map_err(exception)?;
            let space = self.lists.contiguous_mut(apart)?;
            let layout = Layout::build(&plan, &routing, space).map_err(exception)?;
            if let Some(expected) = expected_counts {
                require_counts(expected, layout.expert_num_tokens())?;
            }
            work(&layout)
        })
    }
}

fn require_counts(given: &[i32], counted: &[i32]) -> PyResult<()> {
    if given.len() != counted.len() {
        return Err(PyValueError::new_err(format!(
            "expert_num_tokens has shape [{}], expected [{}]",
            given.len(),
            counted.len()
        )));
    }
    match given.iter().zip(counted).position(|(given, counted)| given != counted) {
        Some(expert) => Err(PyValueError::new_err(format!(
            "expert_num_tokens[{expert}] is {}, expected {}, which is how often topk_ids names the expert",
            given[expert], counted[expert]
        ))),
        None => Ok(()),
    }
}

fn padding(zero_padding: bool) -> Padding {
    if zero_padding { Padding::Zero } else { Padding::Untouched }
}

/// The format of that name, group and rounding.
fn scale_format(layout: &str, group: &Bound<'_, PyAny>, power_of_two: bool) -> PyResult<ScaleFormat> {
    const LAYOUTS: [(&str, ScaleLayout); 3] = [
        ("row_major", ScaleLayout::RowMajor),
        ("mn_major", ScaleLayout::MnMajor),
        ("packed_ue8m0", ScaleLayout::PackedUe8m0),
    ];
    let group = Group::from_size(size("group", group)?).map_err(exception)?;
    let Some(&(_, layout)) = LAYOUTS.iter().find(|(name, _)| *name == layout) else {
        return Err(PyValueError::new_err(format!(
            "scale_layout is \"{layout}\", expected one of row_major, mn_major, packed_ue8m0"
        )));
    };
    let rounding = if power_of_two { ScaleRounding::PowerOfTwo } else { ScaleRounding::Exact };
    ScaleFormat::new(group, layout, rounding).map_err(exception)
}

/// Fails unless a scale array is flat, or a matrix with the strides that its format asks for, and large enough.
fn require_scales(scales: &Array<'_>, format: ScaleFormat, m_sum: usize, hidden: usize) -> PyResult<()> {
    let groups = format.groups(hidden).map_err(exception)?;
    let column = m_sum.next_multiple_of(4);
    let packed = format.layout() == ScaleLayout::PackedUe8m0;
    if scales.element() != if packed { Element::I32 } else { Element::F32 } {
        return Err(scales.dtype_error(if packed { "int32 for packed UE8M0 scales" } else { "float32" }));
    }
    if scales.shape().len() == 1 {
        scales.require_strides(&[1])?;
    } else {
        let (columns, strides) = match format.layout() {
            ScaleLayout::RowMajor => (groups, [groups, 1]),
            ScaleLayout::MnMajor => (groups, [1, column]),
            ScaleLayout::PackedUe8m0 => (groups.div_ceil(4), [1, column]),
        };
        scales.require_shape(&[m_sum, columns])?;
        scales.require_strides(&strides)?;
    }
    scales.require_span(format.words(m_sum, hidden).map_err(exception)?)
}

/// The words of a scale array that fits its format.
fn scale_memory<'a>(scales: &'a Array<'_>, apart: Apart) -> PyResult<ScalesMut<'a>> {
    match scales.element() {
        Element::I32 => Ok(ScalesMut::Ue8m0(scales.memory_mut(apart)?)),
        _ => Ok(ScalesMut::F32(scales.memory_mut(apart)?)),
    }
}

/// Fails unless rows quantized by others have scales `[M, H / group]` of the type that the format takes.
fn require_row_scales(x: &Array<'_>, x_scales: &Array<'_>, format: ScaleFormat) -> PyResult<()> {
    let (tokens, hidden) = x.matrix_shape("[M, H]")?;
    let (element, expected) = match format.layout() {
        ScaleLayout::PackedUe8m0 => (Element::U8, "uint8, for packed UE8M0"),
        _ => (Element::F32, "float32, or uint8 for packed UE8M0"),
    };
    if x_scales.element() != element {
        return Err(x_scales.dtype_error(expected));
    }
    x_scales.require_shape(&[tokens, format.groups(hidden).map_err(exception)?])
}

/// Fails unless `out` is contiguous, `[M_sum, H]` and of the elements of `like` (or e4m3 without one).
fn require_rows_out(out: &Array<'_>, m_sum: usize, hidden: usize, like: Option<&Array<'_>>) -> PyResult<()> {
    out.require_shape(&[m_sum, hidden])?;
    out.require_contiguous()?;
    let fits = match like {
        Some(x) => x.element() == out.element() || (x.item_bytes() == 1 && out.item_bytes() == 1),
        None => matches!(out.element(), Element::E4m3 | Element::U8 | Element::I8),
    };
    if fits { Ok(()) } else { Err(out.dtype_error(if like.is_some() { "that of x" } else { "float8_e4m3fn" })) }
}

/// 4-byte words that the scales of `[m_sum, hidden]` take.
#[pyfunction]
pub(crate) fn scale_words(
    m_sum: &Bound<'_, PyAny>,
    hidden: &Bound<'_, PyAny>,
    scale_layout: &str,
    group: &Bound<'_, PyAny>,
) -> PyResult<usize> {
    let format = scale_format(scale_layout, group, true)?;
    format.words(size("m_sum", m_sum)?, size("hidden", hidden)?).map_err(exception)
}

/// Writes live rows per local expert to `out [E]`.
#[pyfunction]
pub(crate) fn count_expert_num_tokens(
    py: Python<'_>,
    topk_ids: &Bound<'_, PyAny>,
    expert_map: Option<&Bound<'_, PyAny>>,
    local_experts: &Bound<'_, PyAny>,
    out: &Bound<'_, PyAny>,
) -> PyResult<()> {
    let ids = Ids::new(topk_ids, expert_map, local_experts)?;
    let out = Array::new("out", out)?;
    let apart = Apart::check(&[&out], &ids.arrays())?;
    let counts = out.contiguous_mut(apart)?;
    ids.routing(|routing| py.detach(|| routing.count_expert_num_tokens(counts)).map_err(exception))
}

/// Writes a layout's lists.
#[pyfunction]
#[pyo3(signature = (topk_ids, expert_map, local_experts, alignment, m_sum, layout, workspace=None))]
pub(crate) fn build_layout(
    py: Python<'_>,
    topk_ids: &Bound<'_, PyAny>,
    expert_map: Option<&Bound<'_, PyAny>>,
    local_experts: &Bound<'_, PyAny>,
    alignment: &Bound<'_, PyAny>,
    m_sum: &Bound<'_, PyAny>,
    layout: &Bound<'_, PyAny>,
    workspace: Option<&Bound<'_, PyAny>>,
) -> PyResult<()> {
    let place = Place::new(Ids::new(topk_ids, expert_map, local_experts)?, alignment, m_sum, layout)?;
    let workspace = Array::optional("workspace", workspace)?;
    let [ids, map] = place.ids.arrays();
    let apart = Apart::check(&[&place.lists], &[ids, map, workspace.as_ref()])?;
    match Array::common_device(&[ids, map, Some(&place.lists), workspace.as_ref()])? {
        Some(ordinal) => cuda::build_layout(py, ordinal, &place, workspace.as_ref()),
        None => place.layout(apart, None, |_| Ok(())),
    }
}

/// `x [M, H]` to `out [M_sum, H]`, any element of 1, 2 or 4 bytes.
#[pyfunction]
#[pyo3(signature = (x, topk_ids, expert_map, local_experts, alignment, m_sum, expert_num_tokens, zero_padding, out, layout, workspace=None))]
pub(crate) fn permute_rows(
    py: Python<'_>,
    x: &Bound<'_, PyAny>,
    topk_ids: &Bound<'_, PyAny>,
    expert_map: Option<&Bound<'_, PyAny>>,
    local_experts: &Bound<'_, PyAny>,
    alignment: &Bound<'_, PyAny>,
    m_sum: &Bound<'_, PyAny>,
    expert_num_tokens: Option<&Bound<'_, PyAny>>,
    zero_padding: bool,
    out: &Bound<'_, PyAny>,
    layout: &Bound<'_, PyAny>,
    workspace: Option<&Bound<'_, PyAny>>,
) -> PyResult<()> {
    let (x, out) = (Array::new("x", x)?, Array::new("out", out)?);
    let place = Place::new(Ids::new(topk_ids, expert_map, local_experts)?, alignment, m_sum, layout)?;
    let [ids, map] = place.ids.arrays();
    let workspace = Array::optional("workspace", workspace)?;
    let apart = Apart::check(&[&out, &place.lists], &[Some(&x), ids, map, workspace.as_ref()])?;
    let hidden = place.hidden(&x)?;
    require_rows_out(&out, place.m_sum, hidden, Some(&x))?;
    let all = [Some(&x), ids, map, Some(&out), Some(&place.lists), workspace.as_ref()];
    if let Some(ordinal) = Array::common_device(&all)? {
        return cuda::permute(py, ordinal, &place, (&x, &out), None, zero_padding, workspace.as_ref());
    }
    let given = expert_num_tokens.map(counts).transpose()?;
    let cpu = cpu()?;
    macro_rules! rows_of {
        ($type:ty) => {{
            let (rows, out) = (x.matrix::<$type>()?, out.contiguous_mut::<$type>(apart)?);
            place.layout(apart, given.as_deref(), |layout| {
                py.detach(|| cpu::permute_rows(&cpu, rows, layout, padding(zero_padding), out)).map_err(exception)
            })
        }};
    }
    match x.element() {
        Element::E4m3 | Element::U8 | Element::I8 => rows_of!(u8),
        Element::Bf16 => rows_of!(bf16),
        Element::F16 => rows_of!(f16),
        Element::F32 => rows_of!(f32),
        Element::I32 => rows_of!(i32),
        Element::I64 | Element::Other => {
            Err(x.dtype_error("float8_e4m3fn, bfloat16, float16, float32, int32 or uint8"))
        }
    }
}

/// e4m3 `x [M, H]` and its scales `[M, H / group]` to `out [M_sum, H]` and `scales`.
#[pyfunction]
#[pyo3(signature = (x, x_scales, topk_ids, expert_map, local_experts, alignment, m_sum, expert_num_tokens, group, scale_layout, zero_padding, out, scales, layout, workspace=None))]
pub(crate) fn permute_quantized(
    py: Python<'_>,
    x: &Bound<'_, PyAny>,
    x_scales: &Bound<'_, PyAny>,
    topk_ids: &Bound<'_, PyAny>,
    expert_map: Option<&Bound<'_, PyAny>>,
    local_experts: &Bound<'_, PyAny>,
    alignment: &Bound<'_, PyAny>,
    m_sum: &Bound<'_, PyAny>,
    expert_num_tokens: Option<&Bound<'_, PyAny>>,
    group: &Bound<'_, PyAny>,
    scale_layout: &str,
    zero_padding: bool,
    out: &Bound<'_, PyAny>,
    scales: &Bound<'_, PyAny>,
    layout: &Bound<'_, PyAny>,
    workspace: Option<&Bound<'_, PyAny>>,
) -> PyResult<()> {
    let (x, x_scales) = (Array::new("x", x)?, Array::new("x_scales", x_scales)?);
    let (out, scales) = (Array::new("out", out)?, Array::new("scales", scales)?);
    let place = Place::new(Ids::new(topk_ids, expert_map, local_experts)?, alignment, m_sum, layout)?;
    let [ids, map] = place.ids.arrays();
    let workspace = Array::optional("workspace", workspace)?;
    let inputs = [Some(&x), Some(&x_scales), ids, map, workspace.as_ref()];
    let apart = Apart::check(&[&out, &scales, &place.lists], &inputs)?;
    let hidden = place.hidden(&x)?;
    let format = scale_format(scale_layout, group, scale_layout == "packed_ue8m0")?;
    require_row_scales(&x, &x_scales, format)?;
    require_rows_out(&out, place.m_sum, hidden, None)?;
    require_scales(&scales, format, place.m_sum, hidden)?;
    let all = [Some(&x), Some(&x_scales), ids, map, Some(&out), Some(&scales), Some(&place.lists), workspace.as_ref()];
    if let Some(ordinal) = Array::common_device(&all)? {
        let quantized = Some((&x_scales, &scales, format));
        return cuda::permute(py, ordinal, &place, (&x, &out), quantized, zero_padding, workspace.as_ref());
    }
    let given = expert_num_tokens.map(counts).transpose()?;
    let words = scale_memory(&scales, apart)?;
    let row_scales = match x_scales.element() {
        Element::F32 => RowScales::F32(x_scales.matrix()?),
        Element::U8 => RowScales::Ue8m0(x_scales.matrix()?),
        _ => return Err(x_scales.dtype_error("float32, or uint8 for packed UE8M0")),
    };
    let (rows, out) = (x.matrix()?, out.contiguous_mut(apart)?);
    let cpu = cpu()?;
    place.layout(apart, given.as_deref(), |layout| {
        py.detach(|| cpu::permute_quantized(&cpu, rows, row_scales, layout, format, padding(zero_padding), out, words))
            .map_err(exception)
    })
}

/// bf16, f16 or f32 `x [M, H]` (times `topk_weights [M, 1]`, if given) to e4m3 `out [M_sum, H]` and `scales`.
#[pyfunction]
#[pyo3(signature = (x, topk_weights, topk_ids, expert_map, local_experts, alignment, m_sum, group, scale_layout, power_of_two, zero_padding, out, scales, layout, workspace=None))]
pub(crate) fn quantize_permute(
    py: Python<'_>,
    x: &Bound<'_, PyAny>,
    topk_weights: Option<&Bound<'_, PyAny>>,
    topk_ids: &Bound<'_, PyAny>,
    expert_map: Option<&Bound<'_, PyAny>>,
    local_experts: &Bound<'_, PyAny>,
    alignment: &Bound<'_, PyAny>,
    m_sum: &Bound<'_, PyAny>,
    group: &Bound<'_, PyAny>,
    scale_layout: &str,
    power_of_two: bool,
    zero_padding: bool,
    out: &Bound<'_, PyAny>,
    scales: &Bound<'_, PyAny>,
    layout: &Bound<'_, PyAny>,
    workspace: Option<&Bound<'_, PyAny>>,
) -> PyResult<()> {
    let (x, weights) = (Array::new("x", x)?, Array::optional("topk_weights", topk_weights)?);
    let (out, scales) = (Array::new("out", out)?, Array::new("scales", scales)?);
    let place = Place::new(Ids::new(topk_ids, expert_map, local_experts)?, alignment, m_sum, layout)?;
    let [ids, map] = place.ids.arrays();
    let workspace = Array::optional("workspace", workspace)?;
    let inputs = [Some(&x), weights.as_ref(), ids, map, workspace.as_ref()];
    let apart = Apart::check(&[&out, &scales, &place.lists], &inputs)?;
    let hidden = place.hidden(&x)?;
    let format = scale_format(scale_layout, group, power_of_two)?;
    require_rows_out(&out, place.m_sum, hidden, None)?;
    require_scales(&scales, format, place.m_sum, hidden)?;
    let all = [Some(&x), weights.as_ref(), ids, map, Some(&out), Some(&scales), Some(&place.lists), workspace.as_ref()];
    if let Some(ordinal) = Array::common_device(&all)? {
        let rows = (&x, weights.as_ref(), &out, &scales);
        return cuda::quantize_permute(py, ordinal, &place, rows, format, zero_padding, workspace.as_ref());
    }
    let words = scale_memory(&scales, apart)?;
    let weights: Option<MatrixRef<'_, f32>> = weights.as_ref().map(Array::matrix).transpose()?;
    let out = out.contiguous_mut(apart)?;
    let cpu = cpu()?;
    macro_rules! rows_of {
        ($type:ty) => {{
            let rows = x.matrix::<$type>()?;
            place.layout(apart, None, |layout| {
                py.detach(|| {
                    cpu::quantize_permute(&cpu, rows, weights, layout, format, padding(zero_padding), out, words)
                })
                .map_err(exception)
            })
        }};
    }
    match x.element() {
        Element::Bf16 => rows_of!(bf16),
        Element::F16 => rows_of!(f16),
        Element::F32 => rows_of!(f32),
        _ => Err(x.dtype_error("bfloat16, float16 or float32")),
    }
}
