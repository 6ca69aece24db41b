//! Where results go: regular files whole or not at all, other things written through, inputs never touched, and nothing
//! left behind by a signal.

#![cfg(unix)]

mod common;

use common::{LAYER, expertile, fail, folder, succeed};
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// A plan whose picture goes to the target that is appended.
const PLOT: [&str; 8] = ["plan", "--tokens", "10", "--topk", "2", "--counts", "9,0,8,2", "--plot"];

fn layer(output: &str) -> Vec<&str> {
    [&LAYER[..], &["--output", output]].concat()
}

/// Every file below, with its bytes.
fn contents(folder: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut all = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            all.extend(contents(&path));
        } else {
            let bytes = if path.is_file() { fs::read(&path).unwrap() } else { Vec::new() };
            all.push((path, bytes));
        }
    }
    all.sort();
    all
}

#[test]
fn devices_and_pipes_are_written_through() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    assert!(Command::new("mkfifo").arg(at("fifo")).status().unwrap().success());
    symlink("/dev/null", at("null")).unwrap();
    for target in ["/dev/null", "null"] {
        succeed(folder.path(), &[&PLOT[..], &[target]].concat());
        assert!(fs::metadata("/dev/null").unwrap().file_type().is_char_device(), "{target}");
        assert!(fs::symlink_metadata(at("null")).unwrap().is_symlink());
    }
    let reader = Command::new("cat").arg(at("fifo")).stdout(Stdio::piped()).spawn().unwrap();
    succeed(folder.path(), &[&PLOT[..], &["fifo"]].concat());
    let svg = String::from_utf8(reader.wait_with_output().unwrap().stdout).unwrap();
    assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"), "{svg}");
    assert!(fs::metadata(at("fifo")).unwrap().file_type().is_fifo());
    let piped = succeed(folder.path(), &[&PLOT[..], &["/dev/stdout"]].concat());
    assert!(piped.starts_with("<svg") && piped.contains("imbalance"), "{piped}");
    // Where the standard output is a regular file, it is that file's description that is written, not its name.
    let file = fs::File::create(at("out.txt")).unwrap();
    let arguments = [&PLOT[..], &["/dev/stdout"]].concat();
    let status = Command::new(env!("CARGO_BIN_EXE_expertile")).args(arguments).stdout(file).status().unwrap();
    assert!(status.success());
    assert_eq!(fs::read_to_string(at("out.txt")).unwrap(), piped);
    let line = fail(folder.path(), &[&PLOT[..], &["/dev/full"]].concat(), 2);
    assert!(line.contains("/dev/full cannot be written"), "{line}");
}

#[test]
fn open_files_of_the_system_are_written_through_wherever_they_lead() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    symlink("/dev/stderr", at("link")).unwrap();
    symlink("/dev/fd", at("fds")).unwrap();
    let run = |redirected: &str, target: &str| {
        fs::write(at("log"), "before\n").unwrap();
        let line = format!("\"$0\" {} {target} {redirected} && echo after >>log", PLOT.join(" "));
        let mut shell = Command::new("sh");
        let output =
            shell.current_dir(folder.path()).args(["-c", &line, env!("CARGO_BIN_EXE_expertile")]).output().unwrap();
        assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
    };
    for (redirected, target) in [
        ("2>>log", "/dev/stderr"),
        ("2>>log", "link"),
        ("2>>log", "log"),
        ("2>>log", "fds/2"),
        ("3>>log", "/proc/self/fd/3"),
        ("3>>log", "/dev/fd/3"),
        ("3>>log", "fds/3"),
    ] {
        run(redirected, target);
        let log = fs::read_to_string(at("log")).unwrap();
        let svg = log.strip_prefix("before\n").and_then(|log| log.strip_suffix("after\n"));
        assert!(svg.is_some_and(|svg| svg.starts_with("<svg") && svg.ends_with("</svg>\n")), "{target}: {log}");
    }
    for target in ["/dev/no-such-device", "/proc/self/no-such-file", "/proc/self/fd/77"] {
        let line = fail(folder.path(), &[&PLOT[..], &[target]].concat(), 2);
        assert!(line.contains("cannot be written: No such file"), "{line}");
    }
}

