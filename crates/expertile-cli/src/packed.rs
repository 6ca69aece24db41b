//! A layer packed for the CPU.

use crate::error::Result;
use crate::parts::Parts;
use crate::report::progress::Progress;
use crate::weights::{self, ExpertWeights};
use expertile::LayerConfig;
use expertile::cpu::{Cpu, Layer, SharedExpert};
use expertile_checkpoint::Biases;
use std::time::Instant;

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
