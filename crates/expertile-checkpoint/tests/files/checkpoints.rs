//! Checkpoint folders.

use crate::made_up::{FAMILIES, LAYER, Model, NewTensor, Sizes, serialize};
use expertile::{GroupWorth, Groups, Normalization, Router, Scoring, WeightFormat};
use expertile_checkpoint::{Checkpoint, Error, Expert, MoeLayer, WeightMatrix};
use half::bf16;
use safetensors::Dtype;
use serde_json::{Value, json};

pub(crate) const SIZES: Sizes = Sizes { hidden: 256, intermediate: 192, experts: 4, topk: 2 };

/// The error of reading the layer of this model from one file, causes included.
pub(crate) fn refuse(model: &Model) -> String {
    let folder = tempfile::tempdir().unwrap();
    model.write(folder.path(), 1);
    let error = match Checkpoint::open(folder.path()) {
        Ok(checkpoint) => checkpoint.layer(LAYER).map(|_| ()).unwrap_err(),
        Err(error) => error,
    };
    with_causes(&error)
}

fn with_causes(error: &Error) -> String {
    match std::error::Error::source(error) {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    }
}

/// What row `row` of the tensor whose name ends so should read.
fn expected_row(model: &mut Model, ending: &str, row: usize) -> Vec<f64> {
    let NewTensor { dtype, shape, bytes, .. } = model.tensor_mut(ending).clone();
    let cols = shape[1];
    if dtype == Dtype::BF16 {
        let own = &bytes[row * cols * 2..][..cols * 2];
        return own.chunks(2).map(|pair| bf16::from_le_bytes([pair[0], pair[1]]).to_f64()).collect();
    }
    let scales = model.tensor_mut(&format!("{ending}_scale_inv")).clone();
    let scale = |block: usize| {
        let at = 4 * (row / 128 * scales.shape[1] + block);
        f64::from(f32::from_le_bytes(scales.bytes[at..at + 4].try_into().unwrap()))
    };
    let value = |col: usize| f64::from(expertile::E4m3(bytes[row * cols + col]).to_f32());
    (0..cols).map(|col| value(col) * scale(col / 128)).collect()
}

#[test]
fn every_naming_format_and_number_of_shards_gives_the_same_layer() {
    for family in FAMILIES {
        for e4m3 in [false, true] {
            for shards in [1, 3] {
                let mut model = Model::new(family, SIZES, e4m3);
                let folder = tempfile::tempdir().unwrap();
                model.write(folder.path(), shards);
                let checkpoint = Checkpoint::open(folder.path()).unwrap();
                let layer = checkpoint.layer(LAYER).unwrap();
                let shape = layer.shape();
                assert_eq!((shape.hidden(), shape.intermediate(), shape.local_experts()), (256, 192, 4));
                assert_eq!(layer.weight_format(), if e4m3 { WeightFormat::E4m3 } else { WeightFormat::Bf16 });
                assert_eq!(layer.router().topk, 2);
                let names =
                    if family == "mixtral" { ["w1", "w3", "w2"] } else { ["gate_proj", "up_proj", "down_proj"] };
                let mut check = |matrix: &WeightMatrix<'_>, name: &str| {
                    for row in [0, 127, 128, matrix.rows() - 1] {
                        let mut read = vec![0.0; matrix.cols()];
                        matrix.write_row(row, &mut read);
                        let expected = expected_row(&mut model, &format!("experts.3.{name}.weight"), row);
                        assert_eq!(read, expected, "{family} {e4m3} {shards} {name} {row}");
                    }
                };
                let expert = &layer.experts()[3];
                check(expert.gate.as_ref().unwrap(), names[0]);
                check(&expert.up, names[1]);
                check(&expert.down, names[2]);
                let router_row = expected_row(&mut model, "gate.weight", 2);
                assert!(layer.router_weight()[2 * 256..3 * 256].iter().map(|&x| f64::from(x)).eq(router_row));
            }
        }
    }
}

