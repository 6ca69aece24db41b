//! int4 as a format: decoding and quantizing against the oracle, bit for bit; packing moves bits and changes none.

use crate::cases::{Strided, strides};
use crate::routings::config;
use crate::weights::Halves;
use expertile::WeightFormat;
use expertile::cpu::{Cpu, PackedWeightsBuilder};
use expertile::int4;
use expertile_oracle as oracle;
use expertile_testkit::Random;
use half::bf16;
use proptest::prelude::*;
use proptest::sample::select;

#[test]
fn every_nibble_is_what_the_oracle_says() {
    for bits in (0..=u16::MAX).step_by(7) {
        let scale = bf16::from_bits(bits);
        for nibble in 0..16u8 {
            let mut exact = [0.0];
            oracle::int4::weight_row(&[nibble], &[scale.to_f64()], 1, 0, &mut exact);
            let decoded = f64::from(int4::decode(nibble, scale.to_f32()));
            let past = exact[0].abs() > f64::from(f32::MAX) && decoded.is_infinite();
            assert!(decoded == exact[0] || past || (decoded.is_nan() && exact[0].is_nan()), "{nibble} * {scale}");
        }
    }
}

proptest! {
    #![proptest_config(config(200))]

    #[test]
    fn rows_are_quantized_as_the_oracle_does(rows in 0..4usize, k in select(&[32, 64, 160][..]), seed: u64) {
        let mut random = Random::new(seed);
        let size = [1.0, 1e-30, 1e30][random.below(3)];
        let values: Vec<f32> = (0..rows * k).map(|_| size * random.normal()).collect();
        let (mut blocks, mut scales) = (vec![0xa5; rows * k / 2], vec![bf16::NAN; rows * k / 32]);
        int4::quantize_rows(&values, k, &mut blocks, &mut scales).unwrap();
        for row in 0..rows {
            let own = &values[row * k..][..k];
            let expected: Vec<bf16> = own.chunks(32).map(oracle::int4::scale).map(bf16::from_f32).collect();
            prop_assert_eq!(&scales[row * k / 32..][..k / 32], &expected[..]);
            let exact: Vec<f64> = expected.iter().map(|scale| scale.to_f64()).collect();
            let nearest = oracle::int4::quantize_row(own, &exact);
            for (at, (&found, &nearest)) in blocks[row * k / 2..][..k / 2].iter().zip(&nearest).enumerate() {
                for up in [0, 4] {
                    let [found, nearest] = [found, nearest].map(|byte| byte >> up & 15);
                    // A quotient that rounds to the middle in f32 may go either way.
                    let (value, scale) = (f64::from(own[2 * at + up / 4]), exact[at / 16]);
                    let tie = scale != 0.0 && ((value / scale).fract().abs() - 0.5).abs() < 1e-6;
                    prop_assert!(found == nearest || (tie && found.abs_diff(nearest) == 1), "{}: {} {}", at, found, nearest);
                }
            }
        }
    }

    /// Every nibble, scales of either type, through any strides, in two parts.
    #[test]
    fn packed_rows_come_back_as_they_came(
        intermediate in select(&[1, 5, 32, 33, 70][..]),
        k in select(&[32, 96, 160][..]),
        cut in 0.0..1.0f64,
        strides in strides(),
        are_f16: bool,
        seed: u64,
    ) {
        let (mut random, n, cpu) = (Random::new(seed), 2 * intermediate, Cpu::new());
        let blocks: Vec<u8> = (0..2 * n * k / 2).map(|_| random.draw() as u8).collect();
        let scales: Vec<f32> = (0..2 * n * k / 32).map(|_| random.normal()).collect();
        let scales = Halves::new(&scales, are_f16);
        let mut builder = PackedWeightsBuilder::gate_up(&cpu, WeightFormat::Int4, 2, intermediate, k).unwrap();
        let cut = (cut * n as f64) as usize;
        for (expert, from, to) in [(1, cut, n), (0, 0, n), (1, 0, cut)] {
            let (first, count) = (expert * n + from, to - from);
            if count > 0 {
                let own = Strided::new(&blocks[first * k / 2..][..count * k / 2], count, k / 2, strides, 0xff);
                let own_scales = scales.part(first * k / 32..(first + count) * k / 32);
                own_scales.with([count, k / 32], strides, |scales| {
                    builder.add_int4_rows(expert, from, own.matrix(), scales).unwrap();
                });
            }
        }
        let packed = builder.finish().unwrap();
        let padded = 4 * intermediate.next_multiple_of(32);
        prop_assert_eq!(packed.bytes(), padded * (k / 2 + k / 16), "4.5 bits a weight");
        for expert in 0..2 {
            for (from, to) in [(0, n), (cut, n), (0, cut)] {
                let (first, count) = (expert * n + from, to - from);
                let mut out = vec![0; count * k / 2];
                packed.unpack_int4_rows(&cpu, expert, from, &mut out).unwrap();
                prop_assert_eq!(&out, &blocks[first * k / 2..][..count * k / 2]);
            }
        }
    }
}
