//! What kernels call, as device/machine.h declares it: where threads meet, barriers in shared memory, copies, clusters.

use crate::block::{Block, current};
use crate::fault;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::atomic::{AtomicU64, Ordering};

#[repr(C)]
#[derive(Clone, Copy)]
pub struct Place {
    pub x: u32,
    pub y: u32,
    pub z: u32,
}

#[repr(C)]
pub struct Thread {
    pub thread: Place,
    pub block: Place,
    pub threads: Place,
    pub blocks: Place,
    pub rank: u32,
    pub dynamic_shared: *mut u8,
    pub products: *mut c_void,
}

#[repr(C)]
pub struct Machine {
    yield_now: extern "C" fn(),
    wait_for_previous_launch: extern "C" fn(),
    let_next_launch_start: extern "C" fn(),
    meet_block: extern "C" fn(),
    meet_threads: extern "C" fn(u32, u32),
    meet_cluster: extern "C" fn(),
    exchange: unsafe extern "C" fn(u64, *mut [u64; 32]),
    shared_variable: unsafe extern "C" fn(*const c_char, u64, u64) -> *mut u8,
    address_in_block: extern "C" fn(u32, u32) -> u32,
    init_barrier: extern "C" fn(u32, u32),
    arrive: extern "C" fn(u32, u32),
    is_phase_over: extern "C" fn(u32, u32) -> c_int,
    copy_bytes: extern "C" fn(u32, *const u8, u32, u32),
    copy_box: unsafe extern "C" fn(u32, *const TensorMap, *const [i32; 3], u32, u32),
    copy_word: extern "C" fn(u32, *const u32),
    arrive_after_copies: extern "C" fn(u32),
    send_word: extern "C" fn(u32, u32, u32),
    store_bytes: extern "C" fn(*mut u8, u32, u32),
    commit_stores: extern "C" fn(),
    wait_for_stores: extern "C" fn(),
}

/// What a kernel is connected with.
pub fn machine() -> &'static Machine {
    static MACHINE: Machine = Machine {
        yield_now,
        wait_for_previous_launch,
        let_next_launch_start,
        meet_block,
        meet_threads,
        meet_cluster,
        exchange,
        shared_variable,
        address_in_block,
        init_barrier,
        arrive,
        is_phase_over,
        copy_bytes,
        copy_box,
        copy_word,
        arrive_after_copies,
        send_word,
        store_bytes,
        commit_stores,
        wait_for_stores,
    };
    &MACHINE
}

extern "C" fn yield_now() {
    let (block, thread) = current();
    block.wait(thread, "another thread");
}

extern "C" fn wait_for_previous_launch() {
    let (block, thread) = current();
    while !block.progress_of_launch.previous_is_done() {
        block.wait(thread, "the launch before");
    }
    block.progress();
}

extern "C" fn let_next_launch_start() {
    current().0.let_next_launch_start();
}

extern "C" fn meet_block() {
    let (block, thread) = current();
    block.meet_all(thread);
}

extern "C" fn meet_threads(barrier: u32, threads: u32) {
    let (block, thread) = current();
    block.meet_some(thread, barrier as usize, threads as usize);
}

extern "C" fn meet_cluster() {
    let (block, thread) = current();
    let meeting = block.cluster.arrive();
    block.progress();
    while !block.cluster.has_met(meeting) {
        block.wait(thread, "the cluster");
    }
    block.progress();
}

unsafe extern "C" fn exchange(mine: u64, all: *mut [u64; 32]) {
    let (block, thread) = current();
    // SAFETY: the kernel's array.
    block.exchange(thread, mine, unsafe { &mut *all });
}

unsafe extern "C" fn shared_variable(name: *const c_char, bytes: u64, alignment: u64) -> *mut u8 {
    // SAFETY: a string of the kernel's source.
    let name = unsafe { CStr::from_ptr(name) };
    current().0.variable(name.to_bytes(), bytes as usize, alignment as usize)
}

extern "C" fn address_in_block(address: u32, rank: u32) -> u32 {
    let (block, _) = current();
    // What a block that is not there has can be asked for, but not used.
    block.cluster.shared(rank).map_or(0, |there| (address as usize - block.shared.start() + there) as u32)
}

