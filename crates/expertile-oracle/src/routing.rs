//! The routers, in f64: from logits to the chosen experts and their weights.

/// Softmax over all experts, the `topk` best, renormalised to sum 1 if asked.
///
/// `logits` is `[M, experts]`; the results are `[M, topk]`, best first, ties to the lower id.
#[must_use]
pub fn softmax_router(logits: &[f32], experts: usize, topk: usize, renormalize: bool) -> (Vec<i32>, Vec<f64>) {
    let (mut ids, mut weights) = (Vec::new(), Vec::new());
    for logits in logits.chunks(experts) {
        let largest = logits.iter().fold(f64::NEG_INFINITY, |most, &x| most.max(f64::from(x)));
        let powers: Vec<f64> = logits.iter().map(|&x| (f64::from(x) - largest).exp()).collect();
        let total: f64 = powers.iter().sum();
        let scores: Vec<f64> = powers.iter().map(|power| power / total).collect();
        let chosen = best(&scores, topk);
        let mut own: Vec<f64> = chosen.iter().map(|&expert| scores[expert]).collect();
        if renormalize {
            let sum: f64 = own.iter().sum();
            own.iter_mut().for_each(|weight| *weight /= sum);
        }
        ids.extend(chosen.iter().map(|&expert| expert as i32));
        weights.extend(own);
    }
    (ids, weights)
}

/// What DeepSeek-V3's router is made of.
#[derive(Debug, Clone, PartialEq)]
pub struct SigmoidRouter<'a> {
    /// Experts per token.
    pub topk: usize,
    /// `[experts]`, added to the scores for choosing only; empty for none.
    pub correction_bias: &'a [f32],
    /// Equal groups that the experts are cut into.
    pub groups: usize,
    /// Groups a token may choose from.
    pub topk_groups: usize,
    /// Whether the chosen weights are divided by their sum plus 1e-20.
    pub renormalize: bool,
    /// What the weights are multiplied by in the end.
    pub scaling_factor: f32,
}

impl SigmoidRouter<'_> {
    /// Sigmoid scores; the groups whose two best biased scores sum highest stay; of their experts the `topk` with the
    /// best biased score; weights are the scores without the bias.
    #[must_use]
    pub fn route(&self, logits: &[f32], experts: usize) -> (Vec<i32>, Vec<f64>) {
        let size = experts / self.groups;
        let (mut ids, mut weights) = (Vec::new(), Vec::new());
        for logits in logits.chunks(experts) {
            let scores: Vec<f64> = logits.iter().map(|&x| 1.0 / (1.0 + (-f64::from(x)).exp())).collect();
            let bias = |expert: usize| self.correction_bias.get(expert).map_or(0.0, |&bias| f64::from(bias));
            let biased: Vec<f64> = scores.iter().enumerate().map(|(expert, score)| score + bias(expert)).collect();
            let worth: Vec<f64> = biased
                .chunks(size)
                .map(|group| best(group, group.len().min(2)).into_iter().map(|expert| group[expert]).sum())
                .collect();
            let kept = best(&worth, self.topk_groups);
            let masked: Vec<f64> = (0..experts)
                .map(|expert| if kept.contains(&(expert / size)) { biased[expert] } else { f64::NEG_INFINITY })
                .collect();
            let chosen = best(&masked, self.topk);
            let mut own: Vec<f64> = chosen.iter().map(|&expert| scores[expert]).collect();
            if self.renormalize {
                let sum: f64 = own.iter().sum::<f64>() + 1e-20;
                own.iter_mut().for_each(|weight| *weight /= sum);
            }
            ids.extend(chosen.iter().map(|&expert| expert as i32));
            weights.extend(own.iter().map(|weight| weight * f64::from(self.scaling_factor)));
        }
        (ids, weights)
    }
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

    #[test]
    fn softmax_weights_are_shares_of_all_or_of_the_chosen() {
        let logits = [0.0, 2f32.ln(), f32::NEG_INFINITY, 2f32.ln()];
        let (ids, weights) = softmax_router(&logits, 4, 2, false);
        assert_eq!(ids, [1, 3]);
        assert!(weights.iter().all(|weight| (weight - 0.4).abs() < 1e-7), "{weights:?}");
        let (_, weights) = softmax_router(&logits, 4, 2, true);
        assert_eq!(weights, [0.5, 0.5]);
    }

    #[test]
    fn groups_are_chosen_by_their_two_best() {
        let router = SigmoidRouter {
            topk: 2,
            correction_bias: &[0.0, 0.0, 0.0, 0.25],
            groups: 2,
            topk_groups: 1,
            renormalize: true,
            scaling_factor: 2.5,
        };
        let (ids, weights) = router.route(&[9.0, -9.0, 0.5, 0.0], 4);
        assert_eq!(ids, [3, 2]);
        assert!((weights[0] + weights[1] - 2.5).abs() < 1e-12);
        assert!(weights[0] < weights[1], "the bias steers the choice, not the weight: {weights:?}");
    }
}
