//! Cubins on disk: a file per kernel, keyed by everything the cubin depends on.
//!
//! A file holds its whole key, so two keys of one hash cannot be taken for each other, and a checksum of the cubin, so
//! that a file cut short is not used. It is written beside its place and renamed into it: a reader sees all of it or
//! none, whoever else writes at the same time.
//!
//! A cubin is a program, and the driver believes what it says, so what others may have written is not used. A file
//! counts if it is a regular one (no link, no FIFO), of this process's user or of root, and writable by nobody else;
//! the folder, if it is one of the two's and not writable by everybody. What is new is created under a random name
//! that must not exist, so that a link planted in its way is not followed. The checks need an operating system with
//! users and `/proc`; without `/proc` there is no cache, and on Windows a profile's folder is the user's own.

use std::collections::hash_map::RandomState;
use std::fs::{self, File, Metadata};
use std::hash::{BuildHasher, Hasher};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// More than any kernel's.
const MOST_BYTES: u64 = 1 << 30;

/// A file that is written takes milliseconds; one of this age was left by a process that was killed.
const STALE: Duration = Duration::from_secs(3600);

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
        let file = self.read(key)?;
        let rest = file.strip_prefix(MAGIC)?;
        let (key_len, rest) = split_u64(rest)?;
        let (checksum, rest) = split_u64(rest)?;
        let (stored_key, cubin) = rest.split_at_checked(usize::try_from(key_len).ok()?)?;
        (stored_key == key.as_bytes() && hash(cubin) == checksum && !cubin.is_empty()).then(|| cubin.to_vec())
    }

    /// The bytes of a key's file, if it is one to be believed.
    fn read(&self, key: &str) -> Option<Vec<u8>> {
        let path = self.path(key);
        // Looked at by its name first: opening a FIFO would wait for its writer.
        let named = fs::symlink_metadata(&path).ok()?;
        if !named.is_file() || named.len() > MOST_BYTES || !is_trusted(&fs::metadata(&self.folder).ok()?, EVERYBODY) {
            return None;
        }
        let file = File::open(path).ok()?;
        let opened = file.metadata().ok()?;
        if !opened.is_file() || !is_trusted(&opened, OTHERS) {
            return None;
        }
        let mut bytes = Vec::new();
        bytes.try_reserve_exact(opened.len().min(MOST_BYTES) as usize).ok()?;
        file.take(MOST_BYTES).read_to_end(&mut bytes).ok()?;
        Some(bytes)
    }

    /// Publishes a cubin under its key.
    ///
    /// # Errors
    /// Whatever the file system says; [`io::ErrorKind::PermissionDenied`] for a folder that others may change.
    pub fn put(&self, key: &str, cubin: &[u8]) -> io::Result<()> {
        self.create_folder()?;
        if !is_trusted(&fs::metadata(&self.folder)?, EVERYBODY) {
            let message = format!("{} belongs to another user, or everybody may write there", self.folder.display());
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, message));
        }
        self.remove_stale();
        let mut file = MAGIC.to_vec();
        file.extend((key.len() as u64).to_le_bytes());
        file.extend(hash(cubin).to_le_bytes());
        file.extend(key.as_bytes());
        file.extend(cubin);
        // Keyed anew for every hasher: numbers that nobody can guess, without a dependency for them.
        let random = RandomState::new().build_hasher().finish();
        let beside = self.folder.join(format!(".{random:016x}.part"));
        let mut options = File::options();
        options.write(true).create_new(true);
        #[cfg(unix)]
        std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o644);
        let mut created = options.open(&beside)?;
        let published = created.write_all(&file).and_then(|()| fs::rename(&beside, self.path(key)));
        if published.is_err() {
            let _ = fs::remove_file(&beside);
        }
        published
    }

    fn create_folder(&self) -> io::Result<()> {
        let mut builder = fs::DirBuilder::new();
        #[cfg(unix)]
        std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
        builder.recursive(true).create(&self.folder)
    }

    /// Removes what killed processes left half-written.
    fn remove_stale(&self) {
        for entry in fs::read_dir(&self.folder).into_iter().flatten().flatten() {
            let is_part = entry.path().extension().is_some_and(|extension| extension == "part");
            let age =
                entry.metadata().and_then(|metadata| metadata.modified()).ok().and_then(|time| time.elapsed().ok());
            if is_part && age.is_some_and(|age| age > STALE) {
                let _ = fs::remove_file(entry.path());
            }
        }
    }

    fn path(&self, key: &str) -> PathBuf {
        self.folder.join(format!("{:016x}.cubin", hash(key.as_bytes())))
    }
}

