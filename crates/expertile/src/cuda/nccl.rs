//! NCCL as the exchange between GPUs: what a program's ranks, each with a GPU, move by its collectives.
//!
//! The library is found at run time, like the compiler. Its handshake needs 128 bytes of rank 0 on every rank: they go
//! over an [`Exchange`] between the processes, which may be MPI, files, or a framework's own group.

mod library;

use super::driver::{Device, DevicePtr, Stream};
use crate::error::{Error, Result};
use crate::exchange::Exchange;
use library::{Communicator, Functions, UniqueId, version_text};
use std::fmt;
use std::sync::Arc;
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
    windows: bool,
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
        Ok(Self {
            device: device.clone(),
            functions,
            communicator: Mutex::new(Ok(communicator)),
            rank,
            ranks,
            windows: false,
        })
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

    /// With NCCL's windows: the layer's memory is then NCCL's own and known on all ranks, which it moves without copies
    /// in between. It takes NCCL 2.27 or later, and the same choice on all ranks.
    ///
    /// Its kernels over windows wait for a rank that has died without end (seen with 2.28.3; 2.30 looks whether
    /// the communicator was given up): the process has to be ended then, so this is not for where ranks come and go.
    #[must_use]
    pub fn with_windows(mut self) -> Self {
        self.windows = true;
        self
    }

    /// Whether it has windows.
    #[must_use]
    pub fn has_windows(&self) -> bool {
        self.windows
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

    /// Queues a gather in place: part `r` of what starts at `all`, `bytes` of it, is rank `r`'s.
    ///
    /// # Safety
    /// Device memory that large, that nobody else uses when the stream comes to it; every rank calls.
    #[allow(unsafe_code)]
    pub(in crate::cuda) unsafe fn all_gather(&self, stream: Stream, all: u64, bytes: usize) -> Result<()> {
        let mine = all + (self.rank * bytes) as u64;
        // SAFETY: the caller's promise.
        self.with(|communicator| unsafe { self.functions.all_gather((communicator, stream.0), mine, all, bytes) })
    }

    /// Queues what goes to each other rank, and what comes from it: where it is, and how many bytes.
    ///
    /// # Safety
    /// As [`Nccl::all_gather`]; as many bytes come as the other rank sends.
    #[allow(unsafe_code)]
    pub(in crate::cuda) unsafe fn exchange(
        &self,
        stream: Stream,
        sent: impl Fn(usize) -> (u64, usize),
        received: impl Fn(usize) -> (u64, usize),
    ) -> Result<()> {
        self.with(|communicator| {
            self.functions.group(|| {
                (0..self.ranks).filter(|&rank| rank != self.rank).try_for_each(|rank| {
                    let ((from, sent), (to, received)) = (sent(rank), received(rank));
                    // SAFETY: the caller's promise. Nothing is not sent, and both sides know.
                    unsafe {
                        if sent > 0 {
                            self.functions.send((communicator, stream.0), from, sent, rank)?;
                        }
                        if received > 0 {
                            self.functions.receive((communicator, stream.0), to, received, rank)?;
                        }
                    }
                    Ok(())
                })
            })
        })
    }

    /// Memory of NCCL's own kind.
    ///
    /// # Errors
    /// [`Error::Device`] with a version that has none; [`Error::Nccl`].
    pub(in crate::cuda) fn allocate(self: &Arc<Self>, bytes: usize) -> Result<NcclMemory> {
        let address = self.with(|_| self.functions.allocate(bytes))?.ok_or_else(|| Error::Device {
            argument: "NCCL",
            actual: format!("version {}", self.version()),
            expected: "2.27 or later, which has windows".into(),
        })?;
        Ok(NcclMemory { nccl: self.clone(), address, bytes, window: 0 })
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
        let Ok(handle) = taken else { return };
        let (device, functions) = (self.device.clone(), self.functions);
        let abort = move || {
            // The whole handle, not the address in it, which no thread may take along.
            let Handle(communicator) = { handle };
            if let Ok(_current) = device.current() {
                // SAFETY: taken out, so nobody uses it any more.
                unsafe { functions.abort(communicator) };
            }
        };
        // A kernel over windows may never end, and this would wait for it.
        if self.windows {
            std::thread::spawn(abort);
        } else {
            abort();
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

/// Memory that NCCL has allocated, and perhaps knows on all ranks.
#[derive(Debug)]
pub(in crate::cuda) struct NcclMemory {
    nccl: Arc<Nccl>,
    address: u64,
    bytes: usize,
    /// 0 until it is registered.
    window: u64,
}

impl NcclMemory {
    pub(in crate::cuda) fn ptr(&self) -> DevicePtr {
        DevicePtr::new(self.address)
    }

    /// Makes it known on all ranks: each of them calls, for its own, in the same order, and waits for the others.
    #[allow(unsafe_code)]
    pub(in crate::cuda) fn register(&mut self) -> Result<()> {
        let (functions, address, bytes) = (self.nccl.functions, self.address, self.bytes);
        // SAFETY: the communicator is live, and the memory is of NCCL's allocation.
        self.window = self.nccl.with(|communicator| unsafe { functions.register(communicator, address, bytes) })?;
        Ok(())
    }
}

impl Drop for NcclMemory {
    #[allow(unsafe_code)]
    fn drop(&mut self) {
        let (functions, window, address) = (self.nccl.functions, self.window, self.address);
        let freed = self.nccl.with(|communicator| {
            // SAFETY: allocated, and perhaps registered with this communicator, once; the layer's own. What is queued is
            // done before it is freed.
            unsafe {
                self.nccl.device.synchronize(Stream(0))?;
                functions.deregister(communicator, window);
                functions.free(address);
            }
            Ok(())
        });
        // With a communicator that was given up, a kernel may still use it: it stays.
        let _ = freed;
    }
}
