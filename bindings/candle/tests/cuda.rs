//! The layer on CUDA tensors, beside the same layer on the CPU. Skips with a line where there is no Hopper
//! (`EXPERTILE_NEEDS_DEVICE=1`: fails).
#![cfg(feature = "cuda")]

mod support;

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::VarBuilder;
use expertile_candle::{ActivationFormat, Dtype, Layer, LayerConfig, LayerShape, Weights};
use std::collections::HashMap;
use support::{Case, Sizes, assert_close, assert_close_by_row, assert_same_bits, e4m3};

const SIZES: Sizes = Sizes { tokens: 70, topk: 4, experts: 8, hidden: 512, intermediate: 256 };

/// A GPU that layers run on, or a line that says why there is none.
fn gpu() -> Option<Device> {
    let found = Device::new_cuda(0).map_err(|error| error.to_string()).and_then(|device| {
        let opened = expertile::cuda::Device::open(0).map_err(|error| error.to_string())?;
        let info = opened.info();
        let hopper = info.capability.0 == 9;
        hopper.then_some(device).ok_or_else(|| format!("{} is no Hopper", info.name))
    });
    match found {
        Ok(device) => Some(device),
        Err(why) if std::env::var_os("EXPERTILE_NEEDS_DEVICE").is_some() => panic!("no GPU: {why}"),
        Err(why) => {
            eprintln!("skipped, no GPU: {why}");
            None
        }
    }
}

/// A layer of bf16 experts on the CPU and on the GPU, and a call's tensors on both.
struct Pair {
    case: Case,
    cpu: Layer,
    gpu: Layer,
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
}

fn pair(gpu: &Device, seed: u64, sizes: Sizes) -> Result<Pair> {
    let case = Case::new(seed, sizes)?;
    let there = |tensor: &Tensor| tensor.to_dtype(DType::BF16)?.to_device(gpu);
    let on_gpu = Weights::bf16(&there(&case.w13)?, &there(&case.w2)?)?;
    Ok(Pair {
        cpu: Layer::prepare(case.bf16_weights()?, case.config(), sizes.tokens)?,
        gpu: Layer::prepare(on_gpu, case.config(), sizes.tokens)?,
        x: there(&case.x)?,
        ids: case.ids.contiguous()?.to_device(gpu)?,
        weights: case.weights.to_device(gpu)?,
        case,
    })
}

#[test]
fn bf16_experts_agree_with_the_cpu_and_with_candles_operators() -> Result<()> {
    let Some(gpu) = gpu() else { return Ok(()) };
    for (seed, tokens, topk) in [(1, 1, 1), (2, 70, 4), (3, 300, 8)] {
        let pair = pair(&gpu, seed, Sizes { tokens, topk, ..SIZES })?;
        let actual = pair.gpu.forward(&pair.x, &pair.ids, &pair.weights)?;
        pair.gpu.check()?;
        assert_eq!((actual.dtype(), actual.device().is_cuda()), (DType::BF16, true));
        let x = pair.case.x.to_dtype(DType::BF16)?;
        let expected = pair.cpu.forward(&x, &pair.case.ids, &pair.case.weights)?;
        assert_close("the CPU", &actual, &expected, 2e-5)?;
        assert_close("candle", &actual, &pair.case.reference()?, 2e-5)?;
    }
    Ok(())
}

#[test]
fn e4m3_experts_agree_with_the_cpu() -> Result<()> {
    let Some(gpu) = gpu() else { return Ok(()) };
    let case = Case::new(4, SIZES)?;
    let ((w13, w13_scales, _), (w2, w2_scales, _)) = (e4m3(&case.w13)?, e4m3(&case.w2)?);
    let there = |tensor: &Tensor| tensor.to_device(&gpu);
    for (dtype, input) in [(DType::BF16, Dtype::Bf16), (DType::F16, Dtype::F16)] {
        let config = LayerConfig { input, output: Dtype::F32, ..LayerConfig::new(4, 8, ActivationFormat::E4m3) };
        let cpu = Layer::prepare(Weights::e4m3(&w13, &w13_scales, &w2, &w2_scales)?, config, 70)?;
        let on_gpu = Weights::e4m3(&there(&w13)?, &there(&w13_scales)?, &there(&w2)?, &there(&w2_scales)?)?;
        let layer = Layer::prepare(on_gpu, config, 70)?;
        let x = case.x.to_dtype(dtype)?;
        let expected = cpu.forward(&x, &case.ids, &case.weights)?;
        let ids = case.ids.contiguous()?;
        let actual = layer.forward(&there(&x)?, &there(&ids)?, &there(&case.weights)?)?;
        // Sums round differently here and there. Where that changes the largest value of a group of 128 by a bit, its
        // scale changes and all of its values are rounded anew: up to 7e-4 of such a row, nothing of most rows.
        assert_close_by_row("the CPU", &actual, &expected, [1e-4, 1e-3])?;
    }
    Ok(())
}

