//! What does not fit is candle's error, and names the argument, its value and what was expected.

use crate::support::{Case, SMALL, e4m3};
use candle_core::{DType, Device, Result, Tensor};
use expertile_candle::{ActivationFormat, Dtype, Layer, LayerConfig, Weights};

/// Fails unless the message has all of these parts.
fn assert_says<T: std::fmt::Debug>(result: Result<T>, parts: &[&str]) {
    let error = result.unwrap_err().to_string();
    for part in parts {
        assert!(error.contains(part), "{error:?} without {part:?}");
    }
}

#[test]
fn operands_that_do_not_fit_are_refused() -> Result<()> {
    let case = Case::new(31, SMALL)?;
    let layer = case.layer(Dtype::F32)?;
    let Case { x, ids, weights, .. } = &case;
    let call = |x: &Tensor, ids: &Tensor, weights: &Tensor| layer.forward(x, ids, weights);
    let cpu = &Device::Cpu;

    assert_says(call(&x.to_dtype(DType::BF16)?, ids, weights), &["hidden_states", "F32", "BF16"]);
    assert_says(call(&x.to_dtype(DType::F64)?, ids, weights), &["hidden_states", "F32", "F64"]);
    assert_says(call(x, ids, &weights.to_dtype(DType::F16)?), &["topk_weights", "F32", "F16"]);
    assert_says(call(x, &weights.contiguous()?, weights), &["topk_ids is F32, expected U32 or I32"]);
    let long = ids.contiguous()?.to_dtype(DType::I64)?;
    assert_says(call(x, &long, weights), &["topk_ids is I64, expected U32 or I32, as prepared"]);

    assert_says(call(&x.narrow(1, 0, 95)?, ids, weights), &["hidden_states", "[7, 96]", "[7, 95]"]);
    assert_says(call(&x.unsqueeze(0)?, ids, weights), &["hidden_states", "[1, 96]", "[1, 7, 96]"]);
    assert_says(call(&x.flatten_all()?, ids, weights), &["hidden_states", "[672, 96]", "[672]"]);
    assert_says(call(&Tensor::new(1f32, cpu)?, ids, weights), &["hidden_states is a scalar, expected [M, 96]"]);
    assert_says(call(x, &ids.narrow(1, 0, 2)?, weights), &["topk_ids", "[7, 3]", "[7, 2]"]);
    assert_says(call(x, &ids.narrow(0, 0, 6)?, weights), &["topk_ids", "[7, 3]", "[6, 3]"]);
    assert_says(call(x, ids, &weights.flatten_all()?), &["topk_weights", "[7, 3]", "[21]"]);

    let twice = |tensor: &Tensor| Tensor::cat(&[tensor, tensor], 0);
    let many = call(&twice(x)?, &twice(ids)?, &twice(weights)?);
    assert_says(many, &["tokens is 14, expected at most 7, as prepared"]);
    Ok(())
}

#[test]
fn ids_that_are_no_experts_are_refused_with_their_place() -> Result<()> {
    let case = Case::new(32, SMALL)?;
    let with = |id: i64, dtype: DType| -> Result<Tensor> {
        let id = Tensor::full(id, (1, 1), &Device::Cpu)?.to_dtype(dtype)?;
        case.ids.contiguous()?.to_dtype(dtype)?.slice_assign(&[4..5, 1..2], &id)
    };
    let layer = case.layer(Dtype::F32)?;
    let config = LayerConfig { ids: Dtype::I64, ..*layer.config() };
    let of_i64 = Layer::prepare(case.bf16_weights()?, config, 7)?;
    for (layer, id, dtype) in [
        (&layer, 6, DType::U32),
        (&layer, 6, DType::I32),
        (&layer, 1 << 31, DType::U32),
        (&layer, u32::MAX.into(), DType::U32),
        (&of_i64, 1 << 40, DType::I64),
    ] {
        let result = layer.forward(&case.x, &with(id, dtype)?, &case.weights);
        assert_says(result, &["topk_ids[4, 1]", &format!(" {id},"), "expected an id below 6"]);
    }
    // The layer is as good as before.
    layer.forward(&case.x, &case.ids, &case.weights)?;
    Ok(())
}

