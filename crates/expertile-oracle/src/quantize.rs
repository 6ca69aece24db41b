//! What an e4m3 value and its scale are, by definition and by search, and where scales stand.

use crate::layout::Layout;
use std::sync::LazyLock;

/// The value of an e4m3 byte `seee_emmm`: `(-1)^s * 2^(e - 7) * (1 + m/8)`, or `(-1)^s * 2^-6 * m/8` for `e = 0`; the
/// two bytes with all exponent and mantissa bits set are NaN.
#[must_use]
pub fn e4m3_value(byte: u8) -> f64 {
    let sign = if byte & 0x80 == 0 { 1.0 } else { -1.0 };
    let exponent = i32::from(byte >> 3 & 15);
    let mantissa = f64::from(byte & 7);
    match (exponent, byte & 7) {
        (15, 7) => f64::NAN,
        (0, _) => sign * 2f64.powi(-6) * (mantissa / 8.0),
        _ => sign * 2f64.powi(exponent - 7) * (1.0 + mantissa / 8.0),
    }
}

/// The byte whose value is nearest to `x` clamped to ±448; of two equally near ones the even byte; NaN is `0x7f`.
#[must_use]
pub fn e4m3_byte(x: f32) -> u8 {
    if x.is_nan() {
        return 0x7f;
    }
    static FINITE: LazyLock<Vec<f64>> = LazyLock::new(|| (0..=0x7e).map(e4m3_value).collect());
    let magnitude = f64::from(x.abs()).min(448.0);
    let (mut nearest, mut best) = (0u8, f64::INFINITY);
    for (byte, value) in (0..).zip(&*FINITE) {
        let distance = (value - magnitude).abs();
        if distance < best || (distance == best && byte % 2 == 0) {
            (nearest, best) = (byte, distance);
        }
    }
    if x.is_sign_negative() { nearest | 0x80 } else { nearest }
}

/// `max(1e-10, max |x|)` over a group, NaN ignored.
#[must_use]
pub fn amax(group: &[f32]) -> f32 {
    let mut largest = 1e-10f32;
    for x in group {
        if x.abs() > largest {
            largest = x.abs();
        }
    }
    largest
}

/// The scale of a group: `amax * (1/448)` in f32, or the smallest power of two that is at least that.
#[must_use]
pub fn scale(group: &[f32], power_of_two: bool) -> f32 {
    let scale = amax(group) * (1.0f32 / 448.0);
    if !power_of_two || scale.is_infinite() {
        return scale;
    }
    let mut exponent = -126;
    while 2f64.powi(exponent) < f64::from(scale) {
        exponent += 1;
    }
    2f64.powi(exponent) as f32
}

/// The UE8M0 byte of a power of two `2^(byte - 127)`; 255 (NaN) for an infinite scale.
///
/// # Panics
/// If the scale is neither.
#[must_use]
pub fn ue8m0_byte(scale: f32) -> u8 {
    if scale == f32::INFINITY {
        return 255;
    }
    for byte in 0..255u8 {
        if f64::from(scale) == 2f64.powi(i32::from(byte) - 127) {
            return byte;
        }
    }
    panic!("{scale} is not a power of two")
}

/// The value of a UE8M0 byte.
#[must_use]
pub fn ue8m0_value(byte: u8) -> f64 {
    if byte == 255 { f64::NAN } else { 2f64.powi(i32::from(byte) - 127) }
}

/// Quantized rows, the scales still in plain `[rows, ceil(width / group)]` order.
#[derive(Debug, Clone, PartialEq)]
pub struct Quantized {
    /// `[rows, width]` e4m3 bytes; 0 on padding.
    pub bytes: Vec<u8>,
    /// `[rows, ceil(width / group)]`; 0 on padding.
    pub scales: Vec<f32>,
    /// Values to a row.
    pub width: usize,
    /// Values to a scale.
    pub group: usize,
}

/// Quantizes the rows of `x [rows, width]`: per group a scale, per value `e4m3(x / scale)`, the division in f32. The last
/// group of a row is what is left of it.
#[must_use]
pub fn quantize(x: &[f32], width: usize, group: usize, power_of_two: bool) -> Quantized {
    let mut bytes = Vec::new();
    let mut scales = Vec::new();
    for values in x.chunks(width).flat_map(|row| row.chunks(group)) {
        let scale = scale(values, power_of_two);
        scales.push(scale);
        bytes.extend(values.iter().map(|x| e4m3_byte(x / scale)));
    }
    Quantized { bytes, scales, width, group }
}

/// Quantizes the rows of `x [M, width]`, then puts them in their places, zeros (scales too) on padding.
#[must_use]
pub fn quantize_permute(
    x: &[f32],
    width: usize,
    topk: usize,
    layout: &Layout,
    group: usize,
    power_of_two: bool,
) -> Quantized {
    let quantized = quantize(x, width, group, power_of_two);
    permute_quantized(&quantized, topk, layout)
}