#[test]
fn the_router_is_the_familys() {
    let folder = tempfile::tempdir().unwrap();
    let router = |family: &str| {
        Model::new(family, SIZES, false).write(folder.path(), 1);
        Checkpoint::open(folder.path()).unwrap().layer(LAYER).unwrap().router().clone()
    };
    assert_eq!(router("qwen3_moe"), Router::softmax(2, true));
    assert_eq!(router("mixtral"), Router::softmax(2, true));
    let Router { correction_bias, .. } = router("deepseek_v3");
    assert_eq!(correction_bias.len(), 4);
    let expected = Router {
        topk: 2,
        scoring: Scoring::Sigmoid,
        logit_bias: vec![],
        correction_bias,
        groups: Some(Groups { count: 2, topk: 2, worth: GroupWorth::BestTwo }),
        normalization: Normalization::SumPlus(1e-20),
        scaling_factor: 2.5,
    };
    assert_eq!(router("deepseek_v3"), expected);
}

#[test]
fn packing_tells_of_every_expert_and_keeps_the_sizes() {
    let cpu = expertile::cpu::Cpu::new();
    for e4m3 in [false, true] {
        let model = Model::new("mixtral", SIZES, e4m3);
        let file = serialize(&model.tensors);
        let checkpoint = Checkpoint::from_bytes(model.config.to_string().as_bytes(), &file).unwrap();
        let layer = checkpoint.layer(LAYER).unwrap();
        let mut told = Vec::new();
        let (w13, w2) = layer.load(&cpu, &mut |done| told.push(done)).unwrap();
        assert_eq!(told, [1, 2, 3, 4]);
        assert_eq!((w13.format(), w2.format()), (layer.weight_format(), layer.weight_format()));
        assert_eq!((w13.experts(), w13.n(), w13.k()), (4, 2 * 192, 256));
        assert_eq!((w2.experts(), w2.n(), w2.k()), (4, 256, 192));
    }
}

#[test]
fn every_intermediate_size_can_be_packed() {
    for intermediate in [8, 40, 96, 160] {
        let model = Model::new("mixtral", Sizes { intermediate, ..SIZES }, true);
        let file = serialize(&model.tensors);
        let checkpoint = Checkpoint::from_bytes(model.config.to_string().as_bytes(), &file).unwrap();
        let (w13, w2) = checkpoint.layer(LAYER).unwrap().load(&expertile::cpu::Cpu::new(), &mut |_| {}).unwrap();
        assert_eq!((w13.n(), w2.k()), (2 * intermediate, intermediate));
    }
}

#[test]
fn bytes_and_folders_read_the_same() {
    let model = Model::new("qwen3_moe", SIZES, true);
    let file = serialize(&model.tensors);
    let checkpoint = Checkpoint::from_bytes(model.config.to_string().as_bytes(), &file).unwrap();
    assert_eq!(checkpoint.layer(LAYER).unwrap().experts().len(), 4);
    // A map starts on a page; bytes may start anywhere.
    let shifted: Vec<u8> = [0].into_iter().chain(file).collect();
    let checkpoint = Checkpoint::from_bytes(model.config.to_string().as_bytes(), &shifted[1..]).unwrap();
    assert_eq!(checkpoint.layer(LAYER).unwrap().experts().len(), 4);
}

#[test]
fn a_layer_without_experts_is_a_typed_error() {
    let folder = tempfile::tempdir().unwrap();
    let mut model = Model::new("deepseek_v3", SIZES, false);
    model.write(folder.path(), 1);
    let error = Checkpoint::open(folder.path()).unwrap().layer(0).unwrap_err();
    assert!(matches!(error, Error::DenseLayer { layer: 0, .. }), "{error}");
    let error = Checkpoint::open(folder.path()).unwrap().layer(2).unwrap_err();
    assert!(matches!(error, Error::Layer { layer: 2, layers: 2, .. }), "{error}");
    // A config that says nothing, but tensors that do.
    model.tensor_mut("mlp.gate.weight").name = "model.layers.1.mlp.gate_proj.weight".into();
    assert!(refuse(&model).contains("layer 1 is dense (there is a model.layers.1.mlp.gate_proj.weight)"));
}

