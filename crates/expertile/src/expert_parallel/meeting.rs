//! The meeting at the start of every call: how much comes from whom, and whether anything is wrong anywhere.
//!
//! A rank whose input is bad comes to the meeting like any other and says so; then all ranks return the same error,
//! and none is left waiting for tokens that will not come.

use crate::error::{Error, Result};
use crate::exchange::Exchange;
use bytemuck::{Pod, Zeroable};

/// What a rank says to another at the start of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct Record {
    /// The layer's number, which rank 0 gave it.
    pub(crate) layer: u64,
    /// How many calls of the layer there were before.
    pub(crate) call: u64,
    /// 0, or 1 if the sender's input was refused.
    pub(crate) refused: u64,
    /// Rows that the receiver gets from the sender.
    pub(crate) rows: u64,
}

/// Bytes of a refusal's text; a longer one is cut.
const MESSAGE: usize = 1024;

/// Exchanges records: `rows[r]` of this rank go to rank `r`. Returns how many come from each.
///
/// # Errors
/// [`Error::OnRank`] on all ranks if one of them was refused; [`Error::Disagreement`] on all ranks if they are not in
/// the same call of the same layer; as [`Exchange::all_to_all_v`].
pub(crate) fn meet(
    exchange: &dyn Exchange,
    (layer, call): (u64, u64),
    refused: Option<&Error>,
    rows: &[usize],
) -> Result<Vec<usize>> {
    let record = |&rows: &usize| Record { layer, call, refused: refused.is_some().into(), rows: rows as u64 };
    let mine: Vec<Record> = rows.iter().map(record).collect();
    let mut theirs = vec![Record::zeroed(); exchange.ranks()];
    let send: Vec<&[u8]> = mine.iter().map(bytemuck::bytes_of).collect();
    let mut receive: Vec<&mut [u8]> = theirs.iter_mut().map(bytemuck::bytes_of_mut).collect();
    exchange.all_to_all_v(&send, &mut receive)?;
    for (rank, record) in theirs.iter().enumerate() {
        for (argument, actual, expected) in
            [("layer", record.layer, theirs[0].layer), ("call", record.call, theirs[0].call)]
        {
            if actual != expected {
                let (actual, expected) = (format!("number {actual}"), format!("number {expected}"));
                return Err(Error::Disagreement { argument, rank, actual, expected });
            }
        }
    }
    match theirs.iter().position(|record| record.refused != 0) {
        None => Ok(theirs.iter().map(|record| record.rows as usize).collect()),
        Some(rank) => Err(refusal(exchange, rank, refused)?),
    }
}

/// Fails, on every rank alike, if one of them was refused.
///
/// # Errors
/// As [`meet`].
pub(crate) fn all_are_well(exchange: &dyn Exchange, refused: Option<&Error>) -> Result<()> {
    meet(exchange, (0, 0), refused, &vec![0; exchange.ranks()]).map(drop)
}

/// What the lowest refused rank was refused for.
fn refusal(exchange: &dyn Exchange, rank: usize, mine: Option<&Error>) -> Result<Error> {
    let mut text = mine.map(Error::to_string).unwrap_or_default();
    while text.len() > MESSAGE {
        text.pop();
    }
    let mut padded = [0; MESSAGE];
    padded[..text.len()].copy_from_slice(text.as_bytes());
    let mut all = vec![0; MESSAGE * exchange.ranks()];
    exchange.all_gather(&padded, &mut all)?;
    let message = String::from_utf8_lossy(&all[rank * MESSAGE..][..MESSAGE]);
    Ok(Error::OnRank { rank, message: message.trim_end_matches('\0').to_owned() })
}
