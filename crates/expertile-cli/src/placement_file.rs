//! Placements: by name, or from the file that `expertile plan --ranks` writes.

use crate::error::{Error, Result};
use crate::{memory, output};
use expertile::Placement;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// Where experts are, as an option says it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum PlacementChoice {
    Linear,
    RoundRobin,
    File(PathBuf),
}

impl std::str::FromStr for PlacementChoice {
    type Err = std::convert::Infallible;

    fn from_str(name: &str) -> std::result::Result<Self, Self::Err> {
        Ok(match name {
            "linear" => Self::Linear,
            "round-robin" => Self::RoundRobin,
            file => Self::File(file.into()),
        })
    }
}

/// What the file holds.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Lists {
    global_experts: usize,
    /// `[R]`: each rank's experts, in the order of their local ids.
    experts: Vec<Vec<usize>>,
}

impl PlacementChoice {
    /// The placement of so many experts on so many ranks.
    pub(crate) fn placement(&self, experts: usize, ranks: usize) -> Result<Placement> {
        let placement = match self {
            Self::Linear => Placement::linear(experts, ranks)?,
            Self::RoundRobin => Placement::round_robin(experts, ranks)?,
            Self::File(file) => read(file)?,
        };
        for (what, actual, expected) in
            [("experts", placement.global_experts(), experts), ("ranks", placement.ranks(), ranks)]
        {
            if actual != expected {
                return Err(Error::usage(format!("--placement is of {actual} {what}, expected {expected}")));
            }
        }
        Ok(placement)
    }

    /// The file that it is read from.
    pub(crate) fn file(&self) -> Option<&Path> {
        if let Self::File(file) = self { Some(file) } else { None }
    }
}

fn read(file: &Path) -> Result<Placement> {
    memory::require_file(file)?;
    let refuse = |what: String| Error::usage(format!("--placement {}: {what}", file.display()));
    let text = std::fs::read(file).map_err(|error| refuse(error.to_string()))?;
    let lists: Lists = serde_json::from_slice(&text).map_err(|error| {
        refuse(format!("{error}, expected linear, round-robin, or a file that `expertile plan --ranks` has written"))
    })?;
    Ok(Placement::from_lists(lists.global_experts, lists.experts)?)
}

/// Writes a placement.
pub(crate) fn write(file: &Path, placement: &Placement) -> Result<()> {
    let experts = (0..placement.ranks()).map(|rank| placement.experts(rank).to_vec()).collect();
    let lists = Lists { global_experts: placement.global_experts(), experts };
    output::write_file(file, output::json(&lists).as_bytes())
}
