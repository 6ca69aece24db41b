//! Rows of tokens, ordinary and hostile.

use crate::Random;

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

#[cfg(test)]
mod tests {
    use super::*;

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
