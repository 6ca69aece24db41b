//! The grouped GEMM within the contract's tolerances, by row and by expert; the same bits on any number of threads.

use crate::cases::{Strided, Strides, exact, machines};
use crate::routings::{RoutingCase, config, routings};
use crate::weights::{Part, Weights, reordered};
use expertile::cpu::{
    Activations, Cpu, Isa, PackedWeights, PackedWeightsBuilder, grouped_gemm, grouped_gemm_of_segments,
    grouped_gemm_with_bias, grouped_gemm_workspace_bytes,
};
use expertile::{
    ActivationFormat, E4m3, GateUpOrder, Group, Layout, MatrixRef, ScaleFormat, ScaleLayout, ScaleRounding, Scales,
    Segments, WeightFormat,
};
use expertile_oracle as oracle;
use expertile_testkit::Random;
use half::bf16;
use oracle::compare::{BF16_GEMM, E4M3_GEMM, Tolerance, by_expert, by_row, difference, worst};
use proptest::prelude::*;
use proptest::sample::select;

const POISON: bf16 = bf16::from_bits(0xc29a);

/// Live rows of `[M_sum, width]` as f64, one after another, and their experts: what [`oracle::compare`] takes.
fn live(rows: &[f64], m_indices: &[i32], width: usize) -> Vec<f64> {
    rows.chunks(width).zip(m_indices).filter(|(_, expert)| **expert >= 0).flat_map(|(row, _)| row.to_vec()).collect()
}

/// Fails unless `actual` is within `tolerance` of `expected`, as a whole, by expert and by row.
pub(crate) fn within(
    tolerance: Tolerance,
    actual: &[f64],
    expected: &[f64],
    m_indices: &[i32],
    width: usize,
) -> Result<(), TestCaseError> {
    let experts = m_indices.iter().max().map_or(0, |&last| (last + 1) as usize);
    let per_expert = by_expert(actual, expected, width, m_indices, experts);
    let (actual, expected) = (live(actual, m_indices, width), live(expected, m_indices, width));
    let whole = difference(&actual, &expected);
    prop_assert!(whole < tolerance.whole, "whole: {} of {:?}", whole, tolerance);
    if let Some((expert, most)) = worst(&per_expert) {
        prop_assert!(most < tolerance.row, "expert {}: {} of {:?}", expert, most, tolerance);
    }
    if let Some((row, most)) = worst(&by_row(&actual, &expected, width)) {
        prop_assert!(most < tolerance.row, "live row {}: {} of {:?}", row, most, tolerance);
    }
    Ok(())
}

/// Rows of activations, what they stand for, and what they were before they were quantized.
struct Rows {
    bf16: Vec<bf16>,
    e4m3: Vec<E4m3>,
    f32_scales: Vec<f32>,
    ue8m0_scales: Vec<i32>,
    format: Option<ScaleFormat>,
    meant: Vec<f64>,
    unquantized: Vec<f64>,
}

impl Rows {
    /// Random rows `[M_sum, k]`; padding holds NaN, its scales too: nobody may read them.
    fn random(m_indices: &[i32], k: usize, format: Option<ScaleFormat>, seed: u64) -> Self {
        let mut random = Random::new(seed);
        let bf16: Vec<bf16> = (0..m_indices.len() * k).map(|_| bf16::from_f32(random.normal())).collect();
        let unquantized: Vec<f64> = bf16.iter().map(|x| x.to_f64()).collect();
        let mut rows = Self {
            meant: unquantized.clone(),
            unquantized,
            e4m3: vec![],
            f32_scales: vec![],
            ue8m0_scales: vec![],
            format,
            bf16,
        };
        if let Some(format) = format {
            let power_of_two = format.rounding() == ScaleRounding::PowerOfTwo;
            let quantized = oracle::quantize::quantize(&exact(&rows.bf16), k, 128, power_of_two);
            rows.meant = quantized.values();
            rows.e4m3 = quantized.bytes.iter().map(|&byte| E4m3(byte)).collect();
            match format.layout() {
                ScaleLayout::RowMajor => rows.f32_scales = quantized.row_major(),
                ScaleLayout::MnMajor => rows.f32_scales = quantized.mn_major(),
                ScaleLayout::PackedUe8m0 => rows.ue8m0_scales = quantized.packed_ue8m0(),
            }
        }
        for (row, _) in m_indices.iter().enumerate().filter(|(_, expert)| **expert < 0) {
            rows.bf16[row * k..][..k].fill(bf16::NAN);
            rows.meant[row * k..][..k].fill(f64::NAN);
            if let Some(format) = format {
                rows.e4m3[row * k..][..k].fill(E4m3::NAN);
                for group in 0..k.div_ceil(128) {
                    let word = format.word(row, group, m_indices.len(), k.div_ceil(128));
                    match format.layout() {
                        ScaleLayout::PackedUe8m0 => rows.ue8m0_scales[word] = -1,
                        _ => rows.f32_scales[word] = f32::NAN,
                    }
                }
            }
        }
        rows
    }

    fn activations(&self) -> Activations<'_> {
        match self.format {
            None => Activations::Bf16(&self.bf16),
            Some(format) => Activations::E4m3 {
                rows: &self.e4m3,
                scales: match format.layout() {
                    ScaleLayout::PackedUe8m0 => Scales::ue8m0(format, &self.ue8m0_scales),
                    _ => Scales::f32(format, &self.f32_scales),
                },
            },
        }
    }
}

