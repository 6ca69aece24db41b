//! How much memory this process may still take, and (in [`layer`]) what a call is going to take.
//!
//! Four things limit it: the host's free memory, the process's cgroups (version 2 or 1, each of their ancestors), and
//! its limits on address space and on data (`ulimit -v`, `ulimit -d`). Linux grants more memory than there is, and
//! kills a process that uses it; so a call that cannot fit is refused before it begins. A call that passes is still
//! allocated by functions that can fail. On other systems nothing is known, and only these failures count.

mod layer;

pub(crate) use layer::{LayerMemory, WeightPlace};

use crate::error::{Error, Result};
use bytemuck::Zeroable;
use std::fs;
use std::path::{Component, Path, PathBuf};

/// What may still be taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Budget {
    pub(crate) bytes: u64,
    /// Whose limit it is.
    pub(crate) limit: &'static str,
}

/// The least of all limits that this system reports.
pub(crate) fn budget() -> Option<Budget> {
    Budget::read(Path::new("/"))
}

/// Bytes that may still be taken, if the system says.
pub(crate) fn available() -> Option<u64> {
    budget().map(|budget| budget.bytes)
}

/// Bytes of memory in all, if the system says.
pub(crate) fn total() -> Option<u64> {
    kibibytes(&text(Path::new("/proc/meminfo")), "MemTotal:")
}

/// Fails if that many bytes are more than may be taken; `what` takes them.
pub(crate) fn require(what: &str, bytes: u128) -> Result<()> {
    budget().map_or(Ok(()), |budget| budget.require(what, bytes))
}

/// Fails if a file does not fit into memory twice: as its bytes, and as the numbers decoded from them.
pub(crate) fn require_file(file: &Path) -> Result<()> {
    match fs::metadata(file) {
        Ok(there) if there.is_file() => require(&file.display().to_string(), 2 * u128::from(there.len())),
        // The reader reports anything that is not a regular file.
        _ => Ok(()),
    }
}

/// Zeros, or an error where memory cannot be had for them.
pub(crate) fn zeroed<T: Zeroable>(what: &str, len: usize) -> Result<Vec<T>> {
    bytemuck::allocation::try_zeroed_vec(len).map_err(|()| {
        let (needed, budget) = (len as u128 * size_of::<T>() as u128, budget());
        let budget = budget.unwrap_or(Budget { bytes: 0, limit: "the system" });
        Error::Memory { what: what.to_owned(), needed, available: budget.bytes, limit: budget.limit }
    })
}

impl Budget {
    /// Reads `/proc` and `/sys` below `root`.
    fn read(root: &Path) -> Option<Self> {
        let (proc, cgroups) = (root.join("proc"), root.join("sys/fs/cgroup"));
        let status = text(&proc.join("self/status"));
        let limits = text(&proc.join("self/limits"));
        let rest = |limit: &str, used: &str| Some(number(&limits, limit)?.saturating_sub(kibibytes(&status, used)?));
        let all = [
            (kibibytes(&text(&proc.join("meminfo")), "MemAvailable:"), "the machine"),
            (cgroup_rest(&text(&proc.join("self/cgroup")), &cgroups), "the cgroup"),
            (rest("Max address space", "VmSize:"), "the limit on address space (ulimit -v)"),
            (rest("Max data size", "VmData:"), "the limit on data (ulimit -d)"),
        ];
        let known = all.into_iter().filter_map(|(bytes, limit)| Some(Self { bytes: bytes?, limit }));
        known.min_by_key(|budget| budget.bytes)
    }

    fn require(self, what: &str, needed: u128) -> Result<()> {
        if needed <= u128::from(self.bytes) {
            return Ok(());
        }
        Err(Error::Memory { what: what.to_owned(), needed, available: self.bytes, limit: self.limit })
    }
}

/// What the strictest of a process's memory cgroups leaves, page cache counted as free.
fn cgroup_rest(memberships: &str, mount: &Path) -> Option<u64> {
    let mut least = None;
    for line in memberships.lines() {
        let mut parts = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (parts.next(), parts.next()) else { continue };
        let (mount, files) = match controllers {
            "" => (mount.to_owned(), ["memory.max", "memory.current", "inactive_file", "active_file"]),
            _ if controllers.split(',').any(|name| name == "memory") => (
                mount.join("memory"),
                ["memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file", "total_active_file"],
            ),
            _ => continue,
        };
        // In a container the mount may be of the process's own cgroup: what is not found below it is passed over.
        let names = Path::new(path).components().filter(|part| matches!(part, Component::Normal(_)));
        let own: PathBuf = mount.components().chain(names).collect();
        for folder in own.ancestors().take_while(|folder| folder.starts_with(&mount)) {
            least = least.into_iter().chain(rest_of_cgroup(folder, files)).min();
        }
    }
    least
}

