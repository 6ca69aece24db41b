//! Permuted rows and scales, bit for bit, in poisoned buffers.

use crate::cases::{Number, Strided, Strides, exact, fills, machines, numbers, strides};
use crate::routings::{RoutingCase, config, routings, routings_of_one_slot};
use expertile::cpu::{self, Cpu, RowScales};
use expertile::{E4m3, Group, Layout, Padding, RowElement, ScaleFormat, ScaleLayout, ScaleRounding, ScalesMut};
use expertile_oracle as oracle;
use expertile_testkit::{Fill, Random};
use half::{bf16, f16};
use proptest::prelude::*;
use proptest::sample::select;

const POISON: u8 = 0xaa;
const F32_POISON: f32 = f32::from_bits(0xdead_beef);
const I32_POISON: i32 = 0x5a5a_5a5a;
/// Elements past the end of every output that nobody may touch.
const TAIL: usize = 7;

fn formats() -> Vec<ScaleFormat> {
    use ScaleLayout::{MnMajor, PackedUe8m0, RowMajor};
    use ScaleRounding::{Exact, PowerOfTwo};
    let mut formats = Vec::new();
    for group in [Group::G32, Group::G128] {
        for (layout, rounding) in [
            (RowMajor, Exact),
            (RowMajor, PowerOfTwo),
            (MnMajor, Exact),
            (MnMajor, PowerOfTwo),
            (PackedUe8m0, PowerOfTwo),
        ] {
            formats.push(ScaleFormat::new(group, layout, rounding).unwrap());
        }
    }
    formats
}

/// A format and a hidden size its group divides.
fn formats_and_hidden() -> impl Strategy<Value = (ScaleFormat, usize)> {
    select(formats()).prop_flat_map(|format| {
        let sizes: &[usize] = match format.group() {
            // 2880 leaves two groups in the last packed word, 32 a single one.
            Group::G32 => &[32, 64, 160, 512, 2880],
            Group::G128 => &[64, 128, 192, 256, 640, 2880, 3584],
        };
        (Just(format), select(sizes))
    })
}

fn paddings() -> impl Strategy<Value = Padding> {
    select(&[Padding::Untouched, Padding::Zero][..])
}

/// Poisoned rows and scales, and what they must hold afterwards.
struct Outputs {
    rows: Vec<E4m3>,
    f32_scales: Vec<f32>,
    ue8m0_scales: Vec<i32>,
    format: ScaleFormat,
    words: usize,
}

impl Outputs {
    fn poisoned(format: ScaleFormat, m_sum: usize, hidden: usize) -> Self {
        let words = format.words(m_sum, hidden).unwrap();
        Self {
            rows: vec![E4m3(POISON); m_sum * hidden + TAIL],
            f32_scales: vec![F32_POISON; words + TAIL],
            ue8m0_scales: vec![I32_POISON; words + TAIL],
            format,
            words,
        }
    }

    fn split(&mut self) -> (&mut [E4m3], ScalesMut<'_>) {
        let scales = match self.format.layout() {
            ScaleLayout::PackedUe8m0 => ScalesMut::ue8m0(self.format, &mut self.ue8m0_scales),
            _ => ScalesMut::f32(self.format, &mut self.f32_scales),
        };
        (&mut self.rows, scales)
    }

    /// Compares with the oracle's rows and scales.
    fn check(
        &self,
        expected: &oracle::quantize::Quantized,
        m_indices: &[i32],
        padding: Padding,
    ) -> Result<(), TestCaseError> {
        let hidden = expected.width;
        for (row, &expert) in m_indices.iter().enumerate() {
            let actual: Vec<u8> = self.rows[row * hidden..][..hidden].iter().map(|byte| byte.0).collect();
            let wanted = match (expert, padding) {
                (-1, Padding::Untouched) => vec![POISON; hidden],
                _ => expected.bytes[row * hidden..][..hidden].to_vec(),
            };
            prop_assert_eq!(actual, wanted, "row {}, expert {}", row, expert);
        }
        prop_assert!(self.rows[m_indices.len() * hidden..].iter().all(|byte| byte.0 == POISON), "rows past M_sum");
        let wanted: Vec<u32> = match self.format.layout() {
            ScaleLayout::RowMajor => expected.row_major().iter().map(|scale| scale.to_bits()).collect(),
            ScaleLayout::MnMajor => expected.mn_major().iter().map(|scale| scale.to_bits()).collect(),
            ScaleLayout::PackedUe8m0 => expected.packed_ue8m0().iter().map(|&word| word as u32).collect(),
        };
        let (actual, poison): (Vec<u32>, u32) = match self.format.layout() {
            ScaleLayout::PackedUe8m0 => {
                (self.ue8m0_scales.iter().map(|&word| word as u32).collect(), I32_POISON as u32)
            }
            _ => (self.f32_scales.iter().map(|scale| scale.to_bits()).collect(), F32_POISON.to_bits()),
        };
        prop_assert_eq!(wanted.len(), self.words, "words of scales");
        prop_assert_eq!(&actual[..self.words], &wanted[..]);
        prop_assert!(actual[self.words..].iter().all(|&word| word == poison), "scales past their end");
        Ok(())
    }
}

