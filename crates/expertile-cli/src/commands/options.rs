//! Options that several commands have, each defined once.

use crate::device::{self, DeviceNumber};
use crate::error::{Error, Result};
use crate::preset::{MadeUp, Preset};
use crate::weights::ExpertWeights;
use crate::{machine, memory, output};
use expertile::cpu::Cpu;
use expertile::cuda::Device;
use expertile::{ActivationFormat, Group, LayerShape, WeightFormat};
use serde::Serialize;
use std::path::{Path, PathBuf};

/// What computes.
#[derive(Debug, clap::Args)]
pub(crate) struct ComputeOptions {
    /// Device: cpu, or cuda:N.
    #[arg(long, value_name = "NAME", default_value = "cpu", value_parser = device::parse)]
    pub(crate) device: DeviceNumber,
    /// Threads on the CPU [default: as many as the machine runs at once].
    #[arg(long, value_name = "T")]
    pub(crate) threads: Option<usize>,
    /// Instruction set of the CPU: portable, avx2, avx512-bf16 or amx-bf16 [default: the best there is].
    #[arg(long, value_name = "NAME")]
    isa: Option<String>,
}

/// A backend that was found.
pub(crate) enum Runner {
    Cpu(Cpu),
    Gpu(Box<Device>),
}

impl ComputeOptions {
    pub(crate) fn open(&self) -> Result<Runner> {
        match (self.device, &self.isa) {
            (None, isa) => Ok(Runner::Cpu(machine::cpu(isa.as_deref())?)),
            (Some(_), Some(_)) => Err(Error::usage("--isa goes with --device cpu only")),
            (Some(ordinal), None) => Ok(Runner::Gpu(Box::new(Device::open(ordinal)?))),
        }
    }

    /// The pool that the command runs in.
    pub(crate) fn pool(&self) -> Result<rayon::ThreadPool> {
        machine::pool(self.threads)
    }
}

impl Runner {
    /// Bytes of memory for weights, as far as the system says.
    pub(crate) fn memory_bytes(&self) -> Option<u64> {
        match self {
            Self::Cpu(_) => memory::available(),
            Self::Gpu(device) => Some(device.info().memory_bytes),
        }
    }
}

/// What is made up where there is no checkpoint.
#[derive(Debug, clap::Args)]
pub(crate) struct MadeUpOptions {
    /// Experts of the preset's layer [default: the model's own number].
    #[arg(long, value_name = "N")]
    pub(crate) experts: Option<usize>,
    /// Seed of everything made up.
    #[arg(long, value_name = "S", default_value_t = 1)]
    pub(crate) seed: u64,
}

/// What the GEMMs multiply.
#[derive(Debug, clap::Args)]
pub(crate) struct FormatOptions {
    /// What the preset's weights are made of: e4m3, bf16, mxfp4 or int4 [default: what the model is published in].
    #[arg(long, value_name = "FORMAT")]
    pub(crate) weights: Option<WeightFormat>,
    /// What the GEMMs read: e4m3 or bf16 [default: the weights' own format, bf16 for mxfp4 and
    /// int4].
    #[arg(long, value_name = "FORMAT")]
    pub(crate) activations: Option<ActivationFormat>,
}

impl FormatOptions {
    /// The weights asked for, or those that the model is published in.
    pub(crate) fn weights(&self, preset: Preset) -> WeightFormat {
        self.weights.unwrap_or_else(|| preset.usual_format())
    }

    /// The activations asked for, or those that go with the weights: e4m3 ones need weights of another format than
    /// bf16, and sizes
    /// that 64 divides.
    pub(crate) fn activations(&self, weights: WeightFormat, shape: LayerShape) -> Result<ActivationFormat> {
        let sizes = [("hidden", shape.hidden()), ("intermediate", shape.intermediate())];
        let unfilled = sizes.into_iter().find(|(_, extent)| !extent.is_multiple_of(Group::G128.smallest()));
        match (self.activations, weights, unfilled) {
            (Some(ActivationFormat::E4m3), WeightFormat::Bf16, _) => Err(Error::usage(
                "--activations is e4m3, expected bf16: the weights are bf16, and e4m3 needs e4m3, mxfp4 or int4 weights",
            )),
            (Some(ActivationFormat::E4m3), _, Some((name, extent))) => Err(Error::usage(format!(
                "{name} is {extent}, expected a multiple of {} for e4m3 activations: \
                 give --activations bf16",
                Group::G128.smallest()
            ))),
            (Some(asked), _, _) => Ok(asked),
            (None, WeightFormat::E4m3, None) => Ok(ActivationFormat::E4m3),
            (None, _, _) => Ok(ActivationFormat::Bf16),
        }
    }
}

/// What a GPU keeps beside the weights.
#[derive(Debug, clap::Args)]
pub(crate) struct CopyOptions {
    /// Keep a copy of mxfp4 weights in e4m3, which calls of many tokens multiply by: 8 bits a weight beside 4.25. On a
    /// GPU, with e4m3 activations.
    #[arg(long)]
    e4m3_copy: bool,
}

