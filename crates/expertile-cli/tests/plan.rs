//! `expertile plan`, as a user meets it.

mod common;

use common::{json, succeed};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};
use std::path::Path;

const EXAMPLE: [&str; 7] = ["plan", "--tokens", "128", "--topk", "8", "--experts", "128"];

fn with<'a>(base: &[&'a str], more: &[&'a str]) -> Vec<&'a str> {
    [base, more].concat()
}

fn write_npy(file: &Path, descr: &str, fortran: &str, shape: &str, data: &[u8]) {
    let header = format!("{{'descr': '{descr}', 'fortran_order': {fortran}, 'shape': {shape}, }}");
    let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
    bytes.extend((header.len() as u16).to_le_bytes());
    bytes.extend(header.as_bytes());
    bytes.extend(data);
    std::fs::write(file, bytes).unwrap();
}

fn write_safetensors(file: &Path, name: &str, dtype: Dtype, shape: &[usize], data: &[u8]) {
    let view = TensorView::new(dtype, shape.to_vec(), data).unwrap();
    std::fs::write(file, safetensors::serialize([(name, view)], None).unwrap()).unwrap();
}

fn i32_bytes(ids: &[i32]) -> Vec<u8> {
    ids.iter().flat_map(|id| id.to_le_bytes()).collect()
}

#[test]
fn the_contracts_example_comes_out_in_numbers_and_keys() {
    let folder = tempfile::tempdir().unwrap();
    let report = json(folder.path(), &EXAMPLE);
    assert_eq!(report["alignment"], 128);
    assert_eq!(report["m_sum_reference"], 17280);
    assert_eq!(report["m_sum_tight"], 16384);
    assert_eq!(report["m_sum_exact"], Value::Null);
    assert_eq!(report["live_rows"], 1024);
    assert_eq!(report["padding_rows"], 16384 - 1024);
    assert_eq!(report["workspace_bytes"], Value::Null);
    let list = report["by_alignment"].as_array().unwrap();
    let alignments: Vec<&Value> = list.iter().map(|sizes| &sizes["alignment"]).collect();
    assert_eq!(json!(alignments), json!([8, 16, 32, 64, 128, 256]));
    for key in ["m_sum_reference", "m_sum_tight", "m_sum_exact", "live_rows", "padding_rows", "workspace_bytes"] {
        assert_eq!(list[4][key], report[key], "{key}");
    }
    assert_eq!(list[0]["m_sum_reference"], 1920);
}

#[test]
fn the_table_holds_the_same_numbers() {
    let folder = tempfile::tempdir().unwrap();
    let text = succeed(folder.path(), &EXAMPLE);
    for part in ["128 (asked)", "17280", "16384", "15360", "93.8 %", "1920"] {
        assert!(text.contains(part), "{part}: {text}");
    }
}

#[test]
fn workspace_counts_every_buffer_once() {
    let folder = tempfile::tempdir().unwrap();
    let widths = ["--hidden", "2048", "--intermediate", "768"];
    let report = json(folder.path(), &with(&EXAMPLE, &widths));
    let row = (2048 + 4 * 16) + 2 * 2 * 768 + (768 + 4 * 6) + 2 * 2048;
    assert_eq!(report["workspace_bytes"], 16384 * row);
    let report = json(folder.path(), &with(&EXAMPLE, &with(&widths, &["--activations", "bf16"])));
    assert_eq!(report["workspace_bytes"], 16384 * 2 * (2048 + 2 * 768 + 768 + 2048));
}

#[test]
fn a_rule_shrinks_the_alignment() {
    let folder = tempfile::tempdir().unwrap();
    let asked = ["plan", "--tokens", "8", "--topk", "8", "--experts", "16"];
    let rule = |arch, rule| json(folder.path(), &with(&asked, &["--arch", arch, "--rule", rule]));
    let report = rule("sm100", "deepgemm-2026-06");
    assert_eq!((&report["alignment"], &report["m_sum_reference"]), (&json!(64), &json!(64 + 1024)));
    assert_eq!(report["by_alignment"][4]["alignment"], 128);
    assert_eq!(rule("sm100", "vllm-fork")["alignment"], 64);
    assert_eq!(rule("sm120", "vllm-fork")["alignment"], 64);
    assert_eq!(rule("sm100", "deepgemm-2.8")["alignment"], 128);
    assert_eq!(rule("sm90", "deepgemm-2026-06")["alignment"], 128);
}

#[test]
fn counts_give_the_exact_size_and_the_imbalance() {
    let folder = tempfile::tempdir().unwrap();
    let asked = ["plan", "--tokens", "10", "--topk", "2", "--counts", "9,0,1,2", "--alignment", "8"];
    let report = json(folder.path(), &asked);
    assert_eq!(report["m_sum_exact"], 16 + 8 + 8);
    assert_eq!((&report["live_rows"], &report["padding_rows"]), (&json!(12), &json!(20)));
    assert_eq!((&report["imbalance"], &report["empty_experts"]), (&json!(3.0), &json!(1)));
    let text = succeed(folder.path(), &asked);
    assert!(text.contains("fullest expert: 0 with 9 rows") && text.contains("empty experts: 1 of 4"), "{text}");
}

#[test]
fn ids_are_read_from_both_formats_and_both_widths() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let ids = [0, 2, 2, -1, 3, 2];
    let wide: Vec<u8> = ids.iter().flat_map(|&id| i64::from(id).to_le_bytes()).collect();
    write_npy(&path("a.npy"), "<i4", "False", "(3, 2)", &i32_bytes(&ids));
    write_npy(&path("b.npy"), "<i4", "True", "(3, 2)", &i32_bytes(&[0, 2, 3, 2, -1, 2]));
    write_npy(&path("c.npy"), "<i8", "False", "(3, 2)", &wide);
    write_safetensors(&path("d.safetensors"), "topk_ids", Dtype::I64, &[3, 2], &wide);
    write_safetensors(&path("e.safetensors"), "topk_ids", Dtype::I32, &[3, 2], &i32_bytes(&ids));
    for file in ["a.npy", "b.npy", "c.npy", "d.safetensors", "e.safetensors"] {
        let report = json(folder.path(), &["plan", "--ids", file, "--experts", "4", "--alignment", "4"]);
        assert_eq!(report["expert_num_tokens"], json!([1, 0, 3, 1]), "{file}");
        assert_eq!((&report["m_sum_exact"], &report["live_rows"]), (&json!(12), &json!(5)), "{file}");
    }
    let local = ["plan", "--ids", "a.npy", "--experts", "4", "--local-experts", "3", "--alignment", "4"];
    assert_eq!(json(folder.path(), &local)["expert_num_tokens"], json!([1, 0, 3]));
}

