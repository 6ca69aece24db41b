//! `expertile bench`, as a user meets it.

mod common;

use common::{json, succeed};
use serde_json::Value;
use std::path::Path;

const SMALL: [&str; 8] = ["--preset", "qwen3-30b-a3b", "--experts", "8", "--tokens", "1,3", "--repeat", "2"];

fn layer<'a>(more: &[&'a str]) -> Vec<&'a str> {
    [&["bench", "layer"], &SMALL[..], more].concat()
}

fn check(report: &Value, weights: &str) {
    assert_eq!(report["weights"], weights);
    assert_eq!((&report["experts"], &report["repeat"]), (&Value::from(8), &Value::from(2)));
    let sizes = report["sizes"].as_array().unwrap();
    let tokens: Vec<u64> = sizes.iter().map(|size| size["tokens"].as_u64().unwrap()).collect();
    assert_eq!(tokens, [1, 3]);
    for size in sizes {
        let stages = size["stages"].as_array().unwrap();
        let names: Vec<&str> = stages.iter().map(|stage| stage["stage"].as_str().unwrap()).collect();
        assert_eq!(names, ["routing", "permute", "gemm1", "activation", "gemm2", "unpermute"]);
        for stage in stages {
            let moves_rows = ["permute", "unpermute"].contains(&stage["stage"].as_str().unwrap());
            assert_eq!(stage["memcpy_seconds"].is_number(), moves_rows, "{stage}");
            assert_eq!(stage["share_of_memcpy"].is_number(), moves_rows, "{stage}");
        }
        let sum: f64 = stages.iter().map(|stage| stage["seconds"].as_f64().unwrap()).sum();
        assert!((size["total"]["seconds"].as_f64().unwrap() - sum).abs() < 1e-9);
        let flops: u64 = stages.iter().map(|stage| stage["flops"].as_u64().unwrap()).sum();
        assert_eq!(flops, size["tokens"].as_u64().unwrap() * 8 * 2 * 3 * 2048 * 768);
    }
}

#[test]
fn every_stage_of_every_size_is_timed() {
    let folder = tempfile::tempdir().unwrap();
    check(&json(folder.path(), &layer(&[])), "bf16");
    let files = ["--weights", "e4m3", "--activations", "bf16", "--json", "bench.json", "--plot", "bench.svg"];
    let text = succeed(folder.path(), &layer(&files));
    for part in ["tokens", "permute", "gemm1", "of limit", "of memcpy", "layer", "e4m3 weights, bf16 activations"] {
        assert!(text.contains(part), "{part}: {text}");
    }
    let written = std::fs::read_to_string(folder.path().join("bench.json")).unwrap();
    check(&serde_json::from_str(&written).unwrap(), "e4m3");
    let svg = std::fs::read_to_string(folder.path().join("bench.svg")).unwrap();
    assert!(svg.starts_with("<svg") && svg.contains("milliseconds") && svg.contains("gemm2"));
}

#[test]
fn the_steps_around_the_gemms_need_no_weights() {
    let folder = tempfile::tempdir().unwrap();
    let steps = [&["bench", "steps"], &SMALL[..], &["--plot", "steps.svg"]].concat();
    let report = json(folder.path(), &steps);
    assert!(report.get("weight_bytes").is_none());
    for size in report["sizes"].as_array().unwrap() {
        let stages: Vec<&Value> = size["stages"].as_array().unwrap().iter().map(|stage| &stage["stage"]).collect();
        assert_eq!(serde_json::json!(stages), serde_json::json!(["routing", "permute", "activation", "unpermute"]));
        assert!(size["total"]["seconds"].as_f64().unwrap() > 0.0 && size["total"]["bytes"].as_u64().unwrap() > 0);
    }
    let svg = std::fs::read_to_string(folder.path().join("steps.svg")).unwrap();
    assert!(svg.contains("Time of the steps around the GEMMs") && !svg.contains("gemm"));
}

#[test]
fn rows_of_experts_that_are_elsewhere_are_left_out() {
    for what in ["layer", "steps"] {
        let asked = ["bench", what, "--experts", "16", "--local-experts", "8", "--tokens", "40", "--repeat", "1"];
        let report = json(Path::new("."), &asked);
        assert_eq!((&report["experts"], &report["global_experts"]), (&Value::from(8), &Value::from(16)));
        let live = report["sizes"][0]["live_rows"].as_u64().unwrap();
        assert!((100..220).contains(&live), "{what}: half of 320 slots, more or less: {live}");
        assert_eq!(report["sizes"][0]["active_experts"], 8);
    }
    let narrow = ["bench", "layer", "--experts", "8", "--intermediate", "128", "--tokens", "2", "--repeat", "1"];
    assert_eq!(json(Path::new("."), &narrow)["intermediate"], 128);
}

#[test]
fn bad_input_is_one_line_and_exit_code_2() {
    let refuse = |arguments: &[&str], part: &str| {
        common::refuse(Path::new("."), &[&["bench", "layer"], arguments].concat(), part);
    };
    refuse(&["--tokens", "1,0"], "--tokens holds 0, expected sizes of at least 1");
    refuse(&["--tokens", "1,x"], "invalid value 'x'");
    refuse(&["--repeat", "0"], "--repeat is 0, expected at least 1");
    refuse(&["--activations", "e4m3"], "--activations is e4m3, expected bf16");
    refuse(&["--preset", "llama"], "qwen3-30b-a3b");
    refuse(&["--threads", "0"], "--threads is 0");
    refuse(&["--local-experts", "7"], "--local-experts is 7, expected 8 to 128");
    refuse(&["--local-experts", "129"], "--local-experts is 129, expected 8 to 128");
    refuse(&["--device", "cuda:0", "--repeat", "9"], "--repeat goes with --device cpu only");
    refuse(&["--device", "cuda:0", "--isa", "avx2"], "--isa goes with --device cpu only");
    refuse(&["--device", "cuda:99"], "cuda is");
    refuse(&["--experts", "8", "--e4m3-copy"], "--device is cpu, expected cuda:N for --e4m3-copy");
    refuse(&["--experts", "2"], "--experts is 2, expected at least 8");
    refuse(&["--intermediate", "100", "--weights", "e4m3", "--activations", "e4m3"], "intermediate is 100, expected a");
    let refuse = |arguments: &[&str], part: &str| {
        common::refuse(Path::new("."), &[&["bench"], arguments].concat(), part);
    };
    refuse(&["everything"], "unrecognized subcommand 'everything'");
    refuse(&["layers"], "similar subcommand");
    refuse(&["steps", "--weights", "bf16"], "unexpected argument '--weights'");
    refuse(&["tiles", "--device", "cpu"], "--device is cpu, expected cuda:N");
    refuse(&["tiles", "--experts", "0"], "--experts is 0, expected 1 to 512");
    refuse(&["tiles", "--same", "0"], "--same is 0, expected at least 1");
    refuse(&["tiles", "--device", "cuda:99"], "cuda is");
}
