//! How tokens reach the ranks that hold their experts, and what a token is on the way.
//!
//! Plain data and formulas: the bytes of a token's row, and the choice between two ways. Rows come in the order of
//! ranks, and in a rank's own order of tokens, so what a rank receives is a batch like any other: the layer's stable
//! order over it is the order that one rank with all tokens would have.

use crate::error::{Error, Result, checked_add, checked_mul};
use crate::gemm::ActivationFormat;
use crate::quantize::ScaleFormat;
use std::fmt;
use std::ops::Range;

/// Which rows go to which rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Dispatch {
    /// Every token to every rank.
    Gather,
    /// A token once to each rank that has one of its experts.
    Routed,
}

/// Up to so many times the bytes of [`Dispatch::Routed`], [`Dispatch::Gather`] is chosen: each token is then packed
/// once and not once for every rank, and no counts are needed before the rows.
const MOST_BYTES_OF_GATHER: f64 = 1.6;

/// Rows of a rank that take no more than this are gathered among any number of ranks: a message so small costs its
/// latency and not its bytes.
const SMALL_BYTES: usize = 64 << 10;

impl Dispatch {
    /// Both of them.
    pub const ALL: [Self; 2] = [Self::Gather, Self::Routed];

    /// Its name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Gather => "gather",
            Self::Routed => "routed",
        }
    }

    /// The way for ranks of up to `capacity` tokens: a function of what all ranks agree on, so they choose alike.
    #[must_use]
    pub fn choose(global_experts: usize, ranks: usize, topk: usize, capacity: usize, row_bytes: usize) -> Self {
        let small = capacity.saturating_mul(row_bytes) <= SMALL_BYTES;
        let even = ranks as f64 <= MOST_BYTES_OF_GATHER * expected_ranks(global_experts, ranks, topk);
        if small || even { Self::Gather } else { Self::Routed }
    }
}

impl fmt::Display for Dispatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl std::str::FromStr for Dispatch {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        let found = Self::ALL.into_iter().find(|dispatch| dispatch.name() == name);
        found.ok_or_else(|| Error::Name { argument: "dispatch", actual: name.into(), expected: "gather, routed" })
    }
}

/// Ranks, of `R`, that a token with `topk` different experts goes to on average where experts are equally likely:
/// `R (1 - C(G - G / R, topk) / C(G, topk))`.
#[must_use]
pub fn expected_ranks(global_experts: usize, ranks: usize, topk: usize) -> f64 {
    let (experts, ranks) = (global_experts as f64, ranks as f64);
    let elsewhere = experts - experts / ranks;
    // The chance that none of its experts is on a given rank: one expert after the other, without putting back.
    let none = (0..topk.min(global_experts)).fold(1.0, |chance: f64, drawn| {
        let drawn = drawn as f64;
        chance * ((elsewhere - drawn) / (experts - drawn)).max(0.0)
    });
    ranks * (1.0 - none)
}

/// A token on its way: its values as GEMM 1 reads them, their scales, the number of each slot's copy, and perhaps the
/// router's weights. In this order, padded to 16 bytes.
///
/// ```
/// use expertile::{ActivationFormat, TokenRow};
/// let row = TokenRow::new(7168, 8, ActivationFormat::E4m3, false)?;
/// assert_eq!(row.bytes(), 7168 + 4 * 56 + 4 * 8);
/// # Ok::<(), expertile::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct TokenRow {
    hidden: usize,
    topk: usize,
    activation_format: ActivationFormat,
    has_weights: bool,
    /// Where the values end, the scales, the copies, the weights.
    ends: [usize; 4],
    bytes: usize,
}

/// Rows start on a multiple of it, so that values, scales and ids of each can be read in place.
const ROW_MULTIPLE: usize = 16;

impl TokenRow {
    /// The row of a token of `hidden` values and `topk` slots. Weights travel where sums are made away from home.
    ///
    /// # Errors
    /// [`Error::Value`] for a zero, and unless 64 divides `hidden` where values are e4m3; [`Error::Overflow`].
    pub fn new(hidden: usize, topk: usize, activation_format: ActivationFormat, has_weights: bool) -> Result<Self> {
        for (argument, value) in [("hidden", hidden), ("topk", topk)] {
            if value == 0 {
                return Err(Error::value(argument, 0, "at least 1"));
            }
        }
        let what = "bytes of a token's row";
        let (values, scales) = match activation_format {
            ActivationFormat::Bf16 => (checked_mul(what, hidden, 2)?, 0),
            ActivationFormat::E4m3 => (hidden, checked_mul(what, ScaleFormat::ROW_MAJOR.groups(hidden)?, 4)?),
        };
        // An odd number of bf16 values: what follows starts on 4 bytes.
        let values_end = crate::plan::round_up(values, 4)?;
        let ids = checked_mul(what, topk, 4)?;
        let mut ends = [values_end, scales, ids, if has_weights { ids } else { 0 }];
        for part in 1..ends.len() {
            ends[part] = checked_add(what, ends[part], ends[part - 1])?;
        }
        let bytes = crate::plan::round_up(ends[3], ROW_MULTIPLE)?;
        Ok(Self { hidden, topk, activation_format, has_weights, ends, bytes })
    }

