//! Row numbers that say by themselves which slots are empty, as all of ours do: the way back need not look at ids then.
//!
//! A tensor carries the mark as an attribute, with the count that torch keeps of the writes to it: what anybody has
//! written since is no longer ours. Tensors of inference are not counted; they are ours while they are the same object.

use pyo3::intern;
use pyo3::prelude::*;

const MARK: &str = "_expertile_complete_at";

/// Torch's count of the writes to a tensor; None where it keeps none.
fn version<'py>(tensor: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
    let py = tensor.py();
    if tensor.call_method0(intern!(py, "is_inference"))?.is_truthy()? {
        return Ok(py.None().into_bound(py));
    }
    tensor.getattr(intern!(py, "_version"))
}

/// Says of a tensor of row numbers that it has a negative one for every empty slot.
#[pyfunction]
pub(crate) fn mark_complete(inv_perm: &Bound<'_, PyAny>) -> PyResult<()> {
    inv_perm.setattr(intern!(inv_perm.py(), MARK), version(inv_perm)?)
}

/// Whether that was said, and nothing has been written since.
#[pyfunction]
pub(crate) fn is_complete(inv_perm: &Bound<'_, PyAny>) -> PyResult<bool> {
    match inv_perm.getattr_opt(intern!(inv_perm.py(), MARK))? {
        Some(at) => at.eq(version(inv_perm)?),
        None => Ok(false),
    }
}
