//! What is read: regular files and open pipes, no further than they say they go, and only what memory holds.

#![cfg(unix)]

mod common;

use common::{LAYER, fail, folder, npy, refuse};
use serde_json::json;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// Runs a line of shell in which `expertile` is the command.
fn shell(folder: &Path, line: &str) -> Output {
    let line = line.replace("expertile", env!("CARGO_BIN_EXE_expertile"));
    Command::new("sh").current_dir(folder).args(["-c", &line]).output().unwrap()
}

/// Expects exit code 2 and one line, which is given back.
fn shell_fails(folder: &Path, line: &str) -> String {
    let output = shell(folder, line);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!((output.status.code(), stderr.lines().count()), (Some(2), 1), "{line}: {stderr}");
    stderr
}

/// Puts something that is no regular file in a place.
type Make = dyn Fn(&Path);

#[test]
fn what_is_no_file_is_named_and_not_waited_for() {
    let make: [(&str, &Make); 5] = [
        ("a FIFO", &|file| assert!(Command::new("mkfifo").arg(file).status().unwrap().success())),
        ("a device", &|file| symlink("/dev/zero", file).unwrap()),
        ("a directory", &|file| fs::create_dir(file).unwrap()),
        ("a socket", &|file| drop(std::os::unix::net::UnixListener::bind(file).unwrap())),
        ("a device", &|file| symlink("/dev/tty", file).unwrap()),
    ];
    for (kind, make) in make {
        let files: [(&str, usize); 5] = [
            ("model/config.json", 1),
            ("model/model.safetensors", 1),
            ("model/model.safetensors.index.json", 3),
            ("model/model-00001-of-00003.safetensors", 3),
            ("in.safetensors", 1),
        ];
        for (name, shards) in files {
            let folder = folder(shards);
            let file: PathBuf = folder.path().join(name);
            fs::remove_file(&file).unwrap();
            make(&file);
            let line = fail(folder.path(), &LAYER, 2);
            assert!(line.contains(&format!("{name}: kind of file is {kind}, expected a regular file")), "{line}");
        }
        let folder = tempfile::tempdir().unwrap();
        make(&folder.path().join("ids.npy"));
        let line = fail(folder.path(), &["plan", "--experts", "4", "--ids", "ids.npy"], 2);
        assert!(line.contains(&format!("ids.npy: kind of file is {kind}, expected a regular file")), "{line}");
    }
}

#[test]
fn open_pipes_are_read_as_far_as_their_header_says() {
    let folder = folder(1);
    fs::write(folder.path().join("ids.npy"), npy("(2, 2)", &[0; 16])).unwrap();
    let layer = "expertile layer --model model --layer 1 --threads 1 --input";
    for line in [
        format!("cat in.safetensors | {layer} /dev/stdin"),
        format!("cat in.safetensors | {layer} /proc/self/fd/0"),
        format!("{layer} /dev/stdin < in.safetensors"),
        "(head -c 20 ids.npy; sleep 0.2; tail -c +21 ids.npy) | expertile plan --experts 4 --ids /dev/stdin".into(),
    ] {
        let output = shell(folder.path(), &line);
        assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
    }
    for (line, part) in [
        (format!("yes | {layer} /dev/stdin"), "header length is 754645927544294009"),
        (format!("cat in.safetensors /dev/zero | {layer} /dev/stdin"), "length of the tensors' data is 385 bytes"),
        (format!("head -c 100 in.safetensors | {layer} /dev/stdin"), "/dev/stdin: "),
        ("cat ids.npy /dev/zero | expertile plan --experts 4 --ids /dev/stdin".into(), "npy data is 17 bytes"),
        ("cat /dev/zero | expertile plan --experts 4 --ids /dev/stdin".into(), "/dev/stdin: "),
        ("expertile plan --experts 4 --ids /dev/stdin < /dev/null".into(), "kind of file is a device"),
    ] {
        let error = shell_fails(folder.path(), &line);
        assert!(error.contains(part), "{line}: {error}");
    }
}