/// Multiplies in a poisoned, unaligned workspace of exactly the size asked for.
fn multiply(cpu: &Cpu, layout: &Layout<'_>, rows: &Rows, weights: &PackedWeights) -> Vec<bf16> {
    let activations = rows.activations();
    let bytes = grouped_gemm_workspace_bytes(layout.live_rows(), weights.k(), activations.format()).unwrap();
    let mut workspace = vec![0xff; bytes + 1];
    let mut out = vec![POISON; layout.m_sum() * weights.n() + 3];
    grouped_gemm(cpu, layout, activations, weights, &mut workspace[1..], &mut out).unwrap();
    // The same rows with either list in the layout's place.
    let by_psum = Segments::from_psum(layout.psum(), layout.alignment(), layout.m_sum()).unwrap();
    let by_row = Segments::from_m_indices(layout.m_indices(), layout.local_experts()).unwrap();
    for segments in [by_psum, by_row] {
        let mut again = vec![POISON; out.len()];
        let workspace = &mut workspace[1..];
        grouped_gemm_of_segments(cpu, &segments, activations, weights, workspace, &mut again).unwrap();
        assert!(again.iter().zip(&out).all(|(a, b)| a.to_bits() == b.to_bits()), "{segments:?}");
    }
    out
}

/// Rows in any order, padding among them: each has the bits that it has in its place in a layout.
#[test]
fn a_rows_bits_do_not_depend_on_its_place() {
    let mut random = Random::new(5);
    let (experts, n, k) = (3, 40, 256);
    let psum = [5, 8, 40];
    let mut space = [0; 3 * 3 + 48];
    let layout = Layout::from_psum(&psum, 8, 48, &mut space).unwrap();
    for format in [None, Some(ScaleFormat::HOPPER)] {
        let weights = if format.is_some() { WeightFormat::E4m3 } else { WeightFormat::Bf16 };
        let weights = Weights::random(weights, [experts, n, k], 3).pack(&Cpu::new());
        let rows = Rows::random(layout.m_indices(), k, format, 4);
        let expected = multiply(&Cpu::new(), &layout, &rows, &weights);
        let mut order: Vec<usize> = (0..layout.m_sum()).collect();
        random.shuffle(&mut order);
        let m_indices: Vec<i32> = order.iter().map(|&row| layout.m_indices()[row]).collect();
        let pick = |width: usize| order.iter().flat_map(move |&row| row * width..(row + 1) * width);
        let (bf16_rows, e4m3_rows): (Vec<bf16>, Vec<E4m3>) = match format {
            None => (pick(k).map(|at| rows.bf16[at]).collect(), vec![]),
            Some(_) => (vec![], pick(k).map(|at| rows.e4m3[at]).collect()),
        };
        let row_major = ScaleFormat::new(Group::G128, ScaleLayout::RowMajor, ScaleRounding::Exact).unwrap();
        let groups = k / 128;
        let of = |row: usize, group: usize| rows.f32_scales[ScaleFormat::HOPPER.word(row, group, 48, groups)];
        let scales: Vec<f32> = match format {
            None => vec![],
            Some(_) => order
                .iter()
                .flat_map(|&row| (0..groups).map(move |group| (row, group)))
                .map(|(r, g)| of(r, g))
                .collect(),
        };
        let activations = match format {
            None => Activations::Bf16(&bf16_rows),
            Some(_) => Activations::E4m3 { rows: &e4m3_rows, scales: Scales::f32(row_major, &scales) },
        };
        let segments = Segments::from_m_indices(&m_indices, experts).unwrap();
        assert!(segments.iter().count() > 10, "there are many segments");
        let bytes = grouped_gemm_workspace_bytes(segments.live_rows(), k, activations.format()).unwrap();
        let (mut workspace, mut out) = (vec![0xff; bytes], vec![POISON; 48 * n]);
        grouped_gemm_of_segments(&Cpu::new(), &segments, activations, &weights, &mut workspace, &mut out).unwrap();
        for (place, &row) in order.iter().enumerate() {
            let [mine, of_layout] = [&out[place * n..][..n], &expected[row * n..][..n]];
            assert!(mine.iter().zip(of_layout).all(|(a, b)| a.to_bits() == b.to_bits()), "row {row} at {place}");
        }
    }
}

fn check(
    case: &RoutingCase,
    [n, k]: [usize; 2],
    weight_format: WeightFormat,
    scales: Option<ScaleFormat>,
    seed: u64,
    cpus: &[Cpu],
) -> Result<(), TestCaseError> {
    let weights = Weights::random(weight_format, [case.local_experts, n, k], !seed);
    case.with_layout(|layout, oracle_layout| {
        let m_indices = &oracle_layout.m_indices;
        let rows = Rows::random(m_indices, k, scales, seed);
        let same_inputs = oracle::gemm::grouped_gemm(&rows.meant, m_indices, n, k, |e, j, row| weights.row(e, j, row));
        let exact = oracle::gemm::grouped_gemm(&rows.unquantized, m_indices, n, k, |e, j, row| {
            weights.unquantized_row(e, j, row);
        });
        let mut first: Option<(Isa, Vec<u16>)> = None;
        for cpu in cpus {
            let out = multiply(cpu, layout, &rows, &weights.pack(cpu));
            let bits: Vec<u16> = out.iter().map(|value| value.to_bits()).collect();
            // Threads must not matter. Instruction sets may sum in another order.
            match &first {
                Some((isa, first)) if *isa == cpu.isa() => {
                    prop_assert!(*first == bits, "{}: {} threads give other bits", isa, cpu.threads());
                    continue;
                }
                _ => first = Some((cpu.isa(), bits)),
            }
            for (row, &expert) in m_indices.iter().enumerate().filter(|(_, expert)| **expert < 0) {
                let padding = &out[row * n..][..n];
                prop_assert!(padding.iter().all(|x| x.to_bits() == POISON.to_bits()), "{}: padding {}", expert, row);
            }
            prop_assert!(out[layout.m_sum() * n..].iter().all(|x| x.to_bits() == POISON.to_bits()));
            let actual: Vec<f64> = out[..layout.m_sum() * n].iter().map(|value| value.to_f64()).collect();
            within(BF16_GEMM, &actual, &same_inputs, m_indices, n)?;
            let quantized = weight_format == WeightFormat::E4m3 || scales.is_some();
            let tolerance = if quantized { E4M3_GEMM } else { BF16_GEMM };
            within(tolerance, &actual, &exact, m_indices, n)?;
        }
        Ok(())
    })
}

