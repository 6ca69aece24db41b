//! `expertile layer`: one MoE layer, run, timed and checked.

mod cpu;
mod gpu;
mod ranks;
mod report;
mod tokens;

use self::report::{Computed, Report};
use self::tokens::Tokens;
use super::options::{ComputeOptions, CopyOptions, FormatOptions, MadeUpOptions, ReportOptions, Runner};
use crate::call::Inputs;
use crate::error::{Error, Result};
use crate::memory::{self, LayerMemory, WeightPlace};
use crate::parts::Parts;
use crate::preset::{MadeUp, Preset};
use crate::ranks::{ExchangeName, Group, PlacementOptions, Share};
use crate::router::RouterPrecision;
use crate::weights::ExpertWeights;
use crate::{machine, output, signals};
use expertile::Routing;
use expertile_checkpoint::{Checkpoint, LayerInput};
use std::path::PathBuf;

/// Run one MoE layer of a checkpoint, or of a known model with made-up weights.
///
/// Every stage is timed after one run to warm up: the median of up to five runs, fewer where they take long. The limit
/// of a stage is the memory it must move at the bandwidth measured at the start, or its operations at the rate of the
/// GEMM in cache, whichever takes longer; a share above 100 % means that caches hold what memory would have to bring.
///
/// On a GPU (a Hopper) a stage's time is that inside a graph, the bandwidth is that of a copy, and the rate that of a
/// large matrix product, all measured at the start. The router still runs on the CPU, and is not in the table.
///
/// With --exchange mpi, started by mpiexec, the ranks share the experts: each loads its own, and runs its part of the
/// tokens. Rank 0 checks, writes and prints; the output has the bits of one rank.
#[derive(Debug, clap::Args)]
#[command(allow_negative_numbers = true)]
#[command(group(clap::ArgGroup::new("source").required(true).args(["model", "preset"])))]
#[command(override_usage = "\
    expertile layer --model <DIR> --layer <N> --input <FILE.safetensors> [OPTIONS]\n       \
    expertile layer --preset <NAME> [OPTIONS]")]
#[command(after_help = "\
Examples:
  expertile layer --preset qwen3-30b-a3b --tokens 64 --check
  expertile layer --model DIR --layer 3 --input in.safetensors --output out.safetensors --check")]
#[command(mut_args(not_of_a_checkpoint))]
pub(crate) struct Args {
    /// Folder of a Hugging Face checkpoint: config.json with model.safetensors, or an index with shards.
    #[arg(long, value_name = "DIR", requires_all = ["layer", "input"])]
    model: Option<PathBuf>,
    /// Number of the layer in the checkpoint, from 0.
    #[arg(long, value_name = "N", conflicts_with = "preset")]
    layer: Option<usize>,
    /// Safetensors file with hidden_states [M, H] (bf16, f16 or f32), and perhaps topk_ids [M, topk] (i32 or i64) with
    /// topk_weights (f32); without them the router decides, or input_ids [M] (i32 or i64) where the tokens' numbers do.
    #[arg(long, value_name = "FILE.safetensors")]
    input: Option<PathBuf>,
    /// Where to write output [M, H] (bf16), topk_ids (i32) and topk_weights (f32). A file is replaced whole or not at
    /// all; a device or a pipe is written through.
    #[arg(long, value_name = "FILE.safetensors")]
    output: Option<PathBuf>,
    /// A known model's layer with made-up weights instead of a checkpoint.
    #[arg(long, value_name = "NAME")]
    preset: Option<Preset>,
    /// Made-up tokens for the preset [default: 64].
    #[arg(long, value_name = "M", conflicts_with = "input")]
    tokens: Option<usize>,
    #[command(flatten)]
    made_up: MadeUpOptions,
    #[command(flatten)]
    formats: FormatOptions,
    #[command(flatten)]
    copy: CopyOptions,
    /// What the output holds: routed, shared, or routed,shared [default: all that the block has].
    #[arg(long, value_name = "PARTS")]
    parts: Option<Parts>,
    /// What the router computes in: f32, or bf16 as Transformers does for most models in bf16; near ties fall
    /// differently.
    #[arg(long, value_name = "FORMAT", default_value = "f32")]
    router: RouterPrecision,
    /// Compare with the f64 oracle by row and by expert; the exit code is 1 past the tolerance.
    #[arg(long)]
    check: bool,
    #[command(flatten)]
    compute: ComputeOptions,
    /// Share the experts among the ranks that mpiexec has started.
    #[arg(long, value_name = "NAME")]
    exchange: Option<ExchangeName>,
    #[command(flatten, next_help_heading = "Expert parallelism")]
    placement: PlacementOptions,
    #[command(flatten, next_help_heading = "Output")]
    report: ReportOptions,
}

/// Options about what is made up do not go with a checkpoint.
fn not_of_a_checkpoint(option: clap::Arg) -> clap::Arg {
    let is_made_up = ["tokens", "experts", "seed", "weights"].contains(&option.get_id().as_str());
    if is_made_up { option.conflicts_with("model") } else { option }
}

pub(crate) fn run(args: &Args) -> Result<()> {
    match (args.exchange, args.compute.device, args.placement.given()) {
        (None, _, Some(option)) => Err(Error::usage(format!("{option} goes with --exchange only"))),
        (None, _, None) => run_on(args, None),
        (Some(_), Some(_), _) => Err(Error::usage("--exchange mpi goes with --device cpu only")),
        (Some(ExchangeName::Mpi), None, _) => {
            let group = args.placement.join()?;
            run_on(args, Some(&group)).map_err(|error| group.leave(error))
        }
    }
}

