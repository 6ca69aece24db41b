//! Rows to their place.

use crate::array::{Apart, Array, Element};
use crate::autograd::written;
use crate::cuda;
use crate::error::exception;
use crate::operands::{Ids, LayoutTarget, Made, Rows, padding, require_rows_out, rows_out};
use crate::plan::counts;
use crate::pool::{cpu, work};
use crate::scales::{Shaped, require_row_scales, require_scales, scale_format, scale_memory, scales_out};
use expertile::ScaleFormat;
use expertile::cpu::{self, RowScales};
use half::{bf16, f16};
use pyo3::prelude::*;

/// Rows, their layout.
type MadeRows<'py> = (Bound<'py, PyAny>, Made<'py>);

/// Rows, scales (and the matrix to read them as, if they are flat), layout.
type MadeQuantized<'py> = (Bound<'py, PyAny>, Bound<'py, PyAny>, Option<Shaped>, Made<'py>);

/// Where quantized rows and their scales go: made where they are not handed in, and checked.
struct Quantized<'py> {
    out: Array<'py>,
    scales: Array<'py>,
    /// What flat scales are read as.
    matrix: Option<Shaped>,
    apart: Apart,
    device: Option<usize>,
}

impl<'py> Quantized<'py> {
    /// For rows `x` of `hidden` values, with the array (scales or weights) that goes with them.
    fn new(
        py: Python<'py>,
        target: &LayoutTarget<'py>,
        (x, with_x, hidden): (&Array<'py>, Option<&Array<'py>>, usize),
        (element, format): (Element, ScaleFormat),
        out: Option<&Bound<'py, PyAny>>,
        scales: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Self> {
        let m_sum = target.m_sum();
        let out = rows_out(py, out, x, element, m_sum, hidden)?;
        let scales = scales_out(py, scales, x, format, m_sum, hidden)?;
        let [ids, map] = target.ids.arrays();
        let apart = Apart::check(&[&out, &scales, &target.lists], &[Some(x), with_x, ids, map])?;
        require_rows_out(&out, m_sum, hidden, None)?;
        let matrix = require_scales(&scales, format, m_sum, hidden)?;
        let all = [Some(x), with_x, ids, map, Some(&out), Some(&scales), Some(&target.lists)];
        let device = Array::common_device(&all)?;
        Ok(Self { out, scales, matrix, apart, device })
    }

    /// What a call returns that is done, or has failed: after an interruption rows that are done stay written.
    fn made(self, py: Python<'py>, target: LayoutTarget<'py>, done: PyResult<()>) -> PyResult<MadeQuantized<'py>> {
        written(py, &[&self.out, &self.scales, &target.lists])?;
        done?;
        Ok((self.out.into_object(), self.scales.into_object(), self.matrix, target.made()))
    }
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
    let out = Array::output("out", out)?;
    let apart = Apart::check(&[&out], &ids.arrays())?;
    let counts = out.contiguous_mut(apart)?;
    ids.count(py, counts)?;
    written(py, &[&out])
}

/// Writes a layout's lists.
#[pyfunction]
#[pyo3(signature = (topk_ids, expert_map, local_experts, alignment, m_sum, layout, *, distinct=true))]
pub(crate) fn build_layout<'py>(
    py: Python<'py>,
    topk_ids: &Bound<'py, PyAny>,
    expert_map: Option<&Bound<'py, PyAny>>,
    local_experts: &Bound<'py, PyAny>,
    alignment: &Bound<'py, PyAny>,
    m_sum: Option<&Bound<'py, PyAny>>,
    layout: Option<&Bound<'py, PyAny>>,
    distinct: bool,
) -> PyResult<Made<'py>> {
    let ids = Ids::new(topk_ids, expert_map, local_experts)?;
    let target = LayoutTarget::new(py, [None, None], ids, alignment, m_sum, distinct, layout)?;
    let [ids, map] = target.ids.arrays();
    let apart = Apart::check(&[&target.lists], &[ids, map])?;
    match Array::common_device(&[ids, map, Some(&target.lists)])? {
        Some(ordinal) => cuda::build_layout(py, ordinal, &target)?,
        None => target.layout(py, apart, None, 0, |_, _, _| Ok(()))?,
    }
    written(py, &[&target.lists])?;
    Ok(target.made())
}

