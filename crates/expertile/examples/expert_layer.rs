//! An inference engine's view of a layer: pack the weights once, then run batches in a workspace of your own.
//!
//! The shapes are those of a small Mixtral-like layer, the weights are made up. Every stage reports its time.

use expertile::cpu::{Cpu, Layer, PackedWeights, PackedWeightsBuilder};
use expertile::{ActivationFormat, E4m3, LayerConfig, MatrixRef, Router, Routing, WeightFormat};
use half::bf16;

const EXPERTS: usize = 8;
const HIDDEN: usize = 1024;
const INTERMEDIATE: usize = 512;
const TOPK: usize = 2;

fn main() -> expertile::Result<()> {
    // The best instruction set of this machine, on the rayon pool one is called from. `Cpu::in_pool` takes another.
    let cpu = Cpu::new();
    let batches = [64, 8, 1];
    let config = LayerConfig::new(TOPK, EXPERTS, ActivationFormat::E4m3);
    let layer = Layer::prepare(&cpu, pack_w13(&cpu)?, pack_w2(&cpu)?, config, batches[0])?;
    let router = Router::softmax(TOPK, true);

    // One workspace for the largest batch serves them all; nothing is allocated per call.
    let mut workspace = vec![0; layer.workspace_bytes(batches[0])?];
    println!("workspace for up to {} tokens: {} KiB", batches[0], workspace.len() >> 10);
    for tokens in batches {
        let hidden_states: Vec<bf16> = noise(7, tokens * HIDDEN).map(bf16::from_f32).collect();
        let logits: Vec<f32> = noise(11, tokens * EXPERTS).collect();

        let (mut topk_ids, mut topk_weights) = (vec![0; tokens * TOPK], vec![0.0; tokens * TOPK]);
        router.route(MatrixRef::new(&logits, tokens, EXPERTS)?, &mut topk_ids, &mut topk_weights)?;
        // Ids may come from anywhere: `Routing` checks them once, so that nothing after it can go out of bounds.
        let routing = Routing::new(MatrixRef::new(&topk_ids, tokens, TOPK)?, EXPERTS, None)?;

        let mut output = vec![bf16::ZERO; tokens * HIDDEN];
        println!("{tokens} tokens:");
        layer.run_observed(
            MatrixRef::new(&hidden_states, tokens, HIDDEN)?,
            &routing,
            MatrixRef::new(&topk_weights, tokens, TOPK)?,
            &mut workspace,
            &mut output,
            &mut |done| {
                let rate = done.cost.bytes as f64 / done.elapsed.as_secs_f64() / 1e9;
                println!("  {:<10} {:>9.1?}  {rate:>6.1} GB/s", done.stage.name(), done.elapsed);
            },
        )?;
        println!("  first values: {:?}", &output[..3]);
    }
    Ok(())
}

/// `[E, 2 I, H]`, gate rows first: they come as two tensors per expert, as in most checkpoints.
fn pack_w13(cpu: &Cpu) -> expertile::Result<PackedWeights> {
    let mut builder = PackedWeightsBuilder::new(cpu, WeightFormat::E4m3, EXPERTS, 2 * INTERMEDIATE, HIDDEN)?;
    for expert in 0..EXPERTS {
        for first_row in [0, INTERMEDIATE] {
            let (values, scales) = e4m3_weights(expert + first_row, INTERMEDIATE, HIDDEN);
            let scales = MatrixRef::new(&scales, INTERMEDIATE / 128, HIDDEN / 128)?;
            let values = MatrixRef::new(&values, INTERMEDIATE, HIDDEN)?;
            builder.add_e4m3_rows(expert, first_row, values, scales)?;
        }
    }
    // A row that never came would be an error here.
    builder.finish()
}

/// `[E, H, I]` in one piece.
fn pack_w2(cpu: &Cpu) -> expertile::Result<PackedWeights> {
    let (values, scales) = e4m3_weights(99, EXPERTS * HIDDEN, INTERMEDIATE);
    PackedWeights::pack_e4m3(cpu, &values, &scales, EXPERTS, HIDDEN, INTERMEDIATE)
}

/// Weights `[rows, cols]` and one scale per block of 128 x 128: `value * scale` is the weight.
fn e4m3_weights(seed: usize, rows: usize, cols: usize) -> (Vec<E4m3>, Vec<f32>) {
    let scale = 0.1 / E4m3::MAX;
    let values = noise(seed as u64, rows * cols).map(|x| E4m3::from_f32(0.03 * x / scale)).collect();
    (values, vec![scale; rows / 128 * (cols / 128)])
}

/// Made-up numbers between -1 and 1.
fn noise(seed: u64, len: usize) -> impl Iterator<Item = f32> {
    (0..len as u64).map(move |i| {
        let mixed = (i + seed * 1_000_003).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        (mixed >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    })
}
