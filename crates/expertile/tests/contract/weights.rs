//! Random weights, in the library's form and in the oracle's.

use crate::cases::{Strided, Strides};
use expertile::cpu::PackedWeightsBuilder;
use expertile::cpu::{Cpu, PackedWeights};
use expertile::int4::Int4Scales;
use expertile::{E4m3, GateUpOrder, MatrixRef, WeightFormat};
use expertile_oracle as oracle;
use expertile_testkit::Random;
use half::{bf16, f16};

/// Weights `[experts, n, k]` of one format.
pub(crate) struct Weights {
    pub(crate) experts: usize,
    pub(crate) n: usize,
    pub(crate) k: usize,
    /// Matrices that stand one below the other, each with row blocks of its own: gate and up, or one.
    segments: usize,
    data: Data,
}

enum Data {
    Bf16(Vec<bf16>),
    E4m3 {
        bytes: Vec<u8>,
        scales: Vec<f32>,
        /// What was quantized.
        exact: Vec<f32>,
    },
    Mxfp4 {
        blocks: Vec<u8>,
        scales: Vec<u8>,
    },
    Int4 {
        blocks: Vec<u8>,
        scales: Halves,
    },
}

/// Scales of int4 weights, in one of their two types.
#[derive(Clone)]
pub(crate) enum Halves {
    Bf16(Vec<bf16>),
    F16(Vec<f16>),
}

impl Halves {
    /// The scales nearest to these.
    pub(crate) fn new(values: &[f32], are_f16: bool) -> Self {
        if are_f16 {
            Self::F16(values.iter().map(|&value| f16::from_f32(value)).collect())
        } else {
            Self::Bf16(values.iter().map(|&value| bf16::from_f32(value)).collect())
        }
    }

    fn len(&self) -> usize {
        match self {
            Self::Bf16(values) => values.len(),
            Self::F16(values) => values.len(),
        }
    }

    fn exact(&self) -> Vec<f64> {
        match self {
            Self::Bf16(values) => values.iter().map(|value| value.to_f64()).collect(),
            Self::F16(values) => values.iter().map(|value| value.to_f64()).collect(),
        }
    }

    pub(crate) fn part(&self, range: std::ops::Range<usize>) -> Self {
        match self {
            Self::Bf16(values) => Self::Bf16(values[range].to_vec()),
            Self::F16(values) => Self::F16(values[range].to_vec()),
        }
    }

    pub(crate) fn joined(&self, other: &Self) -> Self {
        match (self, other) {
            (Self::Bf16(a), Self::Bf16(b)) => Self::Bf16([&a[..], b].concat()),
            (Self::F16(a), Self::F16(b)) => Self::F16([&a[..], b].concat()),
            _ => unreachable!("scales of one type"),
        }
    }

    pub(crate) fn reordered(&self, half: usize, groups: usize, order: GateUpOrder) -> Self {
        match self {
            Self::Bf16(values) => Self::Bf16(reordered(values, half, groups, order)),
            Self::F16(values) => Self::F16(reordered(values, half, groups, order)),
        }
    }

    /// Hands on the scales `[rows, groups]` through these strides, among values that are no numbers.
    pub(crate) fn with<R>(
        &self,
        [rows, groups]: [usize; 2],
        strides: Strides,
        take: impl FnOnce(Int4Scales<'_>) -> R,
    ) -> R {
        match self {
            Self::Bf16(values) => {
                take(Int4Scales::Bf16(Strided::new(values, rows, groups, strides, bf16::NAN).matrix()))
            }
            Self::F16(values) => take(Int4Scales::F16(Strided::new(values, rows, groups, strides, f16::NAN).matrix())),
        }
    }
}

/// Rows of one expert, and their scales.
pub(crate) enum Part {
    Bf16(Vec<bf16>),
    E4m3(Vec<E4m3>, Vec<f32>),
    Mxfp4(Vec<u8>, Vec<u8>),
    Int4(Vec<u8>, Halves),
}

impl Weights {
    /// Normal weights of standard deviation `1 / sqrt(k)`, so that products stay near 1.
    pub(crate) fn random(format: WeightFormat, extents: [usize; 3], seed: u64) -> Self {
        Self::of_segments(format, extents, 1, seed)
    }

