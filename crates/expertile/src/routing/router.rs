//! The routers of three model families: from logits `[M, G]` to `topk_ids` and `topk_weights`.
//!
//! | family | scores | choice | weights |
//! |---|---|---|---|
//! | Mixtral | softmax over all experts | top-k | renormalised to sum 1 |
//! | Qwen3-MoE | softmax over all experts | top-k | renormalised if the checkpoint's `norm_topk_prob` says so |
//! | DeepSeek-V3 | sigmoid | top-k of `score + correction_bias` inside the best groups | the scores, renormalised if asked, times a factor |
//!
//! A group's worth is the sum of its two best biased scores; the other groups are masked with -inf (DeepSeek's own
//! inference code does the same). Ties go to the lower id. Sums are in f32, in ascending order of the expert id (softmax)
//! or of the slot (renormalisation).

use crate::dtype::MatrixRef;
use crate::error::{Error, Result, checked_mul, require_len};
use bytemuck::allocation::try_zeroed_vec;

/// How a checkpoint turns logits into a choice of experts.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Router {
    /// Softmax over all experts, then the `topk` best.
    Softmax {
        /// Experts per token.
        topk: usize,
        /// Whether the chosen weights are divided by their sum.
        renormalize: bool,
    },
    /// Sigmoid scores, a correction bias that only steers the choice, group-limited top-k, a scaling factor.
    Sigmoid {
        /// Experts per token.
        topk: usize,
        /// `[G]`, added to the scores for choosing only; empty for none.
        correction_bias: Vec<f32>,
        /// Number of equal groups that the experts are cut into; 1 for none.
        groups: usize,
        /// Groups a token may choose from.
        topk_groups: usize,
        /// Whether the chosen weights are divided by their sum (plus 1e-20).
        renormalize: bool,
        /// What the weights are multiplied by in the end.
        scaling_factor: f32,
    },
}

impl Router {
    /// Experts per token.
    #[must_use]
    pub fn topk(&self) -> usize {
        match self {
            Self::Softmax { topk, .. } | Self::Sigmoid { topk, .. } => *topk,
        }
    }

    /// Chooses experts: `logits [M, G]` to `topk_ids [M, topk]` and `topk_weights [M, topk]`, best first.
    ///
    /// A NaN score sorts below every other; under softmax one NaN logit makes all of its token's scores NaN.
    ///
    /// # Errors
    /// [`Error::Value`] if `G` exceeds i32, `topk` is 0 or above `G` (or above what the allowed groups hold), or if the groups do not cut
    /// `G` evenly; [`Error::Shape`] for a bias that is not `[G]`; [`Error::BufferTooSmall`] for short outputs,
    /// [`Error::Overflow`] for `M * topk`.
    pub fn route(&self, logits: MatrixRef<'_, f32>, topk_ids: &mut [i32], topk_weights: &mut [f32]) -> Result<()> {
        let (tokens, experts) = (logits.rows(), logits.cols());
        if i32::try_from(experts).is_err() {
            return Err(Error::value("experts", experts, format!("at most {}", i32::MAX)));
        }
        self.validate(experts)?;
        let topk = self.topk();
        let slots = checked_mul("M * topk", tokens, topk)?;
        require_len("topk_ids", topk_ids.len(), slots)?;
        require_len("topk_weights", topk_weights.len(), slots)?;
        let room = || {
            let bytes = experts.saturating_mul(size_of::<f32>());
            try_zeroed_vec(experts).map_err(|()| Error::Memory { what: "a token's scores", bytes })
        };
        let (mut scores, mut keys): (Vec<f32>, Vec<f32>) = (room()?, room()?);
        for token in 0..tokens {
            for (expert, score) in scores.iter_mut().enumerate() {
                *score = logits.get(token, expert);
            }
            let ids = &mut topk_ids[token * topk..][..topk];
            let weights = &mut topk_weights[token * topk..][..topk];
            self.route_token(&mut scores, &mut keys, ids, weights);
        }
        Ok(())
    }

