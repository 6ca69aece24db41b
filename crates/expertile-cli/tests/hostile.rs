//! Absurd command lines and files, drawn from a seed.
//!
//! Whatever they are: an exit code that the command documents, one line of error, nothing that steers a terminal,
//! inputs as they were, no files but the ones asked for, and an end within seconds. `HOSTILE_SEED=7` draws other cases
//! and `HOSTILE_CASES=2000` more of them; a failure prints its command line and what was done to its files.

#![cfg(unix)]

mod common;

use common::made_up::{FAMILIES, Model, NewTensor, Sizes, serialize};
use common::npy;
use safetensors::Dtype;
use std::fmt::Write as _;
use std::fs;
use std::os::unix::fs::{FileTypeExt, PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

const SIZES: Sizes = Sizes { hidden: 32, intermediate: 32, experts: 4, topk: 2 };

/// Far more than any case needs, and little enough to tell a hang from a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// SplitMix64.
struct Random(u64);

impl Random {
    fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.draw() % limit as u64) as usize
    }

    fn one_in(&mut self, count: usize) -> bool {
        self.below(count) == 0
    }

    fn of<'a, T: ?Sized>(&mut self, list: &[&'a T]) -> &'a T {
        list[self.below(list.len())]
    }
}

fn number(random: &mut Random) -> &'static str {
    const NUMBERS: [&str; 22] = [
        "0",
        "1",
        "2",
        "3",
        "4",
        "8",
        "64",
        "128",
        "1000000",
        "4194305",
        "2147483647",
        "2147483648",
        "4294967296",
        "1000000000000",
        "9223372036854775807",
        "9223372036854775808",
        "18446744073709551615",
        "18446744073709551616",
        "-1",
        "1e3",
        "",
        "\u{1b}[2J",
    ];
    // Small ones more often: a case with one absurd number in it goes further than a case of many.
    if random.one_in(3) { random.of(&NUMBERS) } else { NUMBERS[1 + random.below(5)] }
}

fn word(random: &mut Random) -> &'static str {
    random.of(&[
        "e4m3",
        "bf16",
        "cpu",
        "cuda:0",
        "cuda:99999999999",
        "portable",
        "avx2",
        "sm90",
        "vllm-fork",
        "steps",
        "tiles",
        "layer",
        "qwen3-30b-a3b",
        "mixtral-8x7b",
        "\u{1b}]0;x\u{7}",
        "\u{9b}31m",
        "x\ny",
        "\u{202e}txt.exe",
        "",
        "-",
        "--",
    ])
}

/// Something in a file's place. `None` leaves the good file.
fn disturb(random: &mut Random, file: &Path) -> Option<&'static str> {
    if !random.one_in(3) {
        return None;
    }
    let good = fs::read(file).unwrap_or_default();
    let _ = fs::remove_file(file);
    let kinds = [
        "missing",
        "empty",
        "noise",
        "cut",
        "changed",
        "twice",
        "a folder",
        "a FIFO",
        "a socket",
        "/dev/zero",
        "/dev/null",
        "dangling",
        "a loop",
        "a terabyte",
        "a huge header",
        "a wide shape",
    ];
    let kind = random.of(&kinds);
    match kind {
        "missing" => {}
        "empty" => fs::write(file, "").unwrap(),
        "noise" => fs::write(file, (0..random.below(300)).map(|_| random.draw() as u8).collect::<Vec<_>>()).unwrap(),
        "cut" => fs::write(file, &good[..random.below(good.len().max(1))]).unwrap(),
        "changed" => {
            let mut bytes = good;
            for _ in 0..=random.below(4) {
                let near = bytes.len().clamp(1, 600);
                if let Some(byte) = bytes.get_mut(random.below(near)) {
                    *byte = random.draw() as u8;
                }
            }
            fs::write(file, bytes).unwrap();
        }
        "twice" => fs::write(file, [&good[..], &good].concat()).unwrap(),
        "a folder" => fs::create_dir(file).unwrap(),
        "a FIFO" => assert!(Command::new("mkfifo").arg(file).status().unwrap().success()),
        // The name stays when the listener goes.
        "a socket" => drop(UnixListener::bind(file).unwrap()),
        "/dev/zero" | "/dev/null" => symlink(kind, file).unwrap(),
        "dangling" => symlink("nowhere", file).unwrap(),
        "a loop" => symlink(file.file_name().unwrap(), file).unwrap(),
        "a terabyte" => {
            fs::write(file, good).unwrap();
            let _ = fs::File::options().write(true).open(file).unwrap().set_len(1 << 40);
        }
        "a huge header" => {
            fs::write(file, [&(random.draw() >> random.below(64)).to_le_bytes()[..], b"{}"].concat()).unwrap()
        }
        _ => {
            let extents = ["0", "1", "4294967296", "1000000000000", "18446744073709551615"];
            let shape = format!("({}, {})", random.of(&extents), random.of(&extents));
            fs::write(file, npy(&shape, &[])).unwrap();
        }
    }
    Some(kind)
}