    /// Gate's `intermediate` rows, then up's.
    pub(crate) fn gate_up(format: WeightFormat, [experts, intermediate, k]: [usize; 3], seed: u64) -> Self {
        Self::of_segments(format, [experts, 2 * intermediate, k], 2, seed)
    }

    fn of_segments(format: WeightFormat, [experts, n, k]: [usize; 3], segments: usize, seed: u64) -> Self {
        let mut random = Random::new(seed);
        let size = 1.0 / (k as f32).sqrt();
        let exact: Vec<f32> = (0..experts * n * k).map(|_| size * random.normal()).collect();
        let data = match format {
            WeightFormat::Bf16 => Data::Bf16(exact.into_iter().map(bf16::from_f32).collect()),
            WeightFormat::E4m3 => {
                let (mut bytes, mut scales) = (Vec::new(), Vec::new());
                for weights in exact.chunks(n / segments * k) {
                    let (own_bytes, own_scales) = quantize_blocks(weights, n / segments, k);
                    bytes.extend(own_bytes);
                    scales.extend(own_scales);
                }
                Data::E4m3 { bytes, scales, exact }
            }
            WeightFormat::Mxfp4 => {
                let (mut blocks, mut scales) = (Vec::new(), Vec::new());
                for row in exact.chunks(k) {
                    let (own_blocks, own_scales) = oracle::mxfp4::quantize_row(row);
                    blocks.extend(own_blocks);
                    scales.extend(own_scales);
                }
                Data::Mxfp4 { blocks, scales }
            }
            WeightFormat::Int4 => {
                let scales: Vec<f32> = exact.chunks(32).map(oracle::int4::scale).collect();
                let scales = Halves::new(&scales, seed.is_multiple_of(2));
                let own = scales.exact();
                let rows = exact.chunks(k).zip(own.chunks(k / 32));
                let blocks = rows.flat_map(|(row, scales)| oracle::int4::quantize_row(row, scales)).collect();
                Data::Int4 { blocks, scales }
            }
        };
        Self { experts, n, k, segments, data }
    }

    /// Some experts' weights, in that order.
    pub(crate) fn of_experts(&self, experts: &[usize]) -> Self {
        fn picked<T: Clone>(values: &[T], all: usize, experts: &[usize]) -> Vec<T> {
            let each = values.len() / all;
            experts.iter().flat_map(|&expert| values[expert * each..][..each].to_vec()).collect()
        }
        let data = match &self.data {
            Data::Bf16(weights) => Data::Bf16(picked(weights, self.experts, experts)),
            Data::E4m3 { bytes, scales, exact } => Data::E4m3 {
                bytes: picked(bytes, self.experts, experts),
                scales: picked(scales, self.experts, experts),
                exact: picked(exact, self.experts, experts),
            },
            Data::Mxfp4 { blocks, scales } => Data::Mxfp4 {
                blocks: picked(blocks, self.experts, experts),
                scales: picked(scales, self.experts, experts),
            },
            Data::Int4 { blocks, scales } => {
                let each = scales.len() / self.experts;
                let parts: Vec<Halves> =
                    experts.iter().map(|&expert| scales.part(expert * each..(expert + 1) * each)).collect();
                let (first, rest) = parts.split_first().expect("some experts");
                let scales = rest.iter().fold(first.clone(), |all, part| all.joined(part));
                Data::Int4 { blocks: picked(blocks, self.experts, experts), scales }
            }
        };
        Self { experts: experts.len(), data, ..*self }
    }

