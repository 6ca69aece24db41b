//! What ranks must agree on, compared when a layer is prepared.

use crate::error::{Error, Result};
use crate::exchange::Exchange;

/// Bytes that a rank's terms may take: a few hundred, so that another version's terms still fit.
const BYTES: usize = 4096;

/// Names and values, in the same order on every rank.
pub(crate) type Terms = Vec<(&'static str, String)>;

/// Fails, on every rank alike, unless all ranks have rank 0's terms; returns rank 0's `number`.
///
/// # Errors
/// [`Error::Disagreement`] for the lowest rank that differs; as [`Exchange::all_gather`].
pub(crate) fn agree(exchange: &dyn Exchange, terms: &Terms, number: u64) -> Result<u64> {
    let text: String = terms.iter().flat_map(|(name, value)| [name, "=", value, "\n"]).collect();
    let mut mine = vec![0; BYTES];
    mine[..8].copy_from_slice(&number.to_le_bytes());
    // Longer text than fits is compared as far as it does.
    let len = text.len().min(BYTES - 8);
    mine[8..8 + len].copy_from_slice(&text.as_bytes()[..len]);
    let mut all = vec![0; BYTES * exchange.ranks()];
    exchange.all_gather(&mine, &mut all)?;
    let text_of =
        |rank: usize| String::from_utf8_lossy(&all[rank * BYTES + 8..][..BYTES - 8]).trim_end_matches('\0').to_owned();
    let first = text_of(0);
    for rank in 1..exchange.ranks() {
        compare(rank, &text_of(rank), &first, terms)?;
    }
    Ok(u64::from_le_bytes(all[..8].try_into().expect("eight bytes")))
}

fn compare(rank: usize, text: &str, first: &str, terms: &Terms) -> Result<()> {
    let mut ours = text.lines();
    for expected in first.lines() {
        let actual = ours.next().unwrap_or_default();
        if actual == expected {
            continue;
        }
        let (name, expected) = expected.split_once('=').unwrap_or((expected, ""));
        let value = actual.split_once('=').filter(|(its, _)| *its == name).map_or(actual, |(_, value)| value);
        // A name that this rank does not know is of another version of this library.
        let argument = terms.iter().find(|(known, _)| *known == name).map_or("version", |(known, _)| *known);
        return Err(Error::Disagreement { argument, rank, actual: value.into(), expected: expected.into() });
    }
    match ours.next() {
        None => Ok(()),
        Some(more) => {
            Err(Error::Disagreement { argument: "version", rank, actual: more.into(), expected: "no such term".into() })
        }
    }
}