#[test]
fn weights_that_do_not_fit_are_refused() -> Result<()> {
    let case = Case::new(34, SMALL)?;
    let Case { w13, w2, .. } = &case;
    assert_says(Weights::bf16(&w13.get(0)?, w2), &["w13 is [80, 96], expected [E, 2 I, H]"]);
    assert_says(Weights::bf16(w13, &w2.narrow(0, 0, 5)?), &["w13", "[6, 80, 96]", "[5, 80, 96]"]);
    assert_says(Weights::bf16(&w13.narrow(1, 0, 79)?, w2), &["w13", "[6, 79, 96]", "[6, 80, 96]"]);
    assert_says(Weights::bf16(&w13.to_dtype(DType::F64)?, w2), &["w13 is F64, expected BF16"]);
    assert_says(Weights::bf16(w13, &w2.to_dtype(DType::F8E4M3)?), &["w2 is F8E4M3, expected BF16"]);
    assert_says(Weights::bf16(&(w13 + 1e-7)?, w2), &["w13[.., 0, 0] is ", "expected a value that bf16 holds"]);
    let f16 = Tensor::full(1.000_976_6f32, w2.shape(), &Device::Cpu)?.to_dtype(DType::F16)?;
    assert_says(Weights::bf16(w13, &f16), &["w2[.., 0, 0] is 1.0009766, expected a value that bf16 holds"]);

    let ((q13, s13, _), (q2, s2, _)) = (e4m3(w13)?, e4m3(w2)?);
    let odd = Weights::e4m3(&q13, &s13, &q2, &s2);
    assert_says(odd, &["w13_scales is of I = 40, expected a multiple of 128"]);
    let case = Case::new(35, crate::support::Sizes { hidden: 256, intermediate: 128, ..SMALL })?;
    let ((q13, s13, _), (q2, s2, _)) = (e4m3(&case.w13)?, e4m3(&case.w2)?);
    assert_says(Weights::e4m3(&q13, &s13, &case.w2, &s2), &["w2", "F8E4M3", "F32"]);
    assert_says(Weights::e4m3(&q13, &s2, &q2, &s2), &["w13_scales", "[6, 2, 2]", "[6, 2, 1]"]);
    assert_says(Weights::e4m3(&q13, &s13, &q2, &s2.get(0)?), &["w2_scales", "[6, 2, 1]", "[2, 1]"]);
    let scales = s2.to_dtype(DType::U8)?;
    assert_says(Weights::e4m3(&q13, &s13, &q2, &scales), &["w2_scales is U8, expected F32, BF16 or F16"]);
    Ok(())
}

#[test]
fn configurations_that_do_not_fit_are_refused() -> Result<()> {
    let case = Case::new(36, SMALL)?;
    let prepare = |config, max_tokens| Layer::prepare(case.bf16_weights()?, config, max_tokens);
    let usual = case.config();
    let more = LayerConfig { global_experts: 12, ..usual };
    assert_says(prepare(more, 7), &["global_experts is 12, expected 6, the experts of the weights"]);
    assert_says(prepare(LayerConfig { topk: 0, ..usual }, 7), &["topk", "0", "at least 1"]);
    assert_says(prepare(usual, 0), &["max_tokens", "0"]);
    assert_says(prepare(LayerConfig { input: Dtype::I32, ..usual }, 7), &["hidden_states", "i32"]);
    let e4m3 = LayerConfig { activation_format: ActivationFormat::E4m3, ..usual };
    assert_says(prepare(e4m3, 7), &["bf16", "e4m3"]);
    let ungated = LayerConfig { activation: expertile_candle::Activation::Relu2, ..usual };
    assert_says(prepare(ungated, 7), &["w13", "[6, 40, 96]"]);
    Ok(())
}
