//! Cubins on disk: a file per kernel, keyed by everything the cubin depends on.
//!
//! A file holds its whole key, so two keys of one hash cannot be taken for each other, and a checksum of the cubin, so that
//! a file cut short is not used. It is written beside its place and renamed into it: a reader sees all of it or none,
//! whoever else writes at the same time.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

const MAGIC: &[u8; 16] = b"expertile cubin\n";

/// A folder of cubins.
#[derive(Debug, Clone)]
pub struct CubinCache {
    folder: PathBuf,
}

impl CubinCache {
    /// Keeps cubins in `folder`, which is created when the first is written.
    #[must_use]
    pub fn new(folder: impl Into<PathBuf>) -> Self {
        Self { folder: folder.into() }
    }

    /// `$EXPERTILE_CACHE`, else `$XDG_CACHE_HOME/expertile`, else `$HOME/.cache/expertile`; `None` if none is set.
    #[must_use]
    pub fn from_environment() -> Option<Self> {
        let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        variable("EXPERTILE_CACHE")
            .or_else(|| Some(variable("XDG_CACHE_HOME")?.join("expertile")))
            .or_else(|| Some(variable("HOME")?.join(".cache/expertile")))
            .map(Self::new)
    }

    /// Where the files are.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The cubin of a key, if a whole one is there.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<Vec<u8>> {
        let file = fs::read(self.path(key)).ok()?;
        let rest = file.strip_prefix(MAGIC)?;
        let (key_len, rest) = split_u64(rest)?;
        let (checksum, rest) = split_u64(rest)?;
        let (stored_key, cubin) = rest.split_at_checked(usize::try_from(key_len).ok()?)?;
        (stored_key == key.as_bytes() && hash(cubin) == checksum).then(|| cubin.to_vec())
    }

    /// Publishes a cubin under its key.
    ///
    /// # Errors
    /// Whatever the file system says.
    pub fn put(&self, key: &str, cubin: &[u8]) -> io::Result<()> {
        static WRITES: AtomicU64 = AtomicU64::new(0);
        fs::create_dir_all(&self.folder)?;
        let mut file = MAGIC.to_vec();
        file.extend((key.len() as u64).to_le_bytes());
        file.extend(hash(cubin).to_le_bytes());
        file.extend(key.as_bytes());
        file.extend(cubin);
        let write = WRITES.fetch_add(1, Ordering::Relaxed);
        let beside = self.folder.join(format!(".{}-{write}.part", std::process::id()));
        let published = fs::write(&beside, file).and_then(|()| fs::rename(&beside, self.path(key)));
        if published.is_err() {
            let _ = fs::remove_file(&beside);
        }
        published
    }

    fn path(&self, key: &str) -> PathBuf {
        self.folder.join(format!("{:016x}.cubin", hash(key.as_bytes())))
    }
}

fn split_u64(bytes: &[u8]) -> Option<(u64, &[u8])> {
    let (number, rest) = bytes.split_first_chunk::<8>()?;
    Some((u64::from_le_bytes(*number), rest))
}

/// FNV-1a: the same on every platform and in every release, which the standard library's hasher does not promise.
fn hash(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, &byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cache(name: &str) -> CubinCache {
        let folder = std::env::temp_dir().join(format!("expertile-cache-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&folder);
        CubinCache::new(folder)
    }

    #[test]
    fn a_cubin_comes_back_and_another_key_does_not_find_it() {
        let cache = cache("roundtrip");
        assert_eq!(cache.get("a"), None);
        cache.put("a", b"machine code").unwrap();
        assert_eq!(cache.get("a").unwrap(), b"machine code");
        assert_eq!(cache.get("b"), None);
        fs::copy(cache.path("a"), cache.path("b")).unwrap();
        assert_eq!(cache.get("b"), None, "a file under the wrong name was believed");
        fs::remove_dir_all(cache.folder()).unwrap();
    }

    #[test]
    fn a_file_cut_short_or_changed_is_not_used() {
        let cache = cache("damage");
        cache.put("a", b"machine code").unwrap();
        let whole = fs::read(cache.path("a")).unwrap();
        for length in 0..whole.len() {
            fs::write(cache.path("a"), &whole[..length]).unwrap();
            assert_eq!(cache.get("a"), None, "{length} of {} bytes were believed", whole.len());
        }
        let mut changed = whole.clone();
        *changed.last_mut().unwrap() ^= 1;
        fs::write(cache.path("a"), &changed).unwrap();
        assert_eq!(cache.get("a"), None);
        fs::remove_dir_all(cache.folder()).unwrap();
    }

    #[test]
    fn writers_at_the_same_time_never_show_a_reader_half_a_file() {
        let cache = cache("concurrent");
        let cubins: Vec<Vec<u8>> = (0..4u8).map(|byte| vec![byte; 20_000 + usize::from(byte)]).collect();
        cache.put("key", &cubins[0]).unwrap();
        std::thread::scope(|scope| {
            for cubin in &cubins {
                scope.spawn(|| (0..50).for_each(|_| cache.put("key", cubin).unwrap()));
            }
            scope.spawn(|| (0..200).for_each(|_| assert!(cubins.contains(&cache.get("key").unwrap()))));
        });
        let left = fs::read_dir(cache.folder()).unwrap().count();
        assert_eq!(left, 1, "a half-written file was left behind");
        fs::remove_dir_all(cache.folder()).unwrap();
    }
}
