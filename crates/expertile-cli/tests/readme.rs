//! The README: its lines of shell run, its numbers are the results', its picture is the one that `benches/plot` draws.

mod common;
#[path = "../examples/measured.rs"]
mod measured;

use common::{expertile, folder};
use serde_json::Value;
use std::path::Path;

const README: &str = include_str!("../../../README.md");
const PERFORMANCE: &str = include_str!("../../../docs/performance.md");
const RESULTS: &str = include_str!("../../../benches/results/2026-11-29-h200-rivals.json");

/// The arguments of every `expertile` that the README calls in a block of shell.
fn lines_of_shell() -> Vec<Vec<&'static str>> {
    let blocks = README.split("```console\n").skip(1).map(|block| block.split("```").next().unwrap());
    let lines = blocks.flat_map(str::lines).filter_map(|line| line.strip_prefix("$ "));
    let commands = lines.map(|line| line.split(" # ").next().unwrap().trim());
    let arguments = |line: &'static str| {
        let line = line.strip_prefix("cargo run --release -- ").or_else(|| line.strip_prefix("expertile "))?;
        Some(line.split_whitespace().collect())
    };
    commands.filter(|&line| line != "cargo test --workspace").map(|line| arguments(line).expect(line)).collect()
}

#[test]
fn every_line_of_shell_runs() {
    let lines = lines_of_shell();
    assert_eq!(lines.len(), 6);
    let folder = folder(1);
    std::fs::rename(folder.path().join("model"), folder.path().join("DIR")).unwrap();
    for mut arguments in lines {
        // The whole model takes a test too long and too much memory.
        let has = |word: &str| arguments.contains(&word);
        if has("qwen3-30b-a3b") || has("bench") && !has("--device") {
            arguments.extend(["--experts", "8"]);
        }
        let output = expertile(folder.path(), &arguments);
        let stderr = String::from_utf8(output.stderr).unwrap();
        let no_device = arguments.contains(&"--device") && stderr.starts_with("error: cuda is");
        assert!(output.status.success() || no_device, "{arguments:?}: {stderr}");
    }
}

/// Compares the first table after `text`'s start with the results, and returns how many rows it has.
fn check_table(text: &str, format: &str) -> usize {
    let results: Value = serde_json::from_str(RESULTS).unwrap();
    let (_, table) = text.split_once("| layer | tokens | floor |").unwrap();
    let rows: Vec<&str> = table.lines().skip(2).take_while(|line| line.starts_with('|')).collect();
    for row in &rows {
        let cells: Vec<&str> = row.trim_matches('|').split('|').map(str::trim).collect();
        let layers = results["layers"].as_array().unwrap();
        let layer = layers.iter().find(|layer| layer["name"] == cells[0] && layer["format"] == format).unwrap();
        let measured = layer["rows"].as_array().unwrap();
        let measured = measured.iter().find(|row| row["tokens"].as_u64() == cells[1].parse().ok()).unwrap();
        for (key, cell) in ["floor", "ours", "triton", "deepgemm", "flashinfer"].into_iter().zip(&cells[2..]) {
            let expected = measured.get(key).map_or_else(|| "-".to_owned(), Value::to_string);
            assert_eq!(cell.trim_end_matches('*'), expected, "{row}: {key}");
        }
    }
    rows.len()
}

#[test]
fn the_tables_are_the_results() {
    assert!((4..=8).contains(&check_table(README, "e4m3")));
    let (e4m3, bf16) = PERFORMANCE.split_once("\nbf16 experts:\n").unwrap();
    let results: Value = serde_json::from_str(RESULTS).unwrap();
    for (text, format) in [(e4m3, "e4m3"), (bf16, "bf16")] {
        let layers = results["layers"].as_array().unwrap().iter().filter(|layer| layer["format"] == format);
        let rows: usize = layers.map(|layer| layer["rows"].as_array().unwrap().len()).sum();
        assert_eq!(check_table(text, format), rows, "{format}");
    }
}

#[test]
fn the_picture_is_drawn_from_the_results() {
    let picture = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/measured.svg");
    assert_eq!(std::fs::read_to_string(picture).unwrap(), measured::draw(RESULTS).unwrap(), "run benches/plot");
}

#[test]
fn the_readme_is_short() {
    assert!(README.lines().count() <= 130);
    assert!(README.lines().all(|line| line.chars().count() <= 120));
}
