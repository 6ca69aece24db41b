//! int4: 4-bit weights in groups of 32 that share a bf16 or f16 scale.
//!
//! ```text
//! blocks [N, K/2]  bytes: value k is the low nibble of byte k / 2 where k is even, else the high one
//! scales [N, K/32] bf16 or f16
//! weight = (nibble - 8) * scale
//! ```
//!
//! That is compressed-tensors' `pack-quantized` with 4 bits, symmetric, in groups of 32 (Kimi-K2 Thinking): its `I32`
//! words `[N, K/8]` hold eight values each, the first in the lowest bits, which in memory are these bytes.

use crate::error::{Error, Result, require_exact};
use crate::matrix::MatrixRef;
use half::{bf16, f16};

/// Consecutive values of K that share a scale.
pub const GROUP: usize = 32;

/// The value of every nibble, in units of the scale.
pub const VALUES: [f32; 16] = [-8.0, -7.0, -6.0, -5.0, -4.0, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0];

/// Scales `[R, K/32]` of int4 rows.
#[derive(Debug, Clone, Copy)]
pub enum Int4Scales<'a> {
    /// bf16.
    Bf16(MatrixRef<'a, bf16>),
    /// f16.
    F16(MatrixRef<'a, f16>),
}

impl Int4Scales<'_> {
    /// A scale, widened.
    #[must_use]
    pub fn get(&self, row: usize, group: usize) -> f32 {
        match self {
            Self::Bf16(scales) => scales.get(row, group).to_f32(),
            Self::F16(scales) => scales.get(row, group).to_f32(),
        }
    }

    /// `R`.
    #[must_use]
    pub fn rows(&self) -> usize {
        match self {
            Self::Bf16(scales) => scales.rows(),
            Self::F16(scales) => scales.rows(),
        }
    }

    /// `K/32`.
    #[must_use]
    pub fn cols(&self) -> usize {
        match self {
            Self::Bf16(scales) => scales.cols(),
            Self::F16(scales) => scales.cols(),
        }
    }

    fn bits(&self, row: usize, group: usize) -> u16 {
        match self {
            Self::Bf16(scales) => scales.get(row, group).to_bits(),
            Self::F16(scales) => scales.get(row, group).to_bits(),
        }
    }

    /// The name of their type.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Bf16(_) => "bf16",
            Self::F16(_) => "f16",
        }
    }

    /// Every `step`-th row from `first` on, `count` of them.
    pub(crate) fn every(&self, first: usize, step: usize, count: usize) -> Self {
        match self {
            Self::Bf16(scales) => Self::Bf16(scales.every(first, step, count)),
            Self::F16(scales) => Self::F16(scales.every(first, step, count)),
        }
    }

    /// Fails for another shape, and for a scale that is no number, naming its place.
    pub(crate) fn check(&self, rows: usize, groups: usize, first_row: usize) -> Result<()> {
        if (self.rows(), self.cols()) != (rows, groups) {
            return Err(Error::shape("scales", &[self.rows(), self.cols()], format!("[{rows}, {groups}]")));
        }
        for row in 0..rows {
            for group in 0..groups {
                if !self.get(row, group).is_finite() {
                    let (bits, name) = (self.bits(row, group), self.name());
                    let row = first_row + row;
                    let expected = format!("the bits of a finite {name}: that of row {row}, group {group} is none");
                    return Err(Error::value("scales", bits.into(), expected));
                }
            }
        }
        Ok(())
    }
}

/// Scales to a row of `k` weights.
///
/// # Errors
/// [`Error::Value`] unless `k` is a positive multiple of 32.
pub fn groups(k: usize) -> Result<usize> {
    if k == 0 || !k.is_multiple_of(GROUP) {
        return Err(Error::value("k", k, format!("a positive multiple of {GROUP} for int4 weights")));
    }
    Ok(k / GROUP)
}

/// The weight of a nibble (its low four bits count) and a scale; exact wherever f32 holds the product.
#[must_use]
#[inline]
pub fn decode(nibble: u8, scale: f32) -> f32 {
    VALUES[usize::from(nibble & 15)] * scale
}

/// Quantizes rows `values [R, K]` to `blocks [R, K/2]` and bf16 `scales [R, K/32]`: a group's scale is its largest
/// magnitude over 7, rounded to bf16, and values are rounded to nearest, ties to even, and held to -8 to 7.
///
/// # Errors
/// [`Error::Value`] as [`groups`]; [`Error::Shape`] unless there are as many values as blocks and scales say;
/// [`Error::Parameter`] for a value that is not finite, which no scale could say.
pub fn quantize_rows(values: &[f32], k: usize, blocks: &mut [u8], scales: &mut [bf16]) -> Result<()> {
    let (groups, rows) = (groups(k)?, values.len() / k);
    require_exact("values", values.len(), &[rows, k])?;
    require_exact("blocks", blocks.len(), &[rows, k / 2])?;
    require_exact("scales", scales.len(), &[rows, groups])?;
    if let Some(&actual) = values.iter().find(|value| !value.is_finite()) {
        return Err(Error::Parameter { argument: "values", actual, expected: "finite numbers" });
    }
    let groups = values.as_chunks::<GROUP>().0.iter();
    for ((values, bytes), scale) in groups.zip(blocks.chunks_exact_mut(GROUP / 2)).zip(scales) {
        let amax = values.iter().fold(0f32, |most, value| most.max(value.abs()));
        *scale = bf16::from_f32(amax / 7.0);
        let divisor = if scale.to_f32() == 0.0 { 1.0 } else { scale.to_f32() };
        let nibble = |value: f32| ((value / divisor).round_ties_even().clamp(-8.0, 7.0) + 8.0) as u8;
        for (byte, &[even, odd]) in bytes.iter_mut().zip(values.as_chunks::<2>().0) {
            *byte = nibble(even) | nibble(odd) << 4;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_of_nibbles_quantize_to_themselves() {
        let mut values = [0f32; 32];
        values.iter_mut().zip(VALUES).for_each(|(value, nibble)| *value = nibble * 0.5);
        // The scale is that of the largest magnitude, 4, over 7: what is 0.5 each comes near.
        let (mut blocks, mut scales) = ([0; 16], [bf16::ZERO; 1]);
        quantize_rows(&values, 32, &mut blocks, &mut scales).unwrap();
        for (k, value) in values.iter().enumerate() {
            let nibble = blocks[k / 2] >> (k % 2 * 4) & 15;
            let found = decode(nibble, scales[0].to_f32());
            assert!((found - value).abs() <= scales[0].to_f32() / 2.0 + 1e-6, "{value} became {found}");
        }
        assert_eq!(decode(8, 3.0), 0.0);
        assert_eq!((decode(0, 0.5), decode(15, 0.5)), (-4.0, 3.5));
    }

    #[test]
    fn sizes_and_values_that_do_not_fit_are_errors() {
        for k in [0, 31, 48] {
            assert!(matches!(groups(k), Err(Error::Value { argument: "k", .. })), "{k}");
        }
        let (mut blocks, mut scales) = (vec![0; 16], [bf16::ZERO; 1]);
        assert!(matches!(quantize_rows(&[1.0; 33], 32, &mut blocks, &mut scales), Err(Error::Shape { .. })));
        let error = quantize_rows(&[f32::NAN; 32], 32, &mut blocks, &mut scales).unwrap_err();
        assert!(error.to_string().contains("values is NaN"), "{error}");
        quantize_rows(&[0.0; 32], 32, &mut blocks, &mut scales).unwrap();
        assert_eq!((scales[0], &blocks[..]), (bf16::ZERO, &[0x88; 16][..]));
    }
}
