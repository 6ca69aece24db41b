//! What an MXFP4 weight is, by definition and by search.

/// The value of a nibble `s eem`: `(-1)^s * 2^(e - 1) * (1 + m/2)`, or `(-1)^s * m/2` for `e = 0`.
#[must_use]
pub fn e2m1_value(nibble: u8) -> f64 {
    let sign = if nibble & 8 == 0 { 1.0 } else { -1.0 };
    let exponent = i32::from(nibble >> 1 & 3);
    let mantissa = f64::from(nibble & 1);
    match exponent {
        0 => sign * (mantissa / 2.0),
        _ => sign * 2f64.powi(exponent - 1) * (1.0 + mantissa / 2.0),
    }
}

/// Row `j` of an MXFP4 weight matrix `[n, k]`: blocks `[n, k / 2]` with the even value in the low nibble, scales
/// `[n, k / 32]`.
pub fn weight_row(blocks: &[u8], scales: &[u8], k: usize, j: usize, row: &mut [f64]) {
    for (c, value) in row.iter_mut().enumerate() {
        let byte = blocks[(j * k + c) / 2];
        let nibble = if c % 2 == 0 { byte % 16 } else { byte / 16 };
        *value = e2m1_value(nibble) * crate::quantize::ue8m0_value(scales[(j * k + c) / 32]);
    }
}

/// The nibble whose value is nearest to `x` clamped to ±6; of two equally near ones the even one. Zero keeps the sign of `x`.
#[must_use]
pub fn e2m1_nibble(x: f64) -> u8 {
    let (mut nearest, mut best) = (0, f64::INFINITY);
    for nibble in 0..8 {
        let distance = (e2m1_value(nibble) - x.abs().min(6.0)).abs();
        if distance < best || (distance == best && nibble % 2 == 0) {
            (nearest, best) = (nibble, distance);
        }
    }
    if x.is_sign_negative() { nearest + 8 } else { nearest }
}

/// The scale byte of a group of finite values: the largest power of two that is not above the largest magnitude,
/// divided by 4 (the largest power of two that e2m1 holds), or 2^-127 if that is larger.
#[must_use]
pub fn scale_byte(group: &[f32]) -> u8 {
    let amax = group.iter().fold(0.0f64, |most, &x| most.max(f64::from(x).abs()));
    let mut byte = 0;
    for candidate in 0..255u8 {
        if 4.0 * crate::quantize::ue8m0_value(candidate) <= amax {
            byte = candidate;
        }
    }
    byte
}

/// Quantizes a row of finite values, a multiple of 32 of them: its blocks and its scales.
#[must_use]
pub fn quantize_row(row: &[f32]) -> (Vec<u8>, Vec<u8>) {
    let (mut blocks, mut scales) = (vec![0; row.len() / 2], vec![]);
    for (g, group) in row.chunks(32).enumerate() {
        let byte = scale_byte(group);
        scales.push(byte);
        for (i, &x) in group.iter().enumerate() {
            let nibble = e2m1_nibble(f64::from(x) / crate::quantize::ue8m0_value(byte));
            blocks[(g * 32 + i) / 2] += if i % 2 == 0 { nibble } else { nibble * 16 };
        }
    }
    (blocks, scales)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nibbles_are_where_the_format_puts_them() {
        let values: Vec<f64> = (0..8).map(e2m1_value).collect();
        assert_eq!(values, [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]);
        assert_eq!((e2m1_value(15), e2m1_nibble(-6.0), e2m1_nibble(-0.0)), (-6.0, 15, 8));
    }

    #[test]
    fn ties_go_to_the_even_nibble() {
        let ties = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0];
        assert_eq!(ties.map(e2m1_nibble), [0, 2, 2, 4, 4, 6, 6]);
        assert_eq!(ties.map(|x: f64| e2m1_nibble(x.next_up())), [1, 2, 3, 4, 5, 6, 7]);
        assert_eq!(ties.map(|x: f64| e2m1_nibble(x.next_down())), [0, 1, 2, 3, 4, 5, 6]);
        assert_eq!(e2m1_nibble(7.9), 7);
    }

    #[test]
    fn a_row_is_decoded_as_written_by_hand() {
        let mut row = [0.0; 64];
        let mut blocks = [0; 64];
        (blocks[32], blocks[63]) = (0x21, 0xf0);
        weight_row(&blocks, &[127, 127, 128, 126], 64, 1, &mut row);
        assert_eq!((row[0], row[1], row[2], row[62], row[63]), (1.0, 2.0, 0.0, 0.0, -3.0));
        assert_eq!(scale_byte(&[7.9, -3.0]), 127);
        assert_eq!(scale_byte(&[8.0]), 128);
        assert_eq!(scale_byte(&[0.0]), 0);
    }
}
