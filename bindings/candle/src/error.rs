//! Refusals as candle's own error type. Each names the argument, its value and what was expected.

use candle_core::{DType, Error, Layout, Result, Shape};

/// A value that does not fit.
pub(crate) fn refused(argument: &str, actual: impl std::fmt::Display, expected: impl std::fmt::Display) -> Error {
    Error::msg(format!("{argument} {actual}, expected {expected}"))
}

/// A tensor of the wrong element type.
pub(crate) fn wrong_dtype(argument: &'static str, got: DType, expected: DType) -> Error {
    Error::UnexpectedDType { msg: argument, expected, got }.bt()
}

/// A tensor of an element type that is none of several.
pub(crate) fn none_of_dtypes(argument: &str, got: DType, expected: &str) -> Error {
    refused(argument, format_args!("is {got:?}"), expected)
}

/// Fails unless a tensor has exactly these extents.
pub(crate) fn require_shape(argument: &str, layout: &Layout, expected: &[usize]) -> Result<()> {
    if layout.dims() != expected {
        let (expected, got) = (Shape::from(expected), layout.shape().clone());
        return Err(Error::UnexpectedShape { msg: argument.into(), expected, got }.bt());
    }
    Ok(())
}

/// The extents of a tensor of three dimensions.
pub(crate) fn three_extents(argument: &str, layout: &Layout, expected: &str) -> Result<[usize; 3]> {
    let three = <[usize; 3]>::try_from(layout.dims());
    three.map_err(|_| refused(argument, format_args!("is {:?}", layout.dims()), expected))
}
