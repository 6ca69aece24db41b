//! The layer over ranks that share one GPU, by turns: the bits of one rank, and every fault. Outputs and workspaces are
//! NaN before every call. Skips, and says so, without a Hopper.
#![cfg(feature = "cuda")]
#![allow(unsafe_code)]
// Every unsafe block here hands the layer addresses of buffers that live until after the next wait and are as large as
// the layer's own functions ask.
#![allow(clippy::undocumented_unsafe_blocks)]

mod model;
mod nccl;
#[path = "../on_device/mod.rs"]
mod on_device;

use expertile::cuda::{Device, ExpertParallelCall, ExpertParallelLayer, Graph, Link, Stream};
use expertile::{ActivationFormat, Combine, Dispatch, Dtype, Error, ParallelConfig, Placement, WeightFormat};
use expertile_testkit::{Pattern, Random};
use half::{bf16, f16};
use model::{BASE, Model, Operands, Spec, Tokens, launch, nowhere, on_one_rank, on_ranks, prepare, prepare_rank};
use on_device::hopper;
use std::time::Duration;

/// Longer than any wait of a test that is not about waiting.
const LIMIT: Duration = Duration::from_secs(60);

/// Ranks with their calls.
struct Group {
    layers: Vec<ExpertParallelLayer>,
    operands: Vec<Operands>,
}

impl Group {
    fn new(device: &Device, model: &Model, parallel: &ParallelConfig, most: usize, limit: Duration) -> Self {
        let layers = prepare(device, model, parallel, most, limit).into_iter().map(Result::unwrap).collect();
        Self { layers, operands: Vec::new() }
    }

    /// Gives rank `r` the next `counts[r]` of the tokens.
    fn bring(&mut self, device: &Device, spec: &Spec, tokens: &Tokens, counts: &[usize], capacity: usize) {
        let mut first = 0;
        self.operands.clear();
        for (layer, &count) in self.layers.iter().zip(counts) {
            let bytes = layer.workspace_bytes(capacity).unwrap();
            self.operands.push(Operands::new(device, spec, tokens, (first, count, capacity), bytes));
            first += count;
        }
    }

    fn pairs(&self) -> Vec<(&ExpertParallelLayer, &ExpertParallelCall)> {
        self.layers.iter().zip(self.operands.iter().map(|operands| &operands.call)).collect()
    }

    fn run(&self) {
        self.operands.iter().for_each(Operands::poison);
        launch(Stream(0), &self.pairs()).unwrap();
    }

    fn check(&self) -> Vec<Result<(), Error>> {
        self.pairs().into_iter().map(|(layer, call)| unsafe { layer.check_launch(Stream(0), call) }).collect()
    }

    /// Rows that the experts of all ranks have had in the last call.
    fn live_rows(&self) -> usize {
        let of = |(layer, operands): (&ExpertParallelLayer, &Operands)| {
            let tokens = self.layers.len() * operands.call.capacity;
            let header = layer.local().parts(tokens, operands.call.workspace).unwrap().layout.header;
            let mut live = [0i32];
            let start = (header.address() - operands.call.workspace.address()) as usize;
            operands.workspace.download_at(start, &mut live).unwrap();
            live[0] as usize
        };
        self.layers.iter().zip(&self.operands).map(of).sum()
    }

    fn output(&self, device: &Device, spec: &Spec) -> Vec<u8> {
        self.operands.iter().flat_map(|operands| operands.output(device, spec)).collect()
    }
}

/// Placements of every kind: even, uneven, with copies.
fn placements(experts: usize, ranks: usize) -> Vec<Placement> {
    let mut lists: Vec<Vec<usize>> = (0..ranks).map(|rank| vec![experts - 1 - rank]).collect();
    // The first rank has most of the experts, and the last one copies of some.
    lists[0].extend((0..experts - ranks).rev());
    if ranks > 1 {
        lists[ranks - 1].extend([0, experts - 1]);
    }
    vec![
        Placement::linear(experts, ranks).unwrap(),
        Placement::round_robin(experts, ranks).unwrap(),
        Placement::from_lists(experts, lists).unwrap(),
    ]
}