/// A checkpoint of one file or three, hidden states, ids, a file of no use and a folder.
fn build(random: &mut Random, folder: &Path) -> String {
    let model = folder.join("model");
    fs::create_dir(&model).unwrap();
    let made = Model::new(FAMILIES[random.below(3)], SIZES, random.one_in(2));
    let shards = if random.one_in(2) { 1 } else { 3 };
    made.write(&model, shards);
    let states = NewTensor {
        name: "hidden_states".into(),
        dtype: Dtype::BF16,
        shape: vec![3, SIZES.hidden],
        bytes: [0x80, 0x3f].repeat(3 * SIZES.hidden),
    };
    fs::write(folder.join("in.safetensors"), serialize(&[states])).unwrap();
    fs::write(folder.join("ids.npy"), npy("(3, 2)", &[0; 24])).unwrap();
    fs::write(folder.join("old"), "old").unwrap();
    fs::set_permissions(folder.join("old"), fs::Permissions::from_mode(0o640)).unwrap();
    fs::create_dir(folder.join("sub")).unwrap();
    let mut what = format!("{shards} shards");
    let mut files = vec![model.join("config.json"), folder.join("in.safetensors"), folder.join("ids.npy")];
    match shards {
        1 => files.push(model.join("model.safetensors")),
        _ => files
            .extend(["model.safetensors.index.json", "model-00002-of-00003.safetensors"].map(|name| model.join(name))),
    }
    for file in files {
        if let Some(kind) = disturb(random, &file) {
            let _ = write!(what, ", {} is {kind}", file.strip_prefix(folder).unwrap().display());
        }
    }
    what
}

fn target(random: &mut Random) -> &'static str {
    random.of(&[
        "new",
        "new",
        "old",
        "sub/new",
        "sub",
        "no/new",
        "/dev/null",
        "/dev/full",
        "/dev/stdout",
        "in.safetensors",
        "ids.npy",
        "model/config.json",
        "./model/model.safetensors",
        "model/new",
        "new/",
        "",
        "-",
        "\u{1b}[31mnew",
    ])
}

