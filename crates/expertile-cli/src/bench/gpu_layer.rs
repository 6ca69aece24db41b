//! `expertile bench --device cuda:N layer`: the whole layer on a GPU, inside a graph and eager, and each of its stages.

use super::{Args, local_experts, require_memory, tell};
use crate::device::{self, Choice, Gpu};
use crate::error::Result;
use crate::format;
use crate::layer::{active_experts, choose_activations};
use crate::machine::Limits;
use crate::memory::WeightPlace;
use crate::preset::MadeUp;
use crate::progress::Progress;
use crate::stages::{StageReport, whole};
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

pub(super) fn run(args: &Args, ordinal: usize) -> Result<()> {
    let device = Device::open(ordinal)?;
    let report = measure(args, &device)?;
    tell(&report, args.json.as_deref(), Report::text)
}

fn measure(args: &Args, device: &Device) -> Result<Report> {
    let format = args.weights.unwrap_or_else(|| args.preset.usual_format());
    let activations = choose_activations(args.activations, format, args.preset.shape()?)?;
    let global_experts = args.experts.unwrap_or(args.preset.experts());
    let local = local_experts(args, global_experts)?;
    let weights = MadeUp::new(args.preset, Some(local), format, args.seed, Some(device.info().memory_bytes))?
        .with_intermediate(args.intermediate)?;
    require_memory(&weights, activations, WeightPlace::Device, &args.tokens)?;
    let config = LayerConfig::new(args.preset.topk(), global_experts, activations);
    let started = Instant::now();
    let most = args.tokens.iter().copied().max().unwrap_or(1);
    let layer = device::prepare(device, &weights, config, most)?;
    let prepare_seconds = started.elapsed().as_secs_f64();
    let limits = device::limits(device, format)?;
    let progress = Progress::new("timing sizes", args.tokens.len());
    let mut sizes = Vec::new();
    for &tokens in &args.tokens {
        sizes.push(measure_size(device, &layer, &weights, &limits, tokens)?);
        progress.set(sizes.len());
    }
    let shape = layer.shape();
    Ok(Report {
        source: args.preset.name(),
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
    // The first experts are this device's.
    let map: Vec<i32> = (0..global).map(|id| if id < local { id as i32 } else { -1 }).collect();
    let expert_map = (local < global).then_some(&map[..]);
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
        live_rows: live_rows(&routing),
        active_experts: active_experts(&routing),
        choice: times.choice.into(),
        stages: rows.collect(),
        layer: Row { report, eager_seconds: times.eager_seconds },
    })
}

fn live_rows(routing: &Routing<'_>) -> usize {
    let topk = routing.topk();
    let live = |slot: &usize| routing.local_expert(slot / topk, slot % topk).is_some();
    (0..routing.tokens() * topk).filter(live).count()
}

impl Report {
    fn text(&self) -> String {
        let mut text = String::new();
        let experts = if self.experts < self.global_experts {
            format!("{} of {} experts", self.experts, self.global_experts)
        } else {
            format!("{} experts", self.experts)
        };
        let _ = writeln!(
            text,
            "{}: {experts}, {} each, {} weights ({}, ready in {}), {} activations",
            self.source,
            self.topk,
            self.weights,
            format::bytes(self.weight_bytes as u64),
            format::seconds(self.prepare_seconds),
            self.activations
        );
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
        text.push_str("times are inside a graph; the layer's is less than its stages', as each is set up while the one before runs\n");
        if self.activations == ActivationFormat::E4m3.name() {
            text.push_str("permute includes routing and plan: one call\n");
        }
        text
    }
}
