//! Element types: their names, their sizes, and conversions between them.

use bytemuck::{Pod, Zeroable};
use half::{bf16, f16};
use std::fmt;

/// The name of an element type, as error messages and tables print it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Dtype {
    /// 8-bit float, 4 exponent bits, 3 mantissa bits, no infinity (OCP "E4M3", `float8_e4m3fn`).
    E4m3,
    /// Brain float.
    Bf16,
    /// IEEE half.
    F16,
    /// IEEE single.
    F32,
    /// Signed 32-bit integer.
    I32,
    /// Signed 64-bit integer.
    I64,
    /// Unsigned byte; as a scale, the UE8M0 exponent `2^(byte - 127)`.
    U8,
}

impl Dtype {
    /// Bytes of an element.
    #[must_use]
    pub const fn bytes(self) -> usize {
        match self {
            Self::E4m3 | Self::U8 => 1,
            Self::Bf16 | Self::F16 => 2,
            Self::F32 | Self::I32 => 4,
            Self::I64 => 8,
        }
    }
}

impl Dtype {
    /// What a call of a prepared layer may come with instead.
    pub(crate) const fn as_prepared(self) -> &'static str {
        match self {
            Self::E4m3 => "e4m3, as prepared",
            Self::Bf16 => "bf16, as prepared",
            Self::F16 => "f16, as prepared",
            Self::F32 => "f32, as prepared",
            Self::I32 => "i32, as prepared",
            Self::I64 => "i64, as prepared",
            Self::U8 => "u8, as prepared",
        }
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::E4m3 => "e4m3",
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
            Self::F32 => "f32",
            Self::I32 => "i32",
            Self::I64 => "i64",
            Self::U8 => "u8",
        })
    }
}

/// An e4m3 value, as its byte: `seee_emmm`, bias 7, largest finite 448, `0x7f` and `0xff` are NaN, no infinity.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Pod, Zeroable)]
pub struct E4m3(pub u8);

impl E4m3 {
    /// The largest finite value, 448.
    pub const MAX: f32 = 448.0;
    /// The NaN that conversions produce.
    pub const NAN: Self = Self(0x7f);

    /// Rounds to nearest, ties to even, after clamping to ±448. NaN (of either sign) becomes [`E4m3::NAN`].
    #[must_use]
    #[inline(always)]
    pub fn from_f32(x: f32) -> Self {
        Self(e4m3_byte(x))
    }

    /// The exact value.
    #[must_use]
    #[inline]
    pub const fn to_f32(self) -> f32 {
        E4M3_VALUES[self.0 as usize]
    }

    /// Whether this is one of the two NaN bytes.
    #[must_use]
    pub const fn is_nan(self) -> bool {
        self.0 & 0x7f == 0x7f
    }
}

impl fmt::Debug for E4m3 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}e4m3", self.to_f32())
    }
}

/// [`E4m3::from_f32`] in integer operations without a branch, so that a loop over it becomes vector code.
#[inline(always)]
pub(crate) fn e4m3_byte(x: f32) -> u8 {
    const MAGNITUDE: u32 = 0x7fff_ffff;
    const INFINITY: u32 = 0x7f80_0000;
    // 448 as f32; larger magnitudes (infinity included) saturate.
    const MAX: u32 = 0x43e0_0000;
    // 2^-6, the smallest normal e4m3.
    const MIN_NORMAL: u32 = 0x3c80_0000;
    // f32 keeps 20 mantissa bits more than e4m3, and its bias is 120 larger.
    const REBIAS: u32 = 120 << 23;
    let bits = x.to_bits();
    let magnitude = bits & MAGNITUDE;
    let sign = ((bits >> 24) & 0x80) as u8;
    let clamped = if magnitude > MAX { MAX } else { magnitude };
    // Normal: add half of the dropped unit (less one bit when the kept part is even), then drop.
    let half_less_parity = 0x7_ffff + ((clamped >> 20) & 1);
    let normal = clamped.wrapping_sub(REBIAS).wrapping_add(half_less_parity) >> 20;
    // Subnormal: adding 2^14 leaves multiples of 2^-9 in the low mantissa bits, rounded to nearest even by the adder.
    let subnormal = (f32::from_bits(clamped) + 16384.0).to_bits() & 0xf;
    let finite = if clamped < MIN_NORMAL { subnormal } else { normal } as u8 | sign;
    if magnitude > INFINITY { 0x7f } else { finite }
}

/// The value of every e4m3 byte.
pub(crate) const E4M3_VALUES: [f32; 256] = e4m3_values();

