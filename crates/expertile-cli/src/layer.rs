//! `expertile layer`: one MoE layer, run, timed and checked.

mod gpu;

use crate::check::{self, Found};
use crate::device::{self, Choice, DeviceNumber};
use crate::error::{Error, Result};
use crate::machine::{self, Limits};
use crate::memory::{self, LayerMemory};
use crate::preset::{MadeUp, Preset};
use crate::progress::Progress;
use crate::stages::{Call, Inputs, StageReport, StageTime, whole};
use crate::weights::ExpertWeights;
use crate::{format, output, router, signals};
use expertile::cpu::{Cpu, Layer, LayerOptions};
use expertile::cuda::Device;
use expertile::{ActivationFormat, MatrixRef, Routing, Stage, StageCost, TopkIds, WeightFormat};
use expertile_checkpoint::{Checkpoint, LayerInput, LayerOutput};
use half::bf16;
use serde::Serialize;
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Run one MoE layer of a checkpoint, or of a known model with made-up weights.
///
/// Every stage is timed after one run to warm up: the median of up to five runs, fewer where they take long. The limit
/// of a stage is the memory it must move at the bandwidth measured at the start, or its operations at the rate of the
/// GEMM in cache, whichever takes longer; a share above 100 % means that caches hold what memory would have to bring.
///
/// On a GPU (a Hopper) a stage's time is that inside a graph, the bandwidth is that of a copy, and the rate that of a large
/// matrix product, all measured at the start. The router still runs on the CPU, and is not in the table.
#[derive(Debug, clap::Args)]
#[command(allow_negative_numbers = true)]
#[command(group(clap::ArgGroup::new("source").required(true).args(["model", "preset"])))]
pub(crate) struct Args {
    /// Folder of a Hugging Face checkpoint: config.json with model.safetensors, or an index with shards.
    #[arg(long, value_name = "DIR", requires_all = ["layer", "input"])]
    model: Option<PathBuf>,
    /// Number of the layer in the checkpoint, from 0.
    #[arg(long, value_name = "N", conflicts_with = "preset")]
    layer: Option<usize>,
    /// Safetensors file with hidden_states [M, H] (bf16, f16 or f32), and perhaps topk_ids [M, topk] (i32 or i64) with
    /// topk_weights (f32); without them the router decides.
    #[arg(long, value_name = "FILE.safetensors")]
    input: Option<PathBuf>,
    /// Where to write output [M, H] (bf16), topk_ids (i32) and topk_weights (f32). A file is replaced whole or not at all; a
    /// device or a pipe is written through.
    #[arg(long, value_name = "FILE.safetensors")]
    output: Option<PathBuf>,
    /// A known model's layer with made-up weights instead of a checkpoint.
    #[arg(long, value_name = "NAME")]
    preset: Option<Preset>,
    /// Experts of the preset, if not the model's own number.
    #[arg(long, value_name = "N", requires = "preset")]
    experts: Option<usize>,
    /// Made-up tokens for the preset (64, unless given).
    #[arg(long, value_name = "M", requires = "preset", conflicts_with = "input")]
    tokens: Option<usize>,
    /// What the preset's weights are made of: e4m3 or bf16 (what the model is published in, unless given).
    #[arg(long, value_name = "FORMAT", requires = "preset", value_parser = parse_weights)]
    weights: Option<WeightFormat>,
    /// Seed of everything made up.
    #[arg(long, value_name = "S", requires = "preset", default_value_t = 1)]
    seed: u64,
    /// What the GEMMs read: e4m3 or bf16 (the weights' own format, unless given).
    #[arg(long, value_name = "FORMAT", value_parser = crate::plan::parse_activations)]
    activations: Option<ActivationFormat>,
    /// Threads (as many as the machine runs at once, unless given).
    #[arg(long, value_name = "T")]
    threads: Option<usize>,
    /// Instruction set: portable, avx2 or avx512-bf16 (the best there is, unless given).
    #[arg(long, value_name = "NAME")]
    isa: Option<String>,
    /// cpu, or cuda:N.
    #[arg(long, value_name = "NAME", default_value = "cpu", value_parser = device::parse)]
    device: DeviceNumber,
    /// Compare with the f64 oracle by row and by expert; the exit code is 1 past the tolerance.
    #[arg(long)]
    check: bool,
    /// Print JSON instead of a table.
    #[arg(long)]
    json: bool,
}

/// The weight format of that name.
pub(crate) fn parse_weights(name: &str) -> std::result::Result<WeightFormat, String> {
    [WeightFormat::E4m3, WeightFormat::Bf16]
        .into_iter()
        .find(|format| format.name() == name)
        .ok_or_else(|| "expected e4m3 or bf16".into())
}

