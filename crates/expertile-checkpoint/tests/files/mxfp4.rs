//! MXFP4 weights: gpt-oss's blocks of all experts, packed matrices of their own, and DeepSeek-V4's.

use crate::checkpoints::{SIZES, read, refuse, weights};
use crate::made_up::{LAYER, Model, NewTensor};
use expertile::cpu::Cpu;
use expertile::{Activation, Scoring, WeightFormat, mxfp4};
use half::bf16;
use safetensors::Dtype;
use serde_json::{Value, json};

/// Blocks and scales of a bf16 matrix `[rows, cols]`.
fn quantized(tensor: &NewTensor) -> (Vec<u8>, Vec<u8>) {
    let values: Vec<f32> =
        tensor.bytes.as_chunks::<2>().0.iter().map(|&bytes| bf16::from_le_bytes(bytes).to_f32()).collect();
    let (mut blocks, mut scales) = (vec![0; values.len() / 2], vec![0; values.len() / 32]);
    mxfp4::quantize_rows(&values, tensor.shape[1], &mut blocks, &mut scales).unwrap();
    (blocks, scales)
}

fn u8s(name: String, shape: Vec<usize>, bytes: Vec<u8>) -> NewTensor {
    NewTensor { name, dtype: Dtype::U8, shape, bytes }
}

/// The model with experts in bf16, and what its experts' rows are once they are MXFP4.
fn base() -> (Model, Vec<Vec<f64>>) {
    let model = Model::new("qwen3_moe", SIZES, false);
    let mut rounded = model.clone();
    for tensor in rounded.tensors.iter_mut().filter(|tensor| tensor.name.contains("experts")) {
        let (blocks, scales) = quantized(tensor);
        let mut values = vec![0.0; blocks.len() * 2];
        mxfp4::decode_rows(&blocks, &scales, tensor.shape[1], &mut values).unwrap();
        // Exact: e2m1 has fewer digits than bf16.
        tensor.bytes = values.into_iter().flat_map(|value| bf16::from_f32(value).to_le_bytes()).collect();
    }
    (model, weights(&rounded).0)
}

/// `mlp.experts.<name>_blocks` and `_scales` of these matrices of every expert, their rows taken in turns.
fn fused(model: &mut Model, parts: &[&str], name: &str) -> [NewTensor; 2] {
    let (mut blocks, mut scales) = (Vec::new(), Vec::new());
    let mut extents = [0, 0];
    for expert in 0..SIZES.experts {
        let tensors: Vec<NewTensor> =
            parts.iter().map(|part| model.tensor_mut(&format!("experts.{expert}.{part}.weight")).clone()).collect();
        let packed: Vec<_> = tensors.iter().map(quantized).collect();
        let [rows, cols] = [tensors[0].shape[0], tensors[0].shape[1]];
        extents = [rows * parts.len(), cols];
        for row in 0..rows {
            for (own_blocks, own_scales) in &packed {
                blocks.extend(&own_blocks[row * cols / 2..][..cols / 2]);
                scales.extend(&own_scales[row * cols / 32..][..cols / 32]);
            }
        }
    }
    let (rows, groups) = (extents[0], extents[1] / 32);
    let name = format!("model.layers.{LAYER}.mlp.experts.{name}");
    [
        u8s(format!("{name}_blocks"), vec![SIZES.experts, rows, groups, 16], blocks),
        u8s(format!("{name}_scales"), vec![SIZES.experts, rows, groups], scales),
    ]
}

