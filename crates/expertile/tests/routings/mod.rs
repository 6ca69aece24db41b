//! Every kind of routing, and the layouts they have: for the properties of `contract`, and for the kernels' tests.
// Each test program takes its share.
#![allow(dead_code)]

use expertile::{Layout, MatrixRef, Plan, Routing};
use expertile_oracle as oracle;
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;
use proptest::test_runner::RngSeed;

/// `cases` cases from a fixed seed, unless the environment says otherwise.
pub(crate) fn config(cases: u32) -> ProptestConfig {
    let default = ProptestConfig::default();
    ProptestConfig {
        cases: if std::env::var_os("PROPTEST_CASES").is_some() { default.cases } else { cases },
        rng_seed: match default.rng_seed {
            RngSeed::Random => RngSeed::Fixed(2026),
            given => given,
        },
        failure_persistence: None,
        ..default
    }
}

/// A routing and the alignment it is laid out with. `ids` are global if there is a map.
#[derive(Debug, Clone)]
pub(crate) struct RoutingCase {
    pub(crate) topk: usize,
    pub(crate) local_experts: usize,
    pub(crate) alignment: usize,
    pub(crate) ids: Vec<i64>,
    pub(crate) expert_map: Option<Vec<i32>>,
    /// Aligned tiles that the buffer has beyond what the routing needs.
    pub(crate) slack: usize,
}

impl RoutingCase {
    pub(crate) fn tokens(&self) -> usize {
        self.ids.len() / self.topk
    }

    pub(crate) fn counts(&self) -> Vec<i32> {
        let mut counts = vec![0; self.local_experts];
        for &id in &self.ids {
            if let Some(expert) = oracle::layout::local_expert(id, self.expert_map.as_deref()) {
                counts[expert] += 1;
            }
        }
        counts
    }

    pub(crate) fn m_sum(&self) -> usize {
        oracle::plan::exact_m_sum(&self.counts(), self.alignment) + self.slack * self.alignment
    }

    pub(crate) fn plan(&self) -> Plan {
        Plan::with_m_sum(self.tokens(), self.topk, self.local_experts, self.alignment, self.m_sum()).unwrap()
    }

    pub(crate) fn routing(&self) -> Routing<'_> {
        let ids = MatrixRef::new(&self.ids, self.tokens(), self.topk).unwrap();
        Routing::new(ids, self.local_experts, self.expert_map.as_deref()).unwrap()
    }

    pub(crate) fn oracle_layout(&self) -> oracle::layout::Layout {
        let map = self.expert_map.as_deref();
        oracle::layout::layout(&self.ids, map, self.local_experts, self.alignment, self.m_sum())
    }

    /// Calls `check` with the layout under test and the oracle's.
    pub(crate) fn with_layout(
        &self,
        check: impl FnOnce(&Layout<'_>, &oracle::layout::Layout) -> Result<(), TestCaseError>,
    ) -> Result<(), TestCaseError> {
        let plan = self.plan();
        let mut space = vec![0x7777; Layout::space_len(&plan).unwrap()];
        let layout = Layout::build(&plan, &self.routing(), &mut space).unwrap();
        check(&layout, &self.oracle_layout())
    }
}

/// Every kind of routing, half of them through an expert map.
pub(crate) fn routings() -> impl Strategy<Value = RoutingCase> {
    prop_oneof![
        4 => scattered(0..=40, prop_oneof![6 => 1..=12usize, 1 => Just(1024)]),
        1 => crowded(),
        1 => nobody(),
        3 => counted(),
        1 => everyone(),
    ]
    .prop_flat_map(|case| prop_oneof![Just(case.clone()), mapped(case)])
}

/// Routings whose topk is 1, as router weights on the input ask for.
pub(crate) fn routings_of_one_slot() -> impl Strategy<Value = RoutingCase> {
    counted().prop_flat_map(|case| prop_oneof![Just(case.clone()), mapped(case)])
}

pub(crate) fn alignments() -> impl Strategy<Value = usize> {
    select(&[1, 2, 3, 4, 7, 8, 16, 32, 64, 128, 224, 240, 256][..])
}

