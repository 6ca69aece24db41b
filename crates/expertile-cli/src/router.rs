//! From hidden states to logits: what stands before the library's routers.
//!
//! `logits[t, e] = sum_h x[t, h] * w[e, h]` in f32 on the widened values, 16 partial sums side by side: the same bits for
//! any number of threads.

use crate::error::Result;
use expertile::{MatrixRef, Router};
use rayon::prelude::*;

/// `topk_ids` and `topk_weights [M, topk]` of `x [M, H]`, by a router whose weight is `[E, H]`.
pub(crate) fn route(router: &Router, weight: &[f32], x: &[f32], hidden: usize) -> Result<(Vec<i32>, Vec<f32>)> {
    let (tokens, experts, topk) = (x.len() / hidden, weight.len() / hidden, router.topk());
    let mut logits = vec![0.0; tokens * experts];
    logits.par_chunks_mut(experts).zip(x.par_chunks(hidden)).for_each(|(logits, x)| {
        for (logit, weight) in logits.iter_mut().zip(weight.chunks(hidden)) {
            *logit = dot(x, weight);
        }
    });
    let (mut ids, mut weights) = (vec![0; tokens * topk], vec![0.0; tokens * topk]);
    router.route(MatrixRef::new(&logits, tokens, experts)?, &mut ids, &mut weights)?;
    Ok((ids, weights))
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0.0f32; 16];
    let ((a16, a_rest), (b16, b_rest)) = (a.as_chunks::<16>(), b.as_chunks::<16>());
    for (a, b) in a16.iter().zip(b16) {
        for ((sum, a), b) in sums.iter_mut().zip(a).zip(b) {
            *sum += a * b;
        }
    }
    let rest: f32 = a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum();
    sums.iter().sum::<f32>() + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn logits_cover_every_value_and_every_expert() {
        for len in [1, 15, 16, 17, 40] {
            let a: Vec<f32> = (0..len).map(|i| i as f32).collect();
            assert_eq!(dot(&a, &a), (0..len).map(|i| (i * i) as f32).sum::<f32>());
        }
        let weight = [1.0, 0.0, 0.0, 1.0, -1.0, -1.0];
        let router = Router::Softmax { topk: 1, renormalize: true };
        let (ids, weights) = route(&router, &weight, &[5.0, 1.0, 1.0, 5.0, -9.0, -1.0], 2).unwrap();
        assert_eq!((ids, weights), (vec![0, 1, 2], vec![1.0; 3]));
    }
}