/// How many tokens each rank brings: as many as each other, all of them one's, some without any, none.
fn counts(ranks: usize, most: usize) -> Vec<Vec<usize>> {
    let mut single = vec![0; ranks];
    single[ranks - 1] = most;
    vec![vec![most; ranks], (0..ranks).map(|rank| most * rank / ranks).collect(), single, vec![0; ranks]]
}

fn as_f64(spec: &Spec, bytes: &[u8]) -> Vec<f64> {
    match spec.output {
        Dtype::F32 => bytes.chunks_exact(4).map(|b| f64::from(f32::from_le_bytes(b.try_into().unwrap()))).collect(),
        Dtype::F16 => bytes.chunks_exact(2).map(|b| f16::from_le_bytes(b.try_into().unwrap()).to_f64()).collect(),
        _ => bytes.chunks_exact(2).map(|b| bf16::from_le_bytes(b.try_into().unwrap()).to_f64()).collect(),
    }
}

/// Fails unless ranks gave what one rank did: with [`Combine::Rows`] bit for bit, with sums but for their order.
fn check_output(spec: &Spec, combine: Combine, found: &[u8], expected: &[u8], what: &str) {
    if combine == Combine::Rows {
        assert!(found == expected, "{what}");
        return;
    }
    assert_eq!(found.len(), expected.len(), "{what}");
    let (found, expected) = (as_f64(spec, found), as_f64(spec, expected));
    let off = |(a, b): (&f64, &f64)| (a - b).abs() > 0.01 * (1.0 + b.abs()) || a.is_nan();
    assert!(!found.iter().zip(&expected).any(off), "{what}");
}

/// Every placement, dispatch, combine and number of tokens, against one rank.
fn check_spec(spec: Spec, ranks: &[usize], most: usize, patterns: &[Pattern]) {
    let Some(device) = hopper() else { return };
    let model = Model::new(spec);
    for &ranks in ranks {
        for (case, placement) in placements(spec.experts, ranks).into_iter().enumerate() {
            for combine in Combine::ALL {
                // Sums of one placement, rows of all of them.
                if combine == Combine::Sums && case != ranks % 3 {
                    continue;
                }
                let dispatch = Some(Dispatch::ALL[case % 2]);
                let parallel = ParallelConfig { dispatch, combine, ..ParallelConfig::new(placement.clone()) };
                let mut group = Group::new(device, &model, &parallel, most + 1, LIMIT);
                for (number, counts) in counts(ranks, most).into_iter().enumerate() {
                    let pattern = patterns[number % patterns.len()];
                    let mut random = Random::new((ranks * 100 + number) as u64);
                    let all = counts.iter().sum();
                    let ids = pattern.ids(&mut random, [all, spec.topk], spec.experts, 1);
                    let tokens = Tokens::new(&spec, ids, number as u64);
                    // As many as the fullest rank brings, and then more.
                    let capacity = (counts.iter().max().unwrap() + number % 2).max(1);
                    group.bring(device, &spec, &tokens, &counts, capacity);
                    group.run();
                    let found = group.output(device, &spec);
                    assert!(group.check().iter().all(Result::is_ok), "{parallel:?}: {:?}", group.check());
                    let expected = if all > 0 { on_one_rank(device, &model, &tokens) } else { Vec::new() };
                    let what = format!("{ranks} ranks, {counts:?} of {capacity}, {pattern:?}, {parallel:?}, {spec:?}");
                    check_output(&spec, combine, &found, &expected, &what);
                    // What ranks brought to the calls before is nobody's row.
                    let slots = tokens.ids.iter().filter(|&&id| id >= 0).count();
                    assert_eq!(group.live_rows(), slots, "{what}");
                    // Once more, on what the first call left.
                    let once = group.output(device, &spec);
                    group.run();
                    assert!(group.output(device, &spec) == once, "a second call differs: {what}");
                }
            }
        }
    }
}

const ALL: [Pattern; 4] = [Pattern::Even, Pattern::Skewed, Pattern::One, Pattern::Empty];

#[test]
fn e4m3_rows_have_the_bits_of_one_rank() {
    check_spec(BASE, &[1, 3], 9, &ALL);
}

#[test]
fn bf16_rows_have_the_bits_of_one_rank() {
    let spec =
        Spec { hidden: 272, intermediate: 144, weights: WeightFormat::Bf16, format: ActivationFormat::Bf16, ..BASE };
    check_spec(spec, &[2, 4], 5, &ALL);
}

