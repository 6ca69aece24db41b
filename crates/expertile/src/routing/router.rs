//! Routers: from logits `[M, G]` to `topk_ids` and `topk_weights`.
//!
//! ```text
//! logits  += logit_bias                                       (gpt-oss)
//! scores   = softmax(logits), sigmoid(logits) or sqrt(softplus(logits)), per expert
//! keys     = scores + correction_bias                         (steers the choice only)
//! keys     = -inf outside the topk_groups best groups         (group-limited routing)
//! ids      = the topk best keys, best first
//! weights  = scores[ids], divided by their sum if asked, times scaling_factor
//! ```
//!
//! Top-k first and a softmax over the chosen logits (gpt-oss, Granite) is the softmax over all, divided by the chosen
//! sum: the same real numbers. Phi-3.5-MoE's sparse mixer is a [`Scoring`] of its own. Where a token's number in the
//! vocabulary chooses its experts (the first layers of DeepSeek-V4), the router only weighs them. Ties go to the lower
//! id. Sums are in f32, in ascending order of the expert id (softmax) or of the slot (normalization).

use crate::error::{Error, Result, checked_mul, require_len};
use crate::matrix::MatrixRef;
use bytemuck::allocation::try_zeroed_vec;

/// How a checkpoint turns logits into a choice of experts.
#[derive(Debug, Clone, PartialEq)]
pub struct Router {
    /// Experts per token.
    pub topk: usize,
    /// What a logit becomes before experts are compared.
    pub scoring: Scoring,
    /// `[G]`, added to the logits; empty for none.
    pub logit_bias: Vec<f32>,
    /// `[G]`, added to the scores for choosing only; empty for none.
    pub correction_bias: Vec<f32>,
    /// Groups of experts that a token may choose from; `None` for all of them.
    pub groups: Option<Groups>,
    /// What the chosen scores are divided by.
    pub normalization: Normalization,
    /// What the weights are multiplied by in the end.
    pub scaling_factor: f32,
}

/// What a logit becomes before experts are compared.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub enum Scoring {
    /// Softmax over all experts.
    Softmax,
    /// Sigmoid of each logit.
    Sigmoid,
    /// The square root of `ln(1 + exp(x))` (DeepSeek-V4).
    SqrtSoftplus,
    /// Phi-3.5-MoE's sparse mixer at inference (<https://arxiv.org/abs/2409.12136>), two experts per token: each is the
    /// largest logit left, its weight a softmax over the logits left whose distance to it, relative to the larger of
    /// the two magnitudes, is at most twice the jitter.
    SparseMixer {
        /// `router_jitter_noise`.
        jitter: f32,
    },
}

/// Group-limited routing: experts in equal groups, of which a token may choose from the best.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Groups {
    /// Number of equal groups that the experts are cut into.
    pub count: usize,
    /// Groups a token may choose from.
    pub topk: usize,
    /// How groups are compared.
    pub worth: GroupWorth,
}

/// What a group counts for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GroupWorth {
    /// The sum of its two best keys (DeepSeek-V3).
    BestTwo,
    /// Its best key (DeepSeek-V2).
    Best,
}

/// What the chosen scores are divided by.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Normalization {
    /// Nothing.
    None,
    /// Their sum.
    Sum,
    /// Their sum plus this.
    SumPlus(f32),
    /// Their sum, but at least this.
    SumAtLeast(f32),
}

impl Router {
    /// Softmax over all experts, then the `topk` best, their weights divided by their sum if asked.
    #[must_use]
    pub fn softmax(topk: usize, renormalize: bool) -> Self {
        Self {
            topk,
            scoring: Scoring::Softmax,
            logit_bias: Vec::new(),
            correction_bias: Vec::new(),
            groups: None,
            normalization: if renormalize { Normalization::Sum } else { Normalization::None },
            scaling_factor: 1.0,
        }
    }

