//! What `expertile layer` reports.

use crate::check;
use crate::device::Choice;
use crate::machine::Limits;
use crate::parts::Parts;
use crate::report::format;
use crate::report::stages::{StageReport, StageTime, explain_shares};
use crate::router::RouterPrecision;
use crate::weights::ExpertWeights;
use expertile::{ActivationFormat, Routing};
use half::bf16;
use serde::Serialize;
use std::fmt::Write;

/// What running a layer gave, wherever it ran.
pub(super) struct Outcome {
    pub(super) place: Place,
    pub(super) weight_bytes: usize,
    /// Until the layer was ready to run.
    pub(super) pack_seconds: f64,
    pub(super) workspace_bytes: usize,
    pub(super) limits: Limits,
    pub(super) stages: Vec<StageTime>,
    /// All stages as one.
    pub(super) total: StageReport,
    pub(super) output: Vec<bf16>,
    pub(super) check: Option<check::Report>,
}

/// Where a layer ran.
#[derive(Debug, Serialize)]
#[serde(untagged)]
pub(super) enum Place {
    Cpu {
        isa: &'static str,
        threads: usize,
    },
    Gpu {
        device: String,
        /// Seconds of a call that is launched from the host.
        eager_seconds: f64,
        choice: Choice,
    },
}

#[derive(Debug, Serialize)]
pub(super) struct Report {
    source: String,
    layer: Option<usize>,
    #[serde(flatten)]
    pub(super) place: Place,
    tokens: usize,
    hidden: usize,
    intermediate: usize,
    experts: usize,
    topk: usize,
    active_experts: usize,
    /// What the output holds.
    parts: Vec<&'static str>,
    /// What the block has beside it.
    left_out: Vec<&'static str>,
    /// What the logits were computed in; absent where the input brings the choice.
    router: Option<&'static str>,
    activation: &'static str,
    /// The type of the weights where they came from.
    weight_dtype: &'static str,
    /// Whether they were rounded to their format.
    weights_rounded: bool,
    weights: &'static str,
    activations: &'static str,
    pub(super) weight_bytes: usize,
    pub(super) workspace_bytes: usize,
    pub(super) pack_seconds: f64,
    pub(super) limits: Limits,
    pub(super) stages: Vec<StageReport>,
    pub(super) total: StageReport,
    pub(super) check: Option<check::Report>,
}

/// How a call was computed, whatever it ran on.
#[derive(Debug, Clone, Copy)]
pub(super) struct Computed {
    pub(super) activations: ActivationFormat,
    pub(super) parts: Parts,
    /// `None` where the input brings the choice.
    pub(super) router: Option<RouterPrecision>,
}

/// The first line of a report: which layer, its sizes, and how many tokens.
pub(super) fn heading(
    source: &str,
    layer: Option<usize>,
    [hidden, intermediate, experts, tokens, topk]: [usize; 5],
) -> String {
    let layer = layer.map_or(String::new(), |layer| format!(", layer {layer}"));
    format!("{source}{layer}: H {hidden}, I {intermediate}, {experts} experts, {tokens} tokens, {topk} experts each\n")
}

impl Report {
    pub(super) fn new(
        source: &str,
        layer: Option<usize>,
        weights: &dyn ExpertWeights,
        routing: &Routing<'_>,
        computed: Computed,
        outcome: Outcome,
    ) -> Self {
        let shape = weights.shape();
        let Outcome { limits, .. } = outcome;
        Self {
            source: source.to_owned(),
            layer,
            place: outcome.place,
            tokens: routing.tokens(),
            hidden: shape.hidden(),
            intermediate: shape.intermediate(),
            experts: shape.local_experts(),
            topk: routing.topk(),
            active_experts: routing.active_experts(),
            parts: computed.parts.names(),
            left_out: computed.parts.left_out(weights),
            router: computed.router.map(RouterPrecision::name),
            activation: weights.activation().name(),
            weight_dtype: weights.dtype(),
            weights_rounded: weights.are_rounded(),
            weights: weights.format().name(),
            activations: computed.activations.name(),
            weight_bytes: outcome.weight_bytes,
            workspace_bytes: outcome.workspace_bytes,
            pack_seconds: outcome.pack_seconds,
            limits,
            stages: outcome.stages.iter().map(|time| StageReport::new(time, &limits)).collect(),
            total: outcome.total,
            check: outcome.check,
        }
    }

    pub(super) fn text(&self) -> String {
        let sizes = [self.hidden, self.intermediate, self.experts, self.tokens, self.topk];
        let mut text = heading(&self.source, self.layer, sizes);
        let (bytes, seconds) = (format::bytes(self.weight_bytes as u64), format::seconds(self.pack_seconds));
        let (how, place) = match &self.place {
            Place::Cpu { isa, threads } => ("packed", format!("{threads} threads of {isa}")),
            Place::Gpu { device, .. } => ("on the device", device.clone()),
        };
        let _ = writeln!(
            text,
            "{} weights ({bytes}, {how} in {seconds}), {} activations, {place}",
            self.weights_text(),
            self.activations
        );
        let _ = writeln!(text, "{}", self.parts_text());
        let _ =
            writeln!(text, "{} of {} experts have tokens; {}", self.active_experts, self.experts, self.limits_text());
        if let Place::Gpu { choice, eager_seconds, .. } = &self.place {
            let _ = writeln!(text, "{}\nlaunched from the host: {}", choice.text(), format::seconds(*eager_seconds));
        }
        let rows: Vec<_> = self.stages.iter().chain([&self.total]).map(StageReport::row).collect();
        text.push_str(&format::table(&StageReport::HEADER, 1, &rows));
        text.push_str(explain_shares(self.stages.iter().chain([&self.total]).map(|stage| stage.share)));
        if let Some(check) = &self.check {
            let _ = writeln!(text, "{}", check.text());
        }
        text
    }

    /// Which parts of the block the output holds, and who chose the experts.
    fn parts_text(&self) -> String {
        let mut text = format!("output holds: {}", self.parts.join(" + "));
        if !self.left_out.is_empty() {
            let _ = write!(text, " (left out: {})", self.left_out.join(", "));
        }
        match self.router {
            Some(precision) => write!(text, "; router in {precision}; {}", self.activation),
            None => write!(text, "; experts as the input says; {}", self.activation),
        }
        .expect("a string takes everything");
        text
    }

    /// The format of the weights, and from what they were rounded to it.
    fn weights_text(&self) -> String {
        if self.weights_rounded {
            format!("{} (rounded from {})", self.weights, self.weight_dtype)
        } else {
            self.weights.into()
        }
    }

    fn limits_text(&self) -> String {
        let Limits { bandwidth, gemm_flops_per_second } = self.limits;
        let copy = format::bytes_per_second(bandwidth.copy_bytes_per_second);
        let gemm = format::flops_per_second(gemm_flops_per_second);
        match self.place {
            Place::Cpu { .. } => {
                let read = format::bytes_per_second(bandwidth.read_bytes_per_second);
                format!("memory reads {read}, copies {copy}; gemm in cache {gemm}")
            }
            Place::Gpu { .. } => format!("memory copies {copy}; a large matrix product {gemm}"),
        }
    }
}