/// What a caller may choose, apart from the routing.
#[derive(Debug, Clone, Copy)]
struct Choice {
    format: ScaleFormat,
    hidden: usize,
    fill: Fill,
    seed: u64,
    strides: Strides,
    padding: Padding,
}

fn choices() -> impl Strategy<Value = Choice> {
    (formats_and_hidden(), fills(), any::<u64>(), strides(), paddings()).prop_map(
        |((format, hidden), fill, seed, strides, padding)| Choice { format, hidden, fill, seed, strides, padding },
    )
}

fn check_quantize_permute<T: Number>(case: &RoutingCase, choice: Choice, weighted: bool) -> Result<(), TestCaseError> {
    let Choice { format, hidden, fill, seed, strides, padding } = choice;
    let x: Vec<T> = numbers(case.tokens() * hidden, fill, seed);
    let weights: Vec<f32> = numbers(case.tokens(), Fill::Ordinary, !seed);
    let matrix = Strided::new(&x, case.tokens(), hidden, strides, T::nearest(f32::NAN));
    let weight_matrix = Strided::new(&weights, case.tokens(), 1, strides, f32::NAN);
    let multiplied: Vec<f32> = exact(&x)
        .iter()
        .enumerate()
        .map(|(i, &x)| if weighted { T::nearest(weights[i / hidden] * x).exact() } else { x })
        .collect();
    case.with_layout(|layout, oracle_layout| {
        let power_of_two = format.rounding() == ScaleRounding::PowerOfTwo;
        let group = format.group().size();
        let expected =
            oracle::quantize::quantize_permute(&multiplied, hidden, case.topk, oracle_layout, group, power_of_two);
        for cpu in machines() {
            let mut outputs = Outputs::poisoned(format, layout.m_sum(), hidden);
            let (rows, scales) = outputs.split();
            let weights = weighted.then(|| weight_matrix.matrix());
            cpu::quantize_permute(&cpu, matrix.matrix(), weights, layout, padding, rows, scales).unwrap();
            outputs.check(&expected, layout.m_indices(), padding)?;
        }
        Ok(())
    })
}

fn check_rows<T: RowElement + PartialEq + std::fmt::Debug>(
    case: &RoutingCase,
    width: usize,
    strides: Strides,
    padding: Padding,
    seed: u64,
    poison: T,
) -> Result<(), TestCaseError> {
    let mut random = Random::new(seed);
    let mut x = vec![T::zeroed(); case.tokens() * width];
    bytemuck::cast_slice_mut(&mut x).fill_with(|| random.draw() as u8);
    let matrix = Strided::new(&x, case.tokens(), width, strides, poison);
    case.with_layout(|layout, oracle_layout| {
        let gap = if padding == Padding::Zero { T::zeroed() } else { poison };
        let mut expected = oracle_layout.permute(&x, width, case.topk, gap);
        expected.extend([poison; TAIL]);
        for cpu in machines() {
            let mut out = vec![poison; layout.m_sum() * width + TAIL];
            cpu::permute_rows(&cpu, matrix.matrix(), layout, padding, &mut out).unwrap();
            // Bits and not values: any bits are moved, NaN among them.
            let (actual, expected): (&[u8], &[u8]) = (bytemuck::cast_slice(&out), bytemuck::cast_slice(&expected));
            prop_assert!(actual == expected, "{:?}", cpu.isa());
        }
        Ok(())
    })
}

fn check_convert<T: Number, O: Number>(
    case: &RoutingCase,
    width: usize,
    strides: Strides,
    padding: Padding,
    (fill, seed): (Fill, u64),
    weighted: bool,
) -> Result<(), TestCaseError> {
    let x: Vec<T> = numbers(case.tokens() * width, fill, seed);
    let weights: Vec<f32> = numbers(case.tokens(), Fill::Ordinary, !seed);
    let matrix = Strided::new(&x, case.tokens(), width, strides, T::nearest(f32::NAN));
    let weight_matrix = Strided::new(&weights, case.tokens(), 1, strides, f32::NAN);
    let converted: Vec<u32> = x
        .iter()
        .enumerate()
        .map(|(i, &x)| if weighted { T::nearest(weights[i / width] * x.exact()) } else { x })
        .map(|x| O::nearest(x.exact()).bits())
        .collect();
    let poison = O::nearest(-77.0);
    case.with_layout(|layout, oracle_layout| {
        let gap = if padding == Padding::Zero { 0 } else { poison.bits() };
        let expected = oracle_layout.permute(&converted, width, case.topk, gap);
        for cpu in machines() {
            let mut out = vec![poison; layout.m_sum() * width + TAIL];
            let weights = weighted.then(|| weight_matrix.matrix());
            cpu::permute_convert(&cpu, matrix.matrix(), weights, layout, padding, &mut out).unwrap();
            prop_assert_eq!(&crate::cases::bits(&out[..expected.len()]), &expected, "{:?}", cpu.isa());
            prop_assert!(out[expected.len()..].iter().all(|value| value.bits() == poison.bits()));
        }
        Ok(())
    })
}

