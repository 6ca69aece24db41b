//! Which device a command runs on, and what a GPU's layer needs of the host: its weights in parts, its limits, its
//! choice.

use crate::error::{Error, Result};
use crate::machine::{Bandwidth, Limits};
use crate::memory;
use crate::report::progress::Progress;
use crate::report::stages::StageTime;
use crate::weights::{self, ExpertWeights};
use expertile::cuda::measure::{LayerTimes, copy_bytes_per_second, matrix_flops_per_second};
use expertile::cuda::{Biases, Device, Info, Layer, LayerChoice, Weights};
use expertile::layer::stage_cost;
use expertile::{ActivationFormat, Dtype, LayerConfig, Layout, Routing, Stage, StageCost, WeightFormat};
use expertile_checkpoint::HiddenStates;
use half::slice::HalfFloatSliceExt;
use serde::Serialize;

/// A GPU's number, `None` for the CPU. (Clap takes a bare `Option` for an argument that may be missing.)
pub(crate) type DeviceNumber = std::option::Option<usize>;

/// The number of `cuda:N`, `None` for `cpu`.
pub(crate) fn parse(name: &str) -> std::result::Result<DeviceNumber, String> {
    let number = || name.strip_prefix("cuda:")?.parse().ok().map(Some);
    if name == "cpu" { Ok(None) } else { number().ok_or_else(|| "expected cpu or cuda:N".into()) }
}

/// What bounds a stage on a GPU: reading is taken to be as fast as copying, the matrix product is a large dense one.
pub(crate) fn limits(device: &Device, format: WeightFormat) -> Result<Limits> {
    let copy = copy_bytes_per_second(device)?;
    Ok(Limits {
        bandwidth: Bandwidth { read_bytes_per_second: copy, copy_bytes_per_second: copy },
        gemm_flops_per_second: matrix_flops_per_second(device, format)?,
    })
}

/// The type of hidden states that a GPU takes, and their bits.
pub(crate) fn half_bits(states: &HiddenStates) -> Result<(Dtype, &[u16])> {
    match states {
        HiddenStates::Bf16(values) => Ok((Dtype::Bf16, values.reinterpret_cast())),
        HiddenStates::F16(values) => Ok((Dtype::F16, values.reinterpret_cast())),
        HiddenStates::F32(_) => Err(Error::usage("hidden_states is f32, expected bf16 or f16 on a GPU")),
    }
}

/// The layer on the device, with a bar on a terminal while its weights are uploaded; `e4m3_copy`: with their copy in
/// e4m3.
pub(crate) fn prepare(
    device: &Device,
    weights: &dyn ExpertWeights,
    config: LayerConfig,
    max_tokens: usize,
    e4m3_copy: bool,
) -> Result<Layer> {
    let progress = Progress::new("uploading experts", weights.shape().local_experts());
    let (w13, w2) = weights::load(weights, device, &mut |done| progress.set(done))?;
    let copied = |weights: Weights| match e4m3_copy {
        true => weights.arrange(device, config.activation_format)?.with_e4m3_copy(device),
        false => Ok(weights),
    };
    let (w13, w2) = (copied(w13)?, copied(w2)?);
    let biases = match weights.biases() {
        Some(biases) => Biases::upload(device, &weights.shape(), Some(&biases.w13), Some(&biases.w2))?,
        None => Biases::default(),
    };
    Ok(Layer::prepare_with_biases(device, (w13, w2), biases, config, max_tokens.max(1))?)
}

/// The timed stages inside a graph, with what each had to move and compute; GEMM 1 with the activation inside stores no
/// `gate | up`. Where one launch does it all: that launch, which has to read the weights and the tokens and to write the
/// output.
pub(crate) fn stage_times(layer: &Layer, times: &LayerTimes, routing: &Routing<'_>) -> Result<Vec<StageTime>> {
    const INPUT_BYTES: usize = 2;
    let (shape, plan) = (layer.shape(), &times.choice.plan);
    let (weights, activations) = (layer.weights()[0].format(), layer.config().activation_format);
    let mut space = memory::zeroed("the layout", Layout::space_len(plan)?)?;
    let layout = Layout::build(plan, routing, &mut space)?;
    let cost = |stage| stage_cost(stage, shape, &layout, weights, activations, INPUT_BYTES);
    let gate_up = (layout.live_rows() * 2 * shape.intermediate() * 2) as u64;
    let cost_here = |stage| match stage {
        Stage::Gemm1 if times.choice.activation_inside_gemm1 => {
            let (gemm, activation) = (cost(Stage::Gemm1), cost(Stage::Activation));
            StageCost { bytes: gemm.bytes + activation.bytes - 2 * gate_up, ..gemm }
        }
        // Both GEMMs' operands and results; `gate | up` and the activated rows stay in the cache.
        Stage::Gemm1 if times.choice.joined => {
            let (gemm1, gemm2) = (cost(Stage::Gemm1), cost(Stage::Gemm2));
            let activated_bytes = if activations == ActivationFormat::E4m3 { 1 } else { 2 };
            let between = gate_up + (layout.live_rows() * shape.intermediate() * activated_bytes) as u64;
            StageCost { bytes: gemm1.bytes + gemm2.bytes - between, flops: gemm1.flops + gemm2.flops }
        }
        stage => cost(stage),
    };
    if times.choice.one_launch.is_some() {
        let (gemm1, gemm2) = (cost(Stage::Gemm1), cost(Stage::Gemm2));
        let values = (plan.tokens() * shape.hidden() * INPUT_BYTES) as u64;
        let experts = layout.expert_num_tokens().iter().filter(|&&count| count > 0).count();
        let bytes: usize = layer.weights().iter().map(|weights| weights.bytes() / weights.experts() * experts).sum();
        let cost = StageCost { bytes: bytes as u64 + 2 * values, flops: gemm1.flops + gemm2.flops };
        return Ok(vec![StageTime { stage: Some(Stage::Gemm1), seconds: times.graph_seconds, cost }]);
    }
    let stages = times.stages.iter();
    Ok(stages
        .map(|time| StageTime { stage: Some(time.stage), seconds: time.graph_seconds, cost: cost_here(time.stage) })
        .collect())
}