/// The activations asked for, or those that go with the weights; e4m3 ones need e4m3 weights.
pub(crate) fn choose_activations(asked: Option<ActivationFormat>, weights: WeightFormat) -> Result<ActivationFormat> {
    match (asked, weights) {
        (Some(ActivationFormat::E4m3), WeightFormat::Bf16) => {
            Err(Error::usage("--activations is e4m3, expected bf16: the weights are bf16, and e4m3 needs e4m3 weights"))
        }
        (Some(asked), _) => Ok(asked),
        (None, WeightFormat::E4m3) => Ok(ActivationFormat::E4m3),
        (None, WeightFormat::Bf16) => Ok(ActivationFormat::Bf16),
    }
}

/// The tokens of a call, with their experts: the file's, or the router's choice.
struct Tokens<'a> {
    input: &'a LayerInput,
    chosen: Option<Chosen>,
}

/// What the router chose.
struct Chosen {
    topk: usize,
    ids: Vec<i32>,
    weights: Vec<f32>,
    time: StageTime,
}

impl<'a> Tokens<'a> {
    fn new(input: &'a LayerInput, weights: &dyn ExpertWeights) -> Result<Self> {
        let hidden = weights.shape().hidden();
        if input.hidden() != hidden {
            let actual = input.hidden();
            return Err(Error::usage(format!(
                "hidden_states has {actual} columns, expected {hidden}, the hidden size"
            )));
        }
        let chosen = if input.routing().is_none() { Some(Chosen::new(input, weights)?) } else { None };
        Ok(Self { input, chosen })
    }

    fn ids(&self) -> Result<TopkIds<'_>> {
        Ok(match (&self.chosen, self.input.routing()) {
            (None, Some((ids, _))) => ids.view(),
            (Some(chosen), _) => MatrixRef::new(&chosen.ids, self.input.tokens(), chosen.topk)?.into(),
            (None, None) => unreachable!("without ids in the file, the router has chosen"),
        })
    }

    fn weights(&self) -> &[f32] {
        match (&self.chosen, self.input.routing()) {
            (Some(chosen), _) => &chosen.weights,
            (None, given) => given.map_or(&[], |(_, weights)| weights),
        }
    }

    fn write(&self, file: &Path, output: &[bf16]) -> Result<()> {
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
    fn new(input: &LayerInput, weights: &dyn ExpertWeights) -> Result<Self> {
        let (tokens, hidden, experts) = (input.tokens(), input.hidden(), weights.shape().local_experts());
        let x = input.hidden_states().to_f32();
        let route = || {
            let started = Instant::now();
            let chosen = router::route(weights.router(), weights.router_weight(), &x, hidden)?;
            Ok::<_, Error>((chosen, started.elapsed().as_secs_f64()))
        };
        let ((ids, chosen), cold_seconds) = route()?;
        // Once more for the time, as the stages are timed, unless that takes long.
        let seconds = if cold_seconds < 0.5 { route()?.1 } else { cold_seconds };
        let topk = weights.router().topk();
        let bytes = 4 * (tokens * hidden + experts * hidden + 2 * tokens * topk) as u64;
        let cost = StageCost { bytes, flops: 2 * (tokens * experts * hidden) as u64 };
        Ok(Self { topk, ids, weights: chosen, time: StageTime { stage: None, seconds, cost } })
    }
}

/// What running a layer gave, wherever it ran.
struct Outcome {
    place: Place,
    weight_bytes: usize,
    /// Until the layer was ready to run.
    pack_seconds: f64,
    workspace_bytes: usize,
    limits: Limits,
    stages: Vec<StageTime>,
    /// All stages as one.
    total: StageReport,
    output: Vec<bf16>,
    check: Option<check::Report>,
}

