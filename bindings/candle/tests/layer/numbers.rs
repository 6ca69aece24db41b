//! Numbers: against candle's operators, for every type, view and company.

use crate::support::{Case, SMALL, Sizes, assert_close, assert_same_bits, e4m3, experts_of_candle, values};
use candle_core::{D, DType, Device, Result, Tensor, Var};
use expertile_candle::{ActivationFormat, Dtype, Layer, LayerConfig, Weights};
use rayon::prelude::*;

/// What two roundings to bf16 (rows, and activated rows) cost at most.
const BF16: f64 = 2e-5;
/// The same for e4m3.
const E4M3: f64 = 2e-3;

const TYPES: [(Dtype, DType); 3] = [(Dtype::Bf16, DType::BF16), (Dtype::F16, DType::F16), (Dtype::F32, DType::F32)];

#[test]
fn bf16_experts_agree_with_candles_operators_for_every_type_and_topk() -> Result<()> {
    for topk in 1..=8 {
        for (tokens, experts, hidden, intermediate) in [(1, 8, 64, 32), (7, 9, 96, 40), (33, 8, 130, 66)] {
            let case = Case::new(topk as u64, Sizes { tokens, topk, experts, hidden, intermediate })?;
            let expected = case.reference()?;
            for (input, x) in TYPES {
                for (output, result) in TYPES {
                    let config = LayerConfig { input, output, ..case.config() };
                    let layer = Layer::prepare(case.bf16_weights()?, config, tokens)?;
                    let actual = layer.forward(&case.x.to_dtype(x)?, &case.ids, &case.weights)?;
                    assert_eq!((actual.dtype(), actual.is_contiguous()), (result, true));
                    let what = format!("{:?}, {x:?} to {result:?}", case.sizes);
                    assert_close(&what, &actual, &expected, BF16)?;
                }
            }
        }
    }
    Ok(())
}

#[test]
fn e4m3_experts_agree_with_candles_operators_on_what_the_weights_stand_for() -> Result<()> {
    for (hidden, intermediate, format, limit) in [
        (256, 128, ActivationFormat::E4m3, E4M3),
        (384, 256, ActivationFormat::E4m3, E4M3),
        (200, 128, ActivationFormat::Bf16, BF16),
    ] {
        let case = Case::new(3, Sizes { tokens: 9, topk: 2, experts: 4, hidden, intermediate })?;
        let ((w13, w13_scales, meant13), (w2, w2_scales, meant2)) = (e4m3(&case.w13)?, e4m3(&case.w2)?);
        let config = LayerConfig::new(2, 4, format);
        let layer = Layer::prepare(Weights::e4m3(&w13, &w13_scales, &w2, &w2_scales)?, config, 9)?;
        let actual = layer.forward(&case.x.to_dtype(DType::BF16)?, &case.ids, &case.weights)?;
        let expected = experts_of_candle(&meant13, &meant2, &case.x, &case.ids, &case.weights)?;
        assert_close(&format!("H {hidden}, I {intermediate}, {format:?}"), &actual, &expected, limit)?;
    }
    Ok(())
}

#[test]
fn f32_and_f16_weights_that_bf16_holds_are_the_same_weights() -> Result<()> {
    let case = Case::new(4, SMALL)?;
    let expected = case.layer(Dtype::F32)?.forward(&case.x, &case.ids, &case.weights)?;
    let config = *case.layer(Dtype::F32)?.config();
    // f16 holds fewer exponents: powers of two near 1 are in both.
    let layer = Layer::prepare(Weights::bf16(&case.w13, &case.w2)?, config, 7)?;
    assert_same_bits("F32", &layer.forward(&case.x, &case.ids, &case.weights)?, &expected)?;
    let eighths = |weights: &Tensor| ((weights * 64.0)?.round()? / 8.0)?.clamp(-8.0, 8.0);
    let (w13, w2) = (eighths(&case.w13)?, eighths(&case.w2)?);
    let of = |dtype| -> Result<Tensor> {
        let layer = Layer::prepare(Weights::bf16(&w13.to_dtype(dtype)?, &w2.to_dtype(dtype)?)?, config, 7)?;
        layer.forward(&case.x, &case.ids, &case.weights)
    };
    assert_same_bits("F16", &of(DType::F16)?, &of(DType::BF16)?)
}