/// Any id below `experts`, repeated or not, and empty slots of two sorts.
fn scattered(
    tokens: std::ops::RangeInclusive<usize>,
    experts: impl Strategy<Value = usize>,
) -> impl Strategy<Value = RoutingCase> {
    (tokens, 1..=8usize, experts, alignments(), 0..3usize).prop_flat_map(
        |(tokens, topk, local_experts, alignment, slack)| {
            let id = prop_oneof![8 => 0..local_experts as i64, 1 => Just(-1), 1 => Just(i64::MIN)];
            vec(id, tokens * topk).prop_map(move |ids| RoutingCase {
                topk,
                local_experts,
                alignment,
                ids,
                expert_map: None,
                slack,
            })
        },
    )
}

/// All tokens on one expert.
fn crowded() -> impl Strategy<Value = RoutingCase> {
    (1..=200usize, 1..=3usize, 1..=9usize, any::<prop::sample::Index>(), alignments()).prop_map(
        |(tokens, topk, local_experts, expert, alignment)| RoutingCase {
            topk,
            local_experts,
            alignment,
            ids: vec![expert.index(local_experts) as i64; tokens * topk],
            expert_map: None,
            slack: 0,
        },
    )
}

/// All slots empty, or no tokens at all.
fn nobody() -> impl Strategy<Value = RoutingCase> {
    (0..=9usize, 1..=4usize, 1..=9usize, alignments(), 0..2usize).prop_map(
        |(tokens, topk, local_experts, alignment, slack)| RoutingCase {
            topk,
            local_experts,
            alignment,
            ids: vec![-1; tokens * topk],
            expert_map: None,
            slack,
        },
    )
}

/// Counts just beside the multiples of the alignment: `n_e % A` in {0, 1, A - 1}, some experts empty. `topk` is 1.
fn counted() -> impl Strategy<Value = RoutingCase> {
    (select(&[1, 2, 3, 8, 16, 32][..]), 1..=6usize, 0..2usize)
        .prop_flat_map(|(alignment, local_experts, slack)| {
            let count = select(vec![0, 0, 1, alignment - 1, alignment, alignment + 1, 2 * alignment]);
            (vec(count, local_experts), Just((alignment, slack)))
        })
        .prop_flat_map(|(counts, rest)| {
            let ids: Vec<i64> =
                counts.iter().enumerate().flat_map(|(expert, &count)| vec![expert as i64; count]).collect();
            (Just(ids).prop_shuffle(), Just((counts.len(), rest)))
        })
        .prop_map(|(ids, (local_experts, (alignment, slack)))| RoutingCase {
            topk: 1,
            local_experts,
            alignment,
            ids,
            expert_map: None,
            slack,
        })
}

/// `topk = E`: every token on every expert, in an order of its own.
fn everyone() -> impl Strategy<Value = RoutingCase> {
    (0..=12usize, select(&[1, 5, 64][..]), alignments()).prop_flat_map(|(tokens, experts, alignment)| {
        let order = Just((0..experts as i64).collect::<Vec<_>>()).prop_shuffle();
        vec(order, tokens).prop_map(move |orders| RoutingCase {
            topk: experts,
            local_experts: experts,
            alignment,
            ids: orders.concat(),
            expert_map: None,
            slack: 0,
        })
    })
}

/// The same routing through a map over more experts than are local; some empty slots become non-local ids.
fn mapped(case: RoutingCase) -> impl Strategy<Value = RoutingCase> {
    let local = (0..case.local_experts as i32).collect::<Vec<_>>();
    (vec(select(&[-1, -1, i32::MIN][..]), 1..=5), any::<prop::sample::Index>())
        .prop_flat_map(move |(elsewhere, pick)| {
            let map = [local.clone(), elsewhere].concat();
            (Just(map).prop_shuffle(), Just(pick))
        })
        .prop_map(move |(map, pick)| {
            let remote: Vec<i64> = (0..map.len()).filter(|&id| map[id] < 0).map(|id| id as i64).collect();
            let global = |local: i64| match local {
                -1 => remote[pick.index(remote.len())],
                empty if empty < 0 => empty,
                local => map.iter().position(|&entry| i64::from(entry) == local).expect("every local expert") as i64,
            };
            RoutingCase { ids: case.ids.iter().map(|&id| global(id)).collect(), expert_map: Some(map), ..case.clone() }
        })
}
