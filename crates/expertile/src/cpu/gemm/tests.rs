use super::*;
use crate::cpu::Isa;
use crate::quantize::{ScaleLayout, ScaleRounding};
use proptest::prelude::*;
use std::sync::Arc;

/// A reproducible stream of numbers.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        self.0 >> 33
    }

    /// In -1..1.
    fn float(&mut self) -> f32 {
        (self.next() as f32 / (1u64 << 30) as f32) - 1.0
    }

    fn bf16s(&mut self, len: usize) -> Vec<bf16> {
        (0..len).map(|_| bf16::from_f32(self.float())).collect()
    }

    /// Every finite byte, subnormals included.
    fn e4m3s(&mut self, len: usize) -> Vec<E4m3> {
        (0..len).map(|_| E4m3(self.next() as u8)).map(|x| if x.is_nan() { E4m3(3) } else { x }).collect()
    }

    fn scales(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| (0.6 + 0.5 * self.float()) / 100.0).collect()
    }
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Formats {
    Bf16,
    E4m3Weights,
    E4m3,
}

/// One GEMM, its inputs and its exact result.
struct Case {
    formats: Formats,
    counts: Vec<usize>,
    alignment: usize,
    n: usize,
    k: usize,
    rows: Vec<bf16>,
    byte_rows: Vec<E4m3>,
    row_scales: Vec<f32>,
    weights: Vec<bf16>,
    byte_weights: Vec<E4m3>,
    weight_scales: Vec<f32>,
}

const POISON: bf16 = bf16::from_bits(0x4abc);

impl Case {
    fn new(formats: Formats, counts: &[usize], alignment: usize, n: usize, k: usize, seed: u64) -> Self {
        let mut numbers = Numbers(seed);
        let m_sum: usize = counts.iter().map(|count| count.next_multiple_of(alignment)).sum();
        let e = counts.len();
        let (row_blocks, blocks) = (n.div_ceil(128), k.div_ceil(128));
        Self {
            formats,
            counts: counts.to_vec(),
            alignment,
            n,
            k,
            rows: numbers.bf16s(m_sum * k),
            byte_rows: numbers.e4m3s(m_sum * k),
            row_scales: numbers.scales(m_sum * blocks),
            weights: numbers.bf16s(e * n * k),
            byte_weights: numbers.e4m3s(e * n * k),
            weight_scales: numbers.scales(e * row_blocks * blocks),
        }
    }

    fn m_sum(&self) -> usize {
        self.counts.iter().map(|count| count.next_multiple_of(self.alignment)).sum()
    }

    fn activations(&self) -> Activations<'_> {
        match self.formats {
            Formats::E4m3 => Activations::E4m3 {
                rows: &self.byte_rows,
                scales: Scales::F32(&self.row_scales),
                format: ScaleFormat::new(Group::G128, ScaleLayout::RowMajor, ScaleRounding::Exact).unwrap(),
            },
            _ => Activations::Bf16(&self.rows),
        }
    }

    fn pack(&self, cpu: &Cpu) -> PackedWeights {
        let e = self.counts.len();
        match self.formats {
            Formats::Bf16 => PackedWeights::pack_bf16(cpu, &self.weights, e, self.n, self.k),
            _ => PackedWeights::pack_e4m3(cpu, &self.byte_weights, &self.weight_scales, e, self.n, self.k),
        }
        .unwrap()
    }

    fn with_layout<R>(&self, run: impl FnOnce(&Layout<'_>) -> R) -> R {
        let mut psum = Vec::new();
        let mut start = 0;
        for count in &self.counts {
            psum.push((start + count) as i32);
            start += count.next_multiple_of(self.alignment);
        }
        let mut space = vec![0; 3 * psum.len() + start];
        run(&Layout::from_psum(&psum, self.alignment, start, &mut space).unwrap())
    }

    fn run(&self, cpu: &Cpu) -> Vec<bf16> {
        self.with_layout(|layout| {
            let weights = self.pack(cpu);
            let activations = self.activations();
            let bytes = grouped_gemm_workspace_bytes(layout.live_rows(), self.k, activations.format()).unwrap();
            let mut workspace = vec![0xa5; bytes];
            let mut out = vec![POISON; layout.m_sum() * self.n];
            grouped_gemm(cpu, layout, activations, &weights, &mut workspace, &mut out).unwrap();
            out
        })
    }

    fn activation(&self, row: usize, k: usize) -> f64 {
        match self.formats {
            Formats::E4m3 => {
                let scale = self.row_scales[row * self.k.div_ceil(128) + k / 128];
                f64::from(self.byte_rows[row * self.k + k].to_f32()) * f64::from(scale)
            }
            _ => self.rows[row * self.k + k].to_f64(),
        }
    }

    fn weight(&self, expert: usize, n: usize, k: usize) -> f64 {
        let at = (expert * self.n + n) * self.k + k;
        match self.formats {
            Formats::Bf16 => self.weights[at].to_f64(),
            _ => {
                let block = (expert * self.n.div_ceil(128) + n / 128) * self.k.div_ceil(128) + k / 128;
                f64::from(self.byte_weights[at].to_f32()) * f64::from(self.weight_scales[block])
            }
        }
    }

    /// Compares with a plain sum in f64: bf16's rounding, and f32's while summing, are allowed.
    fn check(&self, out: &[bf16]) {
        assert_eq!(out.len(), self.m_sum() * self.n);
        let mut start = 0;
        for (expert, &count) in self.counts.iter().enumerate() {
            for row in start..start + count {
                for n in 0..self.n {
                    let terms = (0..self.k).map(|k| self.activation(row, k) * self.weight(expert, n, k));
                    let (sum, magnitude) = terms.fold((0.0, 0.0), |(sum, all), term| (sum + term, all + term.abs()));
                    let actual = out[row * self.n + n].to_f64();
                    let tolerance = sum.abs() / 256.0 + 1e-6 * magnitude;
                    assert!(
                        (actual - sum).abs() <= tolerance || (actual.is_nan() && sum.is_nan()),
                        "{:?} expert {expert} row {row} column {n}: {actual}, expected {sum} within {tolerance}",
                        self.formats
                    );
                }
            }
            let padded = start + count.next_multiple_of(self.alignment);
            let padding = &out[(start + count) * self.n..padded * self.n];
            assert!(padding.iter().all(|x| x.to_bits() == POISON.to_bits()), "padding of expert {expert} was written");
            start = padded;
        }
    }
}