#[test]
fn missing_and_misshapen_tensors_are_named() {
    let base = Model::new("qwen3_moe", SIZES, true);
    let with = |change: &dyn Fn(&mut Model)| {
        let mut model = base.clone();
        change(&mut model);
        refuse(&model)
    };
    let without = |ending: &'static str| with(&|model| model.tensors.retain(|tensor| !tensor.name.ends_with(ending)));
    let prefix = "model.layers.1.mlp";
    assert!(without("mlp.gate.weight").contains(&format!("tensor {prefix}.gate.weight is missing")));
    for name in ["experts.0.gate_proj.weight", "experts.3.down_proj.weight", "experts.2.up_proj.weight_scale_inv"] {
        let message = without(name);
        assert!(
            message.contains("model.safetensors: tensor") && message.contains(&format!("{name} is missing")),
            "{message}"
        );
    }
    let message = with(&|model| model.tensor_mut("experts.1.up_proj.weight").shape = vec![256, 192]);
    assert!(message.contains("experts.1.up_proj.weight has shape [256, 192], expected [192, 256]"), "{message}");
    let message = with(&|model| model.tensor_mut("experts.1.up_proj.weight_scale_inv").shape = vec![1, 4]);
    assert!(message.contains("weight_scale_inv has shape [1, 4], expected [2, 2]"), "{message}");
    let message = with(&|model| model.tensor_mut("experts.0.gate_proj.weight").dtype = Dtype::I8);
    assert!(message.contains("has dtype I8, expected BF16, F16, F32 or F8_E4M3"), "{message}");
    let message = with(&|model| model.tensor_mut("experts.1.down_proj.weight").dtype = Dtype::U8);
    assert!(message.contains("has dtype U8, expected F8_E4M3"), "{message}");
    let message = with(&|model| {
        let scales = model.tensor_mut("experts.0.gate_proj.weight_scale_inv");
        (scales.dtype, scales.shape, scales.bytes) = (Dtype::U8, vec![2, 2], vec![0; 4]);
    });
    assert!(message.contains("has dtype U8, expected BF16, F16, F32 or F8_E8M0"), "{message}");
    let message = with(&|model| model.tensor_mut("mlp.gate.weight").dtype = Dtype::I16);
    assert!(message.contains("gate.weight has dtype I16, expected BF16, F16, F32 or F8_E8M0"), "{message}");
    let message = with(&|model| model.config["quantization_config"]["weight_block_size"] = json!([64, 128]));
    assert!(message.contains("quantization_config.weight_block_size is [64, 128], expected [128, 128]"), "{message}");
    let message = with(&|model| model.config["quantization_config"] = Value::Null);
    assert!(message.contains("weight_block_size is missing"), "{message}");
    let message = with(&|model| model.config["num_experts_per_tok"] = json!(5));
    assert!(message.contains("the router cannot be: topk is 5, expected 1 to 4"), "{message}");
    let message = with(&|model| model.config["num_experts"] = json!(1u64 << 60));
    assert!(message.contains("the layer cannot be: local_experts is 1152921504606846976"), "{message}");
}

#[test]
fn missing_and_cut_off_files_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let error = || match Checkpoint::open(folder.path()) {
        Ok(checkpoint) => with_causes(&checkpoint.layer(LAYER).map(|_| ()).unwrap_err()),
        Err(error) => with_causes(&error),
    };
    assert!(error().contains("config.json cannot be read"));
    let model = Model::new("mixtral", SIZES, false);
    model.write(folder.path(), 1);
    let file = folder.path().join("model.safetensors");
    let whole = std::fs::read(&file).unwrap();
    for length in [0, 7, 8, 100, whole.len() - 1] {
        std::fs::write(&file, &whole[..length]).unwrap();
        assert!(error().contains("model.safetensors: "), "{length}: {}", error());
    }
    std::fs::remove_file(&file).unwrap();
    assert!(error().contains("model.safetensors cannot be read"));
    model.write(folder.path(), 3);
    std::fs::remove_file(folder.path().join("model-00002-of-00003.safetensors")).unwrap();
    assert!(error().contains("model-00002-of-00003.safetensors cannot be read"), "{}", error());
}

