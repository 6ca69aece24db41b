//! `expertile layer --exchange mpi`: one layer over the ranks that mpiexec has started.
//!
//! Every rank reads the checkpoint's headers and the tokens, loads its own experts, and runs its own tokens, cut in the
//! order of ranks. Rank 0 collects, checks, writes and prints.

use super::report::{Computed, heading};
use crate::call::Inputs;
use crate::check::{self, Found};
use crate::error::Result;
use crate::ranks::{Group, ParallelCall, ParallelLayer, PlacementOptions, RankStage, RankTimes};
use crate::report::format;
use crate::weights::ExpertWeights;
use expertile::LayerConfig;
use expertile::cpu::Cpu;
use half::bf16;
use serde::Serialize;
use std::fmt::Write;

/// What rank 0 says.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    source: String,
    layer: Option<usize>,
    ranks: usize,
    mpi: String,
    isa: &'static str,
    threads: usize,
    placement: String,
    /// What a call does, in words.
    choice: String,
    tokens: usize,
    hidden: usize,
    intermediate: usize,
    experts: usize,
    topk: usize,
    parts: Vec<&'static str>,
    weights: &'static str,
    activations: &'static str,
    /// Of the rank with most.
    weight_bytes: usize,
    workspace_bytes: usize,
    pack_seconds: f64,
    stages: Vec<RankStage>,
    /// Of the slowest rank.
    total_seconds: f64,
    pub(super) check: Option<check::Report>,
}

/// The output of all ranks and the report, on rank 0.
pub(super) struct Outcome {
    pub(super) output: Vec<bf16>,
    pub(super) report: Report,
}

/// What is run, and how.
pub(super) struct Job<'a> {
    pub(super) source: &'a str,
    pub(super) layer: Option<usize>,
    pub(super) options: &'a PlacementOptions,
    pub(super) computed: Computed,
    pub(super) check: bool,
}

pub(super) fn run(
    cpu: &Cpu,
    group: &Group,
    weights: &dyn ExpertWeights,
    inputs: Inputs<'_>,
    job: &Job<'_>,
) -> Result<Option<Outcome>> {
    let Computed { activations, parts, .. } = job.computed;
    let routing = &inputs.routing;
    let (tokens, topk, hidden) = (routing.tokens(), routing.topk(), weights.shape().hidden());
    let config = LayerConfig {
        input: inputs.hidden_states.dtype(),
        ..LayerConfig::new(topk, routing.global_experts(), activations)
    };
    let capacity = tokens.div_ceil(group.ranks());
    let ParallelLayer { layer, bytes, seconds } =
        ParallelLayer::new(cpu, group, job.options, weights, config, parts, capacity)?;
    let mine = group.share_of(tokens);
    let id = |slot: usize| routing.local_expert(slot / topk, slot % topk).map_or(-1, |expert| expert as i32);
    let slots = mine.start * topk..mine.end * topk;
    let ids: Vec<i32> = slots.clone().map(id).collect();
    let mut call = ParallelCall::new(&layer, inputs.hidden_states, mine, &ids, &inputs.topk_weights[slots])?;
    // As long as the layer of one rank is timed for.
    let RankTimes { stages, total_seconds } =
        call.time(group, |first| (1.0 / first.max(1e-9)).clamp(1.0, 5.0) as usize)?;
    let most = group.gather(&[bytes as f64, call.workspace_bytes() as f64, seconds])?;
    let most = |at: usize| most.iter().map(|rank| rank[at]).fold(0.0, f64::max);
    let output = group.collect(&call.output, tokens, hidden)?;
    if !group.is_first() {
        return Ok(None);
    }
    let found = Found { output: &output, rows: None };
    let check = job.check.then(|| check::check(&found, &inputs, weights, activations, parts));
    let report = Report {
        source: job.source.to_owned(),
        layer: job.layer,
        ranks: group.ranks(),
        mpi: group.library().to_owned(),
        isa: cpu.isa().name(),
        threads: cpu.threads(),
        placement: layer.parallel().placement.to_string(),
        choice: layer.choice(capacity.min(layer.max_tokens()))?.parallel.to_string(),
        tokens,
        hidden,
        intermediate: weights.shape().intermediate(),
        experts: weights.shape().local_experts(),
        topk,
        parts: parts.names(),
        weights: weights.format().name(),
        activations: activations.name(),
        weight_bytes: most(0) as usize,
        workspace_bytes: most(1) as usize,
        pack_seconds: most(2),
        stages,
        total_seconds,
        check,
    };
    Ok(Some(Outcome { output, report }))
}

impl Report {
    pub(super) fn text(&self) -> String {
        let sizes = [self.hidden, self.intermediate, self.experts, self.tokens, self.topk];
        let mut text = heading(&self.source, self.layer, sizes);
        let _ = writeln!(
            text,
            "{} weights, {} activations; at most {} of weights a rank, packed in {}",
            self.weights,
            self.activations,
            format::bytes(self.weight_bytes as u64),
            format::seconds(self.pack_seconds)
        );
        let _ = writeln!(text, "output holds: {}", self.parts.join(" + "));
        let _ = writeln!(text, "{}; {}, {} threads of {} a rank", self.placement, self.mpi, self.threads, self.isa);
        let _ = writeln!(text, "{}", self.choice);
        let mut rows: Vec<_> = self.stages.iter().map(RankStage::row).collect();
        let mut total = vec!["-".to_owned(); RankStage::HEADER.len()];
        (total[0], total[2]) = ("total".into(), format::seconds(self.total_seconds));
        rows.push(total);
        text.push_str(&format::table(&RankStage::HEADER, 1, &rows));
        text.push_str("meeting, dispatch and combine hold the time for which a rank waits for others\n");
        if let Some(check) = &self.check {
            let _ = writeln!(text, "{}", check.text());
        }
        text
    }
}
