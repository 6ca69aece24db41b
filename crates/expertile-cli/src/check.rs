//! A layer's result against the slow f64 oracle: as a whole, by row and by expert.
//!
//! Both see the same choice of experts and the same weights, as the command read them: a fault of the reader or of the
//! router is in both, and only an independent program can see it. The oracle sees the hidden states unquantized.
//! Distances are `1 - 2 sum(x y) / sum(x^2 + y^2)`. Rows are the output's tokens; an expert's distance is over the
//! rows that GEMM 2 gave for it, so that a wrong block cannot hide behind the other experts of a token.
//!
//! **Tolerances.** A distance is half the relative squared error, and its mean follows from the formats alone: every
//! rounding adds half the mean square of its relative error (1.4e-6 to bf16, 3.5e-4 to e4m3), and K plays no part,
//! because sums are f32 and products' errors cancel as often as they add. The oracle's `Tolerance::whole` for the
//! formats is about three (bf16) or two (e4m3) such means. A single row scatters around the mean, the more the fewer
//! independent errors it adds up, and the worst of many rows more than one. Errors of a row come from its I activated
//! values (GEMM 2's K), seen in H outputs; as few of the values `silu(gate) * up` are most of their sum, these count
//! like `k = min(H, I) / 4` equal ones (measured: 4096 rows of even, normal and heavy-tailed values, H and I from 16
//! to 1024). For a sum of `k` squares Laurent and Massart (2000), "Adaptive estimation of a quadratic functional by
//! model selection", Annals of Statistics 28(5), lemma 1, give `P(sum >= k + 2 sqrt(k t) + 2 t) <= exp(-t)`; so one of
//! `n` rows exceeds `1 + 2 sqrt(t / k) + 2 t / k` means with a probability below 1/1000 if `t = ln(1000 n)`. That
//! factor, or 2 if it is less, is what a row and an expert are allowed; the whole, which adds up the errors of all its
//! rows, is one draw with `k` times as many.

use crate::call::Inputs;
use crate::parts::Parts;
use crate::report::progress::Progress;
use crate::weights::{ExpertWeights, expert_w13_row};
use expertile::{Activation, ActivationFormat};
use expertile_oracle::activation as oracle_activation;
use expertile_oracle::compare::{self, Tolerance};
use expertile_oracle::layer::{Layer, SharedExpert};
use half::bf16;
use rayon::prelude::*;
use serde::Serialize;

/// Slots that the oracle computes at once; it keeps a few f64 rows for each.
const SLOTS_AT_ONCE: usize = 256;

/// How far the result is from the oracle's.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Report {
    pub(crate) passed: bool,
    /// What was compared with what.
    pub(crate) compared: String,
    /// Values of the output, `M * H`.
    pub(crate) values: usize,
    /// Those that are finite numbers here and in the oracle's result: distances are of these.
    pub(crate) finite_values: usize,
    pub(crate) whole: f64,
    /// The token that differs most.
    pub(crate) worst_row: Option<Worst>,
    /// The expert that differs most.
    pub(crate) worst_expert: Option<Worst>,
    pub(crate) tolerance_whole: f64,
    /// For any row and any expert.
    pub(crate) tolerance_row: f64,
}

/// Where a difference is, and how large.
#[derive(Debug, Clone, Copy, Serialize)]
pub(crate) struct Worst {
    pub(crate) index: usize,
    pub(crate) difference: f64,
}

/// The tolerances of a layer with these activations, whose rows add up `errors` errors, `min(H, I)`: for the whole of
/// `rows` rows, and for the worst of `looked_at` rows and experts.
fn tolerance(activations: ActivationFormat, errors: usize, rows: usize, looked_at: usize) -> Tolerance {
    let Tolerance { whole, row } = match activations {
        ActivationFormat::E4m3 => compare::E4M3_LAYER,
        ActivationFormat::Bf16 => compare::BF16_LAYER,
    };
    let scatter = |draws: usize, errors: f64| {
        let t = (1000.0 * draws.max(1) as f64).ln();
        1.0 + 2.0 * (t / errors).sqrt() + 2.0 * t / errors
    };
    let errors = (errors as f64 / 4.0).max(1.0);
    Tolerance {
        whole: whole * scatter(1, errors * rows.max(1) as f64),
        row: row.max(whole * scatter(looked_at, errors)),
    }
}

