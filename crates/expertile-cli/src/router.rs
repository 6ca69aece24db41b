//! From hidden states to logits: the step before the library's routers.
//!
//! `logits[t, e] = sum_h x[t, h] * w[e, h]` in f32 on the widened values, 16 partial sums side by side: the same bits
//! for any number of threads.

use crate::error::Result;
use expertile::{MatrixRef, Router};
use half::bf16;
use rayon::prelude::*;
use std::borrow::Cow;
use std::str::FromStr;

/// What a router computes in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RouterPrecision {
    /// f32 throughout.
    F32,
    /// Hidden states, the router's weight, logits (their bias added) and the weights of the chosen experts are rounded
    /// to bf16, as Transformers does for a Qwen3-MoE in bf16; sums, softmax and sigmoid are in f32.
    Bf16,
}

impl RouterPrecision {
    /// The name that the command takes and prints.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
        }
    }
}

impl FromStr for RouterPrecision {
    type Err = String;

    fn from_str(name: &str) -> std::result::Result<Self, String> {
        let mut all = [Self::F32, Self::Bf16].into_iter();
        all.find(|precision| precision.name() == name).ok_or_else(|| "expected f32 or bf16".into())
    }
}

/// `topk_ids` and `topk_weights [M, topk]` of `x [M, H]`, by a router whose weight is `[E, H]`; with `chosen` ids it only
/// weighs them.
pub(crate) fn route(
    router: &Router,
    weight: &[f32],
    x: &[f32],
    hidden: usize,
    precision: RouterPrecision,
    chosen: Option<&[i32]>,
) -> Result<(Vec<i32>, Vec<f32>)> {
    match precision {
        RouterPrecision::F32 => {
            let logits = logits(weight, x, hidden);
            choose(router, &logits, weight.len() / hidden, chosen)
        }
        RouterPrecision::Bf16 => {
            let mut logits = logits(&rounded(weight), &rounded(x), hidden);
            let experts = weight.len() / hidden;
            for logits in logits.chunks_mut(experts) {
                logits.iter_mut().zip(&router.logit_bias).for_each(|(logit, bias)| *logit += bias);
            }
            let unbiased = Router { logit_bias: Vec::new(), ..router.clone() };
            let (ids, weights) = choose(&unbiased, &rounded(&logits), experts, chosen)?;
            Ok((ids, rounded(&weights).into_owned()))
        }
    }
}

/// The values rounded to bf16.
fn rounded(values: &[f32]) -> Cow<'_, [f32]> {
    values.iter().map(|&value| bf16::from_f32(value).to_f32()).collect()
}

fn choose(router: &Router, logits: &[f32], experts: usize, chosen: Option<&[i32]>) -> Result<(Vec<i32>, Vec<f32>)> {
    let (tokens, topk) = (logits.len() / experts, router.topk);
    let mut weights = vec![0.0; tokens * topk];
    let logits = MatrixRef::new(logits, tokens, experts)?;
    let ids = match chosen {
        Some(ids) => {
            router.weigh(logits, ids, &mut weights)?;
            ids.to_vec()
        }
        None => {
            let mut ids = vec![0; tokens * topk];
            router.route(logits, &mut ids, &mut weights)?;
            ids
        }
    };
    Ok((ids, weights))
}

/// `[M, E]`.
fn logits(weight: &[f32], x: &[f32], hidden: usize) -> Vec<f32> {
    let (tokens, experts) = (x.len() / hidden, weight.len() / hidden);
    let mut logits = vec![0.0; tokens * experts];
    logits.par_chunks_mut(experts).zip(x.par_chunks(hidden)).for_each(|(logits, x)| {
        for (logit, weight) in logits.iter_mut().zip(weight.chunks(hidden)) {
            *logit = dot(x, weight);
        }
    });
    logits
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
        let router = Router::softmax(1, true);
        let x = [5.0, 1.0, 1.0, 5.0, -9.0, -1.0];
        let (ids, weights) = route(&router, &weight, &x, 2, RouterPrecision::F32, None).unwrap();
        assert_eq!((ids, weights), (vec![0, 1, 2], vec![1.0; 3]));
    }

    #[test]
    fn bf16_rounds_logits_and_weights() {
        // Logits 1 + 2^-9 and 1: one value in bf16, where the tie goes to the lower id.
        let (weight, x) = ([1.0, 1.0 + 2f32.powi(-9)], [1.0]);
        let choice = |router: &Router, precision| route(router, &weight, &x, 1, precision, None).unwrap();
        assert_eq!(choice(&Router::softmax(1, true), RouterPrecision::F32).0, [1]);
        assert_eq!(choice(&Router::softmax(1, true), RouterPrecision::Bf16).0, [0]);
        // The bias is added before the rounding.
        let biased = |bias| Router { logit_bias: vec![0.0, bias], ..Router::softmax(1, true) };
        assert_eq!(choice(&biased(2f32.powi(-7)), RouterPrecision::Bf16).0, [1]);
        assert_eq!(choice(&biased(2f32.powi(-9)), RouterPrecision::Bf16).0, [0]);
        let (_, weights) = choice(&Router::sigmoid(1), RouterPrecision::Bf16);
        assert_eq!(weights, [bf16::from_f32(1.0 / (1.0 + (-1f32).exp())).to_f32()]);
    }
}
