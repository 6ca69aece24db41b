//! Results on their way out: files appear whole or not at all, and a closed pipe is no error.

use crate::error::{Error, Result};
use serde::Serialize;
use std::io::{ErrorKind, Write};
use std::path::Path;

/// Writes a file beside its final place and renames it, so that nobody ever reads half of one.
pub(crate) fn write_file(file: &Path, bytes: &[u8]) -> Result<()> {
    let folder = file.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let write = || {
        let mut builder = tempfile::Builder::new();
        #[cfg(unix)]
        builder.permissions(ordinary_permissions());
        let mut temporary = builder.tempfile_in(folder)?;
        temporary.write_all(bytes)?;
        temporary.persist(file).map_err(|error| error.error)?;
        Ok(())
    };
    write().map_err(|source| Error::write(file, source))
}

/// What a newly created file gets (less the process's umask); temporary files are private by default.
#[cfg(unix)]
fn ordinary_permissions() -> std::fs::Permissions {
    use std::os::unix::fs::PermissionsExt;
    std::fs::Permissions::from_mode(0o666)
}

/// Prints text; whoever reads the pipe may stop early.
pub(crate) fn print(text: &str) -> Result<()> {
    match std::io::stdout().lock().write_all(text.as_bytes()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => Err(Error::write(Path::new("the output"), error)),
        _ => Ok(()),
    }
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
