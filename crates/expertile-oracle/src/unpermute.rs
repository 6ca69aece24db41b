//! The weighted sum of a token's rows.

/// `out[t] = sum_k w[t, k] * rows[inv_perm[t, k]]` in f64; empty slots are skipped; without weights every weight is 1.
///
/// `rows` is `[M_sum, width]`; the result is `[M, width]`, zeros for a token with no live slot.
#[must_use]
pub fn unpermute(rows: &[f64], width: usize, inv_perm: &[i32], topk: usize, topk_weights: Option<&[f32]>) -> Vec<f64> {
    let mut out = vec![0.0; inv_perm.len() / topk * width];
    for (slot, &row) in inv_perm.iter().enumerate() {
        if row < 0 {
            continue;
        }
        let weight = topk_weights.map_or(1.0, |weights| f64::from(weights[slot]));
        for c in 0..width {
            out[slot / topk * width + c] += weight * rows[row as usize * width + c];
        }
    }
    out
}

/// The same as the sequence of f32 operations that defines the bits: `acc = 0`, then for `k = 0..topk` in order
/// `acc = acc + w * v` with the product and the sum each rounded to f32. The caller casts the result once.
#[must_use]
pub fn unpermute_f32(
    rows: &[f32],
    width: usize,
    inv_perm: &[i32],
    topk: usize,
    topk_weights: Option<&[f32]>,
) -> Vec<f32> {
    let mut out = vec![0.0f32; inv_perm.len() / topk * width];
    for (slot, &row) in inv_perm.iter().enumerate() {
        if row < 0 {
            continue;
        }
        let weight = topk_weights.map_or(1.0, |weights| weights[slot]);
        for c in 0..width {
            let product = weight * rows[row as usize * width + c];
            out[slot / topk * width + c] += product;
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn empty_slots_are_skipped_and_not_multiplied_by_zero() {
        let rows = [1.0, 2.0, f32::NAN, f32::INFINITY, 10.0, 20.0];
        let inv_perm = [2, -1, 0, -1, -1, -1, -1, 0];
        let weights = [0.5, f32::NAN, 2.0, 0.0, 0.0, 0.0, 0.0, 3.0];
        assert_eq!(unpermute_f32(&rows, 2, &inv_perm, 4, Some(&weights)), [7.0, 14.0, 3.0, 6.0]);
        assert_eq!(unpermute_f32(&rows, 2, &inv_perm[4..7], 3, None), [0.0, 0.0]);
        let rows = rows.map(f64::from);
        assert_eq!(unpermute(&rows, 2, &inv_perm, 4, Some(&weights)), [7.0, 14.0, 3.0, 6.0]);
        assert_eq!(unpermute(&rows, 2, &inv_perm, 4, None), [11.0, 22.0, 1.0, 2.0]);
    }

    #[test]
    fn the_f32_sequence_rounds_the_product_before_the_sum() {
        // 4097 squared is 2^24 + 2^13 + 1: the product rounds to 2^24 + 2^13, a fused operation would keep the 1.
        let sum = unpermute_f32(&[-16_785_408.0, 4097.0], 1, &[0, 1], 2, Some(&[1.0, 4097.0]));
        assert_eq!(sum, [0.0]);
    }
}