fn scale_formats() -> Vec<ScaleFormat> {
    use ScaleLayout::{MnMajor, PackedUe8m0, RowMajor};
    use ScaleRounding::{Exact, PowerOfTwo};
    [(RowMajor, Exact), (MnMajor, Exact), (RowMajor, PowerOfTwo), (PackedUe8m0, PowerOfTwo)]
        .map(|(layout, rounding)| ScaleFormat::new(Group::G128, layout, rounding).unwrap())
        .to_vec()
}

/// Few enough experts that the weights of a case take a moment and not a minute.
fn small_routings() -> impl Strategy<Value = RoutingCase> {
    routings().prop_filter("at most 64 experts", |case| case.local_experts <= 64)
}

proptest! {
    #![proptest_config(config(60))]

    #[test]
    fn bf16_products_are_within_tolerance(
        case in small_routings(),
        n in select(&[64, 96, 130, 161][..]),
        k in select(&[64, 127, 128, 200, 384][..]),
        seed: u64,
    ) {
        check(&case, [n, k], WeightFormat::Bf16, None, seed, &machines().collect::<Vec<_>>())?;
    }

    #[test]
    fn e4m3_weights_times_bf16_rows_are_within_tolerance(
        case in small_routings(),
        n in select(&[64, 96, 130, 161][..]),
        k in select(&[64, 127, 128, 200, 384][..]),
        seed: u64,
    ) {
        check(&case, [n, k], WeightFormat::E4m3, None, seed, &machines().collect::<Vec<_>>())?;
    }

    #[test]
    fn e4m3_weights_times_e4m3_rows_are_within_tolerance(
        case in small_routings(),
        n in select(&[96, 130, 161, 257][..]),
        k in select(&[128, 192, 256, 576, 640][..]),
        format in select(scale_formats()),
        seed: u64,
    ) {
        check(&case, [n, k], WeightFormat::E4m3, Some(format), seed, &machines().collect::<Vec<_>>())?;
    }

    #[test]
    fn mxfp4_weights_times_bf16_rows_are_within_tolerance(
        case in small_routings(),
        n in select(&[64, 96, 130, 161][..]),
        k in select(&[32, 64, 96, 128, 160, 384][..]),
        seed: u64,
    ) {
        check(&case, [n, k], WeightFormat::Mxfp4, None, seed, &machines().collect::<Vec<_>>())?;
    }

    #[test]
    fn mxfp4_weights_times_e4m3_rows_are_within_tolerance(
        case in small_routings(),
        n in select(&[96, 130, 161, 257][..]),
        k in select(&[128, 192, 256, 576, 640][..]),
        format in select(scale_formats()),
        seed: u64,
    ) {
        check(&case, [n, k], WeightFormat::Mxfp4, Some(format), seed, &machines().collect::<Vec<_>>())?;
    }

    #[test]
    fn int4_weights_times_bf16_rows_are_within_tolerance(
        case in small_routings(),
        n in select(&[64, 96, 130, 161][..]),
        k in select(&[32, 64, 96, 128, 160, 384][..]),
        seed: u64,
    ) {
        check(&case, [n, k], WeightFormat::Int4, None, seed, &machines().collect::<Vec<_>>())?;
    }

    #[test]
    fn int4_weights_times_e4m3_rows_are_within_tolerance(
        case in small_routings(),
        n in select(&[96, 130, 161, 257][..]),
        k in select(&[128, 192, 256, 576, 640][..]),
        format in select(scale_formats()),
        seed: u64,
    ) {
        check(&case, [n, k], WeightFormat::Int4, Some(format), seed, &machines().collect::<Vec<_>>())?;
    }

    /// Where every sum is exact in f32, decoded weights give the same bits.
    #[test]
    fn int4_weights_multiply_as_the_bf16_they_stand_for(
        case in small_routings(),
        n in select(&[1, 32, 70][..]),
        k in select(&[32, 96, 128, 160, 320][..]),
        are_f16: bool,
        seed: u64,
    ) {
        let mut random = Random::new(seed);
        let experts = case.local_experts;
        let blocks: Vec<u8> = (0..experts * n * k / 2).map(|_| random.draw() as u8).collect();
        // Products with 3 digits more are of at most 8 digits in all, which a bf16 holds.
        let scales: Vec<f32> = (0..experts * n * k / 32).map(|_| (1 + random.draw() % 15) as f32 * 0.25).collect();
        let decoded: Vec<bf16> = (0..experts * n * k)
            .map(|at| {
                let nibble = blocks[at / 2] >> (at % 2 * 4);
                bf16::from_f32(expertile::int4::decode(nibble, scales[at / 32]))
            })
            .collect();
        case.with_layout(|layout, oracle_layout| {
            let mut rows = Rows::random(&oracle_layout.m_indices, k, None, seed);
            for value in rows.bf16.iter_mut().filter(|value| !value.is_nan()) {
                *value = bf16::from_f32((random.draw() % 15) as f32 - 7.0);
            }
            for cpu in machines() {
                let mut builder = PackedWeightsBuilder::new(&cpu, WeightFormat::Int4, experts, n, k).unwrap();
                for expert in 0..experts {
                    let blocks = MatrixRef::new(&blocks[expert * n * k / 2..][..n * k / 2], n, k / 2).unwrap();
                    let own = &scales[expert * n * k / 32..][..n * k / 32];
                    let halves = crate::weights::Halves::new(own, are_f16);
                    halves.with([n, k / 32], Strides::Contiguous, |scales| {
                        builder.add_int4_rows(expert, 0, blocks, scales).unwrap();
                    });
                }
                let packed = builder.finish().unwrap();
                let meant = PackedWeights::pack_bf16(&cpu, &decoded, experts, n, k).unwrap();
                let (actual, expected) = (multiply(&cpu, layout, &rows, &packed), multiply(&cpu, layout, &rows, &meant));
                prop_assert!(crate::cases::bits(&actual) == crate::cases::bits(&expected), "{}", cpu.isa());
            }
            Ok(())
        })?;
    }

    /// Where every sum is exact in f32, decoded weights give the same bits.
    #[test]
    fn mxfp4_weights_multiply_as_the_bf16_they_stand_for(
        case in small_routings(),
        n in select(&[1, 32, 70][..]),
        k in select(&[32, 96, 128, 160, 320][..]),
        seed: u64,
    ) {
        let mut random = Random::new(seed);
        let experts = case.local_experts;
        let blocks: Vec<u8> = (0..experts * n * k / 2).map(|_| random.draw() as u8).collect();
        let scales: Vec<u8> = (0..experts * n * k / 32).map(|_| 126 + (random.draw() % 3) as u8).collect();
        let mut decoded = vec![0.0; experts * n * k];
        expertile::mxfp4::decode_rows(&blocks, &scales, k, &mut decoded).unwrap();
        let decoded: Vec<bf16> = decoded.into_iter().map(bf16::from_f32).collect();
        case.with_layout(|layout, oracle_layout| {
            let mut rows = Rows::random(&oracle_layout.m_indices, k, None, seed);
            for value in rows.bf16.iter_mut().filter(|value| !value.is_nan()) {
                *value = bf16::from_f32((random.draw() % 15) as f32 - 7.0);
            }
            for cpu in machines() {
                let packed = PackedWeights::pack_mxfp4(&cpu, &blocks, &scales, experts, n, k).unwrap();
                let meant = PackedWeights::pack_bf16(&cpu, &decoded, experts, n, k).unwrap();
                let (actual, expected) = (multiply(&cpu, layout, &rows, &packed), multiply(&cpu, layout, &rows, &meant));
                prop_assert!(crate::cases::bits(&actual) == crate::cases::bits(&expected), "{}", cpu.isa());
            }
            Ok(())
        })?;
    }

    #[test]
    fn weights_packed_in_parts_multiply_as_those_packed_at_once(
        case in small_routings(),
        format in select(&WeightFormat::ALL[..]),
        seed: u64,
    ) {
        // Gate and up rows apart, experts and rows backwards.
        let (half, k, experts) = (128, 192, case.local_experts);
        let weights = Weights::random(format, [experts, 2 * half, k], seed);
        let cpu = Cpu::new();
        let mut builder = PackedWeightsBuilder::new(&cpu, format, experts, 2 * half, k).unwrap();
        for expert in (0..experts).rev() {
            for first_row in [half, 0] {
                match weights.part(expert, first_row, half) {
                    Part::E4m3(bytes, scales) => {
                        let rows = MatrixRef::new(&bytes, half, k).unwrap();
                        let scales = MatrixRef::new(&scales, 1, 2).unwrap();
                        builder.add_e4m3_rows(expert, first_row, rows, scales).unwrap();
                    }
                    Part::Bf16(values) => {
                        let rows = Strided::new(&values, half, k, Strides::ColumnMajor, bf16::NAN);
                        builder.add_bf16_rows(expert, first_row, rows.matrix()).unwrap();
                    }
                    Part::Mxfp4(blocks, scales) => {
                        let blocks = MatrixRef::new(&blocks, half, k / 2).unwrap();
                        let scales = MatrixRef::new(&scales, half, k / 32).unwrap();
                        builder.add_mxfp4_rows(expert, first_row, blocks, scales).unwrap();
                    }
                    Part::Int4(blocks, scales) => {
                        let blocks = MatrixRef::new(&blocks, half, k / 2).unwrap();
                        scales.with([half, k / 32], Strides::ColumnMajor, |scales| {
                            builder.add_int4_rows(expert, first_row, blocks, scales).unwrap();
                        });
                    }
                }
            }
        }
        let (parts, whole) = (builder.finish().unwrap(), weights.pack(&cpu));
        prop_assert_eq!(parts.bytes(), whole.bytes());
        case.with_layout(|layout, oracle_layout| {
            let rows = Rows::random(&oracle_layout.m_indices, k, None, seed);
            let (a, b) = (multiply(&cpu, layout, &rows, &parts), multiply(&cpu, layout, &rows, &whole));
            prop_assert!(crate::cases::bits(&a) == crate::cases::bits(&b));
            Ok(())
        })?;
    }
}

