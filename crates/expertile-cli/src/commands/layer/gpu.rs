//! `expertile layer --device cuda:N`: the layer on a GPU.

use super::report::{Computed, Outcome, Place};
use crate::call::Inputs;
use crate::check::{self, Found, SlotRows};
use crate::device;
use crate::error::{Error, Result};
use crate::report::stages::whole;
use crate::weights::ExpertWeights;
use expertile::LayerConfig;
use expertile::cuda::Device;
use expertile::cuda::measure::{HostInputs, LayerBench};
use std::time::Instant;

pub(super) fn run(
    device: &Device,
    weights: &dyn ExpertWeights,
    inputs: Inputs<'_>,
    computed: Computed,
    e4m3_copy: bool,
    check: bool,
) -> Result<Outcome> {
    let Computed { activations, parts, .. } = computed;
    if parts.shared {
        return Err(Error::usage(
            "--parts is shared, expected routed: a GPU does not compute the shared expert yet, give --parts routed",
        ));
    }
    let (input, bits) = device::half_bits(inputs.hidden_states)?;
    let routing = inputs.routing;
    let config = LayerConfig {
        input,
        activation: weights.activation(),
        weight_on_input: weights.weight_on_input(),
        ..LayerConfig::new(routing.topk(), routing.local_experts(), activations)
    };
    let started = Instant::now();
    let layer = device::prepare(device, weights, config, routing.tokens(), e4m3_copy)?;
    let pack_seconds = started.elapsed().as_secs_f64();
    let limits = device::limits(device, weights.format())?;
    let ids: Vec<i32> = routing.slots().map(|expert| expert.map_or(-1, |expert| expert as i32)).collect();
    let on_device = HostInputs {
        tokens: routing.tokens(),
        hidden_states: bits,
        topk_ids: &ids,
        topk_weights: inputs.topk_weights,
        expert_map: None,
    };
    let call = LayerBench::new(device, &layer, &on_device)?;
    call.run()?;
    let output = call.output()?;
    // `[M_sum, H]` may be gigabytes: it is downloaded for the check only.
    let rows = if check { call.rows()? } else { None };
    let times = call.time()?;
    let check = check.then(|| {
        let rows = rows.map(|(rows, row_of_slot)| SlotRows { rows, row_of_slot });
        check::check(&Found { output: &output, rows }, &inputs, weights, activations, parts)
    });
    let stages = device::stage_times(&layer, &times, &routing)?;
    Ok(Outcome {
        place: Place::Gpu {
            device: device.info().name.clone(),
            eager_seconds: times.eager_seconds,
            choice: times.choice.into(),
        },
        weight_bytes: layer.weights().iter().map(|weights| weights.bytes()).sum(),
        pack_seconds,
        workspace_bytes: times.choice.workspace_bytes,
        limits,
        total: whole(&stages, &limits).taking(times.graph_seconds),
        stages: if times.choice.one_launch.is_some() { Vec::new() } else { stages },
        output,
        check,
    })
}
