//! The rows that each expert's segment is padded to: rounding up, and the GEMMs' own rules for their row tile.

use crate::error::{Error, Result};
use std::fmt;
use std::str::FromStr;

/// A GPU generation, as far as the alignment rules tell them apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Arch {
    /// Hopper, and every generation the rules do not name.
    Sm90,
    /// Datacenter Blackwell (compute capability 10.x).
    Sm100,
    /// Consumer Blackwell (compute capability 12.x).
    Sm120,
}

impl Arch {
    /// The generation of a compute capability's major number.
    #[must_use]
    pub fn from_compute_capability_major(major: u32) -> Self {
        match major {
            10 => Self::Sm100,
            12 => Self::Sm120,
            _ => Self::Sm90,
        }
    }

    /// The name the command line takes.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Sm90 => "sm90",
            Self::Sm100 => "sm100",
            Self::Sm120 => "sm120",
        }
    }
}

impl fmt::Display for Arch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Arch {
    type Err = Error;
    fn from_str(name: &str) -> Result<Self> {
        [Self::Sm90, Self::Sm100, Self::Sm120].into_iter().find(|arch| arch.name() == name).ok_or_else(|| Error::Name {
            argument: "arch",
            actual: name.into(),
            expected: "sm90, sm100, sm120",
        })
    }
}

/// A GEMM's own rule for its row tile per call. Releases differ, so each rule goes by its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum AlignmentRule {
    /// DeepGEMM of June 2026: on SM100 the smallest of 32, 64, ... 224 that covers `expected_m`; else 128.
    DeepGemm202606,
    /// vLLM's fork with the SM120 port: on SM100 the smallest of 32, 48, ... 240; on SM120 64 for few rows per group.
    VllmFork,
    /// DeepGEMM 2.8 and later: 256 on SM100, else 128, whatever `expected_m` is.
    DeepGemm28,
}

impl AlignmentRule {
    /// Every rule.
    pub const ALL: [Self; 3] = [Self::DeepGemm202606, Self::VllmFork, Self::DeepGemm28];

    /// The name the command line takes.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::DeepGemm202606 => "deepgemm-2026-06",
            Self::VllmFork => "vllm-fork",
            Self::DeepGemm28 => "deepgemm-2.8",
        }
    }

    /// The row tile the rule picks for a call: `theoretical(arch, expected_m, num_groups)`.
    ///
    /// `expected_m` is the total over all groups, as callers pass it; without `num_groups` it counts as one group's.
    ///
    /// # Errors
    /// [`Error::Value`] if `num_groups` is zero.
    pub fn theoretical(self, arch: Arch, expected_m: Option<usize>, num_groups: Option<usize>) -> Result<usize> {
        if num_groups == Some(0) {
            return Err(Error::value("num_groups", 0, "at least 1"));
        }
        Ok(match (self, arch) {
            (Self::DeepGemm202606, Arch::Sm100) => smallest_covering(expected_m, 224, 32),
            (Self::VllmFork, Arch::Sm100) => smallest_covering(expected_m, 240, 16),
            (Self::DeepGemm28, Arch::Sm100) => 256,
            (Self::VllmFork, Arch::Sm120) => match expected_m.map(|total| total.div_ceil(num_groups.unwrap_or(1))) {
                Some(per_group) if per_group > 64 => 128,
                _ => 64,
            },
            _ => 128,
        })
    }
}

/// Steps down from `largest` by `step`, not below 32, while the next smaller value still covers `expected_m`.
fn smallest_covering(expected_m: Option<usize>, largest: usize, step: usize) -> usize {
    const SMALLEST: usize = 32;
    let Some(expected_m) = expected_m else { return largest };
    let mut tile = largest;
    while tile - step >= SMALLEST && tile - step >= expected_m {
        tile -= step;
    }
    tile
}

impl fmt::Display for AlignmentRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for AlignmentRule {
    type Err = Error;
    fn from_str(name: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|rule| rule.name() == name).ok_or_else(|| Error::Name {
            argument: "rule",
            actual: name.into(),
            expected: "deepgemm-2026-06, vllm-fork, deepgemm-2.8",
        })
    }
}

/// The smallest multiple of `alignment` that is at least `rows`.
///
/// # Errors
/// [`Error::Alignment`] if `alignment` is zero, [`Error::Overflow`] if the result does not fit.
pub fn round_up(rows: usize, alignment: usize) -> Result<usize> {
    require_alignment(alignment)?;
    rows.checked_next_multiple_of(alignment).ok_or_else(|| Error::Overflow {
        what: "rows rounded up to the alignment",
        detail: format!("{rows} to a multiple of {alignment}"),
    })
}

pub(crate) fn require_alignment(alignment: usize) -> Result<()> {
    if alignment == 0 {
        return Err(Error::Alignment { actual: 0, expected: "at least 1".into() });
    }
    Ok(())
}