fn run_on(args: &Args, group: Option<&Group>) -> Result<()> {
    let runner = args.compute.open()?;
    let pool = match group {
        Some(group) => machine::pool(group.threads(args.compute.threads))?,
        None => args.compute.pool()?,
    };
    pool.install(|| match (&args.model, args.preset) {
        (Some(folder), _) => {
            let checkpoint = Checkpoint::open(folder)?;
            prepare_output(args, group, checkpoint.files())?;
            if let (Runner::Cpu(_), None) = (&runner, group) {
                memory::require(
                    "the layer at the least",
                    checkpoint.least_layer_bytes(args.layer.unwrap_or_default()),
                )?;
            }
            let layer = checkpoint.layer(args.layer.unwrap_or_default())?;
            signals::name_mapped_files(checkpoint.mapped_files());
            let input = open_input(args)?.ok_or_else(|| Error::usage("--input is missing"))?;
            run_weights(args, &runner, group, &layer, &input, &folder.display().to_string())
        }
        (None, Some(preset)) => {
            let format = args.formats.weights(preset);
            args.formats.activations(format, preset.shape()?)?;
            prepare_output(args, group, std::iter::empty())?;
            // Ranks must make up the same experts, however much memory each has left.
            let available = if group.is_some() { None } else { runner.memory_bytes() };
            let layer = MadeUp::new(preset, args.made_up.experts, format, args.made_up.seed, available)?;
            let input = match open_input(args)? {
                Some(input) => input,
                None => layer.tokens(args.tokens.unwrap_or(64))?,
            };
            run_weights(args, &runner, group, &layer, &input, &preset.name())
        }
        (None, None) => Err(Error::usage("--model or --preset is missing")),
    })
}

/// Checks the targets against everything that the call reads. Of several ranks, the first one writes.
fn prepare_output(args: &Args, group: Option<&Group>, files: impl Iterator<Item = PathBuf>) -> Result<()> {
    if group.is_some_and(|group| !group.is_first()) {
        return Ok(());
    }
    let inputs: Vec<PathBuf> = files.chain(args.input.clone()).chain(args.placement.inputs()).collect();
    output::prepare(&[("--output", args.output.as_deref()), ("--json", args.report.file())], &inputs)
}

fn open_input(args: &Args) -> Result<Option<LayerInput>> {
    args.input.as_deref().map_or(Ok(()), memory::require_file)?;
    Ok(args.input.as_deref().map(LayerInput::open).transpose()?)
}

fn run_weights(
    args: &Args,
    runner: &Runner,
    group: Option<&Group>,
    weights: &dyn ExpertWeights,
    input: &LayerInput,
    source: &str,
) -> Result<()> {
    let activations = args.formats.activations(weights.format(), weights.shape())?;
    let e4m3_copy = args.copy.e4m3_copy(runner, weights.format(), activations)?;
    let parts = Parts::choose(args.parts, weights)?;
    let place = match runner {
        Runner::Cpu(_) => WeightPlace::Host,
        Runner::Gpu(_) => WeightPlace::Device,
    };
    let topk = input.routing().map_or(weights.router().topk, |(ids, _)| ids.topk());
    match group {
        None => LayerMemory::new(weights, activations, parts, place),
        // Of the weights, what an even placement leaves this rank; of the tokens, all that could come here.
        Some(group) => {
            let experts: Vec<usize> = group.share_of(weights.shape().local_experts()).collect();
            let experts = if experts.is_empty() { vec![0] } else { experts };
            LayerMemory::new(&Share::new(weights, &experts)?, activations, parts, place)
        }
    }
    .calling(input.tokens(), topk, args.check && group.is_none_or(Group::is_first))
    .require()?;
    let router = input.routing().is_none().then_some(args.router);
    let computed = Computed { activations, parts, router };
    let tokens = Tokens::new(input, weights, args.router, parts)?;
    let routing = Routing::new(tokens.live_ids()?, weights.shape().local_experts(), None)?;
    let inputs = Inputs { hidden_states: input.hidden_states(), routing, topk_weights: tokens.weights() };
    if let (Some(group), Runner::Cpu(cpu)) = (group, runner) {
        let (options, layer, check) = (&args.placement, args.layer, args.check);
        let job = ranks::Job { source, layer, options, computed, check };
        return match ranks::run(cpu, group, weights, inputs, &job)? {
            None => Ok(()),
            Some(outcome) => tell_of_ranks(args, &tokens, &outcome),
        };
    }
    let outcome = match runner {
        Runner::Cpu(cpu) => cpu::run(cpu, weights, inputs, computed, tokens.router_time(), args.check)?,
        Runner::Gpu(device) => gpu::run(device, weights, inputs, computed, e4m3_copy, args.check)?,
    };
    if let Some(file) = &args.output {
        tokens.write(file, &outcome.output)?;
    }
    let report = Report::new(source, args.layer, weights, &routing, computed, outcome);
    args.report.tell(&report, Report::text)?;
    match &report.check {
        Some(check) if !check.passed => Err(Error::Check(check.text())),
        _ => Ok(()),
    }
}

/// What the first of several ranks writes and prints.
fn tell_of_ranks(args: &Args, tokens: &Tokens<'_>, outcome: &ranks::Outcome) -> Result<()> {
    if let Some(file) = &args.output {
        tokens.write(file, &outcome.output)?;
    }
    args.report.tell(&outcome.report, ranks::Report::text)?;
    match &outcome.report.check {
        Some(check) if !check.passed => Err(Error::Check(check.text())),
        _ => Ok(()),
    }
}