/// gpt-oss as published, and its experts' rows.
fn gpt_oss() -> (Model, Vec<Vec<f64>>) {
    let (mut base, expected) = base();
    let tensors =
        [fused(&mut base, &["gate_proj", "up_proj"], "gate_up_proj"), fused(&mut base, &["down_proj"], "down_proj")];
    let mut model = base;
    model.tensors.retain(|tensor| !tensor.name.contains("experts"));
    model.tensor_mut("gate.weight").name = format!("model.layers.{LAYER}.mlp.router.weight");
    model.tensors.extend(tensors.into_iter().flatten());
    for (name, shape) in [
        ("router.bias", vec![SIZES.experts]),
        ("experts.gate_up_proj_bias", vec![SIZES.experts, 2 * SIZES.intermediate]),
        ("experts.down_proj_bias", vec![SIZES.experts, SIZES.hidden]),
    ] {
        let bytes = (0..shape.iter().product::<usize>()).flat_map(|at| (at as f32).to_le_bytes()).collect();
        let name = format!("model.layers.{LAYER}.mlp.{name}");
        model.tensors.push(NewTensor { name, dtype: Dtype::F32, shape, bytes });
    }
    model.config = json!({
        "model_type": "gpt_oss", "hidden_size": SIZES.hidden, "intermediate_size": SIZES.intermediate,
        "num_local_experts": SIZES.experts, "num_experts_per_tok": 2, "swiglu_limit": 7.0,
        "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    });
    (model, expected)
}

#[test]
fn blocks_of_all_experts_read_as_what_they_stand_for() {
    let (model, expected) = gpt_oss();
    assert_eq!(weights(&model), (expected, "MXFP4"));
    read(&model, |layer| {
        assert_eq!((layer.weight_format(), layer.weights_are_rounded()), (WeightFormat::Mxfp4, false));
        let (w13, w2) = layer.load(&Cpu::new(), &mut |_| {}).unwrap();
        assert_eq!((w13.format(), w13.n(), w2.k()), (WeightFormat::Mxfp4, 2 * SIZES.intermediate, SIZES.intermediate));
        // Gate's rows, then up's, bit for bit: expert 3's first of up is the second in the file.
        let (mut blocks, mut scales) = (vec![0; SIZES.hidden / 2], vec![0; SIZES.hidden / 32]);
        w13.unpack_mxfp4_rows(&Cpu::new(), 3, SIZES.intermediate, &mut blocks, &mut scales).unwrap();
        let tensor = |ending: &str| model.tensors.iter().find(|tensor| tensor.name.ends_with(ending)).unwrap();
        let row = 3 * 2 * SIZES.intermediate + 1;
        assert_eq!(blocks, tensor("gate_up_proj_blocks").bytes[row * SIZES.hidden / 2..][..SIZES.hidden / 2]);
        assert_eq!(scales, tensor("gate_up_proj_scales").bytes[row * SIZES.hidden / 32..][..SIZES.hidden / 32]);
    });
}

#[test]
fn blocks_that_do_not_fit_are_named() {
    let (good, _) = gpt_oss();
    let changed = |change: &dyn Fn(&mut Model)| {
        let mut model = good.clone();
        change(&mut model);
        refuse(&model)
    };
    let shape = |ending: &str, shape: &[usize]| changed(&|model| model.tensor_mut(ending).shape = shape.to_vec());
    let says = |message: String, parts: &[&str]| {
        assert!(parts.iter().all(|part| message.contains(part)), "{message}, expected {parts:?}");
    };
    says(shape("gate_up_proj_blocks", &[4, 384, 128]), &["gate_up_proj_blocks", "[4, 384, 128]", "[4, 384, 8, 16]"]);
    says(shape("gate_up_proj_scales", &[4, 8, 384]), &["gate_up_proj_scales", "[4, 8, 384]", "[4, 384, 8]"]);
    says(shape("down_proj_scales", &[4, 256 * 6]), &["down_proj_scales", "[4, 1536]", "[4, 256, 6]"]);
    says(changed(&|model| model.tensor_mut("down_proj_blocks").dtype = Dtype::I8), &["down_proj_blocks", "I8", "U8"]);
    let without = |ending: &str| changed(&|model| model.tensors.retain(|tensor| !tensor.name.ends_with(ending)));
    says(without("gate_up_proj_scales"), &["experts.gate_up_proj_scales is missing"]);
    says(without("down_proj_blocks"), &["experts.down_proj_blocks is missing"]);
    let both = changed(&|model| {
        let mut other = model.tensor_mut("down_proj_bias").clone();
        other.name = format!("model.layers.{LAYER}.mlp.experts.gate_up_proj");
        model.tensors.push(other);
    });
    says(both, &["experts.gate_up_proj", "experts.gate_up_proj_blocks"]);
    for method in [Value::Null, json!("fp8"), json!("gptq")] {
        let message = changed(&|model| model.config["quantization_config"]["quant_method"] = method.clone());
        says(message, &["quantization_config.quant_method", "\"mxfp4\""]);
    }
    says(changed(&|model| model.config["hidden_size"] = json!(250)), &["250"]);

    // What only packing looks at.
    let mut nan = good.clone();
    *nan.tensor_mut("down_proj_scales").bytes.last_mut().unwrap() = 255;
    read(&nan, |layer| {
        let error = layer.load(&Cpu::new(), &mut |_| {}).unwrap_err();
        let message = format!("{error}: {}", std::error::Error::source(&error).unwrap());
        says(message, &["down of expert 3", "scales is 255, expected at most 254", "row 255, group 5"]);
    });
}

/// Every expert's matrix as `weight_packed` and `weight_scale`.
fn packed() -> (Model, Vec<Vec<f64>>) {
    let (mut model, expected) = base();
    let mut tensors = Vec::new();
    for tensor in model.tensors.drain(..) {
        if !tensor.name.contains("experts") {
            tensors.push(tensor);
            continue;
        }
        let ((blocks, scales), [rows, cols]) = (quantized(&tensor), [tensor.shape[0], tensor.shape[1]]);
        tensors.push(u8s(format!("{}_packed", tensor.name), vec![rows, cols / 2], blocks));
        tensors.push(u8s(format!("{}_scale", tensor.name), vec![rows, cols / 32], scales));
    }
    model.tensors = tensors;
    model.config["quantization_config"] = json!({
        "quant_method": "compressed-tensors", "format": "mxfp4-pack-quantized",
        "config_groups": {"group_0": {
            "targets": ["Linear"], "input_activations": null,
            "weights": {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "symmetric": true}
        }}
    });
    (model, expected)
}

#[test]
fn packed_matrices_of_their_own_read_as_what_they_stand_for() {
    let (mut model, expected) = packed();
    assert_eq!(weights(&model), (expected.clone(), "MXFP4"));
    assert!(read(&model, |layer| layer.load(&Cpu::new(), &mut |_| {}).is_ok()));
    for tensor in model.tensors.iter_mut().filter(|tensor| tensor.name.ends_with("weight_scale")) {
        tensor.dtype = Dtype::F8_E8M0;
    }
    assert_eq!(weights(&model).0, expected);
}

#[test]
fn packed_matrices_that_do_not_fit_are_named() {
    let (good, _) = packed();
    let with = |path: &str, value: Value| {
        let mut model = good.clone();
        *model.config.pointer_mut(&format!("/quantization_config{path}")).unwrap() = value;
        refuse(&model)
    };
    let group = "/config_groups/group_0";
    for (path, value, key) in [
        ("/format", json!("nvfp4-pack-quantized"), "quantization_config.format is \"nvfp4-pack-quantized\""),
        ("/quant_method", json!("fp8"), "quantization_config.quant_method is \"fp8\""),
        (&format!("{group}/weights/num_bits"), json!(8), "num_bits is 8, expected 4"),
        (&format!("{group}/weights/group_size"), json!(16), "group_size is 16, expected 32"),
        (&format!("{group}/weights/type"), json!("int"), "weights.type is \"int\""),
        (&format!("{group}/input_activations"), json!({"num_bits": 4}), "input_activations.num_bits is 4"),
    ] {
        let message = with(path, value);
        assert!(message.contains(key), "{message}");
    }
    let mut model = good.clone();
    model.tensors.retain(|tensor| !tensor.name.ends_with("experts.2.up_proj.weight_packed"));
    assert!(refuse(&model).contains("experts.2.up_proj.weight_packed is missing"));
    let mut model = good;
    model.tensor_mut("experts.1.down_proj.weight_scale").shape = vec![SIZES.hidden * SIZES.intermediate / 32];
    let message = refuse(&model);
    assert!(message.contains("experts.1.down_proj.weight_scale") && message.contains("[256, 6]"), "{message}");
}

/// DeepSeek-V4's layer as published, and its experts' rows.
fn deepseek_v4() -> (Model, Vec<Vec<f64>>) {
    let (model, expected) = base();
    let (mut tensors, layer) = (Vec::new(), format!("model.layers.{LAYER}.mlp."));
    for mut tensor in model.tensors {
        for (ours, theirs) in [("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")] {
            tensor.name = tensor.name.replace(ours, theirs);
        }
        let name = format!("layers.{LAYER}.ffn.{}", tensor.name.strip_prefix(&layer).unwrap());
        if !name.contains("experts") {
            tensors.push(NewTensor { name, ..tensor });
            continue;
        }
        let ((blocks, scales), [rows, cols]) = (quantized(&tensor), [tensor.shape[0], tensor.shape[1]]);
        let scale = name.replace(".weight", ".scale");
        tensors.push(NewTensor { name, dtype: Dtype::I8, shape: vec![rows, cols / 2], bytes: blocks });
        tensors.push(NewTensor { name: scale, dtype: Dtype::F8_E8M0, shape: vec![rows, cols / 32], bytes: scales });
    }
    let mut add = |name: &str, dtype, shape: &[usize], bytes: Vec<u8>| {
        let name = format!("layers.{LAYER}.ffn.{name}");
        tensors.push(NewTensor { name, dtype, shape: shape.to_vec(), bytes });
    };
    add("gate.bias", Dtype::F32, &[SIZES.experts], vec![0; 4 * SIZES.experts]);
    for (part, [rows, cols]) in [
        ("w1", [SIZES.intermediate, SIZES.hidden]),
        ("w3", [SIZES.intermediate, SIZES.hidden]),
        ("w2", [SIZES.hidden, SIZES.intermediate]),
    ] {
        let blocks = [rows, cols].map(|extent: usize| extent.div_ceil(128));
        add(&format!("shared_experts.{part}.weight"), Dtype::F8_E4M3, &[rows, cols], vec![0x38; rows * cols]);
        // 2^-3 each.
        add(&format!("shared_experts.{part}.scale"), Dtype::F8_E8M0, &blocks, vec![124; blocks[0] * blocks[1]]);
    }
    let config = json!({
        "model_type": "deepseek_v4", "hidden_size": SIZES.hidden, "moe_intermediate_size": SIZES.intermediate,
        "n_routed_experts": SIZES.experts, "n_shared_experts": 1, "num_experts_per_tok": 2, "vocab_size": 5,
        "routed_scaling_factor": 1.5, "norm_topk_prob": true, "scoring_func": "sqrtsoftplus", "swiglu_limit": 10.0,
        "num_hash_layers": 1, "expert_dtype": "fp4",
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128], "scale_fmt": "ue8m0"}
    });
    (Model { config, tensors }, expected)
}

