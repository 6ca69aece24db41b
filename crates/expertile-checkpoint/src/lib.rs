//! One MoE layer out of a Hugging Face checkpoint folder, and the small files that go in and out beside it.

pub mod error;
pub mod ids;
mod tensors;

pub use error::{Error, Result};
pub use ids::Ids;
