//! One module per subcommand, and the options that they share.

pub(crate) mod bench;
pub(crate) mod doctor;
pub(crate) mod layer;
pub(crate) mod options;
pub(crate) mod plan;
pub(crate) mod quantize;
