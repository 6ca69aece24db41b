//! Counts, and the routers against the oracle's.

use crate::cases::{Strided, Strides, strides};
use crate::routings::{config, routings};
use expertile::{Error, GroupWorth, Groups, MatrixRef, Normalization, Router, Routing, Scoring};
use expertile_oracle::routing as oracle;
use proptest::collection::vec;
use proptest::prelude::*;

/// Logits far enough apart that f32 and f64 choose alike, with exact ties among them: multiples of 1/8. Now and then
/// one that is no number, or no end of one.
fn logits(experts: usize, tokens: usize) -> impl Strategy<Value = Vec<f32>> {
    let logit = prop_oneof![
        200 => (-40..=40i32).prop_map(|eighths| eighths as f32 / 8.0),
        1 => Just(f32::NAN),
        1 => Just(f32::INFINITY),
        1 => Just(f32::NEG_INFINITY),
    ];
    vec(logit, experts * tokens)
}

fn close(actual: &[f32], expected: &[f64]) -> bool {
    actual.len() == expected.len()
        && actual.iter().zip(expected).all(|(&actual, &expected)| {
            let actual = f64::from(actual);
            let near = (actual - expected).abs() <= 2e-6 * expected.abs() + 1e-12;
            near || actual == expected || (actual.is_nan() && expected.is_nan())
        })
}

proptest! {
    #![proptest_config(config(1000))]

    #[test]
    fn counts_equal_the_oracles(case in routings()) {
        let mut counts = vec![-7; case.local_experts + 2];
        case.routing().count_expert_num_tokens(&mut counts).unwrap();
        prop_assert_eq!(&counts[..case.local_experts], case.counts());
        prop_assert_eq!(&counts[case.local_experts..], [-7, -7]);
    }

    #[test]
    fn i32_and_strided_ids_mean_the_same_as_i64(case in routings(), strides in strides()) {
        let (tokens, topk) = (case.tokens(), case.topk);
        // The poison between the elements is an id that no routing takes.
        let wide = Strided::new(&case.ids, tokens, topk, strides, i64::MAX);
        let ids: Vec<i32> = case.ids.iter().map(|&id| id.max(i64::from(i32::MIN)) as i32).collect();
        let narrow = Strided::new(&ids, tokens, topk, strides, i32::MAX);
        let map = case.expert_map.as_deref();
        let plain = case.routing();
        let wide = Routing::new(wide.matrix(), case.local_experts, map).unwrap();
        let narrow = Routing::new(narrow.matrix(), case.local_experts, map).unwrap();
        prop_assert_eq!(wide.global_experts(), map.map_or(case.local_experts, <[i32]>::len));
        for token in 0..tokens {
            for slot in 0..topk {
                let expected = expertile_oracle::layout::local_expert(case.ids[token * topk + slot], map);
                for routing in [plain, wide, narrow] {
                    prop_assert_eq!(routing.local_expert(token, slot), expected, "[{}, {}]", token, slot);
                }
            }
        }
    }

    #[test]
    fn routers_equal_the_oracles(
        (groups, topk_groups, topk, logits, bias) in (1..=4usize, 1..=6usize, 0..4usize)
            .prop_flat_map(|(groups, size, tokens)| (Just((groups, size, tokens)), 1..=groups))
            .prop_flat_map(|((groups, size, tokens), topk_groups)| (
                Just(groups),
                Just(topk_groups),
                1..=size * topk_groups,
                logits(groups * size, tokens),
                // A power of two, so that the biased scores tie exactly where the scores do.
                vec(prop_oneof![Just(0.0f32), Just(1.0)], groups * size),
            )),
        (scoring, its_scoring) in prop_oneof![
            Just((Scoring::Softmax, oracle::Scoring::Softmax)),
            Just((Scoring::Sigmoid, oracle::Scoring::Sigmoid)),
            Just((Scoring::SqrtSoftplus, oracle::Scoring::SqrtSoftplus)),
        ],
        biased: (bool, bool),
        worth in prop_oneof![Just(GroupWorth::BestTwo), Just(GroupWorth::Best)],
        (normalization, divisor) in divisors(),
        scaling_factor in prop_oneof![Just(1.0f32), Just(2.5)],
        strides in strides(),
    ) {
        let (experts, tokens) = (bias.len(), logits.len() / bias.len());
        let bias_if = |present: bool| if present { bias.clone() } else { vec![] };
        let router = Router {
            topk,
            scoring,
            logit_bias: bias_if(biased.0),
            correction_bias: bias_if(biased.1),
            groups: Some(Groups { count: groups, topk: topk_groups, worth }),
            normalization,
            scaling_factor,
        };
        let expected = oracle::Router {
            topk,
            scoring: its_scoring,
            logit_bias: &router.logit_bias,
            correction_bias: &router.correction_bias,
            groups: (groups, topk_groups),
            group_best: if worth == GroupWorth::Best { 1 } else { 2 },
            divisor,
            scaling_factor,
        };
        check(&router, &expected, &logits, tokens, experts, strides)?;
    }

    #[test]
    fn a_sparse_mixer_equals_the_oracles(
        (experts, logits) in (2..=16usize, 0..4usize)
            .prop_flat_map(|(experts, tokens)| (Just(experts), vec(-40..=40i32, experts * tokens))),
        jitter in prop_oneof![Just(0.01f32), Just(0.25), Just(1.0)],
        strides in strides(),
    ) {
        // Odd multiples of 1/8: neither zeros, whose relative distance is no number, nor distances at the threshold.
        let logits: Vec<f32> = logits.iter().map(|&x| (2 * x + 1) as f32 / 8.0).collect();
        let tokens = logits.len() / experts;
        let router = Router { scoring: Scoring::SparseMixer { jitter: jitter + 1e-3 }, ..Router::softmax(2, false) };
        let expected = oracle::Router {
            topk: 2,
            scoring: oracle::Scoring::SparseMixer(f64::from(jitter + 1e-3)),
            logit_bias: &[],
            correction_bias: &[],
            groups: (1, 1),
            group_best: 2,
            divisor: None,
            scaling_factor: 1.0,
        };
        check(&router, &expected, &logits, tokens, experts, strides)?;
    }
}