proptest! {
    #![proptest_config(config(40))]

    /// Gate's and up's own row blocks, any number of rows, any order and any strides.
    #[test]
    fn gate_and_up_multiply_the_same_however_they_come(
        case in small_routings(),
        half in select(&[1, 7, 32, 65, 96, 128, 160, 192][..]),
        k in select(&[1usize, 64, 127, 200, 256][..]),
        format in select(&WeightFormat::ALL[..]),
        strides in crate::cases::strides(),
        seed: u64,
    ) {
        let experts = case.local_experts;
        let k = if format.bits() == 4 { k.next_multiple_of(32) } else { k };
        let weights = Weights::gate_up(format, [experts, half, k], seed);
        let cpu = Cpu::new();
        let mut parts = PackedWeightsBuilder::gate_up(&cpu, format, experts, half, k).unwrap();
        let mut fused = PackedWeightsBuilder::gate_up(&cpu, format, experts, half, k).unwrap();
        let order = GateUpOrder::Interleaved;
        for expert in (0..experts).rev() {
            for first_row in [half, 0] {
                match weights.part(expert, first_row, half) {
                    Part::E4m3(bytes, scales) => {
                        let rows = Strided::new(&bytes, half, k, strides, E4m3::NAN);
                        let scales = Strided::new(&scales, half.div_ceil(128), k.div_ceil(128), strides, f32::NAN);
                        parts.add_e4m3_rows(expert, first_row, rows.matrix(), scales.matrix()).unwrap();
                    }
                    Part::Bf16(values) => {
                        let rows = Strided::new(&values, half, k, strides, bf16::NAN);
                        parts.add_bf16_rows(expert, first_row, rows.matrix()).unwrap();
                    }
                    Part::Mxfp4(blocks, scales) => {
                        // In two parts that meet within a panel.
                        let cut = half / 3;
                        let parts_of = [(0, cut), (cut, half - cut)];
                        for (from, count) in parts_of.into_iter().filter(|&(_, count)| count > 0) {
                            let blocks = Strided::new(&blocks[from * k / 2..][..count * k / 2], count, k / 2, strides, 0xff);
                            let scales = Strided::new(&scales[from * k / 32..][..count * k / 32], count, k / 32, strides, 0xff);
                            let first_row = first_row + from;
                            parts.add_mxfp4_rows(expert, first_row, blocks.matrix(), scales.matrix()).unwrap();
                        }
                    }
                    Part::Int4(blocks, scales) => {
                        let cut = half / 3;
                        let parts_of = [(0, cut), (cut, half - cut)];
                        for (from, count) in parts_of.into_iter().filter(|&(_, count)| count > 0) {
                            let blocks = Strided::new(&blocks[from * k / 2..][..count * k / 2], count, k / 2, strides, 0xff);
                            let own = scales.part(from * k / 32..(from + count) * k / 32);
                            own.with([count, k / 32], strides, |scales| {
                                parts.add_int4_rows(expert, first_row + from, blocks.matrix(), scales).unwrap();
                            });
                        }
                    }
                }
            }
            match [weights.part(expert, 0, half), weights.part(expert, half, half)] {
                [Part::E4m3(gate, mut scales), Part::E4m3(up, up_scales)] => {
                    let rows = reordered(&[gate, up].concat(), half, k, order);
                    let rows = Strided::new(&rows, 2 * half, k, strides, E4m3::NAN);
                    scales.extend(up_scales);
                    let scales = Strided::new(&scales, 2 * half.div_ceil(128), k.div_ceil(128), strides, f32::NAN);
                    fused.add_gate_up_e4m3_rows(expert, rows.matrix(), scales.matrix(), order).unwrap();
                }
                [Part::Bf16(gate), Part::Bf16(up)] => {
                    let rows = reordered(&[gate, up].concat(), half, k, order);
                    let rows = Strided::new(&rows, 2 * half, k, strides, bf16::NAN);
                    fused.add_gate_up_bf16_rows(expert, rows.matrix(), order).unwrap();
                }
                [Part::Mxfp4(gate, gate_scales), Part::Mxfp4(up, up_scales)] => {
                    let blocks = reordered(&[gate, up].concat(), half, k / 2, order);
                    let scales = reordered(&[gate_scales, up_scales].concat(), half, k / 32, order);
                    let blocks = Strided::new(&blocks, 2 * half, k / 2, strides, 0xff);
                    let scales = Strided::new(&scales, 2 * half, k / 32, strides, 0xff);
                    fused.add_gate_up_mxfp4_rows(expert, blocks.matrix(), scales.matrix(), order).unwrap();
                }
                [Part::Int4(gate, gate_scales), Part::Int4(up, up_scales)] => {
                    let blocks = reordered(&[gate, up].concat(), half, k / 2, order);
                    let scales = gate_scales.joined(&up_scales).reordered(half, k / 32, order);
                    let blocks = Strided::new(&blocks, 2 * half, k / 2, strides, 0xff);
                    scales.with([2 * half, k / 32], strides, |scales| {
                        fused.add_gate_up_int4_rows(expert, blocks.matrix(), scales, order).unwrap();
                    });
                }
                _ => unreachable!("parts of one format"),
            }
        }
        let all = [
            weights.pack_in(&cpu, GateUpOrder::Halves),
            weights.pack_in(&cpu, GateUpOrder::Interleaved),
            parts.finish().unwrap(),
            fused.finish().unwrap(),
        ];
        case.with_layout(|layout, oracle_layout| {
            let rows = Rows::random(&oracle_layout.m_indices, k, None, seed);
            let m_indices = &oracle_layout.m_indices;
            let exact = oracle::gemm::grouped_gemm(&rows.meant, m_indices, 2 * half, k, |e, j, row| weights.row(e, j, row));
            for cpu in Isa::available().into_iter().map(Cpu::with_isa) {
                let [first, others @ ..] = all.each_ref().map(|packed| multiply(&cpu, layout, &rows, packed));
                for other in others {
                    prop_assert!(crate::cases::bits(&first) == crate::cases::bits(&other), "{}", cpu.isa());
                }
                let actual: Vec<f64> = first[..layout.m_sum() * 2 * half].iter().map(|value| value.to_f64()).collect();
                // Rows of two values have no direction to compare: those of K = 1 are compared as a whole below.
                if half > 1 {
                    within(BF16_GEMM, &actual, &exact, m_indices, 2 * half)?;
                }
                let (actual, exact) = (live(&actual, m_indices, 2 * half), live(&exact, m_indices, 2 * half));
                let slack = |sum: f64| sum.abs() / 200.0 + 1e-5;
                prop_assert!(actual.iter().zip(&exact).all(|(a, e)| (a - e).abs() <= slack(*e)), "{}", cpu.isa());
            }
            Ok(())
        })?;
    }

    /// f32 and f16 weights are those rounded to bf16 beforehand, through any strides.
    #[test]
    fn weights_of_other_types_are_rounded_to_the_nearest_bf16(
        n in select(&[1, 5, 33, 70][..]),
        k in select(&[1, 2, 9, 130][..]),
        strides in crate::cases::strides(),
        seed: u64,
    ) {
        fn rows_of<T: crate::cases::Number>(weights: &[f32], [n, k]: [usize; 2], strides: Strides) -> PackedWeights {
            let weights: Vec<T> = weights.iter().map(|&weight| T::nearest(weight)).collect();
            let rows = Strided::new(&weights, n, k, strides, T::nearest(f32::NAN));
            let mut builder = PackedWeightsBuilder::new(&Cpu::new(), WeightFormat::Bf16, 1, n, k).unwrap();
            builder.add_bf16_rows(0, 0, rows.matrix()).unwrap();
            builder.finish().unwrap()
        }
        let mut random = Random::new(seed);
        // f16 has these as well, so that the three differ in nothing but their type.
        let weights: Vec<f32> = (0..n * k).map(|_| half::f16::from_f32(random.normal()).to_f32()).collect();
        let rounded: Vec<f32> = weights.iter().map(|&weight| bf16::from_f32(weight).to_f32()).collect();
        let all = [
            rows_of::<f32>(&weights, [n, k], strides),
            rows_of::<half::f16>(&weights, [n, k], strides),
            rows_of::<bf16>(&rounded, [n, k], Strides::Contiguous),
        ];
        let case = RoutingCase { topk: 1, local_experts: 1, alignment: 1, ids: vec![0; 3], expert_map: None, slack: 0 };
        case.with_layout(|layout, oracle_layout| {
            let rows = Rows::random(&oracle_layout.m_indices, k, None, seed);
            let outs = all.each_ref().map(|packed| crate::cases::bits(&multiply(&Cpu::new(), layout, &rows, packed)));
            prop_assert!(outs[0] == outs[2] && outs[1] == outs[2]);
            Ok(())
        })?;
    }
}