#[test]
fn a_single_file_is_read_whatever_an_index_says() {
    let folder = tempfile::tempdir().unwrap();
    let model = Model::new("qwen3_moe", SIZES, false);
    model.write(folder.path(), 3);
    model.write(folder.path(), 1);
    let single = folder.path().join("model.safetensors");
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    assert!(checkpoint.layer(LAYER).is_ok());
    assert!(checkpoint.mapped_files().map(|(file, _)| file).eq([&single]));
    // The index is left over: its shards are gone, or it is no index at all.
    for shard in 1..=3 {
        std::fs::remove_file(folder.path().join(format!("model-0000{shard}-of-00003.safetensors"))).unwrap();
    }
    assert!(Checkpoint::open(folder.path()).unwrap().layer(LAYER).is_ok());
    std::fs::write(folder.path().join("model.safetensors.index.json"), "{").unwrap();
    assert!(Checkpoint::open(folder.path()).unwrap().layer(LAYER).is_ok());
    std::fs::remove_file(&single).unwrap();
    assert!(Checkpoint::open(folder.path()).unwrap_err().to_string().contains("index is not valid"));
}

#[test]
fn the_files_of_a_checkpoint_and_where_they_are_mapped_are_known() {
    let folder = tempfile::tempdir().unwrap();
    Model::new("qwen3_moe", SIZES, false).write(folder.path(), 3);
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let mut names: Vec<String> =
        checkpoint.files().map(|file| file.strip_prefix(folder.path()).unwrap().display().to_string()).collect();
    names.sort();
    let shard = |number| format!("model-0000{number}-of-00003.safetensors");
    let fixed = ["config.json", "model.safetensors", "model.safetensors.index.json"].map(String::from);
    let mut expected = [shard(1), shard(2), shard(3)].into_iter().chain(fixed).collect::<Vec<_>>();
    expected.sort();
    assert_eq!(names, expected);
    assert_eq!(checkpoint.mapped_files().count(), 0);
    checkpoint.layer(LAYER).unwrap();
    for (file, addresses) in checkpoint.mapped_files() {
        assert_eq!(addresses.len() as u64, file.metadata().unwrap().len());
    }
    assert_eq!(checkpoint.mapped_files().count(), 3);
}

#[test]
fn an_entry_that_stands_twice_in_an_index_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    Model::new("qwen3_moe", SIZES, false).write(folder.path(), 2);
    let text = r#"{"weight_map": {"t": "a.safetensors", "t": "b.safetensors"}}"#;
    std::fs::write(folder.path().join("model.safetensors.index.json"), text).unwrap();
    let message = with_causes(&Checkpoint::open(folder.path()).unwrap_err());
    assert!(message.contains("index is not valid: key \"t\" stands twice"), "{message}");
}

#[test]
fn an_index_cannot_lead_out_of_its_folder() {
    let folder = tempfile::tempdir().unwrap();
    Model::new("qwen3_moe", SIZES, false).write(folder.path(), 2);
    let file = folder.path().join("model.safetensors.index.json");
    for name in ["../x.safetensors", "/etc/passwd", "sub/x.safetensors", "..", ""] {
        let index = json!({"weight_map": {"model.layers.1.mlp.gate.weight": name}});
        std::fs::write(&file, index.to_string()).unwrap();
        let error = Checkpoint::open(folder.path()).unwrap_err();
        assert!(matches!(&error, Error::ShardName { actual, .. } if actual == name), "{error}");
    }
    std::fs::write(&file, json!({"weight_map": {}}).to_string()).unwrap();
    let error = Checkpoint::open(folder.path()).unwrap().layer(LAYER).map(|_| ()).unwrap_err();
    assert!(error.to_string().contains("index.json: tensor model.layers.1.mlp.gate.weight is missing"), "{error}");
}

#[test]
fn no_byte_of_a_header_can_do_worse_than_an_error() {
    let sizes = Sizes { hidden: 4, intermediate: 2, experts: 2, topk: 1 };
    let model = Model::new("qwen3_moe", sizes, false);
    let config = model.config.to_string();
    let file = serialize(&model.tensors);
    let header = 8 + u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    for at in 0..header {
        for value in [0, 0x22, 0x30, 0x39, 0x7d, 0xff] {
            let mut bytes = file.clone();
            bytes[at] = value;
            if let Ok(checkpoint) = Checkpoint::from_bytes(config.as_bytes(), &bytes) {
                let _ = checkpoint.layer(LAYER);
            }
        }
    }
    for length in 0..config.len() {
        let _ = Checkpoint::from_bytes(&config.as_bytes()[..length], &file).map(|_| ());
    }
}