impl CopyOptions {
    /// Whether there is to be a copy; fails where there is none.
    pub(crate) fn e4m3_copy(
        &self,
        runner: &Runner,
        weights: WeightFormat,
        activations: ActivationFormat,
    ) -> Result<bool> {
        let wrong = match (runner, weights, activations) {
            _ if !self.e4m3_copy => return Ok(false),
            (Runner::Cpu(_), ..) => "--device is cpu, expected cuda:N".into(),
            (_, WeightFormat::Mxfp4, ActivationFormat::E4m3) => return Ok(true),
            (_, WeightFormat::Mxfp4, _) => "the activations are bf16, expected e4m3".into(),
            _ => format!("the weights are {weights}, expected mxfp4"),
        };
        Err(Error::usage(format!("{wrong} for --e4m3-copy")))
    }
}

/// The model and the sizes that a benchmark goes through.
#[derive(Debug, clap::Args)]
pub(crate) struct SizeOptions {
    /// Numbers of tokens, separated by commas.
    #[arg(long, value_name = "M,M,...", value_delimiter = ',', default_value = "1,8,64,512")]
    pub(crate) tokens: Vec<usize>,
    /// The model whose layer is timed.
    #[arg(long, value_name = "NAME", default_value = "qwen3-30b-a3b")]
    pub(crate) preset: Preset,
    /// Experts on this device, the first ones; rows of the others are elsewhere [default: all].
    #[arg(long, value_name = "N")]
    local_experts: Option<usize>,
    /// I of the experts, where every expert is split among ranks [default: the model's own].
    #[arg(long, value_name = "I")]
    pub(crate) intermediate: Option<usize>,
    #[command(flatten)]
    pub(crate) made_up: MadeUpOptions,
    /// Timed runs of each size on a CPU [default: 5]. A GPU is timed for as long as its clock needs.
    #[arg(long, value_name = "N")]
    repeat: Option<usize>,
    /// Draw time by size, and each stage's part of it, as SVG.
    #[arg(long, value_name = "FILE.svg")]
    pub(crate) plot: Option<PathBuf>,
}

impl SizeOptions {
    /// Fails for sizes and options that no benchmark takes, and for targets that cannot be written.
    pub(crate) fn check(&self, compute: &ComputeOptions, report: &ReportOptions) -> Result<()> {
        if let Some(tokens) = self.tokens.iter().find(|&&tokens| tokens == 0) {
            return Err(Error::usage(format!("--tokens holds {tokens}, expected sizes of at least 1")));
        }
        match (self.repeat, compute.device) {
            (Some(0), _) => return Err(Error::usage("--repeat is 0, expected at least 1")),
            (Some(_), Some(_)) => return Err(Error::usage("--repeat goes with --device cpu only")),
            _ => {}
        }
        self.experts()?;
        output::prepare(&[("--json", report.file()), ("--plot", self.plot.as_deref())], &[])
    }

    pub(crate) fn repeat(&self) -> usize {
        self.repeat.unwrap_or(5)
    }

    /// Experts in all and on this device; each at least as many as a token has.
    pub(crate) fn experts(&self) -> Result<(usize, usize)> {
        let (global, topk) = (self.made_up.experts.unwrap_or(self.preset.experts()), self.preset.topk());
        if global < topk {
            return Err(Error::usage(format!(
                "--experts is {global}, expected at least {topk}, the experts per token"
            )));
        }
        let local = self.local_experts.unwrap_or(global);
        if local < topk || local > global {
            return Err(Error::usage(format!("--local-experts is {local}, expected {topk} to {global}")));
        }
        Ok((global, local))
    }

    /// The layer, with as many of the local experts as `available` bytes hold; and the number of experts in all.
    pub(crate) fn layer(&self, format: WeightFormat, available: Option<u64>) -> Result<(MadeUp, usize)> {
        let (global, local) = self.experts()?;
        let layer = MadeUp::new(self.preset, Some(local), format, self.made_up.seed, available)?
            .with_intermediate(self.intermediate)?;
        // Where memory holds fewer than the whole layer, the experts that are missing are missing in the model, too.
        let fit = layer.shape().local_experts();
        Ok((layer, if local == global { fit } else { global }))
    }
}

/// How a report leaves.
#[derive(Debug, clap::Args)]
pub(crate) struct ReportOptions {
    /// Print JSON instead of text; with a FILE other than "-", write the JSON there and print the text.
    #[arg(long, value_name = "FILE", num_args = 0..=1, default_missing_value = "-")]
    json: Option<PathBuf>,
}

impl ReportOptions {
    /// The file that the JSON goes to.
    pub(crate) fn file(&self) -> Option<&Path> {
        self.json.as_deref().filter(|file| *file != Path::new("-"))
    }

    /// Prints a report, or writes it, as asked.
    pub(crate) fn tell<R: Serialize>(&self, report: &R, text: impl FnOnce(&R) -> String) -> Result<()> {
        match (&self.json, self.file()) {
            (Some(_), None) => return output::print_json(report),
            (_, Some(file)) => output::write_file(file, output::json(report).as_bytes())?,
            (None, None) => {}
        }
        output::print(&text(report))
    }
}