    fn validate(&self, experts: usize) -> Result<()> {
        let topk = self.topk();
        let mut selectable = experts;
        if let Self::Sigmoid { correction_bias, groups, topk_groups, .. } = self {
            if !correction_bias.is_empty() && correction_bias.len() != experts {
                return Err(Error::shape("correction_bias", &[correction_bias.len()], format!("[{experts}]")));
            }
            if *groups == 0 || !experts.is_multiple_of(*groups) {
                return Err(Error::value("groups", *groups, format!("a divisor of {experts} experts")));
            }
            if *topk_groups == 0 || topk_groups > groups {
                return Err(Error::value("topk_groups", *topk_groups, format!("1 to {groups}")));
            }
            selectable = experts / groups * topk_groups;
        }
        if topk == 0 || topk > selectable {
            return Err(Error::value("topk", topk, format!("1 to {selectable}")));
        }
        Ok(())
    }

    /// `scores` come in as logits; `keys` is scratch.
    fn route_token(&self, scores: &mut [f32], keys: &mut [f32], ids: &mut [i32], weights: &mut [f32]) {
        let (renormalize, guard, factor) = match self {
            Self::Softmax { renormalize, .. } => {
                softmax(scores);
                keys.copy_from_slice(scores);
                (*renormalize, 0.0, 1.0)
            }
            Self::Sigmoid { correction_bias, groups, topk_groups, renormalize, scaling_factor, .. } => {
                for score in &mut *scores {
                    *score = 1.0 / (1.0 + (-*score).exp());
                }
                keys.copy_from_slice(scores);
                for (key, bias) in keys.iter_mut().zip(correction_bias) {
                    *key += bias;
                }
                mask_groups(keys, *groups, *topk_groups);
                (*renormalize, 1e-20, *scaling_factor)
            }
        };
        choose(keys, ids);
        for (weight, &id) in weights.iter_mut().zip(&*ids) {
            *weight = scores[id as usize];
        }
        if renormalize {
            let sum = weights.iter().sum::<f32>() + guard;
            weights.iter_mut().for_each(|weight| *weight /= sum);
        }
        weights.iter_mut().for_each(|weight| *weight *= factor);
    }
}

fn softmax(logits: &mut [f32]) {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut sum = 0.0;
    for x in &mut *logits {
        *x = (*x - max).exp();
        sum += *x;
    }
    logits.iter_mut().for_each(|x| *x /= sum);
}

/// Whether `a` is chosen before `b`; NaN loses against everything.
fn beats(a: f32, b: f32) -> bool {
    a > b || (b.is_nan() && !a.is_nan())
}

/// The `ids.len()` best keys, best first, ties to the lower index.
fn choose(keys: &[f32], ids: &mut [i32]) {
    let mut chosen = 0;
    for (expert, &key) in keys.iter().enumerate() {
        let mut at = chosen;
        while at > 0 && beats(key, keys[ids[at - 1] as usize]) {
            at -= 1;
        }
        if at == ids.len() {
            continue;
        }
        let end = chosen.min(ids.len() - 1);
        ids.copy_within(at..end, at + 1);
        ids[at] = expert as i32;
        chosen = (chosen + 1).min(ids.len());
    }
}

/// Masks all but the `topk_groups` best groups with -inf.
fn mask_groups(keys: &mut [f32], groups: usize, topk_groups: usize) {
    if groups == topk_groups {
        return;
    }
    let size = keys.len() / groups;
    let worth: Vec<f32> = keys.chunks_exact(size).map(best_two).collect();
    let mut kept = vec![0; topk_groups];
    choose(&worth, &mut kept);
    for (group, members) in keys.chunks_exact_mut(size).enumerate() {
        if !kept.contains(&(group as i32)) {
            members.fill(f32::NEG_INFINITY);
        }
    }
}

