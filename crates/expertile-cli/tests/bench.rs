//! `expertile bench`, as a user meets it.

mod common;

use common::{json, succeed};
use serde_json::Value;
use std::path::Path;

const SMALL: [&str; 9] = ["bench", "--preset", "qwen3-30b-a3b", "--experts", "8", "--tokens", "1,3", "--repeat", "2"];

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
    check(&json(folder.path(), &SMALL), "bf16");
    let files = ["--weights", "e4m3", "--activations", "bf16", "--json", "bench.json", "--plot", "bench.svg"];
    let text = succeed(folder.path(), &[&SMALL[..], &files].concat());
    for part in ["tokens", "permute", "gemm1", "of limit", "of memcpy", "layer", "e4m3 weights, bf16 activations"] {
        assert!(text.contains(part), "{part}: {text}");
    }
    let written = std::fs::read_to_string(folder.path().join("bench.json")).unwrap();
    check(&serde_json::from_str(&written).unwrap(), "e4m3");
    let svg = std::fs::read_to_string(folder.path().join("bench.svg")).unwrap();
    assert!(svg.starts_with("<svg") && svg.contains("milliseconds") && svg.contains("gemm2"));
}

#[test]
fn bad_input_is_one_line_and_exit_code_2() {
    let refuse = |arguments: &[&str], part: &str| {
        common::refuse(Path::new("."), &[&["bench"], arguments].concat(), part);
    };
    refuse(&["--tokens", "1,0"], "--tokens holds 0, expected sizes of at least 1");
    refuse(&["--tokens", "1,x"], "invalid value 'x'");
    refuse(&["--repeat", "0"], "--repeat is 0, expected at least 1");
    refuse(&["--activations", "e4m3"], "--activations is e4m3, expected bf16");
    refuse(&["--preset", "llama"], "qwen3-30b-a3b");
    refuse(&["--threads", "0"], "--threads is 0");
    refuse(&["--local-experts", "8"], "--local-experts goes with --device cuda:N layer only");
    refuse(&["--device", "cuda:0", "--local-experts", "8"], "--local-experts goes with --device cuda:N layer only");
    refuse(&["--device", "cuda:0", "--weights", "bf16"], "--weights bf16 goes with --device cuda:N layer or cpu only");
    refuse(&["layer", "--device", "cuda:0", "--plot", "a.svg"], "--plot goes with --device cpu only");
    refuse(&["--device", "cuda:0", "--repeat", "9"], "--repeat goes with --device cpu only");
    refuse(&["layer", "--device", "cuda:99"], "cuda is");
    refuse(&["everything"], "invalid value 'everything'");
    refuse(&["--experts", "2"], "--experts is 2, expected at least 8");
}
