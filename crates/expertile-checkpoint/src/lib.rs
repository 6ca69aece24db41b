//! One MoE layer out of a Hugging Face checkpoint folder, memory-mapped, and the small files that go in and out beside it.
//!
//! [`Checkpoint`] opens the folder; [`Checkpoint::layer`] gives a [`MoeLayer`]: its shape, its router and views of its
//! weights, bf16 or e4m3 with `weight_scale_inv`, in Qwen3-MoE's, DeepSeek-V3's or Mixtral's naming ([`config`] lists the
//! keys). [`Ids`] reads `topk_ids`; [`LayerInput`] and [`LayerOutput`] are the files of one call.
//!
//! Everything here looks at foreign bytes: whatever they hold, the worst that happens is an [`Error`]. Each reader works
//! over bytes as well as files, so that it can be fuzzed.

pub mod checkpoint;
pub mod config;
pub mod error;
pub mod ids;
mod json;
pub mod moe_layer;
mod read;
mod tensors;
pub mod tokens;

pub use checkpoint::Checkpoint;
pub use config::Family;
pub use error::{Error, Result};
pub use ids::Ids;
pub use moe_layer::{Expert, MoeLayer, WeightMatrix, WeightValues};
pub use tokens::{HiddenStates, LayerInput, LayerOutput};