proptest! {
    #![proptest_config(config(100))]

    #[test]
    fn bf16_rows_are_quantized_to_the_oracles_bits(case in routings(), choice in choices()) {
        check_quantize_permute::<bf16>(&case, choice, false)?;
    }

    #[test]
    fn f16_rows_are_quantized_to_the_oracles_bits(case in routings(), choice in choices()) {
        check_quantize_permute::<f16>(&case, choice, false)?;
    }

    #[test]
    fn f32_rows_are_quantized_to_the_oracles_bits(case in routings(), choice in choices()) {
        check_quantize_permute::<f32>(&case, choice, false)?;
    }

    #[test]
    fn router_weights_on_the_input_multiply_it_beforehand(case in routings_of_one_slot(), choice in choices()) {
        check_quantize_permute::<bf16>(&case, choice, true)?;
        check_quantize_permute::<f16>(&case, choice, true)?;
        check_quantize_permute::<f32>(&case, choice, true)?;
    }

    #[test]
    fn ready_e4m3_rows_keep_their_bytes_and_scales(
        case in routings(), choice in choices(), scale_strides in strides(),
    ) {
        let Choice { format, hidden, seed, strides, padding, .. } = choice;
        let (tokens, groups) = (case.tokens(), hidden.div_ceil(format.group().size()));
        let mut random = Random::new(seed);
        let bytes: Vec<u8> = (0..tokens * hidden).map(|_| random.draw() as u8).collect();
        let packed = format.layout() == ScaleLayout::PackedUe8m0;
        let exponents: Vec<u8> = (0..tokens * groups).map(|_| random.draw() as u8).collect();
        // Any f32 at all for the f32 layouts; for the packed one what the exponents mean.
        let scales: Vec<f32> = exponents.iter().map(|&byte| match byte {
            _ if !packed => f32::from_bits(random.draw() as u32),
            255 => f32::INFINITY,
            _ => oracle::quantize::ue8m0_value(byte) as f32,
        }).collect();
        let e4m3: Vec<E4m3> = bytes.iter().map(|&byte| E4m3(byte)).collect();
        let x = Strided::new(&e4m3, tokens, hidden, strides, E4m3(0x11));
        let f32_scales = Strided::new(&scales, tokens, groups, scale_strides, 123.0);
        let ue8m0_scales = Strided::new(&exponents, tokens, groups, scale_strides, 0x11);
        let ready = oracle::quantize::Quantized { bytes, scales, width: hidden, group: format.group().size() };
        case.with_layout(|layout, oracle_layout| {
            let expected = oracle::quantize::permute_quantized(&ready, case.topk, oracle_layout);
            for cpu in machines() {
                let mut outputs = Outputs::poisoned(format, layout.m_sum(), hidden);
                let (rows, scales) = outputs.split();
                let x_scales = if packed {
                    RowScales::Ue8m0(ue8m0_scales.matrix())
                } else {
                    RowScales::F32(f32_scales.matrix())
                };
                cpu::permute_quantized(&cpu, x.matrix(), x_scales, layout, padding, rows, scales).unwrap();
                outputs.check(&expected, layout.m_indices(), padding)?;
            }
            Ok(())
        })?;
    }

    #[test]
    fn rows_that_stand_in_their_place_are_quantized_there(case in routings(), choice in choices()) {
        let Choice { format, hidden, fill, seed, strides, padding: _ } = choice;
        case.with_layout(|layout, oracle_layout| {
            let x: Vec<bf16> = numbers(layout.m_sum() * hidden, fill, seed);
            let matrix = Strided::new(&x, layout.m_sum(), hidden, strides, bf16::NAN);
            let power_of_two = format.rounding() == ScaleRounding::PowerOfTwo;
            let mut expected =
                oracle::quantize::quantize(&exact(&x), hidden, format.group().size(), power_of_two);
            let groups = hidden.div_ceil(format.group().size());
            for (row, _) in oracle_layout.m_indices.iter().enumerate().filter(|(_, expert)| **expert < 0) {
                expected.scales[row * groups..][..groups].fill(0.0);
            }
            for cpu in machines() {
                let mut outputs = Outputs::poisoned(format, layout.m_sum(), hidden);
                let (rows, scales) = outputs.split();
                cpu::quantize_rows(&cpu, matrix.matrix(), layout, rows, scales).unwrap();
                outputs.check(&expected, layout.m_indices(), Padding::Untouched)?;
            }
            Ok(())
        })?;
    }

    #[test]
    fn rows_of_any_element_and_any_width_are_moved_bit_for_bit(
        case in routings(),
        width in select(&[1, 3, 17, 64, 130, 2880][..]),
        strides in strides(),
        padding in paddings(),
        seed: u64,
    ) {
        check_rows(&case, width, strides, padding, seed, POISON)?;
        check_rows(&case, width, strides, padding, seed, E4m3(POISON))?;
        check_rows(&case, width, strides, padding, seed, bf16::from_bits(0xaaaa))?;
        check_rows(&case, width, strides, padding, seed, f16::from_bits(0xaaaa))?;
        check_rows(&case, width, strides, padding, seed, F32_POISON)?;
        check_rows(&case, width, strides, padding, seed, I32_POISON)?;
    }

    #[test]
    fn rows_are_converted_to_the_nearest_value(
        case in routings(),
        width in select(&[1, 5, 96, 384][..]),
        strides in strides(),
        padding in paddings(),
        fill in fills(),
        seed: u64,
    ) {
        check_convert::<f32, bf16>(&case, width, strides, padding, (fill, seed), false)?;
        check_convert::<f16, bf16>(&case, width, strides, padding, (fill, seed), false)?;
        check_convert::<bf16, bf16>(&case, width, strides, padding, (fill, seed), false)?;
        check_convert::<bf16, f32>(&case, width, strides, padding, (fill, seed), false)?;
    }

    #[test]
    fn weighted_rows_are_rounded_to_their_own_type_before_they_are_converted(
        case in routings_of_one_slot(),
        width in select(&[1, 5, 96][..]),
        strides in strides(),
        padding in paddings(),
        fill in fills(),
        seed: u64,
    ) {
        check_convert::<f32, bf16>(&case, width, strides, padding, (fill, seed), true)?;
        check_convert::<f16, bf16>(&case, width, strides, padding, (fill, seed), true)?;
        check_convert::<bf16, bf16>(&case, width, strides, padding, (fill, seed), true)?;
    }
}

