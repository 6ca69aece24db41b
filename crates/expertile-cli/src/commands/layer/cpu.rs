//! `expertile layer` on the CPU.

use super::report::{Computed, Outcome, Place};
use crate::call::{Call, Inputs};
use crate::check::{self, Found, SlotRows};
use crate::error::Result;
use crate::machine::Limits;
use crate::packed::Packed;
use crate::report::stages::{StageTime, whole};
use crate::weights::ExpertWeights;
use expertile::cpu::Cpu;
use expertile::{LayerConfig, Stage};

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
    Ok(Found { output: &call.output, rows: Some(SlotRows { rows, row_of_slot }) })
}
