//! The layer over ranks that are threads: the bits of one rank, and every fault on every rank.

use crate::cases::{Number, Strided, Strides, bits, fills, numbers, strides};
use crate::layer::{Bench, makes, plain};
use crate::routings::{RoutingCase, config};
use expertile::backend::{Backend, ExpertLayer, Ids, LayerInputs};
use expertile::cpu::{Cpu, ExpertParallelLayer, Isa, Layer, ParallelStageDone};
use expertile::exchange::{Alone, Exchange, Threads};
use expertile::{
    ActivationFormat, Combine, Dispatch, Error, LayerConfig, MatrixRef, ParallelConfig, ParallelStage, Placement,
    Result, WeightFormat,
};
use expertile_oracle::compare::{by_row, difference, worst};
use expertile_testkit::Random;
use half::{bf16, f16};
use proptest::prelude::*;
use proptest::sample::select;
use std::ops::Range;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

/// Longer than any test takes: what waits for it has failed.
const LIMIT: Duration = Duration::from_secs(120);

/// One pool for all ranks: they must not wait for each other inside it.
fn cpu(isa: Isa) -> Cpu {
    static POOL: LazyLock<Arc<rayon::ThreadPool>> =
        LazyLock::new(|| Arc::new(rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap()));
    Cpu::with_isa(isa).in_pool(POOL.clone())
}

