//! `expertile layer`: one MoE layer, run, timed and checked.

mod cpu;
mod gpu;
mod parts;
mod report;
mod tokens;

pub(crate) use self::cpu::Packed;
pub(crate) use self::parts::Parts;

use self::report::{Computed, Report};
use self::tokens::Tokens;
use crate::device::{self, DeviceNumber};
use crate::error::{Error, Result};
use crate::memory::{self, LayerMemory, WeightPlace};
use crate::preset::{MadeUp, Preset};
use crate::router::RouterPrecision;
use crate::stages::Inputs;
use crate::weights::ExpertWeights;
use crate::{machine, output, signals};
use expertile::cpu::Cpu;
use expertile::cuda::Device;
use expertile::gemm::WEIGHT_BLOCK;
use expertile::{ActivationFormat, LayerShape, Routing, WeightFormat};
use expertile_checkpoint::{Checkpoint, LayerInput};
use std::path::PathBuf;

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
    /// What the output holds: routed, shared, or routed,shared (all that the block has, unless given).
    #[arg(long, value_name = "PARTS")]
    parts: Option<Parts>,
    /// What the router computes in: f32, or bf16 as Transformers does for most models in bf16; near ties fall differently.
    #[arg(long, value_name = "FORMAT", default_value = "f32")]
    router: RouterPrecision,
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

/// The activations asked for, or those that go with the weights: e4m3 ones need e4m3 weights, and sizes that groups of 128
/// divide.
pub(crate) fn choose_activations(
    asked: Option<ActivationFormat>,
    weights: WeightFormat,
    shape: LayerShape,
) -> Result<ActivationFormat> {
    let sizes = [("hidden", shape.hidden()), ("intermediate", shape.intermediate())];
    let unfilled = sizes.into_iter().find(|(_, extent)| !extent.is_multiple_of(WEIGHT_BLOCK));
    match (asked, weights, unfilled) {
        (Some(ActivationFormat::E4m3), WeightFormat::Bf16, _) => {
            Err(Error::usage("--activations is e4m3, expected bf16: the weights are bf16, and e4m3 needs e4m3 weights"))
        }
        (Some(ActivationFormat::E4m3), _, Some((name, extent))) => Err(Error::usage(format!(
            "{name} is {extent}, expected a multiple of {WEIGHT_BLOCK} for e4m3 activations: give --activations bf16"
        ))),
        (Some(asked), _, _) => Ok(asked),
        (None, WeightFormat::E4m3, None) => Ok(ActivationFormat::E4m3),
        (None, _, _) => Ok(ActivationFormat::Bf16),
    }
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let runner = Runner::new(args)?;
    machine::pool(args.threads)?.install(|| match (&args.model, args.preset) {
        (Some(folder), _) => {
            let checkpoint = Checkpoint::open(folder)?;
            prepare_output(args, checkpoint.files())?;
            if let Runner::Cpu(_) = runner {
                memory::require(
                    "the layer, at one byte to a weight,",
                    checkpoint.least_layer_bytes(args.layer.unwrap_or_default()),
                )?;
            }
            let layer = checkpoint.layer(args.layer.unwrap_or_default())?;
            signals::name_mapped_files(checkpoint.mapped_files());
            let input = open_input(args)?.ok_or_else(|| Error::usage("--input is missing"))?;
            run_weights(args, &runner, &layer, &input, &folder.display().to_string())
        }
        (None, Some(preset)) => {
            let format = args.weights.unwrap_or_else(|| preset.usual_format());
            choose_activations(args.activations, format, preset.shape()?)?;
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
    let activations = choose_activations(args.activations, weights.format(), weights.shape())?;
    let parts = Parts::choose(args.parts, weights)?;
    let place = match runner {
        Runner::Cpu(_) => WeightPlace::Host,
        Runner::Gpu(_) => WeightPlace::Device,
    };
    let topk = input.routing().map_or(weights.router().topk, |(ids, _)| ids.topk());
    LayerMemory::new(weights, activations, parts, place).calling(input.tokens(), topk, args.check).require()?;
    let router = input.routing().is_none().then_some(args.router);
    let computed = Computed { activations, parts, router };
    let tokens = Tokens::new(input, weights, args.router, parts)?;
    let routing = Routing::new(tokens.live_ids()?, weights.shape().local_experts(), None)?;
    let inputs = Inputs { hidden_states: input.hidden_states(), routing, topk_weights: tokens.weights() };
    let outcome = match runner {
        Runner::Cpu(cpu) => cpu::run(cpu, weights, inputs, computed, tokens.router_time(), args.check)?,
        Runner::Gpu(device) => gpu::run(device, weights, inputs, computed, args.check)?,
    };
    if let Some(file) = &args.output {
        tokens.write(file, &outcome.output)?;
    }
    let report = Report::new(source, args.layer, weights, &routing, computed, outcome);
    if args.json {
        output::print_json(&report)?
    } else {
        output::print(&report.text())?
    }
    match &report.check {
        Some(check) if !check.passed => Err(Error::Check(check.text())),
        _ => Ok(()),
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
