//! What the grouped GEMM multiplies: formats of activations and weights, and how a weight's scales are cut.
//!
//! `D[r, n] = sum_k A[r, k] * sfa[r, k/128] * B[e, n, k] * sfb[e, n/128, k/128]` for every live row `r` of expert `e`:
//! f32 accumulation, the scales applied (and the sum promoted) every 128 of K, bf16 out.

use crate::error::{Error, Result};
use crate::{int4, mxfp4};
use std::fmt;
use std::str::FromStr;

/// How the rows of gate and up stand in a tensor that holds both.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum GateUpOrder {
    /// Gate's `I` rows, then up's.
    #[default]
    Halves,
    /// Row by row: gate's first, up's first, gate's second (gpt-oss).
    Interleaved,
}

impl GateUpOrder {
    /// The name that messages and tables print.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Halves => "halves",
            Self::Interleaved => "interleaved",
        }
    }

    /// The first row of gate's and of up's, and the step from one to the next.
    pub(crate) fn first_and_step(self, intermediate: usize) -> ([usize; 2], usize) {
        match self {
            Self::Halves => ([0, intermediate], 1),
            Self::Interleaved => ([0, 1], 2),
        }
    }

    /// A list `[2 I]` (a bias) in this order as gate's values, then up's: what a layer takes.
    ///
    /// # Errors
    /// [`Error::Value`] if the number of values is odd.
    pub fn to_halves<T: Copy>(self, values: &[T]) -> Result<Vec<T>> {
        if !values.len().is_multiple_of(2) {
            return Err(Error::value("values", values.len(), "an even number of values, gate's and up's"));
        }
        let intermediate = values.len() / 2;
        let (first, step) = self.first_and_step(intermediate);
        Ok(first.iter().flat_map(|&first| (0..intermediate).map(move |i| values[first + i * step])).collect())
    }
}

impl fmt::Display for GateUpOrder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Rows and columns of a weight block that share one scale.
pub const WEIGHT_BLOCK: usize = 128;

/// What weights are made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum WeightFormat {
    /// e4m3 `[E, N, K]` with f32 scales `[E, ceil(N/128), ceil(K/128)]`.
    E4m3,
    /// bf16 `[E, N, K]`.
    Bf16,
    /// Blocks `[E, N, K/2]` of two 4-bit values each with UE8M0 scales `[E, N, K/32]`: see [`crate::mxfp4`].
    Mxfp4,
    /// Blocks `[E, N, K/2]` of two 4-bit integers each with bf16 or f16 scales `[E, N, K/32]`: see [`crate::int4`].
    Int4,
}

impl WeightFormat {
    /// Every format.
    pub const ALL: [Self; 4] = [Self::E4m3, Self::Bf16, Self::Mxfp4, Self::Int4];

    /// The name that messages and tables print.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::E4m3 => "e4m3",
            Self::Bf16 => "bf16",
            Self::Mxfp4 => "mxfp4",
            Self::Int4 => "int4",
        }
    }

    /// Bits of one weight, scales apart.
    #[must_use]
    pub fn bits(self) -> usize {
        match self {
            Self::E4m3 => 8,
            Self::Bf16 => 16,
            Self::Mxfp4 | Self::Int4 => 4,
        }
    }

    /// Whether two values share a byte, and 32 of K a scale: mxfp4 and int4.
    #[must_use]
    pub fn has_groups(self) -> bool {
        match self {
            Self::E4m3 | Self::Bf16 => false,
            Self::Mxfp4 | Self::Int4 => true,
        }
    }

    /// Bytes of a matrix `[n, k]` of such weights, its scales included.
    #[must_use]
    pub fn matrix_bytes(self, n: u64, k: u64) -> u64 {
        let block = WEIGHT_BLOCK as u64;
        let scales = match self {
            Self::E4m3 => n.div_ceil(block) * k.div_ceil(block) * 4,
            Self::Bf16 => 0,
            Self::Mxfp4 => n * k.div_ceil(mxfp4::GROUP as u64),
            Self::Int4 => n * k.div_ceil(int4::GROUP as u64) * 2,
        };
        (n * k * self.bits() as u64).div_ceil(8) + scales
    }

    /// The rows that such weights usually go with: of their own format, where it is one of rows.
    #[must_use]
    pub fn usual_activations(self) -> ActivationFormat {
        match self {
            Self::E4m3 | Self::Mxfp4 => ActivationFormat::E4m3,
            // The integers are for bf16 rows where they come from.
            Self::Int4 => ActivationFormat::Bf16,
            Self::Bf16 => ActivationFormat::Bf16,
        }
    }

    /// Whether a GEMM multiplies such weights by rows of that format.
    #[must_use]
    pub fn goes_with(self, activations: ActivationFormat) -> bool {
        match activations {
            ActivationFormat::E4m3 => self != Self::Bf16,
            ActivationFormat::Bf16 => true,
        }
    }
}

impl FromStr for WeightFormat {
    type Err = Error;
    fn from_str(name: &str) -> Result<Self> {
        let named = Self::ALL.into_iter().find(|format| format.name() == name);
        named.ok_or_else(|| Error::Name {
            argument: "weights",
            actual: name.into(),
            expected: "e4m3, bf16, mxfp4, int4",
        })
    }
}

impl fmt::Display for WeightFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What the permuted activations are made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ActivationFormat {
    /// e4m3 with one f32 scale per 128 values; needs weights of another format than bf16.
    E4m3,
    /// bf16; takes weights of any format.
    Bf16,
}

impl ActivationFormat {
    /// Every format.
    pub const ALL: [Self; 2] = [Self::E4m3, Self::Bf16];

    /// The name that messages and tables print.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::E4m3 => "e4m3",
            Self::Bf16 => "bf16",
        }
    }
}

impl FromStr for ActivationFormat {
    type Err = Error;
    fn from_str(name: &str) -> Result<Self> {
        let named = Self::ALL.into_iter().find(|format| format.name() == name);
        named.ok_or_else(|| Error::Name { argument: "activations", actual: name.into(), expected: "e4m3, bf16" })
    }
}

impl fmt::Display for ActivationFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