/// A bias joins the sum before it is rounded, in live rows only; a bias of zero changes nothing.
#[test]
fn a_bias_is_added_to_the_f32_sum() {
    let (n, k) = (70, 2);
    let case = real_case();
    // 1 + 2^-9 alone would be rounded to 1, and with the bias' 3 * 2^-10 then to 1 again; together they pass the
    // middle.
    let (one, little) = (bf16::ONE, bf16::from_f32(2f32.powi(-9)));
    let weights: Vec<bf16> = (0..4 * n).flat_map(|_| [one, little]).collect();
    let bias: Vec<f32> = (0..4 * n)
        .map(|at| match at / n {
            1 => f32::NAN,
            expert => (expert + 1) as f32 * (at % n + 1) as f32 * 3.0 * 2f32.powi(-10),
        })
        .collect();
    case.with_layout(|layout, oracle_layout| {
        let m_indices = &oracle_layout.m_indices;
        let x: Vec<bf16> =
            m_indices.iter().flat_map(|&expert| [if expert < 0 { bf16::NAN } else { bf16::ONE }; 2]).collect();
        for cpu in machines() {
            let packed = PackedWeights::pack_bf16(&cpu, &weights, 4, n, k).unwrap();
            let multiply = |bias: Option<&[f32]>| {
                let bytes = grouped_gemm_workspace_bytes(layout.live_rows(), k, ActivationFormat::Bf16).unwrap();
                let mut out = vec![POISON; layout.m_sum() * n + 3];
                let rows = Activations::Bf16(&x);
                grouped_gemm_with_bias(&cpu, layout, rows, &packed, bias, &mut vec![0xff; bytes], &mut out).unwrap();
                out
            };
            let out = multiply(Some(&bias));
            for (row, &expert) in m_indices.iter().enumerate() {
                for column in 0..n {
                    let actual = out[row * n + column];
                    if expert < 0 {
                        prop_assert_eq!(actual.to_bits(), POISON.to_bits());
                        continue;
                    }
                    let sum = 1.0 + 2f32.powi(-9) + bias[expert as usize * n + column];
                    prop_assert_eq!(actual, bf16::from_f32(sum), "{} row {} column {}", cpu.isa(), row, column);
                }
            }
            prop_assert!(out[layout.m_sum() * n..].iter().all(|value| value.to_bits() == POISON.to_bits()));
            let (zero, none) = (multiply(Some(&vec![0.0; 4 * n])), multiply(None));
            prop_assert!(crate::cases::bits(&zero) == crate::cases::bits(&none));
        }
        Ok(())
    })
    .unwrap();
}