/// A routing large enough that rows are written past the cache, on rows of `H` values that start anywhere.
#[test]
fn large_buffers_hold_the_same_bits_as_small_ones() {
    let (tokens, topk, experts) = (160usize, 8usize, 16usize);
    let ids: Vec<i64> = (0..tokens * topk).map(|slot| ((slot * 7 + slot / topk) % experts) as i64).collect();
    let case = RoutingCase { topk, local_experts: experts, alignment: 7, ids, expert_map: None, slack: 1 };
    for width in [7168, 7169] {
        check_rows(&case, width, Strides::Contiguous, Padding::Zero, 5, bf16::from_bits(0xaaaa)).unwrap();
        check_rows(&case, width, Strides::GapsEverywhere, Padding::Untouched, 6, POISON).unwrap();
    }
    let choice = Choice {
        format: ScaleFormat::HOPPER,
        hidden: 7168,
        fill: Fill::Ordinary,
        seed: 7,
        strides: Strides::Contiguous,
        padding: Padding::Zero,
    };
    check_quantize_permute::<bf16>(&case, choice, false).unwrap();
}

/// Rows a dispatcher has already expanded: nothing to permute, and nothing is.
#[test]
fn a_psum_layout_permutes_no_rows_but_still_clears_its_scales() {
    let mut space = [0; 1 + 1 + 1 + 8];
    let layout = Layout::from_psum(&[3], 8, 8, &mut space).unwrap();
    let nothing: [bf16; 0] = [];
    let x = expertile::MatrixRef::new(&nothing[..], 0, 128).unwrap();
    let mut outputs = Outputs::poisoned(ScaleFormat::HOPPER, 8, 128);
    let (rows, scales) = outputs.split();
    cpu::quantize_permute(&Cpu::new(), x, None, &layout, Padding::Zero, rows, scales).unwrap();
    assert!(outputs.rows[..3 * 128].iter().all(|byte| byte.0 == POISON), "live rows are the dispatcher's");
    assert!(outputs.rows[3 * 128..8 * 128].iter().all(|byte| byte.0 == 0));
    assert_eq!(outputs.f32_scales[3..8], [0.0; 5]);
}
