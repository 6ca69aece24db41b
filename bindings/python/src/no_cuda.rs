//! In the place of `cuda.rs` where the extension is built without its feature `cuda`: every call says so.

use crate::array::Array;
use crate::operands::{Ids, LayoutTarget, Lists, Rows};
use expertile::{Plan, ScaleFormat};
use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use pyo3::types::PyTuple;

const MISSING: &str = "cuda is not part of this build of expertile, expected a build with the feature \"cuda\"";

fn missing<T>() -> PyResult<T> {
    Err(PyRuntimeError::new_err(MISSING))
}

pub(crate) fn build_layout(_: Python<'_>, _: usize, _: &LayoutTarget<'_>) -> PyResult<()> {
    missing()
}

pub(crate) fn permute(_: Python<'_>, _: usize, _: &LayoutTarget<'_>, _: &Rows<'_>) -> PyResult<()> {
    missing()
}

pub(crate) fn permute_to_lists(
    _: Python<'_>,
    _: usize,
    _: &Ids<'_>,
    _: Plan,
    _: &Rows<'_>,
    _: &Lists<'_>,
) -> PyResult<()> {
    missing()
}

pub(crate) fn quantize_permute(
    _: Python<'_>,
    _: usize,
    _: &LayoutTarget<'_>,
    _: (&Array<'_>, Option<&Array<'_>>, &Array<'_>, &Array<'_>),
    _: ScaleFormat,
    _: bool,
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

/// Nothing to check.
#[pyfunction]
pub(crate) fn cuda_check(ordinal: usize) -> PyResult<()> {
    let _ = ordinal;
    missing()
}

/// A layer on a GPU, of which there is none.
#[pyclass(frozen, module = "expertile._native")]
pub(crate) struct CudaLayer {}

#[pymethods]
impl CudaLayer {
    #[new]
    #[pyo3(signature = (*_weights, **_options))]
    fn new(_weights: &Bound<'_, PyTuple>, _options: Option<&Bound<'_, pyo3::types::PyDict>>) -> PyResult<Self> {
        missing()
    }
}

/// A layer over several GPUs, of which there is none.
#[pyclass(frozen, module = "expertile._native")]
pub(crate) struct CudaExpertParallelLayer {}

#[pymethods]
impl CudaExpertParallelLayer {
    #[new]
    #[pyo3(signature = (*_weights, **_options))]
    fn new(_weights: &Bound<'_, PyTuple>, _options: Option<&Bound<'_, pyo3::types::PyDict>>) -> PyResult<Self> {
        missing()
    }
}

/// The grouped GEMM on a GPU, of which there is none.
#[pyclass(frozen, module = "expertile._native")]
pub(crate) struct CudaGemm {}

#[pymethods]
impl CudaGemm {
    #[new]
    #[pyo3(signature = (*_weights))]
    fn new(_weights: &Bound<'_, PyTuple>) -> PyResult<Self> {
        missing()
    }
}
