//! NCCL's functions, among ranks that are threads of this process. A collective is done when the call returns, and one
//! whose ranks do not fit each other is refused, where NCCL would hang or leave memory as it was.
#![allow(non_snake_case, clippy::not_unsafe_ptr_arg_deref)]

use crate::{memory, queue};
use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::{c_char, c_int, c_void};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

const SUCCESS: c_int = 0;
/// `ncclInvalidArgument`, `ncclInvalidUsage`, `ncclRemoteError`.
const ARGUMENT: c_int = 4;
const USAGE: c_int = 5;
const REMOTE: c_int = 6;
/// Longer than any rank is busy with something else.
const LIMIT: Duration = Duration::from_secs(60);

#[derive(Clone, Copy)]
#[repr(C)]
pub struct UniqueId([u8; 128]);

/// One of the things that a rank has asked for.
#[derive(Clone, Copy)]
enum Work {
    Gather { from: u64, to: u64, bytes: usize },
    Send { from: u64, bytes: usize, peer: usize },
    Receive { to: u64, bytes: usize, peer: usize },
}

/// The ranks of a communicator, and what they do together just now.
#[derive(Default)]
struct Group {
    meeting: Mutex<Meeting>,
    changed: Condvar,
}

#[derive(Default)]
struct Meeting {
    /// By rank, what each of them has asked for.
    asked: HashMap<usize, Vec<Work>>,
    /// Ranks that have copied what is theirs.
    finished: usize,
    number: u64,
}

pub struct Communicator {
    group: Arc<Group>,
    rank: usize,
    ranks: usize,
}

static GROUPS: Mutex<Option<HashMap<[u8; 128], Arc<Group>>>> = Mutex::new(None);

/// The depth of groups, the communicator and the stream, and what was asked of them.
type Open = (usize, Option<(usize, usize)>, Vec<Work>);

thread_local! {
    /// How deep this thread is in groups, and what it has asked for in them: of one communicator on one stream.
    static OPEN: RefCell<Open> = const { RefCell::new((0, None, Vec::new())) };
}

impl Communicator {
    /// Until all ranks have asked and have what they asked for.
    fn meet(&self, stream: usize, own: Vec<Work>) -> c_int {
        if queue::captures(stream) {
            return USAGE;
        }
        queue::drain();
        let mut meeting = self.group.meeting.lock().unwrap();
        let number = meeting.number;
        meeting.asked.insert(self.rank, own.clone());
        self.group.changed.notify_all();
        let (mut meeting, late) = self
            .group
            .changed
            .wait_timeout_while(meeting, LIMIT, |meeting| meeting.number == number && meeting.asked.len() < self.ranks)
            .unwrap();
        if late.timed_out() {
            return REMOTE;
        }
        let copied = self.copy(&own, &meeting.asked);
        meeting.finished += 1;
        if meeting.finished == self.ranks {
            *meeting = Meeting { number: number + 1, ..Meeting::default() };
            self.group.changed.notify_all();
        }
        let end = self.group.changed.wait_timeout_while(meeting, LIMIT, |meeting| meeting.number == number).unwrap();
        if end.1.timed_out() { REMOTE } else { copied }
    }

    fn copy(&self, own: &[Work], asked: &HashMap<usize, Vec<Work>>) -> c_int {
        // SAFETY: device memory of ranks that all wait in this call.
        let copy = |from: u64, to: u64, bytes| unsafe { std::ptr::copy(from as *const u8, to as *mut u8, bytes) };
        let mut received = HashMap::<usize, usize>::new();
        for (place, work) in own.iter().enumerate() {
            match *work {
                Work::Gather { to, bytes, .. } => {
                    for rank in 0..self.ranks {
                        match asked[&rank].get(place) {
                            Some(&Work::Gather { from, bytes: its, .. }) if its == bytes => {
                                copy(from, to + (rank * bytes) as u64, bytes);
                            }
                            _ => return ARGUMENT,
                        }
                    }
                }
                Work::Receive { to, bytes, peer } => {
                    let before = received.entry(peer).or_default();
                    let mut sent = asked[&peer].iter().filter_map(|work| match *work {
                        Work::Send { from, bytes, peer } if peer == self.rank => Some((from, bytes)),
                        _ => None,
                    });
                    match sent.nth(*before) {
                        Some((from, its)) if its == bytes => copy(from, to, bytes),
                        _ => return ARGUMENT,
                    }
                    *before += 1;
                }
                Work::Send { peer, .. } => {
                    let to = |work: &&Work| matches!(work, Work::Send { peer: to, .. } if *to == peer);
                    let of = |work: &&Work| matches!(work, Work::Receive { peer: of, .. } if *of == self.rank);
                    if own.iter().filter(to).count() != asked[&peer].iter().filter(of).count() {
                        return ARGUMENT;
                    }
                }
            }
        }
        SUCCESS
    }
}

