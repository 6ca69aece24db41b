//! The whole layer in f64, on unquantized inputs: no layout, no padding, one slot after another.

use crate::activation::Activation;
use crate::gemm::grouped_gemm;
use crate::layout::local_expert;

/// One layer: its shape, its options, and where its weights come from.
///
/// `w13_row(e, j, row)` fills `row [hidden]` with row `j` of expert `e`'s `[2 I, H]` (gate first, then up; `[I, H]`
/// without a gate); `w2_row(e, j, row)` fills `row [intermediate]` with row `j` of `[H, I]`. Quantized weights come
/// with their scales applied.
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
    /// `[E, 2 I]` (`[E, I]` without a gate): added to what the first weights give.
    pub b13: Option<&'a [f32]>,
    /// `[E, H]`: added to what the second weights give, before the router's weight.
    pub b2: Option<&'a [f32]>,
    /// The expert that every token visits.
    pub shared: Option<SharedExpert<'a>>,
}

/// An expert that every token visits: the layer's activation, a width of its own, no router weight.
pub struct SharedExpert<'a> {
    /// Its `I`.
    pub intermediate: usize,
    /// Row `j` of its `[2 I, H]` (`[I, H]` without a gate).
    pub w13_row: &'a dyn Fn(usize, &mut [f64]),
    /// Row `j` of its `[H, I]`.
    pub w2_row: &'a dyn Fn(usize, &mut [f64]),
    /// `[H]`: what it says is multiplied by `sigmoid(x . gate)`.
    pub gate: Option<&'a [f32]>,
}

/// What a layer gives.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerResult {
    /// `[M * topk]`: the local expert of each slot, -1 for an empty or non-local one.
    pub expert_of_slot: Vec<i32>,
    /// `[M * topk, H]`: what each slot's expert says, before the weighted sum; NaN for an empty or non-local slot.
    pub slot_rows: Vec<f64>,
    /// `[M, H]`: what the shared expert says, its gate applied; zeros without one.
    pub shared_rows: Vec<f64>,
    /// `[M, H]`: the weighted sum of a token's slots, and its shared row.
    pub output: Vec<f64>,
}

impl Layer<'_> {
    /// `output[t] = sum_k w[t, k] * (W2[e] . act(W13[e] . x[t] + b13[e]) + b2[e]) + shared(x[t])` over the live slots
    /// `e = local(ids[t, k])`.
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
        let hidden = self.hidden;
        let expert_of_slot: Vec<i32> =
            topk_ids.iter().map(|&id| local_expert(id, expert_map).map_or(-1, |expert| expert as i32)).collect();
        let weight = |slot: usize| topk_weights.map_or(1.0, |weights| f64::from(weights[slot]));

        let mut rows = Vec::new();
        for slot in 0..topk_ids.len() {
            let factor = if self.weight_on_input { weight(slot) } else { 1.0 };
            let token = &hidden_states[slot / topk * hidden..][..hidden];
            rows.extend(token.iter().map(|&x| factor * f64::from(x)));
        }
        let columns = self.columns(self.intermediate);
        let mut gate_up = grouped_gemm(&rows, &expert_of_slot, columns, hidden, self.w13_row);
        add_bias(&mut gate_up, self.b13, &expert_of_slot, columns);
        let activated = self.activation.rows(&gate_up, self.intermediate);
        let mut slot_rows = grouped_gemm(&activated, &expert_of_slot, hidden, self.intermediate, self.w2_row);
        add_bias(&mut slot_rows, self.b2, &expert_of_slot, hidden);

        let shared_rows = self.shared_rows(&hidden_states[..topk_ids.len() / topk * hidden]);
        let mut output = shared_rows.clone();
        for slot in 0..topk_ids.len() {
            if expert_of_slot[slot] < 0 {
                continue;
            }
            let factor = if self.weight_on_input { 1.0 } else { weight(slot) };
            for c in 0..hidden {
                output[slot / topk * hidden + c] += factor * slot_rows[slot * hidden + c];
            }
        }
        LayerResult { expert_of_slot, slot_rows, shared_rows, output }
    }

    /// Rows of the first weights of an expert of that width.
    fn columns(&self, intermediate: usize) -> usize {
        if self.activation.is_gated() { 2 * intermediate } else { intermediate }
    }

    fn shared_rows(&self, hidden_states: &[f32]) -> Vec<f64> {
        let tokens = hidden_states.len() / self.hidden;
        let Some(shared) = &self.shared else { return vec![0.0; hidden_states.len()] };
        let x: Vec<f64> = hidden_states.iter().map(|&x| f64::from(x)).collect();
        let everyone = vec![0; tokens];
        let columns = self.columns(shared.intermediate);
        let gate_up = grouped_gemm(&x, &everyone, columns, self.hidden, |_, j, row| (shared.w13_row)(j, row));
        let activated = self.activation.rows(&gate_up, shared.intermediate);
        let mut out =
            grouped_gemm(&activated, &everyone, self.hidden, shared.intermediate, |_, j, row| (shared.w2_row)(j, row));
        if let Some(gate) = shared.gate {
            for token in 0..tokens {
                let mut logit = 0.0;
                for c in 0..self.hidden {
                    logit += x[token * self.hidden + c] * f64::from(gate[c]);
                }
                for c in 0..self.hidden {
                    out[token * self.hidden + c] *= 1.0 / (1.0 + (-logit).exp());
                }
            }
        }
        out
    }
}

/// Adds `bias [E, columns]` to the rows that have an expert.
fn add_bias(rows: &mut [f64], bias: Option<&[f32]>, expert_of_row: &[i32], columns: usize) {
    let Some(bias) = bias else { return };
    for (row, &expert) in expert_of_row.iter().enumerate() {
        if expert >= 0 {
            for c in 0..columns {
                rows[row * columns + c] += f64::from(bias[expert as usize * columns + c]);
            }
        }
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
            b13: None,
            b2: None,
            shared: None,
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

    #[test]
    fn biases_and_a_shared_expert_are_as_written_by_hand() {
        // Two experts of max(x, 0)^2: x + b13, squared, times 10, plus b2. The shared one is twice as wide.
        let layer = Layer {
            hidden: 1,
            intermediate: 1,
            activation: Activation::Relu2,
            weight_on_input: false,
            w13_row: &|_, _, row| row[0] = 1.0,
            w2_row: &|_, _, row| row[0] = 10.0,
            b13: Some(&[0.5, -4.0]),
            b2: Some(&[100.0, 200.0]),
            shared: Some(SharedExpert {
                intermediate: 2,
                w13_row: &|j, row| row[0] = j as f64 + 1.0,
                w2_row: &|_, row| row.copy_from_slice(&[1.0, 3.0]),
                gate: Some(&[0.25]),
            }),
        };
        let made = layer.run(&[2.0, -1.0], &[0, 1, -1, -1], 2, Some(&[0.5, 2.0, 1.0, 1.0]), None);
        assert_eq!(made.slot_rows[..2], [10.0 * 2.5 * 2.5 + 100.0, 200.0]);
        let shared = (2.0f64 * 2.0 + 3.0 * 4.0 * 4.0) / (1.0 + (-0.5f64).exp());
        assert_eq!(made.shared_rows, [shared, 0.0]);
        assert_eq!(made.output, [0.5 * 162.5 + 400.0 + shared, 0.0]);
    }
}