/// A barrier in shared memory, in as many bits as it has on the hardware: the phase, then 20 bits how many arrivals
/// are missing, 20 how many a phase takes (all ones where nobody set it up), and 23 how many bytes are on their way.
struct Barrier(&'static AtomicU64);

const COUNT: u32 = 20;
const BYTES: u32 = 23;

#[derive(Clone, Copy)]
struct State {
    phase: u64,
    missing: i64,
    each: i64,
    bytes: i64,
}

impl State {
    fn unpack(word: u64) -> Self {
        let signed = |bits: u64, width: u32| (bits << (64 - width)) as i64 >> (64 - width);
        Self {
            phase: word >> 63,
            missing: (word >> (COUNT + BYTES) & ((1 << COUNT) - 1)) as i64,
            each: (word >> BYTES & ((1 << COUNT) - 1)) as i64,
            bytes: signed(word & ((1 << BYTES) - 1), BYTES),
        }
    }

    fn pack(self) -> u64 {
        self.phase << 63
            | (self.missing as u64) << (COUNT + BYTES)
            | (self.each as u64) << BYTES
            | self.bytes as u64 & ((1 << BYTES) - 1)
    }
}

impl Barrier {
    fn at(address: u32) -> Self {
        if !address.is_multiple_of(8) || address == 0 {
            fault!("a barrier at {address:#x}");
        }
        // SAFETY: shared memory of a block that runs, which only barriers' functions touch here.
        Self(unsafe { AtomicU64::from_ptr(address as usize as *mut u64) })
    }

    fn state(&self, word: u64) -> State {
        let state = State::unpack(word);
        if state.each == 0 || state.each >= (1 << COUNT) - 1 {
            fault!("a barrier that was never set up, at {:p}", self.0);
        }
        state
    }

    fn is_over(&self, parity: u32) -> bool {
        self.state(self.0.load(Ordering::Acquire)).phase != u64::from(parity & 1)
    }

    fn change(&self, change: impl Fn(&mut State)) {
        let changed = |word| {
            let mut state = self.state(word);
            change(&mut state);
            if state.missing < 0 {
                fault!("more arrivals than the barrier at {:p} takes", self.0);
            }
            if state.missing == 0 && state.bytes == 0 {
                state.phase ^= 1;
                state.missing = state.each;
            }
            Some(state.pack())
        };
        let _ = self.0.fetch_update(Ordering::AcqRel, Ordering::Acquire, changed);
    }
}

extern "C" fn init_barrier(barrier: u32, arrivals: u32) {
    let state = State { phase: 0, missing: arrivals.into(), each: arrivals.into(), bytes: 0 };
    Barrier::at(barrier).0.store(state.pack(), Ordering::Release);
}

extern "C" fn arrive(barrier: u32, expected_bytes: u32) {
    current().0.progress();
    Barrier::at(barrier).change(|state| {
        state.bytes += i64::from(expected_bytes);
        state.missing -= 1;
    });
}

fn complete(barrier: u32, bytes: u32) {
    Barrier::at(barrier).change(|state| state.bytes -= i64::from(bytes));
}

extern "C" fn is_phase_over(barrier: u32, parity: u32) -> c_int {
    let over = Barrier::at(barrier).is_over(parity);
    if over {
        current().0.progress();
    }
    c_int::from(over)
}

fn require_shared(block: &Block, what: &str, address: u32, bytes: u32, alignment: u32) {
    let inside = block.shared.holds(address, bytes as usize);
    if !inside || !address.is_multiple_of(alignment) || !bytes.is_multiple_of(alignment) {
        fault!(
            "{what}: {bytes} bytes at {address:#x} of shared memory, expected multiples of {alignment} inside of it"
        );
    }
}

extern "C" fn copy_bytes(to: u32, from: *const u8, bytes: u32, barrier: u32) {
    let (block, _) = current();
    require_shared(block, "a bulk copy", to, bytes, 16);
    if !(from as usize).is_multiple_of(16) {
        fault!("a bulk copy from {from:p}, expected a multiple of 16");
    }
    let from = from as usize;
    block.later(Box::new(move || {
        // SAFETY: shared memory has been checked; what is read must be the kernel's, or ends at a guard.
        unsafe { std::ptr::copy_nonoverlapping(from as *const u8, to as usize as *mut u8, bytes as usize) };
        complete(barrier, bytes);
    }));
}

/// A matrix, or several one behind the other, and the boxes that are copied from it.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
pub struct TensorMap {
    magic: u64,
    address: u64,
    element_bytes: u64,
    sizes: [u64; 3],
    strides: [u64; 2],
    extents: [u64; 3],
    rest: [u64; 5],
}

const MAGIC: u64 = 0x6578_7065_7274_6c65;

impl TensorMap {
    /// `sizes` and `extents` in elements from the columns outwards, `strides` in bytes.
    pub fn new(address: u64, element_bytes: u64, sizes: [u64; 3], strides: [u64; 2], extents: [u64; 3]) -> Self {
        Self { magic: MAGIC, address, element_bytes, sizes, strides, extents, rest: [0; 5] }
    }

    /// One row of a box, zeros where it has none.
    fn row(&self, place: [i64; 3], row: i64) -> Vec<u8> {
        let bytes = (self.extents[0] * self.element_bytes) as usize;
        let mut values = vec![0; bytes];
        let (column, row, matrix) = (place[0], place[1] + row, place[2]);
        let inside = |at: i64, size: u64| at >= 0 && (at as u64) < size;
        if inside(row, self.sizes[1]) && inside(matrix, self.sizes[2]) && inside(column, self.sizes[0]) {
            let from = self.address + row as u64 * self.strides[0] + matrix as u64 * self.strides[1];
            let there = ((self.sizes[0] - column as u64) * self.element_bytes).min(bytes as u64) as usize;
            let from = (from + column as u64 * self.element_bytes) as *const u8;
            // SAFETY: inside the matrix, which is the kernel's memory or ends at a guard.
            unsafe { std::ptr::copy_nonoverlapping(from, values.as_mut_ptr(), there) };
        }
        values
    }
}

unsafe extern "C" fn copy_box(to: u32, map: *const TensorMap, place: *const [i32; 3], barrier: u32, blocks: u32) {
    let (block, _) = current();
    // SAFETY: the kernel's parameter and its array.
    let (map, place) = unsafe { (*map, (*place).map(i64::from)) };
    if map.magic != MAGIC {
        fault!("a box of what is no tensor map");
    }
    let rows = map.extents[1];
    require_shared(block, "a box", to, (rows * 128) as u32, 128);
    for rank in (0..32).filter(|rank| blocks >> rank & 1 != 0) {
        let (to, barrier) = (address_in_block(to, rank), address_in_block(barrier, rank));
        block.later(Box::new(move || {
            for row in 0..rows {
                for (chunk, bytes) in map.row(place, row as i64).chunks(16).enumerate() {
                    let plain = to + row as u32 * 128 + chunk as u32 * 16;
                    let place = plain ^ (plain >> 7 & 7) << 4;
                    // SAFETY: inside the box's place in shared memory.
                    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), place as usize as *mut u8, bytes.len()) };
                }
            }
            complete(barrier, rows as u32 * 128);
        }));
    }
}