/// What `work` returns on every rank.
fn on_ranks<R: Send>(ranks: usize, limit: Duration, work: impl Fn(Arc<dyn Exchange>) -> R + Sync) -> Vec<R> {
    std::thread::scope(|scope| {
        let work = &work;
        let start = |exchange: Threads| scope.spawn(move || work(Arc::new(exchange)));
        let threads: Vec<_> = Threads::new(ranks, limit).unwrap().into_iter().map(start).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// Tokens on ranks, and experts on ranks.
#[derive(Debug, Clone)]
struct Spread {
    case: RoutingCase,
    placement: Placement,
    /// `[R + 1]`: the first token of each rank.
    cuts: Vec<usize>,
    /// Tokens of capacity beyond what the fullest rank brings.
    slack: usize,
    dispatch: Option<Dispatch>,
    isa: Isa,
}

impl Spread {
    fn tokens(&self, rank: usize) -> Range<usize> {
        self.cuts[rank]..self.cuts[rank + 1]
    }

    fn capacity(&self) -> usize {
        let most = (0..self.placement.ranks()).map(|rank| self.tokens(rank).len()).max().unwrap();
        most.max(1) + self.slack
    }

    fn parallel(&self, combine: Combine) -> ParallelConfig {
        ParallelConfig { dispatch: self.dispatch, combine, ..ParallelConfig::new(self.placement.clone()) }
    }
}

/// Any placement of `experts` on `ranks`: even ones, and lists of any sizes with replicas among them.
fn placements(experts: usize, ranks: usize) -> impl Strategy<Value = Placement> {
    let lists = any::<u64>().prop_map(move |seed| {
        let mut random = Random::new(seed);
        let mut order: Vec<usize> = (0..experts).collect();
        random.shuffle(&mut order);
        // One for every rank, the others anywhere, and up to as many copies again.
        let mut lists: Vec<Vec<usize>> = order[..ranks].iter().map(|&expert| vec![expert]).collect();
        for &expert in &order[ranks..] {
            lists[random.below(ranks)].push(expert);
        }
        for _ in 0..random.below(experts + 1) {
            let (expert, rank) = (random.below(experts), random.below(ranks));
            if !lists[rank].contains(&expert) {
                lists[rank].push(expert);
            }
        }
        Placement::from_lists(experts, lists).unwrap()
    });
    prop_oneof![
        1 => Just(Placement::linear(experts, ranks).unwrap()),
        1 => Just(Placement::round_robin(experts, ranks).unwrap()),
        3 => lists,
    ]
}

/// Ids of every kind: even, crowded on a few experts, all empty, repeated within a token.
fn cases(topk: impl Strategy<Value = usize>) -> impl Strategy<Value = RoutingCase> {
    use expertile_testkit::Pattern;
    let patterns = select(&[Pattern::Even, Pattern::Skewed, Pattern::Skewed, Pattern::One, Pattern::Empty][..]);
    (0..=40usize, topk, 1..=18usize, select(&[1, 4, 8][..]), patterns, any::<u64>()).prop_map(
        |(tokens, topk, experts, alignment, pattern, seed)| {
            let mut random = Random::new(seed);
            let busy = random.below(experts);
            let ids = pattern.ids(&mut random, [tokens, topk], experts, busy);
            RoutingCase { topk, local_experts: experts, alignment, ids, expert_map: None, slack: 0 }
        },
    )
}

fn spreads(topk: impl Strategy<Value = usize>) -> impl Strategy<Value = Spread> {
    let ranks = select(&[1usize, 2, 3, 4, 8, 16][..]);
    let dispatch = select(&[None, Some(Dispatch::Gather), Some(Dispatch::Routed)][..]);
    (cases(topk), ranks, dispatch, select(Isa::available()), 0..3usize).prop_flat_map(
        |(case, ranks, dispatch, isa, slack)| {
            let ranks = ranks.min(case.local_experts);
            let tokens = case.tokens();
            let cut = prop_oneof![2 => 0..=tokens, 1 => Just(0), 1 => Just(tokens)];
            (placements(case.local_experts, ranks), proptest::collection::vec(cut, ranks - 1)).prop_map(
                move |(placement, mut cuts)| {
                    cuts.sort_unstable();
                    let cuts = [vec![0], cuts, vec![tokens]].concat();
                    Spread { case: case.clone(), placement, cuts, slack, dispatch, isa }
                },
            )
        },
    )
}

/// The outputs of all ranks, one behind the other, of a poisoned, unaligned workspace of exactly the size asked for.
fn run<T: Number, O: Number>(bench: &Bench<T>, spread: &Spread, combine: Combine, strides: Strides) -> Vec<O> {
    let Spread { case, placement, .. } = spread;
    let (hidden, topk, capacity) = (bench.make.hidden, case.topk, spread.capacity());
    let outputs = on_ranks(placement.ranks(), LIMIT, |exchange| {
        let rank = exchange.rank();
        let layer = bench.layer_of::<O>(&cpu(spread.isa), case, case.alignment, placement.experts(rank), capacity);
        let layer = ExpertParallelLayer::prepare(layer, spread.parallel(combine), exchange).unwrap();
        let mine = spread.tokens(rank);
        let tokens = mine.len();
        let slots = mine.start * topk..mine.end * topk;
        let x = Strided::new(
            &bench.x[mine.start * hidden..mine.end * hidden],
            tokens,
            hidden,
            strides,
            T::nearest(f32::NAN),
        );
        let weights = Strided::new(&bench.topk_weights[slots.clone()], tokens, topk, strides, f32::NAN);
        let ids = Strided::new(&case.ids[slots], tokens, topk, strides, i64::MAX);
        let mut workspace = vec![0xff; layer.workspace_bytes(tokens).unwrap() + 1];
        let poison = O::nearest(-77.0);
        let mut output = vec![poison; tokens * hidden + 3];
        let mut stages = Vec::new();
        let mut observe = |done: &ParallelStageDone| stages.push(done.stage);
        layer
            .run_observed(x.matrix(), ids.matrix(), weights.matrix(), &mut workspace[1..], &mut output, &mut observe)
            .unwrap();
        assert_eq!(stages, ParallelStage::ALL);
        assert!(output[tokens * hidden..].iter().all(|value| value.bits() == poison.bits()));
        output.truncate(tokens * hidden);
        output
    });
    outputs.concat()
}

/// The bits of the layer on one rank, without any exchange.
fn alone<T: Number, O: Number>(bench: &Bench<T>, spread: &Spread) -> Vec<u32> {
    bits(&bench.run::<O>(&cpu(spread.isa), &spread.case, Strides::Contiguous).0)
}

proptest! {
    #![proptest_config(config(32))]

    #[test]
    fn rows_give_the_bits_of_one_rank(spread in spreads(1..=8usize), make in makes(), strides in strides()) {
        let bench = Bench::<bf16>::new(make, &spread.case);
        let found = bits(&run::<_, bf16>(&bench, &spread, Combine::Rows, strides));
        prop_assert!(found == alone::<_, bf16>(&bench, &spread));
    }

    #[test]
    fn rows_of_any_numbers_give_the_bits_of_one_rank(
        spread in spreads(1..=8usize),
        make in makes(),
        fill in fills(),
        seed in any::<u64>(),
    ) {
        let mut bench = Bench::<f32>::new(make, &spread.case);
        bench.x = numbers(bench.x.len(), fill, seed);
        bench.topk_weights = numbers(bench.topk_weights.len(), fill, seed ^ 1);
        let found = bits(&run::<_, f32>(&bench, &spread, Combine::Rows, Strides::Contiguous));
        prop_assert!(found == alone::<_, f32>(&bench, &spread));
        let mut bench = Bench::<f16>::new(make, &spread.case);
        bench.x = numbers(bench.x.len(), fill, seed);
        let found = bits(&run::<_, bf16>(&bench, &spread, Combine::Rows, Strides::Contiguous));
        prop_assert!(found == alone::<_, bf16>(&bench, &spread));
    }

    #[test]
    fn router_weights_on_the_input_give_the_bits_of_one_rank(spread in spreads(Just(1usize)), make in makes()) {
        let make = make.weighted_on_input();
        let bench = Bench::<bf16>::new(make, &spread.case);
        let expected = alone::<_, bf16>(&bench, &spread);
        // A sum of one row is that row: sums have the same bits here, too.
        for combine in Combine::ALL {
            let found = bits(&run::<_, bf16>(&bench, &spread, combine, Strides::Contiguous));
            prop_assert!(found == expected, "{combine}");
        }
    }

    #[test]
    fn sums_are_within_tolerance_and_the_same_for_the_same_placement(
        spread in spreads(1..=8usize),
        make in makes(),
        strides in strides(),
    ) {
        let (bench, tolerance) = (Bench::<bf16>::new(make, &spread.case), make.tolerance());
        let output = run::<_, bf16>(&bench, &spread, Combine::Sums, strides);
        for dispatch in Dispatch::ALL {
            let again = Spread { dispatch: Some(dispatch), ..spread.clone() };
            prop_assert!(bits(&run::<_, bf16>(&bench, &again, Combine::Sums, strides)) == bits(&output), "{dispatch}");
        }
        let expected = bench.expected(&spread.case).output;
        let output: Vec<f64> = output.iter().map(|value| f64::from(value.exact())).collect();
        let whole = difference(&output, &expected);
        prop_assert!(whole < tolerance.whole, "{whole} of {tolerance:?}");
        if let Some((token, most)) = worst(&by_row(&output, &expected, make.hidden)) {
            prop_assert!(most < tolerance.row, "token {token}: {most} of {tolerance:?}");
        }
    }
}

/// Twelve tokens of three slots over six experts, on `ranks` ranks.
fn small(ranks: usize) -> (Bench<bf16>, Spread) {
    let ids = (0..36).map(|slot| [0, 3, 5, 1, -1, 3, 4, 2, 0, 5, 5, -1][slot % 12]).collect();
    let case = RoutingCase { topk: 3, local_experts: 6, alignment: 1, ids, expert_map: None, slack: 0 };
    let bench = Bench::new(plain(128, 128, WeightFormat::E4m3, ActivationFormat::E4m3), &case);
    let cuts = (0..=ranks).map(|rank| rank * 12 / ranks).collect();
    let placement = Placement::linear(6, ranks).unwrap();
    (bench, Spread { case, placement, cuts, slack: 0, dispatch: None, isa: Isa::best() })
}

/// A rank's layer, its operands and its memory: everything that a fault may be put into.
struct Rank {
    layer: ExpertParallelLayer,
    x: Vec<bf16>,
    ids: Vec<i64>,
    weights: Vec<f32>,
    workspace: Vec<u8>,
    output: Vec<bf16>,
}

impl Rank {
    fn new(bench: &Bench<bf16>, spread: &Spread, exchange: Arc<dyn Exchange>) -> Self {
        let (rank, hidden, topk) = (exchange.rank(), bench.make.hidden, spread.case.topk);
        let experts = spread.placement.experts(rank);
        let layer = bench.layer_of::<bf16>(&cpu(spread.isa), &spread.case, 1, experts, spread.capacity());
        let layer = ExpertParallelLayer::prepare(layer, spread.parallel(Combine::Rows), exchange).unwrap();
        let mine = spread.tokens(rank);
        Self {
            x: bench.x[mine.start * hidden..mine.end * hidden].to_vec(),
            ids: spread.case.ids[mine.start * topk..mine.end * topk].to_vec(),
            weights: bench.topk_weights[mine.start * topk..mine.end * topk].to_vec(),
            workspace: vec![0; layer.workspace_bytes(mine.len()).unwrap()],
            output: vec![bf16::from_f32(-77.0); mine.len() * hidden],
            layer,
        }
    }

    fn run(&mut self) -> Result<()> {
        let (topk, hidden) = (self.layer.config().topk, self.layer.shape().hidden());
        let tokens = self.ids.len() / topk;
        let x = MatrixRef::new(&self.x[..], tokens, hidden)?;
        let ids = MatrixRef::new(&self.ids[..], tokens, topk)?;
        let weights = MatrixRef::new(&self.weights[..], tokens, topk)?;
        self.layer.run(x, ids, weights, &mut self.workspace, &mut self.output)
    }

    fn is_untouched(&self) -> bool {
        self.output.iter().all(|&value| value == bf16::from_f32(-77.0))
    }
}

#[test]
fn bad_input_on_one_rank_is_the_same_error_on_all_and_the_next_call_works() {
    type Fault = (&'static str, fn(&mut Rank));
    let faults: [Fault; 4] = [
        ("topk_ids[1, 2] is 6, expected an id below 6", |rank| rank.ids[5] = 6),
        ("topk_ids[0, 0] is 9223372036854775807", |rank| rank.ids[0] = i64::MAX),
        ("workspace holds", |rank| rank.workspace.truncate(rank.workspace.len() - 1)),
        ("output holds 511 elements, expected at least 512", |rank| rank.output.truncate(511)),
    ];
    let (bench, spread) = small(3);
    let expected = alone::<_, bf16>(&bench, &spread);
    for (message, fault) in faults {
        for bad in 0..3 {
            let outputs = on_ranks(3, LIMIT, |exchange| {
                let me = exchange.rank();
                let mut rank = Rank::new(&bench, &spread, exchange);
                let (ids, workspace, output) = (rank.ids.clone(), rank.workspace.len(), rank.output.len());
                if me == bad {
                    fault(&mut rank);
                }
                match rank.run().unwrap_err() {
                    Error::OnRank { rank, message: found } => {
                        assert!(rank == bad && found.starts_with(message), "{rank}: {found}");
                    }
                    error => panic!("{error}"),
                }
                assert!(rank.is_untouched());
                rank.ids = ids;
                rank.workspace.resize(workspace, 0);
                rank.output.resize(output, bf16::ZERO);
                rank.run().unwrap();
                rank.output
            });
            assert_eq!(bits(&outputs.concat()), expected);
        }
    }
}

#[test]
fn more_tokens_than_the_capacity_are_refused_on_all_ranks() {
    let (bench, spread) = small(2);
    on_ranks(2, LIMIT, |exchange| {
        let me = exchange.rank();
        let mut rank = Rank::new(&bench, &spread, exchange);
        if me == 1 {
            rank.ids.extend([-1; 3]);
            rank.weights.extend([0.0; 3]);
            rank.x.extend([bf16::ZERO; 128]);
        }
        let error = rank.run().unwrap_err().to_string();
        assert_eq!(error, "on rank 1: tokens is 7, expected at most 6, as prepared");
    });
}

#[test]
fn ranks_that_do_not_agree_are_found_when_the_layer_is_prepared() {
    type Change = fn(&mut Spread, &mut ParallelConfig, &mut LayerConfig);
    let changes: [(&str, &str, &str, Change); 6] = [
        ("capacity", "7", "6", |spread, _, _| spread.slack = 1),
        ("topk", "2", "3", |_, _, config| config.topk = 2),
        ("dispatch", "routed", "gather", |_, parallel, _| parallel.dispatch = Some(Dispatch::Routed)),
        ("combine", "sums", "rows", |_, parallel, _| parallel.combine = Combine::Sums),
        ("placement", "", "", |_, parallel, _| parallel.placement = Placement::round_robin(6, 2).unwrap()),
        ("bytes of a token's row", "272", "144", |_, _, config| config.activation_format = ActivationFormat::Bf16),
    ];
    let (bench, spread) = small(2);
    for (argument, actual, expected, change) in &changes {
        let errors = on_ranks(2, LIMIT, |exchange| {
            let (mut spread, rank) = (spread.clone(), exchange.rank());
            let mut parallel = spread.parallel(Combine::Rows);
            let experts = spread.placement.experts(rank);
            let layer = bench.layer_of::<bf16>(&cpu(spread.isa), &spread.case, 1, experts, 1);
            let mut config = *layer.config();
            if rank == 1 {
                change(&mut spread, &mut parallel, &mut config);
            }
            let layer = layer.with_config(config, spread.capacity()).unwrap();
            ExpertParallelLayer::prepare(layer, parallel, exchange).unwrap_err()
        });
        assert_eq!(errors[0], errors[1]);
        let Error::Disagreement { argument: found, rank: 1, actual: its, expected: first } = &errors[0] else {
            panic!("{argument}: {}", errors[0])
        };
        assert_eq!(found, argument, "{}", errors[0]);
        assert!(its.contains(actual) && first.contains(expected), "{}", errors[0]);
    }
}

#[test]
fn a_rank_that_cannot_prepare_is_named_on_all() {
    let (bench, spread) = small(2);
    let errors = on_ranks(2, LIMIT, |exchange| {
        let rank = exchange.rank();
        // Rank 1 has loaded one expert too few.
        let experts = &spread.placement.experts(rank)[rank..];
        let layer = bench.layer_of::<bf16>(&cpu(spread.isa), &spread.case, 1, experts, 8);
        ExpertParallelLayer::prepare(layer, spread.parallel(Combine::Rows), exchange).unwrap_err().to_string()
    });
    assert_eq!(errors, ["on rank 1: local_experts is 2, expected 3, as placed"; 2]);
    let (bench, spread) = small(1);
    let layer = |experts: &[usize]| bench.layer_of::<bf16>(&cpu(spread.isa), &spread.case, 1, experts, 8);
    let prepare = |layer: Layer, placement| {
        let error = ExpertParallelLayer::prepare(layer, ParallelConfig::new(placement), Arc::new(Alone)).unwrap_err();
        error.to_string()
    };
    let error = prepare(layer(&[0, 1, 2]), Placement::linear(6, 2).unwrap());
    assert_eq!(error, "on rank 0: ranks of the placement is 2, expected 1, the exchange's");
    let error = prepare(layer(&[0, 1, 2, 3, 4]), Placement::linear(5, 1).unwrap());
    assert_eq!(error, "on rank 0: global_experts is 6, expected 5, as placed");
}

#[test]
fn a_rank_that_dies_or_never_comes_is_named_by_the_others() {
    let (bench, spread) = small(3);
    let limit = Duration::from_secs(2);
    for dies in [true, false] {
        let results = on_ranks(3, limit, |exchange| {
            let me = exchange.rank();
            let mut rank = Rank::new(&bench, &spread, exchange);
            rank.run().unwrap();
            if me == 1 {
                // Its exchange is dropped at once, or stays until long after the others' limit.
                std::thread::sleep(if dies { Duration::ZERO } else { 3 * limit });
                return None;
            }
            Some(rank.run().unwrap_err())
        });
        for error in [&results[0], &results[2]] {
            let Some(Error::Absent { rank: 1, waited }) = error else { panic!("{error:?}") };
            assert!(dies || *waited >= limit, "{waited:?}");
        }
    }
}

#[test]
fn ranks_in_calls_of_different_layers_are_told_so() {
    let (bench, spread) = small(2);
    let errors = on_ranks(2, LIMIT, |exchange| {
        let me = exchange.rank();
        let mut layers = [(); 2].map(|()| Rank::new(&bench, &spread, exchange.clone()));
        layers[me].run().unwrap_err()
    });
    assert_eq!(errors[0], errors[1]);
    assert!(matches!(errors[0], Error::Disagreement { argument: "layer", rank: 1, .. }), "{}", errors[0]);
}

/// An engine's code over any layer of the CPU.
fn forward<L: ExpertLayer<Cpu>>(
    layer: &L,
    bench: &Bench<bf16>,
    spread: &Spread,
    mine: Range<usize>,
) -> Result<Vec<bf16>> {
    let (hidden, topk) = (layer.shape().hidden(), layer.config().topk);
    let inputs = LayerInputs {
        tokens: mine.len(),
        hidden_states: &bench.x[mine.start * hidden..mine.end * hidden].to_vec(),
        topk_ids: Ids::I32(&spread.case.ids[mine.start * topk..mine.end * topk].iter().map(|&id| id as i32).collect()),
        topk_weights: &bench.topk_weights[mine.start * topk..mine.end * topk].to_vec(),
        expert_map: None,
    };
    let (mut workspace, mut output) = (layer.workspace(mine.len())?, vec![bf16::ZERO; mine.len() * hidden]);
    layer.run(&inputs, &mut workspace, &mut output)?;
    layer.check(&mut workspace)?;
    Ok(output)
}

#[test]
fn an_engine_written_once_runs_on_one_rank_and_on_several() {
    let (bench, spread) = small(2);
    let everyone: Vec<usize> = (0..6).collect();
    let one =
        forward(&bench.layer_of::<bf16>(&Cpu::new(), &spread.case, 1, &everyone, 12), &bench, &spread, 0..12).unwrap();
    let several = on_ranks(2, LIMIT, |exchange| {
        let rank = Rank::new(&bench, &spread, exchange.clone());
        let output = forward(&rank.layer, &bench, &spread, spread.tokens(exchange.rank())).unwrap();
        let map = Cpu::new().upload(&[0; 6]).unwrap();
        let ids = vec![0; 0];
        let inputs = LayerInputs {
            tokens: 0,
            hidden_states: &Vec::<bf16>::new(),
            topk_ids: Ids::I32(&ids),
            topk_weights: &Vec::new(),
            expert_map: Some(&map),
        };
        let error = ExpertLayer::run(&rank.layer, &inputs, &mut Vec::new(), &mut Vec::<bf16>::new()).unwrap_err();
        assert!(error.to_string().starts_with("on rank 0: expert_map is given"), "{error}");
        assert!(rank.layer.choice(6).unwrap().to_string().starts_with("2 ranks of up to 6 tokens; dispatch gather"));
        output
    });
    assert_eq!(bits(&several.concat()), bits(&one));
}

#[test]
fn stages_report_the_bytes_that_travel() {
    let (bench, spread) = small(2);
    let spread = Spread { dispatch: Some(Dispatch::Routed), ..spread };
    let travelled = on_ranks(2, LIMIT, |exchange| {
        let mut rank = Rank::new(&bench, &spread, exchange);
        let mut bytes = Vec::new();
        let (tokens, topk) = (6, 3);
        rank.layer
            .run_observed(
                MatrixRef::new(&rank.x[..], tokens, 128).unwrap(),
                MatrixRef::new(&rank.ids[..], tokens, topk).unwrap(),
                MatrixRef::new(&rank.weights[..], tokens, topk).unwrap(),
                &mut rank.workspace,
                &mut rank.output,
                &mut |done| bytes.push([done.sent, done.received]),
            )
            .unwrap();
        bytes
    });
    // A token once to the other rank, and a bf16 row back for each of its slots there.
    let row = 128 + 4 + 12;
    let expected = |rank: usize| {
        let slots_of = |home: usize, owner: usize| {
            let mine = spread.tokens(home);
            let ids = &spread.case.ids[mine.start * 3..mine.end * 3];
            let theirs = |id: &&i64| **id >= 0 && (**id >= 3) == (owner == 1);
            let tokens = ids.chunks(3).filter(|ids| ids.iter().any(|id| theirs(&id))).count();
            (tokens as u64, ids.iter().filter(theirs).count() as u64)
        };
        let (out, back) = (slots_of(rank, 1 - rank), slots_of(1 - rank, rank));
        vec![[0, 0], [out.0 * row, back.0 * row], [0, 0], [back.1 * 256, out.1 * 256], [0, 0]]
    };
    assert_eq!(travelled, [expected(0), expected(1)]);
}
