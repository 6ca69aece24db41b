//! Ranks over NCCL: in the emulator, whose NCCL lets several of them share the device. NCCL itself takes one rank a GPU,
//! so that a GPU by itself runs one rank.

use super::model::{BASE, Model, Operands, Spec, Tokens, on_one_rank, on_ranks, prepare_rank};
use super::on_device::{emulator, hopper, is_emulated};
use super::{LIMIT, as_f64, check_output, counts, placements};
use expertile::cuda::{Device, Graph, Link, Nccl, Stream};
use expertile::exchange::Exchange;
use expertile::{ActivationFormat, Combine, Dispatch, Dtype, Error, ParallelConfig, Placement, Result, WeightFormat};
use expertile_testkit::{Pattern, Random};
use std::sync::Arc;

/// NCCL between the ranks, with windows or without; none where there is no library.
fn join(device: &Device, exchange: &dyn Exchange, windows: bool) -> Option<Link> {
    match Nccl::join(device, exchange, LIMIT) {
        Ok(nccl) => Some(Link::Nccl(Arc::new(if windows { nccl.with_windows() } else { nccl }))),
        Err(error) => {
            assert!(!is_emulated(device), "{error}");
            eprintln!("skipped: {error}");
            None
        }
    }
}

/// Two calls of every rank, which brings the next `counts[rank]` of the tokens; their outputs, one behind the other.
fn call(
    device: &Device,
    model: &Model,
    parallel: &ParallelConfig,
    tokens: &Tokens,
    (counts, capacity): (&[usize], usize),
) -> Option<Vec<u8>> {
    let outputs = on_ranks(counts.len(), |exchange| {
        // Windows with the one combine, none with the other.
        let (rank, link) = (exchange.rank(), join(device, &*exchange, parallel.combine == Combine::Rows)?);
        let layer = prepare_rank(device, model, parallel, capacity + 1, exchange.clone(), link).unwrap();
        let choice = layer.choice(capacity).unwrap();
        assert_eq!(choice.parallel.dispatch, parallel.dispatch.unwrap_or(Dispatch::Gather));
        let (first, bytes) = (counts[..rank].iter().sum(), layer.workspace_bytes(capacity).unwrap());
        let operands = Operands::new(device, &model.spec, tokens, (first, counts[rank], capacity), bytes);
        let mut outputs = Vec::new();
        for _ in 0..2 {
            operands.poison();
            // Ranks share the emulated device's memory: none poisons its own while another one computes.
            exchange.meet().unwrap();
            unsafe {
                layer.launch(Stream(0), &operands.call).unwrap();
                layer.check_launch(Stream(0), &operands.call).unwrap();
            }
            outputs.push(operands.output(device, &model.spec));
        }
        assert!(outputs[0] == outputs[1], "a second call differs");
        Some(outputs.remove(0))
    });
    outputs.into_iter().collect::<Option<Vec<_>>>().map(|outputs| outputs.concat())
}

fn check_spec(spec: Spec, ranks: &[usize], most: usize, patterns: &[Pattern]) {
    let Some(device) = hopper() else { return };
    let model = Model::new(spec);
    for &ranks in ranks.iter().filter(|&&ranks| ranks == 1 || is_emulated(device)) {
        for (case, placement) in placements(spec.experts, ranks).into_iter().enumerate() {
            for (dispatch, combine) in Dispatch::ALL.into_iter().flat_map(|d| Combine::ALL.map(|c| (d, c))) {
                let counts =
                    counts(ranks, most).swap_remove(if dispatch == Dispatch::Gather { case } else { 3 - case });
                let pattern = patterns[case % patterns.len()];
                let parallel = ParallelConfig { dispatch: Some(dispatch), combine, placement: placement.clone() };
                let all = counts.iter().sum();
                let ids = pattern.ids(&mut Random::new(ranks as u64), [all, spec.topk], spec.experts, 1);
                let tokens = Tokens::new(&spec, ids, case as u64);
                let capacity = counts.iter().max().unwrap() + 1 + case % 2;
                let Some(found) = call(device, &model, &parallel, &tokens, (&counts, capacity)) else { return };
                let expected = if all > 0 { on_one_rank(device, &model, &tokens) } else { Vec::new() };
                let what = format!("{ranks} ranks, {counts:?} of {capacity}, {pattern:?}, {parallel:?}, {spec:?}");
                check_output(&spec, combine, &found, &expected, &what);
            }
        }
    }
}

#[test]
fn over_nccl_e4m3_rows_have_the_bits_of_one_rank() {
    check_spec(BASE, &[1, 3], 9, &[Pattern::Even, Pattern::Skewed, Pattern::One]);
}