/// Where a layer ran.
#[derive(Debug, Serialize)]
#[serde(untagged)]
enum Place {
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
struct Report {
    source: String,
    layer: Option<usize>,
    #[serde(flatten)]
    place: Place,
    tokens: usize,
    hidden: usize,
    intermediate: usize,
    experts: usize,
    topk: usize,
    active_experts: usize,
    weights: &'static str,
    activations: &'static str,
    weight_bytes: usize,
    workspace_bytes: usize,
    pack_seconds: f64,
    limits: Limits,
    stages: Vec<StageReport>,
    total: StageReport,
    check: Option<check::Report>,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let runner = Runner::new(args)?;
    machine::pool(args.threads)?.install(|| match (&args.model, args.preset) {
        (Some(folder), _) => {
            let checkpoint = Checkpoint::open(folder)?;
            prepare_output(args, checkpoint.files())?;
            if let Runner::Cpu(_) = runner {
                memory::require("the layer, at one byte to a weight,", checkpoint.least_layer_bytes())?;
            }
            let layer = checkpoint.layer(args.layer.unwrap_or_default())?;
            signals::name_mapped_files(checkpoint.mapped_files());
            let input = open_input(args)?.ok_or_else(|| Error::usage("--input is missing"))?;
            run_weights(args, &runner, &layer, &input, &folder.display().to_string())
        }
        (None, Some(preset)) => {
            let format = args.weights.unwrap_or_else(|| preset.usual_format());
            choose_activations(args.activations, format)?;
            prepare_output(args, std::iter::empty())?;
            let layer = MadeUp::new(preset, args.experts, format, args.seed, runner.memory_bytes())?;
            let input = match open_input(args)? {
                Some(input) => input,
                None => layer.tokens(args.tokens.unwrap_or(64))?,
            };
            run_weights(args, &runner, &layer, &input, &preset.name())
        }
        (None, None) => Err(Error::usage("--model or --preset is missing")),
    })
}

/// What runs the layer.
enum Runner {
    Cpu(Cpu),
    Gpu(Box<Device>),
}

impl Runner {
    fn new(args: &Args) -> Result<Self> {
        match (args.device, &args.isa) {
            (None, isa) => Ok(Self::Cpu(machine::cpu(isa.as_deref())?)),
            (Some(_), Some(_)) => Err(Error::usage("--isa goes with --device cpu only")),
            (Some(ordinal), None) => Ok(Self::Gpu(Box::new(Device::open(ordinal)?))),
        }
    }

    /// Bytes of memory for weights, as far as the system says.
    fn memory_bytes(&self) -> Option<u64> {
        match self {
            Self::Cpu(_) => memory::available(),
            Self::Gpu(device) => Some(device.info().memory_bytes),
        }
    }
}

/// Checks `--output` against everything that the call reads.
fn prepare_output(args: &Args, files: impl Iterator<Item = PathBuf>) -> Result<()> {
    let inputs: Vec<PathBuf> = files.chain(args.input.clone()).collect();
    output::prepare(&[("--output", args.output.as_deref())], &inputs)
}

fn open_input(args: &Args) -> Result<Option<LayerInput>> {
    args.input.as_deref().map_or(Ok(()), memory::require_file)?;
    Ok(args.input.as_deref().map(LayerInput::open).transpose()?)
}

fn run_weights(
    args: &Args,
    runner: &Runner,
    weights: &dyn ExpertWeights,
    input: &LayerInput,
    source: &str,
) -> Result<()> {
    let activations = choose_activations(args.activations, weights.format())?;
    if let Runner::Cpu(_) = runner {
        let topk = input.routing().map_or_else(|| weights.router().topk(), |(ids, _)| ids.topk());
        let (shape, tokens, check) = (weights.shape(), input.tokens(), args.check);
        LayerMemory { shape, weights: weights.format(), activations, tokens, topk, check }.require()?;
    }
    let tokens = Tokens::new(input, weights)?;
    let routing = Routing::new(tokens.ids()?, weights.shape().local_experts(), None)?;
    let inputs = Inputs { hidden_states: input.hidden_states(), routing, topk_weights: tokens.weights() };
    let outcome = match runner {
        Runner::Cpu(cpu) => {
            let router = tokens.chosen.as_ref().map(|chosen| chosen.time);
            run_on_cpu(cpu, weights, inputs, activations, router, args.check)?
        }
        Runner::Gpu(device) => gpu::run(device, weights, inputs, activations, args.check)?,
    };
    if let Some(file) = &args.output {
        tokens.write(file, &outcome.output)?;
    }
    let report = Report::new(source, args.layer, weights, &routing, activations, outcome);
    if args.json {
        output::print_json(&report)?
    } else {
        output::print(&report.text())?
    }
    match report.check {
        Some(check) if !check.passed => Err(Error::Check(check.text())),
        _ => Ok(()),
    }
}

fn run_on_cpu(
    cpu: &Cpu,
    weights: &dyn ExpertWeights,
    inputs: Inputs<'_>,
    activations: ActivationFormat,
    router: Option<StageTime>,
    check: bool,
) -> Result<Outcome> {
    let packed = Packed::new(cpu, weights, activations)?;
    let limits = Limits::measure(cpu, weights.format(), activations)?;
    let mut call = Call::new(cpu, &packed.layer, inputs)?;
    // About a second of repeats: enough for a median, little enough for a newcomer's patience.
    let mut stages = call.time(|first| (1.0 / first.max(1e-9)).clamp(1.0, 5.0) as usize)?;
    stages.splice(0..0, router);
    let check = if check { Some(check::check(&found(&mut call)?, &inputs, weights, activations)) } else { None };
    Ok(Outcome {
        place: Place::Cpu { isa: cpu.isa().name(), threads: cpu.threads() },
        weight_bytes: packed.bytes,
        pack_seconds: packed.seconds,
        workspace_bytes: call.workspace.len(),
        limits,
        total: whole(&stages, &limits),
        stages,
        output: call.output,
        check,
    })
}

/// Runs the call once more, for its rows of GEMM 2 as well.
fn found<'a>(call: &'a mut Call<'_>) -> Result<Found<'a>> {
    let (mut rows, mut row_of_slot) = (Vec::new(), Vec::new());
    call.run(&mut |done| {
        if let (Stage::Gemm2, Some(found)) = (done.stage, done.rows) {
            rows = found.to_vec();
            row_of_slot = done.layout.inv_perm().to_vec();
        }
    })?;
    Ok(Found { output: &call.output, rows, row_of_slot })
}

/// A layer ready to run, and what getting there took.
pub(crate) struct Packed {
    pub(crate) layer: Layer,
    pub(crate) bytes: usize,
    pub(crate) seconds: f64,
}

impl Packed {
    /// Packs the weights, with a bar on a terminal.
    pub(crate) fn new(cpu: &Cpu, weights: &dyn ExpertWeights, activations: ActivationFormat) -> Result<Self> {
        let progress = Progress::new("packing experts", weights.shape().local_experts());
        let started = Instant::now();
        let (w13, w2) = weights.pack(cpu, &mut |done| progress.set(done))?;
        let (bytes, seconds) = (w13.bytes() + w2.bytes(), started.elapsed().as_secs_f64());
        let layer = Layer::new(w13, w2, LayerOptions { activations, ..LayerOptions::default() })?;
        Ok(Self { layer, bytes, seconds })
    }
}

impl Report {
    fn new(
        source: &str,
        layer: Option<usize>,
        weights: &dyn ExpertWeights,
        routing: &Routing<'_>,
        activations: ActivationFormat,
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
            active_experts: active_experts(routing),
            weights: weights.format().name(),
            activations: activations.name(),
            weight_bytes: outcome.weight_bytes,
            workspace_bytes: outcome.workspace_bytes,
            pack_seconds: outcome.pack_seconds,
            limits,
            stages: outcome.stages.iter().map(|time| StageReport::new(time, &limits)).collect(),
            total: outcome.total,
            check: outcome.check,
        }
    }