fn formats() -> impl Strategy<Value = Formats> {
    prop_oneof![Just(Formats::Bf16), Just(Formats::E4m3Weights), Just(Formats::E4m3)]
}

fn pool(threads: usize) -> Arc<rayon::ThreadPool> {
    Arc::new(rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: if cfg!(miri) { 2 } else { 64 }, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_product_is_that_of_a_plain_loop_on_every_instruction_set(
        formats in formats(),
        counts in prop::collection::vec(prop_oneof![Just(0usize), 1..14usize, 14..120usize], 1..5),
        alignment in prop_oneof![Just(1usize), Just(8), Just(128)],
        n in prop_oneof![Just(1usize), Just(7), Just(33), Just(130), Just(255), Just(300), Just(64)],
        k in prop_oneof![Just(1usize), Just(7), Just(33), Just(130), Just(255), Just(300), Just(256)],
        seed in any::<u64>(),
    ) {
        let (n, k) = if cfg!(miri) { (n.min(33), k.min(9)) } else { (n, k) };
        let counts: Vec<_> = counts.iter().map(|&count| if cfg!(miri) { count.min(14) } else { count }).collect();
        let k = if formats == Formats::E4m3 { k.next_multiple_of(128) } else { k };
        let case = Case::new(formats, &counts, alignment, n, k, seed);
        for isa in Isa::available() {
            case.check(&case.run(&Cpu::with_isa(isa)));
        }
    }
}

#[test]
#[cfg_attr(miri, ignore = "slow there, and nothing that the property does not run")]
fn all_rows_on_one_expert_and_every_tile_size() {
    for formats in [Formats::Bf16, Formats::E4m3Weights, Formats::E4m3] {
        for count in (1..=40).chain([95, 96, 97, 200]) {
            let case = Case::new(formats, &[0, count, 0], 16, 40, 256, count as u64);
            for isa in Isa::available() {
                case.check(&case.run(&Cpu::with_isa(isa)));
            }
        }
    }
}

#[test]
fn the_number_of_threads_does_not_change_a_bit() {
    let (counts, n, k): (&[usize], usize, usize) =
        if cfg!(miri) { (&[1, 0, 13], 40, 6) } else { (&[1, 0, 150, 7, 30], 200, 384) };
    for formats in [Formats::Bf16, Formats::E4m3Weights, Formats::E4m3] {
        let k = if formats == Formats::E4m3 { k.next_multiple_of(128) } else { k };
        let case = Case::new(formats, counts, 8, n, k, 5);
        for isa in Isa::available() {
            let [one, two, five] = [1, 2, 5].map(|threads| case.run(&Cpu::with_isa(isa).in_pool(pool(threads))));
            let same = |other: &[bf16]| one.iter().zip(other).all(|(a, b)| a.to_bits() == b.to_bits());
            assert!(same(&two) && same(&five), "{isa}");
        }
    }
}
