//! What the grouped GEMM multiplies: formats of activations and weights, and how a weight's scales are cut.
//!
//! `D[r, n] = sum_k A[r, k] * sfa[r, k/128] * B[e, n, k] * sfb[e, n/128, k/128]` for every live row `r` of expert `e`:
//! f32 accumulation, the scales applied (and the sum promoted) every 128 of K, bf16 out.

use std::fmt;

/// Rows and columns of a weight block that share one scale.
pub const WEIGHT_BLOCK: usize = 128;

/// What weights are made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum WeightFormat {
    /// e4m3 `[E, N, K]` with f32 scales `[E, ceil(N/128), ceil(K/128)]`.
    E4m3,
    /// bf16 `[E, N, K]`.
    Bf16,
}

impl WeightFormat {
    /// The name that messages and tables print.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::E4m3 => "e4m3",
            Self::Bf16 => "bf16",
        }
    }

    /// Bytes of one weight, scales apart.
    #[must_use]
    pub fn bytes(self) -> usize {
        match self {
            Self::E4m3 => 1,
            Self::Bf16 => 2,
        }
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
    /// e4m3 with one f32 scale per 128 values; needs e4m3 weights.
    E4m3,
    /// bf16; takes bf16 or e4m3 weights.
    Bf16,
}

impl ActivationFormat {
    /// The name that messages and tables print.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::E4m3 => "e4m3",
            Self::Bf16 => "bf16",
        }
    }
}

impl fmt::Display for ActivationFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
