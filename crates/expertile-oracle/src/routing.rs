//! The routers, in f64: from logits to the chosen experts and their weights.

/// A router, written down step by step.
#[derive(Debug, Clone)]
pub struct Router<'a> {
    /// Experts per token.
    pub topk: usize,
    /// What a logit becomes.
    pub scoring: Scoring,
    /// `[experts]`, added to the logits; empty for none.
    pub logit_bias: &'a [f32],
    /// `[experts]`, added to the scores for choosing only; empty for none.
    pub correction_bias: &'a [f32],
    /// Equal groups that the experts are cut into, and how many of them a token may choose from.
    pub groups: (usize, usize),
    /// How many of a group's best keys are summed to compare groups.
    pub group_best: usize,
    /// What the weights are divided by, from their sum; `None` for nothing.
    pub divisor: Option<fn(f64) -> f64>,
    /// What the weights are multiplied by in the end.
    pub scaling_factor: f32,
}

/// What a logit becomes before experts are compared.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Scoring {
    /// Its share of the exponentials of all.
    Softmax,
    /// `1 / (1 + exp(-x))`.
    Sigmoid,
    /// `sqrt(ln(1 + exp(x)))`.
    SqrtSoftplus,
    /// Phi-3.5-MoE's, with its jitter.
    SparseMixer(f64),
}

impl Router<'_> {
    /// `logits [M, experts]` to ids and weights `[M, topk]`, best first, ties to the lower id.
    #[must_use]
    pub fn route(&self, logits: &[f32], experts: usize) -> (Vec<i32>, Vec<f64>) {
        let (mut ids, mut weights) = (Vec::new(), Vec::new());
        for logits in logits.chunks(experts) {
            let at = |list: &[f32], expert: usize| list.get(expert).map_or(0.0, |&bias| f64::from(bias));
            let logits: Vec<f64> = (0..experts).map(|e| f64::from(logits[e]) + at(self.logit_bias, e)).collect();
            let (chosen, own) = match self.scoring {
                Scoring::SparseMixer(jitter) => sparse_mixer(&logits, jitter),
                Scoring::Softmax => self.choose(&softmax(&logits)),
                Scoring::Sigmoid => self.choose(&logits.iter().map(|x| 1.0 / (1.0 + (-x).exp())).collect::<Vec<f64>>()),
                Scoring::SqrtSoftplus => {
                    self.choose(&logits.iter().map(|x| (1.0 + x.exp()).ln().sqrt()).collect::<Vec<f64>>())
                }
            };
            ids.extend(chosen.iter().map(|&expert| expert as i32));
            weights.extend(own.iter().map(|weight| weight * f64::from(self.scaling_factor)));
        }
        (ids, weights)
    }

    fn choose(&self, scores: &[f64]) -> (Vec<usize>, Vec<f64>) {
        let bias = |expert: usize| self.correction_bias.get(expert).map_or(0.0, |&bias| f64::from(bias));
        let keys: Vec<f64> = scores.iter().enumerate().map(|(expert, score)| score + bias(expert)).collect();
        let size = keys.len() / self.groups.0;
        let worth: Vec<f64> = keys
            .chunks(size)
            .map(|group| best(group, size.min(self.group_best)).into_iter().map(|expert| group[expert]).sum())
            .collect();
        let kept = best(&worth, self.groups.1);
        let masked: Vec<f64> = (0..keys.len())
            .map(|expert| if kept.contains(&(expert / size)) { keys[expert] } else { f64::NEG_INFINITY })
            .collect();
        let chosen = best(&masked, self.topk);
        let mut own: Vec<f64> = chosen.iter().map(|&expert| scores[expert]).collect();
        if let Some(divisor) = self.divisor {
            let divisor = divisor(own.iter().sum());
            own.iter_mut().for_each(|weight| *weight /= divisor);
        }
        (chosen, own)
    }
}

