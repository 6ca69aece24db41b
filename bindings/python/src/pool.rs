//! The threads that CPU work runs on.

use expertile::cpu::Cpu;
use pyo3::exceptions::{PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use std::sync::{Arc, Mutex, PoisonError};

/// The backend, and the process it was made in: a forked child inherits the value but not its threads.
static BACKEND: Mutex<Option<(u32, Cpu)>> = Mutex::new(None);

/// The backend of this process.
pub(crate) fn cpu() -> PyResult<Cpu> {
    let mut backend = BACKEND.lock().unwrap_or_else(PoisonError::into_inner);
    match &*backend {
        Some((process, cpu)) if *process == std::process::id() => Ok(cpu.clone()),
        _ => replace(&mut backend, 0),
    }
}

/// A new pool of `threads` threads; 0 leaves the number to rayon (`RAYON_NUM_THREADS`, or one per core).
fn replace(backend: &mut Option<(u32, Cpu)>, threads: usize) -> PyResult<Cpu> {
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .thread_name(|index| format!("expertile-{index}"))
        .build()
        .map_err(|error| PyRuntimeError::new_err(format!("no thread pool of {threads} threads: {error}")))?;
    let cpu = Cpu::new().in_pool(Arc::new(pool));
    if let Some(old) = backend.replace((std::process::id(), cpu.clone()))
        && old.0 != std::process::id()
    {
        // Its threads are the parent's: shutting them down from here would wait for nobody.
        std::mem::forget(old);
    }
    Ok(cpu)
}

/// Threads that CPU work is spread over.
#[pyfunction]
pub(crate) fn get_num_threads() -> PyResult<usize> {
    Ok(cpu()?.threads())
}

/// Spreads CPU work over `threads` threads from now on.
#[pyfunction]
pub(crate) fn set_num_threads(threads: &Bound<'_, PyAny>) -> PyResult<()> {
    const MOST: usize = 1 << 16;
    let threads = crate::error::size("threads", threads)?;
    if threads == 0 || threads > MOST {
        return Err(PyValueError::new_err(format!("threads is {threads}, expected 1 to {MOST}")));
    }
    let mut backend = BACKEND.lock().unwrap_or_else(PoisonError::into_inner);
    replace(&mut backend, threads).map(drop)
}
