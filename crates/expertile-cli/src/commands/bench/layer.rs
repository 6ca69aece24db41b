//! `expertile bench layer`: the whole layer and each of its stages.

mod gpu;

use super::on_cpu::{Report, Size, Subject};
use crate::call::{Call, Inputs};
use crate::commands::options::{ComputeOptions, CopyOptions, FormatOptions, ReportOptions, Runner, SizeOptions};
use crate::error::Result;
use crate::machine::Limits;
use crate::memory::{LayerMemory, WeightPlace};
use crate::packed::Packed;
use crate::parts::Parts;
use crate::preset::MadeUp;
use crate::report::progress::Progress;
use crate::weights::ExpertWeights;
use expertile::cpu::Cpu;
use expertile::{ActivationFormat, LayerConfig, MatrixRef, Routing};

/// Time the whole layer of a known model, and each of its stages.
///
/// Weights and tokens are made up, experts are drawn evenly. On the CPU each size runs once to warm up and then
/// --repeat times; the medians are shown. After each run, in the same process and with the same threads, memory is
/// copied: as many bytes (read and written) as permute, then as unpermute moved.
///
/// On a GPU (a Hopper) times are medians inside a graph of many calls, and of calls launched one by one, beside its
/// copy bandwidth and a large matrix product.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  expertile bench layer --weights e4m3 --tokens 1,8,64,512 --plot bench.svg
  expertile bench layer --device cuda:0 --preset deepseek-v3 --local-experts 32 --tokens 1,64,4096")]
pub(crate) struct Args {
    #[command(flatten)]
    pub(super) sizes: SizeOptions,
    #[command(flatten)]
    formats: FormatOptions,
    #[command(flatten)]
    copy: CopyOptions,
    #[command(flatten)]
    compute: ComputeOptions,
    #[command(flatten)]
    report: ReportOptions,
}

pub(super) fn run(args: &Args) -> Result<()> {
    args.sizes.check(&args.compute, &args.report)?;
    let runner = args.compute.open()?;
    args.compute.pool()?.install(|| match &runner {
        Runner::Cpu(cpu) => {
            let report = measure(args, &runner, cpu)?;
            report.draw(&args.sizes, "Time of a layer")?;
            args.report.tell(&report, Report::text)
        }
        Runner::Gpu(device) => gpu::run(args, &runner, device),
    })
}

/// The made-up weights, the number of experts in all, and what the GEMMs read; fails unless the host holds its part of
/// the layer with the calls of every size.
fn made_up(args: &Args, runner: &Runner) -> Result<(MadeUp, usize, ActivationFormat)> {
    let sizes = &args.sizes;
    let (weights, global_experts) = sizes.layer(args.formats.weights(sizes.preset), runner.memory_bytes())?;
    let activations = args.formats.activations(weights.format(), weights.shape())?;
    let place = match runner {
        Runner::Cpu(_) => WeightPlace::Host,
        Runner::Gpu(_) => WeightPlace::Device,
    };
    let memory = LayerMemory::new(&weights, activations, Parts::ROUTED, place);
    let topk = weights.router().topk;
    sizes.tokens.iter().try_for_each(|&tokens| memory.calling(tokens, topk, false).require())?;
    Ok((weights, global_experts, activations))
}

fn measure(args: &Args, runner: &Runner, cpu: &Cpu) -> Result<Report> {
    let (weights, global_experts, activations) = made_up(args, runner)?;
    let config = LayerConfig::new(weights.router().topk, global_experts, activations);
    args.copy.e4m3_copy(runner, weights.format(), activations)?;
    let packed = Packed::new(cpu, &weights, config, Parts::ROUTED)?;
    let limits = Limits::measure(cpu, weights.format(), activations)?;
    let (tokens, repeat) = (&args.sizes.tokens, args.sizes.repeat());
    let progress = Progress::new("timing sizes", tokens.len());
    let mut sizes = Vec::new();
    for &tokens in tokens {
        sizes.push(measure_size(&packed, &weights, global_experts, &limits, tokens, repeat)?);
        progress.set(sizes.len());
    }
    let subject = Subject {
        cpu,
        preset: args.sizes.preset,
        shape: weights.shape(),
        global_experts,
        formats: [weights.format().name(), activations.name()],
        weight_bytes: Some(packed.bytes),
    };
    Ok(Report::new(&subject, repeat, limits, sizes))
}

fn measure_size(
    packed: &Packed,
    weights: &MadeUp,
    global_experts: usize,
    limits: &Limits,
    tokens: usize,
    repeat: usize,
) -> Result<Size> {
    let input = weights.tokens(tokens)?;
    let local_experts = weights.shape().local_experts();
    let (ids, topk_weights) = weights.uniform_routing(tokens, global_experts)?;
    let map = first_experts(local_experts, global_experts);
    let ids = MatrixRef::new(&ids, tokens, weights.router().topk)?;
    let routing = Routing::new(ids, local_experts, map.as_deref())?;
    let inputs = Inputs { hidden_states: input.hidden_states(), routing, topk_weights: &topk_weights };
    let mut call = Call::new(&packed.layer, inputs)?;
    Size::measure(&routing, limits, repeat, || call.time_once())
}

/// The expert map of a device that has the first of all experts; none where it has all of them.
pub(super) fn first_experts(local: usize, global: usize) -> Option<Vec<i32>> {
    let id = |id: usize| if id < local { id as i32 } else { -1 };
    (local < global).then(|| (0..global).map(id).collect())
}
