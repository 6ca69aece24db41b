//! A block: its threads are coroutines of one thread of the operating system and take turns, each until it has to wait.

use crate::fault;
use crate::launch::{Call, Cluster, Kernel, Parameter, Progress};
use crate::machine::{Machine, Place, Thread};
use crate::memory::{STATIC_BYTES, Shared};
use corosensei::stack::DefaultStack;
use corosensei::{Coroutine, CoroutineResult, Yielder};
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

const STACK_BYTES: usize = 64 << 10;
const LANES: usize = 32;
/// If no block of any launch gets anywhere for so long, they hang.
const PATIENCE: Duration = Duration::from_secs(60);
/// A block that gets nowhere for so long leaves the processor to others.
const IMPATIENCE: Duration = Duration::from_micros(200);

/// When a block last got on.
static MOVED: Mutex<Option<Instant>> = Mutex::new(None);
static STACKS: Mutex<Vec<DefaultStack>> = Mutex::new(Vec::new());
/// Moves on with every block, so that no two take turns alike.
static SEED: AtomicU64 = AtomicU64::new(1);

thread_local! {
    static CURRENT: Cell<(*const Block, usize)> = const { Cell::new((std::ptr::null(), 0)) };
}

/// The block and the thread in it that run now.
pub fn current() -> (&'static Block, usize) {
    let (block, thread) = CURRENT.get();
    // SAFETY: set by `Block::run` for as long as its coroutines run, and only they call.
    (unsafe { &*block }, thread)
}

/// Where threads meet.
#[derive(Default)]
struct Meeting {
    arrived: Cell<usize>,
    times: Cell<u64>,
}

/// Where the lanes of a warp tell each other a value. Two of them in turn: who is early for the next time leaves this
/// one alone.
#[derive(Default)]
struct Warp {
    meeting: Meeting,
    values: RefCell<[[u64; LANES]; 2]>,
}

/// Something that the hardware does on its own, later.
struct Later {
    turn: u64,
    action: Box<dyn FnOnce()>,
}

/// What a thread has begun and not finished.
#[derive(Default)]
pub struct Pending {
    /// Words on their way to shared memory, which the next arrival for them waits for.
    pub words: RefCell<Vec<(u32, *const u32)>>,
    /// Stores that have not read their shared memory yet: in the open group, and in all.
    pub open_stores: RefCell<Vec<Box<dyn FnOnce()>>>,
    pub stores: std::rc::Rc<Cell<usize>>,
}

/// A thread, suspended or not begun.
type Turns = Coroutine<(), (), (), DefaultStack>;

pub struct Block {
    pub shared: Shared,
    pub cluster: std::sync::Arc<Cluster>,
    pub rank: u32,
    pub progress_of_launch: std::sync::Arc<Progress>,
    lets_next_start: Cell<bool>,
    pub pending: Vec<Pending>,
    threads: usize,
    live: Cell<usize>,
    live_in_warp: Vec<Cell<usize>>,
    named: Vec<Meeting>,
    warps: Vec<Warp>,
    variables: RefCell<HashMap<Vec<u8>, usize>>,
    variables_end: Cell<usize>,
    later: RefCell<Vec<Later>>,
    turn: Cell<u64>,
    random: Cell<u64>,
    moved: Cell<bool>,
    waiting_for: Vec<Cell<&'static str>>,
    yielders: Vec<Cell<*const Yielder<(), ()>>>,
}

impl Block {
    pub fn new(
        shared: Shared,
        cluster: std::sync::Arc<Cluster>,
        rank: u32,
        threads: usize,
        progress_of_launch: std::sync::Arc<Progress>,
    ) -> Self {
        let warps = threads.div_ceil(LANES);
        let seed = SEED.fetch_add(1, Ordering::Relaxed);
        Self {
            variables_end: Cell::new(shared.start()),
            shared,
            cluster,
            rank,
            progress_of_launch,
            lets_next_start: Cell::new(false),
            pending: (0..threads).map(|_| Pending::default()).collect(),
            threads,
            live: Cell::new(threads),
            live_in_warp: (0..warps).map(|warp| Cell::new(LANES.min(threads - warp * LANES))).collect(),
            named: (0..16).map(|_| Meeting::default()).collect(),
            warps: (0..warps).map(|_| Warp::default()).collect(),
            variables: RefCell::default(),
            later: RefCell::default(),
            turn: Cell::new(0),
            random: Cell::new(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1),
            moved: Cell::new(false),
            waiting_for: (0..threads).map(|_| Cell::new("")).collect(),
            yielders: (0..threads).map(|_| Cell::new(std::ptr::null())).collect(),
        }
    }

