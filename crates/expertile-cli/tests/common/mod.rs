//! Running the binary, and what it prints.
// Each test program takes its share.
#![allow(dead_code)]

use made_up::{Model, NewTensor, Sizes, serialize};
use std::path::Path;
use std::process::{Command, Output};
use tempfile::TempDir;

/// Small checkpoints, as the reader's own tests make them.
#[path = "../../../expertile-checkpoint/tests/files/made_up.rs"]
pub(crate) mod made_up;

/// Runs `expertile` with these arguments in `folder`.
pub(crate) fn expertile(folder: &Path, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_expertile")).current_dir(folder).args(arguments).output().unwrap()
}

/// Runs it, expects success, and gives back what it printed.
pub(crate) fn succeed(folder: &Path, arguments: &[&str]) -> String {
    let output = expertile(folder, arguments);
    let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{arguments:?}\n{stdout}\n{stderr}");
    stdout
}

/// Runs it with `--json` at the end and parses what it printed.
pub(crate) fn json(folder: &Path, arguments: &[&str]) -> serde_json::Value {
    serde_json::from_str(&succeed(folder, &[arguments, &["--json"]].concat())).unwrap()
}

/// Runs it, expects that exit code and exactly one line of error, which is given back.
pub(crate) fn fail(folder: &Path, arguments: &[&str], code: i32) -> String {
    let output = expertile(folder, arguments);
    let stderr = text(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{arguments:?}\n{}\n{stderr}", text(&output.stdout));
    assert!(stderr.starts_with("error: ") && stderr.lines().count() == 1, "{arguments:?}: {stderr}");
    stderr
}

/// Runs it, and expects exit code 2 with a line that contains `part`.
pub(crate) fn refuse(folder: &Path, arguments: &[&str], part: &str) {
    let line = fail(folder, arguments, 2);
    assert!(line.contains(part), "{arguments:?}: {line}");
}

/// The layer of [`folder`].
pub(crate) const SMALL: Sizes = Sizes { hidden: 64, intermediate: 32, experts: 4, topk: 2 };

/// Runs layer 1 of the checkpoint in [`folder`] on one thread.
pub(crate) const LAYER: [&str; 9] =
    ["layer", "--model", "model", "--layer", "1", "--input", "in.safetensors", "--threads", "1"];

/// A checkpoint in `model`, with hidden states of three tokens in `in.safetensors` beside it.
pub(crate) fn folder(shards: usize) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    std::fs::create_dir(folder.path().join("model")).unwrap();
    Model::new("qwen3_moe", SMALL, false).write(&folder.path().join("model"), shards);
    let (dtype, shape, bytes) = (safetensors::Dtype::BF16, vec![3, SMALL.hidden], vec![0; 3 * SMALL.hidden * 2]);
    let states = NewTensor { name: "hidden_states".into(), dtype, shape, bytes };
    std::fs::write(folder.path().join("in.safetensors"), serialize(&[states])).unwrap();
    folder
}

/// An npy file of i32 in C order.
pub(crate) fn npy(shape: &str, data: &[u8]) -> Vec<u8> {
    let header = format!("{{'descr': '<i4', 'fortran_order': False, 'shape': {shape}, }}");
    [b"\x93NUMPY\x01\x00", &(header.len() as u16).to_le_bytes()[..], header.as_bytes(), data].concat()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}