/// A GPU as reports of benchmarks name it.
#[derive(Debug, Serialize)]
pub(crate) struct Gpu {
    device: String,
    compute_capability: String,
    driver_version: i32,
}

impl From<&Info> for Gpu {
    fn from(info: &Info) -> Self {
        Self { device: info.name.clone(), compute_capability: capability(info), driver_version: info.driver_version }
    }
}

impl std::fmt::Display for Gpu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { device, compute_capability, driver_version } = self;
        write!(f, "{device} (compute capability {compute_capability}, driver {driver_version})")
    }
}

/// `major.minor`.
pub(crate) fn capability(info: &Info) -> String {
    format!("{}.{}", info.capability.0, info.capability.1)
}

/// A [`LayerChoice`] as reports print it.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Choice {
    pub(crate) m_sum: usize,
    pub(crate) alignment: usize,
    pub(crate) row_tile: usize,
    pub(crate) gemm1: String,
    pub(crate) gemm2: String,
    pub(crate) activation_inside_gemm1: bool,
    /// Whether gemm1, and whether gemm2, reads the copy in e4m3.
    pub(crate) e4m3_copy: [bool; 2],
    /// Whether gemm1, the activation and gemm2 are one launch, whose time is gemm1's.
    pub(crate) joined: bool,
    /// Whether one launch does it all: the fields above are then those of a call in steps.
    pub(crate) one_launch: bool,
    pub(crate) launches: usize,
    pub(crate) workspace_bytes: usize,
}

impl From<LayerChoice> for Choice {
    fn from(choice: LayerChoice) -> Self {
        let LayerChoice { plan, row_tile, activation_inside_gemm1, e4m3_copy, launches, workspace_bytes, .. } = choice;
        let (m_sum, alignment) = (plan.m_sum(), plan.alignment());
        let [gemm1, gemm2] = [choice.gemm1, choice.gemm2].map(|tile| tile.to_string());
        let (joined, one_launch) = (choice.joined, choice.one_launch.is_some());
        Self {
            m_sum,
            alignment,
            row_tile,
            gemm1,
            gemm2,
            activation_inside_gemm1,
            e4m3_copy,
            joined,
            one_launch,
            launches,
            workspace_bytes,
        }
    }
}

impl Choice {
    /// One line for a reader.
    pub(crate) fn text(&self) -> String {
        let Self { m_sum, alignment, gemm1, gemm2, launches, .. } = self;
        let workspace = crate::report::format::bytes(self.workspace_bytes as u64);
        if self.one_launch {
            return format!("one launch for all, workspace {workspace}");
        }
        let [first, second] = self.e4m3_copy.map(|reads| if reads { " over the e4m3 copy" } else { "" });
        let gemms = match gemm1 == gemm2 && first == second {
            true => format!("both gemms {gemm1}{first}"),
            false => format!("gemm1 {gemm1}{first}; gemm2 {gemm2}{second}"),
        };
        let inside = match (self.activation_inside_gemm1, self.joined) {
            (true, _) => "; activation inside gemm1",
            (_, true) => "; both gemms and the activation in one launch",
            _ => "",
        };
        format!("{launches} launches, {m_sum} rows aligned to {alignment}, workspace {workspace}; {gemms}{inside}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_go_by_name_and_number() {
        assert_eq!(parse("cpu"), Ok(None));
        assert_eq!(parse("cuda:3"), Ok(Some(3)));
        for name in ["cuda", "cuda:", "cuda:x", "gpu", ""] {
            assert!(parse(name).is_err(), "{name}");
        }
    }

    #[test]
    fn reports_name_a_gpu_by_what_it_is() {
        let info = Info {
            ordinal: 1,
            name: "a GPU".into(),
            capability: (9, 0),
            multiprocessors: 132,
            memory_bytes: 1 << 37,
            l2_bytes: 1 << 26,
            driver_version: 13_000,
        };
        let gpu = Gpu::from(&info);
        assert_eq!(gpu.to_string(), "a GPU (compute capability 9.0, driver 13000)");
        let json = serde_json::json!({"device": "a GPU", "compute_capability": "9.0", "driver_version": 13_000});
        assert_eq!(serde_json::to_value(gpu).unwrap(), json);
    }
}
