//! Sizes: the reference's, the tight bound and the exact sum, against the oracle's formulas and brute force.

use crate::routings::{config, routings};
use expertile::plan::{
    compute_aligned_m, compute_aligned_m_and_alignment, expert_num_tokens_round_up_and_sum, round_up, tight_m_sum,
};
use expertile::{AlignmentRule, Arch, Error, Layout, Plan, TokenExperts};
use expertile_oracle::plan as oracle;
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;

const ARCHS: [(Arch, u32); 3] = [(Arch::Sm90, 90), (Arch::Sm100, 100), (Arch::Sm120, 120)];
const RULES: [(AlignmentRule, oracle::Rule); 3] = [
    (AlignmentRule::DeepGemm202606, oracle::Rule::DeepGemm202606),
    (AlignmentRule::VllmFork, oracle::Rule::VllmFork),
    (AlignmentRule::DeepGemm28, oracle::Rule::DeepGemm28),
];

/// Integers of every length up to `bits`, zero included.
fn integers(bits: u32) -> impl Strategy<Value = usize> {
    (any::<u64>(), 0..=bits).prop_map(|(random, bits)| random.checked_shr(64 - bits).unwrap_or(0) as usize)
}

#[test]
fn the_tight_bound_is_the_maximum_over_all_routings() {
    let mut cases = 0;
    for tokens in 0..=4 {
        for topk in 1..=3 {
            for experts in 1..=4 {
                for alignment in 1..=5 {
                    for (kind, distinct) in [(TokenExperts::Distinct, true), (TokenExperts::MayRepeat, false)] {
                        let expected = oracle::largest_m_sum(tokens, topk, experts, alignment, distinct);
                        let actual = tight_m_sum(tokens, topk, experts, alignment, kind).unwrap();
                        assert_eq!(actual, expected, "M {tokens}, topk {topk}, E {experts}, A {alignment}, {kind:?}");
                        cases += 1;
                    }
                }
            }
        }
    }
    // A few that reach several tiles per expert.
    for (tokens, topk, experts, alignment) in [(9, 2, 3, 2), (8, 3, 4, 3), (13, 1, 3, 4), (7, 2, 5, 3), (10, 2, 2, 3)] {
        let expected = oracle::largest_m_sum(tokens, topk, experts, alignment, true);
        assert_eq!(tight_m_sum(tokens, topk, experts, alignment, TokenExperts::Distinct).unwrap(), expected);
        let expected = oracle::largest_m_sum(tokens, topk, experts, alignment, false);
        assert_eq!(tight_m_sum(tokens, topk, experts, alignment, TokenExperts::MayRepeat).unwrap(), expected);
        cases += 2;
    }
    assert_eq!(cases, 610);
}

#[test]
fn every_rule_picks_the_oracles_tile() {
    for (arch, number) in ARCHS {
        for (rule, oracle_rule) in RULES {
            for groups in [1, 2, 7, 256] {
                for rows in (0..300).chain([16384, 16385, usize::MAX]) {
                    let expected = oracle::theoretical(oracle_rule, number, Some(rows as u128), groups as u128);
                    let actual = rule.theoretical(arch, Some(rows), Some(groups)).unwrap();
                    assert_eq!(actual as u128, expected, "{rule} {arch:?} {rows} rows, {groups} groups");
                }
                let expected = oracle::theoretical(oracle_rule, number, None, groups as u128);
                assert_eq!(rule.theoretical(arch, None, Some(groups)).unwrap() as u128, expected);
            }
        }
    }
}

proptest! {
    #![proptest_config(config(3000))]

    #[test]
    fn the_reference_sizing_is_the_oracles_or_an_overflow(
        m in integers(64),
        topk in integers(16),
        experts in integers(31),
        alignment in integers(64),
        rule in prop::option::of((select(&RULES[..]), select(&ARCHS[..]))),
    ) {
        let (topk, experts, alignment) = (topk.max(1), experts.max(1), alignment.max(1));
        let ours = rule.map(|((rule, _), (arch, _))| (rule, arch));
        let theirs = rule.map(|((_, rule), (_, arch))| (rule, arch));
        let (m_sum, used) = oracle::reference_m_sum(m, topk, experts, alignment, theirs);
        let actual = compute_aligned_m_and_alignment(m, topk, experts, alignment, ours, None);
        let first = compute_aligned_m(m, topk, experts, alignment, ours, None);
        if m_sum <= usize::MAX as u128 {
            prop_assert_eq!(actual, Ok((m_sum as usize, used as usize)));
            prop_assert_eq!(first, Ok(m_sum as usize));
        } else {
            prop_assert!(matches!(actual, Err(Error::Overflow { .. })), "{:?}, expected {}", actual, m_sum);
            prop_assert!(matches!(first, Err(Error::Overflow { .. })), "{:?}", first);
        }
    }

    #[test]
    fn the_tight_bound_is_never_above_the_reference(
        m in integers(30),
        topk in 1..=64usize,
        experts in 1..=2048usize,
        alignment in integers(12),
    ) {
        let alignment = alignment.max(1);
        let (reference, _) = oracle::reference_m_sum(m, topk, experts, alignment, None);
        for kind in [TokenExperts::Distinct, TokenExperts::MayRepeat] {
            let tight = tight_m_sum(m, topk, experts, alignment, kind).unwrap();
            prop_assert!(tight as u128 <= reference, "{:?}: {} > {}", kind, tight, reference);
            prop_assert_eq!(tight % alignment, 0);
        }
    }

    #[test]
    fn the_exact_sum_is_the_oracles(counts in vec(0..5000i32, 1..40), alignment in integers(10)) {
        let alignment = alignment.max(1);
        let expected = oracle::exact_m_sum(&counts, alignment);
        prop_assert_eq!(expert_num_tokens_round_up_and_sum(&counts, alignment), Ok(expected));
        let with_counts = compute_aligned_m_and_alignment(
            9, 8, counts.len(), alignment, Some((AlignmentRule::DeepGemm202606, Arch::Sm100)), Some(&counts),
        );
        prop_assert_eq!(with_counts, Ok((expected, alignment)));
        prop_assert_eq!(Plan::exact(1, 1, &counts, alignment).unwrap().m_sum(), expected);
    }

    #[test]
    fn rounding_up_is_the_oracles_or_an_overflow(rows in integers(64), alignment in integers(64)) {
        let alignment = alignment.max(1);
        let expected = oracle::round_up(rows as u128, alignment as u128);
        match round_up(rows, alignment) {
            Ok(actual) => prop_assert_eq!(actual as u128, expected),
            Err(error) => {
                prop_assert!(matches!(error, Error::Overflow { .. }), "{}", error);
                prop_assert!(expected > usize::MAX as u128);
            }
        }
    }

    #[test]
    fn every_routing_fits_every_bound(case in routings()) {
        let needed = oracle::exact_m_sum(&case.counts(), case.alignment);
        let (tokens, topk, experts, alignment) = (case.tokens(), case.topk, case.local_experts, case.alignment);
        let tight = Plan::tight(tokens, topk, experts, alignment, TokenExperts::MayRepeat).unwrap();
        let reference = Plan::reference(tokens, topk, experts, alignment, None).unwrap();
        for plan in [tight, reference, Plan::exact(tokens, topk, &case.counts(), alignment).unwrap()] {
            prop_assert!(plan.m_sum() >= needed);
            let mut space = vec![0; Layout::space_len(&plan).unwrap()];
            prop_assert!(Layout::build(&plan, &case.routing(), &mut space).is_ok());
        }
    }
}
