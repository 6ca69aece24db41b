//! The activation: within a few units in the last place of f64, the same bits everywhere, padding untouched.

use crate::cases::{Number, bits, exact, fills, machines, numbers};
use crate::routings::{config, routings};
use expertile::cpu;
use expertile::{Activation, E4m3, Group, ScaleFormat, ScaleLayout, ScaleRounding, ScalesMut};
use expertile_oracle as oracle;
use expertile_testkit::Fill;
use half::{bf16, f16};
use proptest::prelude::*;
use proptest::sample::select;

const GPT_OSS: Activation = Activation::Swiglu { alpha: 1.702, beta: 1.0, limit: Some(7.0) };

fn activations() -> impl Strategy<Value = Activation> {
    select(vec![
        Activation::SWIGLU,
        GPT_OSS,
        Activation::Swiglu { alpha: 1.0, beta: 0.0, limit: Some(2.5) },
        Activation::Swiglu { alpha: 1.702, beta: 1.0, limit: None },
        Activation::GegluTanh,
        Activation::Relu2,
    ])
}

/// The same in the oracle's words.
pub(crate) fn in_f64(activation: Activation) -> oracle::activation::Activation {
    match activation {
        Activation::Swiglu { alpha, beta, limit } => oracle::activation::Activation::Swiglu {
            alpha: f64::from(alpha),
            beta: f64::from(beta),
            limit: limit.map(f64::from),
        },
        Activation::GegluTanh => oracle::activation::Activation::GegluTanh,
        Activation::Relu2 => oracle::activation::Activation::Relu2,
        other => unreachable!("the oracle does not know {other:?}"),
    }
}

/// Values of GEMM 1 to a row of `intermediate` activated ones.
fn columns(activation: Activation, intermediate: usize) -> usize {
    if activation.is_gated() { 2 * intermediate } else { intermediate }
}

/// Whether `actual` is the rounding to `O` of something within eight f32 units of `exact`, and within what the
/// rounding of what goes into the sigmoid (an error that the exponential makes relative) and holding the exponent near
/// zero cost; `1 + tanh` near zero is not exact in f64 either.
fn near<O: Number>(actual: O, exact: f64, activation: Activation, gate: f64, up: f64) -> bool {
    if exact.is_nan() {
        return actual.exact().is_nan();
    }
    let (inside, cancelled) = match activation {
        Activation::Swiglu { alpha, .. } => ((f64::from(alpha) * gate).abs(), 0.0),
        // Four roundings of 2 sqrt(2 / pi) (x + 0.044715 x^3), and the constant's own.
        _ => (5.0 * 1.6 * (gate + 0.044_715 * gate.powi(3)).abs(), 2f64.powi(-52)),
    };
    let units = 8.0 + inside;
    let held = 4e-38 * gate.abs() * (up.abs() + 1.0);
    let slack = units * 2f64.powi(-24) * exact.abs() + held + cancelled * (gate * up).abs();
    let (low, high) = (O::nearest((exact - slack) as f32), O::nearest((exact + slack) as f32));
    low.exact() <= actual.exact() && actual.exact() <= high.exact()
}

fn check_activate<O: Number>(
    case: &crate::routings::RoutingCase,
    intermediate: usize,
    fill: Fill,
    seed: u64,
    ours: Activation,
) -> Result<(), TestCaseError> {
    let (columns, theirs) = (columns(ours, intermediate), in_f64(ours));
    case.with_layout(|layout, _| {
        let gate_up: Vec<bf16> = numbers(layout.m_sum() * columns, fill, seed);
        let poison = O::nearest(-77.0);
        let mut first: Option<Vec<u32>> = None;
        for cpu in machines() {
            let mut out = vec![poison; layout.m_sum() * intermediate + 3];
            cpu::activate(&cpu, layout, intermediate, &gate_up, &ours, &mut out).unwrap();
            let bits = bits(&out);
            let first = first.get_or_insert_with(|| bits.clone());
            prop_assert_eq!(&bits, first, "{:?}, {} threads", cpu.isa(), cpu.threads());
            prop_assert!(bits[layout.m_sum() * intermediate..].iter().all(|&bits| bits == poison.bits()));
            for (row, &expert) in layout.m_indices().iter().enumerate() {
                for c in 0..intermediate {
                    let actual = out[row * intermediate + c];
                    if expert < 0 {
                        prop_assert_eq!(actual.bits(), poison.bits(), "padding row {} was touched", row);
                        continue;
                    }
                    let at = row * columns + c;
                    let gate = f64::from(gate_up[at].exact());
                    let up = if ours.is_gated() { f64::from(gate_up[at + intermediate].exact()) } else { 0.0 };
                    let exact = theirs.apply(gate, up);
                    prop_assert!(near(actual, exact, ours, gate, up), "{} {} -> {:?}, not {}", gate, up, actual, exact);
                }
            }
        }
        Ok(())
    })
}

