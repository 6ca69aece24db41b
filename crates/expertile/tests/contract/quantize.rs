//! The definitions of a quantized value and its scale, against search.

use crate::routings::config;
use expertile::quantize::{quantize_value, scale_of, ue8m0_byte, ue8m0_value};
use expertile::{E4m3, ScaleRounding};
use expertile_oracle::quantize as oracle;
use proptest::prelude::*;

#[test]
fn every_e4m3_byte_has_the_value_of_its_definition() {
    for byte in 0..=255u8 {
        let (actual, expected) = (f64::from(E4m3(byte).to_f32()), oracle::e4m3_value(byte));
        assert!(actual == expected || (actual.is_nan() && expected.is_nan()), "{byte:#04x}: {actual} {expected}");
        assert_eq!(E4m3(byte).is_nan(), expected.is_nan());
    }
}

#[test]
fn every_ue8m0_byte_has_the_value_of_its_definition() {
    for byte in 0..=255u8 {
        let (actual, expected) = (f64::from(ue8m0_value(byte)), oracle::ue8m0_value(byte));
        assert!(actual == expected || (actual.is_nan() && expected.is_nan()), "{byte}: {actual} {expected}");
    }
    for exponent in -126..=127 {
        let scale = 2f32.powi(exponent);
        assert_eq!(ue8m0_byte(scale), oracle::ue8m0_byte(scale));
    }
    assert_eq!(ue8m0_byte(f32::INFINITY), oracle::ue8m0_byte(f32::INFINITY));
}

#[test]
fn every_bf16_value_rounds_to_the_nearest_e4m3() {
    for high in 0..=0xffffu32 {
        let x = f32::from_bits(high << 16);
        assert_eq!(E4m3::from_f32(x).0, oracle::e4m3_byte(x), "{x} ({:#010x})", x.to_bits());
    }
}

proptest! {
    #![proptest_config(config(20_000))]

    #[test]
    fn any_f32_rounds_to_the_nearest_e4m3(bits: u32, byte: u8, nudge in -2..=2i32) {
        let x = f32::from_bits(bits);
        prop_assert_eq!(E4m3::from_f32(x).0, oracle::e4m3_byte(x));
        // Next to the middle between two neighbours, where a rounding is decided.
        let (low, high) = (oracle::e4m3_value(byte), oracle::e4m3_value(byte.wrapping_add(1)));
        let middle = f32::from_bits((((low + high) / 2.0) as f32).to_bits().wrapping_add_signed(nudge));
        prop_assert_eq!(E4m3::from_f32(middle).0, oracle::e4m3_byte(middle), "{}", middle);
    }

    #[test]
    fn any_group_has_the_oracles_scale(amax in any::<u32>().prop_map(|bits| f32::from_bits(bits & 0x7fff_ffff))) {
        prop_assume!(!amax.is_nan());
        for (rounding, power_of_two) in [(ScaleRounding::Exact, false), (ScaleRounding::PowerOfTwo, true)] {
            let expected = oracle::scale(&[amax], power_of_two);
            prop_assert_eq!(scale_of(amax, rounding).to_bits(), expected.to_bits(), "{} {:?}", amax, rounding);
            if power_of_two {
                prop_assert_eq!(ue8m0_byte(expected), oracle::ue8m0_byte(expected));
            }
        }
    }

    #[test]
    fn a_value_is_divided_by_its_scale_and_never_multiplied_by_a_reciprocal(x: f32, amax in 1e-10f32..1e30) {
        let scale = scale_of(amax, ScaleRounding::Exact);
        prop_assert_eq!(quantize_value(x, scale).0, oracle::e4m3_byte(x / scale));
    }
}
