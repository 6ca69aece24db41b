//! The whole operation against a plain loop; the kernels' own tests stand beside them.

use super::*;
use crate::cpu::Isa;
use crate::gemm::WeightFormat;
use crate::int4::Int4Scales;
use crate::matrix::MatrixRef;
use crate::quantize::{ScaleFormat, ScaleLayout, ScaleRounding};
use expertile_testkit::Random;
use half::f16;
use proptest::prelude::*;
use std::sync::Arc;

fn bf16s(random: &mut Random, len: usize) -> Vec<bf16> {
    (0..len).map(|_| bf16::from_f32(random.uniform())).collect()
}

/// Every finite byte, but few zeros and subnormals: lines with and without them take different ways.
fn e4m3s(random: &mut Random, len: usize) -> Vec<E4m3> {
    let byte = |_| match random.draw() as u8 {
        nan @ (0x7f | 0xff) => nan ^ 1,
        small if small & 0x78 == 0 && !random.one_in(256) => small | 0x40,
        byte => byte,
    };
    (0..len).map(byte).map(E4m3).collect()
}

fn scales(random: &mut Random, len: usize) -> Vec<f32> {
    (0..len).map(|_| (0.6 + 0.5 * random.uniform()) / 100.0).collect()
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Formats {
    Bf16,
    E4m3Weights,
    E4m3,
    Mxfp4Weights,
    Mxfp4,
    /// Scales of bf16, rows of bf16.
    Int4Weights,
    /// Scales of f16, rows of e4m3.
    Int4,
}

impl Formats {
    const ALL: [Self; 7] =
        [Self::Bf16, Self::E4m3Weights, Self::E4m3, Self::Mxfp4Weights, Self::Mxfp4, Self::Int4Weights, Self::Int4];

    /// A K that goes with the formats.
    fn round_up(self, k: usize) -> usize {
        match self {
            Self::Bf16 | Self::E4m3Weights => k,
            Self::Mxfp4Weights | Self::Int4Weights => k.next_multiple_of(32),
            Self::E4m3 | Self::Mxfp4 | Self::Int4 => k.next_multiple_of(64),
        }
    }
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
    /// Every nibble, and scales of very different sizes.
    blocks: Vec<u8>,
    block_scales: Vec<u8>,
    /// Of both signs and very different sizes; zero among them, and what is subnormal in f16.
    group_scales: Vec<f32>,
}

const POISON: bf16 = bf16::from_bits(0x4abc);

impl Case {
    fn new(formats: Formats, counts: &[usize], alignment: usize, n: usize, k: usize, seed: u64) -> Self {
        let mut random = Random::new(seed);
        let m_sum: usize = counts.iter().map(|count| count.next_multiple_of(alignment)).sum();
        let e = counts.len();
        let (row_blocks, blocks) = (n.div_ceil(128), k.div_ceil(128));
        Self {
            formats,
            counts: counts.to_vec(),
            alignment,
            n,
            k,
            rows: bf16s(&mut random, m_sum * k),
            byte_rows: e4m3s(&mut random, m_sum * k),
            row_scales: scales(&mut random, m_sum * blocks),
            weights: bf16s(&mut random, e * n * k),
            byte_weights: e4m3s(&mut random, e * n * k),
            weight_scales: scales(&mut random, e * row_blocks * blocks),
            blocks: (0..e * n * k / 2).map(|_| random.draw() as u8).collect(),
            block_scales: (0..e * n * (k / 32)).map(|_| 87 + (random.draw() % 80) as u8).collect(),
            group_scales: (0..e * n * (k / 32))
                .map(|_| random.uniform() * [0.0, 1e-7, 1e-3, 1.0, 100.0][random.below(5)])
                .collect(),
        }
    }

    fn m_sum(&self) -> usize {
        self.counts.iter().map(|count| count.next_multiple_of(self.alignment)).sum()
    }

    fn activations(&self) -> Activations<'_> {
        match self.formats {
            Formats::E4m3 | Formats::Mxfp4 | Formats::Int4 => Activations::E4m3 {
                rows: &self.byte_rows,
                scales: Scales::f32(row_major(Group::G128), &self.row_scales),
            },
            _ => Activations::Bf16(&self.rows),
        }
    }

    fn pack(&self, cpu: &Cpu) -> PackedWeights {
        let e = self.counts.len();
        match self.formats {
            Formats::Bf16 => PackedWeights::pack_bf16(cpu, &self.weights, e, self.n, self.k),
            Formats::Mxfp4Weights | Formats::Mxfp4 => {
                PackedWeights::pack_mxfp4(cpu, &self.blocks, &self.block_scales, e, self.n, self.k)
            }
            Formats::Int4Weights | Formats::Int4 => self.pack_int4(cpu),
            _ => PackedWeights::pack_e4m3(cpu, &self.byte_weights, &self.weight_scales, e, self.n, self.k),
        }
        .unwrap()
    }

    fn pack_int4(&self, cpu: &Cpu) -> Result<PackedWeights> {
        let (e, n, k) = (self.counts.len(), self.n, self.k);
        let mut builder = PackedWeightsBuilder::new(cpu, WeightFormat::Int4, e, n, k)?;
        let groups = k / 32;
        let in_bf16: Vec<bf16> = self.group_scales.iter().map(|&scale| bf16::from_f32(scale)).collect();
        let in_f16: Vec<f16> = self.group_scales.iter().map(|&scale| f16::from_f32(scale)).collect();
        for expert in 0..e {
            let blocks = MatrixRef::new(&self.blocks[expert * n * k / 2..][..n * k / 2], n, k / 2)?;
            let own = expert * n * groups..(expert + 1) * n * groups;
            let scales = match self.formats {
                Formats::Int4 => Int4Scales::F16(MatrixRef::new(&in_f16[own], n, groups)?),
                _ => Int4Scales::Bf16(MatrixRef::new(&in_bf16[own], n, groups)?),
            };
            builder.add_int4_rows(expert, 0, blocks, scales)?;
        }
        builder.finish()
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
            Formats::E4m3 | Formats::Mxfp4 | Formats::Int4 => {
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
            Formats::Mxfp4Weights | Formats::Mxfp4 => {
                let nibble = self.blocks[at / 2] >> (at % 2 * 4);
                let scale = f64::from(crate::quantize::ue8m0_value(self.block_scales[at / 32]));
                f64::from(crate::mxfp4::E2M1_VALUES[usize::from(nibble & 15)]) * scale
            }
            Formats::Int4Weights | Formats::Int4 => {
                let nibble = self.blocks[at / 2] >> (at % 2 * 4) & 15;
                let scale = self.group_scales[at / 32];
                let scale = match self.formats {
                    Formats::Int4 => f16::from_f32(scale).to_f64(),
                    _ => bf16::from_f32(scale).to_f64(),
                };
                (f64::from(nibble) - 8.0) * scale
            }
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

/// f32 scales, row by row.
fn row_major(group: Group) -> ScaleFormat {
    ScaleFormat::new(group, ScaleLayout::RowMajor, ScaleRounding::Exact).unwrap()
}

fn formats() -> impl Strategy<Value = Formats> {
    prop::sample::select(&Formats::ALL[..])
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
        let counts: Vec<_> = counts.iter().map(|&count| if cfg!(miri) { count.min(3) } else { count }).collect();
        let k = formats.round_up(k);
        let case = Case::new(formats, &counts, alignment, n, k, seed);
        for isa in Isa::available() {
            case.check(&case.run(&Cpu::with_isa(isa)));
        }
    }
}

#[test]
#[cfg_attr(miri, ignore = "slow there, and nothing that the property does not run")]
fn all_rows_on_one_expert_and_every_tile_size() {
    for formats in Formats::ALL {
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
        if cfg!(miri) { (&[1, 0, 3], 33, 6) } else { (&[1, 0, 150, 7, 30], 200, 384) };
    for formats in Formats::ALL {
        let k = formats.round_up(k);
        let case = Case::new(formats, counts, 8, n, k, 5);
        for isa in Isa::available() {
            let [one, two, five] = [1, 2, 5].map(|threads| case.run(&Cpu::with_isa(isa).in_pool(pool(threads))));
            let same = |other: &[bf16]| one.iter().zip(other).all(|(a, b)| a.to_bits() == b.to_bits());
            assert!(same(&two) && same(&five), "{isa}");
        }
    }
}

/// Rows alone, in tiles of every size, and in blocks of several tiles, which take different ways through a kernel.
#[test]
#[cfg_attr(miri, ignore = "slow there, and nothing that the property does not run")]
fn a_row_has_the_same_bits_in_any_number_of_rows() {
    for formats in Formats::ALL {
        // A whole K and a rest, also of what a kernel takes in one step.
        let of_rows = |rows| Case::new(formats, &[rows], 1, 70, formats.round_up(330), 6);
        let many = of_rows(70);
        for isa in Isa::available() {
            let cpu = Cpu::with_isa(isa);
            let all = many.run(&cpu);
            for count in (1..=28).chain([33, 49, 65]) {
                let few = Case { counts: vec![count], ..of_rows(70) };
                let out = few.run(&cpu);
                assert!(out.iter().zip(&all).all(|(a, b)| a.to_bits() == b.to_bits()), "{isa} {formats:?} {count}");
            }
        }
    }
}

#[test]
#[cfg_attr(miri, ignore = "slow there, and nothing that the property does not run")]
fn a_nan_weight_reaches_its_column_and_no_other() {
    let (n, k, column) = (70, 130, 37);
    for formats in [Formats::Bf16, Formats::E4m3Weights] {
        for rows in [1, 14] {
            let mut case = Case::new(formats, &[rows, rows], 1, n, k, 3);
            for nan_k in [0, 1, k - 1] {
                let at = (n + column) * k + nan_k;
                let kept = (case.weights[at], case.byte_weights[at]);
                (case.weights[at], case.byte_weights[at]) = (bf16::NAN, E4m3(0xff));
                for isa in Isa::available() {
                    let out = case.run(&Cpu::with_isa(isa));
                    case.check(&out);
                    for (at, value) in out.iter().enumerate() {
                        assert_eq!(value.is_nan(), at / n >= rows && at % n == column, "{isa} {formats:?} {at}");
                    }
                }
                (case.weights[at], case.byte_weights[at]) = kept;
            }
        }
    }
}

#[test]
fn a_nan_or_infinite_activation_stays_in_its_row() {
    let mut case = Case::new(Formats::Bf16, &[3], 4, 40, 9, 8);
    case.rows[9 + 4] = bf16::NAN;
    case.rows[2 * 9] = bf16::INFINITY;
    for isa in Isa::available() {
        let out = case.run(&Cpu::with_isa(isa));
        assert!(out[..40].iter().all(|x| x.is_finite()), "{isa}");
        assert!(out[40..80].iter().all(|x| x.is_nan()), "{isa}");
        assert!(out[80..120].iter().all(|x| x.is_infinite()), "{isa}");
    }
}

#[test]
#[cfg_attr(miri, ignore = "slow there, and nothing that the property does not run")]
fn zeros_and_subnormals_among_the_weights_are_exact() {
    let (n, k) = (33, 128);
    let mut case = Case::new(Formats::E4m3Weights, &[2], 1, n, k, 1);
    case.rows.fill(bf16::ONE);
    case.weight_scales.fill(1.0);
    for byte in (0..8).chain(0x80..0x88) {
        case.byte_weights.fill(E4m3(byte));
        let expected = 128.0 * E4m3(byte).to_f32();
        for isa in Isa::available() {
            let out = case.run(&Cpu::with_isa(isa));
            assert!(out.iter().all(|x| x.to_f32() == expected), "{isa} byte {byte:#x}: {} is not {expected}", out[0]);
        }
    }
}

#[test]
#[cfg_attr(miri, ignore = "slow there, and nothing that the property does not run")]
fn activation_scales_are_found_in_every_layout() {
    let case = Case::new(Formats::E4m3, &[3, 0, 5], 4, 40, 640, 9);
    let cpu = Cpu::new();
    let weights = case.pack(&cpu);
    // Powers of two, so that all layouts can hold them.
    let value = |row: usize, group: usize| 2f32.powi((row * 3 + group) as i32 % 11 - 5);
    let formats = [
        (ScaleLayout::RowMajor, ScaleRounding::Exact),
        (ScaleLayout::MnMajor, ScaleRounding::Exact),
        (ScaleLayout::PackedUe8m0, ScaleRounding::PowerOfTwo),
    ];
    let outs = formats.map(|(layout, rounding)| {
        let format = ScaleFormat::new(Group::G128, layout, rounding).unwrap();
        let (m_sum, groups) = (case.m_sum(), 5);
        let (mut floats, mut words) = (vec![0f32; 100], vec![0i32; 100]);
        for row in 0..m_sum {
            for group in 0..groups {
                let word = format.word(row, group, m_sum, groups);
                floats[word] = value(row, group);
                words[word] |= i32::from(crate::quantize::ue8m0_byte(value(row, group))) << (group % 4 * 8);
            }
        }
        let packed = layout == ScaleLayout::PackedUe8m0;
        let scales = if packed { Scales::ue8m0(format, &words) } else { Scales::f32(format, &floats) };
        case.with_layout(|layout| {
            let activations = Activations::E4m3 { rows: &case.byte_rows, scales };
            let mut workspace = vec![0; grouped_gemm_workspace_bytes(8, 640, ActivationFormat::E4m3).unwrap()];
            let mut out = vec![POISON; m_sum * 40];
            grouped_gemm(&cpu, layout, activations, &weights, &mut workspace, &mut out).unwrap();
            out.iter().map(|x| x.to_bits()).collect::<Vec<_>>()
        })
    });
    assert!(outs[0].iter().any(|&bits| bits != POISON.to_bits() && bits != 0));
    assert_eq!(outs[0], outs[1]);
    assert_eq!(outs[0], outs[2]);
}

#[test]
#[cfg_attr(miri, ignore = "slow there, and nothing that the property does not run")]
fn weights_in_parts_are_those_packed_whole() {
    let cpu = Cpu::new();
    let (n, k) = (70, 130);
    let case = Case::new(Formats::Bf16, &[4, 5], 1, n, k, 4);
    let mut builder = PackedWeightsBuilder::new(&Cpu::new(), WeightFormat::Bf16, 2, n, k).unwrap();
    // Out of order, and not on panel bounds; the second expert column-major.
    let columns: Vec<bf16> =
        (0..k).flat_map(|col| (0..n).map(move |row| (row, col))).map(|(r, c)| case.weights[(n + r) * k + c]).collect();
    builder.add_bf16_rows(1, 0, MatrixRef::with_strides(&columns, n, k, 1, n).unwrap()).unwrap();
    for (start, end) in [(33, 70), (0, 5), (5, 33), (33, 33)] {
        let rows = MatrixRef::new(&case.weights[start * k..], end - start, k).unwrap();
        builder.add_bf16_rows(0, start, rows).unwrap();
    }
    let parts = builder.finish().unwrap();
    case.with_layout(|layout| {
        let mut workspace = vec![0; grouped_gemm_workspace_bytes(9, k, ActivationFormat::Bf16).unwrap()];
        let mut out = vec![POISON; 9 * n];
        grouped_gemm(&cpu, layout, case.activations(), &parts, &mut workspace, &mut out).unwrap();
        case.check(&out);
    });
}

#[test]
#[cfg_attr(miri, ignore = "slow there, and nothing that the property does not run")]
fn a_part_keeps_its_own_block_scales() {
    // Gate and up of 160 rows: blocks of 128 are counted from row 0 and from row 160.
    let (half, k) = (160, 200);
    let random = &mut Random::new(6);
    let (values, scales) = (e4m3s(random, 2 * half * k), scales(random, 2 * 2 * 2));
    let mut builder = PackedWeightsBuilder::new(&Cpu::new(), WeightFormat::E4m3, 1, 2 * half, k).unwrap();
    for part in [1, 0] {
        let rows = MatrixRef::new(&values[part * half * k..], half, k).unwrap();
        builder.add_e4m3_rows(0, part * half, rows, MatrixRef::new(&scales[part * 4..], 2, 2).unwrap()).unwrap();
    }
    let weights = builder.finish().unwrap();
    // Each row picks one column of K out, the first in block 0 of K and the second in block 1.
    let rows: Vec<bf16> = (0..2 * k).map(|i| if i == 7 || i == k + 150 { bf16::ONE } else { bf16::ZERO }).collect();
    let mut space = [0; 5];
    let layout = Layout::from_psum(&[2], 1, 2, &mut space).unwrap();
    for isa in Isa::available() {
        let mut workspace = vec![0; grouped_gemm_workspace_bytes(2, k, ActivationFormat::Bf16).unwrap()];
        let mut out = vec![POISON; 2 * 2 * half];
        let cpu = Cpu::with_isa(isa);
        grouped_gemm(&cpu, &layout, Activations::Bf16(&rows), &weights, &mut workspace, &mut out).unwrap();
        for (at, &actual) in out.iter().enumerate() {
            let (row, n) = (at / (2 * half), at % (2 * half));
            let (part, n_block) = (n / half, n % half / 128);
            let scale = scales[part * 4 + n_block * 2 + row];
            let expected = <bf16 as Float>::from_f32(values[n * k + [7, 150][row]].to_f32() * scale);
            assert_eq!(actual, expected, "{isa} row {row} column {n}");
        }
    }
}

/// What [`grouped_gemm`] says about arguments that `change` has spoilt.
fn error_of(formats: Formats, change: impl FnOnce(&mut Spoilt)) -> Error {
    let cpu = Cpu::new();
    let case = Case::new(formats, &[2, 1], 2, 8, 128, 1);
    let (weights, needed) = (case.pack(&cpu), 64 + 3 * 4 * (4 + 64 + 1));
    let activations = case.activations();
    let mut spoilt = Spoilt { experts: 2, activations, weights, workspace: needed, out: 4 * 8 };
    change(&mut spoilt);
    let psum: Vec<i32> = [2, 3, 4, 4][..spoilt.experts].to_vec();
    let mut space = [0; 24];
    let layout = Layout::from_psum(&psum, 2, 4, &mut space).unwrap();
    let mut workspace = vec![7; spoilt.workspace];
    let mut out = vec![POISON; spoilt.out];
    let error = grouped_gemm(&cpu, &layout, spoilt.activations, &spoilt.weights, &mut workspace, &mut out).unwrap_err();
    assert!(out.iter().all(|x| x.to_bits() == POISON.to_bits()) && workspace.iter().all(|&byte| byte == 7));
    error
}

struct Spoilt<'a> {
    experts: usize,
    activations: Activations<'a>,
    weights: PackedWeights,
    workspace: usize,
    out: usize,
}

#[test]
fn arguments_that_do_not_fit_are_errors_and_nothing_is_written() {
    let start = |formats, change: fn(&mut Spoilt), expected: &str| {
        let error = error_of(formats, change);
        assert!(error.to_string().starts_with(expected), "{error}");
        error
    };
    let error = start(
        Formats::E4m3,
        |s| s.weights = PackedWeights::pack_bf16(&Cpu::new(), &[bf16::ONE; 2048], 2, 8, 128).unwrap(),
        "weights is packed as bf16",
    );
    assert!(matches!(error, Error::WeightFormat { argument: "weights", .. }));
    let error = start(
        Formats::E4m3,
        |s| {
            if let Activations::E4m3 { scales, .. } = &mut s.activations {
                *scales = Scales::f32(row_major(Group::G32), &[1.0; 32]);
            }
        },
        "group is 32, expected 128",
    );
    assert!(matches!(error, Error::Value { argument: "group", actual: 32, .. }));
    let error = start(
        Formats::E4m3,
        |s| {
            if let Activations::E4m3 { scales, .. } = &mut s.activations {
                *scales = Scales::f32(row_major(Group::G128), &[1.0; 3]);
            }
        },
        "activation_scales holds 3 elements, expected at least 4",
    );
    assert!(matches!(error, Error::BufferTooSmall { argument: "activation_scales", .. }));
    let error = start(
        Formats::E4m3,
        |s| {
            if let Activations::E4m3 { scales, .. } = &mut s.activations {
                *scales = Scales::ue8m0(row_major(Group::G128), &[0; 4]);
            }
        },
        "activation_scales has dtype i32",
    );
    assert!(matches!(error, Error::Dtype { .. }));
    start(
        Formats::E4m3,
        |s| {
            s.weights = PackedWeights::pack_e4m3(&Cpu::new(), &[E4m3(1); 2 * 8 * 100], &[1.0; 2], 2, 8, 100).unwrap();
        },
        "hidden is 100, expected a positive multiple of 64: groups of 128",
    );
    for formats in [Formats::Bf16, Formats::E4m3Weights, Formats::E4m3] {
        start(formats, |s| s.experts = 3, "local_experts is 3, expected 2");
        start(formats, |s| s.out -= 1, "out holds 31 elements, expected at least 32");
        let error = error_of(formats, |s| s.workspace = 100);
        assert!(matches!(error, Error::BufferTooSmall { argument: "workspace", actual: 100, .. }), "{error}");
        let error = error_of(formats, |s| match &mut s.activations {
            Activations::Bf16(rows) => *rows = &rows[..511],
            Activations::E4m3 { rows, .. } => *rows = &rows[..511],
        });
        let expected = Error::BufferTooSmall { argument: "activations", actual: 511, needed: 512 };
        assert_eq!(error, expected);
    }
    let error = grouped_gemm_workspace_bytes(1, 0, ActivationFormat::Bf16).unwrap_err();
    assert!(matches!(error, Error::Value { argument: "k", actual: 0, .. }));
    let error = grouped_gemm_workspace_bytes(usize::MAX / 8, 64, ActivationFormat::Bf16).unwrap_err();
    assert!(matches!(error, Error::Overflow { .. }));
}

#[test]
fn parts_that_do_not_fit_are_errors() {
    let cpu = Cpu::new();
    for (experts, n, k, argument) in [(0, 1, 1, "experts"), (1, 0, 1, "n"), (1, 1, 0, "k")] {
        let error = PackedWeightsBuilder::new(&Cpu::new(), WeightFormat::Bf16, experts, n, k).err().unwrap();
        assert_eq!(error, Error::value(argument, 0, "at least 1"));
    }
    let error = PackedWeightsBuilder::new(&Cpu::new(), WeightFormat::E4m3, 1 << 40, 1 << 40, 1).err().unwrap();
    assert!(matches!(error, Error::Overflow { .. }), "{error}");
    let error = PackedWeights::pack_bf16(&cpu, &[bf16::ONE; 5], 1, 2, 3).unwrap_err();
    assert_eq!(error, Error::shape("weights", &[5], "[6], the elements of [1, 2, 3]"));
    let error = PackedWeights::pack_e4m3(&cpu, &[E4m3(1); 257], &[1.0; 2], 1, 2, 129).unwrap_err();
    assert_eq!(error, Error::shape("weights", &[257], "[258], the elements of [1, 2, 129]"));
    let error = PackedWeights::pack_e4m3(&cpu, &[E4m3(1); 258], &[1.0], 1, 2, 129).unwrap_err();
    assert_eq!(error, Error::shape("scales", &[1], "[2], the elements of [1, 1, 2]"));

    let (wide, narrow) = ([bf16::ONE; 600], [E4m3(1); 600]);
    let rows = |rows, cols| MatrixRef::new(&wide[..], rows, cols).unwrap();
    let bytes = |rows, cols| MatrixRef::new(&narrow[..], rows, cols).unwrap();
    let scales = |rows| MatrixRef::new(&[1.0f32; 4][..], rows, 1).unwrap();
    let mut builder = PackedWeightsBuilder::new(&Cpu::new(), WeightFormat::Bf16, 2, 40, 3).unwrap();
    let error = builder.add_e4m3_rows(0, 0, bytes(40, 3), scales(1)).unwrap_err();
    assert!(matches!(error, Error::WeightFormat { argument: "builder", actual: "bf16", .. }), "{error}");
    let error = builder.add_bf16_rows(2, 0, rows(40, 3)).unwrap_err();
    assert!(error.to_string().starts_with("expert is 2, expected below 2"), "{error}");
    for (first, count, cols) in [(0, 41, 3), (39, 2, 3), (41, 0, 3), (0, 40, 4)] {
        let error = builder.add_bf16_rows(0, first, rows(count, cols)).unwrap_err();
        assert!(matches!(error, Error::Shape { argument: "rows", .. }), "{error}");
    }
    builder.add_bf16_rows(0, 0, rows(40, 3)).unwrap();
    let error = builder.add_bf16_rows(0, 39, rows(1, 3)).unwrap_err();
    assert!(error.to_string().starts_with("added_rows[0] is 39, expected a row that was not added"), "{error}");
    builder.add_bf16_rows(1, 1, rows(39, 3)).unwrap();
    let error = builder.finish().unwrap_err();
    assert!(error.to_string().starts_with("added_rows[1] is 39, expected 40"), "{error}");

    let mut builder = PackedWeightsBuilder::new(&Cpu::new(), WeightFormat::E4m3, 1, 40, 3).unwrap();
    let error = builder.add_bf16_rows(0, 0, rows(40, 3)).unwrap_err();
    assert!(matches!(error, Error::WeightFormat { argument: "builder", actual: "e4m3", .. }), "{error}");
    let error = builder.add_e4m3_rows(0, 16, bytes(8, 3), scales(1)).unwrap_err();
    assert!(error.to_string().starts_with("first_row is 16, expected a multiple of 32"), "{error}");
    let error = builder.add_e4m3_rows(0, 0, bytes(40, 3), scales(2)).unwrap_err();
    assert!(matches!(error, Error::Shape { argument: "scales", .. }), "{error}");
}
