//! How large a request may be, and memory that scales with one.
//!
//! An expanded array says it has 2^40 elements and holds one. What is sized by an argument is compared with these
//! limits before anything is allocated or walked, and allocated so that a machine without the memory answers
//! `MemoryError`.

use crate::error::{Wrong, size};
use pyo3::prelude::*;
use std::ops::Range;

/// Experts, and entries of an expert map: far above any model's, and lists of that length are still small.
pub(crate) const EXPERTS: usize = 1 << 24;
/// Slots of a token.
pub(crate) const TOPK: usize = 1 << 16;
/// Values of a row: a thread holds a row or two at a time.
pub(crate) const HIDDEN: usize = 1 << 24;
/// Threads of a pool.
pub(crate) const THREADS: usize = 1024;

/// Values that a call moves, packs or adds up between looks at whether the caller has been interrupted: a fraction of a
/// second.
const VALUES_AT_ONCE: usize = 1 << 28;

/// Multiplications of a thread between looks at whether the caller has been interrupted: some seconds, with so many rows
/// to an expert that reading its weights once more costs next to nothing.
pub(crate) const PRODUCTS_AT_ONCE: usize = 1 << 36;

/// Below this, the system is not asked whether it has the memory.
const ASK_FROM_BYTES: usize = 256 << 20;

/// # Errors
/// `ValueError` if a size is more than `most`.
pub(crate) fn at_most(argument: &str, size: usize, most: usize) -> PyResult<()> {
    if size > most {
        return Err(Wrong::number(argument, size, format!("at most {most}")).value());
    }
    Ok(())
}

/// Rows of `hidden` values, from or to `[tokens, topk]` slots.
///
/// # Errors
/// `ValueError` for sizes beyond the limits, or slots that i32 cannot number.
pub(crate) fn slots(tokens: usize, topk: usize) -> PyResult<()> {
    at_most("topk", topk, TOPK)?;
    if tokens.checked_mul(topk).is_none_or(|slots| i32::try_from(slots).is_err()) {
        let found = format_args!("overflows: {tokens} * {topk} > {}", i32::MAX);
        return Err(Wrong::new("M * topk", found, &[tokens, topk][..], "as many slots as an i32 can count").value());
    }
    Ok(())
}

/// Fails with `ValueError` unless `[tokens, topk]` slots are within the limits.
#[pyfunction]
pub(crate) fn require_slots(tokens: &Bound<'_, PyAny>, topk: &Bound<'_, PyAny>) -> PyResult<()> {
    slots(size("M", tokens)?, size("topk", topk)?)
}

/// How many items, of `values` each, take a fraction of a second; at least one.
pub(crate) fn at_once(values: usize) -> usize {
    (VALUES_AT_ONCE / values.max(1)).max(1)
}

/// `0..count` in stretches of `at_once` items; at least one stretch. Between two of them a call looks whether it has
/// been interrupted.
pub(crate) fn stretches(count: usize, at_once: usize) -> impl Iterator<Item = Range<usize>> {
    (0..count.max(1)).step_by(at_once).map(move |first| first.min(count)..count.min(first + at_once))
}

/// An empty vector with room for `len` elements.
///
/// # Errors
/// `MemoryError` if the machine does not have the memory.
pub(crate) fn vec<T>(argument: &str, len: usize) -> PyResult<Vec<T>> {
    let bytes = len.saturating_mul(size_of::<T>());
    require_memory(argument, bytes)?;
    let mut made = Vec::new();
    made.try_reserve_exact(len).map_err(|_| missing(argument, bytes, None))?;
    Ok(made)
}

/// Fails with `MemoryError` unless there is memory for an array of the caller's.
#[pyfunction(name = "require_memory")]
pub(crate) fn require_memory_for(argument: &str, bytes: &Bound<'_, PyAny>) -> PyResult<()> {
    require_memory(argument, size(argument, bytes)?)
}

/// # Errors
/// `MemoryError` if `bytes` are more than the machine, or the group of processes, has left. Without this, a system that
/// promises more than it has kills the process at the first touch.
pub(crate) fn require_memory(argument: &str, bytes: usize) -> PyResult<()> {
    if bytes < ASK_FROM_BYTES {
        return Ok(());
    }
    match available() {
        Some(left) if bytes as u64 > left => Err(missing(argument, bytes, Some(left))),
        _ => Ok(()),
    }
}

fn missing(argument: &str, bytes: usize, left: Option<u64>) -> PyErr {
    let expected = left.map_or_else(|| "less".into(), |left| format!("at most the {left} that are left"));
    Wrong::new(argument, format_args!("needs {bytes} bytes"), bytes, expected).of_memory()
}

/// What the machine and the control group have left; `None` where neither says.
fn available() -> Option<u64> {
    let number = |path: &str| std::fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
    let field = |path: &str, name: &str| {
        let text = std::fs::read_to_string(path).ok()?;
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        line.split_whitespace().next()?.parse::<u64>().ok()
    };
    let machine = field("/proc/meminfo", "MemAvailable:").map(|kib| kib.saturating_mul(1024));
    let group = |limit: &str, used: &str, stat: &str, cache: &str| {
        // Cached files are let go when memory runs short.
        let used = number(used)?.saturating_sub(field(stat, cache).unwrap_or(0));
        Some(number(limit)?.saturating_sub(used))
    };
    let second = group(
        "/sys/fs/cgroup/memory.max",
        "/sys/fs/cgroup/memory.current",
        "/sys/fs/cgroup/memory.stat",
        "inactive_file ",
    );
    let first = group(
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "/sys/fs/cgroup/memory/memory.stat",
        "total_inactive_file ",
    );
    [machine, second, first].into_iter().flatten().min()
}