/// All weights of an expert, gate first, as f64.
fn rows(expert: &Expert<'_>) -> Vec<f64> {
    let matrices = expert.gate.iter().chain([&expert.up, &expert.down]);
    let mut values = Vec::new();
    for matrix in matrices {
        let mut row = vec![0.0; matrix.cols()];
        for index in 0..matrix.rows() {
            matrix.write_row(index, &mut row);
            values.extend_from_slice(&row);
        }
    }
    values
}

/// Reads the layer of this model from one file.
pub(crate) fn read<T>(model: &Model, look: impl FnOnce(&MoeLayer<'_>) -> T) -> T {
    let file = serialize(&model.tensors);
    let checkpoint = Checkpoint::from_bytes(model.config.to_string().as_bytes(), &file).unwrap();
    look(&checkpoint.layer(LAYER).unwrap())
}

/// The weights of all experts of this model, and what their first matrix is.
pub(crate) fn weights(model: &Model) -> (Vec<Vec<f64>>, &'static str) {
    read(model, |layer| (layer.experts().iter().map(rows).collect(), layer.weight_dtype()))
}

/// Changes every scale tensor of the model.
fn each_scale(model: &mut Model, change: impl Fn(&mut NewTensor)) {
    model.tensors.iter_mut().filter(|tensor| tensor.name.ends_with("_scale_inv")).for_each(change);
}

fn scales_of(tensor: &NewTensor) -> Vec<f32> {
    tensor.bytes.as_chunks::<4>().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect()
}

#[test]
fn scales_of_every_dtype_are_widened_exactly() {
    let mut powers = Model::new("qwen3_moe", SIZES, true);
    each_scale(&mut powers, |tensor| {
        let powers = scales_of(tensor).into_iter().map(|scale| 2f32.powi(scale.log2() as i32));
        tensor.bytes = powers.flat_map(f32::to_le_bytes).collect();
    });
    let expected = weights(&powers);
    let with = |dtype: Dtype, encode: fn(f32) -> Vec<u8>| {
        let mut model = powers.clone();
        each_scale(&mut model, |tensor| {
            let bytes = scales_of(tensor).into_iter().flat_map(encode).collect();
            (tensor.dtype, tensor.bytes) = (dtype, bytes);
        });
        weights(&model)
    };
    assert_eq!(with(Dtype::BF16, |scale| bf16::from_f32(scale).to_le_bytes().to_vec()), expected);
    assert_eq!(with(Dtype::F16, |scale| half::f16::from_f32(scale).to_le_bytes().to_vec()), expected);
    assert_eq!(with(Dtype::F8_E8M0, |scale| vec![(scale.to_bits() >> 23) as u8]), expected);
}

#[test]
fn compressed_tensors_are_read_by_their_own_names() {
    let base = Model::new("qwen3_moe", SIZES, true);
    let expected = weights(&base);
    let mut model = base.clone();
    let group = |strategy: &str| {
        json!({"targets": ["Linear"], "input_activations": {"dynamic": true}, "weights": {
            "num_bits": 8, "type": "float", "strategy": strategy, "block_structure": [128, 128]
        }})
    };
    let quantization = |group: Value| json!({"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": group}});
    model.config["quantization_config"] = quantization(group("block"));
    each_scale(&mut model, |tensor| tensor.name = tensor.name.replace("_scale_inv", "_scale"));
    assert_eq!(weights(&model), expected);
    model.config["quantization_config"] = quantization(group("group"));
    assert!(refuse(&model).contains("strategy is \"group\", expected \"block\", \"channel\" or \"tensor\""));
    let mut fixed = group("block");
    fixed["input_activations"]["dynamic"] = json!(false);
    model.config["quantization_config"] = quantization(fixed);
    assert!(refuse(&model).contains("config_groups.group_0.input_activations.dynamic is false"));
    model.config["quantization_config"] = json!({"quant_method": "compressed-tensors", "format": "marlin-24"});
    assert!(refuse(&model).contains("quantization_config.format is \"marlin-24\""));
    model.config["quantization_config"] = json!({"quant_method": "gptq", "bits": 4});
    assert!(refuse(&model).contains("quantization_config.quant_method is \"gptq\""));
    let mut both = base;
    let mut second = both.tensor_mut("experts.0.gate_proj.weight_scale_inv").clone();
    second.name = second.name.replace("_scale_inv", "_scale");
    both.tensors.push(second);
    assert!(refuse(&both).contains("weight_scale_inv and"), "{}", refuse(&both));
}

