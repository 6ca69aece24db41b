//! Expert parallelism, as a user meets it: planned, and run by `mpiexec`.
//!
//! What needs `mpiexec` is skipped with a line where there is none (`EXPERTILE_NEEDS_MPI=1`: fail).
#![cfg(unix)]

mod common;

use common::made_up::{Model, NewTensor, Sizes, serialize};
use common::{fail, json, npy, refuse, succeed};
use half::bf16;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};
use std::io::Write;
use std::path::Path;
use std::process::{Command, Output};

const SIZES: Sizes = Sizes { hidden: 256, intermediate: 128, experts: 6, topk: 2 };
const TOKENS: usize = 9;

const LAYER: [&str; 9] =
    ["layer", "--model", ".", "--layer", "1", "--input", "in.safetensors", "--output", "out.safetensors"];
const PLAN: [&str; 13] = [
    "plan",
    "--ranks",
    "2",
    "--tokens",
    "2",
    "--topk",
    "2",
    "--experts",
    "4",
    "--hidden",
    "256",
    "--intermediate",
    "128",
];

/// A checkpoint with a shared expert, and nine tokens.
fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    Model::new("deepseek_v3", SIZES, true).write(folder.path(), 1);
    let mut random = expertile_testkit::Random::new(5);
    let values = (0..TOKENS * SIZES.hidden).flat_map(|_| bf16::from_f32(1.7 * random.uniform()).to_le_bytes());
    let (name, dtype, shape) = ("hidden_states".into(), Dtype::BF16, vec![TOKENS, SIZES.hidden]);
    let states = NewTensor { name, dtype, shape, bytes: values.collect() };
    std::fs::write(folder.path().join("in.safetensors"), serialize(&[states])).unwrap();
    folder
}

/// `mpiexec -n RANKS expertile ...`; `None`, and a line, where there is no `mpiexec`.
fn mpiexec(folder: &Path, ranks: usize, arguments: &[&str]) -> Option<Output> {
    let Ok(version) = Command::new("mpiexec").arg("--version").output() else {
        assert!(std::env::var_os("EXPERTILE_NEEDS_MPI").is_none(), "no mpiexec");
        let _ = writeln!(std::io::stderr(), "skipped {arguments:?} on {ranks} ranks: no mpiexec");
        return None;
    };
    let mut command = Command::new("mpiexec");
    if String::from_utf8_lossy(&version.stdout).contains("Open") {
        command.args(["--allow-run-as-root", "--oversubscribe"]);
    }
    command.args(["-n", &ranks.to_string(), env!("CARGO_BIN_EXE_expertile")]).args(arguments).current_dir(folder);
    Some(command.output().unwrap())
}

fn output_rows(folder: &Path) -> Vec<u8> {
    let bytes = std::fs::read(folder.join("out.safetensors")).unwrap();
    SafeTensors::deserialize(&bytes).unwrap().tensor("output").unwrap().data().to_vec()
}

#[test]
fn ranks_write_the_bytes_that_one_process_writes() {
    let folder = folder();
    succeed(folder.path(), &LAYER);
    let alone = output_rows(folder.path());
    assert!(alone.iter().any(|&byte| byte != 0));
    // Three placements: the usual one, one by name, and one with copies of experts from a file that `plan` has written.
    let plan = ["plan", "--ranks", "2", "--topk", "2", "--counts", "9,1,1,1,4,1", "--tokens", "30", "--redundant", "3"];
    let widths = ["--hidden", "256", "--intermediate", "128", "--placement-output", "placed.json"];
    succeed(folder.path(), &[&plan[..], &widths].concat());
    for (ranks, more) in [
        (2, &["--placement", "round-robin", "--dispatch", "routed"][..]),
        (2, &["--placement", "placed.json", "--check"]),
        (4, &["--check"]),
    ] {
        std::fs::remove_file(folder.path().join("out.safetensors")).unwrap();
        let arguments = [&LAYER[..], &["--exchange", "mpi", "--json"], more].concat();
        let Some(output) = mpiexec(folder.path(), ranks, &arguments) else { return };
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{errors}");
        assert!(output_rows(folder.path()) == alone, "{ranks} ranks, {more:?}");
        // One rank prints.
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!((&report["ranks"], &report["tokens"], &report["experts"]), (&json!(ranks), &json!(9), &json!(6)));
        let stages: Vec<&Value> = report["stages"].as_array().unwrap().iter().map(|stage| &stage["stage"]).collect();
        assert_eq!(json!(stages), json!(["meeting", "dispatch", "experts", "combine", "unpermute"]));
        if more.contains(&"--check") {
            assert_eq!(report["check"]["passed"], true, "{report}");
        }
    }
}

