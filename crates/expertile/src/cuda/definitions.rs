//! Values that kernels are specialised for, as the compiler's macros.

use super::arguments::require_int;
use crate::activation::Activation;
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::quantize::{ScaleFormat, ScaleLayout, ScaleRounding};

/// Definitions that describe scales.
pub(super) fn scale_definitions(format: ScaleFormat, width: usize) -> Result<Vec<(&'static str, i64)>> {
    format.groups(width)?;
    let layout = match format.layout() {
        ScaleLayout::RowMajor => 0,
        ScaleLayout::MnMajor => 1,
        ScaleLayout::PackedUe8m0 => 2,
    };
    Ok(vec![
        ("WIDTH", i64::from(require_int("hidden", width)?)),
        ("GROUP", format.group().size() as i64),
        ("SCALE_LAYOUT", layout),
        ("POWER_OF_TWO", i64::from(format.rounding() == ScaleRounding::PowerOfTwo)),
    ])
}

/// The kernels' number for bf16 or f16.
pub(super) fn half_number(argument: &'static str, dtype: Dtype) -> Result<i64> {
    match dtype {
        Dtype::Bf16 => Ok(0),
        Dtype::F16 => Ok(1),
        actual => Err(Error::Dtype { argument, actual, expected: "bf16 or f16" }),
    }
}

/// The kernels' number for a float of 16 or 32 bits.
pub(super) fn float_number(argument: &'static str, dtype: Dtype) -> Result<i64> {
    match dtype {
        Dtype::F32 => Ok(2),
        Dtype::Bf16 | Dtype::F16 => half_number(argument, dtype),
        actual => Err(Error::Dtype { argument, actual, expected: "bf16, f16 or f32" }),
    }
}

/// Definitions that describe an activation.
///
/// # Errors
/// [`Error::Parameter`] as [`Activation::check`], [`Error::Name`] for one that the kernels do not compute.
pub(super) fn activation_definitions(activation: &Activation) -> Result<[(&'static str, i64); 4]> {
    activation.check()?;
    let &Activation::Swiglu { alpha, beta, limit } = activation else {
        let (argument, actual) = ("activation", activation.name().into());
        return Err(Error::Name { argument, actual, expected: "swiglu, on a GPU" });
    };
    let bits = |value: f32| i64::from(value.to_bits());
    Ok([
        ("ALPHA", bits(alpha)),
        ("BETA", bits(beta)),
        ("LIMITED", i64::from(limit.is_some())),
        ("LIMIT", bits(limit.unwrap_or(0.0))),
    ])
}
