//! `expertile bench steps --device cuda:N`: inside a graph and eager, beside the copy bandwidth.

use super::{Args, PICTURE};
use crate::commands::bench::layer::first_experts;
use crate::commands::options::SizeOptions;
use crate::device::Gpu;
use crate::error::{Error, Result};
use crate::preset::MadeUp;
use crate::report::plot::SizeTimes;
use crate::report::progress::Progress;
use crate::report::stages::explain_shares;
use crate::report::{format, plot};
use crate::weights::ExpertWeights;
use crate::{memory, output};
use expertile::cuda::Device;
use expertile::cuda::measure::{Inputs, StageTime, copy_bytes_per_second, stage_times};
use expertile::layer::stage_cost;
use expertile::{ActivationFormat, Layout, MatrixRef, Plan, Routing, Stage, TokenExperts, WeightFormat};
use expertile_checkpoint::HiddenStates;
use serde::Serialize;
use std::fmt::Write;

/// What DeepGEMM's tiles on Hopper are, and so what layouts for it are aligned to.
const ALIGNMENT: usize = 128;

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
    alignment: usize,
    copy_bytes_per_second: f64,
    sizes: Vec<Size>,
}

#[derive(Debug, Serialize)]
struct Size {
    tokens: usize,
    m_sum: usize,
    live_rows: usize,
    stages: Vec<Row>,
}

#[derive(Debug, Serialize)]
struct Row {
    stage: &'static str,
    graph_seconds: f64,
    eager_seconds: f64,
    bytes: u64,
    /// Bytes over the time inside a graph, as a share of the copy bandwidth; small sizes live in the cache.
    share_of_copy: f64,
}

pub(super) fn run(args: &Args, device: &Device) -> Result<()> {
    let report = measure(&args.sizes, device)?;
    if let Some(file) = &args.sizes.plot {
        let sizes: Vec<SizeTimes> = report.sizes.iter().map(Size::times).collect();
        output::write_file(file, plot::time_by_size(PICTURE, &report.title(), &sizes).as_bytes())?;
    }
    args.report.tell(&report, Report::text)
}

fn measure(args: &SizeOptions, device: &Device) -> Result<Report> {
    // Sizes and a routing only: no weights are made, so memory need not hold them.
    let (weights, global_experts) = args.layer(WeightFormat::E4m3, None)?;
    let copy_bytes_per_second = copy_bytes_per_second(device)?;
    let progress = Progress::new("timing sizes", args.tokens.len());
    let mut sizes = Vec::new();
    for &tokens in &args.tokens {
        sizes.push(measure_size(device, &weights, global_experts, tokens, copy_bytes_per_second)?);
        progress.set(sizes.len());
    }
    let shape = weights.shape();
    Ok(Report {
        source: args.preset.name(),
        gpu: device.info().into(),
        hidden: shape.hidden(),
        intermediate: shape.intermediate(),
        experts: shape.local_experts(),
        global_experts,
        topk: weights.router().topk,
        alignment: ALIGNMENT,
        copy_bytes_per_second,
        sizes,
    })
}

fn measure_size(device: &Device, weights: &MadeUp, global_experts: usize, tokens: usize, copy: f64) -> Result<Size> {
    let (shape, topk) = (weights.shape(), weights.router().topk);
    let input = weights.tokens(tokens)?;
    let HiddenStates::Bf16(hidden_states) = input.hidden_states() else {
        return Err(Error::usage("made-up hidden states are bf16"));
    };
    let (ids, _) = weights.uniform_routing(tokens, global_experts)?;
    let map = first_experts(shape.local_experts(), global_experts);
    let routing = Routing::new(MatrixRef::new(&ids, tokens, topk)?, shape.local_experts(), map.as_deref())?;
    let topk_ids: Vec<i32> = routing.slots().map(|expert| expert.map_or(-1, |expert| expert as i32)).collect();
    let plan = Plan::tight(tokens, topk, shape.local_experts(), ALIGNMENT, TokenExperts::Distinct)?;
    let times = stage_times(device, &Inputs { shape, plan, topk_ids: &topk_ids, hidden_states })?;
    let mut space = memory::zeroed("the layout", Layout::space_len(&plan)?)?;
    let layout = Layout::build(&plan, &routing, &mut space)?;
    let row = |time: &StageTime| {
        let cost = stage_cost(time.stage, &shape, &layout, WeightFormat::E4m3, ActivationFormat::E4m3, 2);
        Row {
            stage: time.stage.name(),
            graph_seconds: time.graph_seconds,
            eager_seconds: time.eager_seconds,
            bytes: cost.bytes,
            share_of_copy: cost.bytes as f64 / time.graph_seconds / copy,
        }
    };
    let stages = times.iter().map(row).collect();
    Ok(Size { tokens, m_sum: plan.m_sum(), live_rows: layout.live_rows(), stages })
}

impl Size {
    fn times(&self) -> SizeTimes {
        // The permute's time includes routing.
        let stages = || self.stages.iter().filter(|row| row.stage != Stage::Routing.name());
        SizeTimes {
            tokens: self.tokens,
            seconds: stages().map(|row| row.graph_seconds).sum(),
            least_seconds: stages().map(|row| row.graph_seconds * row.share_of_copy).sum(),
            parts: stages().map(|row| (row.stage, row.graph_seconds)).collect(),
        }
    }
}

impl Report {
    fn title(&self) -> String {
        let experts = format::experts(self.experts, self.global_experts);
        format!("{}: {experts}, {} each, rows aligned to {}", self.source, self.topk, self.alignment)
    }

    fn text(&self) -> String {
        let mut text = self.title();
        let copies = format::bytes_per_second(self.copy_bytes_per_second);
        let _ = writeln!(text, "\n{}, copies {copies}", self.gpu);
        let header = ["tokens", "stage", "in a graph", "eager", "bytes", "TB/s", "of copy"];
        let row = |size: &Size, stage: &Row| {
            vec![
                size.tokens.to_string(),
                stage.stage.to_owned(),
                format::seconds(stage.graph_seconds),
                format::seconds(stage.eager_seconds),
                format::bytes(stage.bytes),
                format!("{:.2}", stage.bytes as f64 / stage.graph_seconds / 1e12),
                format::percent(stage.share_of_copy),
            ]
        };
        let rows: Vec<_> =
            self.sizes.iter().flat_map(|size| size.stages.iter().map(move |stage| row(size, stage))).collect();
        text.push_str(&format::table(&header, 2, &rows));
        let stages = self.sizes.iter().flat_map(|size| &size.stages);
        text.push_str(explain_shares(stages.map(|stage| stage.share_of_copy)));
        text.push_str("permute includes routing and plan: one call\n");
        text
    }
}