#[test]
fn rows_of_4_bit_weights_have_the_bits_of_one_rank() {
    for (weights, format) in [
        (WeightFormat::Mxfp4, ActivationFormat::E4m3),
        (WeightFormat::Mxfp4, ActivationFormat::Bf16),
        (WeightFormat::Int4, ActivationFormat::Bf16),
    ] {
        let spec = Spec { hidden: 256, intermediate: 128, weights, format, ..BASE };
        check_spec(spec, &[2], 5, &[Pattern::Even, Pattern::Skewed]);
    }
}

#[test]
fn biases_are_those_of_the_ranks_experts() {
    check_spec(Spec { hidden: 256, biased: true, ..BASE }, &[1, 3], 5, &[Pattern::Even, Pattern::Skewed]);
    let (weights, format) = (WeightFormat::Mxfp4, ActivationFormat::Bf16);
    let spec = Spec { hidden: 192, intermediate: 160, weights, format, biased: true, ..BASE };
    check_spec(spec, &[2], 5, &[Pattern::Skewed]);
}

#[test]
fn biases_that_only_some_ranks_have_or_that_are_too_short_are_told_on_all() {
    let Some(device) = hopper() else { return };
    let model = Model::new(BASE);
    let parallel = ParallelConfig::new(Placement::linear(BASE.experts, 2).unwrap());
    let with = |biases: fn(usize) -> Option<Vec<f32>>| {
        on_ranks(2, |exchange| {
            let rank = exchange.rank();
            let layer = prepare_rank(device, &model, &parallel, 4, exchange, Link::Mapped).unwrap();
            layer.with_biases(biases(rank), None).unwrap_err()
        })
    };
    for error in with(|rank| (rank == 1).then(|| vec![0.0; 6 * 2 * 256])) {
        assert!(matches!(error, Error::Disagreement { argument: "w13_bias", .. }), "{error}");
    }
    for error in with(|rank| Some(vec![0.0; 6 * 2 * 256 - rank])) {
        assert!(matches!(&error, Error::OnRank { rank: 1, message } if message.contains("3071")), "{error}");
    }
}

#[test]
fn f16_states_i64_ids_and_an_f32_result_have_the_bits_of_one_rank() {
    let spec = Spec { hidden: 640, topk: 3, input: Dtype::F16, output: Dtype::F32, ids: Dtype::I64, ..BASE };
    check_spec(spec, &[2], 17, &[Pattern::Even, Pattern::Skewed]);
}

#[test]
fn weights_on_the_input_are_applied_at_home() {
    check_spec(Spec { topk: 1, weight_on_input: true, ..BASE }, &[2], 17, &[Pattern::Even, Pattern::Skewed]);
}

#[test]
fn many_slots_take_the_other_kernels() {
    let spec = Spec { hidden: 256, intermediate: 128, topk: 8, ..BASE };
    check_spec(spec, &[2], 150, &[Pattern::Even, Pattern::Skewed]);
}

#[test]
fn tokens_that_are_quantized_at_home_have_the_bits_of_one_rank() {
    let Some(device) = hopper() else { return };
    // More than 8192 slots of all ranks.
    let (spec, tokens) = (Spec { hidden: 128, intermediate: 128, topk: 8, ..BASE }, 516);
    let model = Model::new(spec);
    for (combine, dispatch) in Combine::ALL.into_iter().zip(Dispatch::ALL) {
        let placement = Placement::round_robin(spec.experts, 2).unwrap();
        let parallel = ParallelConfig { combine, dispatch: Some(dispatch), placement };
        let mut group = Group::new(device, &model, &parallel, tokens, LIMIT);
        let choice = group.layers[0].choice(tokens).unwrap();
        assert_eq!(choice.token_row, choice.parallel.token_row);
        let ids = Pattern::Skewed.ids(&mut Random::new(3), [2 * tokens - 7, spec.topk], spec.experts, 0);
        let all = Tokens::new(&spec, ids, 5);
        group.bring(device, &spec, &all, &[tokens - 7, tokens], tokens);
        group.run();
        let (found, expected) = (group.output(device, &spec), on_one_rank(device, &model, &all));
        if combine == Combine::Rows {
            assert!(found == expected);
        }
        let (found, expected) = (as_f64(&spec, &found), as_f64(&spec, &expected));
        assert!(found.iter().zip(&expected).all(|(a, b)| (a - b).abs() <= 0.01 * (1.0 + b.abs())));
    }
}

