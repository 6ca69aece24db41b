//! What a layer takes of the host's memory, as far as it is known before its weights are packed or uploaded.

use super::require;
use crate::error::Result;
use crate::parts::Parts;
use crate::weights::ExpertWeights;
use expertile::cpu::grouped_gemm_workspace_bytes;
use expertile::gemm::WEIGHT_BLOCK;
use expertile::{ActivationFormat, LayerShape, WeightFormat};

/// Where a layer keeps its weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum WeightPlace {
    /// Packed, in the host's memory; the workspace is there too.
    Host,
    /// On a GPU, with the workspace; the host holds one matrix at a time while it uploads.
    Device,
}

/// A layer and a call of it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct LayerMemory {
    shape: LayerShape,
    weights: WeightFormat,
    activations: ActivationFormat,
    place: WeightPlace,
    /// Values of the routed experts' biases.
    bias_values: usize,
    shared: Option<Shared>,
    tokens: usize,
    topk: usize,
    /// Whether the result is compared with the oracle's.
    check: bool,
}

/// The shared expert, where the output holds it.
#[derive(Debug, Clone, Copy)]
struct Shared {
    shape: LayerShape,
    weights: WeightFormat,
    has_gate: bool,
}

/// Bytes of a call's buffers that its stages use in turn.
struct StageBytes {
    front: u128,
    back: u128,
    gemm: u128,
}

impl LayerMemory {
    /// The layer of these weights, without a call.
    pub(crate) fn new(
        weights: &dyn ExpertWeights,
        activations: ActivationFormat,
        parts: Parts,
        place: WeightPlace,
    ) -> Self {
        let shared = weights.shared().filter(|_| parts.shared).map(|shared| Shared {
            shape: shared.shape,
            weights: shared.weight_format(),
            has_gate: shared.gate.is_some(),
        });
        Self {
            shape: weights.shape(),
            weights: weights.format(),
            activations,
            place,
            bias_values: weights.biases().map_or(0, |biases| biases.w13.len() + biases.w2.len()),
            shared,
            tokens: 0,
            topk: 1,
            check: false,
        }
    }

    /// The same with a call of so many tokens.
    pub(crate) fn calling(self, tokens: usize, topk: usize, check: bool) -> Self {
        Self { tokens, topk, check, ..self }
    }

    /// Fails unless memory holds the weights, the workspace, the output, and what the router and the check take.
    pub(crate) fn require(&self) -> Result<()> {
        let (weights, call) = (self.weight_bytes(), self.call_bytes()?);
        let (what, names) = match self.place {
            WeightPlace::Host => ("the layer", ["weights", "tokens and workspace"]),
            WeightPlace::Device => ("the layer's host side", ["a matrix to upload", "tokens and output"]),
        };
        let parts = [(names[0], weights), (names[1], call)];
        let parts = parts.map(|(name, bytes)| format!("{name} {}", crate::report::format::bytes(saturate(bytes))));
        require(&format!("{what} ({})", parts.join(", ")), weights.saturating_add(call))
    }

    fn weight_bytes(&self) -> u128 {
        match self.place {
            WeightPlace::Host => {
                let shared = self.shared.map_or(0, |shared| shared.weight_bytes());
                packed_bytes(&self.shape, self.weights) + 4 * self.bias_values as u128 + shared
            }
            WeightPlace::Device => {
                u128::from(self.weights.matrix_bytes(self.shape.intermediate() as u64, self.shape.hidden() as u64))
            }
        }
    }

    fn call_bytes(&self) -> Result<u128> {
        let Self { tokens, topk, check, .. } = *self;
        let (hidden, experts) = (self.shape.hidden() as u128, self.shape.local_experts() as u128);
        let (tokens, rows) = (tokens as u128, tokens as u128 * topk as u128);
        let workspace = match self.place {
            WeightPlace::Host => self.workspace_bytes(rows)?,
            WeightPlace::Device => 0,
        };
        // Hidden states widened for the router, its logits; the output, and two copies of it while a file is written.
        let by_token = tokens * (4 * hidden + 4 * experts + 3 * 2 * hidden);
        // The router's choice, and the same as local ids.
        let by_slot = 12 * rows;
        // GEMM 2's rows as they are and widened to f64, beside the oracle's; the output likewise.
        let shared_rows = if self.shared.is_some() { 8 } else { 0 };
        let checked = if check { rows * 18 * hidden + tokens * (20 + shared_rows) * hidden } else { 0 };
        Ok(workspace + by_token + by_slot + checked)
    }

