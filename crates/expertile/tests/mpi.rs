//! Ranks that are processes: this program, started again by `mpiexec`, once for each rank.
//!
//! Skipped with a line where there is no `mpiexec` (`EXPERTILE_NEEDS_MPI=1`: fail). `EXPERTILE_MPIEXEC` names another
//! launcher, `EXPERTILE_MPI` its library.
#![cfg(all(feature = "mpi", unix, not(miri)))]

use expertile::cpu::{Cpu, ExpertParallelLayer, Layer, PackedWeights};
use expertile::exchange::{Exchange, Mpi};
use expertile::{
    ActivationFormat, Combine, Dispatch, E4m3, Error, LayerConfig, MatrixRef, ParallelConfig, Placement, Routing,
};
use expertile_testkit::{Pattern, Random, block_scaled_weights, unit_rows};
use half::bf16;
use std::io::Write;
use std::process::{Command, Output};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Names what the ranks of a job do.
const SCENARIO: &str = "EXPERTILE_TEST_SCENARIO";
const LIMIT: Duration = Duration::from_secs(300);

/// `mpiexec`, and what it wants to hear before it starts more ranks than there are processors, as root.
fn launcher() -> Option<Command> {
    let program = std::env::var("EXPERTILE_MPIEXEC").unwrap_or_else(|_| "mpiexec".into());
    let version = match Command::new(&program).arg("--version").output() {
        Ok(version) => version,
        Err(error) => {
            assert!(std::env::var_os("EXPERTILE_NEEDS_MPI").is_none(), "no {program}: {error}");
            return None;
        }
    };
    let mut command = Command::new(program);
    let text = String::from_utf8_lossy(&version.stdout).into_owned();
    if text.contains("Open") {
        command.args(["--allow-run-as-root", "--oversubscribe"]);
    }
    Some(command)
}

/// Runs a scenario on so many ranks; `None` where there is no launcher.
fn start(scenario: &str, ranks: usize) -> Option<Output> {
    let Some(mut launcher) = launcher() else {
        // Not captured: a skipped test has to say so.
        let _ = writeln!(std::io::stderr(), "skipped {scenario} on {ranks} ranks: no mpiexec");
        return None;
    };
    let program = std::env::current_exe().unwrap();
    launcher.args(["-n", &ranks.to_string()]).arg(program);
    launcher.args(["--exact", "one_of_several_ranks", "--nocapture", "--test-threads=1"]);
    let output = launcher.env(SCENARIO, scenario).env("RAYON_NUM_THREADS", "1").output().unwrap();
    Some(output)
}

fn succeed(scenario: &str, ranks: usize) {
    let Some(output) = start(scenario, ranks) else { return };
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}\n{text}\n{errors}", output.status);
    assert_eq!(text.matches("has done all").count(), ranks, "{text}\n{errors}");
}

#[test]
fn two_processes_give_the_bits_of_one() {
    succeed("layers", 2);
}

#[test]
fn four_processes_give_the_bits_of_one() {
    succeed("layers", 4);
}

