//! MXFP4: 4-bit weights in groups of 32 that share a power of two.
//!
//! ```text
//! blocks [N, K/2]  bytes: value k is the low nibble of byte k / 2 where k is even, else the high one
//! scales [N, K/32] bytes: 2^(byte - 127), UE8M0; 255 is NaN
//! weight = e2m1(nibble) * scale
//! ```
//!
//! A nibble is `s eem`: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives. Checkpoints hold the blocks as
//! `[E, N, K/32, 16]`, which is the same memory. Quantizing follows the OCP's rule for the scale, and rounds to nearest,
//! ties to even.

use crate::error::{Error, Result, require_exact};
use crate::quantize::ue8m0_value;

/// Consecutive values of K that share a scale.
pub const GROUP: usize = 32;

/// The scale byte that means NaN.
pub const NAN_SCALE: u8 = 255;

/// The value of every nibble.
pub const E2M1_VALUES: [f32; 16] =
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];

/// The exponent of e2m1's largest power of two, 4.
const LARGEST_EXPONENT: i32 = 2;

/// Scales to a row of `k` weights.
///
/// # Errors
/// [`Error::Value`] unless `k` is a positive multiple of 32.
pub fn groups(k: usize) -> Result<usize> {
    if k == 0 || !k.is_multiple_of(GROUP) {
        return Err(Error::value("k", k, format!("a positive multiple of {GROUP} for mxfp4 weights")));
    }
    Ok(k / GROUP)
}

/// The weight of a nibble (its low four bits count) and a scale byte.
///
/// Exact wherever f32 holds the product: with a scale of 2^127 what is above 1.5 is infinite.
#[must_use]
#[inline]
pub fn decode(nibble: u8, scale: u8) -> f32 {
    E2M1_VALUES[usize::from(nibble & 15)] * ue8m0_value(scale)
}

/// Writes the weights of rows, `blocks [R, K/2]` and `scales [R, K/32]`, to `out [R, K]`.
///
/// # Errors
/// [`Error::Shape`] unless there are as many values as blocks and scales say; [`Error::Value`] as [`groups`].
pub fn decode_rows(blocks: &[u8], scales: &[u8], k: usize, out: &mut [f32]) -> Result<()> {
    let rows = check(blocks, scales, k, out.len())?;
    debug_assert_eq!(out.len(), rows * k);
    for ((out, bytes), &scale) in out.chunks_exact_mut(GROUP).zip(blocks.chunks_exact(GROUP / 2)).zip(scales) {
        for (out, &byte) in out.as_chunks_mut::<2>().0.iter_mut().zip(bytes) {
            *out = [decode(byte, scale), decode(byte >> 4, scale)];
        }
    }
    Ok(())
}

/// The nibble nearest to `x`, which is in units of the scale; ties go to the even one, what is above 6 becomes 6. NaN
/// becomes 6: its group's scale says that it is none.
#[must_use]
#[inline]
pub fn e2m1_nibble(x: f32) -> u8 {
    let magnitude = x.abs();
    // The middles between neighbours, in turns kept for the lower and for the upper one: the even nibble takes a tie.
    let steps = [
        magnitude > 0.25,
        magnitude >= 0.75,
        magnitude > 1.25,
        magnitude >= 1.75,
        magnitude > 2.5,
        magnitude >= 3.5,
        magnitude > 5.0,
    ];
    let nibble = if magnitude.is_nan() { 7 } else { steps.into_iter().map(u8::from).sum() };
    nibble | if x.is_sign_negative() { 8 } else { 0 }
}

/// The scale byte of a group whose largest magnitude is `amax`: `2^(floor(log2(amax)) - 2)`, held to what a byte says;
/// 255 if `amax` is infinite or NaN.
#[must_use]
#[inline]
pub fn scale_byte(amax: f32) -> u8 {
    if !amax.is_finite() {
        return NAN_SCALE;
    }
    // Below f32's normal numbers the byte is 0 whatever the exponent is.
    let biased = (amax.abs().to_bits() >> 23) as i32;
    (biased - LARGEST_EXPONENT).max(0) as u8
}

