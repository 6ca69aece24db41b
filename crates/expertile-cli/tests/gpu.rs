//! `expertile layer` on a GPU: an MXFP4 checkpoint as gpt-oss publishes it, and int4 weights. Without a GPU, the same on
//! the CPU.

mod common;

use common::expertile;
use common::made_up::{LAYER, Model, NewTensor, Sizes, serialize};
use half::bf16;
use safetensors::Dtype;
use serde_json::{Value, json};
use std::path::Path;

/// Neither width is a multiple of 128.
const SIZES: Sizes = Sizes { hidden: 192, intermediate: 320, experts: 6, topk: 2 };
const TOKENS: usize = 9;

/// gpt-oss with random blocks, close scales, and biases that show in every output.
fn gpt_oss() -> Model {
    let Sizes { hidden, intermediate, experts, topk } = SIZES;
    let mut random = expertile_testkit::Random::new(9);
    let mut model = Model::new("qwen3_moe", SIZES, false);
    model.tensors.retain(|tensor| !tensor.name.contains("experts"));
    let layer = format!("model.layers.{LAYER}.mlp");
    model.tensor_mut("gate.weight").name = format!("{layer}.router.weight");
    for (name, rows, cols) in [("gate_up_proj", 2 * intermediate, hidden), ("down_proj", hidden, intermediate)] {
        let mut bytes = |dtype, part: &str, shape: Vec<usize>, mut byte: Box<dyn FnMut(f32) -> Vec<u8>>| {
            let values = (0..shape.iter().product::<usize>()).flat_map(|_| byte(random.uniform())).collect();
            let name = format!("{layer}.experts.{name}_{part}");
            model.tensors.push(NewTensor { name, dtype, shape, bytes: values });
        };
        let blocks = vec![experts, rows, cols / 32, 16];
        bytes(Dtype::U8, "blocks", blocks, Box::new(|x| vec![(128.0 + 127.0 * x) as u8]));
        bytes(Dtype::U8, "scales", vec![experts, rows, cols / 32], Box::new(|x| vec![if x < 0.0 { 120 } else { 121 }]));
        let bias = |x: f32| bf16::from_f32(x).to_le_bytes().to_vec();
        bytes(Dtype::BF16, "bias", vec![experts, rows], Box::new(bias));
    }
    let bytes = (0..experts).flat_map(|at| (0.1 * at as f32).to_le_bytes()).collect();
    let name = format!("{layer}.router.bias");
    model.tensors.push(NewTensor { name, dtype: Dtype::F32, shape: vec![experts], bytes });
    model.config = json!({
        "model_type": "gpt_oss", "hidden_size": hidden, "intermediate_size": intermediate,
        "num_local_experts": experts, "num_experts_per_tok": topk, "swiglu_limit": 7.0,
        "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    });
    model
}

#[test]
fn an_mxfp4_checkpoint_is_computed_on_a_gpu_as_on_the_cpu() {
    let folder = tempfile::tempdir().unwrap();
    gpt_oss().write(folder.path(), 2);
    let mut random = expertile_testkit::Random::new(5);
    let states = (0..TOKENS * SIZES.hidden).flat_map(|_| bf16::from_f32(random.uniform()).to_le_bytes()).collect();
    let shape = vec![TOKENS, SIZES.hidden];
    let states = NewTensor { name: "hidden_states".into(), dtype: Dtype::BF16, shape, bytes: states };
    std::fs::write(folder.path().join("in.safetensors"), serialize(&[states])).unwrap();
    let layer = LAYER.to_string();
    let call = ["--model", ".", "--layer", &layer, "--input", "in.safetensors"];
    check(folder.path(), &call, "mxfp4", 3 * SIZES.experts * SIZES.hidden * SIZES.intermediate, 4.25);
}

#[test]
fn int4_weights_are_computed_on_a_gpu_as_on_the_cpu() {
    let folder = tempfile::tempdir().unwrap();
    let call = ["--preset", "qwen3-30b-a3b", "--experts", "8", "--tokens", "9", "--weights", "int4"];
    check(folder.path(), &call, "int4", 3 * 8 * 2048 * 768, 4.5);
}

/// Runs a layer of so many weights, of so many bits each, on both devices with both kinds of rows; mxfp4 also with a copy
/// in e4m3.
fn check(folder: &Path, call: &[&str], format: &str, weights: usize, bits: f64) {
    let copies: &[&str] = if format == "mxfp4" { &["--e4m3-copy"] } else { &[] };
    for (device, activations, copy) in [
        ("cpu", "bf16", &[][..]),
        ("cpu", "e4m3", &[]),
        ("cuda:0", "bf16", &[]),
        ("cuda:0", "e4m3", &[]),
        ("cuda:0", "e4m3", copies),
    ] {
        let options = ["--check", "--json", "--device", device, "--activations", activations];
        let output = expertile(folder, &[&["layer"], call, &options, copy].concat());
        let stderr = String::from_utf8(output.stderr).unwrap();
        if device != "cpu"
            && stderr.starts_with("error: cuda is")
            && std::env::var_os("EXPERTILE_NEEDS_DEVICE").is_none()
        {
            println!("skipped: {stderr}");
            return;
        }
        assert!(output.status.success(), "{device}, {activations}: {stderr}");
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(report["check"]["passed"], true, "{report:#}");
        assert_eq!([&report["weights"], &report["activations"]], [format, activations], "{report:#}");
        // What is beyond are whole panels or slabs of outputs.
        let found = 8.0 * report["weight_bytes"].as_f64().unwrap() / weights as f64;
        let bits = bits + 8.0 * copy.len() as f64;
        assert!((bits..bits + 0.35).contains(&found), "{device}: {found} bits");
    }
}
