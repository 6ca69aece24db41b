//! One function, every backend: the same layer on the CPU and, where there is a Hopper, on a GPU.
//!
//! [`decode`] is what an engine's author writes once. Only `main` names a backend.

use expertile::WeightsBuilder;
use expertile::backend::{Ids, LayerInputs};
use expertile::cpu::Cpu;
use expertile::{ActivationFormat, Backend, ExpertLayer, LayerConfig, LayerShape, MatrixRef, WeightFormat};
use half::bf16;

const EXPERTS: usize = 4;
const HIDDEN: usize = 256;
const INTERMEDIATE: usize = 128;
const TOPK: usize = 2;

/// One batch through a layer that was prepared before: `hidden_states [M, H]` to the result on the host.
fn decode<B: Backend>(
    backend: &B,
    layer: &B::Layer,
    workspace: &mut B::Workspace,
    hidden_states: &[bf16],
    topk_ids: &[i32],
    topk_weights: &[f32],
) -> expertile::Result<Vec<bf16>> {
    let tokens = hidden_states.len() / layer.shape().hidden();
    let (x, ids) = (backend.upload(hidden_states)?, backend.upload(topk_ids)?);
    let weights = backend.upload(topk_weights)?;
    let mut output = backend.allocate(hidden_states.len())?;
    let inputs =
        LayerInputs { tokens, hidden_states: &x, topk_ids: Ids::I32(&ids), topk_weights: &weights, expert_map: None };
    layer.run(&inputs, workspace, &mut output)?;
    layer.check(workspace)?;
    let mut values = vec![bf16::ZERO; hidden_states.len()];
    backend.download(&output, &mut values)?;
    Ok(values)
}

/// A layer of made-up weights that come expert by expert, gate and up apart.
fn load<B: Backend>(backend: &B, max_tokens: usize) -> expertile::Result<B::Layer> {
    let shape = LayerShape::new(HIDDEN, INTERMEDIATE, EXPERTS)?;
    let mut w13 = backend.w13_builder(WeightFormat::Bf16, &shape)?;
    let mut w2 = backend.w2_builder(WeightFormat::Bf16, &shape)?;
    for expert in 0..EXPERTS {
        for (part, first_row) in [0, INTERMEDIATE].into_iter().enumerate() {
            let values = noise(2 * expert + part, INTERMEDIATE * HIDDEN);
            w13.add_bf16_rows(expert, first_row, MatrixRef::new(&values, INTERMEDIATE, HIDDEN)?)?;
        }
        let values = noise(100 + expert, HIDDEN * INTERMEDIATE);
        w2.add_bf16_rows(expert, 0, MatrixRef::new(&values, HIDDEN, INTERMEDIATE)?)?;
    }
    let config = LayerConfig::new(TOPK, EXPERTS, ActivationFormat::Bf16);
    backend.prepare(w13.finish()?, w2.finish()?, config, max_tokens)
}

fn run<B: Backend>(name: &str, backend: &B) -> expertile::Result<Vec<bf16>> {
    let tokens = 5;
    let layer = load(backend, tokens)?;
    let mut workspace = layer.workspace(tokens)?;
    println!("{name}: {}", layer.choice(tokens)?);
    let topk_ids: Vec<i32> = (0..tokens * TOPK).map(|slot| (slot * 3 % EXPERTS) as i32).collect();
    let hidden_states = noise(7, tokens * HIDDEN);
    let output = decode(backend, &layer, &mut workspace, &hidden_states, &topk_ids, &vec![0.5; tokens * TOPK])?;
    println!("{name}: first values {:?}", &output[..3]);
    Ok(output)
}

fn main() -> expertile::Result<()> {
    let on_cpu = run("cpu", &Cpu::new())?;
    #[cfg(feature = "cuda")]
    match expertile::cuda::Device::open(0) {
        Ok(device) if device.info().capability == (9, 0) => {
            let on_gpu = run("cuda", &device)?;
            let off = on_cpu.iter().zip(&on_gpu).map(|(a, b)| (a.to_f32() - b.to_f32()).abs()).fold(0.0, f32::max);
            println!("largest difference: {off}");
            assert!(off < 0.02, "the backends disagree");
        }
        Ok(device) => println!("cuda: skipped, {} is no Hopper", device.info().name),
        Err(error) => println!("cuda: skipped, {error}"),
    }
    drop(on_cpu);
    Ok(())
}

/// Made-up numbers between -0.25 and 0.25.
fn noise(seed: usize, len: usize) -> Vec<bf16> {
    let value = |i: usize| (i + seed * 1_000_003).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40;
    (0..len).map(|i| bf16::from_f32(value(i) as f32 / (1u64 << 25) as f32 - 0.25)).collect()
}
