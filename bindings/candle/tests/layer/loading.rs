//! Weights by the names of a checkpoint.

use crate::support::{Case, SMALL, Sizes, assert_same_bits, e4m3};
use candle_core::{DType, Device, Result, Tensor};
use candle_nn::VarBuilder;
use expertile_candle::{ActivationFormat, Dtype, Layer, LayerConfig, LayerShape, WeightFormat, Weights};
use std::collections::HashMap;

/// The matrices of stacked weights by their names.
fn named(w13: &Tensor, w2: &Tensor, suffix: &str) -> Result<HashMap<String, Tensor>> {
    let mut all = HashMap::new();
    for expert in 0..w13.dim(0)? {
        let halves = w13.get(expert)?.chunk(2, 0)?;
        let parts = [("gate_proj", halves[0].clone()), ("up_proj", halves[1].clone()), ("down_proj", w2.get(expert)?)];
        all.extend(parts.map(|(name, tensor)| (format!("mlp.experts.{expert}.{name}.{suffix}"), tensor)));
    }
    Ok(all)
}

fn builder(tensors: HashMap<String, Tensor>, dtype: DType) -> VarBuilder<'static> {
    VarBuilder::from_tensors(tensors, dtype, &Device::Cpu).pp("mlp").pp("experts")
}

#[test]
fn weights_by_name_are_the_stacked_ones() -> Result<()> {
    let case = Case::new(21, SMALL)?;
    let layer = case.layer(Dtype::F32)?;
    let expected = layer.forward(&case.x, &case.ids, &case.weights)?;
    let shape = LayerShape::new(SMALL.hidden, SMALL.intermediate, SMALL.experts).unwrap();
    for dtype in [DType::BF16, DType::F32] {
        let weights = Weights::load(&builder(named(&case.w13, &case.w2, "weight")?, dtype), &shape)?;
        assert_eq!((weights.shape(), weights.format()), (&shape, WeightFormat::Bf16));
        let loaded = Layer::prepare(weights, *layer.config(), 7)?;
        assert_same_bits("loaded", &loaded.forward(&case.x, &case.ids, &case.weights)?, &expected)?;
    }
    Ok(())
}

#[test]
fn e4m3_weights_by_name_are_the_stacked_ones() -> Result<()> {
    let case = Case::new(22, Sizes { hidden: 256, intermediate: 128, ..SMALL })?;
    let ((w13, w13_scales, _), (w2, w2_scales, _)) = (e4m3(&case.w13)?, e4m3(&case.w2)?);
    let config = LayerConfig { input: Dtype::F32, ..LayerConfig::new(3, 6, ActivationFormat::E4m3) };
    let stacked = Layer::prepare(Weights::e4m3(&w13, &w13_scales, &w2, &w2_scales)?, config, 7)?;
    let expected = stacked.forward(&case.x, &case.ids, &case.weights)?;

    let mut tensors = named(&w13, &w2, "weight")?;
    tensors.extend(named(&w13_scales, &w2_scales, "weight_scale_inv")?);
    let weights = Weights::load(&builder(tensors, DType::BF16), &LayerShape::new(256, 128, 6).unwrap())?;
    assert_eq!(weights.format(), WeightFormat::E4m3);
    let loaded = Layer::prepare(weights, config, 7)?;
    assert_same_bits("loaded", &loaded.forward(&case.x, &case.ids, &case.weights)?, &expected)
}

#[test]
fn what_would_change_the_numbers_is_refused_by_name() -> Result<()> {
    let case = Case::new(23, SMALL)?;
    let shape = LayerShape::new(SMALL.hidden, SMALL.intermediate, SMALL.experts).unwrap();
    let refusal = |change: &dyn Fn(&mut HashMap<String, Tensor>)| -> Result<String> {
        let mut tensors = named(&case.w13, &case.w2, "weight")?;
        change(&mut tensors);
        Ok(Weights::load(&builder(tensors, DType::F32), &shape).unwrap_err().to_string())
    };
    let one = Tensor::new(&[0.1f32], &Device::Cpu)?;
    for name in ["4.up_proj.bias", "5.down_proj.weight_scale", "0.gate_proj.input_scale"] {
        let error = refusal(&|tensors| drop(tensors.insert(format!("mlp.experts.{name}"), one.clone())))?;
        assert!(error.contains(&format!("mlp.experts.{name} is there, expected")), "{error}");
    }
    let error = refusal(&|tensors| drop(tensors.remove("mlp.experts.3.down_proj.weight")))?;
    assert!(error.contains("mlp.experts.3.down_proj.weight"), "{error}");
    let error = refusal(&|tensors| drop(tensors.insert("mlp.experts.2.up_proj.weight".into(), one.clone())))?;
    assert!(error.contains("mlp.experts.2.up_proj.weight") && error.contains("[1]"), "{error}");
    let inexact = (&case.w2.get(1)? + 1e-6)?;
    let error = refusal(&|tensors| drop(tensors.insert("mlp.experts.1.down_proj.weight".into(), inexact.clone())))?;
    assert!(error.contains("down_proj[.., 0, 0] is ") && error.contains("expected a value that bf16 holds"), "{error}");
    Ok(())
}
