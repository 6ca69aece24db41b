//! `expertile bench exchange`: what an exchange takes beside the layer of a rank's own experts.

mod gpu;

use crate::commands::options::{FormatOptions, MadeUpOptions, ReportOptions};
use crate::error::{Error, Result};
use crate::parts::Parts;
use crate::preset::{MadeUp, Preset};
use crate::ranks::{Group, ParallelCall, ParallelLayer, PlacementOptions, RankStage, RankTimes};
use crate::report::format;
use crate::weights::ExpertWeights;
use crate::{machine, output};
use expertile::cpu::Cpu;
use expertile::expert_parallel::Traffic;
use expertile::{LayerConfig, MatrixRef};
use serde::Serialize;
use std::fmt::Write;

/// Time the exchange of an expert-parallel layer beside the layer of each rank's own experts: over MPI, or between GPUs.
///
/// On CPUs, to be started by mpiexec; with --device cuda it starts a process for each of --ranks GPUs itself. Weights and
/// tokens are made up, experts are drawn evenly. Each size runs once to warm up and then --repeat times; medians are
/// shown. "alone" is the exchange of the same bytes, dispatch and then combine, without anything else: what the stages
/// take beyond it is packing, and waiting for the slowest rank.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  expertile bench exchange --preset qwen3-30b-a3b --tokens 1,8,64,512
  expertile bench exchange --device cuda --ranks 2 --preset deepseek-v3 --tokens 1,64,4096\n
On CPUs, start it with mpiexec -n 4, say.")]
pub(crate) struct Args {
    /// Numbers of tokens of each rank, separated by commas.
    #[arg(long, value_name = "M,M,...", value_delimiter = ',', default_value = "1,8,64,512")]
    tokens: Vec<usize>,
    /// The model whose layer is timed.
    #[arg(long, value_name = "NAME", default_value = "qwen3-30b-a3b")]
    preset: Preset,
    #[command(flatten)]
    made_up: MadeUpOptions,
    /// Timed runs of each size.
    #[arg(long, value_name = "N", default_value_t = 5)]
    repeat: usize,
    #[command(flatten)]
    formats: FormatOptions,
    #[command(flatten)]
    placement: PlacementOptions,
    /// Threads of each rank [default: its part of the machine's processors].
    #[arg(long, value_name = "T")]
    threads: Option<usize>,
    /// Instruction set: portable, avx2, avx512-bf16 or amx-bf16 [default: the best there is].
    #[arg(long, value_name = "NAME")]
    isa: Option<String>,
    #[command(flatten)]
    gpus: gpu::Options,
    #[command(flatten)]
    report: ReportOptions,
}

#[derive(Debug, Serialize)]
struct Size {
    tokens_per_rank: usize,
    stages: Vec<RankStage>,
    /// Of the slowest rank.
    total_seconds: f64,
    dispatch_alone_seconds: f64,
    combine_alone_seconds: f64,
}

#[derive(Debug, Serialize)]
struct Report {
    source: String,
    ranks: usize,
    mpi: String,
    isa: &'static str,
    threads: usize,
    placement: String,
    choice: String,
    weights: &'static str,
    activations: &'static str,
    repeat: usize,
    sizes: Vec<Size>,
}

pub(super) fn run(args: &Args) -> Result<()> {
    if args.repeat == 0 || args.tokens.is_empty() {
        return Err(Error::usage("--repeat is 0, expected at least 1"));
    }
    output::prepare(&[("--json", args.report.file())], args.placement.inputs().as_slice())?;
    if args.gpus.is_asked() {
        return gpu::run(args);
    }
    args.gpus.require_none()?;
    let group = args.placement.join()?;
    run_ranks(args, &group).map_err(|error| group.leave(error))
}

fn run_ranks(args: &Args, group: &Group) -> Result<()> {
    let cpu = machine::cpu(args.isa.as_deref())?;
    machine::pool(group.threads(args.threads))?.install(|| {
        let report = measure(args, group, &cpu)?;
        if group.is_first() { args.report.tell(&report, Report::text) } else { Ok(()) }
    })
}

