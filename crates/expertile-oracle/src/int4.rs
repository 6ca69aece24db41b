//! int4: `(nibble - 8) * scale`, a scale for each 32 weights of a row, in f64.

/// A group's scale, before it is rounded to what holds it: its largest magnitude over 7.
#[must_use]
pub fn scale(group: &[f32]) -> f32 {
    group.iter().fold(0f32, |most, value| most.max(value.abs())) / 7.0
}

/// The nibble of `x` in units of the scale, nearest and ties to even, held to -8 to 7.
#[must_use]
pub fn nibble(x: f64) -> u8 {
    let (below, rest) = (x.floor(), x - x.floor());
    let up = rest > 0.5 || (rest == 0.5 && below.rem_euclid(2.0) == 1.0);
    ((below + if up { 1.0 } else { 0.0 }).clamp(-8.0, 7.0) + 8.0) as u8
}

/// A row's blocks, by scales that are given for each 32 of it.
#[must_use]
pub fn quantize_row(row: &[f32], scales: &[f64]) -> Vec<u8> {
    let nibbles: Vec<u8> = row
        .iter()
        .enumerate()
        .map(|(k, &value)| nibble(if scales[k / 32] == 0.0 { 0.0 } else { f64::from(value) / scales[k / 32] }))
        .collect();
    nibbles.chunks(2).map(|pair| pair[0] + 16 * pair[1]).collect()
}

/// Row `row` of `blocks [R, k / 2]` with `scales [R, k / 32]`.
pub fn weight_row(blocks: &[u8], scales: &[f64], k: usize, row: usize, out: &mut [f64]) {
    for (at, out) in out.iter_mut().enumerate().take(k) {
        let byte = blocks[(row * k + at) / 2];
        let nibble = if at % 2 == 0 { byte % 16 } else { byte / 16 };
        *out = (f64::from(nibble) - 8.0) * scales[(row * k + at) / 32];
    }
}