#[test]
fn one_scale_per_tensor_or_row_is_computed() {
    let mut model = Model::new("qwen3_moe", SIZES, true);
    model.config["quantization_config"] = json!({"quant_method": "fp8", "activation_scheme": "dynamic"});
    let mut per_tensor = model.clone();
    each_scale(&mut per_tensor, |tensor| (tensor.shape, tensor.bytes) = (vec![], 0.5f32.to_le_bytes().to_vec()));
    let bytes = model.tensor_mut("experts.3.up_proj.weight").bytes.clone();
    let value = |at: usize| f64::from(expertile::E4m3(bytes[at]).to_f32());
    read(&per_tensor, |layer| {
        assert_eq!(layer.weight_format(), WeightFormat::E4m3);
        let mut row = vec![0.0; SIZES.hidden];
        layer.experts()[3].up.write_row(7, &mut row);
        assert!((0..SIZES.hidden).all(|col| row[col] == 0.5 * value(7 * SIZES.hidden + col)));
    });
    let mut per_row = model.clone();
    each_scale(&mut per_row, |tensor| {
        let rows = if tensor.name.contains("down_proj") { SIZES.hidden } else { SIZES.intermediate };
        let scales = (0..rows).flat_map(|row| (1.0 + row as f32).to_le_bytes());
        (tensor.shape, tensor.bytes) = (vec![rows, 1], scales.collect());
    });
    read(&per_row, |layer| {
        assert_eq!((layer.weight_format(), layer.weights_are_rounded()), (WeightFormat::E4m3, false));
        assert!(layer.load(&expertile::cpu::Cpu::new(), &mut |_| {}).is_ok());
        let up = &layer.experts()[3].up;
        let mut row = vec![0.0; SIZES.hidden];
        up.write_row(7, &mut row);
        assert!((0..SIZES.hidden).all(|col| row[col] == 8.0 * value(7 * SIZES.hidden + col)));
    });
    each_scale(&mut per_row, |tensor| tensor.shape[0] -= 1);
    each_scale(&mut per_row, |tensor| tensor.bytes.truncate(4 * tensor.shape[0]));
    assert!(refuse(&per_row).contains("expected [], [1], [192] or [192, 1]"), "{}", refuse(&per_row));
    model.config["quantization_config"]["activation_scheme"] = json!("static");
    assert!(refuse(&model).contains("activation_scheme is \"static\", expected [\"dynamic\"]"));
}

#[test]
fn f16_and_f32_weights_are_read_and_rounded() {
    let base = Model::new("mixtral", SIZES, false);
    let expected = weights(&base).0;
    for dtype in [Dtype::F16, Dtype::F32] {
        let mut model = base.clone();
        for tensor in model.tensors.iter_mut().filter(|tensor| tensor.name.contains("experts")) {
            let values = tensor.bytes.as_chunks::<2>().0.iter().map(|&bytes| bf16::from_le_bytes(bytes).to_f32());
            // A bit that bf16 does not have.
            let values = values.map(|value| value * (1.0 + 2f32.powi(-9)));
            tensor.bytes = match dtype {
                Dtype::F16 => values.flat_map(|value| half::f16::from_f32(value).to_le_bytes()).collect(),
                _ => values.flat_map(f32::to_le_bytes).collect(),
            };
            tensor.dtype = dtype;
        }
        let (read_weights, name) = weights(&model);
        assert_eq!(name, dtype.to_string());
        assert!(read(&model, |layer| layer.weights_are_rounded()));
        let close = |(read, expected): (&f64, &f64)| {
            (read - expected * (1.0 + 2f64.powi(-9))).abs() <= 1e-3 * expected.abs() + 1e-6
        };
        assert!(read_weights.iter().flatten().zip(expected.iter().flatten()).all(close));
        assert!(read(&model, |layer| layer.load(&expertile::cpu::Cpu::new(), &mut |_| {}).is_ok()));
    }
}