/// A group of two ranks with so many tokens each, and the output of one rank.
fn two_ranks(device: &Device, combine: Combine, tokens: usize, limit: Duration) -> (Group, Tokens, Model) {
    let model = Model::new(BASE);
    let placement = Placement::linear(BASE.experts, 2).unwrap();
    let parallel = ParallelConfig { combine, ..ParallelConfig::new(placement) };
    let mut group = Group::new(device, &model, &parallel, tokens, limit);
    let ids = Pattern::Even.ids(&mut Random::new(3), [2 * tokens, BASE.topk], BASE.experts, 0);
    let tokens_of_both = Tokens::new(&BASE, ids, 5);
    group.bring(device, &BASE, &tokens_of_both, &[tokens; 2], tokens);
    (group, tokens_of_both, model)
}

#[test]
fn a_graph_gives_the_same_bits_at_every_replay() {
    let Some(device) = hopper() else { return };
    let (group, tokens, model) = two_ranks(device, Combine::Rows, 6, LIMIT);
    let graph = Graph::capture(device, |stream| launch(stream, &group.pairs())).unwrap();
    let expected = on_one_rank(device, &model, &tokens);
    for _ in 0..3 {
        group.operands.iter().for_each(Operands::poison);
        unsafe { graph.replay(Stream(0)) }.unwrap();
        assert!(group.output(device, &BASE) == expected);
        // An eager call between replays: the flags grow all the same.
        group.run();
        assert!(group.output(device, &BASE) == expected);
    }
}

#[test]
fn fifty_replays_and_fifty_calls_give_the_same_bits() {
    let Some(device) = hopper() else { return };
    for combine in Combine::ALL {
        for tokens in [1, 8, 200] {
            let (group, _, _) = two_ranks(device, combine, tokens, LIMIT);
            group.run();
            let expected = group.output(device, &BASE);
            let graph = Graph::capture(device, |stream| launch(stream, &group.pairs())).unwrap();
            for repeat in 0..50 {
                group.operands.iter().for_each(Operands::poison);
                if repeat % 2 == 0 {
                    unsafe { graph.replay(Stream(0)) }.unwrap();
                } else {
                    launch(Stream(0), &group.pairs()).unwrap();
                }
                assert!(group.output(device, &BASE) == expected, "{combine}, {tokens} tokens, repeat {repeat}");
            }
        }
    }
}

#[test]
fn a_bad_id_is_the_same_error_on_every_rank_and_an_empty_slot() {
    let Some(device) = hopper() else { return };
    let model = Model::new(Spec { ids: Dtype::I64, ..BASE });
    let placement = Placement::linear(BASE.experts, 2).unwrap();
    let mut group = Group::new(device, &model, &ParallelConfig::new(placement), 4, LIMIT);
    let mut ids = Pattern::Even.ids(&mut Random::new(1), [8, BASE.topk], BASE.experts, 0);
    let bad = [(4 * BASE.topk + 6, i64::from(u32::MAX) + 5), (4 * BASE.topk + 9, 12)];
    for (slot, id) in bad {
        ids[slot] = id;
    }
    let tokens = Tokens::new(&model.spec, ids.clone(), 2);
    group.bring(device, &model.spec, &tokens, &[4, 4], 4);
    group.run();
    let found = group.output(device, &model.spec);
    let message = "topk_ids[1, 2] is 4294967295, expected an id below 12 (or a negative one for an empty slot)".into();
    let expected = Err(Error::OnRank { rank: 1, message });
    assert_eq!(group.check(), [expected.clone(), expected]);
    assert_eq!(group.check(), [Ok(()), Ok(())], "a fault is told once");
    bad.iter().for_each(|&(slot, _)| ids[slot] = -1);
    let empty = Tokens { ids, ..tokens };
    assert!(found == on_one_rank(device, &model, &empty));
    // The next call works.
    group.bring(device, &model.spec, &empty, &[4, 4], 4);
    group.run();
    assert!(group.output(device, &model.spec) == found);
    assert_eq!(group.check(), [Ok(()), Ok(())]);
}