    /// Sigmoid scores, then the `topk` best, not normalized.
    #[must_use]
    pub fn sigmoid(topk: usize) -> Self {
        Self { scoring: Scoring::Sigmoid, ..Self::softmax(topk, false) }
    }

    /// Chooses experts: `logits [M, G]` to `topk_ids [M, topk]` and `topk_weights [M, topk]`, best first.
    ///
    /// A NaN score sorts below every other; under softmax one NaN logit makes all of its token's scores NaN.
    ///
    /// # Errors
    /// As [`Router::check`]; [`Error::BufferTooSmall`] for short outputs, [`Error::Overflow`] if `M * topk` does not
    /// fit, [`Error::Memory`].
    pub fn route(&self, logits: MatrixRef<'_, f32>, topk_ids: &mut [i32], topk_weights: &mut [f32]) -> Result<()> {
        self.check_call(logits, topk_ids.len(), topk_weights.len())?;
        let (mut scores, mut keys) = (room(logits.cols())?, room(logits.cols())?);
        for token in 0..logits.rows() {
            self.load_logits(logits, token, &mut scores);
            let slots = token * self.topk..(token + 1) * self.topk;
            self.route_token(&mut scores, &mut keys, &mut topk_ids[slots.clone()], &mut topk_weights[slots]);
        }
        Ok(())
    }

    /// Weighs experts that are chosen already: `logits [M, G]` and `topk_ids [M, topk]` to `topk_weights [M, topk]`, what
    /// [`Router::route`] gives for that choice. The correction bias and the groups, which steer a choice, do not matter;
    /// an empty slot (a negative id) weighs nothing.
    ///
    /// # Errors
    /// As [`Router::route`]; [`Error::ExpertId`] for an id that is no expert's.
    pub fn weigh(&self, logits: MatrixRef<'_, f32>, topk_ids: &[i32], topk_weights: &mut [f32]) -> Result<()> {
        self.check_call(logits, topk_ids.len(), topk_weights.len())?;
        let (experts, topk) = (logits.cols(), self.topk);
        for (at, &id) in topk_ids[..logits.rows() * topk].iter().enumerate() {
            if usize::try_from(id).is_ok_and(|id| id >= experts) {
                return Err(Error::ExpertId { token: at / topk, slot: at % topk, id: id.into(), limit: experts });
            }
        }
        let mut scores = room(experts)?;
        for token in 0..logits.rows() {
            self.load_logits(logits, token, &mut scores);
            let slots = token * topk..(token + 1) * topk;
            self.scoring.score(&mut scores);
            self.weigh_token(&scores, &topk_ids[slots.clone()], &mut topk_weights[slots]);
        }
        Ok(())
    }

    fn check_call(&self, logits: MatrixRef<'_, f32>, ids: usize, weights: usize) -> Result<()> {
        self.check(logits.cols())?;
        let slots = checked_mul("M * topk", logits.rows(), self.topk)?;
        require_len("topk_ids", ids, slots)?;
        require_len("topk_weights", weights, slots)
    }

    /// A token's logits, their bias added.
    fn load_logits(&self, logits: MatrixRef<'_, f32>, token: usize, out: &mut [f32]) {
        for (expert, logit) in out.iter_mut().enumerate() {
            *logit = logits.get(token, expert);
        }
        for (logit, bias) in out.iter_mut().zip(&self.logit_bias) {
            *logit += bias;
        }
    }