    /// As the library carves it: the routed experts' buffers serve the shared expert first.
    fn workspace_bytes(&self, rows: u128) -> Result<u128> {
        let routed = StageBytes::new(&self.shape, self.activations, rows)?;
        let layout = 16 * rows + 8 * self.shape.local_experts() as u128;
        let Some(shared) = self.shared else { return Ok(routed.sum() + layout) };
        let tokens = self.tokens as u128;
        let activations = match shared.weights {
            WeightFormat::E4m3 | WeightFormat::Mxfp4 | WeightFormat::Int4 => self.activations,
            WeightFormat::Bf16 => ActivationFormat::Bf16,
        };
        let own = tokens * (2 * self.shape.hidden() as u128 + 8);
        Ok(routed.or(&StageBytes::new(&shared.shape, activations, tokens)?).sum() + layout + own)
    }
}

impl Shared {
    fn weight_bytes(&self) -> u128 {
        let gate = if self.has_gate { 4 * self.shape.hidden() as u128 } else { 0 };
        packed_bytes(&self.shape, self.weights) + gate
    }
}

impl StageBytes {
    fn new(shape: &LayerShape, activations: ActivationFormat, rows: u128) -> Result<Self> {
        let widest_front = shape.hidden().max(shape.intermediate());
        let widest_back = shape.hidden().max(shape.w13_rows());
        let front = match activations {
            ActivationFormat::Bf16 => 2 * widest_front,
            ActivationFormat::E4m3 => widest_front + 4 * widest_front.div_ceil(WEIGHT_BLOCK),
        };
        let gemm = match usize::try_from(rows) {
            Ok(rows) => grouped_gemm_workspace_bytes(rows, widest_front, activations)?,
            Err(_) => usize::MAX,
        };
        Ok(Self { front: rows * front as u128, back: rows * 2 * widest_back as u128, gemm: gemm as u128 })
    }

    /// The larger of each.
    fn or(&self, other: &Self) -> Self {
        Self { front: self.front.max(other.front), back: self.back.max(other.back), gemm: self.gemm.max(other.gemm) }
    }

    fn sum(&self) -> u128 {
        self.front + self.back + self.gemm
    }
}

/// As the library packs: columns in panels of 32, K in pairs, and e4m3's scale and mark to each panel's block or the
/// scales of 4-bit weights.
fn packed_bytes(shape: &LayerShape, format: WeightFormat) -> u128 {
    let matrix = |n: usize, k: usize| {
        let panels = n.div_ceil(32) as u128;
        let values = panels * 8 * k.div_ceil(2) as u128 * format.bits() as u128;
        let scales = match format {
            WeightFormat::E4m3 => panels * k.div_ceil(WEIGHT_BLOCK) as u128 * 12,
            WeightFormat::Bf16 => 0,
            WeightFormat::Mxfp4 => panels * k as u128,
            WeightFormat::Int4 => 2 * panels * k as u128,
        };
        values + scales + n as u128
    };
    let (hidden, intermediate) = (shape.hidden(), shape.intermediate());
    (matrix(shape.w13_rows(), hidden) + matrix(hidden, intermediate)) * shape.local_experts() as u128
}