/// `x [M, H]` to `out [M_sum, H]`, any element of 1, 2 or 4 bytes.
#[pyfunction]
#[pyo3(signature = (
    x, topk_ids, expert_map, local_experts, alignment, m_sum, expert_num_tokens, zero_padding, out, layout, *,
    distinct=true
))]
pub(crate) fn permute_rows<'py>(
    py: Python<'py>,
    x: &Bound<'py, PyAny>,
    topk_ids: &Bound<'py, PyAny>,
    expert_map: Option<&Bound<'py, PyAny>>,
    local_experts: &Bound<'py, PyAny>,
    alignment: &Bound<'py, PyAny>,
    m_sum: Option<&Bound<'py, PyAny>>,
    expert_num_tokens: Option<&Bound<'py, PyAny>>,
    zero_padding: bool,
    out: Option<&Bound<'py, PyAny>>,
    layout: Option<&Bound<'py, PyAny>>,
    distinct: bool,
) -> PyResult<MadeRows<'py>> {
    let x = Array::new("x", x)?;
    let ids = Ids::new(topk_ids, expert_map, local_experts)?;
    let target = LayoutTarget::new(py, [Some(&x), None], ids, alignment, m_sum, distinct, layout)?;
    let hidden = target.hidden(&x)?;
    let out = rows_out(py, out, &x, x.element(), target.m_sum(), hidden)?;
    let [ids, map] = target.ids.arrays();
    let apart = Apart::check(&[&out, &target.lists], &[Some(&x), ids, map])?;
    require_rows_out(&out, target.m_sum(), hidden, Some(&x))?;
    let all = [Some(&x), ids, map, Some(&out), Some(&target.lists)];
    if let Some(ordinal) = Array::common_device(&all)? {
        let rows = Rows { x: &x, out: &out, scales: None, zero_padding };
        cuda::permute(py, ordinal, &target, &rows)?;
        written(py, &[&out, &target.lists])?;
        return Ok((out.into_object(), target.made()));
    }
    let given = expert_num_tokens.map(counts).transpose()?;
    let cpu = cpu()?;
    macro_rules! rows_of {
        ($type:ty) => {{
            let to = out.contiguous_mut::<$type>(apart)?;
            target.layout(py, apart, given.as_deref(), hidden, |layout, tokens, last| {
                let rows = x.matrix_rows::<$type>(tokens)?;
                let padding = padding(zero_padding && last);
                work(py, || cpu::permute_rows(&cpu, rows, layout, padding, to).map_err(exception))
            })
        }};
    }
    let done = match x.element() {
        Element::E4m3 | Element::U8 | Element::I8 => rows_of!(u8),
        Element::Bf16 => rows_of!(bf16),
        Element::F16 => rows_of!(f16),
        Element::F32 => rows_of!(f32),
        Element::I32 => rows_of!(i32),
        Element::E8m0 | Element::I64 | Element::Other => {
            Err(x.dtype_error("float8_e4m3fn, bfloat16, float16, float32, int32 or uint8"))
        }
    };
    // Also after an interruption, which leaves rows that are done.
    written(py, &[&out, &target.lists])?;
    done?;
    Ok((out.into_object(), target.made()))
}

/// e4m3 `x [M, H]` and its scales `[M, ceil(H / group)]` to `out [M_sum, H]` and `scales`.
#[pyfunction]
#[pyo3(signature = (
    x, x_scales, topk_ids, expert_map, local_experts, alignment, m_sum, expert_num_tokens, group,
    scale_layout, zero_padding, out, scales, layout, *, distinct=true
))]
pub(crate) fn permute_quantized<'py>(
    py: Python<'py>,
    x: &Bound<'py, PyAny>,
    x_scales: &Bound<'py, PyAny>,
    topk_ids: &Bound<'py, PyAny>,
    expert_map: Option<&Bound<'py, PyAny>>,
    local_experts: &Bound<'py, PyAny>,
    alignment: &Bound<'py, PyAny>,
    m_sum: Option<&Bound<'py, PyAny>>,
    expert_num_tokens: Option<&Bound<'py, PyAny>>,
    group: &Bound<'py, PyAny>,
    scale_layout: &str,
    zero_padding: bool,
    out: Option<&Bound<'py, PyAny>>,
    scales: Option<&Bound<'py, PyAny>>,
    layout: Option<&Bound<'py, PyAny>>,
    distinct: bool,
) -> PyResult<MadeQuantized<'py>> {
    let (x, x_scales) = (Array::new("x", x)?, Array::new("x_scales", x_scales)?);
    let ids = Ids::new(topk_ids, expert_map, local_experts)?;
    let target = LayoutTarget::new(py, [Some(&x), Some(&x_scales)], ids, alignment, m_sum, distinct, layout)?;
    let hidden = target.hidden(&x)?;
    let format = scale_format(scale_layout, group, None)?;
    require_row_scales(&x, &x_scales, format)?;
    let to = Quantized::new(py, &target, (&x, Some(&x_scales), hidden), (x.element(), format), out, scales)?;
    if let Some(ordinal) = to.device {
        let rows = Rows { x: &x, out: &to.out, scales: Some((&x_scales, &to.scales, format)), zero_padding };
        let done = cuda::permute(py, ordinal, &target, &rows);
        return to.made(py, target, done);
    }
    let given = expert_num_tokens.map(counts).transpose()?;
    let mut words = scale_memory(&to.scales, format, to.apart)?;
    let packed = match x_scales.element() {
        Element::F32 => false,
        Element::U8 => true,
        _ => return Err(x_scales.dtype_error("float32, or uint8 for packed UE8M0")),
    };
    let out = to.out.contiguous_mut(to.apart)?;
    let cpu = cpu()?;
    let done = target.layout(py, to.apart, given.as_deref(), hidden, |layout, tokens, last| {
        let rows = x.matrix_rows(tokens.clone())?;
        let row_scales = match packed {
            false => RowScales::F32(x_scales.matrix_rows(tokens)?),
            true => RowScales::Ue8m0(x_scales.matrix_rows(tokens)?),
        };
        let (padding, words) = (padding(zero_padding && last), words.reborrow());
        work(py, || cpu::permute_quantized(&cpu, rows, row_scales, layout, padding, out, words).map_err(exception))
    });
    to.made(py, target, done)
}