#[test]
fn a_replaced_file_keeps_its_mode_and_links_stay_links() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    fs::create_dir(at("sub")).unwrap();
    fs::write(at("sub/real.svg"), "old").unwrap();
    fs::set_permissions(at("sub/real.svg"), fs::Permissions::from_mode(0o640)).unwrap();
    symlink("sub/real.svg", at("near.svg")).unwrap();
    symlink("../near.svg", at("sub/far.svg")).unwrap();
    fs::hard_link(at("sub/real.svg"), at("hard.svg")).unwrap();
    succeed(folder.path(), &[&PLOT[..], &["sub/far.svg"]].concat());
    assert!(["near.svg", "sub/far.svg"].iter().all(|link| fs::symlink_metadata(at(link)).unwrap().is_symlink()));
    assert!(fs::read_to_string(at("sub/real.svg")).unwrap().ends_with("</svg>\n"));
    assert_eq!(fs::metadata(at("sub/real.svg")).unwrap().mode() & 0o7777, 0o640);
    // Replaced, not written into: another name of the old file still has its bytes.
    assert_eq!(fs::read_to_string(at("hard.svg")).unwrap(), "old");
    symlink("new.svg", at("sub/dangling.svg")).unwrap();
    succeed(folder.path(), &[&PLOT[..], &["sub/dangling.svg"]].concat());
    assert!(fs::symlink_metadata(at("sub/new.svg")).unwrap().is_file());
    assert_eq!(contents(folder.path()).len(), 6, "{:?}", contents(folder.path()));
}

#[test]
fn an_input_by_any_name_is_no_target() {
    for shards in [1, 3] {
        let folder = folder(shards);
        let at = |name: &str| folder.path().join(name);
        let shard = if shards == 1 { "model.safetensors" } else { "model-00002-of-00003.safetensors" };
        fs::hard_link(at("model").join(shard), at("hard")).unwrap();
        symlink(at("model").join(shard), at("soft")).unwrap();
        symlink("model", at("alias")).unwrap();
        let before = contents(folder.path());
        let alias = format!("alias/{shard}");
        let mut targets =
            vec!["model/config.json", "in.safetensors", "./model/../in.safetensors", "hard", "soft", &alias];
        // A single file would be read in place of the index.
        targets.push("model/model.safetensors");
        targets.push("model/model.safetensors.index.json");
        for target in targets {
            let line = fail(folder.path(), &layer(target), 2);
            assert!(line.contains(&format!("--output is {target}, expected a file that is not an input")), "{line}");
            assert_eq!(contents(folder.path()), before, "{target}");
        }
        let line = fail(folder.path(), &["plan", "--experts", "4", "--ids", "hard", "--plot", "soft"], 2);
        assert!(line.contains("--plot is soft, expected a file that is not an input of this call (hard)"), "{line}");
        assert_eq!(contents(folder.path()), before);
        succeed(folder.path(), &layer("model/out.safetensors"));
    }
}

#[test]
fn what_cannot_be_written_is_found_before_the_work() {
    let folder = folder(1);
    fs::create_dir(folder.path().join("sub")).unwrap();
    symlink("loop", folder.path().join("loop")).unwrap();
    let before = contents(folder.path());
    // There is no layer 77: an error about the target came before the layer was read.
    for (target, part) in [
        ("no/such/out", "no/such/out cannot be written: No such file"),
        ("in.safetensors/out", "cannot be written: Not a directory"),
        ("sub", "sub cannot be written: is a directory"),
        ("new/", "new/ cannot be written: is a directory"),
        ("loop", "loop cannot be written: Too many levels"),
    ] {
        let mut arguments = layer(target);
        arguments[4] = "77";
        let line = fail(folder.path(), &arguments, 2);
        assert!(line.contains(part), "{target}: {line}");
        assert_eq!(contents(folder.path()), before, "{target}");
    }
    let bench = ["bench", "layer", "--preset", "qwen3-30b-a3b", "--experts", "8", "--tokens", "1"];
    let line = fail(folder.path(), &[&bench[..], &["--json", "a", "--plot", "./a"]].concat(), 2);
    assert!(line.contains("--plot is ./a, expected another file than --json"), "{line}");
    let line = fail(folder.path(), &[&bench[..], &["--json", "no/a"]].concat(), 2);
    assert!(line.contains("no/a cannot be written"), "{line}");
}