    /// `H`.
    #[must_use]
    pub fn hidden(&self) -> usize {
        self.hidden
    }

    /// Slots of a token.
    #[must_use]
    pub fn topk(&self) -> usize {
        self.topk
    }

    /// What the values are.
    #[must_use]
    pub fn activation_format(&self) -> ActivationFormat {
        self.activation_format
    }

    /// Bytes of a row.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Bytes of the values: `[H]` e4m3 or bf16.
    #[must_use]
    pub fn values(&self) -> Range<usize> {
        let bytes = match self.activation_format {
            ActivationFormat::Bf16 => 2,
            ActivationFormat::E4m3 => 1,
        };
        0..self.hidden * bytes
    }

    /// Bytes of the scales: `[H / 128]` f32 ([`ScaleFormat::ROW_MAJOR`]), or none.
    #[must_use]
    pub fn scales(&self) -> Range<usize> {
        self.ends[0]..self.ends[1]
    }

    /// Bytes of the copies' numbers: `[topk]` i32, negative for an empty slot.
    #[must_use]
    pub fn copies(&self) -> Range<usize> {
        self.ends[1]..self.ends[2]
    }

    /// Bytes of the router's weights: `[topk]` f32, or none.
    #[must_use]
    pub fn weights(&self) -> Range<usize> {
        self.ends[2]..self.ends[3]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_holds_its_parts_one_behind_the_other() {
        let row = TokenRow::new(7168, 8, ActivationFormat::E4m3, true).unwrap();
        assert_eq!((row.values(), row.scales()), (0..7168, 7168..7392));
        assert_eq!((row.copies(), row.weights(), row.bytes()), (7392..7424, 7424..7456, 7456));
        let row = TokenRow::new(33, 3, ActivationFormat::Bf16, false).unwrap();
        assert_eq!((row.values(), row.scales(), row.copies()), (0..66, 68..68, 68..80));
        assert_eq!((row.weights(), row.bytes()), (80..80, 80));
        assert_eq!(TokenRow::new(1, 1, ActivationFormat::Bf16, false).unwrap().bytes(), 16);
        let refuse = |hidden, topk, format, start: &str| {
            let error = TokenRow::new(hidden, topk, format, false).unwrap_err().to_string();
            assert!(error.starts_with(start), "{error}");
        };
        refuse(0, 1, ActivationFormat::Bf16, "hidden is 0");
        refuse(8, 0, ActivationFormat::Bf16, "topk is 0");
        refuse(160, 1, ActivationFormat::E4m3, "hidden is 160");
        refuse(usize::MAX, 1, ActivationFormat::Bf16, "bytes of a token's row overflows");
    }

    #[test]
    fn the_expected_ranks_are_those_of_all_choices_counted() {
        // Every choice of `topk` among 8 experts on 4 ranks of 2.
        for topk in 1..=8usize {
            let choices: Vec<u32> = (0u32..256).filter(|bits| bits.count_ones() as usize == topk).collect();
            let ranks = |bits: u32| (0..4).filter(|rank| bits >> (2 * rank) & 3 != 0).count();
            let mean = choices.iter().map(|&bits| ranks(bits) as f64).sum::<f64>() / choices.len() as f64;
            assert!((expected_ranks(8, 4, topk) - mean).abs() < 1e-12, "{topk}");
        }
        let of_deepseek = [2, 4, 8, 16, 32, 64].map(|ranks| (100.0 * expected_ranks(256, ranks, 8)).round() / 100.0);
        assert_eq!(of_deepseek, [1.99, 3.61, 5.29, 6.52, 7.27, 7.68]);
    }

    #[test]
    fn few_ranks_and_small_calls_gather_others_route() {
        let choose = |ranks, capacity| Dispatch::choose(256, ranks, 8, capacity, 7424);
        assert_eq!(
            [2, 4, 8, 16, 64].map(|ranks| choose(ranks, 4096).name()),
            ["gather", "gather", "gather", "routed", "routed"]
        );
        assert_eq!((choose(64, 8), choose(64, 9)), (Dispatch::Gather, Dispatch::Routed));
        // Mixtral on 8 ranks: a token goes to two of them.
        assert_eq!(Dispatch::choose(8, 8, 2, 4096, 8224), Dispatch::Routed);
        assert_eq!("routed".parse::<Dispatch>().unwrap(), Dispatch::Routed);
        assert!("all".parse::<Dispatch>().unwrap_err().to_string().starts_with("dispatch is \"all\""));
    }
}
