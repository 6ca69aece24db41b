//! A process for each rank, started by this one.

use crate::error::{Error, Result};
use std::process::{Child, Command};

/// Runs this command line once for each rank, and waits for all of them. The ranks print by themselves.
pub(super) fn start(ranks: usize, may_fail: bool) -> Result<()> {
    let failed = |what: &str, error: std::io::Error| Error::usage(format!("{what}: {error}"));
    let program = std::env::current_exe().map_err(|error| failed("this program's file", error))?;
    let folder = tempfile::tempdir().map_err(|error| failed("a folder for the ranks", error))?;
    let mut children: Vec<Child> = Vec::new();
    for rank in 0..ranks {
        let started = Command::new(&program)
            .args(std::env::args_os().skip(1))
            .args(["--rank", &rank.to_string(), "--folder"])
            .arg(folder.path())
            .spawn();
        match started {
            Ok(child) => children.push(child),
            Err(error) => {
                children.iter_mut().for_each(stop);
                return Err(failed("a rank cannot be started", error));
            }
        }
    }
    let mut lost = None;
    for (rank, child) in children.iter_mut().enumerate() {
        match child.wait() {
            Ok(status) if status.success() || may_fail => {}
            Ok(status) => lost = lost.or(Some(format!("rank {rank} ended with {status}"))),
            Err(error) => lost = lost.or(Some(format!("rank {rank}: {error}"))),
        }
    }
    lost.map_or(Ok(()), |lost| Err(Error::usage(lost)))
}

fn stop(child: &mut Child) {
    // One that has ended by itself needs no more.
    let _ = child.kill();
    let _ = child.wait();
}
