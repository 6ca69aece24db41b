//! How far two results are apart.

/// How much two results may differ, as a whole and for the worst of their rows (or experts).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Tolerance {
    /// Below this for the whole.
    pub whole: f64,
    /// Below this for any row and any expert.
    pub row: f64,
}

/// One GEMM with e4m3 activations against the unquantized product.
pub const E4M3_GEMM: Tolerance = Tolerance { whole: 1e-3, row: 2e-3 };
/// A layer with e4m3 activations: about twice one GEMM.
pub const E4M3_LAYER: Tolerance = Tolerance { whole: 2e-3, row: 4e-3 };
/// One GEMM with bf16 activations.
pub const BF16_GEMM: Tolerance = Tolerance { whole: 1e-5, row: 2e-5 };
/// A layer with bf16 activations.
pub const BF16_LAYER: Tolerance = Tolerance { whole: 2e-5, row: 4e-5 };

/// `1 - 2 * sum(x * y) / sum(x^2 + y^2)`: 0 for equal results, also for two that are zero throughout.
///
/// Anything that is not a finite number, in either of them, gives infinity: a NaN never passes, however the caller
/// compares.
///
/// # Panics
/// Unless both have as many values.
#[must_use]
pub fn difference(x: &[f64], y: &[f64]) -> f64 {
    assert_eq!(x.len(), y.len());
    let (mut products, mut squares) = (0.0, 0.0);
    for (x, y) in x.iter().zip(y) {
        products += x * y;
        squares += x * x + y * y;
    }
    finish(products, squares)
}

fn finish(products: f64, squares: f64) -> f64 {
    if !products.is_finite() || !squares.is_finite() {
        return f64::INFINITY;
    }
    if squares == 0.0 { 0.0 } else { 1.0 - 2.0 * products / squares }
}

/// [`difference`] of each row of `[rows, width]`.
#[must_use]
pub fn by_row(x: &[f64], y: &[f64], width: usize) -> Vec<f64> {
    assert_eq!(x.len(), y.len());
    x.chunks(width).zip(y.chunks(width)).map(|(x, y)| difference(x, y)).collect()
}

/// [`difference`] over all rows of each expert; `expert_of_row[r]` is row `r`'s expert, negative for a row to leave
/// out.
///
/// An expert without rows differs by 0.
///
/// # Panics
/// Unless there are as many rows as entries of `expert_of_row`.
#[must_use]
pub fn by_expert(x: &[f64], y: &[f64], width: usize, expert_of_row: &[i32], experts: usize) -> Vec<f64> {
    assert_eq!((x.len(), y.len()), (expert_of_row.len() * width, expert_of_row.len() * width));
    let mut sums = vec![(0.0, 0.0); experts];
    for (row, &expert) in expert_of_row.iter().enumerate() {
        if expert < 0 {
            continue;
        }
        let (products, squares) = &mut sums[expert as usize];
        for at in row * width..(row + 1) * width {
            *products += x[at] * y[at];
            *squares += x[at] * x[at] + y[at] * y[at];
        }
    }
    sums.into_iter().map(|(products, squares)| finish(products, squares)).collect()
}

/// The place and value of the largest difference; `None` for an empty list.
#[must_use]
pub fn worst(differences: &[f64]) -> Option<(usize, f64)> {
    let mut worst = None;
    for (place, &difference) in differences.iter().enumerate() {
        if worst.is_none_or(|(_, most)| difference > most) {
            worst = Some((place, difference));
        }
    }
    worst
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_results_differ_by_nothing_and_opposite_ones_by_two() {
        assert_eq!(difference(&[1.0, -2.0], &[1.0, -2.0]), 0.0);
        assert_eq!(difference(&[1.0, -2.0], &[-1.0, 2.0]), 2.0);
        assert_eq!(difference(&[0.0], &[0.0]), 0.0);
        assert_eq!(difference(&[0.0], &[1.0]), 1.0);
        assert_eq!(difference(&[], &[]), 0.0);
    }

    #[test]
    fn nan_and_infinity_never_pass() {
        for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            assert_eq!(difference(&[bad, 1.0], &[1.0, 1.0]), f64::INFINITY);
            assert_eq!(difference(&[bad, 1.0], &[bad, 1.0]), f64::INFINITY);
            assert_eq!(difference(&[bad], &[0.0]), f64::INFINITY);
        }
    }

    #[test]
    fn a_wrong_row_shows_by_row_and_by_expert() {
        let x = [1.0, 0.0, 1.0, 0.0, f64::NAN, 0.0, 1.0, 0.0];
        let y = [1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 1.0, 0.0];
        assert_eq!(by_row(&x, &y, 2), [0.0, 1.0, f64::INFINITY, 0.0]);
        assert_eq!(by_expert(&x, &y, 2, &[1, 1, -1, 2], 4), [0.0, 0.5, 0.0, 0.0]);
        assert_eq!(worst(&by_row(&x, &y, 2)), Some((2, f64::INFINITY)));
        assert_eq!(worst(&[]), None);
    }
}
