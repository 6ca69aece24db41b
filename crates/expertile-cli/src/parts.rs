//! The parts of a block of experts that an output may hold.

use crate::error::{Error, Result};
use crate::weights::ExpertWeights;
use std::str::FromStr;

/// Which parts an output holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Parts {
    /// The experts that the router chooses.
    pub(crate) routed: bool,
    /// The expert that every token visits.
    pub(crate) shared: bool,
}

const ROUTED: &str = "routed";
const SHARED: &str = "shared";

impl Parts {
    /// The routed experts alone.
    pub(crate) const ROUTED: Self = Self { routed: true, shared: false };

    /// The parts asked for, or all that the block has.
    pub(crate) fn choose(asked: Option<Self>, weights: &dyn ExpertWeights) -> Result<Self> {
        let has_shared = weights.shared().is_some();
        match asked {
            Some(asked) if asked.shared && !has_shared => {
                Err(Error::usage("--parts is shared, expected routed: the block has no shared expert"))
            }
            Some(asked) => Ok(asked),
            None => Ok(Self { routed: true, shared: has_shared }),
        }
    }

    pub(crate) fn names(self) -> Vec<&'static str> {
        [(self.routed, ROUTED), (self.shared, SHARED)]
            .into_iter()
            .filter_map(|(has, name)| has.then_some(name))
            .collect()
    }

    /// The block's other parts.
    pub(crate) fn left_out(self, weights: &dyn ExpertWeights) -> Vec<&'static str> {
        let others = Self { routed: !self.routed, shared: !self.shared && weights.shared().is_some() };
        others.names()
    }
}

impl FromStr for Parts {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let mut parts = Self { routed: false, shared: false };
        for name in text.split(',') {
            match name.trim() {
                ROUTED => parts.routed = true,
                SHARED => parts.shared = true,
                _ => return Err("expected routed, shared or routed,shared".into()),
            }
        }
        Ok(parts)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_read_in_any_order_and_refused_by_name() {
        assert_eq!("routed".parse(), Ok(Parts::ROUTED));
        assert_eq!("shared, routed".parse(), Ok(Parts { routed: true, shared: true }));
        assert_eq!(Parts { routed: false, shared: true }.names(), ["shared"]);
        for text in ["", "all", "routed,", "routed;shared"] {
            assert!(text.parse::<Parts>().is_err(), "{text}");
        }
    }
}
