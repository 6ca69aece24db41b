//! Errors of the library as exceptions, and numbers that come in as arguments.

use expertile::Error;
use pyo3::exceptions::{PyMemoryError, PyRuntimeError, PyTypeError, PyValueError};
use pyo3::prelude::*;

/// `TypeError` for an element type, `MemoryError` for memory that cannot be had, `RuntimeError` for what a machine lacks or
/// fails at, `ValueError` for everything else; the message is the library's.
pub(crate) fn exception(error: Error) -> PyErr {
    match error {
        Error::Dtype { .. } => PyTypeError::new_err(error.to_string()),
        Error::Memory { .. } => PyMemoryError::new_err(error.to_string()),
        Error::Device { .. } => PyRuntimeError::new_err(error.to_string()),
        #[cfg(feature = "cuda")]
        Error::Cuda { .. } | Error::Kernel { .. } => PyRuntimeError::new_err(error.to_string()),
        _ => PyValueError::new_err(error.to_string()),
    }
}

/// A count or a size: any Python integer that is not negative.
pub(crate) fn size(argument: &str, value: &Bound<'_, PyAny>) -> PyResult<usize> {
    let expected = "expected an integer of at least 0";
    if let Ok(size) = value.extract::<usize>() {
        return Ok(size);
    }
    let shown = value.repr()?;
    Err(match value.extract::<i128>() {
        Ok(0..) => PyValueError::new_err(format!("{argument} is {shown}, expected at most {}", usize::MAX)),
        Ok(_) => PyValueError::new_err(format!("{argument} is {shown}, {expected}")),
        Err(_) if value.is_instance_of::<pyo3::types::PyInt>() => {
            PyValueError::new_err(format!("{argument} is {shown}, expected at most {}", usize::MAX))
        }
        Err(_) => PyTypeError::new_err(format!("{argument} is {shown} ({}), {expected}", value.get_type().name()?)),
    })
}

/// The same, where `None` may stand for nothing.
pub(crate) fn optional_size(argument: &str, value: Option<&Bound<'_, PyAny>>) -> PyResult<Option<usize>> {
    value.map(|value| size(argument, value)).transpose()
}