#[test]
fn an_error_that_all_ranks_have_is_told_once() {
    let folder = folder();
    let arguments = [&LAYER[..], &["--exchange", "mpi", "--dispatch"]].concat();
    // Ranks that were started with other options: mpiexec's colon.
    let exe = env!("CARGO_BIN_EXE_expertile");
    let others = [&arguments[..], &["gather", ":", "-n", "1", exe], &arguments[..], &["routed"]].concat();
    let Some(output) = mpiexec(folder.path(), 1, &others) else { return };
    let errors = String::from_utf8_lossy(&output.stderr);
    let told: Vec<&str> = errors.lines().filter(|line| line.starts_with("error: ")).collect();
    assert_eq!(told, ["error: dispatch is routed on rank 1, expected gather, as on rank 0"], "{errors}");
    assert!(!output.status.success() && !folder.path().join("out.safetensors").exists());
}

#[test]
fn the_exchange_is_timed_beside_the_layer() {
    let folder = tempfile::tempdir().unwrap();
    let bench = ["bench", "exchange", "--preset", "qwen3-30b-a3b", "--weights", "e4m3", "--tokens", "0,3"];
    let Some(output) =
        mpiexec(folder.path(), 2, &[&bench[..], &["--experts", "8", "--repeat", "1", "--json"]].concat())
    else {
        return;
    };
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&report["ranks"], &report["sizes"][1]["tokens_per_rank"]), (&json!(2), &json!(3)));
    let [nothing, some] = [0, 1].map(|size| &report["sizes"][size]["stages"]);
    assert_eq!(nothing[1]["most_sent_bytes"], 0);
    // Gathered: each rank's three tokens of e4m3 values, their scales and eight ids go to the other one.
    let row = 2048 + 4 * 16 + 4 * 8;
    assert_eq!((&some[1]["stage"], &some[1]["most_sent_bytes"]), (&json!("dispatch"), &json!(3 * row)));
    assert!(report["sizes"][1]["dispatch_alone_seconds"].as_f64().unwrap() > 0.0);
}

#[test]
fn options_of_ranks_go_with_an_exchange() {
    let folder = folder();
    refuse(folder.path(), &[&LAYER[..], &["--combine", "sums"]].concat(), "--combine goes with --exchange only");
    let gpu = [&LAYER[..], &["--exchange", "mpi", "--device", "cuda:0"]].concat();
    refuse(folder.path(), &gpu, "--exchange mpi goes with --device cpu only");
    let never = [&LAYER[..], &["--exchange", "mpi", "--time-limit", "0"]].concat();
    refuse(folder.path(), &never, "--time-limit is 0, expected a number of seconds above 0");
}

/// Two ranks of two tokens over four experts: 0 and 1 on rank 0. Rank 0's tokens go to 0, 1 and to 0, 2; rank 1's to
/// 0, 3 and to 0 alone.
#[test]
fn a_plan_counts_rows_and_bytes_by_rank() {
    let folder = tempfile::tempdir().unwrap();
    let ids: Vec<u8> = [0i32, 1, 0, 2, 0, 3, 0, -1].into_iter().flat_map(i32::to_le_bytes).collect();
    std::fs::write(folder.path().join("ids.npy"), npy("(4, 2)", &ids)).unwrap();
    let plan =
        ["plan", "--ranks", "2", "--ids", "ids.npy", "--experts", "4", "--hidden", "256", "--intermediate", "128"];
    let report = json(folder.path(), &plan);
    let linear = &report["placements"][0];
    assert_eq!((&linear["placement"], &linear["rows"]), (&json!("linear"), &json!([5, 2])));
    assert_eq!((&linear["rows_mean"], &linear["rows_most"]), (&json!(3.5), &json!(5)));
    // A row: 256 bytes of e4m3, two scales, two ids. Gathered, two tokens go each way.
    assert_eq!((&report["token_row_bytes"], &linear["dispatch"]["most_sent_bytes"]), (&json!(272), &json!(2 * 272)));
    // Rank 0 has computed two slots of rank 1's, rank 1 one of rank 0's, each a row of bf16.
    assert_eq!(linear["combine"]["most_sent_bytes"], 2 * 512);
    // The file asks for the same as the picture.
    let packed = &report["placements"][1];
    assert_eq!((&packed["placement"], &packed["rows"]), (&json!("balanced"), &json!([5, 2])));
    let copied = &report["placements"][2];
    assert_eq!((&copied["copies"], &copied["rows_most"]), (&json!(6), &json!(4)));
    let ways: Vec<(&str, u64)> = report["ways"]
        .as_array()
        .unwrap()
        .iter()
        .map(|way| (way[0].as_str().unwrap(), way[1].as_u64().unwrap()))
        .collect();
    let expected = [
        ("dispatch gather", 2 * 272),
        ("combine rows", 2 * 512),
        ("combine sums of gather", 2 * 1024),
        ("dispatch routed", 2 * 272),
        ("combine sums of routed", 2 * 1024),
    ];
    assert_eq!(ways, expected);
}