fn kill(child: &Child, signal: &str) {
    let arguments = [format!("-{signal}"), child.id().to_string()];
    assert!(Command::new("kill").args(arguments).status().unwrap().success());
}

/// The command with every signal's default action, which what started the tests may have changed: a shell that runs
/// them in the background ignores SIGINT, and the command leaves an ignored signal ignored.
fn with_default_signals() -> Command {
    let mut command = Command::new("env");
    command.args(["--default-signal", env!("CARGO_BIN_EXE_expertile")]);
    command
}

#[test]
fn a_signal_ends_the_call_at_once_and_leaves_nothing() {
    // So many experts that the picture takes a while to write.
    let counts = vec!["1"; 60_000].join(",");
    let plot = ["plan", "--tokens", "60000", "--topk", "1", "--alignment", "2", "--counts", &counts, "--plot", "a.svg"];
    for (name, signal) in [("INT", 2), ("TERM", 15), ("HUP", 1)] {
        // Whether the signal comes while the file is being written is chance: now and then it does.
        let met = (0..50).any(|_| {
            let folder = tempfile::tempdir().unwrap();
            fs::write(folder.path().join("a.svg"), "old").unwrap();
            let mut command = with_default_signals();
            let mut child = command.current_dir(folder.path()).args(plot).stdout(Stdio::null()).spawn().unwrap();
            while fs::read_dir(folder.path()).unwrap().count() == 1 && child.try_wait().unwrap().is_none() {}
            let _ = Command::new("kill").args([format!("-{name}"), child.id().to_string()]).output().unwrap();
            let status = child.wait().unwrap();
            assert!(status.success() || status.signal() == Some(signal), "{name}: {status}");
            let left = contents(folder.path());
            assert_eq!(left.len(), 1, "{name} left {:?}", left.iter().map(|(file, _)| file).collect::<Vec<_>>());
            assert!(left[0].1 == b"old" || left[0].1.ends_with(b"</svg>\n"), "half a file");
            left[0].1 == b"old"
        });
        assert!(met, "no {name} came while a file was being written");
    }
}

#[test]
fn a_call_of_minutes_ends_at_once() {
    let folder = tempfile::tempdir().unwrap();
    for (name, signal) in [("INT", 2), ("TERM", 15)] {
        let arguments =
            ["bench", "layer", "--preset", "deepseek-v3", "--experts", "8", "--tokens", "4096", "--threads", "2"];
        let mut command = with_default_signals();
        let mut child = command.current_dir(folder.path()).args(arguments).stdout(Stdio::null()).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(700));
        let started = Instant::now();
        kill(&child, name);
        assert_eq!(child.wait().unwrap().signal(), Some(signal));
        // Seconds on a busy machine, where the work itself takes minutes.
        assert!(started.elapsed() < Duration::from_secs(30), "{:?}", started.elapsed());
    }
}

#[test]
fn a_signal_that_was_ignored_at_the_start_stays_ignored() {
    let folder = tempfile::tempdir().unwrap();
    assert!(Command::new("mkfifo").arg(folder.path().join("fifo")).status().unwrap().success());
    // Nobody reads the FIFO, so the call waits there until a signal ends it.
    let plot = format!("{} {} fifo", env!("CARGO_BIN_EXE_expertile"), PLOT.join(" "));
    let mut shell = Command::new("sh");
    let mut child =
        shell.current_dir(folder.path()).args(["-c", &format!("trap '' INT HUP; exec {plot}")]).spawn().unwrap();
    std::thread::sleep(Duration::from_millis(300));
    kill(&child, "INT");
    kill(&child, "HUP");
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(child.try_wait().unwrap(), None);
    kill(&child, "TERM");
    assert_eq!(child.wait().unwrap().signal(), Some(15));
}

