//! Rows back to their tokens.

use crate::array::{Apart, Array, Element, Native};
use crate::autograd::written;
use crate::cuda;
use crate::error::{Actual, Wrong, exception};
use crate::limits;
use crate::operands::Ids;
use crate::pool::{cpu, work};
use expertile::cpu;
use expertile::{Error, Float, MatrixRef, Routing};
use half::{bf16, f16};
use pyo3::prelude::*;
use std::ops::Range;

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
        let expected = "ids for the expert_map to translate";
        return Err(Wrong::new("topk_ids", "is None", Actual::Nothing, expected).value());
    }
    let call = Call {
        rows: Array::new("rows", rows)?,
        inv_perm: Array::new("inv_perm", inv_perm)?,
        weights: Array::optional("topk_weights", topk_weights)?,
        out: Array::output("out", out)?,
    };
    if let Some(ordinal) = call.device()? {
        if let Some(ids) = topk_ids {
            let expected = "None on a GPU, where a negative inv_perm says that a slot is empty";
            return Err(Wrong::new("topk_ids", "is given", ids, expected).value());
        }
        return call.on_gpu(py, ordinal);
    }
    let ids = match topk_ids {
        Some(ids) => {
            // How many experts are local does not matter here: a map's negative entries say which are not.
            let ids = Ids::new(ids, expert_map, &i32::MAX.into_pyobject(py)?.into_any())?;
            ids.ids.require_shape(call.inv_perm.shape())?;
            Some(ids)
        }
        None => None,
    };
    let apart = call.apart(&ids.as_ref().map_or([None, None], Ids::arrays))?;
    let done = call.from(py, ids.as_ref(), apart);
    // Also after an interruption, which leaves rows that are done.
    written(py, &[&call.out])?;
    done
}

pub(crate) struct Call<'py> {
    pub(crate) rows: Array<'py>,
    pub(crate) inv_perm: Array<'py>,
    pub(crate) weights: Option<Array<'py>>,
    pub(crate) out: Array<'py>,
}

impl Call<'_> {
    /// Where all of it is; fails unless the shapes go together. An expanded array says that it has any number of slots:
    /// none is read, and no memory asked for, before they are known to be those of `out`.
    pub(crate) fn device(&self) -> PyResult<Option<usize>> {
        let (_, hidden) = self.rows.matrix_shape("two dimensions")?;
        let (tokens, topk) = self.inv_perm.matrix_shape("two dimensions")?;
        limits::slots(tokens, topk)?;
        limits::at_most("hidden", hidden, limits::HIDDEN)?;
        if hidden == 0 {
            return Err(exception(Error::Value { argument: "hidden", actual: 0, expected: "at least 1".into() }));
        }
        self.out.require_shape(&[tokens, hidden])?;
        if let Some(weights) = &self.weights {
            weights.require_shape(&[tokens, topk])?;
        }
        Array::common_device(&[Some(&self.rows), Some(&self.inv_perm), self.weights.as_ref(), Some(&self.out)])
    }

    /// Whether a GPU can work on it without a copy.
    pub(crate) fn is_direct(&self) -> bool {
        let weights = self.weights.as_ref();
        [&self.rows, &self.inv_perm, &self.out].iter().all(|array| array.require_contiguous().is_ok())
            && weights.is_none_or(|weights| weights.element() == Element::F32)
    }

    pub(crate) fn on_gpu(&self, py: Python<'_>, ordinal: usize) -> PyResult<()> {
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

    fn from(&self, py: Python<'_>, ids: Option<&Ids<'_>>, apart: Apart) -> PyResult<()> {
        match self.rows.element() {
            Element::Bf16 => self.to::<bf16>(py, ids, apart),
            Element::F16 => self.to::<f16>(py, ids, apart),
            Element::F32 => self.to::<f32>(py, ids, apart),
            _ => Err(self.rows.dtype_error("bfloat16, float16 or float32")),
        }
    }

    fn to<T: Native + Float>(&self, py: Python<'_>, ids: Option<&Ids<'_>>, apart: Apart) -> PyResult<()> {
        match self.out.element() {
            Element::Bf16 => self.run::<T, bf16>(py, ids, apart),
            Element::F16 => self.run::<T, f16>(py, ids, apart),
            Element::F32 => self.run::<T, f32>(py, ids, apart),
            _ => Err(self.out.dtype_error("bfloat16, float16 or float32")),
        }
    }

    /// Hands copies of some tokens' slots to `then`, and the routing that says which are empty, if there are ids.
    fn slots(
        &self,
        py: Python<'_>,
        tokens: Range<usize>,
        (ids, map): (Option<&Ids<'_>>, Option<&[i32]>),
        then: impl FnOnce(MatrixRef<'_, i32>, Option<&Routing<'_>>) -> PyResult<()>,
    ) -> PyResult<()> {
        let (_, topk) = self.inv_perm.matrix_shape("two dimensions")?;
        let copy = self.inv_perm.copied_rows::<i32>(py, tokens.clone())?;
        let slots = MatrixRef::new(&copy, tokens.len(), topk).map_err(exception)?;
        match ids {
            Some(ids) => ids.routing_of(py, tokens, map, |routing| then(slots, Some(&routing))),
            None => then(slots, None),
        }
    }

    /// Some tokens at a time; in between it looks whether it has been interrupted. Where that is more than once, all
    /// slots are checked before the first sum is written, and those of a stretch again with it: only these are ever
    /// copied.
    fn run<T: Native + Float, O: Native + Float>(
        &self,
        py: Python<'_>,
        ids: Option<&Ids<'_>>,
        apart: Apart,
    ) -> PyResult<()> {
        let (tokens, topk) = self.inv_perm.matrix_shape("two dimensions")?;
        let (rows, out) = (self.rows.matrix::<T>()?, self.out.contiguous_mut::<O>(apart)?);
        let (hidden, cpu) = (rows.cols(), cpu()?);
        let map = ids.map_or(Ok(None), |ids| ids.map_list(py))?;
        let map = map.as_deref();
        let stretches = || limits::stretches(tokens, limits::at_once(topk * hidden));
        if stretches().nth(1).is_some() {
            if let Some(weights) = &self.weights {
                weights.matrix::<f32>()?;
            }
            for part in stretches() {
                let first = part.start;
                self.slots(py, part, (ids, map), |slots, routing| {
                    work(py, || require_rows(slots, routing, first, rows.rows()))
                })?;
            }
        }
        for part in stretches() {
            let weights = self.weights.as_ref().map(|weights| weights.matrix_rows::<f32>(part.clone())).transpose()?;
            let out = &mut out[part.start * hidden..part.end * hidden];
            let end = part.end;
            self.slots(py, part, (ids, map), |slots, routing| {
                work(py, || cpu::unpermute_slots(&cpu, rows, slots, routing, weights, out).map_err(exception))
            })?;
            if end < tokens {
                py.check_signals()?;
            }
        }
        Ok(())
    }
}

/// Fails unless all live slots of some tokens name rows that there are.
fn require_rows(slots: MatrixRef<'_, i32>, routing: Option<&Routing<'_>>, first: usize, rows: usize) -> PyResult<()> {
    for token in 0..slots.rows() {
        for slot in 0..slots.cols() {
            let row = slots.get(token, slot);
            let live = row >= 0 && routing.is_none_or(|routing| routing.local_expert(token, slot).is_some());
            if live && row as usize >= rows {
                return Err(exception(Error::SlotRow { token: token + first, slot, row, rows }));
            }
        }
    }
    Ok(())
}
