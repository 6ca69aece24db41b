//! MXFP4 as a format: decoding and quantizing against the oracle, bit for bit; packing moves bits and changes none.

use crate::cases::{Strided, strides};
use crate::routings::config;
use expertile::WeightFormat;
use expertile::cpu::{Cpu, PackedWeightsBuilder};
use expertile::mxfp4;
use expertile_oracle as oracle;
use expertile_testkit::Random;
use proptest::prelude::*;
use proptest::sample::select;

#[test]
fn every_nibble_with_every_scale_is_what_the_oracle_says() {
    for scale in 0..=255u8 {
        for nibble in 0..16u8 {
            let (actual, exact) = (mxfp4::decode(nibble, scale), oracle::mxfp4::e2m1_value(nibble));
            let exact = exact * oracle::quantize::ue8m0_value(scale);
            // f32 ends where the largest scales have not ended yet.
            let fits = exact.abs() <= f64::from(f32::MAX);
            let same = if fits { f64::from(actual) == exact } else { f64::from(actual).abs() == f64::INFINITY };
            assert!(same || (scale == 255 && actual.is_nan()), "{nibble} * 2^({scale} - 127): {actual}");
        }
    }
}

#[test]
fn every_bf16_is_quantized_to_the_nearest_nibble() {
    for bits in 0..=u16::MAX {
        let x = half::bf16::from_bits(bits).to_f32();
        if !x.is_nan() {
            assert_eq!(mxfp4::e2m1_nibble(x), oracle::mxfp4::e2m1_nibble(f64::from(x)), "{x}");
        }
        if x.is_finite() {
            assert_eq!(mxfp4::scale_byte(x.abs()), oracle::mxfp4::scale_byte(&[x]), "{x}");
        }
    }
}

/// Numbers of any size: of one another's, or bits at random.
fn numbers(random: &mut Random, count: usize, wild: bool) -> Vec<f32> {
    let number = |_| loop {
        let x = if wild { f32::from_bits(random.draw() as u32) } else { random.normal() };
        if x.is_finite() {
            return x;
        }
    };
    (0..count).map(number).collect()
}

proptest! {
    #![proptest_config(config(200))]

    #[test]
    fn rows_are_quantized_and_decoded_as_the_oracle_does(
        rows in 0..4usize,
        k in select(&[32, 64, 160][..]),
        wild: bool,
        seed: u64,
    ) {
        let mut random = Random::new(seed);
        let values = numbers(&mut random, rows * k, wild);
        let (mut blocks, mut scales) = (vec![0xa5; rows * k / 2], vec![0xa5; rows * k / 32]);
        mxfp4::quantize_rows(&values, k, &mut blocks, &mut scales).unwrap();
        let mut decoded = vec![f32::NAN; rows * k];
        mxfp4::decode_rows(&blocks, &scales, k, &mut decoded).unwrap();
        for row in 0..rows {
            let (own_blocks, own_scales) = oracle::mxfp4::quantize_row(&values[row * k..][..k]);
            prop_assert_eq!(&blocks[row * k / 2..][..k / 2], own_blocks);
            prop_assert_eq!(&scales[row * k / 32..][..k / 32], own_scales);
            let mut exact = vec![0.0; k];
            oracle::mxfp4::weight_row(&blocks, &scales, k, row, &mut exact);
            prop_assert!(decoded[row * k..][..k].iter().zip(&exact).all(|(a, e)| f64::from(*a) == *e));
        }
        // What comes out of quantizing does not change when it is quantized again, where it was not held to 6.
        let (mut again, mut again_scales) = (blocks.clone(), scales.clone());
        mxfp4::quantize_rows(&decoded, k, &mut again, &mut again_scales).unwrap();
        let mut twice = vec![f32::NAN; rows * k];
        mxfp4::decode_rows(&again, &again_scales, k, &mut twice).unwrap();
        prop_assert_eq!(twice, decoded);
    }

    /// Every nibble and every scale but NaN, through any strides, in two parts.
    #[test]
    fn packed_rows_come_back_as_they_came(
        intermediate in select(&[1, 5, 32, 33, 70][..]),
        k in select(&[32, 96, 160][..]),
        cut in 0.0..1.0f64,
        strides in strides(),
        seed: u64,
    ) {
        let (mut random, n, cpu) = (Random::new(seed), 2 * intermediate, Cpu::new());
        let blocks: Vec<u8> = (0..2 * n * k / 2).map(|_| random.draw() as u8).collect();
        let scales: Vec<u8> = (0..2 * n * k / 32).map(|_| (random.draw() % 255) as u8).collect();
        let mut builder = PackedWeightsBuilder::gate_up(&cpu, WeightFormat::Mxfp4, 2, intermediate, k).unwrap();
        let cut = (cut * n as f64) as usize;
        for (expert, from, to) in [(1, cut, n), (0, 0, n), (1, 0, cut)] {
            let (first, count) = (expert * n + from, to - from);
            if count > 0 {
                let own = Strided::new(&blocks[first * k / 2..][..count * k / 2], count, k / 2, strides, 0xff);
                let own_scales = Strided::new(&scales[first * k / 32..][..count * k / 32], count, k / 32, strides, 0xff);
                builder.add_mxfp4_rows(expert, from, own.matrix(), own_scales.matrix()).unwrap();
            }
        }
        let packed = builder.finish().unwrap();
        let padded = 4 * intermediate.next_multiple_of(32);
        prop_assert_eq!(packed.bytes(), padded * (k / 2 + k / 32), "4.25 bits a weight");
        for expert in 0..2 {
            for (from, to) in [(0, n), (cut, n), (0, cut)] {
                let (first, count) = (expert * n + from, to - from);
                let (mut out, mut out_scales) = (vec![0; count * k / 2], vec![0; count * k / 32]);
                packed.unpack_mxfp4_rows(&cpu, expert, from, &mut out, &mut out_scales).unwrap();
                prop_assert_eq!(&out, &blocks[first * k / 2..][..count * k / 2]);
                prop_assert_eq!(&out_scales, &scales[first * k / 32..][..count * k / 32]);
            }
        }
    }
}