#[test]
fn no_tokens_need_no_rows() {
    let folder = tempfile::tempdir().unwrap();
    let report = json(folder.path(), &["plan", "--tokens", "0", "--topk", "8", "--experts", "4"]);
    assert_eq!((&report["m_sum_tight"], &report["padding_rows"]), (&json!(0), &json!(0)));
    write_npy(&folder.path().join("none.npy"), "<i4", "False", "(0, 8)", &[]);
    let report = json(folder.path(), &["plan", "--ids", "none.npy", "--experts", "4"]);
    assert_eq!((&report["imbalance"], &report["empty_experts"]), (&Value::Null, &json!(4)));
}

#[test]
fn the_plot_draws_every_expert_and_replaces_the_file_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("plot.svg");
    std::fs::write(&file, "old").unwrap();
    let asked = ["plan", "--tokens", "10", "--topk", "2", "--counts", "9,0,8,2", "--alignment", "8"];
    succeed(folder.path(), &with(&asked, &["--plot", "plot.svg"]));
    let svg = std::fs::read_to_string(file).unwrap();
    let of = |color: &str| svg.matches(&format!("fill=\"{color}\"")).count();
    // Three experts have rows (and one square of the legend), two of them padding.
    assert_eq!((of("#1F77B4"), of("#F7B678")), (3 + 1, 2 + 1));
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "temporary files were left behind");
}