#[test]
fn over_nccl_bf16_rows_and_an_f32_result_have_the_bits_of_one_rank() {
    let spec = Spec {
        hidden: 272,
        intermediate: 144,
        weights: WeightFormat::Bf16,
        format: ActivationFormat::Bf16,
        output: Dtype::F32,
        ..BASE
    };
    check_spec(spec, &[2], 6, &[Pattern::Skewed, Pattern::Even]);
}

#[test]
fn over_nccl_more_tokens_than_a_block_counts_at_once_have_the_bits_of_one_rank() {
    let Some(device) = emulator() else { return };
    // Quantized at home, too: more than 8192 slots of all ranks.
    let (spec, counts) = (Spec { hidden: 128, intermediate: 128, topk: 8, ..BASE }, [1030, 1100]);
    let model = Model::new(spec);
    for combine in Combine::ALL {
        let placement = Placement::round_robin(spec.experts, 2).unwrap();
        let parallel = ParallelConfig { combine, dispatch: Some(Dispatch::Routed), placement };
        let ids = Pattern::Skewed.ids(&mut Random::new(3), [counts.iter().sum(), spec.topk], spec.experts, 1);
        let tokens = Tokens::new(&spec, ids, 5);
        let found = call(device, &model, &parallel, &tokens, (&counts, 1101)).unwrap();
        let expected = on_one_rank(device, &model, &tokens);
        assert!(combine == Combine::Sums || found == expected);
        let (found, expected) = (as_f64(&spec, &found), as_f64(&spec, &expected));
        assert!(found.iter().zip(&expected).all(|(a, b)| (a - b).abs() <= 0.01 * (1.0 + b.abs())));
    }
}

#[test]
fn over_nccl_faults_are_the_same_on_every_rank_and_the_next_call_works() {
    let Some(device) = emulator() else { return };
    let model = Model::new(BASE);
    for dispatch in Dispatch::ALL {
        let placement = Placement::linear(BASE.experts, 2).unwrap();
        let parallel = ParallelConfig { dispatch: Some(dispatch), ..ParallelConfig::new(placement) };
        let mut ids = Pattern::Even.ids(&mut Random::new(1), [8, BASE.topk], BASE.experts, 0);
        let good = Tokens::new(&BASE, ids.clone(), 2);
        ids[4 * BASE.topk + 6] = 12;
        let bad = Tokens::new(&BASE, ids, 2);
        let told = on_ranks(2, |exchange| -> Vec<Result<()>> {
            let (rank, link) = (exchange.rank(), join(device, &*exchange, false).unwrap());
            let layer = prepare_rank(device, &model, &parallel, 4, exchange.clone(), link).unwrap();
            let bytes = layer.workspace_bytes(4).unwrap();
            let run = |tokens, capacity: usize| {
                let operands = Operands::new(device, &BASE, tokens, (4 * rank, capacity, capacity), bytes);
                exchange.meet().unwrap();
                unsafe {
                    let launched = layer.launch(Stream(0), &operands.call);
                    launched.and_then(|()| layer.check_launch(Stream(0), &operands.call))
                }
            };
            let mut told = vec![run(&bad, 4), run(&good, 4)];
            // Where the host has read every rank's header, ranks that differ go no further.
            if dispatch == Dispatch::Routed {
                told.push(run(&good, 4 - rank));
                told.push(run(&good, 4));
                let operands = Operands::new(device, &BASE, &good, (4 * rank, 4, 4), bytes);
                let captured = Graph::capture(device, |stream| unsafe { layer.launch(stream, &operands.call) });
                told.push(captured.map(|_| ()));
                told.push(run(&good, 4));
            }
            told
        });
        let message = "topk_ids[1, 2] is 12, expected an id below 12 (or a negative one for an empty slot)".into();
        let told_of_bad: Result<()> = Err(Error::OnRank { rank: 1, message });
        for (rank, told) in told.iter().enumerate() {
            assert_eq!(told[..2], [told_of_bad.clone(), Ok(())], "{dispatch}");
            if dispatch == Dispatch::Routed {
                let (its, own) = (3 + rank, 4 - rank);
                let (actual, expected) = (its.to_string(), own.to_string());
                let other = Error::Disagreement { argument: "capacity", rank: 1 - rank, actual, expected };
                assert_eq!(told[2..4], [Err(other), Ok(())]);
                let refused = told[4].clone().unwrap_err().to_string();
                assert!(refused.contains("routed, over NCCL, in a graph"), "{refused}");
                assert_eq!(told[5], Ok(()));
            }
        }
    }
}