/// Who must not have write permission: anybody but the owner, or those outside the owner's group too.
const OTHERS: u32 = 0o022;
const EVERYBODY: u32 = 0o002;

/// Whether a file is this process's user's or root's, and closed to those writers.
#[cfg(unix)]
fn is_trusted(file: &Metadata, writers: u32) -> bool {
    use std::os::unix::fs::MetadataExt;
    // A process's own folder in /proc belongs to its effective user.
    let Ok(own) = fs::metadata("/proc/self") else { return false };
    (file.uid() == own.uid() || file.uid() == 0) && file.mode() & writers == 0
}

#[cfg(not(unix))]
fn is_trusted(_file: &Metadata, _writers: u32) -> bool {
    true
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

    #[test]
    fn an_empty_cubin_is_none() {
        let cache = cache("empty");
        cache.put("a", b"").unwrap();
        assert_eq!(cache.get("a"), None);
        fs::remove_dir_all(cache.folder()).unwrap();
    }

    #[cfg(unix)]
    #[test]
    fn what_others_may_have_written_is_not_used() {
        use std::os::unix::fs::{PermissionsExt, symlink};
        let cache = cache("others");
        let mode = |path: &Path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
        cache.put("a", b"machine code").unwrap();
        assert_eq!(fs::metadata(cache.folder()).unwrap().permissions().mode() & 0o777, 0o700);
        let file = cache.path("a");
        for writable in [0o666, 0o664] {
            mode(&file, writable);
            assert_eq!(cache.get("a"), None, "{writable:o}");
        }
        mode(&file, 0o644);
        assert!(cache.get("a").is_some());
        mode(cache.folder(), 0o777);
        assert_eq!(cache.get("a"), None);
        assert_eq!(cache.put("a", b"new").unwrap_err().kind(), io::ErrorKind::PermissionDenied);
        mode(cache.folder(), 0o775);
        assert!(cache.get("a").is_some());
        // A link, and what would wait or never end.
        fs::rename(&file, cache.folder().join("elsewhere")).unwrap();
        symlink("elsewhere", &file).unwrap();
        assert_eq!(cache.get("a"), None);
        fs::remove_file(&file).unwrap();
        symlink("/dev/zero", &file).unwrap();
        assert_eq!(cache.get("a"), None);
        fs::remove_file(&file).unwrap();
        assert!(std::process::Command::new("mkfifo").arg(&file).status().unwrap().success());
        assert_eq!(cache.get("a"), None);
        // Publishing replaces what is there.
        cache.put("a", b"machine code").unwrap();
        assert_eq!(cache.get("a").unwrap(), b"machine code");
        fs::remove_dir_all(cache.folder()).unwrap();
    }

    #[cfg(unix)]
    #[test]
    fn links_planted_in_the_way_are_not_followed() {
        use std::os::unix::fs::symlink;
        let cache = cache("planted");
        cache.create_folder().unwrap();
        let victim = cache.folder().join("victim");
        fs::write(&victim, "mine").unwrap();
        // Every name that counting processes and writes would give.
        for write in 0..20 {
            symlink("victim", cache.folder().join(format!(".{}-{write}.part", std::process::id()))).unwrap();
        }
        symlink("victim", cache.path("a")).unwrap();
        cache.put("a", b"machine code").unwrap();
        assert_eq!(fs::read_to_string(&victim).unwrap(), "mine");
        assert_eq!(cache.get("a").unwrap(), b"machine code");
        fs::remove_dir_all(cache.folder()).unwrap();
    }

    #[test]
    fn what_a_killed_process_left_goes_in_time() {
        let cache = cache("stale");
        cache.put("a", b"machine code").unwrap();
        let (old, young) = (cache.folder().join(".0.part"), cache.folder().join(".1.part"));
        for part in [&old, &young] {
            fs::write(part, "half").unwrap();
        }
        let long_ago = std::time::SystemTime::now() - 2 * STALE;
        File::options().write(true).open(&old).unwrap().set_modified(long_ago).unwrap();
        cache.put("b", b"machine code").unwrap();
        assert!(!old.exists() && young.exists() && cache.get("a").is_some());
        fs::remove_dir_all(cache.folder()).unwrap();
    }
}