#[test]
fn a_plan_takes_the_links_that_it_is_given() {
    let folder = tempfile::tempdir().unwrap();
    let seconds = |more: &[&str]| {
        let report = json(folder.path(), &[&PLAN[..], more].concat());
        report["placements"][0]["dispatch"]["seconds"].as_f64().unwrap()
    };
    // Two rows of 272 bytes, and the latency.
    let close = |actual: f64, expected: f64| assert!((actual - expected).abs() < 1e-12, "{actual} {expected}");
    close(seconds(&[]), 6.5e-6 + 544.0 / 310e9);
    close(seconds(&["--link", "nccl"]), 11e-6 + 544.0 / 240e9);
    close(seconds(&["--latency-us", "0", "--link-gbs", "1"]), 544e-9);
    close(seconds(&["--latency-us", "0", "--host-link-gbs", "1", "--ranks-per-host", "1"]), 544e-9);
    // Counts go first, but into mapped memory.
    let routed = ["--dispatch", "routed", "--latency-us", "3", "--link-gbs", "1e6"];
    close(seconds(&routed), 3e-6 + 544e-15);
    close(seconds(&[&routed[..], &["--link", "nccl"]].concat()), 6e-6 + 544e-15);
}

#[test]
fn a_plan_finds_what_fits_and_what_copies_buy() {
    let folder = tempfile::tempdir().unwrap();
    let plan = ["plan", "--ranks", "8", "--tokens", "512", "--topk", "8", "--hidden", "7168", "--intermediate", "2048"];
    // Zipf: expert e is asked for as 1 / (e + 1).
    let counts: Vec<String> = (0..256).map(|expert| (1_000_000 / (expert + 1)).to_string()).collect();
    let report = json(folder.path(), &[&plan[..], &["--counts", &counts.join(","), "--plot", "ranks.svg"]].concat());
    let of = |index: usize, key: &str| report["placements"][index][key].as_f64().unwrap();
    let names: Vec<&Value> = (0..4).map(|index| &report["placements"][index]["placement"]).collect();
    assert_eq!(json!(names), json!(["linear", "balanced", "balanced, 8 redundant", "balanced, 16 redundant"]));
    assert!(
        of(0, "imbalance") > 2.0 && of(1, "imbalance") < of(0, "imbalance") && of(3, "imbalance") < 1.1,
        "{report}"
    );
    assert!(of(0, "total_seconds") > of(3, "total_seconds"));
    // 32 experts of 44 MB, and 34 with the copies.
    assert_eq!((of(0, "weight_bytes") / 44.05e6).round(), 32.0);
    assert_eq!((of(3, "weight_bytes") / 44.05e6).round(), 34.0);
    assert!(of(0, "capacity_worst") > 4096.0 && of(0, "capacity_expected") > of(0, "capacity_worst"), "{report}");
    // With all layers' weights in it, there is room for fewer.
    let all = json(folder.path(), &[&plan[..], &["--experts", "256", "--layers", "58"]].concat());
    assert!(all["placements"][0]["capacity_worst"].as_f64().unwrap() < of(0, "capacity_worst"));
    let svg = std::fs::read_to_string(folder.path().join("ranks.svg")).unwrap();
    assert!(svg.contains("balanced, 16 redundant"));
    let text = succeed(folder.path(), &[&plan[..], &["--experts", "256"]].concat());
    for part in ["8 ranks of 512 tokens", "linear", "combine sums of routed", "modelled"] {
        assert!(text.contains(part), "{part}: {text}");
    }
}

