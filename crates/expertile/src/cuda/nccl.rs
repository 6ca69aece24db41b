//! NCCL as the exchange between GPUs: what a program's ranks, each with a GPU, move by its collectives.
//!
//! The library is found at run time, like the compiler. Its handshake needs 128 bytes of rank 0 on every rank: they go
//! over an [`Exchange`] between the processes, which may be MPI, files, or a framework's own group.

mod library;

use super::driver::{Device, Stream};
use crate::error::{Error, Result};
use crate::exchange::Exchange;
use library::{Communicator, Functions, UniqueId, version_text};
use std::fmt;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::mpsc;
use std::time::Duration;

/// Ranks with a GPU each, joined by NCCL.
pub struct Nccl {
    device: Device,
    functions: &'static Functions,
    /// Or why it was given up.
    communicator: Mutex<Result<Handle>>,
    rank: usize,
    ranks: usize,
}

/// A communicator, which NCCL lets any thread use, one at a time.
#[derive(Clone, Copy)]
struct Handle(Communicator);

// SAFETY: NCCL's communicators belong to no thread; the lock around it lets one use it at a time.
#[allow(unsafe_code)]
unsafe impl Send for Handle {}

impl fmt::Debug for Nccl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}, rank {} of {}", self.functions, self.rank, self.ranks)
    }
}

impl Nccl {
    /// Joins the ranks of `exchange`; every one must call, each with a device of its own. The library is the one that
    /// `EXPERTILE_NCCL` names (a file, or the folder of `libnccl.so.2`), else `libnccl.so.2` as the system's loader
    /// finds it, else that of the active Python environment. A process loads one, and never unloads it.
    ///
    /// # Errors
    /// [`Error::OnRank`], on all ranks, with what is wrong on one of them: [`Error::Device`] if there is no library
    /// (it says where it was looked for) or one that is too old. [`Error::Disagreement`] for ranks with other versions
    /// of it. [`Error::Nccl`]; [`Error::Absent`] if the ranks do not join within `limit`.
    pub fn join(device: &Device, exchange: &dyn Exchange, limit: Duration) -> Result<Self> {
        use crate::expert_parallel::agreement::agree;
        use crate::expert_parallel::meeting::all_are_well;
        let (rank, ranks) = (exchange.rank(), exchange.ranks());
        let found = Functions::find();
        all_are_well(exchange, found.as_ref().err())?;
        let functions = found?;
        agree(exchange, &vec![("NCCL", version_text(functions.version))], 0)?;
        let id = if rank == 0 { functions.unique_id() } else { Ok(UniqueId([0; 128])) };
        all_are_well(exchange, id.as_ref().err())?;
        let mut ids = vec![0; 128 * ranks];
        exchange.all_gather(&id?.0, &mut ids)?;
        let id = UniqueId(ids[..128].try_into().expect("128 bytes"));
        let communicator = Self::init(device, functions, (rank, ranks), id, limit)?;
        Ok(Self { device: device.clone(), functions, communicator: Mutex::new(Ok(communicator)), rank, ranks })
    }

    /// In a thread of its own, which is left behind if the others do not come: NCCL has no way to end that wait.
    fn init(
        device: &Device,
        functions: &'static Functions,
        (rank, ranks): (usize, usize),
        id: UniqueId,
        limit: Duration,
    ) -> Result<Handle> {
        let (send, receive) = mpsc::channel();
        let device = device.clone();
        std::thread::spawn(move || {
            let made = device.current().and_then(|_current| functions.init_rank(ranks, id, rank).map(Handle));
            // Nobody listens any more if the wait was given up.
            let _ = send.send(made);
        });
        // Which rank it is that does not come, NCCL does not say: the next one is as good a guess as any.
        receive.recv_timeout(limit).unwrap_or(Err(Error::Absent { rank: (rank + 1) % ranks, waited: limit }))
    }

    /// The library's version, as `2.28.9`.
    #[must_use]
    pub fn version(&self) -> String {
        version_text(self.functions.version)
    }

    /// This rank.
    #[must_use]
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// `R`.
    #[must_use]
    pub fn ranks(&self) -> usize {
        self.ranks
    }

    fn with<T>(&self, work: impl FnOnce(Communicator) -> Result<T>) -> Result<T> {
        let communicator = self.communicator.lock().unwrap_or_else(PoisonError::into_inner);
        let Handle(communicator) = communicator.clone()?;
        let _current = self.device.current()?;
        work(communicator)
    }

    /// Queues several gathers as one launch: of each `(from, to, bytes)`, every rank's `bytes` of `from` to `to` of all
    /// ranks, in the order of ranks.
    ///
    /// # Safety
    /// Device memory that large, that nobody else uses when the stream comes to it; every rank calls.
    #[allow(unsafe_code)]
    pub(in crate::cuda) unsafe fn all_gather(&self, stream: Stream, parts: &[(u64, u64, usize)]) -> Result<()> {
        self.with(|communicator| {
            self.functions.group(|| {
                parts.iter().try_for_each(|&(from, to, bytes)| {
                    // SAFETY: the caller's promise.
                    unsafe { self.functions.all_gather((communicator, stream.0), from, to, bytes) }
                })
            })
        })
    }

    /// Queues part `r` of `from` to rank `r`, and to part `r` of `to` what rank `r` sends here, `bytes` each. A rank's
    /// own part is not touched.
    ///
    /// # Safety
    /// As [`Nccl::all_gather`].
    #[allow(unsafe_code)]
    pub(in crate::cuda) unsafe fn all_to_all(&self, stream: Stream, from: u64, to: u64, bytes: usize) -> Result<()> {
        self.with(|communicator| {
            self.functions.group(|| {
                (0..self.ranks).filter(|&rank| rank != self.rank).try_for_each(|rank| {
                    let at = (rank * bytes) as u64;
                    // SAFETY: the caller's promise.
                    unsafe {
                        self.functions.send((communicator, stream.0), from + at, bytes, rank)?;
                        self.functions.receive((communicator, stream.0), to + at, bytes, rank)
                    }
                })
            })
        })
    }

    /// What has gone wrong since the last call, as far as NCCL has seen it.
    pub(in crate::cuda) fn check(&self) -> Result<()> {
        // SAFETY: the communicator is live.
        #[allow(unsafe_code)]
        self.with(|communicator| unsafe { self.functions.async_error(communicator) })
    }

    /// Ends what is under way: kernels that wait for other ranks stop, and every further call is that error.
    #[allow(unsafe_code)]
    pub(in crate::cuda) fn give_up(&self, error: Error) {
        let mut communicator = self.communicator.lock().unwrap_or_else(PoisonError::into_inner);
        let taken = if communicator.is_ok() { std::mem::replace(&mut *communicator, Err(error)) } else { return };
        if let (Ok(Handle(communicator)), Ok(_current)) = (taken, self.device.current()) {
            // SAFETY: taken out, so nobody uses it any more.
            unsafe { self.functions.abort(communicator) };
        }
    }
}

impl Drop for Nccl {
    #[allow(unsafe_code)]
    fn drop(&mut self) {
        let communicator = self.communicator.get_mut().unwrap_or_else(PoisonError::into_inner).clone();
        if let (Ok(Handle(communicator)), Ok(_current)) = (communicator, self.device.current()) {
            // SAFETY: nobody else has this value any more.
            unsafe { self.functions.destroy(communicator) };
        }
    }
}
