//! The tokens of a call and their experts: given in a file, or chosen by the router or by the tokens' numbers.

use crate::error::{Error, Result};
use crate::output;
use crate::parts::Parts;
use crate::report::stages::StageTime;
use crate::router::{self, RouterPrecision};
use crate::weights::ExpertWeights;
use expertile::{MatrixRef, StageCost, TopkIds};
use expertile_checkpoint::{Ids, LayerInput, LayerOutput};
use half::bf16;
use std::path::Path;
use std::time::Instant;

/// The tokens of a call, with their experts: the file's, or the router's choice.
pub(super) struct Tokens<'a> {
    input: &'a LayerInput,
    chosen: Option<Chosen>,
    /// Empty slots in place of the chosen experts, where the output leaves them out.
    empty: Option<Vec<i32>>,
}

/// What the router chose.
struct Chosen {
    topk: usize,
    ids: Vec<i32>,
    weights: Vec<f32>,
    time: StageTime,
}

impl<'a> Tokens<'a> {
    pub(super) fn new(
        input: &'a LayerInput,
        weights: &dyn ExpertWeights,
        precision: RouterPrecision,
        parts: Parts,
    ) -> Result<Self> {
        let hidden = weights.shape().hidden();
        if input.hidden() != hidden {
            let actual = input.hidden();
            return Err(Error::usage(format!(
                "hidden_states has {actual} columns, expected {hidden}, the hidden size"
            )));
        }
        let chosen = match input.routing() {
            None => Some(Chosen::new(input, weights, precision)?),
            Some(_) => None,
        };
        let mut tokens = Self { input, chosen, empty: None };
        if !parts.routed {
            tokens.empty = Some(vec![-1; tokens.weights().len()]);
        }
        Ok(tokens)
    }

    /// The experts of the call's slots.
    pub(super) fn live_ids(&self) -> Result<TopkIds<'_>> {
        match &self.empty {
            Some(empty) => Ok(MatrixRef::new(empty, self.input.tokens(), self.ids()?.topk())?.into()),
            None => self.ids(),
        }
    }

    /// The choice, whether the output holds it or not.
    fn ids(&self) -> Result<TopkIds<'_>> {
        Ok(match (&self.chosen, self.input.routing()) {
            (None, Some((ids, _))) => ids.view(),
            (Some(chosen), _) => MatrixRef::new(&chosen.ids, self.input.tokens(), chosen.topk)?.into(),
            (None, None) => unreachable!("without ids in the file, the router has chosen"),
        })
    }

    pub(super) fn weights(&self) -> &[f32] {
        match (&self.chosen, self.input.routing()) {
            (Some(chosen), _) => &chosen.weights,
            (None, given) => given.map_or(&[], |(_, weights)| weights),
        }
    }

    /// What the router took, if it decided.
    pub(super) fn router_time(&self) -> Option<StageTime> {
        self.chosen.as_ref().map(|chosen| chosen.time)
    }

    pub(super) fn write(&self, file: &Path, output: &[bf16]) -> Result<()> {
        let (tokens, ids) = (self.input.tokens(), self.ids()?);
        let topk = ids.topk();
        // Ids were checked against the number of experts; every negative one says the same.
        let id = |slot: usize| ids.get(slot / topk, slot % topk).max(-1) as i32;
        let topk_ids: Vec<i32> = (0..tokens * topk).map(id).collect();
        let (hidden, topk_weights) = (self.input.hidden(), self.weights());
        let output = LayerOutput { tokens, hidden, topk, output, topk_ids: &topk_ids, topk_weights };
        output::write_file(file, &output.to_bytes(file)?)
    }
}

impl Chosen {
    fn new(input: &LayerInput, weights: &dyn ExpertWeights, precision: RouterPrecision) -> Result<Self> {
        let (tokens, hidden, experts) = (input.tokens(), input.hidden(), weights.shape().local_experts());
        let x = input.hidden_states().to_f32();
        let by_token = weights.token_experts().map(|table| experts_of(input, table)).transpose()?;
        let route = || {
            let started = Instant::now();
            let by_token = by_token.as_deref();
            let chosen = router::route(weights.router(), weights.router_weight(), &x, hidden, precision, by_token)?;
            Ok::<_, Error>((chosen, started.elapsed().as_secs_f64()))
        };
        let ((ids, chosen), cold_seconds) = route()?;
        // Once more for the time, as the stages are timed, unless that takes long.
        let seconds = if cold_seconds < 0.5 { route()?.1 } else { cold_seconds };
        let topk = weights.router().topk;
        let bytes = 4 * (tokens * hidden + experts * hidden + 2 * tokens * topk) as u64;
        let cost = StageCost { bytes, flops: 2 * (tokens * experts * hidden) as u64 };
        Ok(Self { topk, ids, weights: chosen, time: StageTime { stage: None, seconds, cost } })
    }
}

/// The experts of the tokens, `[M, topk]`, by their numbers in the vocabulary.
fn experts_of(input: &LayerInput, table: &Ids) -> Result<Vec<i32>> {
    let Some(numbers) = input.input_ids() else {
        return Err(Error::usage(
            "input_ids is missing from the input, expected the tokens' numbers in the vocabulary [M] (i32 or i64): in this \
             layer they choose the experts",
        ));
    };
    let (topk, size, experts) = (table.topk(), table.tokens(), table.view());
    let mut ids = Vec::with_capacity(numbers.len() * topk);
    for (token, &number) in numbers.iter().enumerate() {
        let row = usize::try_from(number).ok().filter(|&row| row < size).ok_or_else(|| {
            Error::usage(format!(
                "input_ids[{token}] is {number}, expected a number in the vocabulary, 0 to {}",
                size - 1
            ))
        })?;
        // Past i32 an id is no expert's in any case, and the router says so.
        ids.extend((0..topk).map(|slot| i32::try_from(experts.get(row, slot)).unwrap_or(i32::MAX)));
    }
    Ok(ids)
}