#[test]
fn shapes_that_no_memory_holds_are_refused_before_they_are_walked() {
    let folder = tempfile::tempdir().unwrap();
    let refuse_ids = |shape: &str, more: &[&str], part: &str| {
        fs::write(folder.path().join("ids.npy"), npy(shape, &[])).unwrap();
        refuse(folder.path(), &[&["plan", "--ids", "ids.npy"], more].concat(), part);
    };
    refuse_ids(
        "(0, 18446744073709551615)",
        &["--experts", "4"],
        "shape [0, 18446744073709551615], expected [M, topk] with",
    );
    refuse_ids("(0, 1000000000000)", &["--experts", "4"], "with both at most 2147483647");
    refuse_ids("(1000000000000, 0)", &["--experts", "4"], "with both at most 2147483647");
    refuse_ids(
        "(0, 8)",
        &["--experts", "1000000000000"],
        "--experts is 1000000000000, expected at most 4194304 with --ids",
    );
    let line = fail(folder.path(), &["plan", "--tokens", "1", "--topk", "1", "--experts", "1000000000000"], 2);
    assert!(line.contains("local_experts is 1000000000000"), "{line}");
    let preset = ["layer", "--preset", "qwen3-30b-a3b", "--experts", "8", "--tokens", "1000000000"];
    assert!(
        fail(folder.path(), &preset, 2).contains("--tokens is 1000000000, expected fewer: [1000000000, 2048] does")
    );
    let many = ["bench", "layer", "--experts", "8", "--tokens", "1000000000"];
    let line = fail(folder.path(), &many, 2);
    assert!(line.contains(" of memory, expected at most ") && line.contains("leaves"), "{line}");
}

#[test]
fn a_checkpoint_that_memory_does_not_hold_is_refused_by_its_config() {
    let folder = folder(1);
    let model = folder.path().join("model");
    let mut config: serde_json::Value = serde_json::from_slice(&fs::read(model.join("config.json")).unwrap()).unwrap();
    config["num_experts"] = json!(1_000_000_000);
    fs::write(model.join("config.json"), config.to_string()).unwrap();
    // A router of terabytes that takes no place on the disk.
    let header = json!({"model.layers.1.mlp.gate.weight": {
        "dtype": "BF16", "shape": [1_000_000_000, 64], "data_offsets": [0, 128_000_000_000u64]
    }});
    let header = header.to_string();
    let bytes = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes()].concat();
    fs::write(model.join("model.safetensors"), &bytes).unwrap();
    let file = fs::File::options().write(true).open(model.join("model.safetensors")).unwrap();
    if file.set_len(bytes.len() as u64 + 128_000_000_000).is_ok() {
        let line = fail(folder.path(), &LAYER, 2);
        assert!(line.contains("the layer at the least takes 5.82 TiB of memory, expected at most "), "{line}");
    }
    // And an input of which no end is in sight.
    let input = fs::File::options().write(true).open(folder.path().join("in.safetensors")).unwrap();
    if input.set_len(1 << 42).is_ok() {
        let preset = ["layer", "--preset", "qwen3-30b-a3b", "--experts", "8", "--input", "in.safetensors"];
        let line = fail(folder.path(), &preset, 2);
        assert!(line.contains("in.safetensors takes 8.00 TiB of memory, expected at most "), "{line}");
    }
}

#[test]
fn limits_of_the_shell_are_known() {
    let folder = folder(1);
    let layer = "expertile layer --model model --layer 1 --threads 1 --input";
    let whole = shell(folder.path(), &format!("ulimit -v 3000000; {layer} in.safetensors"));
    assert!(whole.status.success(), "{}", String::from_utf8_lossy(&whole.stderr));
    fs::File::options().write(true).open(folder.path().join("in.safetensors")).unwrap().set_len(1 << 30).unwrap();
    let line = shell_fails(folder.path(), &format!("ulimit -v 1000000; {layer} in.safetensors"));
    assert!(
        line.contains("takes 2.00 GiB of memory") && line.contains("the limit on address space (ulimit -v) leaves"),
        "{line}"
    );
    let line = shell_fails(folder.path(), &format!("ulimit -d 1000000; {layer} in.safetensors"));
    assert!(line.contains("the limit on data (ulimit -d) leaves"), "{line}");
}

#[test]
fn more_threads_than_processors_can_use_are_refused() {
    let folder = folder(1);
    for threads in ["4096", "65536", "18446744073709551615"] {
        let mut arguments = LAYER;
        arguments[8] = threads;
        let line = fail(folder.path(), &arguments, 2);
        assert!(line.contains(&format!("--threads is {threads}, expected 1 to ")), "{line}");
    }
    let layer = "expertile layer --model model --layer 1 --input in.safetensors";
    let line = shell_fails(folder.path(), &format!("RAYON_NUM_THREADS=100000 {layer}"));
    assert!(line.contains("RAYON_NUM_THREADS is 100000, expected 1 to "), "{line}");
}