/// A column's own scale multiplies its sum once, before the bias: in one matrix and in gate and up, whole or in parts.
#[test]
fn a_scale_for_each_channel_multiplies_its_sums_once() {
    let (half, k) = (70, 256);
    let case = real_case();
    let weights = Weights::random(WeightFormat::E4m3, [4, 2 * half, k], 4);
    let mut random = Random::new(9);
    let scales: Vec<f32> = (0..4 * 2 * half).map(|_| 0.5 + random.uniform().abs()).collect();
    let bias: Vec<f32> = (0..4 * 2 * half).map(|_| random.normal()).collect();
    let bytes = |expert: usize, first: usize, rows: usize| match weights.part(expert, first, rows) {
        Part::E4m3(bytes, _) => bytes,
        Part::Bf16(_) | Part::Mxfp4(..) | Part::Int4(..) => unreachable!("e4m3 weights"),
    };
    case.with_layout(|layout, oracle_layout| {
        let m_indices = &oracle_layout.m_indices;
        let rows = Rows::random(m_indices, k, None, 5);
        let exact = oracle::gemm::grouped_gemm(&rows.meant, m_indices, 2 * half, k, |e, j, row| {
            let stored = bytes(e, 0, 2 * half);
            for (c, value) in row.iter_mut().enumerate() {
                let scale = f64::from(scales[e * 2 * half + j]);
                *value = oracle::quantize::e4m3_value(stored[j * k + c].0) * scale;
            }
        });
        let exact: Vec<f64> = exact
            .iter()
            .enumerate()
            .map(|(at, value)| match usize::try_from(m_indices[at / (2 * half)]) {
                Ok(expert) => value + f64::from(bias[expert * 2 * half + at % (2 * half)]),
                Err(_) => f64::NAN,
            })
            .collect();
        for cpu in machines() {
            // Whole, and gate and up apart, gate in two parts.
            let mut whole = PackedWeightsBuilder::new(&cpu, WeightFormat::E4m3, 4, 2 * half, k).unwrap();
            let mut parts = PackedWeightsBuilder::gate_up(&cpu, WeightFormat::E4m3, 4, half, k).unwrap();
            for expert in 0..4 {
                let pack = |builder: &mut PackedWeightsBuilder, first: usize, rows: usize| {
                    let stored = bytes(expert, first, rows);
                    let stored = Strided::new(&stored, rows, k, Strides::ColumnMajor, E4m3::NAN);
                    let own = &scales[expert * 2 * half + first..][..rows];
                    builder.add_e4m3_channel_rows(expert, first, stored.matrix(), own).unwrap();
                };
                pack(&mut whole, 0, 2 * half);
                for (first, rows) in [(half, half), (32, half - 32), (0, 32)] {
                    pack(&mut parts, first, rows);
                }
            }
            let mut outs = Vec::new();
            for packed in [whole.finish().unwrap(), parts.finish().unwrap()] {
                let bytes = grouped_gemm_workspace_bytes(layout.live_rows(), k, ActivationFormat::Bf16).unwrap();
                let mut out = vec![POISON; layout.m_sum() * 2 * half];
                let (x, workspace) = (rows.activations(), &mut vec![0xff; bytes]);
                grouped_gemm_with_bias(&cpu, layout, x, &packed, Some(&bias), workspace, &mut out).unwrap();
                let actual: Vec<f64> = out.iter().map(|value| value.to_f64()).collect();
                within(BF16_GEMM, &actual, &exact, m_indices, 2 * half)?;
                outs.push(crate::cases::bits(&out));
            }
            prop_assert!(outs[0] == outs[1], "{}", cpu.isa());
        }
        Ok(())
    })
    .unwrap();
}

