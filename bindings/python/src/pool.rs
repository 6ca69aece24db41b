//! The threads that CPU work runs on.

use crate::error::{Wrong, size};
use crate::limits;
use expertile::cpu::Cpu;
use pyo3::exceptions::{PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, PoisonError};

/// The backend of a process.
struct Backend {
    /// A forked child inherits the value, but not the threads.
    process: u32,
    /// What was asked for; a forked child starts as many of its own.
    threads: Option<usize>,
    cpu: Cpu,
}

static BACKEND: Mutex<Option<Backend>> = Mutex::new(None);

/// The backend of this process.
pub(crate) fn cpu() -> PyResult<Cpu> {
    let mut backend = BACKEND.lock().unwrap_or_else(PoisonError::into_inner);
    match &*backend {
        Some(known) if known.process == std::process::id() => Ok(known.cpu.clone()),
        inherited => {
            let threads = inherited.as_ref().and_then(|inherited| inherited.threads);
            replace(&mut backend, threads)
        }
    }
}

/// A new pool of `threads` threads; without a number, as many as `RAYON_NUM_THREADS` says, or one per core.
fn replace(backend: &mut Option<Backend>, threads: Option<usize>) -> PyResult<Cpu> {
    let count = threads.map_or_else(default_threads, Ok)?;
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(count)
        .thread_name(|index| format!("expertile-{index}"))
        .build()
        .map_err(|error| PyRuntimeError::new_err(format!("no thread pool of {count} threads: {error}")))?;
    let cpu = Cpu::new().in_pool(Arc::new(pool));
    if let Some(old) = backend.replace(Backend { process: std::process::id(), threads, cpu: cpu.clone() })
        && old.process != std::process::id()
    {
        // Its threads are the parent's: shutting them down from here would wait for nobody.
        std::mem::forget(old);
    }
    Ok(cpu)
}

fn default_threads() -> PyResult<usize> {
    const VARIABLE: &str = "RAYON_NUM_THREADS";
    let named = std::env::var(VARIABLE).ok().and_then(|value| value.trim().parse::<usize>().ok());
    match named {
        Some(threads @ 1..) if threads > limits::THREADS => {
            Err(Wrong::number(VARIABLE, threads, format!("1 to {}", limits::THREADS)).value())
        }
        Some(threads @ 1..) => Ok(threads),
        _ => Ok(std::thread::available_parallelism().map_or(1, |cores| cores.get().min(limits::THREADS))),
    }
}

/// Runs `call` with the interpreter lock released.
///
/// # Errors
/// Those of `call`. What a call indexes by is its own copy, but for a layer's workspace, in which all of its stages
/// live: where another thread writes there meanwhile, a check inside fails, and that is a `ValueError`.
pub(crate) fn work<R: Send>(py: Python<'_>, call: impl FnOnce() -> PyResult<R> + Send) -> PyResult<R> {
    py.detach(|| catch_unwind(AssertUnwindSafe(call))).unwrap_or_else(|panic| {
        let words = panic.downcast_ref::<String>().map(String::as_str);
        let words = words.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no words");
        Err(PyValueError::new_err(format!(
            "memory of the call was written while it ran, expected that nobody does: a check failed with \"{words}\""
        )))
    })
}

/// Threads that CPU work is spread over.
#[pyfunction]
pub(crate) fn get_num_threads() -> PyResult<usize> {
    Ok(cpu()?.threads())
}

/// Spreads CPU work over `threads` threads from now on.
#[pyfunction]
pub(crate) fn set_num_threads(threads: &Bound<'_, PyAny>) -> PyResult<()> {
    let threads = size("threads", threads)?;
    if threads == 0 || threads > limits::THREADS {
        return Err(Wrong::number("threads", threads, format!("1 to {}", limits::THREADS)).value());
    }
    let mut backend = BACKEND.lock().unwrap_or_else(PoisonError::into_inner);
    replace(&mut backend, Some(threads)).map(drop)
}
