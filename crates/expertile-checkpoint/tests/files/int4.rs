//! int4 weights: packed matrices of their own, eight values to a word.

use crate::checkpoints::{SIZES, read, refuse, weights};
use crate::made_up::{Model, NewTensor};
use expertile::cpu::Cpu;
use expertile::{WeightFormat, int4};
use half::{bf16, f16};
use safetensors::Dtype;
use serde_json::{Value, json};

/// A model whose experts are `weight_packed`, `weight_scale` and `weight_shape`, and what their rows stand for. Words are
/// put together as compressed-tensors does: value `i` of eight in bits `4 i..`, 8 added to it.
fn packed(scales_are_f16: bool) -> (Model, Vec<Vec<f64>>) {
    let mut model = Model::new("qwen3_moe", SIZES, false);
    let mut meant = model.clone();
    let mut tensors = Vec::new();
    for (tensor, meant) in model.tensors.drain(..).zip(&mut meant.tensors) {
        if !tensor.name.contains("experts") {
            tensors.push(tensor);
            continue;
        }
        let [rows, cols] = [tensor.shape[0], tensor.shape[1]];
        let values: Vec<f32> =
            tensor.bytes.as_chunks::<2>().0.iter().map(|&bytes| bf16::from_le_bytes(bytes).to_f32()).collect();
        let (mut words, mut scales, mut stands_for) = (Vec::new(), Vec::new(), Vec::new());
        for group in values.chunks(32) {
            let amax = group.iter().fold(0f32, |most, value| most.max(value.abs()));
            // A power of two, so that what it stands for is exact in bf16.
            let scale = (amax / 7.0).log2().ceil().exp2();
            scales.push(scale);
            let numbers: Vec<i32> = group.iter().map(|value| (value / scale).round().clamp(-8.0, 7.0) as i32).collect();
            stands_for.extend(numbers.iter().map(|&number| bf16::from_f32(number as f32 * scale)));
            for eight in numbers.chunks(8) {
                let word =
                    eight.iter().enumerate().fold(0u32, |word, (at, &number)| word | ((number + 8) as u32) << (4 * at));
                words.extend(word.to_le_bytes());
            }
        }
        let (dtype, bytes) = if scales_are_f16 {
            (Dtype::F16, scales.iter().flat_map(|&scale| f16::from_f32(scale).to_le_bytes()).collect())
        } else {
            (Dtype::BF16, scales.iter().flat_map(|&scale| bf16::from_f32(scale).to_le_bytes()).collect())
        };
        let name = &tensor.name;
        let shape: Vec<u8> = [rows, cols].into_iter().flat_map(|extent| (extent as i64).to_le_bytes()).collect();
        let mut add = |ending: &str, dtype, shape: &[usize], bytes| {
            tensors.push(NewTensor { name: format!("{name}{ending}"), dtype, shape: shape.to_vec(), bytes });
        };
        add("_packed", Dtype::I32, &[rows, cols / 8], words);
        add("_scale", dtype, &[rows, cols / 32], bytes);
        add("_shape", Dtype::I64, &[2], shape);
        meant.bytes = stands_for.into_iter().flat_map(bf16::to_le_bytes).collect();
    }
    model.tensors = tensors;
    model.config["quantization_config"] = json!({
        "quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head", "re:.*self_attn.*"],
        "config_groups": {"group_0": {
            "targets": ["Linear"], "input_activations": null, "output_activations": null,
            "weights": {
                "num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": true,
                "dynamic": false, "actorder": null, "block_structure": null, "observer": "minmax"
            }
        }}
    });
    (model, weights(&meant).0)
}