/// Gate's and up's blocks, where 128 does not divide I, are not those of the two taken as one matrix.
#[test]
fn blocks_of_up_start_at_ups_first_row() {
    let (half, k, experts) = (192, 128, 2);
    let ones = vec![E4m3(0x38); experts * 2 * half * k];
    let scales: Vec<f32> = (1..=8u8).map(f32::from).collect();
    let case = RoutingCase { topk: 1, local_experts: 2, alignment: 1, ids: vec![0, 1], expert_map: None, slack: 0 };
    case.with_layout(|layout, _| {
        for cpu in machines() {
            let order = GateUpOrder::Halves;
            let packed = PackedWeights::pack_gate_up_e4m3(&cpu, &ones, &scales, experts, half, k, order).unwrap();
            let mut x = vec![bf16::ZERO; 2 * k];
            (x[5], x[k + 7]) = (bf16::ONE, bf16::ONE);
            let mut out = vec![POISON; 2 * 2 * half];
            let bytes = grouped_gemm_workspace_bytes(2, k, ActivationFormat::Bf16).unwrap();
            grouped_gemm(&cpu, layout, Activations::Bf16(&x), &packed, &mut vec![0; bytes], &mut out).unwrap();
            for (at, value) in out.iter().enumerate() {
                let (expert, column) = (at / (2 * half), at % (2 * half));
                let block = 4 * expert + column / half * 2 + column % half / 128;
                prop_assert_eq!(value.to_f32(), scales[block], "{} expert {} column {}", cpu.isa(), expert, column);
            }
        }
        Ok(())
    })
    .unwrap();
}

/// One expert of a few rows, one without, one with more than a block of rows.
fn real_case() -> RoutingCase {
    let ids = (0..120).map(|slot| [0, 2, 2, 2, 3, 2, -1, 2][slot % 8]).collect();
    RoutingCase { topk: 1, local_experts: 4, alignment: 16, ids, expert_map: None, slack: 1 }
}

#[test]
fn real_hidden_sizes_are_within_tolerance() {
    for (k, weights, scales) in [
        (2880, WeightFormat::Bf16, None),
        (2880, WeightFormat::E4m3, None),
        (3584, WeightFormat::E4m3, Some(ScaleFormat::HOPPER)),
        (7168, WeightFormat::E4m3, Some(ScaleFormat::HOPPER)),
        (7168, WeightFormat::Bf16, None),
    ] {
        check(&real_case(), [160, k], weights, scales, k as u64, &machines().collect::<Vec<_>>()).unwrap();
    }
}

#[test]
fn a_thousand_experts_are_within_tolerance() {
    let ids = (0..300).map(|slot| slot * 379 % 1024).collect();
    let case = RoutingCase { topk: 3, local_experts: 1024, alignment: 128, ids, expert_map: None, slack: 0 };
    let cpus: Vec<Cpu> = Isa::available().into_iter().map(Cpu::with_isa).collect();
    check(&case, [64, 128], WeightFormat::E4m3, Some(ScaleFormat::HOPPER), 5, &cpus).unwrap();
}

/// The smallest of everything: one row, one column, one value of K.
#[test]
fn single_values_are_multiplied_exactly() {
    let case = RoutingCase { topk: 1, local_experts: 1, alignment: 1, ids: vec![0], expert_map: None, slack: 0 };
    for cpu in machines() {
        case.with_layout(|layout, _| {
            let weights = PackedWeights::pack_bf16(&cpu, &[bf16::from_f32(-1.5)], 1, 1, 1).unwrap();
            let x = [bf16::from_f32(3.0)];
            let mut workspace = vec![0xff; grouped_gemm_workspace_bytes(1, 1, ActivationFormat::Bf16).unwrap()];
            let mut out = [POISON];
            grouped_gemm(&cpu, layout, Activations::Bf16(&x), &weights, &mut workspace, &mut out).unwrap();
            prop_assert_eq!(out[0].to_f32(), -4.5);
            Ok(())
        })
        .unwrap();
    }
}

