//! `expertile quantize`, as a user meets it.

mod common;

use common::made_up::{LAYER, Model, Sizes};
use common::{json, refuse, succeed};
use serde_json::{Value, json};
use std::path::Path;

const SIZES: Sizes = Sizes { hidden: 256, intermediate: 192, experts: 6, topk: 2 };

fn quantize(folder: &Path, format: &str, output: &str) -> Value {
    json(folder, &["quantize", "--model", ".", "--layer", "1", "--weights", format, "--output", output])
}

fn layer(folder: &Path, model: &str) -> Value {
    json(folder, &["layer", "--model", model, "--layer", "1", "--input", "in.safetensors", "--check"])
}

fn input(folder: &Path) {
    use safetensors::{Dtype, tensor::TensorView};
    let mut random = expertile_testkit::Random::new(3);
    let states = (0..7 * SIZES.hidden).map(|_| half::bf16::from_f32(random.uniform()));
    let bytes: Vec<u8> = states.flat_map(half::bf16::to_le_bytes).collect();
    let view = TensorView::new(Dtype::BF16, vec![7, SIZES.hidden], &bytes).unwrap();
    std::fs::write(folder.join("in.safetensors"), safetensors::serialize([("hidden_states", view)], None).unwrap())
        .unwrap();
}

/// A matrix's error is that of the format, on random weights: 2^-2 of a unit for e2m1, 2^-4 for e4m3.
fn assert_errors(report: &Value, least: f64, most: f64) {
    let experts = report["experts"].as_array().unwrap();
    assert_eq!(experts.len(), SIZES.experts);
    for (id, expert) in experts.iter().enumerate() {
        assert_eq!(expert["expert"], json!(id));
        for part in ["error", "gate", "up", "down"] {
            let error = expert[part].as_f64().unwrap();
            assert!((least..most).contains(&error), "{part} of {id}: {error}");
        }
    }
    let error = report["error"].as_f64().unwrap();
    assert!((least..most).contains(&error), "{error}");
}

#[test]
fn a_layer_in_another_format_is_a_checkpoint_that_this_command_runs() {
    for family in ["qwen3_moe", "deepseek_v3", "mixtral"] {
        let folder = tempfile::tempdir().unwrap();
        Model::new(family, SIZES, false).write(folder.path(), 1);
        input(folder.path());
        for (format, least, most) in [("e4m3", 5e-5, 1e-3), ("mxfp4", 2e-3, 2e-2), ("int4", 1e-3, 1e-2)] {
            let report = quantize(folder.path(), format, format);
            assert_errors(&report, least, most);
            let ran = layer(folder.path(), format);
            assert_eq!((&ran["weights"], &ran["check"]["passed"]), (&json!(format), &json!(true)), "{family}");
            // Quantized weights cannot be quantized again.
            refuse(
                folder.path(),
                &["quantize", "--model", format, "--layer", "1", "--weights", "mxfp4", "--output", "again"],
                "expected BF16, F16 or F32, to be quantized",
            );
            assert!(!folder.path().join("again").exists());
        }
    }
}

#[test]
fn what_is_in_the_way_is_named_and_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let model = Model::new("qwen3_moe", SIZES, false);
    model.write(folder.path(), 1);
    let refused = |options: &str, message: &str| {
        let mut words = vec!["quantize", "--model", ".", "--layer"];
        words.extend(options.split_whitespace());
        refuse(folder.path(), &words, message);
    };
    refused("1 --weights bf16 --output out", "--weights is bf16, expected e4m3, mxfp4 or int4");
    refused("1 --weights int5 --output out", "expected one of e4m3, bf16, mxfp4, int4");
    refused("1 --weights mxfp4 --output .", "--output is ., expected a folder that is empty, or none");
    refused("1 --weights mxfp4 --output config.json", "--output is config.json, expected a folder");
    refused("7 --weights mxfp4 --output out", "layer is 7");
    assert!(!folder.path().join("out").exists());

    let odd = Sizes { hidden: 250, ..SIZES };
    Model::new("qwen3_moe", odd, false).write(folder.path(), 1);
    refused("1 --weights mxfp4 --output out", "k is 250, expected a positive multiple of 32");
    let mut nan = model;
    let tensor = nan.tensor_mut("experts.3.up_proj.weight");
    tensor.bytes[..2].copy_from_slice(&half::bf16::NAN.to_le_bytes());
    nan.write(folder.path(), 1);
    refused("1 --weights mxfp4 --output out", "up of expert 3");
    assert!(!folder.path().join("out").exists() && LAYER == 1);
}

#[test]
fn text_lists_the_worst_experts() {
    let folder = tempfile::tempdir().unwrap();
    Model::new("qwen3_moe", Sizes { experts: 12, ..SIZES }, false).write(folder.path(), 1);
    let words = ["quantize", "--model", ".", "--layer", "1", "--weights", "mxfp4", "--output", "out", "--threads", "2"];
    let text = succeed(folder.path(), &words);
    assert!(text.contains("12 experts from BF16") && text.contains("to mxfp4"), "{text}");
    assert!(text.contains("the 8 experts with the largest errors"), "{text}");
    assert_eq!(text.matches("e-3").count() + text.matches("e-2").count(), 1 + 8 * 4, "{text}");
}