/// What the oracle divides by.
type Divisor = Option<fn(f64) -> f64>;

/// A normalization, and what the oracle divides by for it.
fn divisors() -> impl Strategy<Value = (Normalization, Divisor)> {
    prop_oneof![
        Just((Normalization::None, None)),
        Just((Normalization::Sum, Some((|sum| sum) as fn(f64) -> f64))),
        Just((Normalization::SumPlus(0.5), Some((|sum| sum + 0.5) as fn(f64) -> f64))),
        Just((Normalization::SumAtLeast(0.5), Some((|sum| if sum < 0.5 { 0.5 } else { sum }) as fn(f64) -> f64))),
    ]
}

fn check(
    router: &Router,
    expected: &oracle::Router<'_>,
    logits: &[f32],
    tokens: usize,
    experts: usize,
    strides: Strides,
) -> Result<(), TestCaseError> {
    let (mut ids, mut weights) = (vec![-9; tokens * router.topk], vec![-9.0; tokens * router.topk]);
    let matrix = Strided::new(logits, tokens, experts, strides, f32::NAN);
    router.route(matrix.matrix(), &mut ids, &mut weights).unwrap();
    let (expected_ids, expected_weights) = expected.route(logits, experts);
    prop_assert_eq!(&ids, &expected_ids);
    prop_assert!(close(&weights, &expected_weights), "{:?} {:?}", weights, expected_weights);
    // The same choice, weighed.
    let mut weighed = vec![-9.0; weights.len()];
    router.weigh(matrix.matrix(), &ids, &mut weighed).unwrap();
    prop_assert_eq!(bits(&weighed), bits(&weights));
    Ok(())
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

#[test]
fn empty_slots_weigh_nothing_and_ids_past_the_experts_are_named() {
    let logits = [0.5, -1.0, 2.0, 0.0];
    let matrix = MatrixRef::new(&logits, 1, 4).unwrap();
    let mut weights = [9.0; 3];
    let router = Router { scoring: Scoring::SqrtSoftplus, ..Router::softmax(3, true) };
    router.weigh(matrix, &[1, -7, 2], &mut weights).unwrap();
    let scores = [-1.0f32, 2.0].map(|x| x.exp().ln_1p().sqrt());
    assert_eq!(weights[1], 0.0);
    assert!((weights[0] - scores[0] / (scores[0] + scores[1])).abs() < 1e-6 && weights[0] + weights[2] > 0.999_999);
    let mut untouched = [9.0; 3];
    let error = router.weigh(matrix, &[1, 4, 2], &mut untouched).unwrap_err();
    assert_eq!(error, Error::ExpertId { token: 0, slot: 1, id: 4, limit: 4 });
    assert_eq!(untouched, [9.0; 3]);
    // Nothing overflows on either side.
    let far = [f32::MAX, f32::MIN, 200.0, f32::NAN];
    router.weigh(MatrixRef::new(&far, 1, 4).unwrap(), &[1, 2, 2], &mut weights).unwrap();
    assert_eq!(weights, [0.0, 0.5, 0.5]);
}