/// Puts ready e4m3 rows and their scales in their places, zeros on padding.
#[must_use]
pub fn permute_quantized(rows: &Quantized, topk: usize, layout: &Layout) -> Quantized {
    Quantized {
        bytes: layout.permute(&rows.bytes, rows.width, topk, 0),
        scales: layout.permute(&rows.scales, rows.groups(), topk, 0.0),
        ..*rows
    }
}

impl Quantized {
    /// `[rows, width]`: what the bytes and scales stand for, `e4m3 * scale`. Padding reads as zero.
    #[must_use]
    pub fn values(&self) -> Vec<f64> {
        let mut values = Vec::new();
        for (i, &byte) in self.bytes.iter().enumerate() {
            let scale = i / self.width * self.groups() + i % self.width / self.group;
            values.push(e4m3_value(byte) * f64::from(self.scales[scale]));
        }
        values
    }

    fn groups(&self) -> usize {
        self.width.div_ceil(self.group)
    }

    fn rows(&self) -> usize {
        self.scales.len() / self.groups()
    }

    /// f32 scales, row-major `[rows, groups]`.
    #[must_use]
    pub fn row_major(&self) -> Vec<f32> {
        self.scales.clone()
    }

    /// f32 scales with strides `(1, round_up(rows, 4))`; zero between the last row and the end of a column.
    #[must_use]
    pub fn mn_major(&self) -> Vec<f32> {
        let (rows, groups) = (self.rows(), self.groups());
        let stride = rows.div_ceil(4) * 4;
        let mut words = vec![0.0; stride * groups];
        for row in 0..rows {
            for group in 0..groups {
                words[row + group * stride] = self.scales[row * groups + group];
            }
        }
        words
    }

    /// UE8M0 bytes, four to an i32: `[rows, ceil(groups / 4)]` with strides `(1, round_up(rows, 4))`, byte `j` of word
    /// `p` is group `4p + j`. Zero wherever no live scale stands.
    ///
    /// # Panics
    /// If a scale is not a power of two.
    #[must_use]
    pub fn packed_ue8m0(&self) -> Vec<i32> {
        let (rows, groups) = (self.rows(), self.groups());
        let stride = rows.div_ceil(4) * 4;
        let mut words = vec![[0u8; 4]; stride * groups.div_ceil(4)];
        for row in 0..rows {
            for group in 0..groups {
                let scale = self.scales[row * groups + group];
                if scale != 0.0 {
                    words[row + group / 4 * stride][group % 4] = ue8m0_byte(scale);
                }
            }
        }
        words.into_iter().map(i32::from_le_bytes).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_corners_of_e4m3_are_where_the_format_puts_them() {
        for (byte, value) in
            [(0x00, 0.0), (0x01, 1.0 / 512.0), (0x08, 1.0 / 64.0), (0x38, 1.0), (0x7e, 448.0), (0xb9, -1.125)]
        {
            assert_eq!(e4m3_value(byte), value);
            assert_eq!(e4m3_byte(value as f32), byte);
        }
        assert!(e4m3_value(0x7f).is_nan() && e4m3_value(0xff).is_nan());
        assert_eq!(e4m3_byte(-0.0), 0x80);
    }

    #[test]
    fn rounding_is_to_nearest_with_ties_to_even() {
        // Neighbours of 1 are 1.125 apart above; 1.0625 is the middle, and 1 is the even byte.
        assert_eq!(e4m3_byte(1.0625), 0x38);
        assert_eq!(e4m3_byte(1.0625f32.next_up()), 0x39);
        assert_eq!(e4m3_byte(1.1875), 0x3a);
        assert_eq!(e4m3_byte(1.0 / 1024.0), 0x00);
        assert_eq!(e4m3_byte(3.0 / 1024.0), 0x02);
        assert_eq!((e4m3_byte(1e9), e4m3_byte(f32::NEG_INFINITY)), (0x7e, 0xfe));
        assert_eq!(e4m3_byte(-f32::NAN), 0x7f);
    }

    #[test]
    fn scales_have_a_floor_and_round_up_to_powers_of_two() {
        assert_eq!(scale(&[0.0, f32::NAN], false), 1e-10 * (1.0 / 448.0));
        assert_eq!(scale(&[3.0, -448.0], false), 1.0);
        assert_eq!(scale(&[3.0, -448.0], true), 1.0);
        assert_eq!(scale(&[450.0], true), 2.0);
        assert_eq!(scale(&[f32::INFINITY], true), f32::INFINITY);
        assert_eq!((ue8m0_byte(1.0), ue8m0_byte(f32::INFINITY), ue8m0_value(0)), (127, 255, 2f64.powi(-127)));
    }

    #[test]
    fn packed_words_hold_four_groups_from_the_low_byte_up() {
        let made = Quantized { bytes: vec![], scales: vec![1.0, 2.0, 4.0, 8.0, 16.0], width: 5 * 32, group: 32 };
        assert_eq!(made.packed_ue8m0(), [0x8281_807f_u32 as i32, 0, 0, 0, 0x83, 0, 0, 0]);
        assert_eq!(made.mn_major()[4..8], [2.0, 0.0, 0.0, 0.0]);
    }
}