#[test]
fn bad_input_is_one_line_and_exit_code_2() {
    let folder = tempfile::tempdir().unwrap();
    let refuse = |arguments: &[&str], part: &str| {
        common::refuse(folder.path(), arguments, part);
    };
    let plain = ["plan", "--tokens", "4", "--topk", "2"];
    refuse(&plain, "--experts");
    refuse(&["plan"], "required arguments were not provided: --tokens <M> --topk <K> --experts <G>");
    refuse(&["plan", "--tokens", "-4"], "--tokens");
    refuse(&["nonsense"], "nonsense");
    refuse(&with(&plain, &["--experts", "0"]), "local_experts is 0");
    refuse(&["plan", "--tokens", "4", "--topk", "0", "--experts", "4"], "topk is 0");
    refuse(&with(&plain, &["--experts", "4", "--alignment", "0"]), "alignment is 0");
    refuse(&with(&plain, &["--experts", "4", "--local-experts", "5"]), "--local-experts is 5, expected at most 4");
    refuse(&with(&plain, &["--experts", "4", "--arch", "sm90"]), "--rule");
    refuse(&with(&plain, &["--experts", "4", "--arch", "sm91", "--rule", "vllm-fork"]), "sm90, sm100, sm120");
    refuse(&with(&plain, &["--experts", "4", "--arch", "sm90", "--rule", "best"]), "deepgemm-2026-06");
    refuse(&with(&plain, &["--experts", "4", "--hidden", "128"]), "--intermediate");
    let odd = with(&plain, &["--experts", "4", "--hidden", "2900", "--intermediate", "128"]);
    refuse(&odd, "hidden is 2900, expected a positive multiple of 64");
    refuse(&with(&plain, &["--experts", "4", "--plot", "x.svg"]), "--plot needs --ids or --counts");
    refuse(&with(&plain, &["--counts", "1,2,x"]), "x");
    refuse(&with(&plain, &["--counts", "-1,2"]), "expert_num_tokens[0] is -1");
    refuse(&with(&plain, &["--counts", "4,4,1"]), "add up to 9, expected at most 4 tokens * 2");
    refuse(&with(&plain, &["--counts", "1,2", "--experts", "3"]), "--counts holds 2 numbers");
    let huge = usize::MAX.to_string();
    refuse(&["plan", "--tokens", &huge, "--topk", "2", "--experts", "4"], "overflows");
    refuse(&with(&plain, &["--counts", "1,2", "--plot", "no/such/x.svg"]), "no/such/x.svg cannot be written");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn no_command_shows_the_commands() {
    let output = common::expertile(std::path::Path::new("."), &[]);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(["plan", "layer", "bench", "doctor"].iter().all(|name| stderr.contains(name)), "{stderr}");
}

#[test]
fn bad_files_of_ids_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let refuse = |file: &str, more: &[&str], part: &str| {
        common::refuse(folder.path(), &with(&["plan", "--experts", "4", "--ids", file], more), part);
    };
    refuse("none.npy", &[], "none.npy cannot be read");
    std::fs::write(path("text.npy"), "not an array").unwrap();
    refuse("text.npy", &[], "text.npy: header length is");
    write_npy(&path("float.npy"), "<f4", "False", "(1, 1)", &[0; 4]);
    refuse("float.npy", &[], "dtype <f4, expected <i4 or <i8");
    write_npy(&path("past.npy"), "<i4", "False", "(1, 2)", &i32_bytes(&[1, 4]));
    refuse("past.npy", &[], "topk_ids[0, 1] is 4, expected an id below 4");
    refuse("past.npy", &["--tokens", "3"], "--tokens is 3, expected 1, as in the file of ids");
    refuse("past.npy", &["--counts", "1,1,1,1"], "cannot be used with");
    write_safetensors(&path("flat.safetensors"), "topk_ids", Dtype::I32, &[2], &[0; 8]);
    refuse("flat.safetensors", &[], "shape [2], expected [M, topk]");
}
