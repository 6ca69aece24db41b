//! A layer's stages, run and timed.

use crate::error::Result;
use crate::format;
use crate::machine::{Bound, Limits};
use crate::memory;
use expertile::cpu::{Layer, StageDone};
use expertile::{MatrixRef, Routing, Stage, StageCost};
use expertile_checkpoint::HiddenStates;
use half::bf16;
use serde::Serialize;

/// What a call of a layer works on: tokens and their experts.
#[derive(Clone, Copy)]
pub(crate) struct Inputs<'a> {
    pub(crate) hidden_states: &'a HiddenStates,
    pub(crate) routing: Routing<'a>,
    pub(crate) topk_weights: &'a [f32],
}

/// One call of a layer on the CPU, and room for the result.
pub(crate) struct Call<'a> {
    pub(crate) layer: &'a Layer,
    pub(crate) inputs: Inputs<'a>,
    pub(crate) workspace: Vec<u8>,
    pub(crate) output: Vec<bf16>,
}

/// What a stage took.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct StageTime {
    /// `None` for the router, which is not the layer's own.
    pub(crate) stage: Option<Stage>,
    pub(crate) seconds: f64,
    pub(crate) cost: StageCost,
}

/// A stage's time beside the least it could be.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct StageReport {
    pub(crate) stage: &'static str,
    pub(crate) seconds: f64,
    pub(crate) bytes: u64,
    pub(crate) flops: u64,
    /// What the stage cannot outrun.
    pub(crate) bound: Bound,
    /// The least time over the time taken; above 1 where caches hold what memory would have to bring.
    pub(crate) share: f64,
}

impl<'a> Call<'a> {
    pub(crate) fn new(layer: &'a Layer, inputs: Inputs<'a>) -> Result<Self> {
        let routing = &inputs.routing;
        let workspace = memory::zeroed("the workspace", layer.workspace_bytes(routing.tokens())?)?;
        let output = memory::zeroed("the output", routing.tokens() * layer.shape().hidden())?;
        Ok(Self { layer, inputs, workspace, output })
    }

    /// Runs the layer once.
    pub(crate) fn run(&mut self, observe: &mut (dyn FnMut(&StageDone<'_>) + Send)) -> Result<()> {
        let Inputs { hidden_states, routing, topk_weights } = self.inputs;
        let (tokens, topk, hidden) = (routing.tokens(), routing.topk(), self.layer.shape().hidden());
        let weights = MatrixRef::new(topk_weights, tokens, topk)?;
        let (workspace, output) = (&mut self.workspace[..], &mut self.output[..]);
        macro_rules! run {
            ($values:expr) => {{
                let x = MatrixRef::new($values, tokens, hidden)?;
                self.layer.run_observed(x, &routing, weights, workspace, output, observe)
            }};
        }
        match hidden_states {
            HiddenStates::Bf16(values) => run!(values),
            HiddenStates::F16(values) => run!(values),
            HiddenStates::F32(values) => run!(values),
        }?;
        Ok(())
    }

    /// Runs once to warm up, then `repeats(seconds of the first run)` times: the median time of every stage.
    pub(crate) fn time(&mut self, repeats: impl Fn(f64) -> usize) -> Result<Vec<StageTime>> {
        let first: f64 = self.time_once()?.iter().map(|time| time.seconds).sum();
        let mut runs = Vec::new();
        for _ in 0..repeats(first).max(1) {
            runs.push(self.time_once()?);
        }
        Ok(medians(&runs))
    }

    pub(crate) fn time_once(&mut self) -> Result<Vec<StageTime>> {
        let mut times = Vec::with_capacity(Stage::ALL.len());
        self.run(&mut |done| {
            let seconds = done.elapsed.as_secs_f64();
            times.push(StageTime { stage: Some(done.stage), seconds, cost: done.cost });
        })?;
        Ok(times)
    }
}

/// Stage by stage, the median over runs that all have the same stages.
pub(crate) fn medians(runs: &[Vec<StageTime>]) -> Vec<StageTime> {
    let stages = runs.first().map_or(&[][..], Vec::as_slice);
    let median_of = |(at, time): (usize, &StageTime)| {
        let seconds = median(runs.iter().map(|run| run[at].seconds).collect());
        StageTime { seconds, ..*time }
    };
    stages.iter().enumerate().map(median_of).collect()
}

/// The middle value (the mean of the two middle ones); 0 for an empty list.
pub(crate) fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => 0.0,
        len => 0.5 * (values[(len - 1) / 2] + values[len / 2]),
    }
}

impl StageReport {
    pub(crate) fn new(time: &StageTime, limits: &Limits) -> Self {
        let (least, bound) = limits.least_seconds(time.stage, time.cost);
        Self {
            stage: time.stage.map_or("router", Stage::name),
            seconds: time.seconds,
            bytes: time.cost.bytes,
            flops: time.cost.flops,
            bound,
            share: if time.seconds > 0.0 { least / time.seconds } else { 0.0 },
        }
    }

    /// The same work in another time.
    pub(crate) fn taking(self, seconds: f64) -> Self {
        let share = if seconds > 0.0 { self.share * self.seconds / seconds } else { 0.0 };
        Self { seconds, share, ..self }
    }

    /// Cells for a table with [`StageReport::HEADER`].
    pub(crate) fn row(&self) -> Vec<String> {
        let rate = |amount: u64| amount as f64 / self.seconds.max(1e-12);
        let bound = match self.bound {
            Bound::Memory => "memory",
            Bound::Compute => "compute",
        };
        vec![
            self.stage.to_owned(),
            format::seconds(self.seconds),
            format::bytes(self.bytes),
            format::bytes_per_second(rate(self.bytes)),
            if self.flops == 0 { "-".into() } else { format::flops(self.flops) },
            if self.flops == 0 { "-".into() } else { format::flops_per_second(rate(self.flops)) },
            bound.to_owned(),
            format::percent(self.share),
        ]
    }

    /// Titles of [`StageReport::row`].
    pub(crate) const HEADER: [&'static str; 8] =
        ["stage", "time", "bytes", "rate", "FLOP", "rate", "limit", "of limit"];
}

/// All stages as one: the whole layer.
pub(crate) fn whole(times: &[StageTime], limits: &Limits) -> StageReport {
    let least: f64 = times.iter().map(|time| limits.least_seconds(time.stage, time.cost).0).sum();
    let mut by_bound = [0.0; 2];
    for time in times {
        let (least, bound) = limits.least_seconds(time.stage, time.cost);
        by_bound[usize::from(bound == Bound::Compute)] += least;
    }
    let seconds: f64 = times.iter().map(|time| time.seconds).sum();
    StageReport {
        stage: "layer",
        seconds,
        bytes: times.iter().map(|time| time.cost.bytes).sum(),
        flops: times.iter().map(|time| time.cost.flops).sum(),
        bound: if by_bound[1] > by_bound[0] { Bound::Compute } else { Bound::Memory },
        share: if seconds > 0.0 { least / seconds } else { 0.0 },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle() {
        assert_eq!(median(vec![]), 0.0);
        assert_eq!(median(vec![3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(vec![4.0, 1.0, 2.0, 3.0]), 2.5);
    }
}