/// What a layer gave.
pub(crate) struct Found<'a> {
    /// `[M, H]`.
    pub(crate) output: &'a [bf16],
    /// GEMM 2's rows, where they are at hand: they stay on their ranks in an expert-parallel layer.
    pub(crate) rows: Option<SlotRows>,
}

/// The rows of GEMM 2, and whose they are.
pub(crate) struct SlotRows {
    /// `[M_sum, H]`
    pub(crate) rows: Vec<bf16>,
    /// `[M, topk]`: which of them is each slot's, -1 for none.
    pub(crate) row_of_slot: Vec<i32>,
}

/// Compares what a layer gave with what the oracle gives for the same inputs.
pub(crate) fn check(
    found: &Found<'_>,
    inputs: &Inputs<'_>,
    weights: &dyn ExpertWeights,
    activations: ActivationFormat,
    parts: Parts,
) -> Report {
    let mut oracle = Oracle::new(inputs, weights);
    let mut by_expert = vec![0.0; weights.shape().local_experts()];
    let active: Vec<usize> = (0..by_expert.len()).filter(|&expert| !oracle.slots_of(expert).is_empty()).collect();
    let progress = Progress::new("checking experts", active.len());
    let mut done = 0;
    for experts in active.chunks(rayon::current_num_threads()) {
        let results: Vec<_> = experts.par_iter().map(|&expert| oracle.expert(expert, found)).collect();
        for (&expert, (difference, slot_rows)) in experts.iter().zip(results) {
            if let Some(difference) = difference {
                by_expert[expert] = difference;
            }
            oracle.add(expert, &slot_rows);
        }
        done += experts.len();
        progress.set(done);
    }
    let by_what = if found.rows.is_some() { "" } else { ", by token alone: the experts' rows stay on their ranks" };
    if found.rows.is_none() {
        by_expert.clear();
    }
    if parts.shared {
        oracle.add_shared();
    }
    let output: Vec<f64> = found.output.iter().map(|value| value.to_f64()).collect();
    let compared = format!(
        "{} experts, with an f64 oracle on the weights and the choice of experts as this command read and made \
         them{by_what}",
        parts.names().join(" and ")
    );
    let (shape, expected) = (weights.shape(), &oracle.output);
    let report = Report::new(&output, expected, (shape.hidden(), shape.intermediate()), &by_expert, activations);
    Report { compared, ..report }
}

impl Report {
    fn new(
        output: &[f64],
        expected: &[f64],
        (hidden, intermediate): (usize, usize),
        by_expert: &[f64],
        formats: ActivationFormat,
    ) -> Self {
        let rows = expected.len() / hidden;
        let tolerance = tolerance(formats, hidden.min(intermediate), rows, rows + by_expert.len());
        let finite_values = output.iter().zip(expected).filter(|(x, y)| x.is_finite() && y.is_finite()).count();
        let by_row: Vec<f64> =
            output.chunks(hidden).zip(expected.chunks(hidden)).map(|(x, y)| distance(x, y)).collect();
        let worst = |(index, difference)| Worst { index, difference };
        let worst_row = compare::worst(&by_row).map(worst);
        let worst_expert = compare::worst(by_expert).map(worst);
        let whole = distance(output, expected);
        let within = |worst: Option<Worst>| worst.is_none_or(|worst| worst.difference < tolerance.row);
        Self {
            compared: String::new(),
            // No values at all (no tokens) are as they should be; values of which none is a number say nothing.
            passed: (finite_values > 0 || expected.is_empty())
                && whole < tolerance.whole
                && within(worst_row)
                && within(worst_expert),
            values: expected.len(),
            finite_values,
            whole,
            worst_row,
            worst_expert,
            tolerance_whole: tolerance.whole,
            tolerance_row: tolerance.row,
        }
    }

