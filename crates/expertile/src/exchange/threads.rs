//! Ranks that are threads of one process.

use super::{Exchange, require_message, require_slices};
use crate::error::{Error, Result};
use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// One of several ranks in one process.
///
/// ```
/// use expertile::exchange::{Exchange, Threads};
/// let ranks = Threads::new(3, std::time::Duration::from_secs(10))?;
/// std::thread::scope(|scope| {
///     for rank in &ranks {
///         scope.spawn(move || {
///             let mut all = [0; 3];
///             rank.all_gather(&[10 + rank.rank() as u8], &mut all).unwrap();
///             assert_eq!(all, [10, 11, 12]);
///         });
///     }
/// });
/// # Ok::<(), expertile::Error>(())
/// ```
#[derive(Debug)]
pub struct Threads {
    rank: usize,
    limit: Duration,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    ranks: usize,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    /// `[R, R]`: messages on their way, by sender and receiver.
    boxes: Vec<VecDeque<Vec<u8>>>,
    /// `[R]`: the error of a rank that takes no part any more; of one that was dropped, that it is absent.
    ended: Vec<Option<Error>>,
}

impl Threads {
    /// One value for each rank. A rank that is dropped, as a panicking thread drops its own, is absent for the others
    /// at once; one that does not come, after `limit`.
    ///
    /// # Errors
    /// [`Error::Value`] for 0 ranks.
    pub fn new(ranks: usize, limit: Duration) -> Result<Vec<Self>> {
        if ranks == 0 {
            return Err(Error::value("ranks", 0, "at least 1"));
        }
        let state = State { boxes: vec![VecDeque::new(); ranks * ranks], ended: vec![None; ranks] };
        let shared = Arc::new(Shared { ranks, state: Mutex::new(state), changed: Condvar::new() });
        Ok((0..ranks).map(|rank| Self { rank, limit, shared: shared.clone() }).collect())
    }

    /// A panic while the lock is held leaves nothing half-done: every change of the state is one operation.
    fn state(&self) -> MutexGuard<'_, State> {
        self.shared.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn end(&self, error: Error) {
        self.state().ended[self.rank].get_or_insert(error);
        self.shared.changed.notify_all();
    }

    fn send(&self, send: &[&[u8]]) -> Result<()> {
        let others: Vec<(usize, Vec<u8>)> = (0..send.len())
            .filter(|&to| to != self.rank)
            .map(|to| (self.rank * self.shared.ranks + to, send[to].to_vec()))
            .collect();
        let mut state = self.state();
        if let Some(error) = &state.ended[self.rank] {
            return Err(error.clone());
        }
        others.into_iter().for_each(|(place, bytes)| state.boxes[place].push_back(bytes));
        drop(state);
        self.shared.changed.notify_all();
        Ok(())
    }