/// A NaN or an infinity stays in its own row: the others have the bits they have without it.
#[test]
fn nan_and_infinity_stay_in_their_row() {
    let case = real_case();
    let (n, k) = (96, 256);
    case.with_layout(|layout, oracle_layout| {
        let m_indices = &oracle_layout.m_indices;
        let bad = (0..m_indices.len()).filter(|&row| m_indices[row] == 2).nth(5).expect("expert 2 has rows");
        for scales in [None, Some(ScaleFormat::HOPPER)] {
            let weights = Weights::random(WeightFormat::E4m3, [4, n, k], 1);
            let clean = Rows::random(m_indices, k, scales, 2);
            for cpu in machines() {
                let packed = weights.pack(&cpu);
                let expected = multiply(&cpu, layout, &clean, &packed);
                let mut rows = Rows::random(m_indices, k, scales, 2);
                match scales {
                    None => rows.bf16[bad * k + 77] = bf16::INFINITY,
                    Some(_) => rows.e4m3[bad * k + 77] = E4m3::NAN,
                }
                let out = multiply(&cpu, layout, &rows, &packed);
                for row in 0..m_indices.len() {
                    let (out, expected) = (&out[row * n..][..n], &expected[row * n..][..n]);
                    if row == bad {
                        prop_assert!(out.iter().all(|value| !value.is_finite()), "{}", cpu.isa());
                    } else {
                        prop_assert_eq!(crate::cases::bits(out), crate::cases::bits(expected), "{}", cpu.isa());
                    }
                }
            }
        }
        Ok(())
    })
    .unwrap();
}

/// Sums are promoted every 128 of K: block scales that differ by powers of ten do not drown each other's products.
#[test]
fn every_block_of_k_has_its_own_scales() {
    let (n, k) = (128, 512);
    let case = RoutingCase { topk: 1, local_experts: 1, alignment: 1, ids: vec![0; 20], expert_map: None, slack: 0 };
    let ones = vec![E4m3(0x38); n * k];
    case.with_layout(|layout, _| {
        let format = ScaleFormat::new(Group::G128, ScaleLayout::RowMajor, ScaleRounding::Exact).unwrap();
        for cpu in machines() {
            let weights = PackedWeights::pack_e4m3(&cpu, &ones, &[1.0, 16.0, 256.0, 0.0], 1, n, k).unwrap();
            let rows = vec![E4m3(0x38); 20 * k];
            let scales: Vec<f32> = (0..20u8)
                .flat_map(|row| [1.0, 0.0625, 0.0, 1e38].map(|scale| scale * f32::from(1 + row % 2)))
                .collect();
            let activations = Activations::E4m3 { rows: &rows, scales: Scales::f32(format, &scales) };
            let mut workspace = vec![0xff; grouped_gemm_workspace_bytes(20, k, ActivationFormat::E4m3).unwrap()];
            let mut out = vec![POISON; 20 * n];
            grouped_gemm(&cpu, layout, activations, &weights, &mut workspace, &mut out).unwrap();
            for (row, out) in out.chunks(n).enumerate() {
                // 128 * 1 * 1 + 128 * 16 / 16 + 0 + 0.
                let expected = 256.0 * (1 + row % 2) as f32;
                prop_assert!(out.iter().all(|value| value.to_f32() == expected), "{} row {}", cpu.isa(), row);
            }
        }
        Ok(())
    })
    .unwrap();
}

/// One-hot rows bring out the weights themselves: every e4m3 byte has its value, and a NaN is its column's alone.
#[test]
fn every_e4m3_byte_is_the_weight_it_stands_for() {
    let (n, k) = (4, 128);
    let mut bytes: Vec<u8> = (0..=255).collect();
    bytes.retain(|byte| byte & 0x7f != 0x7f);
    bytes.resize(3 * k, 0x38);
    bytes.extend([0x08; 128]);
    bytes[3 * k + 5] = 0xff;
    let stored: Vec<E4m3> = bytes.iter().map(|&byte| E4m3(byte)).collect();
    let case = RoutingCase { topk: 1, local_experts: 1, alignment: 1, ids: vec![0; k], expert_map: None, slack: 0 };
    let one_hot: Vec<bool> = (0..k * k).map(|i| i / k == i % k).collect();
    let bf16_rows: Vec<bf16> = one_hot.iter().map(|&hot| if hot { bf16::ONE } else { bf16::ZERO }).collect();
    let e4m3_rows: Vec<E4m3> = one_hot.iter().map(|&hot| E4m3(if hot { 0x38 } else { 0 })).collect();
    case.with_layout(|layout, _| {
        for cpu in machines() {
            let weights = PackedWeights::pack_e4m3(&cpu, &stored, &[0.5], 1, n, k).unwrap();
            let scales = Scales::f32(ScaleFormat::HOPPER, &[1.0; 128]);
            for activations in [Activations::Bf16(&bf16_rows), Activations::E4m3 { rows: &e4m3_rows, scales }] {
                let bytes_needed = grouped_gemm_workspace_bytes(k, k, activations.format()).unwrap();
                let mut out = vec![POISON; k * n];
                grouped_gemm(&cpu, layout, activations, &weights, &mut vec![0xff; bytes_needed], &mut out).unwrap();
                for (i, out) in out.iter().enumerate() {
                    let (row, column) = (i / n, i % n);
                    let expected = 0.5 * oracle::quantize::e4m3_value(bytes[column * k + row]);
                    if column == 3 {
                        prop_assert!(out.is_nan(), "{}: NaN times anything is NaN", cpu.isa());
                    } else {
                        prop_assert_eq!(out.to_f64(), expected, "{}: byte {}", cpu.isa(), bytes[column * k + row]);
                    }
                }
            }
        }
        Ok(())
    })
    .unwrap();
}
