//! Weights `[experts, n, k]`, as a checkpoint has them. A sum of `k` products of such a weight and a value of unit
//! variance has unit variance, so that numbers neither vanish nor grow on their way through a layer.

use crate::Random;

/// Rows and columns of a block that shares a scale.
const BLOCK: usize = 128;

/// The magnitude below which evenly spread weights lie.
fn largest_weight(k: usize) -> f32 {
    (3.0 / k as f32).sqrt()
}

/// Weights without scales, evenly spread, each through `round`.
pub fn unit_weights<T>(random: &mut Random, [experts, n, k]: [usize; 3], round: impl Fn(f32) -> T) -> Vec<T> {
    (0..experts * n * k).map(|_| round(largest_weight(k) * random.uniform())).collect()
}

/// Weights whose values fill their type's range up to `max`, each through `round`, and scales
/// `[experts, n / 128, k / 128]`, rounded up, that differ from block to block by up to a factor of 3.
pub fn block_scaled_weights<T>(
    random: &mut Random,
    [experts, n, k]: [usize; 3],
    max: f32,
    round: impl Fn(f32) -> T,
) -> (Vec<T>, Vec<f32>) {
    let values = (0..experts * n * k).map(|_| round(max * random.uniform())).collect();
    let blocks = experts * n.div_ceil(BLOCK) * k.div_ceil(BLOCK);
    let scale = |_| largest_weight(k) / max * (1.0 + 0.5 * random.uniform());
    (values, (0..blocks).map(scale).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_of_weights_has_unit_length_scaled_or_not() {
        let [n, k] = [130, 4096];
        let plain = unit_weights(&mut Random::new(9), [2, n, k], f64::from);
        let (values, scales) = block_scaled_weights(&mut Random::new(9), [2, n, k], 448.0, f64::from);
        assert_eq!((plain.len(), values.len(), scales.len()), (2 * n * k, 2 * n * k, 2 * 2 * 32));
        assert!(values.iter().any(|&value| value > 440.0));
        let squares = |weight: &dyn Fn(usize) -> f64| (0..k).map(|at| weight(at).powi(2)).sum::<f64>();
        assert!((squares(&|at| plain[at]) - 1.0).abs() < 0.1);
        assert!((squares(&|at| values[at] * f64::from(scales[at / BLOCK])) - 1.0).abs() < 0.3);
    }
}
