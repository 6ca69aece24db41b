//! A kernel's source, what it is specialised for, and the key of its cubin.

use super::headers::HEADERS;
use std::fmt::{self, Write as _};

/// A kernel's source file and the values it is specialised for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    file: &'static str,
    text: &'static str,
    definitions: Vec<(&'static str, i64)>,
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.file)?;
        self.definitions.iter().try_for_each(|(name, value)| write!(f, " {name}={value}"))
    }
}

impl Source {
    pub(in crate::cuda) fn new(file: &'static str, text: &'static str, definitions: Vec<(&'static str, i64)>) -> Self {
        Self { file, text, definitions }
    }

    /// The source file's name.
    #[must_use]
    pub fn file(&self) -> &'static str {
        self.file
    }

    pub(super) fn text(&self) -> &'static str {
        self.text
    }

    /// The compiler's options. Contraction is off: results are defined one rounding per operation.
    pub(super) fn options(&self, arch: &str) -> Vec<String> {
        let mut options: Vec<String> =
            [&format!("--gpu-architecture={arch}"), "--std=c++17", "--fmad=false", "--ptxas-options=-v"]
                .map(String::from)
                .into();
        options.extend(self.definitions.iter().map(|(name, value)| format!("--define-macro={name}={value}")));
        options
    }

    /// Everything that a cubin depends on.
    pub(super) fn key(&self, arch: &str, compiler: (i32, i32)) -> String {
        let mut key = format!("nvrtc {}.{}\n", compiler.0, compiler.1);
        for option in self.options(arch) {
            let _ = writeln!(key, "{option}");
        }
        for (name, text) in HEADERS {
            let _ = writeln!(key, "== {}\n{text}", name.to_string_lossy());
        }
        let _ = writeln!(key, "== {}\n{}", self.file, self.text);
        key
    }
}