    /// Whether this router can choose among `experts` experts.
    ///
    /// # Errors
    /// [`Error::Value`] if `G` does not fit in i32, if `topk` is 0 or above `G` (or above what the allowed groups
    /// hold), if the groups do not cut `G` evenly, or for a sparse mixer with another `topk` than 2, with groups or
    /// with a correction bias; [`Error::Shape`] for a bias that is not `[G]`.
    pub fn check(&self, experts: usize) -> Result<()> {
        for (argument, bias) in [("logit_bias", &self.logit_bias), ("correction_bias", &self.correction_bias)] {
            if !bias.is_empty() && bias.len() != experts {
                return Err(Error::shape(argument, &[bias.len()], format!("[{experts}]")));
            }
        }
        if i32::try_from(experts).is_err() {
            return Err(Error::value("experts", experts, format!("at most {}", i32::MAX)));
        }
        let mut selectable = experts;
        if let Some(Groups { count, topk, .. }) = self.groups {
            if count == 0 || !experts.is_multiple_of(count) {
                return Err(Error::value("groups", count, format!("a divisor of {experts} experts")));
            }
            if topk == 0 || topk > count {
                return Err(Error::value("topk_groups", topk, format!("1 to {count}")));
            }
            selectable = experts / count * topk;
        }
        if self.topk == 0 || self.topk > selectable {
            return Err(Error::value("topk", self.topk, format!("1 to {selectable}")));
        }
        if let Scoring::SparseMixer { jitter } = self.scoring {
            if self.topk != 2 {
                return Err(Error::value("topk", self.topk, "2 for a sparse mixer"));
            }
            if let Some(groups) = self.groups {
                return Err(Error::value("groups", groups.count, "none for a sparse mixer"));
            }
            if !self.correction_bias.is_empty() {
                return Err(Error::shape("correction_bias", &[experts], "none for a sparse mixer"));
            }
            if !(jitter.is_finite() && jitter >= 0.0) {
                let expected = "a finite number of at least 0";
                return Err(Error::Parameter { argument: "jitter", actual: jitter, expected });
            }
        }
        Ok(())
    }

    /// `scores` come in as logits; `keys` is scratch.
    fn route_token(&self, scores: &mut [f32], keys: &mut [f32], ids: &mut [i32], weights: &mut [f32]) {
        self.scoring.score(scores);
        keys.copy_from_slice(scores);
        for (key, bias) in keys.iter_mut().zip(&self.correction_bias) {
            *key += bias;
        }
        if let Some(groups) = &self.groups {
            mask_groups(keys, groups);
        }
        choose(keys, ids);
        self.weigh_token(scores, ids, weights);
    }

    fn weigh_token(&self, scores: &[f32], ids: &[i32], weights: &mut [f32]) {
        if let Scoring::SparseMixer { jitter } = self.scoring {
            sparse_mixer(scores, jitter, ids, weights);
        } else {
            for (weight, &id) in weights.iter_mut().zip(ids) {
                *weight = usize::try_from(id).map_or(0.0, |id| scores[id]);
            }
            self.normalization.apply(weights);
        }
        weights.iter_mut().for_each(|weight| *weight *= self.scaling_factor);
    }
}

impl Scoring {
    /// Makes scores of a token's logits; a sparse mixer compares the logits themselves.
    fn score(self, logits: &mut [f32]) {
        match self {
            Self::Softmax => softmax(logits),
            Self::Sigmoid => logits.iter_mut().for_each(|x| *x = 1.0 / (1.0 + (-*x).exp())),
            // ln(1 + exp(x)) of the magnitude's negative: nothing overflows.
            Self::SqrtSoftplus => logits.iter_mut().for_each(|x| *x = (x.max(0.0) + (-x.abs()).exp().ln_1p()).sqrt()),
            Self::SparseMixer { .. } => {}
        }
    }
}

/// A token's scores, or keys.
fn room(experts: usize) -> Result<Vec<f32>> {
    let bytes = experts.saturating_mul(size_of::<f32>());
    try_zeroed_vec(experts).map_err(|()| Error::Memory { what: "a token's scores", bytes })
}

