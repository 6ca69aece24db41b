//! A call of a layer on the CPU, run and timed.

use crate::error::Result;
use crate::memory;
use crate::report::stages::{StageTime, medians};
use expertile::cpu::{Layer, StageDone};
use expertile::{MatrixRef, Routing, Stage};
use expertile_checkpoint::HiddenStates;
use half::bf16;

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
