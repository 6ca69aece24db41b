//! How ranks hand bytes to each other: one trait over the engines that exist.
//!
//! Nothing here is a transport of its own. [`Alone`] is one rank, [`Threads`] several in one process (for tests, and
//! for programs that run a rank in each thread), [`Mpi`] an MPI library found at run time. The trait is about host
//! memory; it never looks at what the bytes mean.
//!
//! Every rank takes part in every call, in the same order, with nothing to send too. A rank that does not come within
//! the time limit is named by [`Error::Absent`], a message of another length by [`Error::Message`]: nobody waits for
//! ever, and nothing that was not sent is read. After an error an exchange is broken, and says the same in every later
//! call: bytes of the failed call may still be under way.

mod files;
#[cfg(feature = "mpi")]
mod mpi;
mod threads;

use crate::error::{Error, Result, require_exact};
pub use files::Files;
#[cfg(feature = "mpi")]
pub use mpi::Mpi;
use std::fmt;
use std::time::Duration;
pub use threads::Threads;

/// How long a rank waits for another unless told otherwise: longer than any call, shorter than a night.
pub const TIME_LIMIT: Duration = Duration::from_secs(60);

/// Several ranks that hand bytes to each other.
///
/// Calls of one exchange come one after the other, on every rank in the same order.
pub trait Exchange: fmt::Debug + Send + Sync {
    /// This rank's number, below [`Exchange::ranks`].
    fn rank(&self) -> usize;

    /// `R`.
    fn ranks(&self) -> usize;

    /// Sends `send[r]` to every rank `r` and fills `receive[r]` with what rank `r` sends here: `R` slices each, of any
    /// length, this rank's own among them. Several `send[r]` may be the same bytes.
    ///
    /// # Errors
    /// [`Error::Shape`] unless there are `R` slices each, [`Error::Message`] if a rank sends another number of bytes
    /// than `receive` has room for, [`Error::Absent`] past the time limit, [`Error::Mpi`].
    fn all_to_all_v(&self, send: &[&[u8]], receive: &mut [&mut [u8]]) -> Result<()>;

    /// Fills `all` with every rank's `mine`, in the order of ranks; `mine` is as long on all of them.
    ///
    /// # Errors
    /// [`Error::Shape`] unless `all` is `R` times as long as `mine`; as [`Exchange::all_to_all_v`].
    fn all_gather(&self, mine: &[u8], all: &mut [u8]) -> Result<()> {
        require_exact("all", all.len(), &[self.ranks(), mine.len()])?;
        let mut receive: Vec<&mut [u8]> = match mine.len() {
            0 => (0..self.ranks()).map(|_| &mut [][..]).collect(),
            len => all.chunks_exact_mut(len).collect(),
        };
        self.all_to_all_v(&vec![mine; self.ranks()], &mut receive)
    }

    /// Returns when every rank has come.
    ///
    /// # Errors
    /// As [`Exchange::all_to_all_v`].
    fn meet(&self) -> Result<()> {
        self.all_gather(&[], &mut [])
    }
}

/// Fails unless there is a slice for every rank on both sides, and as much for this rank as from it.
fn require_slices(rank: usize, ranks: usize, send: &[&[u8]], receive: &[&mut [u8]]) -> Result<()> {
    require_exact("send", send.len(), &[ranks])?;
    require_exact("receive", receive.len(), &[ranks])?;
    require_message(rank, send[rank].len(), receive[rank].len())
}

fn require_message(rank: usize, actual: usize, expected: usize) -> Result<()> {
    if actual != expected {
        return Err(Error::Message { rank, actual, expected });
    }
    Ok(())
}

/// One rank, which has every expert and nobody to talk to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Alone;

impl Exchange for Alone {
    fn rank(&self) -> usize {
        0
    }

    fn ranks(&self) -> usize {
        1
    }

    fn all_to_all_v(&self, send: &[&[u8]], receive: &mut [&mut [u8]]) -> Result<()> {
        require_slices(0, 1, send, receive)?;
        receive[0].copy_from_slice(send[0]);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rank_alone_gets_back_what_it_sends() {
        let mut all = [0; 3];
        Alone.all_gather(&[1, 2, 3], &mut all).unwrap();
        assert_eq!(all, [1, 2, 3]);
        Alone.meet().unwrap();
        let error = Alone.all_gather(&[1, 2], &mut all).unwrap_err().to_string();
        assert!(error.starts_with("all has shape [3], expected [2]"), "{error}");
        let error = Alone.all_to_all_v(&[&[1]], &mut [&mut all]).unwrap_err();
        assert_eq!(error, Error::Message { rank: 0, actual: 1, expected: 3 });
        let error = Alone.all_to_all_v(&[], &mut []).unwrap_err().to_string();
        assert!(error.starts_with("send has shape [0], expected [1]"), "{error}");
    }
}
