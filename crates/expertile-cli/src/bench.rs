//! `expertile bench`: every stage timed over a list of sizes, permute and unpermute beside a memcpy of the same bytes.

mod gpu;
mod gpu_layer;
mod gpu_tiles;

use crate::device::{self, DeviceNumber};
use crate::error::{Error, Result};
use crate::layer::{Packed, Parts, active_experts, choose_activations, parse_weights};
use crate::machine::{self, Limits, parallel_copy};
use crate::memory::{self, LayerMemory, WeightPlace};
use crate::preset::{MadeUp, Preset};
use crate::progress::Progress;
use crate::stages::{Call, Inputs, StageReport, StageTime, median, medians, whole};
use crate::weights::ExpertWeights;
use crate::{format, output, plot};
use clap::ValueEnum;
use expertile::cpu::Cpu;
use expertile::{ActivationFormat, LayerConfig, MatrixRef, Routing, Stage, WeightFormat};
use serde::Serialize;
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Time every stage of a known model's layer over a list of sizes.
///
/// Weights and tokens are made up, experts are drawn evenly. Each size runs once to warm up and then --repeat times; the
/// medians are shown. After each run, in the same process and with the same threads, memory is copied: as many bytes
/// (read and written) as permute, then as unpermute moved.
///
/// On a GPU, medians inside a graph of many calls and of calls launched one by one, beside its copy bandwidth and, for the
/// layer, a large matrix product.
#[derive(Debug, clap::Args)]
#[command(allow_negative_numbers = true)]
pub(crate) struct Args {
    /// What to time on a GPU: the steps that any GPU runs, which are all but the GEMMs, with rows quantized to e4m3; or the
    /// whole layer, or layers drawn at random whose GEMMs are cut in every way, to judge the choice of tiles; these two need a
    /// Hopper. A CPU always runs the layer.
    #[arg(value_enum, value_name = "WHAT", default_value_t = What::Steps)]
    what: What,
    /// Numbers of tokens, separated by commas.
    #[arg(long, value_name = "M,M,...", value_delimiter = ',', default_value = "1,8,64,512")]
    tokens: Vec<usize>,
    /// The model whose layer is timed.
    #[arg(long, value_name = "NAME", default_value = "qwen3-30b-a3b")]
    preset: Preset,
    /// Experts, if not the model's own number; for tiles, if not drawn.
    #[arg(long, value_name = "N")]
    experts: Option<usize>,
    /// Experts on this device; the others' rows are elsewhere (all, unless given).
    #[arg(long, value_name = "N")]
    local_experts: Option<usize>,
    /// I of the experts, if not the model's own: what a rank holds where every expert is split.
    #[arg(long, value_name = "I")]
    intermediate: Option<usize>,
    /// What the weights are made of: e4m3 or bf16 (what the model is published in, unless given).
    #[arg(long, value_name = "FORMAT", value_parser = parse_weights)]
    weights: Option<WeightFormat>,
    /// What the GEMMs read: e4m3 or bf16 (the weights' own format, unless given).
    #[arg(long, value_name = "FORMAT", value_parser = crate::plan::parse_activations)]
    activations: Option<ActivationFormat>,
    /// Layers to draw, for tiles: H 1024 to 8192, I 128 to 16384, 8 to 512 experts, 1 to 10 of them per token, 1 to 16384 tokens,
    /// as far as they fit in 24 GiB of weights, 32 GiB of rows and 30 TFLOP.
    #[arg(long, value_name = "N", default_value_t = 60)]
    draws: usize,
    /// Threads (as many as the machine runs at once, unless given).
    #[arg(long, value_name = "T")]
    threads: Option<usize>,
    /// Instruction set: portable, avx2 or avx512-bf16 (the best there is, unless given).
    #[arg(long, value_name = "NAME")]
    isa: Option<String>,
    /// cpu, or cuda:N.
    #[arg(long, value_name = "NAME", default_value = "cpu", value_parser = device::parse)]
    device: DeviceNumber,
    /// Timed runs of each size on a CPU (5, unless given).
    #[arg(long, value_name = "N")]
    repeat: Option<usize>,
    /// Seed of everything made up.
    #[arg(long, value_name = "S", default_value_t = 1)]
    seed: u64,
    /// Write JSON to a file; without one, or with "-", print it instead of the table.
    #[arg(long, value_name = "FILE", num_args = 0..=1, default_missing_value = "-")]
    json: Option<PathBuf>,
    /// Draw time by size, and each stage's part of it, as SVG.
    #[arg(long, value_name = "FILE.svg")]
    plot: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum What {
    Steps,
    Layer,
    Tiles,
}

#[derive(Debug, Serialize)]
struct Report {
    source: String,
    isa: &'static str,
    threads: usize,
    hidden: usize,
    intermediate: usize,
    experts: usize,
    topk: usize,
    weights: &'static str,
    activations: &'static str,
    weight_bytes: usize,
    repeat: usize,
    limits: Limits,
    sizes: Vec<Size>,
}

/// The stages at one number of tokens.
#[derive(Debug, Serialize)]
pub(crate) struct Size {
    pub(crate) tokens: usize,
    pub(crate) active_experts: usize,
    pub(crate) stages: Vec<Row>,
    pub(crate) total: StageReport,
    /// The least that the whole can take on this machine.
    pub(crate) least_seconds: f64,
}

/// A stage, and for those that only move rows a copy of the same bytes.
#[derive(Debug, Serialize)]
pub(crate) struct Row {
    #[serde(flatten)]
    pub(crate) report: StageReport,
    pub(crate) memcpy_seconds: Option<f64>,
    /// The copy's time over the stage's.
    pub(crate) share_of_memcpy: Option<f64>,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    if let Some(tokens) = args.tokens.iter().find(|&&tokens| tokens == 0) {
        return Err(Error::usage(format!("--tokens holds {tokens}, expected sizes of at least 1")));
    }
    if args.repeat == Some(0) {
        return Err(Error::usage("--repeat is 0, expected at least 1"));
    }
    let json = args.json.as_deref().filter(|file| *file != Path::new("-"));
    output::prepare(&[("--json", json), ("--plot", args.plot.as_deref())], &[])?;
    if let Some(ordinal) = args.device {
        return run_on_gpu(args, ordinal);
    }
    for (option, given) in [("--local-experts", args.local_experts), ("--intermediate", args.intermediate)] {
        if given.is_some() {
            return Err(Error::usage(format!("{option} goes with --device cuda:N layer only")));
        }
    }
    let cpu = machine::cpu(args.isa.as_deref())?;
    let report = machine::pool(args.threads)?.install(|| measure(args, &cpu))?;
    if let Some(file) = &args.plot {
        output::write_file(file, plot::time_by_size(&report.title(), &report.sizes).as_bytes())?;
    }
    tell(&report, args.json.as_deref(), Report::text)
}

/// Prints a report as a table or, as `--json` says, as JSON; or writes the JSON to a file and prints the table.
fn tell<R: Serialize>(report: &R, json: Option<&Path>, text: impl FnOnce(&R) -> String) -> Result<()> {
    match json {
        Some(file) if file == Path::new("-") => return output::print_json(report),
        Some(file) => output::write_file(file, output::json(report).as_bytes())?,
        None => {}
    }
    output::print(&text(report))
}

fn run_on_gpu(args: &Args, ordinal: usize) -> Result<()> {
    let (steps, tiles) = (args.what == What::Steps, args.what == What::Tiles);
    for (option, given, place) in [
        ("--weights bf16", steps && args.weights == Some(WeightFormat::Bf16), "--device cuda:N layer or cpu"),
        (
            "--activations bf16",
            steps && args.activations == Some(ActivationFormat::Bf16),
            "--device cuda:N layer or cpu",
        ),
        ("--local-experts", args.what != What::Layer && args.local_experts.is_some(), "--device cuda:N layer"),
        ("--intermediate", args.what != What::Layer && args.intermediate.is_some(), "--device cuda:N layer"),
        ("--weights", tiles && args.weights.is_some(), "a preset"),
        ("--activations", tiles && args.activations.is_some(), "a preset"),
        ("--threads", args.threads.is_some(), "--device cpu"),
        ("--isa", args.isa.is_some(), "--device cpu"),
        ("--repeat", args.repeat.is_some(), "--device cpu"),
        ("--plot", args.plot.is_some(), "--device cpu"),
    ] {
        if given {
            return Err(Error::usage(format!("{option} goes with {place} only")));
        }
    }
    match args.what {
        What::Steps => gpu::run(args, ordinal),
        What::Layer => gpu_layer::run(args, ordinal),
        What::Tiles => gpu_tiles::run(args, ordinal),
    }
}

/// `--local-experts`, checked; as many as a token has, at least.
fn local_experts(args: &Args, global: usize) -> Result<usize> {
    let (local, topk) = (args.local_experts.unwrap_or(global), args.preset.topk());
    if global < topk {
        return Err(Error::usage(format!("--experts is {global}, expected at least {topk}, the experts per token")));
    }
    if local < topk || local > global {
        return Err(Error::usage(format!("--local-experts is {local}, expected {topk} to {global}")));
    }
    Ok(local)
}

fn measure(args: &Args, cpu: &Cpu) -> Result<Report> {
    let format = args.weights.unwrap_or_else(|| args.preset.usual_format());
    let activations = choose_activations(args.activations, format, args.preset.shape()?)?;
    let weights = MadeUp::new(args.preset, args.experts, format, args.seed, memory::available())?;
    require_memory(&weights, activations, WeightPlace::Host, &args.tokens)?;
    let config = LayerConfig::new(args.preset.topk(), weights.shape().local_experts(), activations);
    let packed = Packed::new(cpu, &weights, config, Parts::ROUTED)?;
    let limits = Limits::measure(cpu, format, activations)?;
    let repeat = args.repeat.unwrap_or(5);
    let progress = Progress::new("timing sizes", args.tokens.len());
    let mut sizes = Vec::new();
    for &tokens in &args.tokens {
        sizes.push(measure_size(&packed, &weights, &limits, tokens, repeat)?);
        progress.set(sizes.len());
    }
    let shape = packed.layer.shape();
    Ok(Report {
        source: args.preset.name(),
        isa: cpu.isa().name(),
        threads: cpu.threads(),
        hidden: shape.hidden(),
        intermediate: shape.intermediate(),
        experts: shape.local_experts(),
        topk: weights.router().topk,
        weights: format.name(),
        activations: activations.name(),
        weight_bytes: packed.bytes,
        repeat,
        limits,
        sizes,
    })
}

/// Fails unless the host holds its part of the layer with the calls of every size.
fn require_memory(weights: &MadeUp, activations: ActivationFormat, place: WeightPlace, tokens: &[usize]) -> Result<()> {
    let layer = LayerMemory::new(weights, activations, Parts::ROUTED, place);
    let topk = weights.router().topk;
    tokens.iter().try_for_each(|&tokens| layer.calling(tokens, topk, false).require())
}

fn measure_size(packed: &Packed, weights: &MadeUp, limits: &Limits, tokens: usize, repeat: usize) -> Result<Size> {
    let input = weights.tokens(tokens)?;
    let (ids, topk_weights) = weights.uniform_routing(tokens, weights.shape().local_experts())?;
    let ids = MatrixRef::new(&ids, tokens, weights.router().topk)?;
    let routing = Routing::new(ids, weights.shape().local_experts(), None)?;
    let inputs = Inputs { hidden_states: input.hidden_states(), routing, topk_weights: &topk_weights };
    let mut call = Call::new(&packed.layer, inputs)?;
    let mut copies = call.time_once()?.iter().filter_map(Memcpy::new).collect::<Result<Vec<_>>>()?;
    copies.iter_mut().for_each(Memcpy::run);
    copies.iter_mut().for_each(|copy| copy.seconds.clear());
    let mut runs = Vec::new();
    for _ in 0..repeat {
        runs.push(call.time_once()?);
        copies.iter_mut().for_each(Memcpy::run);
    }
    let times = medians(&runs);
    let row = |time: &StageTime| {
        let copy = copies.iter().find(|copy| time.stage == Some(copy.stage));
        let memcpy_seconds = copy.map(|copy| median(copy.seconds.clone()));
        let share_of_memcpy = memcpy_seconds.map(|seconds| seconds / time.seconds.max(1e-12));
        Row { report: StageReport::new(time, limits), memcpy_seconds, share_of_memcpy }
    };
    Ok(Size {
        tokens,
        active_experts: active_experts(&routing),
        stages: times.iter().map(row).collect(),
        total: whole(&times, limits),
        least_seconds: times.iter().map(|time| limits.least_seconds(time.stage, time.cost).0).sum(),
    })
}

/// A memcpy that moves as many bytes as a stage, half of them read and half written.
struct Memcpy {
    stage: Stage,
    from: Vec<u64>,
    to: Vec<u64>,
    seconds: Vec<f64>,
}

impl Memcpy {
    /// For the stages that move rows and do little else.
    fn new(time: &StageTime) -> Option<Result<Self>> {
        let stage = time.stage.filter(|stage| matches!(stage, Stage::Permute | Stage::Unpermute))?;
        let words = (time.cost.bytes as usize).div_ceil(2 * size_of::<u64>());
        let written = |value: u64| {
            let mut words = memory::zeroed("a copy to compare with", words)?;
            // A page of zeros that was never written is not memory.
            words.fill(value);
            Ok(words)
        };
        Some(written(1).and_then(|from| Ok(Self { stage, from, to: written(2)?, seconds: Vec::new() })))
    }