proptest! {
    #![proptest_config(config(60))]

    #[test]
    fn activated_rows_are_near_f64_and_the_same_everywhere(
        case in routings(),
        intermediate in select(&[1, 7, 64, 200][..]),
        fill in select(&[Fill::Ordinary, Fill::Zeros][..]),
        seed: u64,
        activation in activations(),
    ) {
        check_activate::<bf16>(&case, intermediate, fill, seed, activation)?;
        check_activate::<f16>(&case, intermediate, fill, seed, activation)?;
        check_activate::<f32>(&case, intermediate, fill, seed, activation)?;
    }

    #[test]
    fn quantized_activations_are_the_f32_activations_quantized(
        case in routings(),
        seed: u64,
        fill in fills(),
        group in select(&[Group::G32, Group::G128][..]),
        layout_and_rounding in select(&[
            (ScaleLayout::RowMajor, ScaleRounding::Exact),
            (ScaleLayout::MnMajor, ScaleRounding::Exact),
            (ScaleLayout::MnMajor, ScaleRounding::PowerOfTwo),
            (ScaleLayout::PackedUe8m0, ScaleRounding::PowerOfTwo),
        ][..]),
        smallest in 1..=7usize,
        ours in activations(),
    ) {
        let format = ScaleFormat::new(group, layout_and_rounding.0, layout_and_rounding.1).unwrap();
        let intermediate = smallest * group.smallest();
        let blocks = intermediate.div_ceil(group.size());
        case.with_layout(|layout, oracle_layout| {
            let m_sum = layout.m_sum();
            let gate_up: Vec<bf16> = numbers(m_sum * columns(ours, intermediate), fill, seed);
            let mut activated = vec![0.0f32; m_sum * intermediate];
            cpu::activate(&cpu::Cpu::new(), layout, intermediate, &gate_up, &ours, &mut activated).unwrap();
            let power_of_two = format.rounding() == ScaleRounding::PowerOfTwo;
            let mut expected =
                oracle::quantize::quantize(&exact(&activated), intermediate, group.size(), power_of_two);
            for (row, &expert) in oracle_layout.m_indices.iter().enumerate() {
                if expert < 0 {
                    expected.bytes[row * intermediate..][..intermediate].fill(0xaa);
                    expected.scales[row * blocks..][..blocks].fill(0.0);
                }
            }
            let words = format.words(m_sum, intermediate).unwrap();
            for cpu in machines() {
                let mut out = vec![E4m3(0xaa); m_sum * intermediate + 3];
                let (mut f32_scales, mut ue8m0_scales) = (vec![7.0f32; words + 3], vec![7i32; words + 3]);
                let packed = format.layout() == ScaleLayout::PackedUe8m0;
                let scales = if packed { ScalesMut::ue8m0(format, &mut ue8m0_scales) } else { ScalesMut::f32(format, &mut f32_scales) };
                cpu::activate_quantize(&cpu, layout, intermediate, &gate_up, &ours, &mut out, scales).unwrap();
                let bytes: Vec<u8> = out.iter().map(|byte| byte.0).collect();
                prop_assert!(bytes[..m_sum * intermediate] == expected.bytes[..], "{:?}", cpu.isa());
                prop_assert_eq!(&bytes[m_sum * intermediate..], [0xaa; 3]);
                match format.layout() {
                    ScaleLayout::RowMajor => prop_assert_eq!(&f32_scales[..words], &expected.row_major()[..]),
                    ScaleLayout::MnMajor => prop_assert_eq!(&f32_scales[..words], &expected.mn_major()[..]),
                    ScaleLayout::PackedUe8m0 => prop_assert_eq!(&ue8m0_scales[..words], &expected.packed_ue8m0()[..]),
                }
                prop_assert!(f32_scales.ends_with(&[7.0; 3]) && ue8m0_scales.ends_with(&[7; 3]));
            }
            Ok(())
        })?;
    }
}

#[test]
fn nan_in_gives_nan_out_and_clamped_infinities_stay_finite() {
    let clamped = GPT_OSS;
    assert!(Activation::Relu2.apply(f32::NAN, 1.0).is_nan());
    for activation in [Activation::default(), clamped, Activation::GegluTanh] {
        assert!(activation.apply(f32::NAN, 1.0).is_nan());
        assert!(activation.apply(1.0, f32::NAN).is_nan());
        assert!(activation.apply(f32::NAN, f32::NAN).is_nan());
    }
    assert_eq!(clamped.apply(f32::INFINITY, f32::INFINITY), clamped.apply(7.0, 7.0));
    assert_eq!(clamped.apply(1.0, f32::NEG_INFINITY), clamped.apply(1.0, -7.0));
    assert_eq!(Activation::default().apply(f32::INFINITY, 2.0), f32::INFINITY);
}
