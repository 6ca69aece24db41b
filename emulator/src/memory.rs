//! Memory: a device's, each allocation up against a page that nobody may touch, and blocks' shared memory.

use crate::fault;
use std::collections::HashMap;
use std::sync::Mutex;

const PAGE: usize = 4096;
/// What the driver promises of addresses.
const ALIGNMENT: usize = 256;

/// Allocations by address: where their mapping begins, and how long it is.
static MAPPINGS: Mutex<Option<HashMap<u64, (usize, usize)>>> = Mutex::new(None);

fn map(at: usize, bytes: usize, flags: i32) -> Option<*mut u8> {
    // SAFETY: a new mapping; where an address is asked for, only if nothing is there.
    let address = unsafe {
        libc::mmap(
            at as *mut _,
            bytes,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | flags,
            -1,
            0,
        )
    };
    (address != libc::MAP_FAILED).then_some(address.cast())
}

/// Nobody may touch these pages.
fn guard(address: *mut u8, bytes: usize) {
    // SAFETY: part of a mapping of ours.
    if unsafe { libc::mprotect(address.cast(), bytes, libc::PROT_NONE) } != 0 {
        fault!("a page could not be protected");
    }
}

/// Device memory that ends, but for what rounds its length up to 256, at a page that nobody may touch.
pub fn allocate(bytes: usize) -> Option<u64> {
    let rounded = bytes.next_multiple_of(ALIGNMENT);
    let mapped = rounded.next_multiple_of(PAGE);
    let start = map(0, mapped + PAGE, 0)?;
    guard(start.wrapping_add(mapped), PAGE);
    let address = start as u64 + (mapped - rounded) as u64;
    MAPPINGS.lock().unwrap().get_or_insert_default().insert(address, (start as usize, mapped + PAGE));
    Some(address)
}

/// Whether it was allocated.
pub fn free(address: u64) -> bool {
    let Some((start, bytes)) = MAPPINGS.lock().unwrap().get_or_insert_default().remove(&address) else { return false };
    // SAFETY: mapped by `allocate`, unmapped once.
    unsafe { libc::munmap(start as *mut _, bytes) };
    true
}

/// Most static shared memory of a block, and most dynamic.
pub const STATIC_BYTES: usize = 48 << 10;
pub const DYNAMIC_BYTES: usize = 227 << 10;
/// Of a block's shared memory: static, a guard, dynamic up against another guard.
const SLOT: usize = 512 << 10;
/// Below 4 GiB, where no program or library is loaded, so that an address fits 32 bits.
const SHARED_AT: usize = 0x4000_0000;

/// Slots given back, and how many there are.
static SLOTS: Mutex<(Vec<usize>, usize)> = Mutex::new((Vec::new(), 0));

/// A block's shared memory, full of ones at first: what is read before it is written is NaN.
pub struct Shared {
    start: usize,
    dynamic: usize,
}

impl Shared {
    pub fn new(dynamic_bytes: usize) -> Self {
        let start = {
            let mut slots = SLOTS.lock().unwrap();
            slots.0.pop().unwrap_or_else(|| {
                let at = SHARED_AT + slots.1 * SLOT;
                slots.1 += 1;
                let Some(start) = map(at, SLOT, libc::MAP_FIXED_NOREPLACE) else {
                    fault!("no shared memory at {at:#x}")
                };
                guard(start.wrapping_add(STATIC_BYTES), PAGE);
                guard(start.wrapping_add(SLOT - PAGE), PAGE);
                start as usize
            })
        };
        let dynamic = start + SLOT - PAGE - dynamic_bytes.next_multiple_of(1024);
        // SAFETY: both ranges are inside the slot, which is this block's alone.
        unsafe {
            std::ptr::write_bytes(start as *mut u8, 0xff, STATIC_BYTES);
            std::ptr::write_bytes(dynamic as *mut u8, 0xff, dynamic_bytes);
        }
        Self { start, dynamic }
    }

    pub fn start(&self) -> usize {
        self.start
    }

    pub fn dynamic(&self) -> *mut u8 {
        self.dynamic as *mut u8
    }

    /// Whether these bytes are of this block's shared memory.
    pub fn holds(&self, address: u32, bytes: usize) -> bool {
        let at = address as usize;
        (self.start..self.start + STATIC_BYTES).contains(&at) && at + bytes <= self.start + STATIC_BYTES
            || (self.dynamic..self.start + SLOT - PAGE).contains(&at) && at + bytes <= self.start + SLOT - PAGE
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        SLOTS.lock().unwrap().0.push(self.start);
    }
}