/// The same as one of the first layers: a table in the bias's place.
fn first_layer(rows: &[[i64; 2]]) -> Model {
    let (mut model, _) = deepseek_v4();
    model.config["num_hash_layers"] = json!(LAYER + 1);
    let table = model.tensor_mut("gate.bias");
    table.name = format!("layers.{LAYER}.ffn.gate.tid2eid");
    (table.dtype, table.shape) = (Dtype::I64, vec![rows.len(), 2]);
    table.bytes = rows.iter().flatten().flat_map(|id| id.to_le_bytes()).collect();
    model
}

#[test]
fn deepseek_v4_reads_as_what_it_stands_for() {
    let (mut model, expected) = deepseek_v4();
    assert_eq!(weights(&model), (expected, "MXFP4"));
    read(&model, |layer| {
        assert_eq!(layer.router().scoring, Scoring::SqrtSoftplus);
        assert_eq!(layer.activation(), Activation::Swiglu { alpha: 1.0, beta: 0.0, limit: Some(10.0) });
        assert!(layer.token_experts().is_none());
        let shared = layer.shared().unwrap();
        assert_eq!((shared.weight_format(), shared.expert.down.dtype()), (WeightFormat::E4m3, "F8_E4M3"));
        let mut row = vec![0.0; SIZES.hidden];
        shared.expert.up.write_row(0, &mut row);
        assert!(row.iter().all(|&weight| weight == 0.125));
        assert!(layer.load(&Cpu::new(), &mut |_| {}).is_ok());
    });
    // Published configs name the experts' dtype at the top or in `quantization_config`.
    model.config["expert_dtype"] = Value::Null;
    model.config["quantization_config"]["expert_dtype"] = json!("fp4");
    read(&model, |layer| assert_eq!(layer.weight_format(), WeightFormat::Mxfp4));
}

