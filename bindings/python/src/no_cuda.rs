//! In the place of `cuda.rs` where the extension is built without its feature `cuda`: every call says so.

use crate::array::Array;
use crate::permute::Place;
use expertile::ScaleFormat;
use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;

const MISSING: &str = "cuda is not part of this build of expertile, expected a build with the feature \"cuda\"";

fn missing<T>() -> PyResult<T> {
    Err(PyRuntimeError::new_err(MISSING))
}

pub(crate) fn build_layout(_: Python<'_>, _: usize, _: &Place<'_>, _: Option<&Array<'_>>) -> PyResult<()> {
    missing()
}

pub(crate) fn permute(
    _: Python<'_>,
    _: usize,
    _: &Place<'_>,
    _: (&Array<'_>, &Array<'_>),
    _: Option<(&Array<'_>, &Array<'_>, ScaleFormat)>,
    _: bool,
    _: Option<&Array<'_>>,
) -> PyResult<()> {
    missing()
}

pub(crate) fn quantize_permute(
    _: Python<'_>,
    _: usize,
    _: &Place<'_>,
    _: (&Array<'_>, Option<&Array<'_>>, &Array<'_>, &Array<'_>),
    _: ScaleFormat,
    _: bool,
    _: Option<&Array<'_>>,
) -> PyResult<()> {
    missing()
}

pub(crate) fn unpermute(
    _: Python<'_>,
    _: usize,
    _: &Array<'_>,
    _: &Array<'_>,
    _: Option<&Array<'_>>,
    _: &Array<'_>,
) -> PyResult<()> {
    missing()
}

/// Why CUDA tensors cannot be used.
#[pyfunction]
pub(crate) fn cuda_unavailable() -> Option<String> {
    Some(MISSING.into())
}

/// No workspace.
#[pyfunction]
pub(crate) fn cuda_workspace_bytes(
    ordinal: usize,
    tokens: usize,
    local_experts: usize,
    hidden: usize,
) -> PyResult<usize> {
    let _ = (ordinal, tokens, local_experts, hidden);
    missing()
}

/// Nothing to check.
#[pyfunction]
pub(crate) fn cuda_check(ordinal: usize) -> PyResult<()> {
    let _ = ordinal;
    missing()
}