    fn text(&self) -> String {
        let mut text = self.source.clone();
        if let Some(layer) = self.layer {
            let _ = write!(text, ", layer {layer}");
        }
        let _ = writeln!(
            text,
            ": H {}, I {}, {} experts, {} tokens, {} experts each",
            self.hidden, self.intermediate, self.experts, self.tokens, self.topk
        );
        let (bytes, seconds) = (format::bytes(self.weight_bytes as u64), format::seconds(self.pack_seconds));
        let (how, place) = match &self.place {
            Place::Cpu { isa, threads } => ("packed", format!("{threads} threads of {isa}")),
            Place::Gpu { device, .. } => ("on the device", device.clone()),
        };
        let _ = writeln!(
            text,
            "{} weights ({bytes}, {how} in {seconds}), {} activations, {place}",
            self.weights, self.activations
        );
        let _ =
            writeln!(text, "{} of {} experts have tokens; {}", self.active_experts, self.experts, self.limits_text());
        if let Place::Gpu { choice, eager_seconds, .. } = &self.place {
            let _ = writeln!(text, "{}\nlaunched from the host: {}", choice.text(), format::seconds(*eager_seconds));
        }
        let rows: Vec<_> = self.stages.iter().chain([&self.total]).map(StageReport::row).collect();
        text.push_str(&format::table(&StageReport::HEADER, 1, &rows));
        if let Some(check) = &self.check {
            let _ = writeln!(text, "{}", check.text());
        }
        text
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

pub(crate) fn active_experts(routing: &Routing<'_>) -> usize {
    let mut active = vec![false; routing.local_experts()];
    for slot in 0..routing.tokens() * routing.topk() {
        if let Some(expert) = routing.local_expert(slot / routing.topk(), slot % routing.topk()) {
            active[expert] = true;
        }
    }
    active.into_iter().filter(|&active| active).count()
}
