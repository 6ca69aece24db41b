//! How what the experts said comes back to a token's own rank.

use crate::error::{Error, Result};
use std::fmt;

/// What travels back, and where it is summed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Combine {
    /// Each slot's bf16 row, summed at home in slot order: **the same bits on any number of ranks** and for any
    /// placement, those of one rank with all experts.
    #[default]
    Rows,
    /// Each rank's f32 sum over its own experts, added at home in the order of ranks. Fewer bytes where few ranks have
    /// many of a token's experts; the same bits for the same placement only.
    Sums,
}

impl Combine {
    /// Both of them.
    pub const ALL: [Self; 2] = [Self::Rows, Self::Sums];

    /// Its name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Rows => "rows",
            Self::Sums => "sums",
        }
    }

    /// Bytes of a value of its rows: bf16 or f32.
    #[must_use]
    pub const fn value_bytes(self) -> usize {
        match self {
            Self::Rows => 2,
            Self::Sums => 4,
        }
    }
}

impl fmt::Display for Combine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl std::str::FromStr for Combine {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        let found = Self::ALL.into_iter().find(|combine| combine.name() == name);
        found.ok_or_else(|| Error::Name { argument: "combine", actual: name.into(), expected: "rows, sums" })
    }
}
