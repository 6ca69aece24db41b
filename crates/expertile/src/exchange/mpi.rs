//! Ranks that are processes, over the MPI library of this machine.
//!
//! No MPI is needed to build: a library is found at run time, of any of the three ABIs that there are (`mpi/library`).
//! Messages go from rank to rank without blocking and are polled, rather than through one collective call: so a rank
//! that does not come can be named after a time limit, and the length of what came is compared with what was waited
//! for, which collectives do not do (a receiver of less than it expects is told success).
//!
//! Messages are sent from, and received into, memory that this module owns: should a call fail while messages are under
//! way, that memory is left to MPI for ever, and nothing of the caller's is touched any more.

mod library;

use super::{Exchange, TIME_LIMIT, require_message, require_slices};
use crate::error::{Error, Result};
use library::{Communicator, Library, Request};
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Bytes of one message: MPI counts them in a C `int`. A longer slice goes in several.
const MESSAGE: usize = 1 << 30;

/// Tests without an answer before the processor is given to others, of which one may be the rank that is waited for.
const SPINS: usize = 64;

/// This process as one of the ranks that `mpiexec` has started.
///
/// MPI is started with the first value, unless the program has started it, and ended with the last one, if nothing went
/// wrong until then. One thread at a time may be in MPI (`MPI_THREAD_SERIALIZED`): calls of this type keep to that
/// among themselves, and a program that calls MPI itself must not do so meanwhile.
#[derive(Debug)]
pub struct Mpi {
    communicator: Communicator,
    rank: usize,
    ranks: usize,
    limit: Duration,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Memory of messages under way: sent, then received.
    sent: Vec<u8>,
    received: Vec<u8>,
    /// The error after which nothing is exchanged any more.
    broken: Option<Error>,
}

impl Mpi {
    /// The ranks of `MPI_COMM_WORLD`, with [`TIME_LIMIT`]. The library is the one that `EXPERTILE_MPI` names, else that
    /// of the launcher, else the first of `libmpi_abi.so.1`, Open MPI's `libmpi.so.40` and MPICH's `libmpi.so.12` that
    /// the system's loader finds.
    ///
    /// # Errors
    /// [`Error::Device`] if there is no library, and says where it was looked for; as [`Mpi::open_with`].
    pub fn open() -> Result<Self> {
        Self::start(Library::find()?, TIME_LIMIT)
    }

    /// The same with a library by path, and a time limit.
    ///
    /// # Errors
    /// [`Error::Device`] if the file is no MPI library, if MPI cannot run threads, has ended already, or sees another
    /// number of ranks than the launcher started; [`Error::Mpi`].
    pub fn open_with(library: Option<&Path>, limit: Duration) -> Result<Self> {
        Self::start(library.map_or_else(Library::find, Library::load)?, limit)
    }

    fn start(library: &'static Library, limit: Duration) -> Result<Self> {
        let communicator = Communicator::world(library)?;
        let (rank, ranks) = (communicator.rank()?, communicator.ranks()?);
        Ok(Self { communicator, rank, ranks, limit, state: Mutex::default() })
    }

    /// The library's own name and version.
    #[must_use]
    pub fn library(&self) -> &str {
        self.communicator.library()
    }

    /// Ends this rank's part without waiting for the others: MPI is not ended in an orderly way, and `mpiexec` ends the
    /// job when the process ends. For a rank that stops because of something that the others do not know.
    pub fn abandon(&self) {
        self.communicator.abandon();
    }

    fn exchange(&self, state: &mut State, send: &[&[u8]], receive: &mut [&mut [u8]]) -> Result<()> {
        let others: Vec<usize> = (0..self.ranks).filter(|&rank| rank != self.rank).collect();
        let State { sent, received, .. } = state;
        sent.clear();
        others.iter().for_each(|&rank| sent.extend_from_slice(send[rank]));
        let needed = others.iter().map(|&rank| receive[rank].len()).sum();
        if received.len() < needed {
            received.resize(needed, 0);
        }
        let mut requests = Vec::new();
        let done =
            self.post(&others, send, receive, (sent, received), &mut requests).and_then(|()| self.wait(&mut requests));
        if let Err(error) = done {
            // MPI may still read and write there.
            std::mem::forget((std::mem::take(sent), std::mem::take(received)));
            self.abandon();
            return Err(error);
        }
        let mut rest = &received[..];
        for rank in others {
            let (part, others) = rest.split_at(receive[rank].len());
            receive[rank].copy_from_slice(part);
            rest = others;
        }
        Ok(())
    }

