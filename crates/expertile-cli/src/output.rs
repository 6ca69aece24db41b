//! Writing results: files appear whole or not at all, inputs stay as they are, and a closed pipe is no error.
//!
//! What a target is decides how it is written. A regular file, or a name that is not taken, is written beside its
//! place and renamed into it, with the old file's permissions (and, where we may, its owner); a symbolic link stays,
//! and the file that it leads to is replaced. Anything else (a device, a FIFO, `>(command)`) is written through:
//! opening a FIFO waits for its reader, as it does for every program. A name that the system keeps (`/dev/stderr`,
//! `/proc/self/fd/3`) is an open file and not a place: it is written through even if the shell redirected it to a
//! regular file.
//!
//! [`prepare`] finds before the work what would make writing fail after it: a folder that is missing or closed to us,
//! a directory in the file's place, a target that is one of the call's inputs or that another option writes too.
//!
//! All text for people leaves through this module, which is where control characters, that names in hostile files may
//! hold, are written as `\u001b` rather than sent to a terminal.

use crate::error::{Error, Result};
use crate::report::text::{one_line, printable};
use crate::signals;
use serde::Serialize;
use std::fs::{self, File, Metadata};
use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};

/// Symbolic links that are followed, as many as Linux does.
const MOST_LINKS: usize = 40;

/// How a target is written.
enum Destination {
    /// Beside this name, then renamed into it; like the file that is there, if there is one.
    Replace(PathBuf, Option<Metadata>),
    /// Into what is there.
    Through,
    /// Into this process's own standard output, where the report goes as well.
    Stdout,
    /// Into its standard error.
    Stderr,
}

