//! What preparing has in common: many kernels at once, for classes of sizes that choose alike.

use crate::error::Result;
use std::collections::HashMap;
use std::hash::Hash;

/// The least number of tokens (or rows) that has the same tiles: of each power of two on its way to the next, every eighth.
pub(super) fn alike(tokens: usize) -> usize {
    let step = tokens.max(8).ilog2() - 3;
    (tokens >> step << step).max(1)
}

/// Prepares each of several, all at once: compiling takes a second or so for each.
pub(super) fn each_at_once<K, V>(keys: &[K], prepare: impl Fn(K) -> Result<V> + Sync) -> Result<HashMap<K, V>>
where
    K: Copy + Eq + Hash + Send,
    V: Send,
{
    each_of(keys, |key| Ok((key, prepare(key)?)))
}

/// The same of what is no key by itself: `prepare` gives it one.
pub(super) fn each_of<T, K, V>(items: &[T], prepare: impl Fn(T) -> Result<(K, V)> + Sync) -> Result<HashMap<K, V>>
where
    T: Copy + Send,
    K: Eq + Hash + Send,
    V: Send,
{
    std::thread::scope(|scope| {
        let prepare = &prepare;
        let threads: Vec<_> = items.iter().map(|&item| scope.spawn(move || prepare(item))).collect();
        let join = |thread: std::thread::ScopedJoinHandle<'_, Result<(K, V)>>| {
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        };
        threads.into_iter().map(join).collect()
    })
}