fn measure(args: &Args, group: &Group, cpu: &Cpu) -> Result<Report> {
    // All ranks must make up the same experts, however much memory each of them has left.
    let weights =
        MadeUp::new(args.preset, args.made_up.experts, args.formats.weights(args.preset), args.made_up.seed, None)?;
    let activations = args.formats.activations(weights.format(), weights.shape())?;
    let (topk, experts) = (weights.router().topk, weights.shape().local_experts());
    let config = LayerConfig::new(topk, experts, activations);
    let capacity = args.tokens.iter().copied().max().unwrap_or(1).max(1);
    let packed = ParallelLayer::new(cpu, group, &args.placement, &weights, config, Parts::ROUTED, capacity)?;
    let sizes = args.tokens.iter().map(|&tokens| measure_size(args, group, &packed, &weights, tokens));
    let sizes = sizes.collect::<Result<_>>()?;
    Ok(Report {
        source: args.preset.name(),
        ranks: group.ranks(),
        mpi: group.library().to_owned(),
        isa: cpu.isa().name(),
        threads: cpu.threads(),
        placement: packed.layer.parallel().placement.to_string(),
        choice: packed.layer.choice(capacity)?.parallel.to_string(),
        weights: weights.format().name(),
        activations: activations.name(),
        repeat: args.repeat,
        sizes,
    })
}

fn measure_size(args: &Args, group: &Group, packed: &ParallelLayer, weights: &MadeUp, tokens: usize) -> Result<Size> {
    let (rank, ranks, layer) = (group.rank(), group.ranks(), &packed.layer);
    let (topk, experts) = (layer.config().topk, weights.shape().local_experts());
    let all = tokens.checked_mul(ranks).ok_or_else(|| Error::usage(format!("--tokens is {tokens}, expected fewer")))?;
    let (ids, topk_weights) = weights.uniform_routing(all, experts)?;
    let input = weights.tokens(all)?;
    let (mine, slots) = (rank * tokens..(rank + 1) * tokens, rank * tokens * topk..(rank + 1) * tokens * topk);
    let own = (&ids[slots.clone()], &topk_weights[slots]);
    let mut call = ParallelCall::new(layer, input.hidden_states(), mine, own.0, own.1)?;
    let RankTimes { stages, total_seconds } = call.time(group, |_| args.repeat)?;
    let traffic = Traffic::count(MatrixRef::new(&ids, all, topk)?, &vec![tokens; ranks], &layer.parallel().placement)?;
    let choice = layer.choice(tokens)?.parallel;
    let bytes = |rows: &dyn Fn(usize) -> usize, row: usize| -> Vec<usize> {
        (0..ranks).map(|other| if other == rank { 0 } else { rows(other) * row }).collect()
    };
    let (dispatch, combine, row) = (choice.dispatch, choice.combine, choice.token_row.bytes());
    let out = bytes(&|to| traffic.dispatched(dispatch, rank, to), row);
    let back = bytes(&|from| traffic.dispatched(dispatch, from, rank), row);
    let dispatch_alone_seconds = group.exchange_seconds(&out, &back, args.repeat)?;
    let out = bytes(&|to| traffic.combined(combine, dispatch, rank, to), choice.combine_row_bytes);
    let back = bytes(&|from| traffic.combined(combine, dispatch, from, rank), choice.combine_row_bytes);
    let combine_alone_seconds = group.exchange_seconds(&out, &back, args.repeat)?;
    Ok(Size { tokens_per_rank: tokens, stages, total_seconds, dispatch_alone_seconds, combine_alone_seconds })
}

impl Report {
    fn text(&self) -> String {
        let mut text = format!(
            "{}: {}; {} weights, {} activations\n{}, {} threads of {} a rank; medians of {} runs\n{}\n",
            self.source,
            self.placement,
            self.weights,
            self.activations,
            self.mpi,
            self.threads,
            self.isa,
            self.repeat,
            self.choice
        );
        let mut rows = Vec::new();
        for size in &self.sizes {
            let alone = |stage: &str| match stage {
                "dispatch" => format::seconds(size.dispatch_alone_seconds),
                "combine" => format::seconds(size.combine_alone_seconds),
                _ => "-".into(),
            };
            for stage in &size.stages {
                let mut row = stage.row();
                row.insert(3, alone(stage.stage));
                row.insert(0, size.tokens_per_rank.to_string());
                rows.push(row);
            }
            let mut total = vec!["-".to_owned(); RankStage::HEADER.len() + 2];
            (total[0], total[1]) = (size.tokens_per_rank.to_string(), "total".into());
            total[3] = format::seconds(size.total_seconds);
            rows.push(total);
        }
        let [stage, mean, slowest, sent, received] = RankStage::HEADER;
        let header = ["tokens", stage, mean, slowest, "alone", sent, received];
        text.push_str(&format::table(&header, 2, &rows));
        let _ = writeln!(text, "meeting, dispatch and combine hold the time for which a rank waits for others");
        text
    }
}