impl Normalization {
    fn apply(self, weights: &mut [f32]) {
        let sum = weights.iter().sum::<f32>();
        let divisor = match self {
            Self::None => return,
            Self::Sum => sum,
            Self::SumPlus(epsilon) => sum + epsilon,
            // A NaN sum stays NaN, which `f32::max` would not grant.
            Self::SumAtLeast(least) => {
                if sum < least {
                    least
                } else {
                    sum
                }
            }
        };
        weights.iter_mut().for_each(|weight| *weight /= divisor);
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

/// The weights of the two best logits, `ids`: each a softmax over what is near it, the first left out for the second.
fn sparse_mixer(logits: &[f32], jitter: f32, ids: &[i32], weights: &mut [f32]) {
    for (round, weight) in weights.iter_mut().enumerate() {
        *weight = 0.0;
        let Ok(id) = usize::try_from(ids[round]) else { continue };
        let best = logits[id];
        let mut sum = 0.0;
        for (expert, &logit) in logits.iter().enumerate() {
            let left = !ids[..round].contains(&(expert as i32));
            let magnitude = if logit.abs() < best { best } else { logit.abs() };
            let far = (best - logit) / magnitude > 2.0 * jitter;
            if left && !far {
                sum += (logit - best).exp();
            }
        }
        *weight = 1.0 / sum;
    }
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

/// Masks all but the best groups with -inf.
fn mask_groups(keys: &mut [f32], groups: &Groups) {
    if groups.count == groups.topk {
        return;
    }
    let size = keys.len() / groups.count;
    let worth = match groups.worth {
        GroupWorth::BestTwo => best_two,
        GroupWorth::Best => best_one,
    };
    let worth: Vec<f32> = keys.chunks_exact(size).map(worth).collect();
    let mut kept = vec![0; groups.topk];
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

fn best_one(keys: &[f32]) -> f32 {
    keys.iter().copied().fold(f32::NAN, f32::max)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn route(router: &Router, logits: &[f32]) -> (Vec<i32>, Vec<f32>) {
        let mut ids = vec![0; router.topk];
        let mut weights = vec![0.0; router.topk];
        router.route(MatrixRef::new(logits, 1, logits.len()).unwrap(), &mut ids, &mut weights).unwrap();
        (ids, weights)
    }

    fn grouped(topk: usize, count: usize, topk_groups: usize, worth: GroupWorth) -> Router {
        Router { groups: Some(Groups { count, topk: topk_groups, worth }), ..Router::sigmoid(topk) }
    }

    #[test]
    fn softmax_chooses_the_best_first_and_breaks_ties_downwards() {
        let (ids, weights) = route(&Router::softmax(3, true), &[1.0, 3.0, 2.0, 3.0]);
        assert_eq!(ids, [1, 3, 2]);
        assert!((weights.iter().sum::<f32>() - 1.0).abs() < 1e-6);
        assert_eq!(weights[0], weights[1]);
    }

    #[test]
    fn softmax_without_renormalising_keeps_the_share_of_all() {
        let (ids, weights) = route(&Router::softmax(1, false), &[0.0, 0.0, 0.0, 0.0]);
        assert_eq!((ids, weights), (vec![0], vec![0.25]));
    }

    #[test]
    fn the_correction_bias_steers_the_choice_but_not_the_weight() {
        let router = Router { correction_bias: vec![0.0, 10.0], scaling_factor: 2.0, ..Router::sigmoid(1) };
        assert_eq!(route(&router, &[5.0, 0.0]), (vec![1], vec![1.0]));
    }

    #[test]
    fn the_logit_bias_steers_both() {
        let router = Router { logit_bias: vec![0.0, 5.0], ..Router::softmax(1, false) };
        let (ids, weights) = route(&router, &[5.0, 0.0]);
        assert_eq!((ids, weights), (vec![0], vec![0.5]));
        let (ids, _) = route(&router, &[4.0, 0.0]);
        assert_eq!(ids, [1]);
    }

    #[test]
    fn sums_are_divided_by_what_was_asked() {
        let with = |normalization| route(&Router { normalization, ..Router::sigmoid(2) }, &[0.0, 0.0]).1;
        assert_eq!(with(Normalization::None), [0.5, 0.5]);
        assert_eq!(with(Normalization::SumPlus(1.0)), [0.25, 0.25]);
        assert_eq!(with(Normalization::SumAtLeast(4.0)), [0.125, 0.125]);
        assert_eq!(with(Normalization::SumAtLeast(0.5)), [0.5, 0.5]);
        let nan = Router { normalization: Normalization::SumAtLeast(4.0), ..Router::sigmoid(1) };
        assert!(route(&nan, &[f32::NAN]).1[0].is_nan());
    }

    #[test]
    fn experts_outside_the_best_groups_are_not_chosen() {
        // Expert 0 is the single best, but the second group's two best are worth more together.
        let logits = [4.0, -9.0, 3.0, 3.5];
        assert_eq!(route(&grouped(2, 2, 1, GroupWorth::BestTwo), &logits).0, [3, 2]);
        assert_eq!(route(&grouped(2, 2, 1, GroupWorth::Best), &logits).0, [0, 1]);
    }

    #[test]
    fn a_sparse_mixer_weighs_only_what_is_near() {
        let router = Router { scoring: Scoring::SparseMixer { jitter: 0.25 }, ..Router::softmax(2, false) };
        // 4 and 3 are within half of 4; 1 is not. Of what is left, 3 and 1 are further apart than half of 3.
        let (ids, weights) = route(&router, &[1.0, 3.0, 4.0]);
        assert_eq!(ids, [2, 1]);
        let first = 1.0 / (1.0 + (-1.0f32).exp());
        assert!((weights[0] - first).abs() < 1e-6 && weights[1] == 1.0, "{weights:?}");
        let (_, weights) = route(&router, &[-1.0, -1.25, -9.0]);
        assert!((weights[0] - 1.0 / (1.0 + (-0.25f32).exp())).abs() < 1e-6, "{weights:?}");
    }

    #[test]
    fn nan_logits_are_chosen_last() {
        assert_eq!(route(&Router::sigmoid(3), &[f32::NAN, -1.0, 1.0]).0, [2, 1, 0]);
    }

    #[test]
    fn impossible_routers_are_errors() {
        let logits = [0.0; 6];
        let logits = MatrixRef::new(&logits, 1, 6).unwrap();
        let refuse = |router: Router, name: &str| {
            let (mut ids, mut weights) = ([7; 9], [7.0; 9]);
            let error = router.route(logits, &mut ids, &mut weights).unwrap_err();
            assert!(error.to_string().starts_with(name), "{error}");
            assert_eq!((ids, weights), ([7; 9], [7.0; 9]));
        };
        refuse(Router::softmax(0, true), "topk is 0");
        refuse(Router::softmax(7, true), "topk is 7");
        refuse(grouped(3, 4, 1, GroupWorth::BestTwo), "groups is 4");
        refuse(grouped(3, 0, 1, GroupWorth::BestTwo), "groups is 0");
        refuse(grouped(3, 3, 4, GroupWorth::BestTwo), "topk_groups is 4");
        refuse(grouped(3, 3, 1, GroupWorth::Best), "topk is 3, expected 1 to 2");
        refuse(Router { correction_bias: vec![0.0; 5], ..Router::sigmoid(3) }, "correction_bias has shape [5]");
        refuse(Router { logit_bias: vec![0.0; 7], ..Router::sigmoid(3) }, "logit_bias has shape [7]");
        let mixer = Router { scoring: Scoring::SparseMixer { jitter: 0.01 }, ..Router::softmax(2, false) };
        refuse(Router { topk: 3, ..mixer.clone() }, "topk is 3, expected 2 for a sparse mixer");
        refuse(
            Router { correction_bias: vec![0.0; 6], ..mixer.clone() },
            "correction_bias has shape [6], expected none",
        );
        refuse(Router { scoring: Scoring::SparseMixer { jitter: f32::NAN }, ..mixer }, "jitter is NaN");
        let router = Router::softmax(2, true);
        assert!(matches!(router.route(logits, &mut [0], &mut [0.0; 2]), Err(Error::BufferTooSmall { .. })));
    }
}