extern "C" fn copy_word(to: u32, from: *const u32) {
    let (block, thread) = current();
    require_shared(block, "a copy of a word", to, 4, 4);
    block.pending[thread].words.borrow_mut().push((to, from));
}

extern "C" fn arrive_after_copies(barrier: u32) {
    let (block, thread) = current();
    let words = block.pending[thread].words.take();
    block.later(Box::new(move || {
        for (to, from) in words {
            // SAFETY: shared memory has been checked; the source is the kernel's.
            unsafe { *(to as usize as *mut u32) = *from };
        }
        Barrier::at(barrier).change(|state| state.missing -= 1);
    }));
}

extern "C" fn send_word(to: u32, word: u32, barrier: u32) {
    let (block, _) = current();
    block.later(Box::new(move || {
        // SAFETY: shared memory of a block of this cluster.
        unsafe { *(to as usize as *mut u32) = word };
        complete(barrier, 4);
    }));
}

extern "C" fn store_bytes(to: *mut u8, from: u32, bytes: u32) {
    let (block, thread) = current();
    require_shared(block, "a bulk store", from, bytes, 16);
    if !(to as usize).is_multiple_of(16) {
        fault!("a bulk store to {to:p}, expected a multiple of 16");
    }
    let to = to as usize;
    block.pending[thread].open_stores.borrow_mut().push(Box::new(move || {
        // SAFETY: shared memory has been checked; the destination is the kernel's, or ends at a guard.
        unsafe { std::ptr::copy_nonoverlapping(from as usize as *const u8, to as *mut u8, bytes as usize) };
    }));
}

extern "C" fn commit_stores() {
    let (block, thread) = current();
    let stores = block.pending[thread].open_stores.take();
    let left = block.pending[thread].stores.clone();
    left.set(left.get() + 1);
    block.later(Box::new(move || {
        for store in stores {
            store();
        }
        left.set(left.get() - 1);
    }));
}

extern "C" fn wait_for_stores() {
    let (block, thread) = current();
    while block.pending[thread].stores.get() > 0 {
        block.wait(thread, "its stores");
    }
    block.progress();
}
