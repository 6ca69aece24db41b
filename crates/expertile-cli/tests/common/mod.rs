//! Running the binary, and what it prints.
// Each test program takes its share.
#![allow(dead_code)]

use std::path::Path;
use std::process::{Command, Output};

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

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}
