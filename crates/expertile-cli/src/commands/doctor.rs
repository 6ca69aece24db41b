//! `expertile doctor`: what this machine offers.

use super::options::ReportOptions;
use crate::error::Result;
use crate::machine::{self, Bandwidth};
use crate::report::format;
use crate::{device, memory, output};
use expertile::cpu::{Cpu, Isa};
use expertile::cuda::Device;
use expertile::cuda::measure::copy_bytes_per_second;
use expertile::{ActivationFormat, WeightFormat};
use serde::Serialize;

/// Say what this machine offers: instruction sets, threads, memory bandwidth, GPU or the reason why none.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  expertile doctor
  expertile doctor --json doctor.json")]
pub(crate) struct Args {
    #[command(flatten)]
    report: ReportOptions,
}

#[derive(Debug, Serialize)]
struct Report {
    processor: Option<String>,
    isa_available: Vec<&'static str>,
    isa_chosen: &'static str,
    threads: usize,
    memory_total_bytes: Option<u64>,
    memory_available_bytes: Option<u64>,
    /// What leaves no more than that.
    memory_limit: Option<&'static str>,
    #[serde(flatten)]
    bandwidth: Bandwidth,
    gemm_flops_per_second: Vec<Rate>,
    gpu: Option<Gpu>,
    /// Why there is no GPU to use.
    gpu_reason: Option<String>,
}

#[derive(Debug, Serialize)]
struct Gpu {
    name: String,
    compute_capability: String,
    multiprocessors: u32,
    memory_bytes: u64,
    driver_version: i32,
    copy_bytes_per_second: f64,
}

#[derive(Debug, Serialize)]
struct Rate {
    weights: &'static str,
    activations: &'static str,
    flops_per_second: f64,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    output::prepare(&[("--json", args.report.file())], &[])?;
    let report = machine::pool(None)?.install(Report::new)?;
    args.report.tell(&report, Report::text)
}

impl Gpu {
    /// The first device, its kernels' compiler found and its copy bandwidth measured.
    fn measure() -> expertile::Result<Self> {
        let device = Device::open(0)?;
        let info = device.info();
        Ok(Self {
            name: info.name.clone(),
            compute_capability: device::capability(info),
            multiprocessors: info.multiprocessors,
            memory_bytes: info.memory_bytes,
            driver_version: info.driver_version,
            copy_bytes_per_second: copy_bytes_per_second(&device)?,
        })
    }

    fn text(&self) -> String {
        format!(
            "{}, compute capability {}, {} multiprocessors, {}, driver for CUDA {}; copies {}",
            self.name,
            self.compute_capability,
            self.multiprocessors,
            format::bytes(self.memory_bytes),
            self.driver_version,
            format::bytes_per_second(self.copy_bytes_per_second)
        )
    }
}

impl Report {
    fn new() -> Result<Self> {
        let cpu = Cpu::new();
        let formats = [
            (WeightFormat::Bf16, ActivationFormat::Bf16),
            (WeightFormat::E4m3, ActivationFormat::E4m3),
            (WeightFormat::E4m3, ActivationFormat::Bf16),
            (WeightFormat::Mxfp4, ActivationFormat::Bf16),
            (WeightFormat::Int4, ActivationFormat::Bf16),
        ];
        let mut rates = Vec::new();
        for (weights, activations) in formats {
            rates.push(Rate {
                weights: weights.name(),
                activations: activations.name(),
                flops_per_second: machine::gemm_flops_per_second(&cpu, weights, activations)?,
            });
        }
        let (gpu, gpu_reason) = match Gpu::measure() {
            Ok(gpu) => (Some(gpu), None),
            Err(reason) => (None, Some(reason.to_string())),
        };
        let budget = memory::budget();
        Ok(Self {
            processor: machine::processor(),
            isa_available: Isa::available().into_iter().map(Isa::name).collect(),
            isa_chosen: cpu.isa().name(),
            threads: cpu.threads(),
            memory_total_bytes: memory::total(),
            memory_available_bytes: budget.map(|budget| budget.bytes),
            memory_limit: budget.map(|budget| budget.limit),
            bandwidth: Bandwidth::measure()?,
            gemm_flops_per_second: rates,
            gpu,
            gpu_reason,
        })
    }

    fn text(&self) -> String {
        let unknown = || "unknown".to_owned();
        let memory = |bytes: Option<u64>| bytes.map_or_else(unknown, format::bytes);
        let mut lines = vec![
            ("processor", self.processor.clone().unwrap_or_else(unknown)),
            ("instruction sets", format!("{} (chosen: {})", self.isa_available.join(", "), self.isa_chosen)),
            ("threads", self.threads.to_string()),
            (
                "memory",
                format!("{}, {} available", memory(self.memory_total_bytes), memory(self.memory_available_bytes)),
            ),
            ("memory read", format::bytes_per_second(self.bandwidth.read_bytes_per_second)),
            (
                "memory copy",
                format!("{} (read + written)", format::bytes_per_second(self.bandwidth.copy_bytes_per_second)),
            ),
        ];
        for rate in &self.gemm_flops_per_second {
            let formats = format!("{} weights, {} activations, in cache", rate.weights, rate.activations);
            lines.push(("gemm", format!("{} ({formats})", format::flops_per_second(rate.flops_per_second))));
        }
        let gpu = match (&self.gpu, &self.gpu_reason) {
            (Some(gpu), _) => gpu.text(),
            (None, reason) => format!("none: {}", reason.as_deref().unwrap_or("unknown")),
        };
        lines.push(("gpu", gpu));
        lines.into_iter().map(|(name, value)| format!("{name:<18}{value}\n")).collect()
    }
}
