//! A layer's result against the slow f64 oracle: as a whole, by row and by expert.
//!
//! Both see the same choice of experts and the same weights; the oracle sees the hidden states unquantized. Distances
//! are `1 - 2 sum(x y) / sum(x^2 + y^2)`. Rows are the output's tokens; an expert's distance is over the rows that GEMM 2
//! gave for it, so that a wrong block cannot hide behind the other experts of a token.

use crate::progress::Progress;
use crate::stages::Inputs;
use crate::weights::ExpertWeights;
use expertile::ActivationFormat;
use expertile_oracle::activation::SWIGLU;
use expertile_oracle::compare::{self, Tolerance};
use expertile_oracle::layer::Layer;
use half::bf16;
use rayon::prelude::*;
use serde::Serialize;

/// Slots that the oracle computes at once; it keeps a few f64 rows for each.
const SLOTS_AT_ONCE: usize = 256;

/// How far the result is from the oracle's.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Report {
    pub(crate) passed: bool,
    pub(crate) whole: f64,
    /// The token that differs most.
    pub(crate) worst_row: Option<Place>,
    /// The expert that differs most.
    pub(crate) worst_expert: Option<Place>,
    pub(crate) tolerance_whole: f64,
    /// For any row and any expert.
    pub(crate) tolerance_row: f64,
}

/// Where a difference is, and how large.
#[derive(Debug, Clone, Copy, Serialize)]
pub(crate) struct Place {
    pub(crate) index: usize,
    pub(crate) difference: f64,
}

/// The tolerances of a layer with these activations.
fn tolerance(activations: ActivationFormat) -> Tolerance {
    match activations {
        ActivationFormat::E4m3 => compare::E4M3_LAYER,
        ActivationFormat::Bf16 => compare::BF16_LAYER,
    }
}

/// What a layer gave.
pub(crate) struct Found<'a> {
    /// `[M, H]`.
    pub(crate) output: &'a [bf16],
    /// GEMM 2's rows `[M_sum, H]`.
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
) -> Report {
    let mut oracle = Oracle::new(inputs, weights);
    let mut by_expert = vec![0.0; weights.shape().local_experts()];
    let active: Vec<usize> = (0..by_expert.len()).filter(|&expert| !oracle.slots_of(expert).is_empty()).collect();
    let progress = Progress::new("checking experts", active.len());
    let mut done = 0;
    for experts in active.chunks(rayon::current_num_threads()) {
        let results: Vec<_> = experts.par_iter().map(|&expert| oracle.expert(expert, found)).collect();
        for (&expert, (difference, slot_rows)) in experts.iter().zip(results) {
            by_expert[expert] = difference;
            oracle.add(expert, &slot_rows);
        }
        done += experts.len();
        progress.set(done);
    }
    let output: Vec<f64> = found.output.iter().map(|value| value.to_f64()).collect();
    Report::new(&output, &oracle.output, weights.shape().hidden(), &by_expert, activations)
}

impl Report {
    fn new(output: &[f64], expected: &[f64], hidden: usize, by_expert: &[f64], formats: ActivationFormat) -> Self {
        let tolerance = tolerance(formats);
        let by_row: Vec<f64> =
            output.chunks(hidden).zip(expected.chunks(hidden)).map(|(x, y)| distance(x, y)).collect();
        let place = |(index, difference)| Place { index, difference };
        let worst_row = compare::worst(&by_row).map(place);
        let worst_expert = compare::worst(by_expert).map(place);
        let whole = distance(output, expected);
        let within = |place: Option<Place>| place.is_none_or(|place| place.difference < tolerance.row);
        Self {
            passed: whole < tolerance.whole && within(worst_row) && within(worst_expert),
            whole,
            worst_row,
            worst_expert,
            tolerance_whole: tolerance.whole,
            tolerance_row: tolerance.row,
        }
    }

    /// One line for a reader.
    pub(crate) fn text(&self) -> String {
        let place = |what: &str, place: Option<Place>| {
            place.map_or_else(String::new, |place| format!(", worst {what} {} {:.2e}", place.index, place.difference))
        };
        format!(
            "check {}: whole {:.2e} (tolerated {:.0e}){}{} (tolerated {:.0e})",
            if self.passed { "passed" } else { "failed" },
            self.whole,
            self.tolerance_whole,
            place("token", self.worst_row),
            place("expert", self.worst_expert),
            self.tolerance_row,
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

    /// What the oracle says for an expert's slots, and how far the rows found are from it.
    fn expert(&self, expert: usize, found: &Found<'_>) -> (f64, Vec<f64>) {
        let hidden = self.weights.shape().hidden();
        let slots = self.slots_of(expert);
        let expected: Vec<f64> = slots.chunks(SLOTS_AT_ONCE).flat_map(|slots| self.slot_rows(expert, slots)).collect();
        let row = |slot: &usize| &found.rows[found.row_of_slot[*slot] as usize * hidden..][..hidden];
        let found: Vec<f64> = slots.iter().flat_map(row).map(|value| value.to_f64()).collect();
        (distance(&found, &expected), expected)
    }

    fn slot_rows(&self, expert: usize, slots: &[usize]) -> Vec<f64> {
        let shape = self.weights.shape();
        let hidden = shape.hidden();
        let layer = Layer {
            hidden,
            intermediate: shape.intermediate(),
            activation: SWIGLU,
            weight_on_input: false,
            w13_row: &|_, row, out| self.weights.w13_row(expert, row, out),
            w2_row: &|_, row, out| self.weights.w2_row(expert, row, out),
            b13: None,
            b2: None,
            shared: None,
        };
        let token = |slot: &usize| &self.hidden_states[slot / self.topk * hidden..][..hidden];
        let inputs: Vec<f32> = slots.iter().flat_map(token).copied().collect();
        // Every row is a token of its own with one slot, all of them this expert's.
        layer.run(&inputs, &vec![0; slots.len()], 1, None, None).slot_rows
    }

    fn add(&mut self, expert: usize, slot_rows: &[f64]) {
        let hidden = self.weights.shape().hidden();
        for (&slot, row) in self.slots_by_expert[expert].iter().zip(slot_rows.chunks(hidden)) {
            let weight = f64::from(self.topk_weights[slot]);
            for (sum, value) in self.output[slot / self.topk * hidden..][..hidden].iter_mut().zip(row) {
                *sum += weight * value;
            }
        }
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
        let report =
            |output: &[f64], by_expert: &[f64]| Report::new(output, &good, 4, by_expert, ActivationFormat::E4m3);
        assert!(report(&good, &[0.0, 1e-3]).passed);
        let mut one_row = good.clone();
        one_row[8..12].fill(0.8);
        let failed = report(&one_row, &[0.0]);
        assert!(!failed.passed && failed.whole < failed.tolerance_whole, "{failed:?}");
        assert_eq!(failed.worst_row.unwrap().index, 2);
        let failed = report(&good, &[0.0, 0.5]);
        assert!(!failed.passed && failed.text().contains("worst expert 1 5.00e-1"), "{}", failed.text());
    }
}