    fn random(&self) -> u64 {
        let mut x = self.random.get();
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        self.random.set(x);
        x >> 16
    }

    /// Runs the kernel's threads to their ends.
    pub fn run(&self, kernel: &Kernel, number: u32, blocks: u32, parameters: &[Parameter]) {
        let machine: *const Machine = crate::machine::machine();
        // SAFETY: the kernel's own function, which keeps the pointer; the machine is static.
        unsafe { (kernel.connect)(machine) };
        let addresses: Vec<*const c_void> = parameters.iter().map(Parameter::address).collect();
        let mut contexts: Vec<Thread> = (0..self.threads as u32).map(|i| self.context(i, number, blocks)).collect();
        let mut coroutines: Vec<_> =
            (0..self.threads).map(|i| Some(self.coroutine(i, kernel.call, &addresses))).collect();
        let mut moved_at = Instant::now();
        while self.live.get() > 0 {
            self.moved.set(false);
            self.take_turns(kernel, &mut contexts, &mut coroutines);
            self.do_what_is_due();
            if self.moved.get() {
                moved_at = Instant::now();
                *MOVED.lock().unwrap() = Some(moved_at);
            } else if moved_at.elapsed() < IMPATIENCE {
                std::thread::yield_now();
            } else if MOVED.lock().unwrap().is_some_and(|moved| moved.elapsed() > PATIENCE) {
                self.hang(number);
            } else {
                std::thread::sleep(IMPATIENCE);
            }
        }
        self.let_next_launch_start();
        if !self.later.borrow().is_empty() {
            fault!("block {number} ended while copies from or to its shared memory were on their way");
        }
    }

    /// What a thread is told about itself.
    fn context(&self, thread: u32, number: u32, blocks: u32) -> Thread {
        let place = |x| Place { x, y: 0, z: 0 };
        let size = |x| Place { x, y: 1, z: 1 };
        Thread {
            thread: place(thread),
            block: place(number),
            threads: size(self.threads as u32),
            blocks: size(blocks),
            rank: self.rank,
            dynamic_shared: self.shared.dynamic(),
            products: std::ptr::null_mut(),
        }
    }

    fn coroutine(&self, thread: usize, call: Call, addresses: &[*const c_void]) -> Turns {
        let pooled = STACKS.lock().unwrap().pop();
        let stack = pooled.unwrap_or_else(|| match DefaultStack::new(STACK_BYTES) {
            Ok(stack) => stack,
            Err(error) => fault!("no stack for thread {thread}: {error}"),
        });
        let slot: *const Cell<*const Yielder<(), ()>> = &self.yielders[thread];
        let addresses = addresses.as_ptr();
        Coroutine::with_stack(stack, move |yielder: &Yielder<(), ()>, ()| {
            // SAFETY: the block and the addresses outlive its coroutines; parameters are as the launch found them.
            unsafe {
                (*slot).set(yielder);
                call(addresses);
            }
        })
    }

    /// Each thread that has not ended goes on until it waits, from any of them on, forwards or backwards.
    fn take_turns(&self, kernel: &Kernel, contexts: &mut [Thread], coroutines: &mut [Option<Turns>]) {
        let first = self.random() as usize % self.threads;
        let backwards = self.random().is_multiple_of(2);
        for step in 0..self.threads {
            let thread = (if backwards { first + self.threads - step } else { first + step }) % self.threads;
            let Some(coroutine) = &mut coroutines[thread] else { continue };
            CURRENT.set((self, thread));
            // SAFETY: the kernel keeps the pointer for as long as its thread runs.
            unsafe { (kernel.resume)(&mut contexts[thread]) };
            if let CoroutineResult::Yield(()) = coroutine.resume(()) {
                continue;
            }
            self.end_thread(thread);
            if let Some(end) = kernel.end {
                // SAFETY: the thread has ended; this frees what it had.
                unsafe { end(&mut contexts[thread]) };
            }
            STACKS.lock().unwrap().extend(coroutines[thread].take().map(Coroutine::into_stack));
        }
    }

