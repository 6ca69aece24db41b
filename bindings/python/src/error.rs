//! Errors of the library as exceptions, and numbers that come in as arguments.
//!
//! What is wrong with an argument is one of the classes of `expertile._errors`, which carry its name, what was found
//! and what was expected as attributes: nobody has to read a message.

use expertile::Error;
use pyo3::exceptions::{PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use pyo3::{IntoPyObjectExt, PyErrArguments, import_exception};

import_exception!(expertile._errors, ArgumentDeviceError);
import_exception!(expertile._errors, ArgumentMemoryError);
import_exception!(expertile._errors, ArgumentTypeError);
import_exception!(expertile._errors, ArgumentValueError);

/// A value as Python's.
pub(crate) enum Actual {
    Nothing,
    Integer(i128),
    Integers(Vec<i128>),
    Float(f32),
    Text(String),
    Object(Py<PyAny>),
}

impl From<usize> for Actual {
    fn from(value: usize) -> Self {
        Self::Integer(value as i128)
    }
}

impl From<&[usize]> for Actual {
    fn from(values: &[usize]) -> Self {
        Self::Integers(values.iter().map(|&value| value as i128).collect())
    }
}

impl From<&[isize]> for Actual {
    fn from(values: &[isize]) -> Self {
        Self::Integers(values.iter().map(|&value| value as i128).collect())
    }
}

impl From<&str> for Actual {
    fn from(text: &str) -> Self {
        Self::Text(text.into())
    }
}

impl From<&Bound<'_, PyAny>> for Actual {
    fn from(object: &Bound<'_, PyAny>) -> Self {
        Self::Object(object.clone().unbind())
    }
}

/// An argument that does not fit: the fields of Python's `ArgumentError`.
pub(crate) struct Wrong {
    argument: String,
    found: String,
    actual: Actual,
    expected: String,
    other: Option<&'static str>,
}

impl Wrong {
    /// The message is `{argument} {found}, expected {expected}`.
    pub(crate) fn new(
        argument: impl Into<String>,
        found: impl std::fmt::Display,
        actual: impl Into<Actual>,
        expected: impl Into<String>,
    ) -> Self {
        Self::of(argument, format!(" {found}"), actual.into(), expected)
    }

    /// An element of an argument: `{argument}{index} is {value}, expected {expected}`.
    fn element(
        argument: impl Into<String>,
        index: impl std::fmt::Display,
        value: i128,
        expected: impl Into<String>,
    ) -> Self {
        Self::of(argument, format!("{index} is {value}"), Actual::Integer(value), expected)
    }

    fn of(argument: impl Into<String>, found: String, actual: Actual, expected: impl Into<String>) -> Self {
        Self { argument: argument.into(), found, actual, expected: expected.into(), other: None }
    }

    /// A number, as it is written.
    pub(crate) fn number(argument: impl Into<String>, actual: usize, expected: impl Into<String>) -> Self {
        Self::new(argument, format_args!("is {actual}"), actual, expected)
    }

    /// A word, in quotes.
    pub(crate) fn word(argument: impl Into<String>, actual: &str, expected: impl Into<String>) -> Self {
        Self::new(argument, format_args!("is \"{actual}\""), actual, expected)
    }

    /// An array that is too short.
    pub(crate) fn short(argument: impl Into<String>, actual: usize, needed: usize) -> Self {
        Self::new(argument, format_args!("holds {actual} elements"), actual, format!("at least {needed}"))
    }

    /// One of an expert's counts.
    pub(crate) fn count(
        argument: impl Into<String>,
        expert: usize,
        actual: impl Into<i128>,
        expected: impl Into<String>,
    ) -> Self {
        Self::element(argument, format_args!("[{expert}]"), actual.into(), expected)
    }

    /// The same, where `found` ends in another argument's name.
    pub(crate) fn beside(self, other: &'static str) -> Self {
        Self { other: Some(other), ..self }
    }

    pub(crate) fn value(self) -> PyErr {
        ArgumentValueError::new_err(self)
    }

    pub(crate) fn of_type(self) -> PyErr {
        ArgumentTypeError::new_err(self)
    }

    pub(crate) fn of_memory(self) -> PyErr {
        ArgumentMemoryError::new_err(self)
    }

    fn of_device(self) -> PyErr {
        ArgumentDeviceError::new_err(self)
    }

    /// With what a message ends in besides.
    pub(crate) fn noting(self, note: &str) -> Self {
        Self { expected: format!("{} ({note})", self.expected), ..self }
    }
}

impl PyErrArguments for Wrong {
    fn arguments(self, py: Python<'_>) -> Py<PyAny> {
        let actual = match self.actual {
            Actual::Nothing => Ok(py.None()),
            Actual::Integer(value) => value.into_py_any(py),
            Actual::Integers(values) => values.into_py_any(py),
            Actual::Float(value) => value.into_py_any(py),
            Actual::Text(text) => text.into_py_any(py),
            Actual::Object(object) => Ok(object),
        };
        let actual = actual.unwrap_or_else(|_| py.None());
        (self.argument, self.found, actual, self.expected, self.other).arguments(py)
    }
}