fn best_two(keys: &[f32]) -> f32 {
    let (mut best, mut second) = (f32::NEG_INFINITY, f32::NEG_INFINITY);
    for &key in keys {
        if key > best {
            (best, second) = (key, best);
        } else if key > second {
            second = key;
        }
    }
    if keys.len() == 1 { best } else { best + second }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn route(router: &Router, logits: &[f32]) -> (Vec<i32>, Vec<f32>) {
        let mut ids = vec![0; router.topk()];
        let mut weights = vec![0.0; router.topk()];
        router.route(MatrixRef::new(logits, 1, logits.len()).unwrap(), &mut ids, &mut weights).unwrap();
        (ids, weights)
    }

    #[test]
    fn softmax_chooses_the_best_first_and_breaks_ties_downwards() {
        let router = Router::Softmax { topk: 3, renormalize: true };
        let (ids, weights) = route(&router, &[1.0, 3.0, 2.0, 3.0]);
        assert_eq!(ids, [1, 3, 2]);
        assert!((weights.iter().sum::<f32>() - 1.0).abs() < 1e-6);
        assert_eq!(weights[0], weights[1]);
    }

    #[test]
    fn softmax_without_renormalising_keeps_the_share_of_all() {
        let router = Router::Softmax { topk: 1, renormalize: false };
        let (ids, weights) = route(&router, &[0.0, 0.0, 0.0, 0.0]);
        assert_eq!((ids, weights), (vec![0], vec![0.25]));
    }

    #[test]
    fn the_bias_steers_the_choice_but_not_the_weight() {
        let router = Router::Sigmoid {
            topk: 1,
            correction_bias: vec![0.0, 10.0],
            groups: 1,
            topk_groups: 1,
            renormalize: false,
            scaling_factor: 2.0,
        };
        let (ids, weights) = route(&router, &[5.0, 0.0]);
        assert_eq!((ids, weights), (vec![1], vec![1.0]));
    }

    #[test]
    fn experts_outside_the_best_groups_are_not_chosen() {
        let router = Router::Sigmoid {
            topk: 2,
            correction_bias: vec![],
            groups: 2,
            topk_groups: 1,
            renormalize: true,
            scaling_factor: 1.0,
        };
        // Expert 0 is the single best, but the second group's two best are worth more together.
        let (ids, _) = route(&router, &[4.0, -9.0, 3.0, 3.5]);
        assert_eq!(ids, [3, 2]);
    }

    #[test]
    fn nan_logits_are_chosen_last() {
        let router = Router::Sigmoid {
            topk: 3,
            correction_bias: vec![],
            groups: 1,
            topk_groups: 1,
            renormalize: false,
            scaling_factor: 1.0,
        };
        let (ids, _) = route(&router, &[f32::NAN, -1.0, 1.0]);
        assert_eq!(ids, [2, 1, 0]);
    }

    #[test]
    fn impossible_routers_are_errors() {
        let logits = [0.0; 6];
        let logits = MatrixRef::new(&logits, 1, 6).unwrap();
        let refuse = |router: Router, name: &str| {
            let error = router.route(logits, &mut [7; 9], &mut [7.0; 9]).unwrap_err();
            assert!(error.to_string().starts_with(name), "{error}");
        };
        refuse(Router::Softmax { topk: 0, renormalize: true }, "topk is 0");
        refuse(Router::Softmax { topk: 7, renormalize: true }, "topk is 7");
        let sigmoid = |groups, topk_groups, bias: usize| Router::Sigmoid {
            topk: 3,
            correction_bias: vec![0.0; bias],
            groups,
            topk_groups,
            renormalize: true,
            scaling_factor: 1.0,
        };
        refuse(sigmoid(4, 1, 0), "groups is 4");
        refuse(sigmoid(3, 4, 0), "topk_groups is 4");
        refuse(sigmoid(3, 1, 0), "topk is 3");
        refuse(sigmoid(3, 3, 5), "correction_bias has shape [5]");
        let router = Router::Softmax { topk: 2, renormalize: true };
        assert!(matches!(router.route(logits, &mut [0], &mut [0.0; 2]), Err(Error::BufferTooSmall { .. })));
    }
}
