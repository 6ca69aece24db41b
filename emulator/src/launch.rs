//! A launch: the grid's blocks, each on a thread of the operating system, as many at once as the device holds.

use crate::block::Block;
use crate::fault;
use crate::machine::{Machine, Thread};
use crate::memory::Shared;
use std::ffi::c_void;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

/// Runs one thread of a kernel, with the addresses of its parameters.
pub type Call = unsafe extern "C" fn(*const *const c_void);

/// A kernel's functions in the shared object that it was compiled to.
#[derive(Clone, Copy)]
pub struct Kernel {
    pub connect: unsafe extern "C" fn(*const Machine),
    /// Before a thread goes on.
    pub resume: unsafe extern "C" fn(*mut Thread),
    /// After a thread has ended, where it may have something to free.
    pub end: Option<unsafe extern "C" fn(*mut Thread)>,
    pub call: Call,
    /// Blocks of a cluster.
    pub cluster: u32,
}

/// Blocks that run at the same time and reach each other's shared memory.
pub struct Cluster {
    shared: Vec<usize>,
    threads: u32,
    arrived: AtomicU32,
    times: AtomicU32,
}

impl Cluster {
    /// Where the shared memory of one of its blocks starts.
    pub fn shared(&self, rank: u32) -> Option<usize> {
        self.shared.get(rank as usize).copied()
    }

    /// A thread arrives: which meeting it is.
    pub fn arrive(&self) -> u32 {
        let meeting = self.times.load(Ordering::Acquire);
        if self.arrived.fetch_add(1, Ordering::AcqRel) + 1 == self.threads {
            self.arrived.store(0, Ordering::Release);
            self.times.store(meeting.wrapping_add(1), Ordering::Release);
        }
        meeting
    }

    /// Whether all threads of all its blocks have arrived.
    pub fn has_met(&self, meeting: u32) -> bool {
        self.times.load(Ordering::Acquire) != meeting
    }
}

/// How far a launch is.
pub struct Progress {
    blocks: u32,
    /// Blocks that let the next launch start, or have ended.
    letting: AtomicU32,
    done: Arc<AtomicBool>,
    previous: Option<Arc<AtomicBool>>,
}

impl Progress {
    /// Of a launch of so many blocks, after another.
    pub fn new(blocks: u32, previous: Option<&Progress>) -> Self {
        let previous = previous.map(|progress| progress.done.clone());
        Self { blocks, letting: AtomicU32::new(0), done: Arc::default(), previous }
    }

    pub fn let_next_start(&self) {
        self.letting.fetch_add(1, Ordering::AcqRel);
    }

    pub fn may_next_start(&self) -> bool {
        self.letting.load(Ordering::Acquire) >= self.blocks
    }

    pub fn previous_is_done(&self) -> bool {
        self.previous.as_ref().is_none_or(|done| done.load(Ordering::Acquire))
    }
}

/// A parameter's bytes, aligned as any of them may be.
pub struct Parameter(Vec<Line>);

#[repr(align(128))]
#[derive(Clone, Copy)]
struct Line([u8; 128]);

impl Parameter {
    pub fn new(bytes: &[u8]) -> Self {
        let line = |part: &[u8]| {
            let mut line = Line([0; 128]);
            line.0[..part.len()].copy_from_slice(part);
            line
        };
        Self(bytes.chunks(128).map(line).collect())
    }

    pub fn address(&self) -> *const c_void {
        self.0.as_ptr().cast()
    }
}

/// A grid, ready to run as often as one likes.
#[derive(Clone)]
pub struct Launch {
    pub kernel: Kernel,
    pub blocks: u32,
    pub threads: u32,
    pub shared_bytes: u32,
    pub parameters: Arc<Vec<Parameter>>,
    /// How many blocks run at once.
    pub resident: u32,
    /// May start before the launch before it is done, and waits for it itself.
    pub overlaps: bool,
}

impl Launch {
    /// Runs all blocks to their ends.
    pub fn run(&self, progress: &Arc<Progress>) {
        let size = self.kernel.cluster;
        if !self.blocks.is_multiple_of(size) {
            fault!("{} blocks in clusters of {size}", self.blocks);
        }
        let clusters = self.blocks / size;
        let next = AtomicU32::new(0);
        let at_once = (self.resident / size).clamp(1, clusters.max(1));
        std::thread::scope(|scope| {
            for _ in 0..at_once {
                scope.spawn(|| {
                    loop {
                        let cluster = next.fetch_add(1, Ordering::Relaxed);
                        if cluster >= clusters {
                            break;
                        }
                        self.run_cluster(cluster, progress);
                    }
                });
            }
        });
        progress.done.store(true, Ordering::Release);
    }

    fn run_cluster(&self, number: u32, progress: &Arc<Progress>) {
        let size = self.kernel.cluster;
        let shared: Vec<_> = (0..size).map(|_| Shared::new(self.shared_bytes as usize)).collect();
        let cluster = Arc::new(Cluster {
            shared: shared.iter().map(Shared::start).collect(),
            threads: size * self.threads,
            arrived: AtomicU32::new(0),
            times: AtomicU32::new(0),
        });
        let run = |rank: u32, shared| {
            let block = Block::new(shared, cluster.clone(), rank, self.threads as usize, progress.clone());
            block.run(&self.kernel, number * size + rank, self.blocks, &self.parameters);
        };
        std::thread::scope(|scope| {
            for (rank, shared) in (0..).zip(shared) {
                let run = &run;
                scope.spawn(move || run(rank, shared));
            }
        });
    }
}