#[test]
fn a_rank_that_does_not_come_is_named_and_nobody_waits_for_ever() {
    let Some(device) = hopper() else { return };
    let limit = Duration::from_millis(100);
    let (group, ..) = two_ranks(device, Combine::Rows, 3, limit);
    let (layer, call) = (&group.layers[0], &group.operands[0].call);
    unsafe { layer.launch(Stream(0), call) }.unwrap();
    let absent = Err(Error::Absent { rank: 1, waited: limit });
    assert_eq!(unsafe { layer.check_launch(Stream(0), call) }, absent);
    // The layer is of no use any more, and says so at once.
    let started = std::time::Instant::now();
    unsafe { layer.launch(Stream(0), call) }.unwrap();
    assert_eq!(unsafe { layer.check_launch(Stream(0), call) }, absent);
    if device.info().name.starts_with("NVIDIA") {
        assert!(started.elapsed() < limit);
    }
    // What the late rank finds is the first call; of the second it is told nothing.
    let (late, call) = (&group.layers[1], &group.operands[1].call);
    unsafe { late.launch(Stream(0), call) }.unwrap();
    assert_eq!(unsafe { late.check_launch(Stream(0), call) }, Err(Error::Absent { rank: 0, waited: limit }));
}

#[test]
fn ranks_that_call_with_other_capacities_are_told() {
    let Some(device) = hopper() else { return };
    let (mut group, ..) = two_ranks(device, Combine::Rows, 4, LIMIT);
    group.operands[1].call.capacity = 3;
    group.operands[1].call.tokens = 3;
    launch(Stream(0), &group.pairs()).unwrap();
    let told = |rank, actual: &str, expected: &str| {
        let (actual, expected) = (actual.to_owned(), expected.to_owned());
        Err(Error::Disagreement { argument: "capacity", rank, actual, expected })
    };
    assert_eq!(group.check(), [told(1, "3", "4"), told(0, "4", "3")]);
}

#[test]
fn what_does_not_fit_is_refused_before_anything_is_queued() {
    let Some(device) = hopper() else { return };
    let (group, ..) = two_ranks(device, Combine::Rows, 4, LIMIT);
    let (layer, call) = (&group.layers[0], group.operands[0].call);
    let refuse = |call: ExpertParallelCall, start: &str| {
        let error = unsafe { layer.launch(Stream(0), &call) }.unwrap_err().to_string();
        assert!(error.starts_with(start), "{error}");
    };
    refuse(ExpertParallelCall { capacity: 5, ..call }, "tokens is 5, expected at most 4");
    refuse(ExpertParallelCall { capacity: 0, tokens: 0, ..call }, "capacity is 0");
    refuse(
        ExpertParallelCall { tokens: 4, capacity: 3, ..call },
        "tokens is 4, expected at most 3, the call's capacity",
    );
    refuse(ExpertParallelCall { output: nowhere(), ..call }, "output is 0");
    refuse(ExpertParallelCall { workspace: nowhere(), ..call }, "workspace is 0");
    refuse(ExpertParallelCall { state: nowhere(), ..call }, "state is 0");
    let mut odd = call;
    odd.hidden_states.row_stride += 1;
    refuse(odd, "hidden_states has strides");
    let choice = layer.choice(4).unwrap();
    assert!(choice.to_string().contains("2 ranks of up to 4 tokens; dispatch gather"), "{choice}");
    // Dispatch, what the layer launches but unpermute, two of combine.
    assert_eq!(choice.launches, 3 + choice.layer.launches - 1);
}

#[test]
fn ranks_that_do_not_fit_each_other_are_refused_when_they_are_prepared() {
    let Some(device) = hopper() else { return };
    let model = Model::new(BASE);
    // One expert too few on every rank: weights of another placement.
    let parallel = ParallelConfig::new(Placement::linear(BASE.experts, 2).unwrap());
    let other = Model::new(Spec { experts: BASE.experts + 2, ..BASE });
    for result in prepare(device, &other, &parallel, 4, LIMIT) {
        let error = result.unwrap_err();
        assert!(matches!(&error, Error::OnRank { rank: 0, message } if message.starts_with("global_experts is 14")));
    }
    for result in prepare(device, &model, &parallel, 0, LIMIT) {
        assert!(
            matches!(result.unwrap_err(), Error::OnRank { rank: 0, message } if message.starts_with("capacity is 0"))
        );
    }
}
