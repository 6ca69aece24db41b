//! What commands print: numbers, tables, stages, pictures, progress.

pub(crate) mod format;
pub(crate) mod plot;
pub(crate) mod progress;
pub(crate) mod stages;
pub(crate) mod text;
