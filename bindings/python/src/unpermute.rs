//! Rows back to their tokens.

use crate::array::{Apart, Array, Element, Native};
use crate::cuda;
use crate::error::exception;
use crate::permute::Ids;
use crate::pool::cpu;
use expertile::cpu::{self, Cpu};
use expertile::{Float, MatrixRef, Routing};
use half::{bf16, f16};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

/// `rows [N, H]` to `out [M, H]` by `inv_perm [M, topk]`; with `topk_ids`, slots of no local expert are skipped.
#[pyfunction]
pub(crate) fn unpermute(
    py: Python<'_>,
    rows: &Bound<'_, PyAny>,
    inv_perm: &Bound<'_, PyAny>,
    topk_ids: Option<&Bound<'_, PyAny>>,
    expert_map: Option<&Bound<'_, PyAny>>,
    topk_weights: Option<&Bound<'_, PyAny>>,
    out: &Bound<'_, PyAny>,
) -> PyResult<()> {
    let call = Call {
        rows: Array::new("rows", rows)?,
        inv_perm: Array::new("inv_perm", inv_perm)?,
        weights: Array::optional("topk_weights", topk_weights)?,
        out: Array::new("out", out)?,
    };
    let (_, hidden) = call.rows.matrix_shape("[M_sum, H]")?;
    let (tokens, _) = call.inv_perm.matrix_shape("[M, topk]")?;
    call.out.require_shape(&[tokens, hidden])?;
    let all = [Some(&call.rows), Some(&call.inv_perm), call.weights.as_ref(), Some(&call.out)];
    if let Some(ordinal) = Array::common_device(&all)? {
        call.apart(&[])?;
        call.rows.require_contiguous()?;
        call.out.require_contiguous()?;
        if topk_ids.is_some() {
            return Err(PyValueError::new_err(
                "topk_ids is given, expected None on a GPU, where a negative inv_perm says that a slot is empty",
            ));
        }
        return cuda::unpermute(py, ordinal, &call.rows, &call.inv_perm, call.weights.as_ref(), &call.out);
    }
    match topk_ids {
        Some(ids) => {
            // How many experts are local does not matter here: a map's negative entries say which are not.
            let most = i32::MAX.into_pyobject(py)?.into_any();
            let ids = Ids::new(ids, expert_map, &most)?;
            let apart = call.apart(&ids.arrays())?;
            ids.routing(|routing| call.from(py, Some(&routing), apart))
        }
        None if expert_map.is_some() => {
            Err(PyValueError::new_err("topk_ids is None, expected ids for the expert_map to translate"))
        }
        None => call.from(py, None, call.apart(&[])?),
    }
}

struct Call<'py> {
    rows: Array<'py>,
    inv_perm: Array<'py>,
    weights: Option<Array<'py>>,
    out: Array<'py>,
}

impl Call<'_> {
    fn apart(&self, ids: &[Option<&Array<'_>>]) -> PyResult<Apart> {
        let mut inputs = vec![Some(&self.rows), Some(&self.inv_perm), self.weights.as_ref()];
        inputs.extend(ids);
        Apart::check(&[&self.out], &inputs)
    }

    fn from(&self, py: Python<'_>, routing: Option<&Routing<'_>>, apart: Apart) -> PyResult<()> {
        match self.rows.element() {
            Element::Bf16 => self.to::<bf16>(py, routing, apart),
            Element::F16 => self.to::<f16>(py, routing, apart),
            Element::F32 => self.to::<f32>(py, routing, apart),
            _ => Err(self.rows.dtype_error("bfloat16, float16 or float32")),
        }
    }

    fn to<T: Native + Float>(&self, py: Python<'_>, routing: Option<&Routing<'_>>, apart: Apart) -> PyResult<()> {
        let cpu = cpu()?;
        match self.out.element() {
            Element::Bf16 => self.run::<T, bf16>(py, &cpu, routing, apart),
            Element::F16 => self.run::<T, f16>(py, &cpu, routing, apart),
            Element::F32 => self.run::<T, f32>(py, &cpu, routing, apart),
            _ => Err(self.out.dtype_error("bfloat16, float16 or float32")),
        }
    }

    fn run<T: Native + Float, O: Native + Float>(
        &self,
        py: Python<'_>,
        cpu: &Cpu,
        routing: Option<&Routing<'_>>,
        apart: Apart,
    ) -> PyResult<()> {
        let weights: Option<MatrixRef<'_, f32>> = self.weights.as_ref().map(Array::matrix).transpose()?;
        let (rows, inv_perm) = (self.rows.matrix::<T>()?, self.inv_perm.matrix()?);
        let out = self.out.contiguous_mut::<O>(apart)?;
        py.detach(|| cpu::unpermute_slots(cpu, rows, inv_perm, routing, weights, out)).map_err(exception)
    }
}