#[test]
fn weights_by_name_are_the_stacked_ones() -> Result<()> {
    let Some(gpu) = gpu() else { return Ok(()) };
    let pair = pair(&gpu, 5, SIZES)?;
    let mut tensors = HashMap::new();
    for expert in 0..SIZES.experts {
        let halves = pair.case.w13.get(expert)?.chunk(2, 0)?;
        let parts = [("gate_proj", &halves[0]), ("up_proj", &halves[1]), ("down_proj", &pair.case.w2.get(expert)?)];
        tensors.extend(parts.map(|(name, tensor)| (format!("{expert}.{name}.weight"), tensor.clone())));
    }
    let vb = VarBuilder::from_tensors(tensors, DType::BF16, &gpu);
    let shape = LayerShape::new(SIZES.hidden, SIZES.intermediate, SIZES.experts).unwrap();
    let loaded = Layer::prepare(Weights::load(&vb, &shape)?, pair.case.config(), SIZES.tokens)?;
    let expected = pair.gpu.forward(&pair.x, &pair.ids, &pair.weights)?;
    assert_same_bits("loaded", &loaded.forward(&pair.x, &pair.ids, &pair.weights)?, &expected)
}

#[test]
fn views_and_empty_batches_and_company_change_no_bit() -> Result<()> {
    let Some(gpu) = gpu() else { return Ok(()) };
    let pair = pair(&gpu, 6, SIZES)?;
    let expected = pair.gpu.forward(&pair.x, &pair.ids, &pair.weights)?;
    // Ids as `narrow` leaves them, rows of a wider matrix.
    let (x, weights) = (&pair.x, &pair.weights);
    let wide = |tensor: &Tensor| -> Result<Tensor> {
        let cols = tensor.dim(1)?;
        Tensor::cat(&[tensor, tensor, tensor], 1)?.narrow(1, cols, cols)
    };
    let views = (wide(x)?, wide(&pair.ids)?, wide(weights)?);
    assert!(!views.0.is_contiguous());
    assert_same_bits("views", &pair.gpu.forward(&views.0, &views.1, &views.2)?, &expected)?;
    for (first, tokens) in [(0, 0), (0, 1), (69, 1), (3, 17), (1, 69)] {
        let part = |tensor: &Tensor| tensor.narrow(0, first, tokens);
        let actual = pair.gpu.forward(&part(x)?, &part(&pair.ids)?, &part(weights)?)?;
        let expected = part(&expected)?.contiguous()?;
        assert_same_bits(&format!("{tokens} tokens from {first} on"), &actual, &expected)?;
    }
    Ok(())
}

#[test]
fn bad_ids_are_reported_once_and_what_does_not_fit_is_refused() -> Result<()> {
    let Some(gpu) = gpu() else { return Ok(()) };
    let pair = pair(&gpu, 7, SIZES)?;
    let (x, ids, weights) = (&pair.x, &pair.ids, &pair.weights);
    let bad = Tensor::full(8u32, (70, 4), &gpu)?;
    pair.gpu.forward(x, &bad, weights)?;
    let error = pair.gpu.check().unwrap_err().to_string();
    assert!(error.contains("topk_ids[") && error.contains("expected an id below 8"), "{error}");
    pair.gpu.check()?;
    let refused = |result: Result<Tensor>, part: &str| {
        let error = result.unwrap_err().to_string();
        assert!(error.contains(part), "{error:?} without {part:?}");
    };
    refused(pair.gpu.forward(&x.to_dtype(DType::F32)?, ids, weights), "hidden_states");
    refused(pair.gpu.forward(&x.t()?.contiguous()?.t()?, ids, weights), "hidden_states");
    refused(pair.gpu.forward(x, &ids.to_device(&Device::Cpu)?, weights), "topk_ids is on Cpu");
    refused(pair.cpu.forward(x, ids, weights), "hidden_states is on Cuda");
    let turned = Weights::bf16(&pair.case.w13.to_dtype(DType::BF16)?.to_device(&gpu)?.transpose(1, 2)?, &pair.x);
    assert!(turned.is_err());
    let config = LayerConfig { input: Dtype::F32, ..pair.case.config() };
    let there = |tensor: &Tensor| tensor.to_dtype(DType::BF16)?.to_device(&gpu);
    let error = Layer::prepare(Weights::bf16(&there(&pair.case.w13)?, &there(&pair.case.w2)?)?, config, 70);
    assert!(error.unwrap_err().to_string().contains("hidden_states"));
    pair.gpu.forward(x, ids, weights)?;
    pair.gpu.check()
}

#[test]
fn calls_from_several_threads_have_the_same_bits() -> Result<()> {
    let Some(gpu) = gpu() else { return Ok(()) };
    let pair = pair(&gpu, 8, SIZES)?;
    let expected = pair.gpu.forward(&pair.x, &pair.ids, &pair.weights)?;
    gpu.synchronize()?;
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4)
            .map(|_| {
                scope.spawn(|| -> Result<()> {
                    for _ in 0..50 {
                        let actual = pair.gpu.forward(&pair.x, &pair.ids, &pair.weights)?;
                        assert_same_bits("from another thread", &actual, &expected)?;
                    }
                    pair.gpu.check()
                })
            })
            .collect();
        threads.into_iter().try_for_each(|thread| thread.join().unwrap())
    })
}