    /// Starts every receive, then every send.
    fn post(
        &self,
        others: &[usize],
        send: &[&[u8]],
        receive: &[&mut [u8]],
        (sent, received): (&[u8], &mut [u8]),
        requests: &mut Vec<Pending>,
    ) -> Result<()> {
        let mut rest = received;
        for &rank in others {
            let (part, others) = rest.split_at_mut(receive[rank].len());
            rest = others;
            let mut part = part;
            for len in messages(part.len()) {
                let (message, others) = part.split_at_mut(len);
                part = others;
                let mut pending = Pending { rank, receives: Some(len), request: Request::none() };
                let started = self.communicator.receive(message, rank, &mut pending.request);
                requests.push(pending);
                started?;
            }
        }
        let mut rest = sent;
        for &rank in others {
            for len in messages(send[rank].len()) {
                let (part, others) = rest.split_at(len);
                rest = others;
                let mut pending = Pending { rank, receives: None, request: Request::none() };
                let started = self.communicator.send(part, rank, &mut pending.request);
                requests.push(pending);
                started?;
            }
        }
        Ok(())
    }

    /// Polls until every request is done, or the time is up.
    fn wait(&self, requests: &mut [Pending]) -> Result<()> {
        let started = Instant::now();
        let mut open: Vec<&mut Pending> = requests.iter_mut().collect();
        for round in 0usize.. {
            let mut failed = Ok(());
            open.retain_mut(|pending| match pending.test(&self.communicator) {
                Ok(done) => !done,
                Err(error) => {
                    failed = Err(error);
                    true
                }
            });
            failed?;
            let Some(first) = open.first() else { break };
            if round > SPINS {
                let waited = started.elapsed();
                if waited >= self.limit {
                    return Err(Error::Absent { rank: first.rank, waited });
                }
                std::thread::yield_now();
            }
        }
        Ok(())
    }
}

/// Lengths of the messages that a slice goes in: at least one, so that nothing to send is told, too.
fn messages(len: usize) -> impl Iterator<Item = usize> {
    (0..len.div_ceil(MESSAGE).max(1)).map(move |index| (len - index * MESSAGE).min(MESSAGE))
}

/// A message under way.
#[derive(Debug)]
struct Pending {
    rank: usize,
    /// Bytes that a receive waits for.
    receives: Option<usize>,
    request: Request,
}

impl Pending {
    /// Whether it has arrived; of another length than was waited for, it is an error. (A longer one is MPI's own.)
    fn test(&mut self, communicator: &Communicator) -> Result<bool> {
        let Some(status) = communicator.test(&mut self.request)? else { return Ok(false) };
        if let Some(expected) = self.receives {
            require_message(self.rank, communicator.bytes(&status)?, expected)?;
        }
        Ok(true)
    }
}

impl Exchange for Mpi {
    fn rank(&self) -> usize {
        self.rank
    }

    fn ranks(&self) -> usize {
        self.ranks
    }

    fn all_to_all_v(&self, send: &[&[u8]], receive: &mut [&mut [u8]]) -> Result<()> {
        require_slices(self.rank, self.ranks, send, receive)?;
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(error) = &state.broken {
            return Err(error.clone());
        }
        let done = library::one_at_a_time(|| self.exchange(&mut state, send, receive));
        if let Err(error) = done {
            state.broken = Some(error.clone());
            return Err(error);
        }
        receive[self.rank].copy_from_slice(send[self.rank]);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slice_goes_in_messages_that_an_int_counts() {
        let lengths = |len| messages(len).collect::<Vec<_>>();
        assert_eq!(lengths(0), [0]);
        assert_eq!(lengths(5), [5]);
        assert_eq!(lengths(MESSAGE), [MESSAGE]);
        assert_eq!(lengths(2 * MESSAGE + 1), [MESSAGE, MESSAGE, 1]);
    }

    #[test]
    fn a_library_that_is_none_is_named() {
        let error = Mpi::open_with(Some(Path::new("/none/libmpi.so")), TIME_LIMIT).unwrap_err();
        assert!(matches!(&error, Error::Device { argument: "MPI", .. }), "{error}");
        assert!(error.to_string().starts_with("MPI is /none/libmpi.so ("), "{error}");
    }
}
