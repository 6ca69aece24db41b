//! Checkpoint folders.

use crate::made_up::{FAMILIES, LAYER, Model, NewTensor, Sizes, serialize};
use expertile::{Router, WeightFormat};
use expertile_checkpoint::{Checkpoint, Error, WeightMatrix};
use half::bf16;
use safetensors::Dtype;
use serde_json::{Value, json};

const SIZES: Sizes = Sizes { hidden: 256, intermediate: 192, experts: 4, topk: 2 };

/// The error of reading the layer of this model from one file, causes included.
fn refuse(model: &Model) -> String {
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
                assert_eq!(layer.router().topk(), 2);
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
                check(&expert.gate, names[0]);
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
    assert_eq!(router("qwen3_moe"), Router::Softmax { topk: 2, renormalize: true });
    assert_eq!(router("mixtral"), Router::Softmax { topk: 2, renormalize: true });
    let Router::Sigmoid { topk, correction_bias, groups, topk_groups, renormalize, scaling_factor } =
        router("deepseek_v3")
    else {
        panic!("deepseek_v3 has a sigmoid router");
    };
    assert_eq!((topk, groups, topk_groups, renormalize, scaling_factor), (2, 2, 2, true, 2.5));
    assert_eq!(correction_bias.len(), 4);
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
        let (w13, w2) = layer.pack(&cpu, &mut |done| told.push(done)).unwrap();
        assert_eq!(told, [1, 2, 3, 4]);
        assert_eq!((w13.format(), w2.format()), (layer.weight_format(), layer.weight_format()));
        assert_eq!((w13.experts(), w13.n(), w13.k()), (4, 2 * 192, 256));
        assert_eq!((w2.experts(), w2.n(), w2.k()), (4, 256, 192));
    }
}

#[test]
fn an_up_that_starts_within_a_panel_cannot_be_packed_as_e4m3() {
    let model = Model::new("mixtral", Sizes { intermediate: 40, ..SIZES }, true);
    let file = serialize(&model.tensors);
    let checkpoint = Checkpoint::from_bytes(model.config.to_string().as_bytes(), &file).unwrap();
    let error = checkpoint.layer(LAYER).unwrap().pack(&expertile::cpu::Cpu::new(), &mut |_| {}).unwrap_err();
    let message = with_causes(&error);
    assert!(
        message.contains("up of expert 0 cannot be packed: first_row is 40, expected a multiple of 32"),
        "{message}"
    );
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
    assert!(message.contains("has dtype I8, expected BF16 or F8_E4M3"), "{message}");
    let message = with(&|model| model.tensor_mut("experts.1.down_proj.weight").dtype = Dtype::U8);
    assert!(message.contains("has dtype U8, expected F8_E4M3"), "{message}");
    let message = with(&|model| {
        let scales = model.tensor_mut("experts.0.gate_proj.weight_scale_inv");
        (scales.dtype, scales.shape, scales.bytes) = (Dtype::BF16, vec![2, 2], vec![0; 8]);
    });
    assert!(message.contains("has dtype BF16, expected F32"), "{message}");
    let message = with(&|model| model.tensor_mut("mlp.gate.weight").dtype = Dtype::I16);
    assert!(message.contains("gate.weight has dtype I16, expected BF16, F16 or F32"), "{message}");
    let message = with(&|model| model.config["quantization_config"]["weight_block_size"] = json!([64, 128]));
    assert!(message.contains("quantization_config.weight_block_size is [64, 128], expected [128, 128]"), "{message}");
    let message = with(&|model| model.config["quantization_config"] = Value::Null);
    assert!(message.contains("weight_block_size is missing"), "{message}");
    let message = with(&|model| model.config["num_experts_per_tok"] = json!(5));
    assert!(message.contains("the router cannot be: topk is 5, expected 1 to 4"), "{message}");
    let message = with(&|model| model.config["num_experts"] = json!(1u64 << 60));
    assert!(message.contains("gate.weight has shape [4, 256]"), "{message}");
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
