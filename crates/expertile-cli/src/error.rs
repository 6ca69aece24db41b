//! Why the command stops, and with which exit code.

use crate::report::format::bytes;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Shorthand for a result of a subcommand.
pub(crate) type Result<T> = std::result::Result<T, Error>;

/// Everything that makes a subcommand stop.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// Options that do not go together, or a value that cannot be.
    #[error("{0}")]
    Usage(String),
    /// The library refused an argument.
    #[error(transparent)]
    Library(#[from] expertile::Error),
    /// A file that is not what it should be.
    #[error(transparent)]
    Checkpoint(#[from] expertile_checkpoint::Error),
    /// A file that cannot be written.
    #[error("{} cannot be written", file.display())]
    Write {
        /// The file.
        file: PathBuf,
        /// What the operating system says.
        source: std::io::Error,
    },
    /// More memory than there is.
    #[error(
        "{what} takes {} of memory, expected at most {}, which {limit} leaves",
        bytes(u64::try_from(*needed).unwrap_or(u64::MAX)),
        bytes(*available)
    )]
    Memory {
        /// What takes it.
        what: String,
        /// Bytes that it takes.
        needed: u128,
        /// Bytes that may be taken.
        available: u64,
        /// Whose limit that is.
        limit: &'static str,
    },
    /// A target that must not be written.
    #[error("{option} is {}, expected {expected}", file.display())]
    Target {
        /// The option that names it.
        option: &'static str,
        /// The target.
        file: PathBuf,
        /// What would do.
        expected: String,
    },
    /// An error of one of several ranks.
    #[error("rank {rank}")]
    Rank {
        /// The rank.
        rank: usize,
        /// Its error.
        source: Box<Error>,
    },
    /// An error that another rank tells.
    #[error("another rank tells why")]
    Told,
    /// A result past its tolerance.
    #[error("{0}")]
    Check(String),
}

impl Error {
    pub(crate) fn usage(message: impl Into<String>) -> Self {
        Self::Usage(message.into())
    }

    pub(crate) fn write(file: &Path, source: std::io::Error) -> Self {
        Self::Write { file: file.to_owned(), source }
    }

    pub(crate) fn exit_code(&self) -> ExitCode {
        match self {
            Self::Check(_) => ExitCode::from(1),
            _ => ExitCode::from(2),
        }
    }
}
