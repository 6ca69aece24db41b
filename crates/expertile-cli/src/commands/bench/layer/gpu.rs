//! `expertile bench layer --device cuda:N`: the whole layer on a GPU, inside a graph and eager, and each of its stages.

use super::{Args, first_experts, made_up};
use crate::commands::options::Runner;
use crate::device::{self, Choice, Gpu};
use crate::error::Result;
use crate::machine::Limits;
use crate::output;
use crate::preset::MadeUp;
use crate::report::plot::SizeTimes;
use crate::report::progress::Progress;
use crate::report::stages::{StageReport, explain_shares, whole};
use crate::report::{format, plot};
use crate::weights::ExpertWeights;
use expertile::cuda::measure::{HostInputs, LayerBench};
use expertile::cuda::{Device, Layer};
use expertile::{ActivationFormat, LayerConfig, MatrixRef, Routing};
use serde::Serialize;
use std::fmt::Write;
use std::time::Instant;

#[derive(Debug, Serialize)]
struct Report {
    source: String,
    #[serde(flatten)]
    gpu: Gpu,
    hidden: usize,
    intermediate: usize,
    /// On this device.
    experts: usize,
    global_experts: usize,
    topk: usize,
    weights: &'static str,
    activations: &'static str,
    weight_bytes: usize,
    /// Until the layer was ready: weights made up and brought to the device, kernels compiled or loaded.
    prepare_seconds: f64,
    limits: Limits,
    sizes: Vec<Size>,
}

#[derive(Debug, Serialize)]
struct Size {
    tokens: usize,
    live_rows: usize,
    active_experts: usize,
    choice: Choice,
    stages: Vec<Row>,
    layer: Row,
}

/// A stage, or the layer: its time inside a graph and what bounds it, and its time when launched from the host.
#[derive(Debug, Serialize)]
struct Row {
    #[serde(flatten)]
    report: StageReport,
    eager_seconds: f64,
}

pub(super) fn run(args: &Args, runner: &Runner, device: &Device) -> Result<()> {
    let report = measure(args, runner, device)?;
    if let Some(file) = &args.sizes.plot {
        let sizes: Vec<SizeTimes> = report.sizes.iter().map(Size::times).collect();
        output::write_file(file, plot::time_by_size("Time of a layer", &report.title(), &sizes).as_bytes())?;
    }
    args.report.tell(&report, Report::text)
}

fn measure(args: &Args, runner: &Runner, device: &Device) -> Result<Report> {
    let (weights, global_experts, activations) = made_up(args, runner)?;
    let (format, preset, tokens) = (weights.format(), args.sizes.preset, &args.sizes.tokens);
    let usual = LayerConfig::new(preset.topk(), global_experts, activations);
    let config = LayerConfig { activation: weights.activation(), ..usual };
    let started = Instant::now();
    let most = tokens.iter().copied().max().unwrap_or(1);
    let e4m3_copy = args.copy.e4m3_copy(runner, format, activations)?;
    let layer = device::prepare(device, &weights, config, most, e4m3_copy)?;
    let prepare_seconds = started.elapsed().as_secs_f64();
    let limits = device::limits(device, format)?;
    let progress = Progress::new("timing sizes", tokens.len());
    let mut sizes = Vec::new();
    for &tokens in tokens {
        sizes.push(measure_size(device, &layer, &weights, &limits, tokens)?);
        progress.set(sizes.len());
    }
    let shape = layer.shape();
    Ok(Report {
        source: preset.name(),
        gpu: device.info().into(),
        hidden: shape.hidden(),
        intermediate: shape.intermediate(),
        experts: shape.local_experts(),
        global_experts,
        topk: config.topk,
        weights: format.name(),
        activations: activations.name(),
        weight_bytes: layer.weights().iter().map(|weights| weights.bytes()).sum(),
        prepare_seconds,
        limits,
        sizes,
    })
}

fn measure_size(device: &Device, layer: &Layer, weights: &MadeUp, limits: &Limits, tokens: usize) -> Result<Size> {
    let config = layer.config();
    let (local, global) = (layer.shape().local_experts(), config.global_experts);
    let input = weights.tokens(tokens)?;
    let (_, hidden_states) = device::half_bits(input.hidden_states())?;
    let (topk_ids, topk_weights) = weights.uniform_routing(tokens, global)?;
    let map = first_experts(local, global);
    let expert_map = map.as_deref();
    let routing = Routing::new(MatrixRef::new(&topk_ids, tokens, config.topk)?, local, expert_map)?;
    let inputs = HostInputs { tokens, hidden_states, topk_ids: &topk_ids, topk_weights: &topk_weights, expert_map };
    let call = LayerBench::new(device, layer, &inputs)?;
    call.run()?;
    let times = call.time()?;
    let stages = device::stage_times(layer, &times, &routing)?;
    let report = whole(&stages, limits).taking(times.graph_seconds);
    let rows = stages
        .iter()
        .zip(&times.stages)
        .map(|(stage, timed)| Row { report: StageReport::new(stage, limits), eager_seconds: timed.eager_seconds });
    Ok(Size {
        tokens,
        live_rows: routing.slots().flatten().count(),
        active_experts: routing.active_experts(),
        choice: times.choice.into(),
        stages: rows.collect(),
        layer: Row { report, eager_seconds: times.eager_seconds },
    })
}

impl Size {
    fn times(&self) -> SizeTimes {
        let StageReport { seconds, share, .. } = self.layer.report;
        SizeTimes {
            tokens: self.tokens,
            seconds,
            least_seconds: seconds * share,
            parts: self.stages.iter().map(|stage| (stage.report.stage, stage.report.seconds)).collect(),
        }
    }
}

impl Report {
    fn title(&self) -> String {
        let experts = format::experts(self.experts, self.global_experts);
        let Self { source, topk, weights, activations, .. } = self;
        format!("{source}: {experts}, {topk} each, {weights} weights, {activations} activations")
    }

    fn text(&self) -> String {
        let mut text = self.title();
        let bytes = format::bytes(self.weight_bytes as u64);
        let _ = writeln!(text, "; weights {bytes}, ready in {}", format::seconds(self.prepare_seconds));
        let _ = writeln!(
            text,
            "{}, copies {}; a large matrix product {}",
            self.gpu,
            format::bytes_per_second(self.limits.bandwidth.copy_bytes_per_second),
            format::flops_per_second(self.limits.gemm_flops_per_second)
        );
        let header = [&["tokens"], &StageReport::HEADER[..], &["eager"]].concat();
        let row = |size: &Size, row: &Row| {
            let mut cells = vec![size.tokens.to_string()];
            cells.extend(row.report.row());
            cells.push(format::seconds(row.eager_seconds));
            cells
        };
        let rows: Vec<_> = self
            .sizes
            .iter()
            .flat_map(|size| size.stages.iter().chain([&size.layer]).map(move |stage| row(size, stage)))
            .collect();
        text.push_str(&format::table(&header, 2, &rows));
        for size in &self.sizes {
            let _ = writeln!(text, "{} tokens: {}", size.tokens, size.choice.text());
        }
        let layers = self.sizes.iter().flat_map(|size| size.stages.iter().chain([&size.layer]));
        text.push_str(explain_shares(layers.map(|row| row.report.share)));
        text.push_str(
            "times are inside a graph; a stage by itself may find in the cache what inside the layer comes from memory\n",
        );
        if self.activations == ActivationFormat::E4m3.name() {
            text.push_str("permute includes routing and plan: one call\n");
        }
        text
    }
}