    fn run(&mut self) {
        let started = Instant::now();
        parallel_copy(&self.from, &mut self.to);
        self.seconds.push(started.elapsed().as_secs_f64());
    }
}

impl Report {
    fn title(&self) -> String {
        format!(
            "{}: {} experts, {} each, {} weights, {} activations, {} threads of {}",
            self.source, self.experts, self.topk, self.weights, self.activations, self.threads, self.isa
        )
    }

    fn text(&self) -> String {
        let mut text = self.title();
        let _ = writeln!(
            text,
            "\nmemory reads {}, copies {}; gemm in cache {}; medians of {} runs",
            format::bytes_per_second(self.limits.bandwidth.read_bytes_per_second),
            format::bytes_per_second(self.limits.bandwidth.copy_bytes_per_second),
            format::flops_per_second(self.limits.gemm_flops_per_second),
            self.repeat
        );
        let mut rows = Vec::new();
        for size in &self.sizes {
            for stage in &size.stages {
                let memcpy = stage.share_of_memcpy.map_or_else(|| "-".into(), format::percent);
                rows.push(table_row(size.tokens, &stage.report, memcpy));
            }
            rows.push(table_row(size.tokens, &size.total, "-".into()));
        }
        let header = [&["tokens"], &StageReport::HEADER[..], &["of memcpy"]].concat();
        text.push_str(&format::table(&header, 2, &rows));
        text
    }
}

fn table_row(tokens: usize, report: &StageReport, of_memcpy: String) -> Vec<String> {
    let mut row = vec![tokens.to_string()];
    row.extend(report.row());
    row.push(of_memcpy);
    row
}