    fn receive_from(&self, rank: usize, started: Instant) -> Result<Vec<u8>> {
        let mut state = self.state();
        loop {
            if let Some(bytes) = state.boxes[rank * self.shared.ranks + self.rank].pop_front() {
                return Ok(bytes);
            }
            let waited = started.elapsed();
            if waited >= self.limit || state.ended[rank].is_some() {
                return Err(Error::Absent { rank, waited });
            }
            let waiting = self.shared.changed.wait_timeout(state, self.limit - waited);
            state = waiting.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn receive(&self, receive: &mut [&mut [u8]]) -> Result<()> {
        let started = Instant::now();
        for rank in (0..receive.len()).filter(|&rank| rank != self.rank) {
            let bytes = self.receive_from(rank, started)?;
            require_message(rank, bytes.len(), receive[rank].len())?;
            receive[rank].copy_from_slice(&bytes);
        }
        Ok(())
    }
}

impl Exchange for Threads {
    fn rank(&self) -> usize {
        self.rank
    }

    fn ranks(&self) -> usize {
        self.shared.ranks
    }

    fn all_to_all_v(&self, send: &[&[u8]], receive: &mut [&mut [u8]]) -> Result<()> {
        require_slices(self.rank, self.shared.ranks, send, receive)?;
        self.send(send)?;
        self.receive(receive).inspect_err(|error| self.end(error.clone()))?;
        receive[self.rank].copy_from_slice(send[self.rank]);
        Ok(())
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.end(Error::Absent { rank: self.rank, waited: Duration::ZERO });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What each rank's `work` returns.
    fn on_each<T: Send>(ranks: Vec<Threads>, work: impl Fn(Threads) -> T + Sync) -> Vec<T> {
        std::thread::scope(|scope| {
            let threads: Vec<_> = ranks.into_iter().map(|rank| scope.spawn(|| work(rank))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        })
    }

    #[test]
    fn every_pair_gets_its_own_bytes_call_after_call() {
        for ranks in [1, 2, 3, 5, 8] {
            on_each(Threads::new(ranks, Duration::from_secs(60)).unwrap(), |me| {
                for call in 0..20 {
                    // From `a` to `b` in call `c`: (a + 2 b + c) % 4 bytes.
                    let bytes = |from: usize, to: usize| {
                        vec![(from * 16 + to) as u8 + call; (from + 2 * to + usize::from(call)) % 4]
                    };
                    let send: Vec<Vec<u8>> = (0..ranks).map(|to| bytes(me.rank(), to)).collect();
                    let mut received: Vec<Vec<u8>> =
                        (0..ranks).map(|from| vec![0; bytes(from, me.rank()).len()]).collect();
                    let send: Vec<&[u8]> = send.iter().map(Vec::as_slice).collect();
                    me.all_to_all_v(&send, &mut received.iter_mut().map(Vec::as_mut_slice).collect::<Vec<_>>())
                        .unwrap();
                    for (from, received) in received.iter().enumerate() {
                        assert_eq!(*received, bytes(from, me.rank()));
                    }
                }
                me.meet().unwrap();
            });
        }
    }

    #[test]
    fn a_rank_that_never_comes_is_named_after_the_limit() {
        let mut ranks = Threads::new(3, Duration::from_millis(50)).unwrap();
        let late = ranks.remove(1);
        let errors = on_each(ranks, |me| [(); 2].map(|()| me.meet().unwrap_err()));
        for [error, again] in errors {
            assert!(
                matches!(error, Error::Absent { rank: 1, waited } if waited >= Duration::from_millis(50)),
                "{error}"
            );
            assert_eq!(error, again);
        }
        late.meet().expect("what was sent in time is there");
        assert!(matches!(late.meet(), Err(Error::Absent { rank: 0, .. })));
    }

    #[test]
    fn a_rank_that_panics_is_named_at_once() {
        let ranks = Threads::new(2, Duration::from_secs(600)).unwrap();
        let errors = on_each(ranks, |me| {
            let panics = me.rank() == 0;
            std::panic::catch_unwind(std::panic::AssertUnwindSafe(move || {
                assert!(!panics, "as it should");
                me.meet().unwrap_err()
            }))
        });
        assert!(errors[0].is_err());
        assert!(matches!(errors[1], Ok(Error::Absent { rank: 0, .. })));
    }

    #[test]
    fn a_message_of_another_length_is_an_error_and_not_read() {
        let ranks = Threads::new(2, Duration::from_secs(600)).unwrap();
        let results = on_each(ranks, |me| {
            let len = 2 + me.rank();
            let mut all = vec![7; 2 * len];
            (me.all_gather(&[1, 2, 3][..len], &mut all).unwrap_err(), all)
        });
        assert_eq!(results[0].0, Error::Message { rank: 1, actual: 3, expected: 2 });
        assert_eq!(results[0].1, [7; 4]);
        assert_eq!(results[1].0, Error::Message { rank: 0, actual: 2, expected: 3 });
    }
}
