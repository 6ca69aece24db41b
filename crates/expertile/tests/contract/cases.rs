//! What the properties are tested on: routings, numbers, strides, machines.

use expertile::cpu::{Cpu, Isa};
use expertile::{Float, Layout, MatrixRef, Plan, Routing};
use expertile_oracle as oracle;
use half::{bf16, f16};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;
use proptest::test_runner::RngSeed;
use std::sync::{Arc, LazyLock};

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

/// Every instruction set this CPU has, on 1, 2 and 5 threads.
pub(crate) fn machines() -> impl Iterator<Item = Cpu> {
    static POOLS: LazyLock<Vec<Arc<rayon::ThreadPool>>> = LazyLock::new(|| {
        let pool = |threads| rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        [1, 2, 5].into_iter().map(|threads| Arc::new(pool(threads))).collect()
    });
    Isa::available().into_iter().flat_map(|isa| POOLS.iter().map(move |pool| Cpu::with_isa(isa).in_pool(pool.clone())))
}

/// A number type, converted by `half` and not by the code under test.
pub(crate) trait Number: Float + std::fmt::Debug {
    fn exact(self) -> f32;
    fn nearest(x: f32) -> Self;
    /// Its bits, all NaNs made one: which NaN comes out of a sum is not part of any contract.
    fn bits(self) -> u32;
}

impl Number for f32 {
    fn exact(self) -> f32 {
        self
    }
    fn nearest(x: f32) -> Self {
        x
    }
    fn bits(self) -> u32 {
        if self.is_nan() { u32::MAX } else { self.to_bits() }
    }
}

impl Number for bf16 {
    fn exact(self) -> f32 {
        bf16::to_f32(self)
    }
    fn nearest(x: f32) -> Self {
        bf16::from_f32(x)
    }
    fn bits(self) -> u32 {
        if self.is_nan() { u32::MAX } else { u32::from(self.to_bits()) }
    }
}

impl Number for f16 {
    fn exact(self) -> f32 {
        f16::to_f32(self)
    }
    fn nearest(x: f32) -> Self {
        f16::from_f32(x)
    }
    fn bits(self) -> u32 {
        if self.is_nan() { u32::MAX } else { u32::from(self.to_bits()) }
    }
}

pub(crate) fn bits<T: Number>(values: &[T]) -> Vec<u32> {
    values.iter().map(|&value| value.bits()).collect()
}

pub(crate) fn exact<T: Number>(values: &[T]) -> Vec<f32> {
    values.iter().map(|&value| value.exact()).collect()
}

/// A small generator (SplitMix64): rows are too long to be worth shrinking value by value.
pub(crate) struct Noise(pub(crate) u64);

impl Noise {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Evenly between -1 and 1.
    pub(crate) fn unit(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u32 << 23) as f32 - 1.0
    }

    /// Roughly normal, standard deviation 1.
    pub(crate) fn normal(&mut self) -> f32 {
        (0..12).map(|_| self.unit()).sum::<f32>() / 2.0
    }
}

/// What rows are filled with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fill {
    /// Normal numbers whose size differs from run to run of 32.
    Ordinary,
    /// Among them NaN, infinities, zeros of both signs, subnormals and the largest numbers.
    Special,
    /// Any bits.
    Bits,
    /// Zeros.
    Zeros,
}

pub(crate) fn fills() -> impl Strategy<Value = Fill> {
    prop_oneof![
        3 => Just(Fill::Ordinary),
        2 => Just(Fill::Special),
        1 => Just(Fill::Bits),
        1 => Just(Fill::Zeros)
    ]
}

pub(crate) fn numbers<T: Number>(len: usize, fill: Fill, seed: u64) -> Vec<T> {
    const SPECIAL: [f32; 12] = [
        f32::NAN,
        -f32::NAN,
        f32::INFINITY,
        f32::NEG_INFINITY,
        0.0,
        -0.0,
        1e-45,
        -1e-40,
        6e-8,
        f32::MAX,
        65504.0,
        1e30,
    ];
    let mut noise = Noise(seed);
    let mut size = 1.0;
    (0..len)
        .map(|i| {
            if i % 32 == 0 {
                size = 2f32.powi((noise.next() % 24) as i32 - 12);
            }
            T::nearest(match fill {
                Fill::Zeros => 0.0,
                Fill::Bits => f32::from_bits(noise.next() as u32),
                Fill::Special if noise.next().is_multiple_of(40) => SPECIAL[noise.next() as usize % SPECIAL.len()],
                _ => size * noise.normal(),
            })
        })
        .collect()
}

/// How a matrix lies in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Strides {
    Contiguous,
    GapsBetweenRows,
    ColumnMajor,
    GapsEverywhere,
}

pub(crate) fn strides() -> impl Strategy<Value = Strides> {
    use Strides::{ColumnMajor, Contiguous, GapsBetweenRows, GapsEverywhere};
    select(&[Contiguous, GapsBetweenRows, ColumnMajor, GapsEverywhere][..])
}

/// A matrix that owns its memory: `values` where its strides put them, `poison` in between.
pub(crate) struct Strided<T> {
    data: Vec<T>,
    shape: [usize; 2],
    strides: [usize; 2],
}

impl<T: Copy> Strided<T> {
    pub(crate) fn new(values: &[T], rows: usize, cols: usize, strides: Strides, poison: T) -> Self {
        assert_eq!(values.len(), rows * cols);
        let strides = match strides {
            Strides::Contiguous => [cols, 1],
            Strides::GapsBetweenRows => [cols + 3, 1],
            Strides::ColumnMajor => [1, rows],
            Strides::GapsEverywhere => [2 * cols + 5, 2],
        };
        let len = if values.is_empty() { 0 } else { (rows - 1) * strides[0] + (cols - 1) * strides[1] + 1 };
        let mut data = vec![poison; len];
        for row in 0..rows {
            for col in 0..cols {
                data[row * strides[0] + col * strides[1]] = values[row * cols + col];
            }
        }
        Self { data, shape: [rows, cols], strides }
    }

    pub(crate) fn matrix(&self) -> MatrixRef<'_, T> {
        MatrixRef::with_strides(&self.data, self.shape[0], self.shape[1], self.strides[0], self.strides[1]).unwrap()
    }
}