fn softmax(logits: &[f64]) -> Vec<f64> {
    let largest = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let powers: Vec<f64> = logits.iter().map(|x| (x - largest).exp()).collect();
    let total: f64 = powers.iter().sum();
    powers.iter().map(|power| power / total).collect()
}

/// The largest logit and its softmax over the logits near it; then the same without the first.
fn sparse_mixer(logits: &[f64], jitter: f64) -> (Vec<usize>, Vec<f64>) {
    let first = best(logits, 1)[0];
    let mut rest = logits.to_vec();
    rest[first] = f64::NEG_INFINITY;
    let second = best(&rest, 2).into_iter().find(|&expert| expert != first).expect("two experts at least");
    let weight = |candidates: &[f64], chosen: usize| {
        let largest = candidates[chosen];
        let near = |expert: usize| {
            let far = (largest - logits[expert]) / logits[expert].abs().max(largest) > 2.0 * jitter;
            if far { 0.0 } else { (candidates[expert] - largest).exp() }
        };
        1.0 / (0..logits.len()).map(near).sum::<f64>()
    };
    (vec![first, second], vec![weight(logits, first), weight(&rest, second)])
}

/// The places of the `count` best scores, best first, ties to the lower place; NaN comes after everything else.
fn best(scores: &[f64], count: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    // A stable sort keeps equal scores in ascending place.
    order.sort_by(|&a, &b| match (scores[a].is_nan(), scores[b].is_nan()) {
        (false, false) => scores[b].partial_cmp(&scores[a]).expect("neither is NaN"),
        (a_is_nan, b_is_nan) => a_is_nan.cmp(&b_is_nan),
    });
    order.truncate(count);
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: Router<'_> = Router {
        topk: 2,
        scoring: Scoring::Softmax,
        logit_bias: &[],
        correction_bias: &[],
        groups: (1, 1),
        group_best: 2,
        divisor: None,
        scaling_factor: 1.0,
    };

    #[test]
    fn softmax_weights_are_shares_of_all_or_of_the_chosen() {
        let logits = [0.0, 2f32.ln(), f32::NEG_INFINITY, 2f32.ln()];
        let (ids, weights) = PLAIN.route(&logits, 4);
        assert_eq!(ids, [1, 3]);
        assert!(weights.iter().all(|weight| (weight - 0.4).abs() < 1e-7), "{weights:?}");
        let (_, weights) = Router { divisor: Some(|sum| sum), ..PLAIN }.route(&logits, 4);
        assert_eq!(weights, [0.5, 0.5]);
        let (ids, _) = Router { logit_bias: &[9.0, 0.0, 0.0, 0.0], ..PLAIN }.route(&logits, 4);
        assert_eq!(ids, [0, 1]);
    }

    #[test]
    fn groups_are_chosen_by_their_best() {
        let router = Router {
            scoring: Scoring::Sigmoid,
            correction_bias: &[0.0, 0.0, 0.0, 0.25],
            groups: (2, 1),
            divisor: Some(|sum| sum + 1e-20),
            scaling_factor: 2.5,
            ..PLAIN
        };
        let (ids, weights) = router.route(&[9.0, -9.0, 0.5, 0.0], 4);
        assert_eq!(ids, [3, 2]);
        assert!((weights[0] + weights[1] - 2.5).abs() < 1e-12);
        assert!(weights[0] < weights[1], "the bias steers the choice, not the weight: {weights:?}");
        let (ids, _) = Router { group_best: 1, ..router }.route(&[9.0, -9.0, 0.5, 0.0], 4);
        assert_eq!(ids, [0, 1]);
    }

    #[test]
    fn a_sparse_mixer_is_as_written_by_hand() {
        let router = Router { scoring: Scoring::SparseMixer(0.25), ..PLAIN };
        let (ids, weights) = router.route(&[1.0, 3.0, 4.0], 3);
        assert_eq!(ids, [2, 1]);
        assert!((weights[0] - 1.0 / (1.0 + (-1.0f64).exp())).abs() < 1e-12);
        assert_eq!(weights[1], 1.0);
    }
}