#[test]
fn an_empty_batch_gives_an_empty_result() -> Result<()> {
    let case = Case::new(5, Sizes { tokens: 0, ..SMALL })?;
    for (dtype, x) in TYPES {
        let result = case.layer(dtype)?.forward(&case.x.to_dtype(x)?, &case.ids, &case.weights)?;
        assert_eq!((result.dims(), result.dtype()), (&[0, SMALL.hidden][..], x));
    }
    Ok(())
}

#[test]
fn ids_of_every_type_mean_the_same_and_a_negative_one_is_an_empty_slot() -> Result<()> {
    let case = Case::new(6, SMALL)?;
    let expected = case.layer(Dtype::F32)?.forward(&case.x, &case.ids, &case.weights)?;
    let signed = |dtype| case.ids.contiguous()?.to_dtype(dtype);
    let layer = case.layer(Dtype::F32)?;
    assert_same_bits("I32", &layer.forward(&case.x, &signed(DType::I32)?, &case.weights)?, &expected)?;
    let config = LayerConfig { ids: Dtype::I64, ..*layer.config() };
    let layer = Layer::prepare(case.bf16_weights()?, config, 7)?;
    let ids = signed(DType::I64)?;
    assert_same_bits("I64", &layer.forward(&case.x, &ids, &case.weights)?, &expected)?;

    // The last slot of each token is empty: as if its weight were zero.
    let empty = Tensor::full(-1i64, (7, 1), &Device::Cpu)?;
    let ids = Tensor::cat(&[&ids.narrow(1, 0, 2)?, &empty], 1)?;
    let without = Tensor::cat(&[&case.weights.narrow(1, 0, 2)?, &case.weights.narrow(1, 2, 1)?.zeros_like()?], 1)?;
    let expected = experts_of_candle(&case.w13, &case.w2, &case.x, &case.ids, &without)?;
    assert_close("an empty slot", &layer.forward(&case.x, &ids, &case.weights)?, &expected, BF16)
}

#[test]
fn views_are_read_where_they_are() -> Result<()> {
    let case = Case::new(7, SMALL)?;
    let layer = case.layer(Dtype::F32)?;
    let (x, ids, weights) = (case.x.contiguous()?, case.ids.contiguous()?, case.weights.contiguous()?);
    let expected = layer.forward(&x, &ids, &weights)?;
    // NaN and ids that are no expert's around what is looked at.
    let within = |tensor: &Tensor, around: f64| -> Result<Tensor> {
        let (rows, cols) = tensor.dims2()?;
        let around = Tensor::full(around as f32, (rows + 5, cols + 9), &Device::Cpu)?.to_dtype(tensor.dtype())?;
        around.slice_assign(&[2..rows + 2, 4..cols + 4], tensor)?.narrow(0, 2, rows)?.narrow(1, 4, cols)
    };
    let transposed = |tensor: &Tensor| tensor.t()?.contiguous()?.t();
    let inside = (within(&x, f64::NAN)?, within(&ids, 1e6)?, within(&weights, f64::NAN)?);
    assert!(!inside.0.is_contiguous() && inside.0.layout().start_offset() > 0);
    assert_same_bits("with an offset", &layer.forward(&inside.0, &inside.1, &inside.2)?, &expected)?;
    let turned = (transposed(&x)?, transposed(&ids)?, transposed(&weights)?);
    assert_eq!(turned.0.stride(), &[1, 7]);
    assert_same_bits("transposed", &layer.forward(&turned.0, &turned.1, &turned.2)?, &expected)?;

    // One row for all: a stride of zero.
    let (x, ids, weights) = (x.get(0)?, ids.get(0)?, weights.get(0)?);
    let all = layer.forward(&x.broadcast_as((7, 96))?, &ids.broadcast_as((7, 3))?, &weights.broadcast_as((7, 3))?)?;
    assert_same_bits("broadcast", &all, &expected.get(0)?.broadcast_as((7, 96))?.contiguous()?)?;

    // Weights, too.
    let views = Weights::bf16(&within_stack(&case.w13)?, &case.w2.transpose(1, 2)?.contiguous()?.transpose(1, 2)?)?;
    let layer = Layer::prepare(views, *layer.config(), 7)?;
    assert_same_bits("weights", &layer.forward(&case.x, &case.ids, &case.weights)?, &expected)
}