    fn end_thread(&self, thread: usize) {
        self.moved.set(true);
        self.live.set(self.live.get() - 1);
        let warp = &self.live_in_warp[thread / LANES];
        warp.set(warp.get() - 1);
    }

    /// Once for the block, and at the latest when it ends.
    pub fn let_next_launch_start(&self) {
        if !self.lets_next_start.replace(true) {
            self.progress_of_launch.let_next_start();
        }
    }

    fn hang(&self, number: u32) -> ! {
        let mut reasons: HashMap<&str, Vec<usize>> = HashMap::new();
        for (thread, reason) in self.waiting_for.iter().enumerate() {
            reasons.entry(reason.get()).or_default().push(thread);
        }
        fault!("block {number} hangs; its threads last waited for {reasons:?}")
    }

    fn do_what_is_due(&self) {
        let turn = self.turn.get() + 1;
        self.turn.set(turn);
        let mut due = Vec::new();
        self.later.borrow_mut().retain_mut(|later| {
            let is_due = later.turn <= turn;
            if is_due {
                due.push(std::mem::replace(&mut later.action, Box::new(|| ())));
            }
            !is_due
        });
        for action in due {
            self.moved.set(true);
            action();
        }
    }

    /// Some turns from now.
    pub fn later(&self, action: Box<dyn FnOnce()>) {
        let turn = self.turn.get() + self.random() % 6;
        self.later.borrow_mut().push(Later { turn, action });
    }

    /// Lets the others go on.
    pub fn wait(&self, thread: usize, reason: &'static str) {
        self.waiting_for[thread].set(reason);
        // SAFETY: set when the coroutine began; it lives while the coroutine does.
        unsafe { (*self.yielders[thread].get()).suspend(()) };
    }

    /// A thread got on.
    pub fn progress(&self) {
        self.moved.set(true);
    }

    /// Until as many as `expected` says now are at the meeting.
    fn meet(&self, meeting: &Meeting, thread: usize, reason: &'static str, expected: impl Fn() -> usize) {
        let times = meeting.times.get();
        meeting.arrived.set(meeting.arrived.get() + 1);
        self.progress();
        while meeting.times.get() == times {
            if meeting.arrived.get() >= expected() {
                meeting.arrived.set(0);
                meeting.times.set(times + 1);
                break;
            }
            self.wait(thread, reason);
        }
        self.progress();
    }

    /// All threads of the block that have not ended.
    pub fn meet_all(&self, thread: usize) {
        self.meet(&self.named[0], thread, "the block", || self.live.get());
    }

    /// As many threads as are said, at a barrier of that number.
    pub fn meet_some(&self, thread: usize, barrier: usize, threads: usize) {
        if barrier == 0 || barrier >= self.named.len() || !threads.is_multiple_of(LANES) {
            fault!("barrier {barrier} for {threads} threads");
        }
        self.meet(&self.named[barrier], thread, "a named barrier", || threads);
    }

    /// The values of the warp's live lanes.
    pub fn exchange(&self, thread: usize, mine: u64, all: &mut [u64; LANES]) {
        let warp = &self.warps[thread / LANES];
        let which = (warp.meeting.times.get() % 2) as usize;
        warp.values.borrow_mut()[which][thread % LANES] = mine;
        self.meet(&warp.meeting, thread, "the warp", || self.live_in_warp[thread / LANES].get());
        *all = warp.values.borrow()[which];
    }

    /// The block's static variable of that name.
    pub fn variable(&self, name: &[u8], bytes: usize, alignment: usize) -> *mut u8 {
        let mut variables = self.variables.borrow_mut();
        let address = *variables.entry(name.to_vec()).or_insert_with(|| {
            let address = self.variables_end.get().next_multiple_of(alignment.max(16));
            self.variables_end.set(address + bytes);
            address
        });
        if self.variables_end.get() > self.shared.start() + STATIC_BYTES {
            fault!("more than {STATIC_BYTES} bytes of static shared memory");
        }
        address as *mut u8
    }
}