fn file(random: &mut Random, usual: &'static str) -> &'static str {
    if random.one_in(6) {
        random.of(&["/dev/zero", "/dev/stdin", "sub", "nowhere", "old", "/proc/self/mem", ""])
    } else {
        usual
    }
}

fn arguments(random: &mut Random) -> Vec<&'static str> {
    let mut line: Vec<&'static str> = Vec::new();
    let command = random.below(12);
    match command {
        0..=4 => {
            line.push("plan");
            if random.one_in(2) {
                line.extend(["--ids", file(random, "ids.npy"), "--experts", number(random)]);
            } else {
                line.extend(["--tokens", number(random), "--topk", number(random)]);
                match random.below(2) {
                    0 => line.extend(["--experts", number(random)]),
                    _ => {
                        line.extend(["--counts", random.of(&["1,2,3", "0", "2147483647,2147483647", "-1", ",", "1,x"])])
                    }
                }
            }
            if random.one_in(3) {
                line.extend(["--ranks", number(random)]);
                for option in ["--hidden", "--intermediate"] {
                    line.extend([option, if random.one_in(2) { "128" } else { number(random) }]);
                }
                let numbers =
                    ["--redundant", "--ranks-per-host", "--latency-us", "--link-gbs", "--memory-gb", "--layers"];
                for option in numbers {
                    if random.one_in(6) {
                        line.extend([option, number(random)]);
                    }
                }
                if random.one_in(4) {
                    line.extend(["--placement", file(random, "round-robin")]);
                }
                if random.one_in(4) {
                    line.extend(["--placement-output", target(random)]);
                }
            } else {
                for option in ["--local-experts", "--alignment", "--hidden", "--intermediate"] {
                    if random.one_in(4) {
                        line.extend([option, number(random)]);
                    }
                }
            }
            // One file of a call: with two, the first is written when the second fails.
            if random.one_in(2) && !line.contains(&"--placement-output") {
                line.extend(["--plot", target(random)]);
            }
        }
        5..=9 => {
            line.extend([
                "layer",
                "--model",
                file(random, "model"),
                "--layer",
                if random.one_in(9) { number(random) } else { "1" },
            ]);
            line.extend(["--input", file(random, "in.safetensors")]);
            for (option, value) in [("--threads", number(random)), ("--isa", word(random)), ("--device", word(random))]
            {
                if random.one_in(6) {
                    line.extend([option, value]);
                }
            }
            if random.one_in(2) {
                line.extend(["--output", target(random)]);
            }
            if random.one_in(2) {
                line.push("--check");
            }
        }
        10 => {
            // At most as many experts as a token needs: a preset takes as many as fit into memory.
            line.extend(["layer", "--preset", "qwen3-30b-a3b", "--experts", random.of(&["0", "7", "8", "x"])]);
            line.extend(["--tokens", random.of(&["0", "1", "1000000000", "1000000000000", "18446744073709551615"])]);
            line.extend(["--output", target(random)]);
        }
        _ => {
            line.extend([
                "bench",
                random.of(&["layer", "steps"]),
                "--experts",
                "8",
                "--tokens",
                random.of(&["0", "1,1000000000000", "18446744073709551615", "x"]),
            ]);
            line.extend(["--json", target(random), "--plot", target(random)]);
        }
    }
    if random.one_in(3) {
        line.push("--json");
    }
    if random.one_in(12) {
        line.insert(random.below(line.len() + 1), word(random));
    }
    line
}

/// What a folder holds: names, kinds, modes, and bytes where there are few.
fn snapshot(folder: &Path) -> Vec<(String, String)> {
    let mut all = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let there = fs::symlink_metadata(&path).unwrap();
        let kind = there.file_type();
        let bytes = if there.is_file() && there.len() < 1 << 20 { fs::read(&path).unwrap() } else { Vec::new() };
        let special = [kind.is_fifo(), kind.is_socket(), kind.is_symlink(), kind.is_dir()];
        // The times of a folder are not its contents.
        let len = if kind.is_dir() { 0 } else { there.len() };
        let what = format!("{special:?} {:o} {len} {bytes:?}", there.permissions().mode());
        all.push((path.to_string_lossy().into_owned(), what));
        if kind.is_dir() {
            all.extend(snapshot(&path));
        }
    }
    all.sort();
    all
}

/// Runs the command; with a limit on its address space now and then. Panics if it does not end.
fn run(folder: &Path, arguments: &[&str], kibibytes: Option<u64>, what: &str) -> Output {
    let limit = kibibytes.map_or_else(String::new, |kibibytes| format!("ulimit -v {kibibytes}; "));
    let mut command = Command::new("sh");
    command.current_dir(folder).args(["-c", &format!("{limit}exec \"$0\" \"$@\""), env!("CARGO_BIN_EXE_expertile")]);
    let mut child =
        command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    // Read meanwhile: a full pipe would hold the command up.
    let (stdout, stderr) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
    let read = |mut pipe: Box<dyn std::io::Read + Send>| {
        std::thread::spawn(move || {
            let mut bytes = Vec::new();
            pipe.read_to_end(&mut bytes).unwrap();
            bytes
        })
    };
    let (stdout, stderr) = (read(Box::new(stdout)), read(Box::new(stderr)));
    let started = Instant::now();
    let status = loop {
        match child.try_wait().unwrap() {
            Some(status) => break status,
            None if started.elapsed() > PATIENCE => {
                child.kill().unwrap();
                panic!("no end after {PATIENCE:?}: {what}");
            }
            None => std::thread::sleep(Duration::from_millis(2)),
        }
    };
    Output { status, stdout: stdout.join().unwrap(), stderr: stderr.join().unwrap() }
}