/// `TypeError` for an element type, `MemoryError` for memory that cannot be had, `RuntimeError` for what a machine
/// lacks or fails at, `ValueError` for everything else.
pub(crate) fn exception(error: Error) -> PyErr {
    match wrong(error) {
        Ok((wrong, Kind::Value)) => wrong.value(),
        Ok((wrong, Kind::Type)) => wrong.of_type(),
        Ok((wrong, Kind::Memory)) => wrong.of_memory(),
        Ok((wrong, Kind::Device)) => wrong.of_device(),
        Err(
            error @ (Error::Cuda { .. }
            | Error::Kernel { .. }
            | Error::Absent { .. }
            | Error::Mpi { .. }
            | Error::Nccl { .. }),
        ) => PyRuntimeError::new_err(error.to_string()),
        Err(error) => PyValueError::new_err(error.to_string()),
    }
}

/// Which of Python's exceptions an error is.
#[derive(Clone, Copy)]
pub(crate) enum Kind {
    Value,
    Type,
    Memory,
    Device,
}

/// The fields of an error that is about an argument; any other error as it is.
pub(crate) fn wrong(error: Error) -> Result<(Wrong, Kind), Error> {
    let value = |wrong| Ok((wrong, Kind::Value));
    match error {
        Error::Shape { argument, actual, expected } => {
            value(Wrong::new(argument, format_args!("has shape {actual:?}"), &actual[..], expected))
        }
        Error::Stride { argument, actual, expected } => {
            value(Wrong::new(argument, format_args!("has strides {actual:?}"), &actual[..], expected))
        }
        Error::Dtype { argument, actual, expected } => {
            let shown = actual.to_string();
            Ok((Wrong::new(argument, format_args!("has dtype {shown}"), &shown[..], expected), Kind::Type))
        }
        Error::Device { argument, actual, expected } => {
            Ok((Wrong::new(argument, format_args!("is {actual}"), &actual[..], expected), Kind::Device))
        }
        Error::Value { argument, actual, expected } => {
            value(Wrong::of(argument, format!(" is {actual}"), Actual::Integer(actual), expected))
        }
        Error::Parameter { argument, actual, expected } => {
            value(Wrong::of(argument, format!(" is {actual}"), Actual::Float(actual), expected))
        }
        Error::Alignment { actual, expected } => value(Wrong::number("alignment", actual, expected)),
        Error::Name { argument, actual, expected } => {
            value(Wrong::word(argument, &actual, format!("one of {expected}")))
        }
        Error::ExpertId { token, slot, id, limit } => {
            let expected = format!("an id below {limit} (or a negative one for an empty slot)");
            value(Wrong::element("topk_ids", format_args!("[{token}, {slot}]"), id.into(), expected))
        }
        Error::MapEntry { index, value: entry, local_experts } => {
            let expected = format!("a local expert below {local_experts} (or a negative value)");
            value(Wrong::count("expert_map", index, entry, expected))
        }
        Error::RowExpert { row, id, local_experts } => {
            let expected = format!("a local expert below {local_experts} (or a negative value for padding)");
            value(Wrong::element("m_indices", format_args!("[{row}]"), id.into(), expected))
        }
        Error::SlotRow { token, slot, row, rows } => {
            let expected = format!("a row below {rows} (or a negative one for an empty slot)");
            value(Wrong::element("inv_perm", format_args!("[{token}, {slot}]"), row.into(), expected))
        }
        Error::Count { argument, expert, actual, expected } => value(Wrong::count(argument, expert, actual, expected)),
        Error::MSum { m_sum, needed, alignment } => {
            let expected = format!("at least {needed} for these counts at alignment {alignment}");
            value(Wrong::number("m_sum", m_sum, expected))
        }
        Error::Overflow { what, detail } => {
            value(Wrong::of(what, format!(" overflows: {detail}"), Actual::Text(detail), "a result that fits"))
        }
        Error::BufferTooSmall { argument, actual, needed } => value(Wrong::short(argument, actual, needed)),
        Error::Memory { what, bytes } => Ok((
            Wrong::new(what, format_args!("takes {bytes} bytes"), bytes, "no more than memory can be had for"),
            Kind::Memory,
        )),
        Error::WeightFormat { argument, actual, expected } => {
            value(Wrong::new(argument, format_args!("is packed as {actual}"), actual, expected))
        }
        other => Err(other),
    }
}

/// A count or a size: any Python integer that is not negative.
pub(crate) fn size(argument: &str, value: &Bound<'_, PyAny>) -> PyResult<usize> {
    if let Ok(size) = value.extract::<usize>() {
        return Ok(size);
    }
    let shown = value.repr()?;
    let is = |expected: String| Wrong::new(argument, format_args!("is {shown}"), value, expected).value();
    let most = || format!("at most {}", usize::MAX);
    let expected = "an integer of at least 0";
    Err(match value.extract::<i128>() {
        Ok(0..) => is(most()),
        Ok(_) => is(expected.into()),
        Err(_) if value.is_instance_of::<pyo3::types::PyInt>() => is(most()),
        Err(_) => {
            let kind = value.get_type().name()?;
            Wrong::new(argument, format_args!("is {shown} ({kind})"), value, expected).of_type()
        }
    })
}

/// The same, where `None` may stand for nothing.
pub(crate) fn optional_size(argument: &str, value: Option<&Bound<'_, PyAny>>) -> PyResult<Option<usize>> {
    value.map(|value| size(argument, value)).transpose()
}