    /// One line for a reader.
    pub(crate) fn text(&self) -> String {
        if self.finite_values == 0 && self.values > 0 {
            let values = self.values;
            return format!(
                "check failed: nothing finite was compared, of {values} values of the output none is a number"
            );
        }
        let left_out = match self.values - self.finite_values {
            0 => String::new(),
            count => format!(", {count} of {} values are not finite and were left out", self.values),
        };
        let worst = |what: &str, worst: Option<Worst>| {
            worst.map_or_else(String::new, |worst| format!(", worst {what} {} {:.2e}", worst.index, worst.difference))
        };
        format!(
            "check {}: whole {:.2e} (tolerated {:.1e}){}{} (tolerated {:.1e}){left_out}{}",
            if self.passed { "passed" } else { "failed" },
            self.whole,
            self.tolerance_whole,
            worst("token", self.worst_row),
            worst("expert", self.worst_expert),
            self.tolerance_row,
            match &self.compared[..] {
                "" => String::new(),
                compared => format!("\ncompared: {compared}"),
            },
        )
    }
}

/// The oracle's distance, where a value that is not a finite number in the oracle's result must be one in ours too.
fn distance(found: &[f64], expected: &[f64]) -> f64 {
    let finite = |values: &[f64]| values.iter().all(|value| value.is_finite());
    if finite(expected) {
        return compare::difference(found, expected);
    }
    if found.iter().zip(expected).any(|(x, y)| x.is_finite() != y.is_finite()) {
        return f64::INFINITY;
    }
    let only_finite =
        |values: &[f64]| -> Vec<f64> { values.iter().copied().filter(|value| value.is_finite()).collect() };
    compare::difference(&only_finite(found), &only_finite(expected))
}

/// The layer's inputs as the oracle takes them, and the sum of what its experts said so far.
struct Oracle<'a> {
    weights: &'a dyn ExpertWeights,
    hidden_states: Vec<f32>,
    topk: usize,
    topk_weights: &'a [f32],
    slots_by_expert: Vec<Vec<usize>>,
    /// `[M, H]`.
    output: Vec<f64>,
}

impl<'a> Oracle<'a> {
    fn new(inputs: &Inputs<'a>, weights: &'a dyn ExpertWeights) -> Self {
        let Inputs { hidden_states, routing, topk_weights } = *inputs;
        let (tokens, topk) = (routing.tokens(), routing.topk());
        let mut slots_by_expert = vec![Vec::new(); weights.shape().local_experts()];
        for slot in 0..tokens * topk {
            if let Some(expert) = routing.local_expert(slot / topk, slot % topk) {
                slots_by_expert[expert].push(slot);
            }
        }
        Self {
            weights,
            hidden_states: hidden_states.to_f32(),
            topk,
            topk_weights,
            slots_by_expert,
            output: vec![0.0; tokens * weights.shape().hidden()],
        }
    }

    fn slots_of(&self, expert: usize) -> &[usize] {
        &self.slots_by_expert[expert]
    }

    /// What the oracle says for an expert's slots, and how far the rows found are from it, where there are some.
    fn expert(&self, expert: usize, found: &Found<'_>) -> (Option<f64>, Vec<f64>) {
        let hidden = self.weights.shape().hidden();
        let slots = self.slots_of(expert);
        let expected: Vec<f64> = slots.chunks(SLOTS_AT_ONCE).flat_map(|slots| self.slot_rows(expert, slots)).collect();
        let Some(SlotRows { rows, row_of_slot }) = &found.rows else { return (None, expected) };
        let row = |slot: &usize| &rows[row_of_slot[*slot] as usize * hidden..][..hidden];
        let found: Vec<f64> = slots.iter().flat_map(row).map(|value| value.to_f64()).collect();
        (Some(distance(&found, &expected)), expected)
    }