/// The tensor of all experts: gate and up (or down) one after the other, perhaps interleaved, perhaps transposed.
fn fused(model: &mut Model, parts: &[&str], interleaved: bool, transposed: bool, name: &str) -> NewTensor {
    let mut bytes = Vec::new();
    let mut shape = [0, 0];
    for expert in 0..SIZES.experts {
        let tensors: Vec<NewTensor> =
            parts.iter().map(|part| model.tensor_mut(&format!("experts.{expert}.{part}.weight")).clone()).collect();
        let [rows, cols] = [tensors[0].shape[0], tensors[0].shape[1]];
        shape = [rows * parts.len(), cols];
        let place =
            |row: usize| if interleaved { (row % parts.len(), row / parts.len()) } else { (row / rows, row % rows) };
        let element = |row: usize, col: usize| {
            let (part, row) = place(row);
            tensors[part].bytes[2 * (row * cols + col)..][..2].to_vec()
        };
        if transposed {
            (0..cols).for_each(|col| (0..shape[0]).for_each(|row| bytes.extend(element(row, col))));
        } else {
            (0..shape[0]).for_each(|row| (0..cols).for_each(|col| bytes.extend(element(row, col))));
        }
    }
    let shape =
        if transposed { vec![SIZES.experts, shape[1], shape[0]] } else { vec![SIZES.experts, shape[0], shape[1]] };
    NewTensor { name: format!("model.layers.{LAYER}.{name}"), dtype: Dtype::BF16, shape, bytes }
}

#[test]
fn fused_transposed_and_interleaved_experts_read_as_separate_ones() {
    let mut base = Model::new("qwen3_moe", SIZES, false);
    let expected = weights(&base).0;
    for transposed in [false, true] {
        let gate_up = fused(&mut base, &["gate_proj", "up_proj"], false, transposed, "mlp.experts.gate_up_proj");
        let down = fused(&mut base, &["down_proj"], false, transposed, "mlp.experts.down_proj");
        let mut model = base.clone();
        model.tensors.retain(|tensor| !tensor.name.contains("experts"));
        model.tensors.extend([gate_up, down]);
        assert_eq!(weights(&model).0, expected, "transposed: {transposed}");
        model.tensor_mut("experts.down_proj").shape.swap(1, 2);
        let message = refuse(&model);
        assert!(message.contains("experts.") && message.contains("or transposed with the other"), "{message}");
    }

    let gate_up = fused(&mut base, &["gate_proj", "up_proj"], true, true, "mlp.experts.gate_up_proj");
    let down = fused(&mut base, &["down_proj"], false, true, "mlp.experts.down_proj");
    let mut model = base.clone();
    model.tensors.retain(|tensor| !tensor.name.contains("experts"));
    model.tensor_mut("gate.weight").name = format!("model.layers.{LAYER}.mlp.router.weight");
    let bias = |name: &str, shape: Vec<usize>| {
        let bytes = (0..shape.iter().product::<usize>()).flat_map(|at| (at as f32).to_le_bytes()).collect();
        NewTensor { name: format!("model.layers.{LAYER}.mlp.{name}"), dtype: Dtype::F32, shape, bytes }
    };
    let two = 2 * SIZES.intermediate;
    model.tensors.extend([gate_up, down]);
    model.tensors.push(bias("router.bias", vec![SIZES.experts]));
    model.tensors.push(bias("experts.gate_up_proj_bias", vec![SIZES.experts, two]));
    model.tensors.push(bias("experts.down_proj_bias", vec![SIZES.experts, SIZES.hidden]));
    model.config = json!({
        "model_type": "gpt_oss", "hidden_size": SIZES.hidden, "intermediate_size": SIZES.intermediate,
        "num_local_experts": SIZES.experts, "num_experts_per_tok": 2, "swiglu_limit": 7.0
    });
    assert_eq!(weights(&model).0, expected);
    read(&model, |layer| {
        let biases = layer.biases().unwrap();
        assert_eq!(biases.w13[..3], [0.0, 2.0, 4.0]);
        assert_eq!(biases.w13[SIZES.intermediate..][..3], [1.0, 3.0, 5.0]);
        assert_eq!(biases.w13[two], two as f32);
        assert_eq!(biases.w2[SIZES.hidden + 1], (SIZES.hidden + 1) as f32);
        assert_eq!(layer.router().logit_bias, [0.0, 1.0, 2.0, 3.0]);
    });
    model.tensors.retain(|tensor| !tensor.name.ends_with("down_proj_bias"));
    assert!(refuse(&model).contains("experts.down_proj_bias is missing"));
}