fn from_environment(name: &str, usual: u64) -> u64 {
    std::env::var(name).map_or(usual, |value| value.parse().unwrap())
}

#[test]
fn no_command_line_and_no_file_does_worse_than_an_error() {
    let (seed, cases) = (from_environment("HOSTILE_SEED", 1), from_environment("HOSTILE_CASES", 150));
    let mut codes = [0; 3];
    for case in 0..cases {
        let mut random = Random(seed << 32 | case);
        let folder = tempfile::tempdir().unwrap();
        let files = build(&mut random, folder.path());
        let line = arguments(&mut random);
        // Enough for the program and its threads, and at times not for its work.
        let limit = random.one_in(4).then(|| 300_000 + 1000 * random.below(1000) as u64);
        let what = format!("case {case} of seed {seed}: {line:?}, {files}, limit {limit:?}");
        let before = snapshot(folder.path());
        let output = run(folder.path(), &line, limit, &what);
        let (stdout, stderr) = (String::from_utf8(output.stdout), String::from_utf8(output.stderr));
        let (stdout, stderr) = (stdout.expect(&what), stderr.expect(&what));
        let what = format!("{what}\n{:?}\n{stderr}", output.status);
        let code = output.status.code().unwrap_or_else(|| panic!("signal {:?}: {what}", output.status.signal()));
        assert!((0..=2).contains(&code), "{what}");
        codes[code as usize] += 1;
        let errors = stderr.lines().filter(|line| line.starts_with("error: ")).count();
        let notes = stderr.lines().filter(|line| line.starts_with("note: ")).count();
        // Without a command, clap prints its help.
        let is_help = line.first().is_some_and(|word| word.is_empty()) || stderr.contains("Usage:");
        assert!(is_help || errors == usize::from(code != 0), "{what}");
        assert!(is_help || errors + notes == stderr.lines().count(), "{what}");
        assert!(!stderr.contains("panicked") && stderr.len() < 10_000, "{what}");
        let steers = |c: char| c != '\n' && c.is_control() || c == '\u{202e}';
        assert!(!stderr.contains(steers) && !stdout.contains(steers), "{what}");
        let after = snapshot(folder.path());
        let asked = ["--output", "--plot", "--json", "--placement-output"]
            .map(|option| line.windows(2).find(|pair| pair[0] == option));
        let asked: Vec<_> = asked.into_iter().flatten().map(|pair| folder.path().join(pair[1])).collect();
        // Or where a link led.
        let led_to: Vec<_> = asked.iter().filter_map(|file| file.canonicalize().ok()).collect();
        let changed = |(name, what): &&(String, String)| {
            let same = |list: &[(String, String)]| list.iter().any(|other| other == &(name.clone(), what.clone()));
            !(same(&before) && same(&after))
        };
        for (name, _) in before.iter().chain(&after).filter(changed) {
            // A call that failed has touched nothing; one that gave a result, what it was asked to write.
            let is_input = ["model/config.json", "model/model.safetensors", "in.safetensors", "ids.npy"]
                .iter()
                .any(|input| Path::new(name) == folder.path().join(input) && files_are_read(&line, input));
            let is_asked = asked.iter().chain(&led_to).any(|file| file == Path::new(name));
            assert!(code != 2 && is_asked && !is_input, "{name} was changed: {what}");
        }
    }
    assert!(codes[0] > 0 && codes[2] > 0, "exit codes {codes:?}: too tame or too wild");
}

/// Whether this command line reads that file.
fn files_are_read(line: &[&str], file: &str) -> bool {
    let folder = file.split('/').next().unwrap();
    line.windows(2).any(|pair| matches!(pair[0], "--model" | "--input" | "--ids" | "--placement") && pair[1] == folder)
}