const fn e4m3_values() -> [f32; 256] {
    let mut table = [0.0f32; 256];
    let mut byte = 0usize;
    while byte < 256 {
        let exponent = ((byte >> 3) & 15) as u32;
        let mantissa = (byte & 7) as u32;
        let magnitude = if byte & 0x7f == 0x7f {
            f32::NAN
        } else if exponent == 0 {
            // Multiples of 2^-9.
            mantissa as f32 * (1.0 / 512.0)
        } else {
            f32::from_bits((exponent + 120) << 23 | mantissa << 20)
        };
        table[byte] = if byte < 128 { magnitude } else { -magnitude };
        byte += 1;
    }
    table
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for super::E4m3 {}
    impl Sealed for half::bf16 {}
    impl Sealed for half::f16 {}
    impl Sealed for f32 {}
    impl Sealed for i32 {}
    impl Sealed for u8 {}
}

/// An element that rows may be made of: 1, 2 or 4 bytes, moved but not looked at.
pub trait RowElement: sealed::Sealed + Pod + Send + Sync {
    /// Its name.
    const DTYPE: Dtype;
}

/// A row element that is a number: bf16, f16 or f32.
pub trait Float: RowElement {
    /// The exact value as f32.
    fn to_f32(self) -> f32;
    /// The nearest value, ties to even.
    fn from_f32(x: f32) -> Self;
    /// The nearest bf16, ties to even.
    #[inline(always)]
    fn to_bf16(self) -> bf16 {
        Float::from_f32(self.to_f32())
    }
}

impl RowElement for E4m3 {
    const DTYPE: Dtype = Dtype::E4m3;
}
impl RowElement for u8 {
    const DTYPE: Dtype = Dtype::U8;
}
impl RowElement for i32 {
    const DTYPE: Dtype = Dtype::I32;
}
impl RowElement for bf16 {
    const DTYPE: Dtype = Dtype::Bf16;
}
impl RowElement for f16 {
    const DTYPE: Dtype = Dtype::F16;
}
impl RowElement for f32 {
    const DTYPE: Dtype = Dtype::F32;
}

impl Float for bf16 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
    // Written out (rather than `bf16::from_f32`, a call with a branch) so that loops over it become vector code.
    #[inline(always)]
    fn from_f32(x: f32) -> Self {
        let bits = x.to_bits();
        let rounded = (bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16) as u16;
        let quiet = (bits >> 16) as u16 | 0x40;
        Self::from_bits(if bits & 0x7fff_ffff > 0x7f80_0000 { quiet } else { rounded })
    }
    #[inline(always)]
    fn to_bf16(self) -> bf16 {
        self
    }
}

impl Float for f16 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        f16::to_f32(self)
    }
    #[inline(always)]
    fn from_f32(x: f32) -> Self {
        f16::from_f32(x)
    }
}

impl Float for f32 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }
    #[inline(always)]
    fn from_f32(x: f32) -> Self {
        x
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_e4m3_byte_survives_a_round_trip() {
        for byte in 0..=255u8 {
            let value = E4m3(byte).to_f32();
            let back = E4m3::from_f32(value);
            assert_eq!(back.0, if value.is_nan() { 0x7f } else { byte }, "byte {byte:#04x}, value {value}");
        }
    }

    #[test]
    fn e4m3_rounds_to_the_nearest_value_and_ties_to_even() {
        for low in 0..0x7eu8 {
            let (a, b) = (E4m3(low).to_f32(), E4m3(low + 1).to_f32());
            let middle = (a + b) / 2.0;
            let even = if low % 2 == 0 { low } else { low + 1 };
            for (x, expected) in [(middle, even), (middle.next_down(), low), (middle.next_up(), low + 1)] {
                assert_eq!(E4m3::from_f32(x).0, expected, "{x}");
                assert_eq!(E4m3::from_f32(-x).0, expected | 0x80, "{}", -x);
            }
        }
    }

    #[test]
    fn e4m3_saturates_and_keeps_nan() {
        for x in [448.1, 464.0, 480.0, 1e30, f32::INFINITY] {
            assert_eq!(E4m3::from_f32(x).0, 0x7e);
            assert_eq!(E4m3::from_f32(-x).0, 0xfe);
        }
        assert!(E4m3::from_f32(f32::NAN).is_nan() && E4m3::from_f32(-f32::NAN).is_nan());
    }

    #[test]
    fn bf16_rounding_agrees_with_half() {
        for high in 0..=0xffffu32 {
            for low in [0u32, 1, 0x7fff, 0x8000, 0x8001, 0xffff] {
                let x = f32::from_bits(high << 16 | low);
                let (ours, theirs) = (<bf16 as Float>::from_f32(x), bf16::from_f32(x));
                assert_eq!(ours.to_bits(), theirs.to_bits(), "{:#x}", x.to_bits());
            }
        }
    }
}