    fn slot_rows(&self, expert: usize, slots: &[usize]) -> Vec<f64> {
        let shape = self.weights.shape();
        let hidden = shape.hidden();
        let bias = |all: &'a [f32], len: usize| &all[expert * len..][..len];
        let biases = self.weights.biases();
        let layer = Layer {
            hidden,
            intermediate: shape.intermediate(),
            activation: oracle_activation(self.weights.activation()),
            weight_on_input: self.weights.weight_on_input(),
            w13_row: &|_, row, out| self.weights.w13_row(expert, row, out),
            w2_row: &|_, row, out| self.weights.w2_row(expert, row, out),
            b13: biases.map(|biases| bias(&biases.w13, shape.w13_rows())),
            b2: biases.map(|biases| bias(&biases.w2, hidden)),
            shared: None,
        };
        let token = |slot: &usize| &self.hidden_states[slot / self.topk * hidden..][..hidden];
        let inputs: Vec<f32> = slots.iter().flat_map(token).copied().collect();
        // Every row is a token of its own with one slot, all of them this expert's. Only a weight on the input shows
        // in it.
        let weights: Vec<f32> = slots.iter().map(|&slot| self.topk_weights[slot]).collect();
        layer.run(&inputs, &vec![0; slots.len()], 1, Some(&weights), None).slot_rows
    }

    /// Adds what the shared expert says for every token.
    fn add_shared(&mut self) {
        let Some(shared) = self.weights.shared() else { return };
        let hidden = self.weights.shape().hidden();
        let none = |_: usize, _: usize, _: &mut [f64]| {};
        let activation = oracle_activation(self.weights.activation());
        let rows: Vec<Vec<f64>> = self
            .hidden_states
            .par_chunks(SLOTS_AT_ONCE * hidden)
            .map(|tokens| {
                let layer = Layer {
                    hidden,
                    intermediate: 1,
                    activation,
                    weight_on_input: false,
                    w13_row: &none,
                    w2_row: &none,
                    b13: None,
                    b2: None,
                    shared: Some(SharedExpert {
                        intermediate: shared.shape.intermediate(),
                        w13_row: &|row, out| expert_w13_row(&shared.expert, row, out),
                        w2_row: &|row, out| shared.expert.down.write_row(row, out),
                        gate: shared.gate.as_deref(),
                    }),
                };
                layer.run(tokens, &vec![-1; tokens.len() / hidden], 1, None, None).shared_rows
            })
            .collect();
        self.output.iter_mut().zip(rows.iter().flatten()).for_each(|(sum, value)| *sum += value);
    }

    fn add(&mut self, expert: usize, slot_rows: &[f64]) {
        let hidden = self.weights.shape().hidden();
        for (&slot, row) in self.slots_by_expert[expert].iter().zip(slot_rows.chunks(hidden)) {
            let on_input = self.weights.weight_on_input();
            let weight = if on_input { 1.0 } else { f64::from(self.topk_weights[slot]) };
            for (sum, value) in self.output[slot / self.topk * hidden..][..hidden].iter_mut().zip(row) {
                *sum += weight * value;
            }
        }
    }
}

