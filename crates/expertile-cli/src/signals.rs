//! What happens when the process is asked to stop, or when a mapped file is cut short under it.
//!
//! A request to stop (`SIGINT`, `SIGTERM`, `SIGHUP`) ends the process at once, whatever its other threads compute, and
//! as the shell expects it: by the signal, which shells report as 130, 143 or 129. First the file that is being
//! written, if there is one, is removed. A thread of its own waits for these signals, because removing a file in step
//! with the thread that creates it takes a lock, which a signal handler must not take.
//!
//! A file that loses its end while it is mapped answers the next load with `SIGBUS`. The alternative, reading into
//! memory of our own, would hold every weight twice while it is packed; so weights stay mapped, and a handler turns
//! the signal into the error line that a failed read would have given, and exit code 2.

use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The file that is being written and has no name that anybody expects yet.
static UNFINISHED: Mutex<Option<PathBuf>> = Mutex::new(None);

/// The unfinished file. Code that creates one notes it here before it releases the lock, and clears the note under it.
pub(crate) fn unfinished() -> MutexGuard<'static, Option<PathBuf>> {
    UNFINISHED.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(unix)]
pub(crate) use unix::{name_mapped_files, watch};

#[cfg(not(unix))]
pub(crate) fn watch() {}

#[cfg(not(unix))]
pub(crate) fn name_mapped_files<'a>(_files: impl Iterator<Item = (&'a std::path::Path, std::ops::Range<usize>)>) {}

#[cfg(unix)]
mod unix {
    use super::unfinished;
    use signal_hook::consts::{SIGBUS, SIGHUP, SIGINT, SIGTERM};
    use signal_hook::iterator::Signals;
    use signal_hook::low_level::{emulate_default_handler, exit};
    use std::ops::Range;
    use std::path::Path;
    use std::sync::OnceLock;

    /// Starts listening. A request that this process was started to ignore (`nohup`, a background job) stays ignored.
    pub(crate) fn watch() {
        let requests: Vec<i32> = [SIGHUP, SIGINT, SIGTERM].into_iter().filter(|&signal| !is_ignored(signal)).collect();
        // Registered by the thread itself: without a thread to act on them, requests keep their default, which is to
        // end.
        let listen = move || {
            if let Ok(mut signals) = Signals::new(requests)
                && let Some(signal) = signals.forever().next()
            {
                stop(signal);
            }
        };
        let _ = std::thread::Builder::new().name("signals".into()).stack_size(128 << 10).spawn(listen);
        catch_bus_errors();
    }

    /// Removes the unfinished file and ends the process by the signal; the lock is never released, so no other file
    /// appears.
    fn stop(signal: i32) {
        let unfinished = unfinished();
        if let Some(file) = &*unfinished {
            let _ = std::fs::remove_file(file);
        }
        let _ = emulate_default_handler(signal);
        exit(128 + signal);
    }

    /// Whether the process was started with this signal ignored, as far as the system says.
    fn is_ignored(signal: i32) -> bool {
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
        let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
        mask.is_some_and(|mask| mask >> (signal - 1) & 1 == 1)
    }

    /// Addresses of mapped files, and the line that says which one failed, ready to be written.
    static MAPPED: OnceLock<Vec<(Range<usize>, Vec<u8>)>> = OnceLock::new();

    /// Tells the handler of `SIGBUS` which addresses are which file's; the first call counts.
    pub(crate) fn name_mapped_files<'a>(files: impl Iterator<Item = (&'a Path, Range<usize>)>) {
        let line = |file: &Path| {
            let line = format!("{} cannot be read: it was cut short, or its disk failed, while in use", file.display());
            format!("error: {}\n", crate::report::text::one_line(&line)).into_bytes()
        };
        let _ = MAPPED.set(files.map(|(file, addresses)| (addresses, line(file))).collect());
    }

    #[allow(unsafe_code)]
    fn catch_bus_errors() {
        let handle = |info: &libc::siginfo_t| {
            // SAFETY: the kernel fills in the address for this signal.
            let address = unsafe { info.si_addr() }.addr();
            let files = MAPPED.get().map_or(&[][..], Vec::as_slice);
            if let Some((_, line)) = files.iter().find(|(addresses, _)| addresses.contains(&address)) {
                // SAFETY: `write` is async-signal-safe, and the bytes are there until the process ends.
                unsafe { libc::write(libc::STDERR_FILENO, line.as_ptr().cast(), line.len()) };
                exit(2);
            }
            let _ = emulate_default_handler(SIGBUS);
        };
        // SAFETY: the handler loads from memory written before it was published, writes to a descriptor and ends the
        // process: it allocates nothing and takes no lock.
        let _ = unsafe { signal_hook_registry::register_sigaction(SIGBUS, handle) };
    }
}