fn saturate(bytes: u128) -> u64 {
    u64::try_from(bytes).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use expertile::cpu::{Cpu, Layer, PackedWeights, SharedExpert};
    use expertile::int4::Int4Scales;
    use expertile::{E4m3, LayerConfig, MatrixRef};
    use half::bf16;

    const TOKENS: usize = 100;
    const TOPK: usize = 4;

    fn pack(format: WeightFormat, [experts, n, k]: [usize; 3]) -> PackedWeights {
        let cpu = Cpu::new();
        match format {
            WeightFormat::Bf16 => PackedWeights::pack_bf16(&cpu, &vec![bf16::ONE; experts * n * k], experts, n, k),
            WeightFormat::E4m3 => {
                let scales = vec![1.0; experts * n.div_ceil(128) * k.div_ceil(128)];
                PackedWeights::pack_e4m3(&cpu, &vec![E4m3(0x38); experts * n * k], &scales, experts, n, k)
            }
            WeightFormat::Mxfp4 => {
                let (blocks, scales) = (vec![0; experts * n * k / 2], vec![0; experts * n * k / 32]);
                PackedWeights::pack_mxfp4(&cpu, &blocks, &scales, experts, n, k)
            }
            WeightFormat::Int4 => {
                let scales = vec![bf16::ONE; experts * n * k / 32];
                let scales = Int4Scales::Bf16(MatrixRef::new(&scales, experts * n, k / 32).unwrap());
                PackedWeights::pack_int4(&cpu, &vec![0; experts * n * k / 2], scales, experts, n, k)
            }
        }
        .unwrap()
    }

    fn memory(shape: LayerShape, weights: WeightFormat, activations: ActivationFormat) -> LayerMemory {
        let place = WeightPlace::Host;
        LayerMemory {
            shape,
            weights,
            activations,
            place,
            bias_values: 0,
            shared: None,
            tokens: TOKENS,
            topk: TOPK,
            check: false,
        }
    }

    #[test]
    fn the_estimate_is_what_the_library_takes() {
        let (hidden, intermediate, experts, shared_intermediate) = (256, 128, 3, 1024);
        let shape = LayerShape::new(hidden, intermediate, experts).unwrap();
        let shared_shape = LayerShape::new(hidden, shared_intermediate, 1).unwrap();
        for (weights, activations) in [
            (WeightFormat::Bf16, ActivationFormat::Bf16),
            (WeightFormat::E4m3, ActivationFormat::Bf16),
            (WeightFormat::E4m3, ActivationFormat::E4m3),
            (WeightFormat::Mxfp4, ActivationFormat::Bf16),
            (WeightFormat::Mxfp4, ActivationFormat::E4m3),
            (WeightFormat::Int4, ActivationFormat::Bf16),
            (WeightFormat::Int4, ActivationFormat::E4m3),
        ] {
            for (biases, shared) in
                [(false, None), (true, None), (true, Some(WeightFormat::Bf16)), (true, Some(weights))]
            {
                let w13 = pack(weights, [experts, 2 * intermediate, hidden]);
                let w2 = pack(weights, [experts, hidden, intermediate]);
                let mut taken = w13.bytes() + w2.bytes();
                let config = LayerConfig::new(TOPK, experts, activations);
                let mut layer = Layer::prepare(&Cpu::new(), w13, w2, config, TOKENS).unwrap();
                let bias_values = if biases { experts * (2 * intermediate + hidden) } else { 0 };
                if biases {
                    let zeros = |len| Some(vec![0.0; experts * len]);
                    layer = layer.with_biases(zeros(2 * intermediate), zeros(hidden)).unwrap();
                    taken += 4 * bias_values;
                }
                if let Some(format) = shared {
                    let w13 = pack(format, [1, 2 * shared_intermediate, hidden]);
                    let w2 = pack(format, [1, hidden, shared_intermediate]);
                    taken += w13.bytes() + w2.bytes() + 4 * hidden;
                    let expert = SharedExpert { w13, w2, gate: Some(vec![0.0; hidden]) };
                    layer = layer.with_shared_expert(expert).unwrap();
                }
                let shared = shared.map(|weights| Shared { shape: shared_shape, weights, has_gate: true });
                let memory = LayerMemory { bias_values, shared, ..memory(shape, weights, activations) };
                let what = format!("{weights}, {activations}, {memory:?}");
                let (packed, taken) = (memory.weight_bytes(), taken as u128);
                assert!((taken..taken + taken / 50).contains(&packed), "{what}: {packed} for {taken}");
                let taken = (layer.workspace_bytes(TOKENS).unwrap() + TOKENS * hidden * 2) as u128;
                let estimate = memory.call_bytes().unwrap();
                assert!((taken..2 * taken).contains(&estimate), "{what}: {estimate} for {taken}");
            }
        }
    }

    #[test]
    fn a_gpu_leaves_the_host_a_matrix_the_tokens_and_the_check() {
        let shape = LayerShape::new(4096, 1024, 8).unwrap();
        let on_host = memory(shape, WeightFormat::E4m3, ActivationFormat::E4m3);
        let on_device = LayerMemory { place: WeightPlace::Device, ..on_host };
        assert_eq!(on_device.weight_bytes(), 4096 * 1024 + 4 * 32 * 8);
        let values = TOKENS as u128 * 4096;
        let call = on_device.call_bytes().unwrap();
        assert!((10 * values..11 * values).contains(&call), "{call}");
        let checked = on_device.calling(TOKENS, TOPK, true).call_bytes().unwrap();
        assert_eq!(checked - call, values * (18 * TOPK as u128 + 20));
        let absurd = on_device.calling(usize::MAX / 4, TOPK, false).require().unwrap_err().to_string();
        assert!(
            absurd.starts_with("the layer's host side (a matrix to upload 4.00 MiB, tokens and output "),
            "{absurd}"
        );
    }
}