/// What `bench exchange --routing zipf` has sent on two H200s, by NCCL's and by mapped ways (benches/results, 2026-11-29).
#[test]
fn a_plan_draws_the_zipf_routing_that_a_bench_runs() {
    let folder = tempfile::tempdir().unwrap();
    let shape = ["--topk", "8", "--experts", "128", "--hidden", "4096", "--intermediate", "1536"];
    for (tokens, bytes) in [("1", 49_184), ("128", 5_664_768), ("4096", 182_353_920)] {
        let plan = ["plan", "--ranks", "2", "--tokens", tokens, "--activations", "bf16", "--routing", "zipf"];
        let report = json(folder.path(), &[&plan[..], &shape].concat());
        let linear = &report["placements"][0];
        let sent = |way: &str| linear[way]["most_sent_bytes"].as_u64().unwrap();
        assert_eq!(sent("dispatch") + sent("combine"), bytes, "{tokens} tokens a rank");
    }
    let given = ["plan", "--ranks", "2", "--tokens", "1", "--counts", "1,2", "--routing", "zipf"];
    refuse(folder.path(), &[&given[..], &shape].concat(), "cannot be used with");
}

#[test]
fn a_plan_that_cannot_be_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let with = |more: &[&str], part: &str| refuse(folder.path(), &[&PLAN[..], more].concat(), part);
    with(&["--redundant", "5"], "redundant is 5, expected at most 4, every expert on every rank");
    with(&["--ranks-per-host", "0"], "--ranks-per-host is 0");
    with(&["--layers", "0"], "--layers is 0, expected at least 1");
    with(&["--redundant", "99999999"], "--redundant is 99999999, expected at most 4194304");
    with(&["--alignment", "8"], "cannot be used with");
    with(&["--link-gbs", "-1"], "--link-gbs is -1, expected a number above 0");
    with(&["--latency-us", "NaN"], "--latency-us is NaN");
    with(&["--memory-gb", "inf"], "--memory-gb is inf");
    with(&["--link", "mapped", "--ranks-per-host", "1"], "--link is mapped, expected nccl for more ranks than the 1");
    with(&["--placement", "none.json"], "none.json");
    std::fs::write(folder.path().join("bad.json"), "{\"global_experts\": 4, \"experts\": [[0, 1], [2]]}").unwrap();
    with(&["--placement", "bad.json"], "placement has expert 3 on no rank");
    std::fs::write(folder.path().join("three.json"), "{\"global_experts\": 4, \"experts\": [[0], [1], [2, 3]]}")
        .unwrap();
    with(&["--placement", "three.json"], "--placement is of 3 ranks, expected 2");
    let ranks = |ranks: &str| {
        let mut plan = PLAN;
        plan[2] = ranks;
        fail(folder.path(), &plan, 2)
    };
    assert!(ranks("0").contains("--ranks is 0, expected 1 to 1024"));
    assert!(ranks("5").contains("ranks is 5, expected 1 to 4, an expert for every rank"));
    std::fs::write(folder.path().join("ids.npy"), npy("(3, 1)", &[0; 12])).unwrap();
    let odd = ["plan", "--ranks", "2", "--ids", "ids.npy", "--experts", "4", "--hidden", "8", "--intermediate", "8"];
    refuse(folder.path(), &odd, "--ids has 3 tokens, expected a multiple of --ranks 2");
    std::fs::write(folder.path().join("ids.npy"), npy("(4, 1)", &[0; 16])).unwrap();
    refuse(folder.path(), &[&odd[..], &["--tokens", "4"]].concat(), "--tokens is 4, expected 2, as in the file of ids");
}

#[test]
fn a_bench_of_gpus_says_what_is_missing() {
    let folder = tempfile::tempdir().unwrap();
    let bench = |more: &[&str], part: &str| refuse(folder.path(), &[&["bench", "exchange"], more].concat(), part);
    bench(&["--same", "3"], "--same goes with --device cuda only");
    bench(&["--fault", "late"], "--fault goes with --device cuda only");
    bench(&["--one-gpu"], "--one-gpu goes with --device cuda only");
    let one_gpu = ["--device", "cuda", "--ranks", "2", "--one-gpu"];
    bench(&[&one_gpu[..], &["--link", "nccl"]].concat(), "--link is nccl, expected mapped with --one-gpu");
    bench(&[&one_gpu[..], &["--same", "3"]].concat(), "--same does not go with --one-gpu");
    bench(&["--device", "cuda"], "--ranks is missing, expected the number of GPUs");
    bench(&["--device", "cuda", "--ranks", "0"], "--ranks and --tokens, expected at least 1");
    bench(&["--device", "gpu"], "invalid value 'gpu'");
}