/// Now, or at the end of the group.
fn ask(communicator: *mut Communicator, stream: *mut c_void, work: Work) -> c_int {
    let at = (communicator as usize, stream as usize);
    let waits = OPEN.with_borrow_mut(|(depth, whose, asked)| {
        if *depth > 0 && whose.is_none_or(|whose| whose == at) {
            *whose = Some(at);
            asked.push(work);
        }
        *depth > 0
    });
    // SAFETY: the caller's communicator is live.
    if waits { SUCCESS } else { unsafe { &*communicator }.meet(stream as usize, vec![work]) }
}

#[unsafe(no_mangle)]
pub extern "C" fn ncclGetVersion(version: *mut c_int) -> c_int {
    // SAFETY: the caller's pointer.
    unsafe { version.write(22_809) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn ncclGetUniqueId(id: *mut UniqueId) -> c_int {
    static NEXT: Mutex<u64> = Mutex::new(0);
    let mut next = NEXT.lock().unwrap();
    *next += 1;
    let mut bytes = [0; 128];
    bytes[..8].copy_from_slice(&next.to_le_bytes());
    // SAFETY: the caller's pointer.
    unsafe { id.write(UniqueId(bytes)) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn ncclCommInitRank(to: *mut *mut Communicator, ranks: c_int, id: UniqueId, rank: c_int) -> c_int {
    let mut groups = GROUPS.lock().unwrap();
    let group = groups.get_or_insert_default().entry(id.0).or_default().clone();
    let communicator = Communicator { group, rank: rank as usize, ranks: ranks as usize };
    // SAFETY: the caller's pointer.
    unsafe { to.write(Box::into_raw(Box::new(communicator))) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn ncclCommDestroy(communicator: *mut Communicator) -> c_int {
    // SAFETY: made by `ncclCommInitRank`, and used no more.
    drop(unsafe { Box::from_raw(communicator) });
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn ncclCommAbort(communicator: *mut Communicator) -> c_int {
    ncclCommDestroy(communicator)
}

#[unsafe(no_mangle)]
pub extern "C" fn ncclCommGetAsyncError(_communicator: *mut Communicator, error: *mut c_int) -> c_int {
    // SAFETY: the caller's pointer.
    unsafe { error.write(SUCCESS) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn ncclAllGather(
    from: *const c_void,
    to: *mut c_void,
    bytes: usize,
    _data_type: c_int,
    communicator: *mut Communicator,
    stream: *mut c_void,
) -> c_int {
    ask(communicator, stream, Work::Gather { from: from as u64, to: to as u64, bytes })
}

#[unsafe(no_mangle)]
pub extern "C" fn ncclSend(
    from: *const c_void,
    bytes: usize,
    _data_type: c_int,
    peer: c_int,
    communicator: *mut Communicator,
    stream: *mut c_void,
) -> c_int {
    ask(communicator, stream, Work::Send { from: from as u64, bytes, peer: peer as usize })
}

#[unsafe(no_mangle)]
pub extern "C" fn ncclRecv(
    to: *mut c_void,
    bytes: usize,
    _data_type: c_int,
    peer: c_int,
    communicator: *mut Communicator,
    stream: *mut c_void,
) -> c_int {
    ask(communicator, stream, Work::Receive { to: to as u64, bytes, peer: peer as usize })
}

#[unsafe(no_mangle)]
pub extern "C" fn ncclMemAlloc(address: *mut *mut c_void, bytes: usize) -> c_int {
    let Some(allocated) = memory::allocate(bytes) else { return ARGUMENT };
    // SAFETY: the caller's pointer.
    unsafe { address.write(allocated as *mut c_void) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn ncclMemFree(address: *mut c_void) -> c_int {
    queue::drain();
    if memory::free(address as u64) { SUCCESS } else { ARGUMENT }
}

#[unsafe(no_mangle)]
pub extern "C" fn ncclCommWindowRegister(
    _communicator: *mut Communicator,
    address: *mut c_void,
    _bytes: usize,
    window: *mut *mut c_void,
    _flags: c_int,
) -> c_int {
    // SAFETY: the caller's pointer.
    unsafe { window.write(address) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn ncclCommWindowDeregister(_communicator: *mut Communicator, _window: *mut c_void) -> c_int {
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn ncclGroupStart() -> c_int {
    OPEN.with_borrow_mut(|(depth, ..)| *depth += 1);
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn ncclGroupEnd() -> c_int {
    let asked = OPEN.with_borrow_mut(|(depth, whose, asked)| {
        *depth -= 1;
        if *depth == 0 { whose.take().map(|whose| (whose, std::mem::take(asked))) } else { None }
    });
    let Some(((communicator, stream), asked)) = asked else { return SUCCESS };
    // SAFETY: the caller's communicator is live.
    unsafe { &*(communicator as *const Communicator) }.meet(stream, asked)
}

#[unsafe(no_mangle)]
pub extern "C" fn ncclGetErrorString(_code: c_int) -> *const c_char {
    c"refused by the emulator".as_ptr()
}
