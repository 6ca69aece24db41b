//! Rows of tokens, ordinary and hostile.

use crate::Random;
use half::{bf16, f16};

/// `len` values evenly spread with unit variance, each through `round`.
pub fn unit_rows<T>(random: &mut Random, len: usize, round: impl Fn(f32) -> T) -> Vec<T> {
    (0..len).map(|_| round(3f32.sqrt() * random.uniform())).collect()
}

/// What rows are filled with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fill {
    /// Normal numbers whose size differs from run to run of 32.
    Ordinary,
    /// Among them NaN, infinities, zeros of both signs, subnormals and the largest numbers.
    Special,
    /// Any bits.
    Bits,
    /// Zeros.
    Zeros,
}

/// `len` values, each through `round`.
pub fn numbers<T>(random: &mut Random, len: usize, fill: Fill, round: impl Fn(f32) -> T) -> Vec<T> {
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
    let mut size = 1.0;
    (0..len)
        .map(|i| {
            if i % 32 == 0 {
                size = 2f32.powi(random.below(24) as i32 - 12);
            }
            round(match fill {
                Fill::Zeros => 0.0,
                Fill::Bits => f32::from_bits(random.draw() as u32),
                Fill::Special if random.one_in(40) => random.of(&SPECIAL),
                _ => size * random.normal(),
            })
        })
        .collect()
}

/// A type of 16 bits, whose values are kept as bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Half {
    /// bfloat16.
    Bf16,
    /// IEEE binary16.
    F16,
}

impl Half {
    /// The bits of the nearest value.
    pub fn bits(self, x: f32) -> u16 {
        match self {
            Self::Bf16 => bf16::from_f32(x).to_bits(),
            Self::F16 => f16::from_f32(x).to_bits(),
        }
    }

    /// Mostly a number, now and then one of the special ones: NaNs, an infinity, the largest number, subnormals, zeros.
    pub fn hostile(self, random: &mut Random) -> u16 {
        let (infinity, largest) = match self {
            Self::Bf16 => (0xff80, 0x7f7f),
            Self::F16 => (0xfc00, 0x7bff),
        };
        if random.one_in(97) {
            random.of(&[0x7fff, infinity, 1, 0x8001, 0x8000, largest, 0xffc1, 0])
        } else {
            self.bits(random.spread())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hostile_halves_hold_every_special_value_and_mostly_numbers() {
        for half in [Half::Bf16, Half::F16] {
            let mut random = Random::new(7);
            let bits: Vec<u16> = (0..20_000).map(|_| half.hostile(&mut random)).collect();
            let value = |bits: u16| match half {
                Half::Bf16 => bf16::from_bits(bits).to_f32(),
                Half::F16 => f16::from_bits(bits).to_f32(),
            };
            let count = |is: &dyn Fn(f32) -> bool| bits.iter().filter(|&&bits| is(value(bits))).count();
            assert!(count(&|x| x.is_nan()) > 10 && count(&|x| x == f32::NEG_INFINITY) > 5);
            assert!(count(&|x| x.is_finite() && x.abs() > 60_000.0) > 5);
            assert!(bits.contains(&1) && bits.contains(&0x8001) && bits.contains(&0x8000) && bits.contains(&0));
            assert!(count(&|x| x.is_normal() && x.abs() < 32.0) > 19_000);
        }
    }

    #[test]
    fn special_rows_are_ordinary_ones_with_special_values_among_them() {
        let ordinary = numbers(&mut Random::new(8), 4096, Fill::Ordinary, |x| x);
        assert!(ordinary.iter().all(|x| x.is_finite()));
        let special = numbers(&mut Random::new(8), 4096, Fill::Special, |x| x);
        for is in [f32::is_nan, f32::is_infinite, |x: f32| x == 0.0 && x.is_sign_negative(), f32::is_subnormal] {
            assert!((1..200).contains(&special.iter().filter(|&&x| is(x)).count()));
        }
        assert!(numbers(&mut Random::new(8), 64, Fill::Zeros, |x| x).iter().all(|&x| x == 0.0));
    }
}
