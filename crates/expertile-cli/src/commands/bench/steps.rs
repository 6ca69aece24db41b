//! `expertile bench steps`: the steps around the GEMMs, each by itself.

mod cpu;
mod gpu;

use super::on_cpu::Report;
use crate::commands::options::{ComputeOptions, ReportOptions, Runner, SizeOptions};
use crate::error::Result;

/// Time the steps around the GEMMs: routing, quantize + permute, activation + quantize, unpermute.
///
/// Rows are quantized to e4m3, experts are drawn evenly; no weights are needed, so any size runs that the rows fit in.
/// On the CPU each size runs once to warm up and then --repeat times, with copies of the same bytes in between; the
/// medians are shown. On a GPU (any that the library supports) times are medians inside a graph of many calls, and of
/// calls launched one by one, beside its copy bandwidth.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  expertile bench steps --tokens 64,1024
  expertile bench steps --device cuda:0 --preset deepseek-v3 --local-experts 32 --plot steps.svg")]
pub(crate) struct Args {
    #[command(flatten)]
    sizes: SizeOptions,
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
            let report = cpu::measure(&args.sizes, cpu)?;
            report.draw(&args.sizes, PICTURE)?;
            args.report.tell(&report, Report::text)
        }
        Runner::Gpu(device) => gpu::run(args, device),
    })
}

/// What the picture is called.
const PICTURE: &str = "Time of the steps around the GEMMs";
