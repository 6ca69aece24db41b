//! The expert-parallel layer as plain data: what it is made of, what a call does, what its ranks must agree on.
//!
//! A call behaves as the layer on one rank would on rank 0's tokens, then rank 1's, and so on. Here is what every
//! backend shares; `cpu/expert_parallel` runs it over host memory.

pub(crate) mod agreement;
pub(crate) mod meeting;
pub(crate) mod routes;
mod traffic;

use crate::combine::Combine;
use crate::dispatch::{Dispatch, TokenRow};
use crate::error::{Error, Result, checked_mul};
use crate::layer::LayerConfig;
use crate::placement::Placement;
use crate::routing::require_slots;
use std::fmt;
pub use traffic::Traffic;

/// What an expert-parallel layer is made of, beside the layer of its own experts. The same on all ranks.
#[derive(Debug, Clone, PartialEq)]
pub struct ParallelConfig {
    /// Which rank holds which expert.
    pub placement: Placement,
    /// How tokens travel; `None` for [`Dispatch::choose`].
    pub dispatch: Option<Dispatch>,
    /// How results travel.
    pub combine: Combine,
}

impl ParallelConfig {
    /// The usual: the way that fits the number of ranks, and the same bits on any number of them.
    #[must_use]
    pub fn new(placement: Placement) -> Self {
        Self { placement, dispatch: None, combine: Combine::Rows }
    }
}

/// What a call does: plain data, the same on all ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ParallelChoice {
    /// `R`.
    pub ranks: usize,
    /// `C`: the most tokens that a rank may bring to a call.
    pub capacity: usize,
    /// How tokens travel.
    pub dispatch: Dispatch,
    /// How results travel.
    pub combine: Combine,
    /// What a token is on the way.
    pub token_row: TokenRow,
    /// Bytes of a row on the way back.
    pub combine_row_bytes: usize,
}

impl ParallelChoice {
    /// What calls of up to `capacity` tokens a rank do in a layer of `hidden` values.
    ///
    /// # Errors
    /// [`Error::Value`] for capacity 0 and unless the placement's experts are `global_experts`; as [`TokenRow::new`];
    /// [`Error::Overflow`] if `R * C * topk` exceeds i32.
    pub fn new(hidden: usize, config: &LayerConfig, parallel: &ParallelConfig, capacity: usize) -> Result<Self> {
        let ParallelConfig { placement, dispatch, combine } = parallel;
        let (ranks, experts) = (placement.ranks(), placement.global_experts());
        if config.global_experts != experts {
            return Err(Error::value("global_experts", config.global_experts, format!("{experts}, as placed")));
        }
        if capacity == 0 {
            return Err(Error::value("capacity", 0, "at least 1"));
        }
        let tokens = checked_mul("R * C", ranks, capacity)?;
        require_slots(tokens, config.topk.max(ranks))?;
        let weights_travel = *combine == Combine::Sums && !config.weight_on_input;
        let token_row = TokenRow::new(hidden, config.topk, config.activation_format, weights_travel)?;
        let choose = || Dispatch::choose(experts, ranks, config.topk, capacity, token_row.bytes());
        Ok(Self {
            ranks,
            capacity,
            dispatch: dispatch.unwrap_or_else(choose),
            combine: *combine,
            token_row,
            combine_row_bytes: checked_mul("bytes of a result's row", hidden, combine.value_bytes())?,
        })
    }

    /// The most tokens that one rank receives in a call: all ranks', its own among them.
    #[must_use]
    pub fn most_received_tokens(&self) -> usize {
        self.ranks * self.capacity
    }
}

impl fmt::Display for ParallelChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { ranks, capacity, dispatch, combine, token_row, combine_row_bytes } = self;
        let whole = match combine {
            Combine::Rows => "slot, the same bits on any number of ranks",
            Combine::Sums => "token and rank",
        };
        let bytes = token_row.bytes();
        write!(f, "{ranks} ranks of up to {capacity} tokens; dispatch {dispatch}: {bytes} bytes a token; ")?;
        write!(f, "combine {combine}: {combine_row_bytes} bytes a {whole}")
    }
}

/// A stage of an expert-parallel call, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ParallelStage {
    /// Routes, and the meeting in which ranks say how much comes and whether anything is wrong.
    Meeting,
    /// Tokens quantized or converted, packed, sent and received.
    Dispatch,
    /// The local experts, from layout to GEMM 2, and their rows packed for the way back.
    Experts,
    /// Results sent and received.
    Combine,
    /// The shared expert, and the sum.
    Unpermute,
}

impl ParallelStage {
    /// Every stage, in order.
    pub const ALL: [Self; 5] = [Self::Meeting, Self::Dispatch, Self::Experts, Self::Combine, Self::Unpermute];

    /// The name that tables and JSON print.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Meeting => "meeting",
            Self::Dispatch => "dispatch",
            Self::Experts => "experts",
            Self::Combine => "combine",
            Self::Unpermute => "unpermute",
        }
    }
}

impl fmt::Display for ParallelStage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gemm::ActivationFormat;

    #[test]
    fn a_choice_prints_itself_and_names_what_does_not_fit() {
        let config = LayerConfig::new(8, 256, ActivationFormat::E4m3);
        let parallel = ParallelConfig::new(Placement::linear(256, 8).unwrap());
        let choice = ParallelChoice::new(7168, &config, &parallel, 64).unwrap();
        assert_eq!(
            choice.to_string(),
            "8 ranks of up to 64 tokens; dispatch gather: 7424 bytes a token; combine rows: 14336 bytes a slot, the \
             same bits on any number of ranks"
        );
        assert_eq!(choice.most_received_tokens(), 512);
        let sums = ParallelConfig { combine: Combine::Sums, dispatch: Some(Dispatch::Routed), ..parallel.clone() };
        let choice = ParallelChoice::new(7168, &config, &sums, 64).unwrap();
        assert_eq!((choice.token_row.bytes(), choice.combine_row_bytes), (7456, 28672));
        let refuse = |config: &LayerConfig, capacity, start: &str| {
            let error = ParallelChoice::new(7168, config, &parallel, capacity).unwrap_err().to_string();
            assert!(error.starts_with(start), "{error}");
        };
        refuse(&config, 0, "capacity is 0");
        refuse(&config, 1 << 28, "M * topk overflows");
        refuse(&config, usize::MAX, "R * C overflows");
        let wide = ParallelChoice::new(usize::MAX / 128 * 128, &config, &parallel, 1).unwrap_err().to_string();
        assert!(wide.contains("overflows"), "{wide}");
        let (sums, wide) = (ParallelConfig { combine: Combine::Sums, ..parallel.clone() }, 1 << 62);
        let error = ParallelChoice::new(wide, &config, &sums, 1).unwrap_err().to_string();
        assert!(error.starts_with("bytes of a result's row overflows"), "{error}");
        refuse(&LayerConfig { global_experts: 128, ..config }, 1, "global_experts is 128, expected 256, as placed");
    }
}