#[test]
fn errors_that_cannot_be_printed_still_have_their_exit_code() {
    for redirection in ["2>/dev/full", "2>&-", ">/dev/full 2>&1", ">&- 2>&-"] {
        let run = |arguments: &str| {
            let script = format!("{} {arguments} {redirection}", env!("CARGO_BIN_EXE_expertile"));
            Command::new("sh").args(["-c", &script]).status().unwrap().code()
        };
        assert_eq!(run("plan --tokens 4"), Some(2), "{redirection}");
        assert_eq!(run("nonsense"), Some(2), "{redirection}");
        assert_eq!(run(""), Some(2), "{redirection}");
        assert_eq!(run("plan --tokens 4 --topk 0 --experts 4"), Some(2), "{redirection}");
    }
    let output = |arguments: &str| {
        let script = format!("{} {arguments} >/dev/full", env!("CARGO_BIN_EXE_expertile"));
        Command::new("sh").args(["-c", &script]).output().unwrap()
    };
    for arguments in ["--help", "plan --help", "--version", "plan --tokens 4 --topk 1 --experts 4"] {
        let output = output(arguments);
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{arguments}: {stderr}");
        assert!(stderr.starts_with("error: the output cannot be written: No space left"), "{arguments}: {stderr}");
    }
}

#[test]
fn a_shard_cut_short_while_it_is_used_is_named() {
    let folder = folder(1);
    let shard = folder.path().join("model/model.safetensors");
    let whole = fs::metadata(&shard).unwrap().len();
    // The header is parsed, then the call waits for its input, which comes after the shard has lost its end.
    let script = format!(
        "exec {} layer --model model --layer 1 --input /dev/stdin --threads 1",
        env!("CARGO_BIN_EXE_expertile")
    );
    let mut child = Command::new("sh")
        .current_dir(folder.path())
        .args(["-c", &script])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let maps = format!("/proc/{}/maps", child.id());
    let started = Instant::now();
    while !fs::read_to_string(&maps).unwrap_or_default().contains("model.safetensors") {
        assert!(started.elapsed() < Duration::from_secs(20), "the shard was never mapped");
        std::thread::sleep(Duration::from_millis(5));
    }
    std::thread::sleep(Duration::from_millis(200));
    fs::File::options().write(true).open(&shard).unwrap().set_len(whole / 8).unwrap();
    let input = fs::read(folder.path().join("in.safetensors")).unwrap();
    std::io::Write::write_all(&mut child.stdin.take().unwrap(), &input).unwrap();
    let output = child.wait_with_output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{:?} {stderr}", output.status);
    assert_eq!(
        stderr,
        "error: model/model.safetensors cannot be read: it was cut short, or its disk failed, while in use\n"
    );
}

#[test]
fn names_in_hostile_files_do_not_reach_the_terminal() {
    let folder = folder(1);
    let evil = "\u{1b}[2J\u{9b}31m\r\u{202e}\nx";
    let header = serde_json::json!({ (evil): {"dtype": "I32", "shape": [1], "data_offsets": [0, 4]} }).to_string();
    let bytes = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &[0; 4]].concat();
    fs::write(folder.path().join(evil), bytes).unwrap();
    let line = fail(folder.path(), &["plan", "--experts", "4", "--ids", evil], 2);
    assert!(line.contains("\\u001b[2J\\u009b31m\\u000d\\u202e\\nx: tensor \\u001b[2J"), "{line}");
    assert!(line.trim_end_matches('\n').chars().all(|c| !c.is_control() && c != '\u{202e}'), "{line:?}");
    fs::rename(folder.path().join("model"), folder.path().join("mo\u{1b}del\n")).unwrap();
    let mut arguments = layer("out");
    arguments[2] = "mo\u{1b}del\n";
    let report = succeed(folder.path(), &arguments);
    assert!(report.starts_with("mo\\u001bdel"), "{report}");
    assert!(!report.contains('\u{1b}'));
    arguments.push("--json");
    let report: serde_json::Value = serde_json::from_str(&succeed(folder.path(), &arguments)).unwrap();
    assert_eq!(report["source"], "mo\u{1b}del\n");
    let output = expertile(folder.path(), &["plan", "--tokens", "4", "--no\u{1b}such\u{9b}"]);
    assert!(!String::from_utf8(output.stderr).unwrap().contains(['\u{1b}', '\u{9b}']));
}