#[test]
fn the_shared_expert_is_read_or_missed() {
    for e4m3 in [false, true] {
        let model = Model::new("deepseek_v3", SIZES, e4m3);
        read(&model, |layer| {
            let shared = layer.shared().unwrap();
            assert_eq!((shared.shape.intermediate(), shared.gate.as_ref()), (SIZES.intermediate, None));
            assert_eq!(shared.weight_format(), layer.weight_format());
            assert!(shared.load(&expertile::cpu::Cpu::new()).is_ok());
        });
        let mut without = model.clone();
        without.tensors.retain(|tensor| !tensor.name.contains("shared_experts.up_proj"));
        assert!(refuse(&without).contains("mlp.shared_experts.up_proj.weight is missing"));
        let mut unsaid = model;
        unsaid.config["n_shared_experts"] = Value::Null;
        assert!(refuse(&unsaid).contains("shared_experts.down_proj.weight is not known for deepseek_v3"));
    }
}

#[test]
fn tensors_that_could_change_the_block_are_never_ignored() {
    let with = |family: &str, name: &str| {
        let mut model = Model::new(family, SIZES, false);
        let block = if family == "mixtral" { "block_sparse_moe" } else { "mlp" };
        let name = format!("model.layers.{LAYER}.{block}.{name}");
        model.tensors.push(NewTensor { name: name.clone(), dtype: Dtype::F32, shape: vec![1], bytes: vec![0; 4] });
        let message = refuse(&model);
        assert!(message.contains(&format!("tensor {name} is not known for {family}")), "{message}");
    };
    for name in ["experts.0.gate_proj.bias", "gate.bias", "shared_expert.up_proj.weight", "shared_expert_gate.weight"] {
        with("qwen3_moe", name);
    }
    with("qwen3_moe", "gate.e_score_correction_bias");
    with("mixtral", "e_score_correction_bias");
    with("deepseek_v3", "experts.4.gate_proj.weight");
    // Those of other layers and other blocks are nobody's business here.
    let mut model = Model::new("qwen3_moe", SIZES, false);
    for name in ["model.layers.10.mlp.gate.bias", "model.layers.1.self_attn.q_proj.bias", "lm_head.weight"] {
        model.tensors.push(NewTensor { name: name.into(), dtype: Dtype::F32, shape: vec![1], bytes: vec![0; 4] });
    }
    assert_eq!(read(&model, |layer| layer.experts().len()), 4);
}

#[test]
fn layers_are_found_below_every_known_prefix_and_below_one_only() {
    let base = Model::new("qwen3_moe", SIZES, false);
    let expected = weights(&base);
    for prefix in ["model.language_model.layers.", "language_model.model.layers.", "layers."] {
        let mut model = base.clone();
        for tensor in &mut model.tensors {
            tensor.name = tensor.name.replace("model.layers.", prefix);
        }
        assert_eq!(weights(&model), expected);
        model.tensors.push(model.tensors[0].clone());
        model.tensors.last_mut().unwrap().name = base.tensors[0].name.clone();
        assert!(refuse(&model).contains("are both there, expected one of them"), "{}", refuse(&model));
    }
}