#[test]
fn a_message_of_another_length_is_an_error() {
    let Some(output) = start("lengths", 2) else { return };
    let text = String::from_utf8_lossy(&output.stdout);
    assert_eq!(text.matches("is told").count(), 2, "{text}\n{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn a_rank_that_never_comes_is_named_and_the_job_ends() {
    let started = Instant::now();
    let Some(output) = start("absent", 3) else { return };
    assert!(started.elapsed() < LIMIT, "the job has waited for the rank that sleeps");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.contains("names rank 1"), "{text}\n{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn a_rank_that_dies_ends_the_job() {
    let started = Instant::now();
    let Some(output) = start("dies", 3) else { return };
    assert!(started.elapsed() < LIMIT, "the job has waited for the dead rank");
    assert!(!output.status.success());
}

/// What `mpiexec` starts; as a test among the others, it does nothing.
#[test]
fn one_of_several_ranks() {
    let Ok(scenario) = std::env::var(SCENARIO) else { return };
    match &scenario[..] {
        "layers" => layers(),
        "lengths" => lengths(),
        "absent" => absent(),
        "dies" => dies(),
        other => panic!("no scenario {other}"),
    }
}

/// A layer of e4m3 weights that every rank makes up alike, and takes its experts from.
struct Model {
    w13: (Vec<E4m3>, Vec<f32>),
    w2: (Vec<E4m3>, Vec<f32>),
}

const EXPERTS: usize = 10;
const HIDDEN: usize = 256;
const INTERMEDIATE: usize = 128;
const TOPK: usize = 3;

impl Model {
    fn new() -> Self {
        let mut random = Random::new(42);
        let mut weights = |n, k| block_scaled_weights(&mut random, [EXPERTS, n, k], 448.0, E4m3::from_f32);
        Self { w13: weights(2 * INTERMEDIATE, HIDDEN), w2: weights(HIDDEN, INTERMEDIATE) }
    }

    fn layer(&self, experts: &[usize], activations: ActivationFormat, max_tokens: usize) -> Layer {
        let cpu = Cpu::new();
        let pack = |(bytes, scales): &(Vec<E4m3>, Vec<f32>), n: usize, k: usize| {
            let picked: Vec<E4m3> = experts.iter().flat_map(|e| bytes[e * n * k..][..n * k].to_vec()).collect();
            let blocks = scales.len() / EXPERTS;
            let scales: Vec<f32> = experts.iter().flat_map(|e| scales[e * blocks..][..blocks].to_vec()).collect();
            PackedWeights::pack_e4m3(&cpu, &picked, &scales, experts.len(), n, k).unwrap()
        };
        let (w13, w2) = (pack(&self.w13, 2 * INTERMEDIATE, HIDDEN), pack(&self.w2, HIDDEN, INTERMEDIATE));
        Layer::prepare(&cpu, w13, w2, LayerConfig::new(TOPK, EXPERTS, activations), max_tokens).unwrap()
    }
}

/// Tokens of all ranks, each with its experts and weights.
struct Batch {
    x: Vec<bf16>,
    ids: Vec<i64>,
    weights: Vec<f32>,
}

impl Batch {
    fn new(tokens: usize, pattern: Pattern, seed: u64) -> Self {
        let mut random = Random::new(seed);
        Self {
            x: unit_rows(&mut random, tokens * HIDDEN, bf16::from_f32),
            ids: pattern.ids(&mut random, [tokens, TOPK], EXPERTS, 4),
            weights: (0..tokens * TOPK).map(|_| 0.1 + random.uniform().abs()).collect(),
        }
    }

    fn x(&self, first: usize, tokens: usize) -> MatrixRef<'_, bf16> {
        MatrixRef::new(&self.x[first * HIDDEN..], tokens, HIDDEN).unwrap()
    }

    fn ids(&self, first: usize, tokens: usize) -> MatrixRef<'_, i64> {
        MatrixRef::new(&self.ids[first * TOPK..], tokens, TOPK).unwrap()
    }

    fn weights(&self, first: usize, tokens: usize) -> MatrixRef<'_, f32> {
        MatrixRef::new(&self.weights[first * TOPK..], tokens, TOPK).unwrap()
    }

    fn on_one_rank(&self, layer: &Layer, tokens: usize) -> Vec<bf16> {
        let routing = Routing::new(self.ids(0, tokens), EXPERTS, None).unwrap();
        let mut workspace = vec![0; layer.workspace_bytes(tokens).unwrap()];
        let mut output = vec![bf16::ZERO; tokens * HIDDEN];
        layer.run(self.x(0, tokens), &routing, self.weights(0, tokens), &mut workspace, &mut output).unwrap();
        output
    }

    fn on_this_rank(&self, layer: &ExpertParallelLayer, first: usize, tokens: usize) -> expertile::Result<Vec<bf16>> {
        let mut workspace = vec![0; layer.workspace_bytes(tokens).unwrap()];
        let mut output = vec![bf16::ZERO; tokens * HIDDEN];
        let (x, ids, weights) = (self.x(first, tokens), self.ids(first, tokens), self.weights(first, tokens));
        layer.run(x, ids, weights, &mut workspace, &mut output).map(|()| output)
    }
}

