//! vLLM's two calls on a GPU in one crossing each: what they take as it is, planning included.

use crate::array::{Apart, Array, Element};
use crate::autograd::written;
use crate::complete::{is_complete, mark_complete};
use crate::cuda;
use crate::error::{exception, optional_size, size};
use crate::limits;
use crate::operands::{Ids, Lists, Rows, require_rows_out, rows_out};
use crate::plan::parse_rule;
use crate::scales::{owns_all_words, require_row_scales, scale_format, scales_out};
use crate::tensor::{self, Form};
use crate::unpermute;
use expertile::{Plan, ScaleLayout};
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedStr;

/// What `expertile.deep_gemm_utils.deepgemm_moe_permute` returns: rows, scales, grouped layout, inv_perm, alignment.
type DeepGemm<'py> = (Bound<'py, PyAny>, Bound<'py, PyAny>, Bound<'py, PyAny>, Bound<'py, PyAny>, usize);

/// `permute_quantized` on a GPU, with the scales' layout that their type asks for, into tensors made here: `out`
/// (unless it is given), scales, the grouped layout, inv_perm. Without `m_sum`, as many rows as the reference has.
/// None, and nothing done, for what `permute_quantized` has to be asked.
#[pyfunction]
pub(crate) fn deep_gemm_permute<'py>(
    py: Python<'py>,
    x: &Bound<'py, PyAny>,
    x_scales: &Bound<'py, PyAny>,
    topk_ids: &Bound<'py, PyAny>,
    expert_map: Option<&Bound<'py, PyAny>>,
    local_experts: &Bound<'py, PyAny>,
    alignment: &Bound<'py, PyAny>,
    m_sum: Option<&Bound<'py, PyAny>>,
    group: &Bound<'py, PyAny>,
    use_psum_layout: bool,
    out: Option<&Bound<'py, PyAny>>,
    rule: Option<(PyBackedStr, PyBackedStr)>,
) -> PyResult<Option<DeepGemm<'py>>> {
    let x = Array::new("x", x)?;
    let Some(ordinal) = x.device() else { return Ok(None) };
    let (x_scales, ids) = (Array::new("x_scales", x_scales)?, Ids::new(topk_ids, expert_map, local_experts)?);
    let out = out.map(|out| Array::output("out", out)).transpose()?;
    let (tokens, topk) = ids.ids.matrix_shape("2 dimensions")?;
    let alignment = size("alignment", alignment)?;
    let plan = match optional_size("m_sum", m_sum)? {
        Some(m_sum) => Plan::with_m_sum(tokens, topk, ids.local_experts, alignment, m_sum),
        None => {
            let (rule, arch) = rule.unzip();
            Plan::reference(tokens, topk, ids.local_experts, alignment, parse_rule(rule.as_deref(), arch.as_deref())?)
        }
    };
    let plan = plan.map_err(exception)?;
    let (m_sum, alignment) = (plan.m_sum(), plan.alignment());
    let layout = if x_scales.element() == Element::U8 { ScaleLayout::PackedUe8m0 } else { ScaleLayout::RowMajor };
    let as_it_is =
        |out: &Array<'_>| out.element() == x.element() && out.require_contiguous().is_ok() && out.shape().len() == 2;
    if x.item_bytes() != 1 || !owns_all_words(layout, m_sum) || !out.as_ref().is_none_or(as_it_is) {
        return Ok(None);
    }
    let (_, hidden) = x.matrix_shape("2 dimensions")?;
    x.require_shape(&[tokens, hidden])?;
    limits::at_most("local_experts", ids.local_experts, limits::EXPERTS)?;
    limits::at_most("hidden", hidden, limits::HIDDEN)?;
    let format = scale_format(layout.name(), group, None)?;
    require_row_scales(&x, &x_scales, format)?;
    let [id_list, map] = ids.arrays();
    let inputs = [Some(&x), Some(&x_scales), id_list, map];
    Array::common_device(&[inputs[0], inputs[1], id_list, map, out.as_ref()])?;
    Apart::check(out.as_ref().as_slice(), &inputs)?;
    let out = match out {
        Some(out) => {
            require_rows_out(&out, m_sum, hidden, None)?;
            out
        }
        None => rows_out(py, None, &x, x.element(), m_sum, hidden)?,
    };
    let scales = scales_out(py, None, &x, format, m_sum, hidden)?;
    let rows_or_experts = if use_psum_layout { ids.local_experts } else { m_sum };
    let grouped = tensor::empty(py, ordinal, Form::list(Element::I32, rows_or_experts))?;
    let inv_perm = tensor::empty(py, ordinal, Form::row_major(Element::I32, tokens, topk))?;
    let rows = Rows { x: &x, out: &out, scales: Some((&x_scales, &scales, format)), zero_padding: false };
    let (psum, m_indices) = if use_psum_layout { (Some(&grouped), None) } else { (None, Some(&grouped)) };
    cuda::permute_to_lists(py, ordinal, &ids, plan, &rows, &Lists { psum, m_indices, inv_perm: &inv_perm })?;
    written(py, &[&out])?;
    let inv_perm = inv_perm.into_object();
    mark_complete(&inv_perm)?;
    Ok(Some((out.into_object(), scales.into_object(), grouped.into_object(), inv_perm, alignment)))
}

/// `unpermute` on a GPU, of arrays that it can take as they are. False, and nothing done, for others.
#[pyfunction]
pub(crate) fn deep_gemm_unpermute(
    py: Python<'_>,
    rows: &Bound<'_, PyAny>,
    inv_perm: &Bound<'_, PyAny>,
    topk_weights: &Bound<'_, PyAny>,
    out: &Bound<'_, PyAny>,
) -> PyResult<bool> {
    let rows = Array::new("rows", rows)?;
    if rows.device().is_none() || !is_complete(inv_perm)? {
        return Ok(false);
    }
    let (inv_perm, weights) = (Array::new("inv_perm", inv_perm)?, Array::new("topk_weights", topk_weights)?);
    let call = unpermute::Call { rows, inv_perm, weights: Some(weights), out: Array::output("out", out)? };
    if !call.is_direct() {
        return Ok(false);
    }
    let Some(ordinal) = call.device()? else { return Ok(false) };
    call.on_gpu(py, ordinal).map(|()| true)
}
