//! `expertile layer` on the CPU.

use super::parts::Parts;
use super::report::{Computed, Outcome, Place};
use crate::check::{self, Found};
use crate::error::Result;
use crate::machine::Limits;
use crate::progress::Progress;
use crate::stages::{Call, Inputs, StageTime, whole};
use crate::weights::{self, ExpertWeights};
use expertile::cpu::{Cpu, Layer, SharedExpert};
use expertile::{LayerConfig, Stage};
use expertile_checkpoint::Biases;
use std::time::Instant;

pub(super) fn run(
    cpu: &Cpu,
    weights: &dyn ExpertWeights,
    inputs: Inputs<'_>,
    computed: Computed,
    router: Option<StageTime>,
    check: bool,
) -> Result<Outcome> {
    let Computed { activations, parts, .. } = computed;
    let routing = &inputs.routing;
    let config = LayerConfig {
        input: inputs.hidden_states.dtype(),
        ..LayerConfig::new(routing.topk(), routing.global_experts(), activations)
    };
    let packed = Packed::new(cpu, weights, config, parts)?;
    let limits = Limits::measure(cpu, weights.format(), activations)?;
    let mut call = Call::new(&packed.layer, inputs)?;
    // About a second of repeats: enough for a median, little enough for a newcomer's patience.
    let mut stages = call.time(|first| (1.0 / first.max(1e-9)).clamp(1.0, 5.0) as usize)?;
    stages.splice(0..0, router);
    let check = if check { Some(check::check(&found(&mut call)?, &inputs, weights, activations, parts)) } else { None };
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
    /// Packs the weights, with a bar on a terminal. Of `config`, what belongs to the weights is theirs.
    pub(crate) fn new(cpu: &Cpu, weights: &dyn ExpertWeights, config: LayerConfig, parts: Parts) -> Result<Self> {
        let progress = Progress::new("packing experts", weights.shape().local_experts());
        let started = Instant::now();
        let (w13, w2) = weights::load(weights, cpu, &mut |done| progress.set(done))?;
        let mut bytes = w13.bytes() + w2.bytes();
        let config =
            LayerConfig { activation: weights.activation(), weight_on_input: weights.weight_on_input(), ..config };
        let mut layer = Layer::prepare(cpu, w13, w2, config, usize::MAX)?;
        if let Some(Biases { w13, w2 }) = weights.biases() {
            layer = layer.with_biases(Some(w13.clone()), Some(w2.clone()))?;
        }
        if let Some(shared) = weights.shared().filter(|_| parts.shared) {
            let (w13, w2) = shared.load(cpu)?;
            bytes += w13.bytes() + w2.bytes();
            layer = layer.with_shared_expert(SharedExpert { w13, w2, gate: shared.gate.clone() })?;
        }
        Ok(Self { layer, bytes, seconds: started.elapsed().as_secs_f64() })
    }
}
