//! The whole layer in f64, on unquantized inputs: no layout, no padding, one slot after another.

use crate::activation::Activation;
use crate::gemm::grouped_gemm;
use crate::layout::local_expert;

/// One layer: its shape, its options, and where its weights come from.
///
/// `w13_row(e, j, row)` fills `row [hidden]` with row `j` of expert `e`'s `[2 I, H]` (gate first, then up);
/// `w2_row(e, j, row)` fills `row [intermediate]` with row `j` of `[H, I]`. Quantized weights come with their scales
/// applied.
pub struct Layer<'a> {
    /// `H`.
    pub hidden: usize,
    /// `I`.
    pub intermediate: usize,
    /// The activation between the GEMMs.
    pub activation: Activation,
    /// `apply_router_weight_on_input`: the weight multiplies the input, and the reduce uses ones.
    pub weight_on_input: bool,
    /// Rows of the first weights.
    pub w13_row: &'a dyn Fn(usize, usize, &mut [f64]),
    /// Rows of the second weights.
    pub w2_row: &'a dyn Fn(usize, usize, &mut [f64]),
}

/// What a layer gives.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerResult {
    /// `[M * topk]`: the local expert of each slot, -1 for an empty or non-local one.
    pub expert_of_slot: Vec<i32>,
    /// `[M * topk, H]`: what each slot's expert says, before the weighted sum; NaN for an empty or non-local slot.
    pub slot_rows: Vec<f64>,
    /// `[M, H]`: the weighted sum of a token's slots; zeros without a live slot.
    pub output: Vec<f64>,
}

impl Layer<'_> {
    /// `output[t] = sum_k w[t, k] * W2[e] . act(W13[e] . x[t])` over the live slots `e = local(ids[t, k])`.
    ///
    /// `hidden_states` is `[M, H]`, `topk_ids` and `topk_weights` `[M, topk]`; without weights every weight is 1.
    #[must_use]
    pub fn run(
        &self,
        hidden_states: &[f32],
        topk_ids: &[i64],
        topk: usize,
        topk_weights: Option<&[f32]>,
        expert_map: Option<&[i32]>,
    ) -> LayerResult {
        let (hidden, intermediate) = (self.hidden, self.intermediate);
        let expert_of_slot: Vec<i32> =
            topk_ids.iter().map(|&id| local_expert(id, expert_map).map_or(-1, |expert| expert as i32)).collect();
        let weight = |slot: usize| topk_weights.map_or(1.0, |weights| f64::from(weights[slot]));

        let mut rows = Vec::new();
        for slot in 0..topk_ids.len() {
            let factor = if self.weight_on_input { weight(slot) } else { 1.0 };
            let token = &hidden_states[slot / topk * hidden..][..hidden];
            rows.extend(token.iter().map(|&x| factor * f64::from(x)));
        }
        let gate_up = grouped_gemm(&rows, &expert_of_slot, 2 * intermediate, hidden, self.w13_row);
        let activated = self.activation.rows(&gate_up, intermediate);
        let slot_rows = grouped_gemm(&activated, &expert_of_slot, hidden, intermediate, self.w2_row);

        let mut output = vec![0.0; topk_ids.len() / topk * hidden];
        for slot in 0..topk_ids.len() {
            if expert_of_slot[slot] < 0 {
                continue;
            }
            let factor = if self.weight_on_input { 1.0 } else { weight(slot) };
            for c in 0..hidden {
                output[slot / topk * hidden + c] += factor * slot_rows[slot * hidden + c];
            }
        }
        LayerResult { expert_of_slot, slot_rows, output }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::activation::SWIGLU;

    #[test]
    fn a_layer_of_one_hidden_value_is_as_written_by_hand() {
        // Expert e: gate = x, up = (e + 1) x, down = 10.
        let layer = Layer {
            hidden: 1,
            intermediate: 1,
            activation: SWIGLU,
            weight_on_input: false,
            w13_row: &|e, j, row| row[0] = if j == 0 { 1.0 } else { e as f64 + 1.0 },
            w2_row: &|_, _, row| row[0] = 10.0,
        };
        let said = |x: f64, e: f64| 10.0 * (e + 1.0) * x * x / (1.0 + (-x).exp());
        let made = layer.run(&[2.0, -3.0], &[1, 0, -1, -1], 2, Some(&[0.5, 0.25, f32::NAN, 1.0]), None);
        assert_eq!(made.expert_of_slot, [1, 0, -1, -1]);
        assert!((made.slot_rows[0] - said(2.0, 1.0)).abs() < 1e-12);
        assert!((made.output[0] - (0.5 * said(2.0, 1.0) + 0.25 * said(2.0, 0.0))).abs() < 1e-12);
        assert_eq!(made.output[1], 0.0);
        assert!(made.slot_rows[2].is_nan());

        let on_input = Layer { weight_on_input: true, ..layer };
        let made = on_input.run(&[2.0], &[4], 1, Some(&[0.5]), Some(&[-1, -1, -1, -1, 0]));
        assert!((made.output[0] - said(1.0, 0.0)).abs() < 1e-12);
    }
}
