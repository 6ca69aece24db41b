//! Instruction sets: the token that proves one is there, and how a function is compiled for each.
//!
//! An [`Isa`] can only be made by asking the CPU, so whoever holds `Isa::avx512()` may run AVX-512 code: that is the
//! whole safety argument of the dispatch below.

pub(crate) mod gemm;
pub(crate) mod nibbles;
pub(crate) mod panel;
mod portable;
pub(crate) mod stream;
#[cfg(target_arch = "x86_64")]
mod x86_64;

use crate::error::{Error, Result};
use std::fmt;

/// An instruction set that this CPU has.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Isa(Level);

#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Level {
    Portable,
    Avx2,
    Avx512,
    Amx,
}

impl Isa {
    /// Plain Rust, everywhere.
    #[must_use]
    pub fn portable() -> Self {
        Self(Level::Portable)
    }

    /// AVX2 with FMA and F16C, if the CPU has them.
    #[must_use]
    pub fn avx2() -> Option<Self> {
        #[cfg(all(target_arch = "x86_64", not(miri)))]
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c") {
            return Some(Self(Level::Avx2));
        }
        None
    }

    /// AVX-512 F, BW, DQ, VL, VBMI and BF16, if the CPU has all of them (AMD Zen 4, Intel Sapphire Rapids and later).
    #[must_use]
    pub fn avx512() -> Option<Self> {
        #[cfg(all(target_arch = "x86_64", not(miri)))]
        if Self::avx2().is_some()
            && is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512vbmi")
            && is_x86_feature_detected!("avx512bf16")
        {
            return Some(Self(Level::Avx512));
        }
        None
    }

    /// AMX with BF16 for GEMMs of bf16 and e4m3 weights and the instructions of [`Isa::avx512`] for the rest, if the CPU
    /// has all of them (Intel Sapphire Rapids and later). Linux is asked for the tiles' registers then, once for the
    /// process; where it refuses, and on other systems, there are none.
    #[must_use]
    pub fn amx() -> Option<Self> {
        #[cfg(all(target_arch = "x86_64", not(miri)))]
        if Self::avx512().is_some() && x86_64::amx::is_usable() {
            return Some(Self(Level::Amx));
        }
        None
    }

    /// The best one this CPU has.
    #[must_use]
    pub fn best() -> Self {
        Self::amx().or_else(Self::avx512).or_else(Self::avx2).unwrap_or_else(Self::portable)
    }

    /// Every one this CPU has, plainest first.
    #[must_use]
    pub fn available() -> Vec<Self> {
        [Some(Self::portable()), Self::avx2(), Self::avx512(), Self::amx()].into_iter().flatten().collect()
    }

    /// The instruction set of that name.
    ///
    /// # Errors
    /// [`Error::Name`] for an unknown name, [`Error::Device`] if this CPU does not have it.
    pub fn named(name: &str) -> Result<Self> {
        let isa = match name {
            "portable" => Some(Self::portable()),
            "avx2" => Self::avx2(),
            "avx512-bf16" => Self::avx512(),
            "amx-bf16" => Self::amx(),
            _ => {
                return Err(Error::Name {
                    argument: "isa",
                    actual: name.into(),
                    expected: "portable, avx2, avx512-bf16, amx-bf16",
                });
            }
        };
        isa.ok_or_else(|| Error::Device {
            argument: "isa",
            actual: name.into(),
            expected: format!("one that this CPU has: {}", Self::names()),
        })
    }

    fn names() -> String {
        Self::available().iter().map(|isa| isa.name()).collect::<Vec<_>>().join(", ")
    }

    /// Its name: `portable`, `avx2`, `avx512-bf16` or `amx-bf16`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self.0 {
            Level::Portable => "portable",
            Level::Avx2 => "avx2",
            Level::Avx512 => "avx512-bf16",
            Level::Amx => "amx-bf16",
        }
    }

    pub(crate) fn level(self) -> Level {
        self.0
    }

    /// K-pairs of a row that stand together if the kernels of bf16 and e4m3 weights take all rows of a block at once.
    pub(crate) fn step_pairs(self) -> Option<usize> {
        #[cfg(target_arch = "x86_64")]
        if self.0 == Level::Amx {
            return Some(x86_64::amx::STEP_PAIRS);
        }
        None
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl fmt::Debug for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Isa({})", self.name())
    }
}

/// Compiles one body for every instruction set and picks at run time by an [`Isa`], the first argument.
///
/// The body must be plain Rust that the compiler can turn into vector code: callees it needs inlined are
/// `#[inline(always)]`. Rust never contracts or reorders float operations, so all versions give the same bits.
macro_rules! multiversion {
    ($(#[$meta:meta])* $vis:vis fn $name:ident $(<$($generic:ident: $bound:path),+>)? ($isa:ident: Isa $(, $arg:ident: $type:ty)* $(,)?) $(-> $ret:ty)? $body:block) => {
        $(#[$meta])*
        #[allow(unsafe_code)]
        $vis fn $name $(<$($generic: $bound),+>)? ($isa: $crate::cpu::Isa $(, $arg: $type)*) $(-> $ret)? {
            #[inline(always)]
            fn body $(<$($generic: $bound),+>)? ($($arg: $type),*) $(-> $ret)? $body

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,f16c")]
            fn avx2 $(<$($generic: $bound),+>)? ($($arg: $type),*) $(-> $ret)? {
                body($($arg),*)
            }

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi")]
            fn avx512 $(<$($generic: $bound),+>)? ($($arg: $type),*) $(-> $ret)? {
                body($($arg),*)
            }

            match $isa.level() {
                // SAFETY: an `Isa` of these levels exists only if the CPU has every feature that `avx512` enables.
                #[cfg(target_arch = "x86_64")]
                $crate::cpu::arch::Level::Avx512 | $crate::cpu::arch::Level::Amx => unsafe { avx512($($arg),*) },
                // SAFETY: an `Isa` of this level exists only if the CPU has every feature that `avx2` enables.
                #[cfg(target_arch = "x86_64")]
                $crate::cpu::arch::Level::Avx2 => unsafe { avx2($($arg),*) },
                _ => body($($arg),*),
            }
        }
    };
}

pub(crate) use multiversion;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_lead_back_to_what_is_available() {
        for isa in Isa::available() {
            assert_eq!(Isa::named(isa.name()).unwrap(), isa);
        }
        assert!(matches!(Isa::named("sse9"), Err(Error::Name { argument: "isa", .. })));
        for (name, isa) in [("avx512-bf16", Isa::avx512()), ("amx-bf16", Isa::amx())] {
            if isa.is_none() {
                assert!(matches!(Isa::named(name), Err(Error::Device { argument: "isa", .. })));
            }
        }
    }
}