/// Checks that each option's target can be written when the time comes, is none of `inputs` and not the same as
/// another's.
///
/// An input that does not exist counts too: a file of its name would be taken for it by the next call.
pub(crate) fn prepare(targets: &[(&'static str, Option<&Path>)], inputs: &[PathBuf]) -> Result<()> {
    let mut earlier: Vec<(&str, PathBuf)> = Vec::new();
    for &(option, target) in targets {
        let Some(target) = target else { continue };
        let refuse = |expected: String| Err(Error::Target { option, file: target.to_owned(), expected });
        match destination(target).map_err(|source| Error::write(target, source))? {
            Destination::Through | Destination::Stdout | Destination::Stderr => {}
            Destination::Replace(file, _) => {
                if let Some(input) = inputs.iter().find(|input| is_same_file(&file, input)) {
                    return refuse(format!("a file that is not an input of this call ({})", input.display()));
                }
                if let Some((other, _)) = earlier.iter().find(|(_, other)| is_same_file(&file, other)) {
                    return refuse(format!("another file than {other}"));
                }
                // A file without a name, gone when closed: this is how the folder says whether it takes one. Under the
                // lock, because where there are no such files it has a name for a moment.
                let _unfinished = signals::unfinished();
                tempfile::tempfile_in(folder_of(&file)).map_err(|source| Error::write(target, source))?;
                earlier.push((option, file));
            }
        }
    }
    Ok(())
}

/// Writes a file as its kind asks for.
pub(crate) fn write_file(file: &Path, bytes: &[u8]) -> Result<()> {
    write_file_with(file, &mut |out| out.write_all(bytes))
}

/// Writes a file as its kind asks for; `contents` writes what it holds.
pub(crate) fn write_file_with(file: &Path, contents: &mut Contents<'_>) -> Result<()> {
    let mut write = || match destination(file)? {
        Destination::Replace(file, old) => replace(&file, old.as_ref(), contents),
        // At the end: what another program wrote into an open file stays.
        Destination::Through => tolerate_closed_pipe(contents(&mut File::options().append(true).open(file)?)),
        Destination::Stdout => write_stdout(contents),
        Destination::Stderr => tolerate_closed_pipe(contents(&mut io::stderr().lock())),
    };
    write().map_err(|source| Error::write(file, source))
}

/// Writes what a file holds.
type Contents<'a> = dyn FnMut(&mut dyn Write) -> io::Result<()> + 'a;

/// The kind of file at a target, or the lack of one.
fn destination(target: &Path) -> io::Result<Destination> {
    match fs::metadata(target) {
        Ok(there) if there.is_dir() => Err(ErrorKind::IsADirectory.into()),
        Ok(there) if !there.is_file() => Ok(Destination::Through),
        Ok(there) if is_open_as(&there, &io::stdout()) => Ok(Destination::Stdout),
        Ok(there) if is_open_as(&there, &io::stderr()) => Ok(Destination::Stderr),
        Ok(_) if belongs_to_the_system(target)? => Ok(Destination::Through),
        Ok(there) => Ok(Destination::Replace(fs::canonicalize(target)?, Some(there))),
        Err(error) if error.kind() == ErrorKind::NotFound => {
            if belongs_to_the_system(target)? {
                return Err(error);
            }
            let file = end_of_links(target)?;
            // `name/` asks for a directory.
            if file.as_os_str().as_encoded_bytes().ends_with(b"/") || file.file_name().is_none() {
                return Err(ErrorKind::IsADirectory.into());
            }
            Ok(Destination::Replace(file, None))
        }
        Err(error) => Err(error),
    }
}

/// Where a link leads whose end does not exist; the name itself if it is no link.
fn end_of_links(name: &Path) -> io::Result<PathBuf> {
    links(name).last().unwrap_or_else(|| Ok(name.to_owned()))
}

/// The name, and every name that it leads to by symbolic links.
fn links(name: &Path) -> impl Iterator<Item = io::Result<PathBuf>> {
    let follow = |name: &io::Result<PathBuf>| {
        let name = name.as_ref().ok()?;
        Some(Ok(folder_of(name).join(fs::read_link(name).ok()?)))
    };
    let names = std::iter::successors(Some(Ok(name.to_owned())), follow).enumerate();
    names
        .map(|(count, name)| if count > MOST_LINKS { Err(io::Error::other("too many symbolic links")) } else { name })
        .scan(false, |failed, name| (!std::mem::replace(failed, name.is_err())).then_some(name))
}

/// Whether a name, or one that it leads to, is the system's own: of an open file or a device. (`/dev/shm` holds
/// ordinary files.)
fn belongs_to_the_system(name: &Path) -> io::Result<bool> {
    for name in links(name) {
        let name = name?;
        let folder = fs::canonicalize(folder_of(&name)).unwrap_or_default();
        if folder.starts_with("/proc") || folder.starts_with("/dev") && !folder.starts_with("/dev/shm") {
            return Ok(true);
        }
    }
    Ok(false)
}

fn folder_of(file: &Path) -> &Path {
    file.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Whether two names lead to one file, by whatever links, or would: the same name in the same folder.
fn is_same_file(a: &Path, b: &Path) -> bool {
    let same = |a: &Path, b: &Path| match (fs::metadata(a), fs::metadata(b)) {
        (Ok(a), Ok(b)) => identity(&a).is_some_and(|id| Some(id) == identity(&b)),
        _ => false,
    };
    let same_path = || matches!((fs::canonicalize(a), fs::canonicalize(b)), (Ok(a), Ok(b)) if a == b);
    same(a, b) || same_path() || (a.file_name() == b.file_name() && same(folder_of(a), folder_of(b)))
}

/// Device and number of a file.
#[cfg(unix)]
fn identity(file: &Metadata) -> Option<(u64, u64)> {
    use std::os::unix::fs::MetadataExt;
    Some((file.dev(), file.ino()))
}

#[cfg(not(unix))]
fn identity(_file: &Metadata) -> Option<(u64, u64)> {
    None
}

/// Whether this is the file that a standard stream goes to.
#[cfg(unix)]
fn is_open_as(file: &Metadata, stream: &impl std::os::fd::AsFd) -> bool {
    let stream = stream.as_fd().try_clone_to_owned().and_then(|stream| File::from(stream).metadata());
    stream.is_ok_and(|stream| identity(&stream) == identity(file))
}

#[cfg(not(unix))]
fn is_open_as<S>(_file: &Metadata, _stream: &S) -> bool {
    false
}

/// Writes beside the file and renames, so that no reader sees half of one; a signal in between leaves nothing behind.
fn replace(file: &Path, old: Option<&Metadata>, contents: &mut Contents<'_>) -> io::Result<()> {
    let mut temporary = {
        let mut unfinished = signals::unfinished();
        let mut builder = tempfile::Builder::new();
        #[cfg(unix)]
        builder.permissions(if old.is_some() { private() } else { ordinary() });
        let temporary = builder.tempfile_in(folder_of(file))?;
        *unfinished = Some(temporary.path().to_owned());
        temporary
    };
    let written =
        contents(temporary.as_file_mut()).and_then(|()| old.map_or(Ok(()), |old| be_like(temporary.as_file(), old)));
    let mut unfinished = signals::unfinished();
    let result = match written {
        Ok(()) => temporary.persist(file).map(|_| ()).map_err(|error| error.error),
        Err(error) => temporary.close().and(Err(error)),
    };
    *unfinished = None;
    result
}

/// Gives a file the owner, where we may, and the permissions of the one that it replaces.
#[cfg(unix)]
fn be_like(file: &File, old: &Metadata) -> io::Result<()> {
    use std::os::unix::fs::{MetadataExt, fchown};
    let _ = fchown(file, Some(old.uid()), Some(old.gid()));
    file.set_permissions(old.permissions())
}

#[cfg(not(unix))]
fn be_like(_file: &File, _old: &Metadata) -> io::Result<()> {
    Ok(())
}

/// What a newly created file gets (less the process's umask).
#[cfg(unix)]
fn ordinary() -> fs::Permissions {
    std::os::unix::fs::PermissionsExt::from_mode(0o666)
}

/// What a file has until it gets the permissions of another.
#[cfg(unix)]
fn private() -> fs::Permissions {
    std::os::unix::fs::PermissionsExt::from_mode(0o600)
}

/// Prints text; the reader of a pipe may stop early.
pub(crate) fn print(text: &str) -> Result<()> {
    let text = printable(text);
    let written = write_stdout(&mut |out| out.write_all(text.as_bytes()));
    written.map_err(|error| Error::write(Path::new("the output"), error))
}

fn write_stdout(contents: &mut Contents<'_>) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    tolerate_closed_pipe(contents(&mut stdout).and_then(|()| stdout.flush()))
}

fn tolerate_closed_pipe(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        result => result,
    }
}

/// Prints a line on stderr. One that cannot be written there has nowhere else to go, and the exit code still speaks.
pub(crate) fn tell(line: &str) {
    let _ = io::stderr().lock().write_all(format!("{}\n", one_line(line)).as_bytes());
}

/// Prints a report as JSON.
pub(crate) fn print_json(report: &impl Serialize) -> Result<()> {
    print(&json(report))
}

/// A report as JSON text.
pub(crate) fn json(report: &impl Serialize) -> String {
    let mut text = serde_json::to_string_pretty(report).expect("reports hold numbers, names and lists only");
    text.push('\n');
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_the_same_by_every_name() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        fs::create_dir(at("sub")).unwrap();
        fs::write(at("a"), "").unwrap();
        fs::write(at("other"), "").unwrap();
        assert!(is_same_file(&at("a"), &at("sub/../a")) && !is_same_file(&at("a"), &at("other")));
        assert!(is_same_file(&at("none"), &at("sub/../none")) && !is_same_file(&at("none"), &at("none2")));
        #[cfg(unix)]
        {
            fs::hard_link(at("a"), at("hard")).unwrap();
            std::os::unix::fs::symlink("a", at("soft")).unwrap();
            assert!(is_same_file(&at("a"), &at("hard")) && is_same_file(&at("soft"), &at("hard")));
        }
    }
}