fn rest_of_cgroup(folder: &Path, [limit, usage, cache, more_cache]: [&str; 4]) -> Option<u64> {
    let read = |name: &str| text(&folder.join(name)).trim().parse::<u64>().ok();
    let statistics = text(&folder.join("memory.stat"));
    let cached = |name: &str| number(&statistics, name).unwrap_or(0);
    let used = read(usage)?.saturating_sub(cached(cache).saturating_add(cached(more_cache)));
    Some(read(limit)?.saturating_sub(used))
}

/// A file's text; empty if there is none.
fn text(file: &Path) -> String {
    fs::read_to_string(file).unwrap_or_default()
}

/// The first number after a line's name.
fn number(text: &str, name: &str) -> Option<u64> {
    let rest = |line: &'_ str| line.strip_prefix(name).filter(|rest| rest.starts_with([' ', '\t'])).map(str::to_owned);
    text.lines().find_map(rest)?.split_whitespace().next()?.parse().ok()
}

fn kibibytes(text: &str, name: &str) -> Option<u64> {
    number(text, name)?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A system made of files.
    fn system(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let file = root.path().join(name);
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(file, text).unwrap();
        }
        root
    }

    const MEMINFO: (&str, &str) = ("proc/meminfo", "MemTotal:  9000 kB\nMemAvailable:    8000 kB\n");

    #[test]
    fn the_strictest_limit_counts() {
        let read = |files: &[(&str, &str)]| {
            let budget = Budget::read(system(files).path());
            budget.map(|budget| (budget.bytes, budget.limit))
        };
        assert_eq!(read(&[]), None);
        assert_eq!(read(&[MEMINFO]), Some((8000 << 10, "the machine")));
        let v2 = [
            MEMINFO,
            ("proc/self/cgroup", "0::/a/b\n"),
            ("sys/fs/cgroup/a/memory.max", "4000000\n"),
            ("sys/fs/cgroup/a/memory.current", "3000000\n"),
            ("sys/fs/cgroup/a/memory.stat", "anon 5\ninactive_file 100000\nactive_file 20000\n"),
            ("sys/fs/cgroup/a/b/memory.max", "max\n"),
            ("sys/fs/cgroup/a/b/memory.current", "3000000\n"),
        ];
        assert_eq!(read(&v2), Some((1_120_000, "the cgroup")));
        let v1 = [
            MEMINFO,
            ("proc/self/cgroup", "3:cpu,memory:/x\n1:name=systemd:/y\n0::/\n"),
            ("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n"),
            ("sys/fs/cgroup/memory/memory.usage_in_bytes", "1\n"),
            ("sys/fs/cgroup/memory/x/memory.limit_in_bytes", "5000\n"),
            ("sys/fs/cgroup/memory/x/memory.usage_in_bytes", "4500\n"),
            ("sys/fs/cgroup/memory/x/memory.stat", "inactive_file 1\ntotal_inactive_file 10\ntotal_active_file 2\n"),
        ];
        assert_eq!(read(&v1), Some((512, "the cgroup")));
        // A container that sees its own cgroup as the root of the mount, and its path from outside.
        let inside = [
            MEMINFO,
            ("proc/self/cgroup", "0::/docker/abc\n"),
            ("sys/fs/cgroup/memory.max", "700\n"),
            ("sys/fs/cgroup/memory.current", "800\n"),
        ];
        assert_eq!(read(&inside), Some((0, "the cgroup")));
        let limits = "Limit                     Soft Limit           Hard Limit           Units     \n\
                      Max data size             3000000              unlimited            bytes     \n\
                      Max address space         4000000              unlimited            bytes     \n";
        let status = ("proc/self/status", "VmSize:\t    3000 kB\nVmData:\t  1000 kB\n");
        let ulimit = [MEMINFO, ("proc/self/limits", limits), status];
        assert_eq!(read(&ulimit), Some((4_000_000 - 3_072_000, "the limit on address space (ulimit -v)")));
        let data = limits.replace("4000000  ", "unlimited");
        let ulimit = [MEMINFO, ("proc/self/limits", &data[..]), status];
        assert_eq!(read(&ulimit), Some((3_000_000 - 1_024_000, "the limit on data (ulimit -d)")));
    }

    #[test]
    fn what_does_not_fit_is_an_error_with_both_numbers() {
        let budget = Budget { bytes: 3 << 30, limit: "the cgroup" };
        assert!(budget.require("the layer", 3 << 30).is_ok());
        let error = budget.require("the layer", 5 << 30).unwrap_err().to_string();
        assert_eq!(error, "the layer takes 5.00 GiB of memory, expected at most 3.00 GiB, which the cgroup leaves");
        let error = zeroed::<u64>("the workspace", usize::MAX / 8).unwrap_err().to_string();
        assert!(error.starts_with("the workspace takes 16384 PiB of memory, expected at most "), "{error}");
        assert!(zeroed::<u16>("nothing", 0).unwrap().is_empty());
    }
}