#[test]
fn the_first_layers_have_a_table_of_experts() {
    let rows = [[3, 1], [0, 2], [1, 0], [2, 3], [0, 1]];
    let mut model = first_layer(&rows);
    let has_the_table = |model: &Model| {
        read(model, |layer| {
            let table = layer.token_experts().unwrap();
            assert_eq!((table.tokens(), table.view().get(3, 1)), (5, 3));
            assert!(layer.router().correction_bias.is_empty());
        });
    };
    has_the_table(&model);
    // Transformers writes a list instead of the number.
    model.config["num_hash_layers"] = Value::Null;
    model.config["mlp_layer_types"] = json!(["hash_moe", "hash_moe", "moe"]);
    has_the_table(&model);
}

#[test]
fn what_does_not_fit_in_deepseek_v4_is_named() {
    let (good, _) = deepseek_v4();
    let says = |model: &Model, parts: &[&str]| {
        let message = refuse(model);
        assert!(parts.iter().all(|part| message.contains(part)), "{message}, expected {parts:?}");
    };
    let with = |key: &str, value: Value| {
        let mut model = good.clone();
        model.config[key] = value;
        model
    };
    for value in [Value::Null, json!("fp8")] {
        says(&with("expert_dtype", value), &["expert_dtype is ", "\"fp4\" (the experts are I8"]);
    }
    says(&with("expert_dtype", json!("int4")), &["expert_dtype is \"int4\""]);
    says(&with("scoring_func", json!("sigmoid")), &["scoring_func is \"sigmoid\""]);
    says(&with("swiglu_limit", Value::Null), &["swiglu_limit is missing"]);
    says(&with("num_hash_layers", Value::Null), &["num_hash_layers is missing"]);
    says(&with("hidden_act", json!("gelu")), &["hidden_act is \"gelu\""]);
    says(&with("mlp_layer_types", json!(["moe", "dens"])), &["mlp_layer_types", "\"hash_moe\" and \"moe\""]);
    says(&with("quantization_config", Value::Null), &["quantization_config.quant_method is missing", "I8"]);
    let mut model = good.clone();
    model.tensors.retain(|tensor| !tensor.name.ends_with("experts.2.w3.scale"));
    says(&model, &["experts.2.w3.scale is missing"]);
    let mut model = good.clone();
    model.tensor_mut("experts.1.w2.weight").shape = vec![SIZES.hidden * SIZES.intermediate / 2];
    says(&model, &["experts.1.w2.weight", "[256, 96]"]);
    let mut model = good.clone();
    model.tensor_mut("experts.1.w2.weight").dtype = Dtype::U8;
    says(&model, &["experts.1.w2.weight", "U8", "I8"]);
    // Two names of the same scales.
    let mut model = good.clone();
    let mut other = model.tensor_mut("shared_experts.w1.scale").clone();
    other.name = other.name.replace(".scale", ".weight_scale_inv");
    model.tensors.push(other);
    says(&model, &["shared_experts.w1.weight_scale_inv", "shared_experts.w1.scale", "both"]);

    // A layer is of the kind that the config says, and its table of the vocabulary's size.
    let table = first_layer(&[[0, 1]; 5]);
    let mut other = table.clone();
    other.config["num_hash_layers"] = json!(1);
    says(&other, &["gate.bias is missing"]);
    let mut other = good;
    other.config["num_hash_layers"] = json!(2);
    says(&other, &["gate.tid2eid is missing"]);
    says(&first_layer(&[[0, 1]; 4]), &["gate.tid2eid", "[4, 2]", "[5, 2]"]);
    let mut floats = table;
    floats.tensor_mut("tid2eid").dtype = Dtype::F64;
    says(&floats, &["gate.tid2eid", "F64", "I32 or I64"]);
}
