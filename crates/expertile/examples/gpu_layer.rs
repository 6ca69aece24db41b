//! A layer on a GPU: weights up, one call, a CUDA graph of it replayed, output down.
//!
//! Needs a Hopper, its driver and NVRTC (`pip install nvidia-cuda-nvrtc`); without them it prints what is missing.

use expertile::cuda::{Device, Ids, Layer, LayerInputs, Weights};
use expertile::{ActivationFormat, LayerConfig};
use half::bf16;

const EXPERTS: usize = 8;
const HIDDEN: usize = 512;
const INTERMEDIATE: usize = 256;
const TOPK: usize = 2;
const TOKENS: usize = 16;

fn main() -> expertile::Result<()> {
    let device = match Device::open(0) {
        Ok(device) => device,
        Err(error) => {
            println!("stopped: {error}");
            return Ok(());
        }
    };
    let noise = |seed: usize, len| (0..len).map(|i| bf16::from_f32((i * seed % 97) as f32 / 970.0 - 0.05)).collect();
    let (w13, w2): (Vec<_>, Vec<_>) =
        (noise(31, EXPERTS * 2 * INTERMEDIATE * HIDDEN), noise(37, EXPERTS * HIDDEN * INTERMEDIATE));
    let w13 = Weights::upload_bf16(&device, &w13, (EXPERTS, 2 * INTERMEDIATE, HIDDEN))?;
    let w2 = Weights::upload_bf16(&device, &w2, (EXPERTS, HIDDEN, INTERMEDIATE))?;
    // Everything is compiled here; calls of up to 1024 tokens compile, allocate and wait for nothing.
    let layer = Layer::prepare(&device, w13, w2, LayerConfig::new(TOPK, EXPERTS, ActivationFormat::Bf16), 1024)?;
    println!("{TOKENS} tokens: {}", layer.choice(TOKENS)?);

    let x = device.upload::<bf16>(&noise(41, TOKENS * HIDDEN))?;
    let ids = device.upload(&(0..TOKENS * TOPK).map(|slot| (slot % EXPERTS) as i32).collect::<Vec<_>>())?;
    let weights = device.upload(&[0.5f32; TOKENS * TOPK])?;
    let (hidden_states, topk_ids, topk_weights) = (&x, Ids::I32(&ids), &weights);
    let inputs = LayerInputs { tokens: TOKENS, hidden_states, topk_ids, topk_weights, expert_map: None };
    let (mut workspace, output) = (layer.workspace(TOKENS)?, device.allocate::<bf16>(TOKENS * HIDDEN)?);

    layer.run(&inputs, &mut workspace, &output)?; // queues the call, and returns
    layer.check(&mut workspace)?; // waits, and reports ids that are no expert's
    let mut graph = layer.capture(&inputs, &mut workspace, &output)?;
    x.upload(&noise(43, TOKENS * HIDDEN))?; // a replay reads what the buffers hold then
    graph.replay()?;
    graph.check()?;
    let mut values = vec![bf16::ZERO; TOKENS * HIDDEN];
    output.download(&mut values)?;
    println!("first values: {:?}", &values[..4]);
    Ok(())
}