/// Quantizes rows `values [R, K]` to `blocks [R, K/2]` and `scales [R, K/32]`.
///
/// A group that holds a NaN or an infinity gets the scale 255, which is NaN: an overflow is seen, not hidden.
///
/// # Errors
/// [`Error::Shape`] and [`Error::Value`] as [`decode_rows`].
pub fn quantize_rows(values: &[f32], k: usize, blocks: &mut [u8], scales: &mut [u8]) -> Result<()> {
    check(blocks, scales, k, values.len())?;
    let groups = values.as_chunks::<GROUP>().0.iter();
    for ((values, bytes), scale) in groups.zip(blocks.chunks_exact_mut(GROUP / 2)).zip(scales) {
        let finite = values.iter().all(|value| value.is_finite());
        let amax = values.iter().fold(0f32, |most, value| most.max(value.abs()));
        *scale = if finite { scale_byte(amax) } else { NAN_SCALE };
        // 2^-(byte - 127): a product with it is exact, save where it rounds to zero anyway.
        let inverse = ue8m0_value(254u8.saturating_sub(*scale));
        for (byte, &[even, odd]) in bytes.iter_mut().zip(values.as_chunks::<2>().0) {
            *byte = e2m1_nibble(even * inverse) | e2m1_nibble(odd * inverse) << 4;
        }
    }
    Ok(())
}

/// The number of rows that blocks, scales and values agree on.
fn check(blocks: &[u8], scales: &[u8], k: usize, values: usize) -> Result<usize> {
    let groups = groups(k)?;
    let rows = values / k;
    require_exact("values", values, &[rows, k])?;
    require_exact("blocks", blocks.len(), &[rows, k / 2])?;
    require_exact("scales", scales.len(), &[rows, groups])?;
    Ok(rows)
}

/// Fails for a scale byte that is NaN, naming its place; `get(row, group)` is one.
pub(crate) fn require_numbers(
    rows: usize,
    groups: usize,
    first_row: usize,
    get: impl Fn(usize, usize) -> u8,
) -> Result<()> {
    for row in 0..rows {
        for group in 0..groups {
            if get(row, group) == NAN_SCALE {
                let place = format!("at most 254, as 255 is NaN: that of row {}, group {group}", first_row + row);
                return Err(Error::value("scales", usize::from(NAN_SCALE), place));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_nibbles_value_is_the_nibble_nearest_to_it() {
        for nibble in 0..16 {
            let value = E2M1_VALUES[usize::from(nibble)];
            assert_eq!(e2m1_nibble(value), nibble, "{value}");
        }
    }

    #[test]
    fn scales_follow_the_largest_magnitude() {
        for (amax, byte) in [(4.0, 127), (6.0, 127), (7.99, 127), (8.0, 128), (1.0, 125), (0.0, 0), (1e-40, 0)] {
            assert_eq!(scale_byte(amax), byte, "{amax}");
        }
        assert_eq!((scale_byte(f32::MAX), scale_byte(f32::INFINITY), scale_byte(f32::NAN)), (252, 255, 255));
    }

    #[test]
    fn what_is_not_finite_is_seen() {
        let (mut values, mut blocks, mut scales) = ([1f32; 64], [0; 32], [0; 2]);
        values[40] = f32::NAN;
        quantize_rows(&values, 64, &mut blocks, &mut scales).unwrap();
        assert_eq!(scales, [125, 255]);
        let mut out = [0.0; 64];
        decode_rows(&blocks, &scales, 64, &mut out).unwrap();
        assert!(out[..32].iter().all(|&value| value == 1.0) && out[32..].iter().all(|value| value.is_nan()));
    }

    #[test]
    fn sizes_that_do_not_fit_are_errors() {
        for k in [0, 31, 33, 48] {
            assert!(matches!(groups(k), Err(Error::Value { argument: "k", .. })), "{k}");
        }
        let mut out = [0.0; 64];
        for (blocks, scales) in [(31, 2), (33, 2), (32, 1), (32, 3)] {
            let error = decode_rows(&vec![0; blocks], &vec![0; scales], 64, &mut out).unwrap_err();
            assert!(matches!(error, Error::Shape { .. }), "{error}");
        }
    }
}