/// The same stack as a view of a larger one.
fn within_stack(stack: &Tensor) -> Result<Tensor> {
    let (experts, rows, cols) = stack.dims3()?;
    let around = Tensor::full(f32::NAN, (experts + 1, rows, cols + 3), &Device::Cpu)?;
    around.slice_assign(&[1..experts + 1, 0..rows, 2..cols + 2], stack)?.narrow(0, 1, experts)?.narrow(2, 2, cols)
}

#[test]
fn a_tokens_bits_do_not_depend_on_its_company() -> Result<()> {
    let case = Case::new(8, Sizes { tokens: 67, topk: 4, experts: 5, hidden: 160, intermediate: 72 })?;
    let layer = case.layer(Dtype::Bf16)?;
    let x = case.x.to_dtype(DType::BF16)?;
    let all = layer.forward(&x, &case.ids, &case.weights)?;
    for (first, tokens) in [(0, 1), (66, 1), (5, 2), (11, 12), (13, 33), (1, 66)] {
        let part = |tensor: &Tensor| tensor.narrow(0, first, tokens);
        let actual = layer.forward(&part(&x)?, &part(&case.ids)?, &part(&case.weights)?)?;
        assert_same_bits(&format!("{tokens} tokens from {first} on"), &actual, &part(&all)?.contiguous()?)?;
    }
    Ok(())
}

#[test]
fn calls_from_many_threads_at_once_have_the_same_bits() -> Result<()> {
    let case = Case::new(9, Sizes { tokens: 40, ..SMALL })?;
    let layer = case.layer(Dtype::F32)?;
    let expected = values(&layer.forward(&case.x, &case.ids, &case.weights)?)?;
    // Calls of different sizes, so that workspaces grow; on rayon's threads, which the calls themselves use.
    let wrong = (0..64usize).into_par_iter().filter(|&call| {
        let (tokens, layer) = (1 + call % 40, layer.clone());
        let part = |tensor: &Tensor| tensor.narrow(0, 0, tokens).unwrap();
        let actual = layer.forward(&part(&case.x), &part(&case.ids), &part(&case.weights)).unwrap();
        values(&actual).unwrap() != expected[..tokens]
    });
    assert_eq!(wrong.count(), 0);
    Ok(())
}

#[test]
fn it_is_an_operator_without_a_backward_pass_and_says_so() -> Result<()> {
    let case = Case::new(10, SMALL)?;
    let layer = case.layer(Dtype::F32)?;
    let expected = layer.forward(&case.x, &case.ids, &case.weights)?;
    let actual = case.x.apply_op3_no_bwd(&case.ids, &case.weights, &layer)?;
    assert_same_bits("as an operator", &actual, &expected)?;
    let x = Var::from_tensor(&case.x)?;
    let error = layer.forward(&x, &case.ids, &case.weights)?.sum_all()?.backward().unwrap_err();
    assert!(error.to_string().contains("expertile"), "{error}");
    Ok(())
}

#[test]
fn a_layer_without_a_gate_is_seen_by_its_shape() -> Result<()> {
    let case = Case::new(11, SMALL)?;
    let w13 = case.w13.narrow(1, 0, SMALL.intermediate)?;
    let activation = expertile_candle::Activation::Relu2;
    let config = LayerConfig { input: Dtype::F32, output: Dtype::F32, activation, ..case.config() };
    let layer = Layer::prepare(Weights::bf16(&w13, &case.w2)?, config, 7)?;
    let actual = layer.forward(&case.x, &case.ids, &case.weights)?;
    let all: Vec<Tensor> = (0..6)
        .map(|expert| {
            let rows = case.x.matmul(&w13.get(expert)?.t()?)?.relu()?.sqr()?;
            rows.matmul(&case.w2.get(expert)?.t()?)
        })
        .collect::<Result<_>>()?;
    let all = Tensor::stack(&all, 1)?;
    let ids = case.ids.contiguous()?.unsqueeze(2)?.broadcast_as((7, 3, 96))?.contiguous()?;
    let expected = all.gather(&ids, 1)?.broadcast_mul(&case.weights.unsqueeze(D::Minus1)?)?.sum(1)?;
    assert_close("relu2", &actual, &expected, BF16)
}