/// The activation in the oracle's terms.
fn oracle_activation(activation: Activation) -> oracle_activation::Activation {
    use oracle_activation::Activation as Oracle;
    match activation {
        Activation::Swiglu { alpha, beta, limit } => {
            Oracle::Swiglu { alpha: alpha.into(), beta: beta.into(), limit: limit.map(f64::from) }
        }
        Activation::GegluTanh => Oracle::GegluTanh,
        Activation::Relu2 => Oracle::Relu2,
        other => unreachable!("{other:?} has no counterpart in the oracle"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_that_are_not_numbers_must_be_so_in_both() {
        assert_eq!(distance(&[1.0, 2.0], &[1.0, 2.0]), 0.0);
        assert_eq!(distance(&[1.0, f64::NAN], &[1.0, f64::NAN]), 0.0);
        assert_eq!(distance(&[1.0, f64::NAN], &[1.0, 2.0]), f64::INFINITY);
        assert_eq!(distance(&[1.0, 2.0], &[1.0, f64::NAN]), f64::INFINITY);
        assert!(distance(&[1.0, f64::NAN], &[-1.0, f64::NAN]) > 1.0);
    }

    #[test]
    fn one_bad_row_or_expert_fails_the_check() {
        let good = vec![1.0; 1000 * 4];
        let report = |output: &[f64], by_expert: &[f64]| {
            Report::new(output, &good, (4, 4096), by_expert, ActivationFormat::E4m3)
        };
        assert!(report(&good, &[0.0, 1e-3]).passed);
        let mut one_row = good.clone();
        one_row[8..12].fill(0.5);
        let failed = report(&one_row, &[0.0]);
        assert!(!failed.passed && failed.whole < failed.tolerance_whole, "{failed:?}");
        let text = failed.text();
        assert!(text.starts_with("check failed: whole ") && text.contains(", worst token 2 2.00e-1"), "{text}");
        assert_eq!(failed.worst_row.unwrap().index, 2);
        let failed = report(&good, &[0.0, 0.5]);
        assert!(!failed.passed && failed.text().contains("worst expert 1 5.00e-1"), "{}", failed.text());
    }

    #[test]
    fn values_of_which_none_is_a_number_do_not_pass() {
        let report =
            |output: &[f64], expected: &[f64]| Report::new(output, expected, (2, 2), &[0.0], ActivationFormat::Bf16);
        for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            let none = report(&[bad; 4], &[f64::NAN; 4]);
            assert!(!none.passed);
            let text = "check failed: nothing finite was compared, of 4 values of the output none is a number";
            assert_eq!(none.text(), text);
        }
        let some = report(&[1.0, f64::NAN, 2.0, f64::NAN], &[1.0, f64::NAN, 2.0, f64::NAN]);
        assert!(
            some.passed && some.text().ends_with("2 of 4 values are not finite and were left out"),
            "{}",
            some.text()
        );
        assert!(report(&[], &[]).passed);
    }

    #[test]
    fn short_rows_and_many_of_them_may_scatter_more() {
        let of = |errors, rows, looked_at| tolerance(ActivationFormat::Bf16, errors, rows, looked_at);
        // What a GEMM's rows of ordinary lengths are allowed does not change.
        assert_eq!(of(768, 4096, 4096 + 128).row, compare::BF16_LAYER.row);
        assert!(of(768, 4096, 4096 + 128).whole < 1.01 * compare::BF16_LAYER.whole);
        assert!((2.4e-4..2.6e-4).contains(&of(16, 4096, 4096 + 8).row), "{:?}", of(16, 4096, 4096 + 8));
        assert!(of(16, 1, 2).row < of(16, 4096, 4104).row && of(16, 4096, 4104).row < of(4, 4096, 4104).row);
        assert!(of(16, 1, 2).whole > of(16, 64, 66).whole);
    }

    #[test]
    fn one_wrong_value_in_a_short_row_fails() {
        let mut random = crate::preset::Random::new(3, [1, 2, 3]);
        let expected: Vec<f64> = (0..4096 * 32).map(|_| f64::from(random.uniform())).collect();
        let rounded: Vec<f64> = expected.iter().map(|&value| half::bf16::from_f64(value).to_f64()).collect();
        let report = |output: &[f64]| Report::new(output, &expected, (32, 16), &[0.0; 8], ActivationFormat::Bf16);
        assert!(report(&rounded).passed);
        let mut wrong = rounded.clone();
        // A value of its neighbour: what an off-by-one in a tile gives.
        wrong[777 * 32 + 5] = rounded[777 * 32 + 6];
        let failed = report(&wrong);
        assert!(!failed.passed && failed.worst_row.is_some_and(|worst| worst.index == 777), "{}", failed.text());
    }
}