fn layers() {
    let exchange: Arc<dyn Exchange> = Arc::new(Mpi::open_with(None, LIMIT).unwrap());
    let (rank, ranks) = (exchange.rank(), exchange.ranks());
    let (model, everyone) = (Model::new(), (0..EXPERTS).collect::<Vec<_>>());
    let copied = Placement::balanced(&[1, 1, 1, 1, 90, 1, 1, 1, 1, 1], ranks, ranks - 1).unwrap();
    let mut seed = 0;
    for placement in [Placement::linear(EXPERTS, ranks).unwrap(), copied] {
        for activations in [ActivationFormat::Bf16, ActivationFormat::E4m3] {
            for dispatch in Dispatch::ALL {
                let parallel =
                    ParallelConfig { dispatch: Some(dispatch), combine: Combine::Rows, placement: placement.clone() };
                let local = model.layer(placement.experts(rank), activations, 40);
                let one = model.layer(&everyone, activations, 160);
                let layer = ExpertParallelLayer::prepare(local, parallel, exchange.clone()).unwrap();
                // The same on every rank; nobody has tokens, or only rank 1, or all as many as there is room for.
                let shares = [vec![0; ranks], (0..ranks).map(|rank| rank % 2).collect(), vec![40; ranks]];
                for (share, pattern) in shares.iter().zip([Pattern::Even, Pattern::One, Pattern::Skewed]) {
                    seed += 1;
                    let tokens: usize = share.iter().sum();
                    let first: usize = share[..rank].iter().sum();
                    let batch = Batch::new(tokens, pattern, seed);
                    let expected = &batch.on_one_rank(&one, tokens)[first * HIDDEN..][..share[rank] * HIDDEN];
                    let found = batch.on_this_rank(&layer, first, share[rank]).unwrap();
                    assert!(found == expected, "rank {rank}, {dispatch}, {activations:?}, {share:?}");
                }
                // A bad id on the last rank is everyone's error, and the next call works.
                let mut batch = Batch::new(ranks, Pattern::Even, 7);
                batch.ids[(ranks - 1) * TOPK] = EXPERTS as i64;
                match batch.on_this_rank(&layer, rank, 1).unwrap_err() {
                    Error::OnRank { rank, .. } if rank == ranks - 1 => {}
                    error => panic!("{error}"),
                }
                batch.ids[(ranks - 1) * TOPK] = 0;
                batch.on_this_rank(&layer, rank, 1).unwrap();
            }
        }
    }
    // More than any library sends at once, and a length for every pair of its own.
    let bytes = |from: usize, to: usize| vec![(7 * from + to) as u8; 3_000_000 * from + 1000 * to];
    let send: Vec<Vec<u8>> = (0..ranks).map(|to| bytes(rank, to)).collect();
    let mut received: Vec<Vec<u8>> = (0..ranks).map(|from| vec![0; bytes(from, rank).len()]).collect();
    let send: Vec<&[u8]> = send.iter().map(Vec::as_slice).collect();
    let mut receive: Vec<&mut [u8]> = received.iter_mut().map(Vec::as_mut_slice).collect();
    exchange.all_to_all_v(&send, &mut receive).unwrap();
    assert!((0..ranks).all(|from| received[from] == bytes(from, rank)));
    println!("rank {rank} has done all");
}

fn lengths() {
    let exchange = Mpi::open_with(None, LIMIT).unwrap();
    let rank = exchange.rank();
    let len = 2 + rank;
    let error = exchange.all_gather(&[5; 3][..len], &mut vec![0; 2 * len]).unwrap_err();
    match (rank, &error) {
        // One byte more than there is room for is an error of MPI's own.
        (0, Error::Mpi { .. } | Error::Message { .. }) => {}
        (1, Error::Message { rank: 0, actual: 2, expected: 3 }) => {}
        _ => panic!("rank {rank}: {error}"),
    }
    assert_eq!(exchange.meet().unwrap_err(), error);
    println!("rank {rank} is told: {error}");
}

fn absent() {
    let exchange = Mpi::open_with(None, Duration::from_secs(2)).unwrap();
    exchange.meet().unwrap();
    if exchange.rank() == 1 {
        // The others end, and the launcher ends this one, long before.
        std::thread::sleep(2 * LIMIT);
        return;
    }
    match exchange.meet().unwrap_err() {
        Error::Absent { rank, waited } if waited >= Duration::from_secs(2) => println!("names rank {rank}"),
        error => panic!("{error}"),
    }
    drop(exchange);
    // As a program does that has an error: without the end that all ranks come to.
    std::process::exit(1);
}

fn dies() {
    let exchange = Mpi::open_with(None, LIMIT).unwrap();
    if exchange.rank() == 1 {
        std::process::exit(3);
    }
    let error = exchange.meet().unwrap_err();
    panic!("{error}");
}
