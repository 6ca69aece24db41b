//! Rows back to their tokens.

use crate::array::{Apart, Array, Element, Native};
use crate::autograd::written;
use crate::cuda;
use crate::error::exception;
use crate::limits;
use crate::permute::Ids;
use crate::pool::{cpu, work};
use expertile::cpu::{self, Cpu};
use expertile::{Error, Float, MatrixRef, Routing};
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
    if topk_ids.is_none() && expert_map.is_some() {
        return Err(PyValueError::new_err("topk_ids is None, expected ids for the expert_map to translate"));
    }
    let call = Call {
        rows: Array::new("rows", rows)?,
        inv_perm: Array::new("inv_perm", inv_perm)?,
        weights: Array::optional("topk_weights", topk_weights)?,
        out: Array::output("out", out)?,
    };
    if let Some(ordinal) = call.device()? {
        if topk_ids.is_some() {
            return Err(PyValueError::new_err(
                "topk_ids is given, expected None on a GPU, where a negative inv_perm says that a slot is empty",
            ));
        }
        return call.on_gpu(py, ordinal);
    }
    match topk_ids {
        Some(ids) => {
            // How many experts are local does not matter here: a map's negative entries say which are not.
            let most = i32::MAX.into_pyobject(py)?.into_any();
            let ids = Ids::new(ids, expert_map, &most)?;
            let apart = call.apart(&ids.arrays())?;
            ids.routing(py, |routing| call.from(py, Some(&routing), apart))?;
        }
        None => call.from(py, None, call.apart(&[None, None])?)?,
    }
    written(py, &[&call.out])
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
    if rows.device().is_none() {
        return Ok(false);
    }
    let (inv_perm, weights) = (Array::new("inv_perm", inv_perm)?, Array::new("topk_weights", topk_weights)?);
    let call = Call { rows, inv_perm, weights: Some(weights), out: Array::output("out", out)? };
    if !call.is_direct() {
        return Ok(false);
    }
    let Some(ordinal) = call.device()? else { return Ok(false) };
    call.on_gpu(py, ordinal).map(|()| true)
}

struct Call<'py> {
    rows: Array<'py>,
    inv_perm: Array<'py>,
    weights: Option<Array<'py>>,
    out: Array<'py>,
}

impl Call<'_> {
    /// Where all of it is; fails unless the shapes go together.
    fn device(&self) -> PyResult<Option<usize>> {
        let (_, hidden) = self.rows.matrix_shape("two dimensions")?;
        let (tokens, topk) = self.inv_perm.matrix_shape("two dimensions")?;
        limits::slots(tokens, topk)?;
        limits::at_most("hidden", hidden, limits::HIDDEN)?;
        self.out.require_shape(&[tokens, hidden])?;
        Array::common_device(&[Some(&self.rows), Some(&self.inv_perm), self.weights.as_ref(), Some(&self.out)])
    }

    /// Whether a GPU can work on it without a copy.
    fn is_direct(&self) -> bool {
        let weights = self.weights.as_ref();
        [&self.rows, &self.inv_perm, &self.out].iter().all(|array| array.require_contiguous().is_ok())
            && weights.is_none_or(|weights| weights.element() == Element::F32)
    }

    fn on_gpu(&self, py: Python<'_>, ordinal: usize) -> PyResult<()> {
        self.apart(&[None, None])?;
        self.rows.require_contiguous()?;
        self.out.require_contiguous()?;
        cuda::unpermute(py, ordinal, &self.rows, &self.inv_perm, self.weights.as_ref(), &self.out)?;
        written(py, &[&self.out])
    }

    fn apart(&self, ids: &[Option<&Array<'_>>; 2]) -> PyResult<Apart> {
        let &[ids, map] = ids;
        Apart::check(&[&self.out], &[Some(&self.rows), Some(&self.inv_perm), self.weights.as_ref(), ids, map])
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
        /// Products between looks at whether the caller has been interrupted: a fraction of a second.
        const PRODUCTS_AT_ONCE: usize = 1 << 28;
        let (tokens, topk) = self.inv_perm.matrix_shape("two dimensions")?;
        let (rows, out) = (self.rows.matrix::<T>()?, self.out.contiguous_mut::<O>(apart)?);
        let inv_perm = self.inv_perm.copied_matrix::<i32>(py)?;
        let hidden = rows.cols();
        let at_once = (PRODUCTS_AT_ONCE / (topk * hidden).max(1)).max(1);
        if tokens <= at_once {
            let inv_perm = MatrixRef::new(&inv_perm, tokens, topk).map_err(exception)?;
            let weights: Option<MatrixRef<'_, f32>> = self.weights.as_ref().map(Array::matrix).transpose()?;
            let call = || cpu::unpermute_slots(cpu, rows, inv_perm, routing, weights, out).map_err(exception);
            return work(py, call);
        }
        if let Some(weights) = &self.weights {
            weights.require_shape(&[tokens, topk])?;
            weights.require_dtype::<f32>()?;
        }
        let live = work(py, || live_slots(inv_perm, (tokens, topk), routing, rows.rows()))?;
        for first in (0..tokens).step_by(at_once) {
            let part = first..tokens.min(first + at_once);
            let slots = &live[part.start * topk..part.end * topk];
            let slots = MatrixRef::new(slots, part.len(), topk).map_err(exception)?;
            let weights = self.weights.as_ref().map(|weights| weights.matrix_rows::<f32>(part.clone())).transpose()?;
            let out = &mut out[part.start * hidden..part.end * hidden];
            work(py, || cpu::unpermute_slots(cpu, rows, slots, None, weights, out).map_err(exception))?;
            py.check_signals()?;
        }
        Ok(())
    }
}

/// `inv_perm [M, topk]` with -1 in every slot that `routing` says is empty, once all of it has been checked.
fn live_slots(
    mut inv_perm: Vec<i32>,
    (tokens, topk): (usize, usize),
    routing: Option<&Routing<'_>>,
    rows: usize,
) -> PyResult<Vec<i32>> {
    if let Some(routing) = routing.filter(|routing| (routing.tokens(), routing.topk()) != (tokens, topk)) {
        let actual = vec![routing.tokens(), routing.topk()];
        let expected = format!("[{tokens}, {topk}], as inv_perm");
        return Err(exception(Error::Shape { argument: "topk_ids", actual, expected }));
    }
    for (index, row) in inv_perm.iter_mut().enumerate() {
        let (token, slot) = (index / topk, index % topk);
        if *row < 0 || routing.is_some_and(|routing| routing.local_expert(token, slot).is_none()) {
            *row = -1;
        } else if *row as usize >= rows {
            return Err(exception(Error::SlotRow { token, slot, row: *row, rows }));
        }
    }
    Ok(inv_perm)
}
