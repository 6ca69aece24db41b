//! The README: its lines of shell run, its numbers are the results', its picture is the one that `benches/plot` draws.

mod common;
#[path = "../examples/measured.rs"]
mod measured;

use common::{expertile, folder};
use serde_json::Value;
use std::path::Path;

const README: &str = include_str!("../../../README.md");
const PERFORMANCE: &str = include_str!("../../../docs/performance.md");
const RESULTS: &str = include_str!("../../../benches/results/2026-12-01-h200-rivals-joined.json");

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

/// The key of a path in the results, by what a table's head has of its name; none for what is computed.
fn key_of(head: &str) -> Option<&'static str> {
    let names = ["floor", "Expertile", "Triton", "umming", "DeepGEMM", "FlashInfer"];
    let keys = ["floor", "ours", "triton", "humming", "deepgemm", "flashinfer"];
    let is_path = !head.contains(" / ");
    names.into_iter().zip(keys).find(|&(name, _)| is_path && head.contains(name)).map(|(_, key)| key)
}

/// Microseconds as the tables have them: three digits or so; what was read as a whole number stays one.
fn microseconds(value: Option<&Value>) -> String {
    match value {
        None => "-".to_owned(),
        Some(value) if value.is_u64() => value.to_string(),
        Some(value) => {
            let value = value.as_f64().unwrap();
            format!("{value:.*}", usize::from(value < 100.0))
        }
    }
}

fn cells(row: &str) -> Vec<&str> {
    row.trim_matches('|').split('|').map(str::trim).collect()
}

/// Compares the first table after `text`'s start with the results, and returns how many rows it has.
fn check_table(text: &str, format: &str) -> usize {
    let results: Value = serde_json::from_str(RESULTS).unwrap();
    let start = text.find("| layer | tokens | floor |").unwrap();
    let mut lines = text[start..].lines();
    let head = cells(lines.next().unwrap());
    let rows: Vec<&str> = lines.skip(1).take_while(|line| line.starts_with('|')).collect();
    for row in &rows {
        let cells = cells(row);
        let name = cells[0].strip_suffix(", Zipf routing");
        let (name, routing) = name.map_or((cells[0], "uniform"), |name| (name, "zipf"));
        let layers = results["layers"].as_array().unwrap();
        let is_it = |layer: &&Value| layer["name"] == name && layer["format"] == format && layer["routing"] == routing;
        let measured = layers.iter().find(is_it).unwrap()["rows"].as_array().unwrap();
        let measured = measured.iter().find(|row| row["tokens"].as_u64() == cells[1].parse().ok()).unwrap();
        for (title, cell) in head.iter().zip(&cells).skip(2) {
            if let Some(key) = key_of(title) {
                assert_eq!(cell.trim_end_matches('*'), microseconds(measured.get(key)), "{row}: {title}");
            }
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
