//! The grouped GEMM as a sum, in f64.

/// `D[r, j] = sum_k A[r, k] * B[e, j, k]` for every row `r` of expert `e = m_indices[r]`; NaN on padding rows, so that
/// a check which reads one fails.
///
/// `rows` is `A [M_sum, k]`. `weight_row(e, j, row)` fills `row [k]` with row `j` of expert `e`'s weights, scales
/// applied: it is asked once per row of an expert that has tokens, so no copy of all weights is ever made.
///
/// # Panics
/// If `rows` is not `[M_sum, k]`.
#[must_use]
pub fn grouped_gemm(
    rows: &[f64],
    m_indices: &[i32],
    n: usize,
    k: usize,
    mut weight_row: impl FnMut(usize, usize, &mut [f64]),
) -> Vec<f64> {
    assert_eq!(rows.len(), m_indices.len() * k, "rows of {k}");
    let experts = m_indices.iter().max().map_or(0, |&last| last + 1);
    let mut out = vec![f64::NAN; m_indices.len() * n];
    let mut weights = vec![0.0; k];
    for expert in 0..experts {
        let own: Vec<usize> = (0..m_indices.len()).filter(|&row| m_indices[row] == expert).collect();
        if own.is_empty() {
            continue;
        }
        for j in 0..n {
            weight_row(expert as usize, j, &mut weights);
            for &row in &own {
                out[row * n + j] = dot(&rows[row * k..][..k], &weights);
            }
        }
    }
    out
}

/// `sum_k a[k] * b[k]`, in eight partial sums so that a layer of real size takes seconds and not minutes.
#[must_use]
pub fn dot(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    let mut sums = [0.0; 8];
    let (a8, b8) = (a.chunks_exact(8), b.chunks_exact(8));
    let rest: f64 = a8.remainder().iter().zip(b8.remainder()).map(|(x, y)| x * y).sum();
    for (x, y) in a8.zip(b8) {
        for i in 0..8 {
            sums[i] += x[i] * y[i];
        }
    }
    sums.iter().sum::<f64>() + rest
}

/// Row `j` of an e4m3 weight matrix `[n, k]`: `byte * scales[j / 128, c / 128]`, scales `[ceil(n/128), ceil(k/128)]`.
pub fn e4m3_weight_row(bytes: &[u8], scales: &[f32], k: usize, j: usize, row: &mut [f64]) {
    let blocks = k.div_ceil(128);
    for (c, value) in row.iter_mut().enumerate() {
        let scale = scales[j / 128 * blocks + c / 128];
        *value = crate::quantize::e4m3_value(bytes[j * k + c]) * f64::from(scale);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_small_product_is_as_written_by_hand() {
        let rows = [1.0, 2.0, f64::NAN, f64::NAN, 3.0, 4.0];
        let weights = [[[1.0, 0.0], [0.0, 1.0]], [[9.0; 2]; 2], [[1.0, 1.0], [-1.0, 1.0]]];
        let asked = &mut Vec::new();
        let out = grouped_gemm(&rows, &[0, -1, 2], 2, 2, |e, j, row| {
            asked.push((e, j));
            row.copy_from_slice(&weights[e][j]);
        });
        assert_eq!((out[0], out[1], out[4], out[5]), (1.0, 2.0, 7.0, 1.0));
        assert!(out[2].is_nan() && out[3].is_nan());
        assert_eq!(*asked, [(0, 0), (0, 1), (2, 0), (2, 1)], "experts without rows are not asked for");
    }

    #[test]
    fn a_dot_product_covers_every_element_once() {
        for len in 0..40 {
            let a: Vec<f64> = (0..len).map(f64::from).collect();
            let b: Vec<f64> = (0..len).map(|i| f64::from(i + 1)).collect();
            let expected: i32 = (0..len).map(|i| i * (i + 1)).sum();
            assert_eq!(dot(&a, &b), f64::from(expected));
        }
    }

    #[test]
    fn weight_blocks_are_128_by_128() {
        let (n, k) = (130, 200);
        let bytes = vec![0x38; n * k];
        let scales = [1.0, 2.0, 3.0, 4.0];
        let mut row = vec![0.0; k];
        e4m3_weight_row(&bytes, &scales, k, 127, &mut row);
        assert_eq!((row[127], row[128]), (1.0, 2.0));
        e4m3_weight_row(&bytes, &scales, k, 128, &mut row);
        assert_eq!((row[127], row[128]), (3.0, 4.0));
    }
}