    pub(crate) fn pack(&self, cpu: &Cpu) -> PackedWeights {
        let [experts, n, k] = [self.experts, self.n, self.k];
        if self.segments == 2 {
            return self.pack_in(cpu, GateUpOrder::Halves);
        }
        match &self.data {
            Data::Bf16(weights) => PackedWeights::pack_bf16(cpu, weights, experts, n, k).unwrap(),
            Data::E4m3 { bytes, scales, .. } => {
                PackedWeights::pack_e4m3(cpu, &e4m3s(bytes), scales, experts, n, k).unwrap()
            }
            Data::Mxfp4 { blocks, scales } => PackedWeights::pack_mxfp4(cpu, blocks, scales, experts, n, k).unwrap(),
            Data::Int4 { blocks, scales } => {
                let mut builder = PackedWeightsBuilder::new(cpu, WeightFormat::Int4, experts, n, k).unwrap();
                for expert in 0..experts {
                    let blocks = MatrixRef::new(&blocks[expert * n * k / 2..][..n * k / 2], n, k / 2).unwrap();
                    scales.part(expert * n * k / 32..(expert + 1) * n * k / 32).with(
                        [n, k / 32],
                        Strides::Contiguous,
                        |scales| {
                            builder.add_int4_rows(expert, 0, blocks, scales).unwrap();
                        },
                    );
                }
                builder.finish().unwrap()
            }
        }
    }

    /// Packs gate and up from a tensor in that order.
    pub(crate) fn pack_in(&self, cpu: &Cpu, order: GateUpOrder) -> PackedWeights {
        let [experts, half, k] = [self.experts, self.n / 2, self.k];
        match &self.data {
            Data::Bf16(weights) => {
                let weights = reordered(weights, half, k, order);
                PackedWeights::pack_gate_up_bf16(cpu, &weights, experts, half, k, order).unwrap()
            }
            Data::E4m3 { bytes, scales, .. } => {
                let bytes = reordered(&e4m3s(bytes), half, k, order);
                PackedWeights::pack_gate_up_e4m3(cpu, &bytes, scales, experts, half, k, order).unwrap()
            }
            Data::Mxfp4 { blocks, scales } => {
                let blocks = reordered(blocks, half, k / 2, order);
                let scales = reordered(scales, half, k / 32, order);
                PackedWeights::pack_gate_up_mxfp4(cpu, &blocks, &scales, experts, half, k, order).unwrap()
            }
            Data::Int4 { blocks, scales } => {
                let blocks = reordered(blocks, half, k / 2, order);
                let scales = scales.reordered(half, k / 32, order);
                let mut builder = PackedWeightsBuilder::gate_up(cpu, WeightFormat::Int4, experts, half, k).unwrap();
                for expert in 0..experts {
                    let blocks = MatrixRef::new(&blocks[expert * half * k..][..half * k], 2 * half, k / 2).unwrap();
                    let each = 2 * half * k / 32;
                    scales.part(expert * each..(expert + 1) * each).with(
                        [2 * half, k / 32],
                        Strides::Contiguous,
                        |scales| {
                            builder.add_gate_up_int4_rows(expert, blocks, scales, order).unwrap();
                        },
                    );
                }
                builder.finish().unwrap()
            }
        }
    }

    /// Row blocks of an expert's scales before that row.
    fn blocks_before(&self, row: usize) -> usize {
        let segment = self.n / self.segments;
        row / segment * segment.div_ceil(128) + row % segment / 128
    }

    /// Rows of one expert as they are stored; with block scales (`first_row` the first of a block) if there are any.
    pub(crate) fn part(&self, expert: usize, first_row: usize, rows: usize) -> Part {
        let first = (expert * self.n + first_row) * self.k;
        let values = first..first + rows * self.k;
        match &self.data {
            Data::Bf16(weights) => Part::Bf16(weights[values].to_vec()),
            Data::E4m3 { bytes, scales, .. } => {
                let blocks = self.k.div_ceil(128);
                let first = (expert * self.blocks_before(self.n) + self.blocks_before(first_row)) * blocks;
                Part::E4m3(e4m3s(&bytes[values]), scales[first..][..rows.div_ceil(128) * blocks].to_vec())
            }
            Data::Mxfp4 { blocks, scales } => Part::Mxfp4(
                blocks[values.start / 2..values.end / 2].to_vec(),
                scales[values.start / 32..values.end / 32].to_vec(),
            ),
            Data::Int4 { blocks, scales } => Part::Int4(
                blocks[values.start / 2..values.end / 2].to_vec(),
                scales.part(values.start / 32..values.end / 32),
            ),
        }
    }