#[test]
fn packed_integers_read_as_what_they_stand_for() {
    for scales_are_f16 in [false, true] {
        let (model, expected) = packed(scales_are_f16);
        assert_eq!(weights(&model), (expected, "INT4"));
        read(&model, |layer| {
            assert_eq!((layer.weight_format(), layer.weights_are_rounded()), (WeightFormat::Int4, false));
            let (w13, _) = layer.load(&Cpu::new(), &mut |_| {}).unwrap();
            assert_eq!((w13.format(), w13.k()), (WeightFormat::Int4, SIZES.hidden));
            let mut blocks = vec![0; SIZES.hidden / 2];
            w13.unpack_int4_rows(&Cpu::new(), 2, 1, &mut blocks).unwrap();
            let words = model.tensors.iter().find(|tensor| tensor.name.ends_with("2.gate_proj.weight_packed")).unwrap();
            assert_eq!(blocks, words.bytes[SIZES.hidden / 2..][..SIZES.hidden / 2]);
            assert_eq!(int4::decode(words.bytes[0], 1.0), f32::from(words.bytes[0] & 15) - 8.0);
        });
    }
}

#[test]
fn packed_integers_that_do_not_fit_are_named() {
    let (good, _) = packed(false);
    let says = |message: String, parts: &[&str]| {
        assert!(parts.iter().all(|part| message.contains(part)), "{message}, expected {parts:?}");
    };
    let group = "/config_groups/group_0";
    for (path, value, key) in [
        ("/format", json!("marlin-24"), "quantization_config.format is \"marlin-24\""),
        ("/quant_method", json!("gptq"), "quantization_config.quant_method is \"gptq\""),
        (&format!("{group}/weights/num_bits"), json!(8), "num_bits is 8, expected 4"),
        (&format!("{group}/weights/group_size"), json!(128), "group_size is 128, expected 32"),
        (&format!("{group}/weights/type"), json!("float"), "weights.type is \"float\""),
        (&format!("{group}/weights/symmetric"), json!(false), "weights.symmetric is false, expected true"),
        (&format!("{group}/weights/strategy"), json!("channel"), "weights.strategy is \"channel\""),
        (&format!("{group}/input_activations"), json!({"num_bits": 4}), "input_activations.num_bits is 4"),
    ] {
        let mut model = good.clone();
        let place: &mut Value = model.config.pointer_mut(&format!("/quantization_config{path}")).unwrap();
        *place = value;
        says(refuse(&model), &[key]);
    }
    let changed = |ending: &str, change: &dyn Fn(&mut NewTensor)| {
        let mut model = good.clone();
        change(model.tensor_mut(ending));
        refuse(&model)
    };
    let packed = "experts.1.up_proj.weight_packed";
    says(changed(packed, &|tensor| tensor.dtype = Dtype::U32), &[packed, "U32", "I32"]);
    says(changed(packed, &|tensor| tensor.shape = vec![32, 192]), &[packed, "[32, 192]", "[192, 32]"]);
    let scale = "experts.3.down_proj.weight_scale";
    says(changed(scale, &|tensor| tensor.shape = vec![256 * 6]), &[scale, "[1536]", "[256, 6]"]);
    let f32_scales = |tensor: &mut NewTensor| {
        tensor.dtype = Dtype::F32;
        tensor.bytes.extend(tensor.bytes.clone());
    };
    says(changed(scale, &f32_scales), &[scale, "F32", "BF16 or F16"]);
    let shape = "experts.0.gate_proj.weight_shape";
    says(changed(shape, &|tensor| tensor.bytes[0] ^= 1), &[shape, "expected [192, 256] in it"]);
    let mut model = good.clone();
    model.tensors.retain(|tensor| !tensor.name.ends_with(scale));
    says(refuse(&model), &[scale, "is missing"]);
    // What would change the numbers: zero points, and an order of the inputs.
    for ending in ["weight_zero_point", "weight_g_idx"] {
        let mut model = good.clone();
        let mut other = model.tensor_mut(shape).clone();
        other.name = other.name.replace("weight_shape", ending);
        model.tensors.push(other);
        says(refuse(&model), &[ending, "is not known"]);
    }
    // What only packing looks at.
    let mut nan = good;
    let last = nan.tensor_mut(scale);
    let at = last.bytes.len() - 2;
    last.bytes[at..].copy_from_slice(&bf16::NAN.to_le_bytes());
    read(&nan, |layer| {
        let error = layer.load(&Cpu::new(), &mut |_| {}).unwrap_err();
        let message = format!("{error}: {}", std::error::Error::source(&error).unwrap());
        says(message, &["down of expert 3", "expected the bits of a finite bf16", "row 255, group 5"]);
    });
}