/// bf16, f16 or f32 `x [M, H]` (times `topk_weights [M, 1]`, if given) to e4m3 `out [M_sum, H]` and `scales`.
#[pyfunction]
#[pyo3(signature = (
    x, topk_weights, topk_ids, expert_map, local_experts, alignment, m_sum, group, scale_layout, power_of_two,
    zero_padding, out, scales, layout, *, distinct=true
))]
pub(crate) fn quantize_permute<'py>(
    py: Python<'py>,
    x: &Bound<'py, PyAny>,
    topk_weights: Option<&Bound<'py, PyAny>>,
    topk_ids: &Bound<'py, PyAny>,
    expert_map: Option<&Bound<'py, PyAny>>,
    local_experts: &Bound<'py, PyAny>,
    alignment: &Bound<'py, PyAny>,
    m_sum: Option<&Bound<'py, PyAny>>,
    group: &Bound<'py, PyAny>,
    scale_layout: &str,
    power_of_two: Option<bool>,
    zero_padding: bool,
    out: Option<&Bound<'py, PyAny>>,
    scales: Option<&Bound<'py, PyAny>>,
    layout: Option<&Bound<'py, PyAny>>,
    distinct: bool,
) -> PyResult<MadeQuantized<'py>> {
    let (x, weights) = (Array::new("x", x)?, Array::optional("topk_weights", topk_weights)?);
    let ids = Ids::new(topk_ids, expert_map, local_experts)?;
    let target = LayoutTarget::new(py, [Some(&x), weights.as_ref()], ids, alignment, m_sum, distinct, layout)?;
    let hidden = target.hidden(&x)?;
    let format = scale_format(scale_layout, group, power_of_two)?;
    let to = Quantized::new(py, &target, (&x, weights.as_ref(), hidden), (Element::E4m3, format), out, scales)?;
    if let Some(ordinal) = to.device {
        let rows = (&x, weights.as_ref(), &to.out, &to.scales);
        let done = cuda::quantize_permute(py, ordinal, &target, rows, format, zero_padding);
        return to.made(py, target, done);
    }
    let mut words = scale_memory(&to.scales, format, to.apart)?;
    if let Some(weights) = weights.as_ref().filter(|_| target.plan.topk() == 1) {
        weights.require_shape(&[target.plan.tokens(), 1])?;
    }
    let out = to.out.contiguous_mut(to.apart)?;
    let cpu = cpu()?;
    macro_rules! rows_of {
        ($type:ty) => {
            target.layout(py, to.apart, None, hidden, |layout, tokens, last| {
                let rows = x.matrix_rows::<$type>(tokens.clone())?;
                let weights = weights.as_ref().map(|weights| weights.matrix_rows::<f32>(tokens)).transpose()?;
                let (padding, words) = (padding(zero_padding && last), words.reborrow());
                work(py, || cpu::quantize_permute(&cpu, rows, weights, layout, padding, out, words).map_err(exception))
            })
        };
    }
    let done = match x.element() {
        Element::Bf16 => rows_of!(bf16),
        Element::F16 => rows_of!(f16),
        Element::F32 => rows_of!(f32),
        _ => Err(x.dtype_error("bfloat16, float16 or float32")),
    };
    to.made(py, target, done)
}