    /// Row `j` of an expert's weights as they are stored, scales applied.
    pub(crate) fn row(&self, expert: usize, j: usize, row: &mut [f64]) {
        let matrix = self.n * self.k;
        match &self.data {
            Data::Bf16(weights) => {
                let stored = &weights[expert * matrix + j * self.k..];
                row.iter_mut().zip(stored).for_each(|(to, from)| *to = from.to_f64());
            }
            Data::E4m3 { bytes, scales, .. } => {
                let segment = self.n / self.segments;
                let first_row = j / segment * segment;
                let first_block = expert * self.blocks_before(self.n) + self.blocks_before(first_row);
                let (bytes, scales) =
                    (&bytes[expert * matrix + first_row * self.k..], &scales[first_block * self.k.div_ceil(128)..]);
                oracle::gemm::e4m3_weight_row(bytes, scales, self.k, j - first_row, row);
            }
            Data::Mxfp4 { blocks, scales } => {
                oracle::mxfp4::weight_row(blocks, scales, self.k, expert * self.n + j, row);
            }
            Data::Int4 { blocks, scales } => {
                let first = (expert * self.n + j) * self.k;
                let scales = scales.part(first / 32..(first + self.k) / 32).exact();
                oracle::int4::weight_row(&blocks[first / 2..], &scales, self.k, 0, row);
            }
        }
    }

    /// Row `j` before it was quantized; of 4-bit weights what it was quantized to, which a product can be near to.
    pub(crate) fn unquantized_row(&self, expert: usize, j: usize, row: &mut [f64]) {
        match &self.data {
            Data::Bf16(_) | Data::Mxfp4 { .. } | Data::Int4 { .. } => self.row(expert, j, row),
            Data::E4m3 { exact, .. } => {
                let exact = &exact[(expert * self.n + j) * self.k..];
                row.iter_mut().zip(exact).for_each(|(to, &from)| *to = f64::from(from));
            }
        }
    }
}

fn e4m3s(bytes: &[u8]) -> Vec<E4m3> {
    bytes.iter().map(|&byte| E4m3(byte)).collect()
}

/// Experts of gate's rows, then up's, as a tensor in that order.
pub(crate) fn reordered<T: Copy>(weights: &[T], half: usize, k: usize, order: GateUpOrder) -> Vec<T> {
    let mut out = Vec::new();
    for expert in weights.chunks(2 * half * k) {
        let (gate, up) = expert.split_at(half * k);
        match order {
            GateUpOrder::Halves => out.extend(expert),
            GateUpOrder::Interleaved => {
                gate.chunks(k).zip(up.chunks(k)).for_each(|(gate, up)| out.extend(gate.iter().chain(up)));
            }
        }
    }
    out
}

/// Blocks of 128 by 128 with one scale each: `amax / 448`.
fn quantize_blocks(weights: &[f32], n: usize, k: usize) -> (Vec<u8>, Vec<f32>) {
    let mut bytes = vec![0; n * k];
    let mut scales = Vec::new();
    for first_row in (0..n).step_by(128) {
        for first_col in (0..k).step_by(128) {
            let (rows, cols) = (first_row..n.min(first_row + 128), first_col..k.min(first_col + 128));
            let places: Vec<usize> = rows.flat_map(|row| cols.clone().map(move |col| row * k + col)).collect();
            let block: Vec<f32> = places.iter().map(|&place| weights[place]).collect();
            let scale = oracle::quantize::scale(&block, false);
            for place in places {
                bytes[place] = oracle::quantize::e4m3_byte(weights[place] / scale);
            }
            scales.push(scale);
        }
    }
    (bytes, scales)
}
