//! Ranks that are processes of one host, or of hosts that share a folder: each message is a file.
//!
//! Slow, and enough to agree on something before a faster way is open: NCCL's handshake, handles of memory.

use super::{Exchange, require_message, require_slices};
use crate::error::{Error, Result};
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How long a rank sleeps before it looks again.
const NAP: Duration = Duration::from_micros(200);

/// One of several ranks that share a folder.
///
/// ```
/// use expertile::exchange::{Exchange, Files};
/// let folder = std::env::temp_dir().join(format!("expertile-ranks-{}", std::process::id()));
/// std::fs::create_dir(&folder).unwrap();
/// let limit = std::time::Duration::from_secs(10);
/// let ranks = [0, 1].map(|rank| Files::join(&folder, rank, 2, limit).unwrap()); // each in a process of its own
/// std::thread::scope(|scope| {
///     for rank in &ranks {
///         scope.spawn(move || {
///             let mut all = [0; 2];
///             rank.all_gather(&[10 + rank.rank() as u8], &mut all).unwrap();
///             assert_eq!(all, [10, 11]);
///         });
///     }
/// });
/// std::fs::remove_dir_all(folder).unwrap();
/// ```
#[derive(Debug)]
pub struct Files {
    folder: PathBuf,
    rank: usize,
    ranks: usize,
    limit: Duration,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    calls: u64,
    broken: Option<Error>,
}

impl Files {
    /// Rank `rank` of `ranks` that share `folder`, which is there and was empty before the first of them came. Waits for
    /// nobody. A rank that does not come to a call is absent after `limit`.
    ///
    /// # Errors
    /// [`Error::Value`] for a rank that is not below `ranks`; [`Error::Device`] if there is no such folder.
    pub fn join(folder: &Path, rank: usize, ranks: usize, limit: Duration) -> Result<Self> {
        if rank >= ranks {
            return Err(Error::value("rank", rank, format!("below {ranks}, the ranks")));
        }
        if !folder.is_dir() {
            return Err(failed(folder, "no folder"));
        }
        Ok(Self { folder: folder.to_owned(), rank, ranks, limit, state: Mutex::default() })
    }

    fn message(&self, call: u64, from: usize, to: usize) -> PathBuf {
        self.folder.join(format!("{call}-{from}-{to}"))
    }

    /// Under another name first: a file that is there is whole.
    fn send(&self, call: u64, to: usize, bytes: &[u8]) -> Result<()> {
        let path = self.message(call, self.rank, to);
        let unfinished = path.with_extension("unfinished");
        fs::write(&unfinished, bytes)
            .and_then(|()| fs::rename(&unfinished, &path))
            .map_err(|error| failed(&path, error))
    }

    fn receive(&self, call: u64, from: usize, started: Instant) -> Result<Vec<u8>> {
        let path = self.message(call, from, self.rank);
        loop {
            match fs::read(&path) {
                Ok(bytes) => {
                    fs::remove_file(&path).map_err(|error| failed(&path, error))?;
                    return Ok(bytes);
                }
                Err(error) if error.kind() != ErrorKind::NotFound => return Err(failed(&path, error)),
                Err(_) if started.elapsed() >= self.limit => {
                    return Err(Error::Absent { rank: from, waited: started.elapsed() });
                }
                Err(_) => std::thread::sleep(NAP),
            }
        }
    }

    fn exchange(&self, call: u64, send: &[&[u8]], receive: &mut [&mut [u8]]) -> Result<()> {
        let started = Instant::now();
        let others = || (0..self.ranks).filter(|&rank| rank != self.rank);
        others().try_for_each(|to| self.send(call, to, send[to]))?;
        for from in others() {
            let bytes = self.receive(call, from, started)?;
            require_message(from, bytes.len(), receive[from].len())?;
            receive[from].copy_from_slice(&bytes);
        }
        receive[self.rank].copy_from_slice(send[self.rank]);
        Ok(())
    }
}

fn failed(path: &Path, error: impl std::fmt::Display) -> Error {
    let actual = format!("{} ({error})", path.display());
    Error::Device { argument: "the ranks' folder", actual, expected: "one that all ranks read and write".into() }
}

impl Exchange for Files {
    fn rank(&self) -> usize {
        self.rank
    }

    fn ranks(&self) -> usize {
        self.ranks
    }

    fn all_to_all_v(&self, send: &[&[u8]], receive: &mut [&mut [u8]]) -> Result<()> {
        require_slices(self.rank, self.ranks, send, receive)?;
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(error) = &state.broken {
            return Err(error.clone());
        }
        state.calls += 1;
        let exchanged = self.exchange(state.calls, send, receive);
        state.broken = exchanged.as_ref().err().cloned();
        exchanged
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What each of two ranks' `work` returns, in a folder of their own.
    fn on_two<T: Send>(name: &str, limit: Duration, work: impl Fn(Files) -> T + Sync) -> Vec<T> {
        let folder = std::env::temp_dir().join(format!("expertile-files-{name}-{}", std::process::id()));
        fs::create_dir(&folder).unwrap();
        let results = std::thread::scope(|scope| {
            let (work, folder) = (&work, &folder);
            let start = |rank| scope.spawn(move || work(Files::join(folder, rank, 2, limit).unwrap()));
            [0, 1].map(start).map(|thread| thread.join().unwrap()).into_iter().collect()
        });
        fs::remove_dir_all(&folder).unwrap();
        results
    }

    #[test]
    fn messages_arrive_call_after_call_and_leave_nothing_behind() {
        let left = on_two("messages", Duration::from_secs(60), |me| {
            for call in 0..20u8 {
                let mine = vec![me.rank() as u8 + call; usize::from(call % 3)];
                let mut all = vec![0; 2 * mine.len()];
                me.all_gather(&mine, &mut all).unwrap();
                assert_eq!(all, [vec![call; mine.len()], vec![call + 1; mine.len()]].concat());
            }
            me.meet().unwrap();
            me.meet().unwrap();
            me.folder
        });
        assert!(!left[0].exists());
    }

    #[test]
    fn a_rank_that_does_not_come_is_named_and_another_length_refused() {
        let limit = Duration::from_millis(50);
        let errors = on_two("absent", limit, |me| {
            if me.rank() == 0 {
                return me.meet().and(me.meet());
            }
            Ok(())
        });
        assert!(matches!(errors[0], Err(Error::Absent { rank: 1, waited }) if waited >= limit), "{errors:?}");
        let errors = on_two("length", Duration::from_secs(60), |me| {
            let len = 2 + me.rank();
            me.all_gather(&[1, 2, 3][..len], &mut vec![7; 2 * len])
        });
        assert_eq!(errors[0], Err(Error::Message { rank: 1, actual: 3, expected: 2 }));
        let error = Files::join(Path::new("/nowhere"), 0, 1, limit).unwrap_err().to_string();
        assert!(error.starts_with("the ranks' folder is /nowhere (no folder)"), "{error}");
        let error = Files::join(Path::new("/"), 2, 2, limit).unwrap_err().to_string();
        assert!(error.starts_with("rank is 2"), "{error}");
    }
}
