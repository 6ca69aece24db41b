//! Opening foreign files: only those that have an end, and only as much memory as there is.
//!
//! A name in a checkpoint folder, or one that a user gives, may lead to a FIFO that nobody writes, a device without an
//! end or a directory. None of them is opened: what a file is, is looked up first. Where a whole file is one argument
//! of a call (ids, hidden states), a pipe that is open already (`/dev/stdin`, a shell's `<(command)`) is read too, and
//! no further than its header says.

use crate::error::{Error, Result};
use std::fs::{File, FileType, Metadata};
use std::io::{self, Read};
use std::path::Path;

/// The most bytes that `config.json` and an index may have; real ones stay below a tenth of it.
const MOST_JSON_BYTES: u64 = 100_000_000;

/// Opens a regular file.
pub(crate) fn open(file: &Path) -> Result<(File, Metadata)> {
    let io = |source| Error::io(file, source);
    // Before opening, which for a FIFO waits and for a device may do anything.
    require_regular(file, &std::fs::metadata(file).map_err(io)?, "a regular file")?;
    let opened = File::open(file).map_err(io)?;
    let metadata = opened.metadata().map_err(io)?;
    require_regular(file, &metadata, "a regular file")?;
    Ok((opened, metadata))
}

/// Reads `config.json` or an index.
pub(crate) fn read_json(file: &Path) -> Result<Vec<u8>> {
    let (opened, metadata) = open(file)?;
    if metadata.len() > MOST_JSON_BYTES {
        let actual = format!("{} bytes", metadata.len());
        return Err(Error::format(file, "length", actual, format!("at most {MOST_JSON_BYTES}, for a file of JSON")));
    }
    read_end(file, opened, metadata.len(), Vec::new())
}

/// Reads a regular file or a pipe. `needed` tells from a file's first bytes how many it has at least: more than it is
/// given until the header is whole, then the number that the header says.
pub(crate) fn read_argument(file: &Path, needed: impl Fn(&[u8]) -> Result<u64>) -> Result<Vec<u8>> {
    let Some(mut pipe) = open_pipe(file)? else {
        let (opened, metadata) = open(file)?;
        return read_end(file, opened, metadata.len(), Vec::new());
    };
    let mut bytes = Vec::new();
    loop {
        let (read, needed) = (bytes.len() as u64, needed(&bytes)?);
        if needed <= read {
            // One byte more, if there is one, for the reader to complain about.
            return read_end(file, pipe, 1, bytes);
        }
        bytes = read_end(file, &mut pipe, needed - read, bytes)?;
        if (bytes.len() as u64) < needed {
            return Ok(bytes);
        }
    }
}

/// A pipe that a process was started with, or was given by its shell.
fn open_pipe(file: &Path) -> Result<Option<File>> {
    let io = |source| Error::io(file, source);
    let is_descriptor =
        file == Path::new("/dev/stdin") || ["/dev/fd", "/proc/self/fd"].map(Path::new).contains(&folder(file));
    if !is_descriptor || kind(std::fs::metadata(file).map_err(io)?.file_type()) != FIFO {
        return Ok(None);
    }
    #[cfg(unix)]
    if file == Path::new("/dev/stdin") {
        // Not opened again: where the writer has come and gone, that would wait for another.
        use std::os::fd::AsFd;
        return Ok(Some(File::from(io::stdin().as_fd().try_clone_to_owned().map_err(io)?)));
    }
    Ok(Some(File::open(file).map_err(io)?))
}

fn folder(file: &Path) -> &Path {
    file.parent().unwrap_or(Path::new(""))
}

/// Appends the next `length` bytes, or as many as there are.
fn read_end(file: &Path, opened: impl Read, length: u64, mut bytes: Vec<u8>) -> Result<Vec<u8>> {
    let fits = usize::try_from(length).is_ok_and(|length| bytes.try_reserve_exact(length).is_ok());
    if !fits {
        return Err(Error::memory(file, "the file", length));
    }
    opened.take(length).read_to_end(&mut bytes).map_err(|source| Error::io(file, source))?;
    Ok(bytes)
}

fn require_regular(file: &Path, metadata: &Metadata, expected: &str) -> Result<()> {
    if metadata.is_file() {
        return Ok(());
    }
    Err(Error::format(file, "kind of file", kind(metadata.file_type()), expected))
}

const FIFO: &str = "a FIFO";

#[cfg(unix)]
fn kind(kind: FileType) -> &'static str {
    use std::os::unix::fs::FileTypeExt;
    match kind {
        _ if kind.is_dir() => "a directory",
        _ if kind.is_fifo() => FIFO,
        _ if kind.is_socket() => "a socket",
        _ if kind.is_char_device() || kind.is_block_device() => "a device",
        _ => "not one",
    }
}

#[cfg(not(unix))]
fn kind(kind: FileType) -> &'static str {
    if kind.is_dir() { "a directory" } else { "not one" }
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;

    #[test]
    fn what_has_no_end_or_no_bytes_is_not_opened() {
        let folder = tempfile::tempdir().unwrap();
        let fifo = folder.path().join("fifo");
        assert!(std::process::Command::new("mkfifo").arg(&fifo).status().unwrap().success());
        let socket = folder.path().join("socket");
        let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        let link = folder.path().join("link");
        std::os::unix::fs::symlink("/dev/zero", &link).unwrap();
        for (file, is) in [
            (fifo.as_path(), "a FIFO"),
            (Path::new("/dev/zero"), "a device"),
            (&link, "a device"),
            (&socket, "a socket"),
            (folder.path(), "a directory"),
        ] {
            let expected = format!("{}: kind of file is {is}, expected a regular file", file.display());
            assert_eq!(open(file).unwrap_err().to_string(), expected);
            assert_eq!(read_json(file).unwrap_err().to_string(), expected);
            assert_eq!(read_argument(file, |_| Ok(16)).unwrap_err().to_string(), expected);
        }
    }

    #[test]
    fn json_of_a_terabyte_is_refused_by_its_length() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("config.json");
        File::create(&file).unwrap().set_len(1 << 40).unwrap();
        let error = read_json(&file).unwrap_err().to_string();
        assert!(error.contains("length is 1099511627776 bytes, expected at most 100000000"), "{error}");
    }
}
