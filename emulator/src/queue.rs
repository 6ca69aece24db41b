//! What is queued, in order. Streams are one queue; a launch that may overlap the one before it does.

use crate::launch::{Launch, Progress};
use std::collections::HashMap;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, OnceLock};
use std::thread::JoinHandle;
use std::time::Duration;

/// A thing to do on the device.
#[derive(Clone)]
pub enum Work {
    Launch(Launch),
    Fill { to: u64, byte: u8, bytes: usize },
    Copy { to: u64, from: u64, bytes: usize },
}

struct Queue {
    sender: Mutex<Sender<Work>>,
    unfinished: Mutex<usize>,
    finished: Condvar,
    /// What streams that capture have seen, by stream.
    captures: Mutex<HashMap<usize, Vec<Work>>>,
}

fn queue() -> &'static Queue {
    static QUEUE: OnceLock<Queue> = OnceLock::new();
    QUEUE.get_or_init(|| {
        let (sender, receiver) = channel();
        std::thread::spawn(move || work_off(&receiver));
        Queue {
            sender: Mutex::new(sender),
            unfinished: Mutex::new(0),
            finished: Condvar::new(),
            captures: Mutex::default(),
        }
    })
}

/// Queues, or keeps for a graph if the stream captures.
pub fn push(stream: usize, work: Work) {
    let queue = queue();
    if let Some(captured) = queue.captures.lock().unwrap().get_mut(&stream) {
        captured.push(work);
        return;
    }
    *queue.unfinished.lock().unwrap() += 1;
    queue.sender.lock().unwrap().send(work).expect("the queue's thread never ends");
}

/// Until all that has been queued is done.
pub fn drain() {
    let queue = queue();
    let mut unfinished = queue.unfinished.lock().unwrap();
    while *unfinished > 0 {
        unfinished = queue.finished.wait(unfinished).unwrap();
    }
}

pub fn begin_capture(stream: usize) {
    queue().captures.lock().unwrap().insert(stream, Vec::new());
}

pub fn captures(stream: usize) -> bool {
    queue().captures.lock().unwrap().contains_key(&stream)
}

pub fn end_capture(stream: usize) -> Option<Vec<Work>> {
    queue().captures.lock().unwrap().remove(&stream)
}

fn finish() {
    let queue = queue();
    *queue.unfinished.lock().unwrap() -= 1;
    queue.finished.notify_all();
}

fn work_off(receiver: &Receiver<Work>) {
    let mut running: Vec<JoinHandle<()>> = Vec::new();
    let mut last: Option<Arc<Progress>> = None;
    for work in receiver {
        let overlaps = matches!(&work, Work::Launch(launch) if launch.overlaps);
        if overlaps {
            while last.as_ref().is_some_and(|last| !last.may_next_start()) {
                std::thread::sleep(Duration::from_micros(20));
            }
        } else {
            wait_for(&mut running);
            last = None;
        }
        match work {
            Work::Launch(launch) => {
                last = Some(start(&mut running, launch, last.as_deref()));
                continue;
            }
            // SAFETY: the caller's device memory.
            Work::Fill { to, byte, bytes } => unsafe { std::ptr::write_bytes(to as *mut u8, byte, bytes) },
            // SAFETY: the caller's memory, of the device and of its own.
            Work::Copy { to, from, bytes } => unsafe { std::ptr::copy(from as *const u8, to as *mut u8, bytes) },
        }
        finish();
    }
}

fn start(running: &mut Vec<JoinHandle<()>>, launch: Launch, previous: Option<&Progress>) -> Arc<Progress> {
    let progress = Arc::new(Progress::new(launch.blocks, previous));
    let its_own = progress.clone();
    running.retain(|thread| !thread.is_finished());
    running.push(std::thread::spawn(move || {
        launch.run(&its_own);
        finish();
    }));
    progress
}

fn wait_for(running: &mut Vec<JoinHandle<()>>) {
    for thread in running.drain(..) {
        thread.join().expect("a launch ends the process if it fails");
    }
}
