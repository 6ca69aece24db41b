//! Bars on a terminal, nothing in a pipe.

use indicatif::{ProgressBar, ProgressStyle};

/// A bar over `total` steps on stderr; it draws nothing unless stderr is a terminal, and vanishes when dropped.
pub(crate) struct Progress(ProgressBar);

impl Progress {
    pub(crate) fn new(what: &'static str, total: usize) -> Self {
        let bar = ProgressBar::new(total as u64).with_message(what);
        let style = ProgressStyle::with_template("{msg} [{bar:30}] {pos}/{len}, {elapsed} of about {duration}");
        bar.set_style(style.expect("the template is well-formed"));
        Self(bar)
    }

    /// That many steps are done.
    pub(crate) fn set(&self, done: usize) {
        self.0.set_position(done as u64);
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}
