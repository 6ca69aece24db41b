//! One MoE layer out of a Hugging Face checkpoint folder, memory-mapped, and the small files that go in and out beside
//! it.
//!
//! [`Checkpoint`] opens the folder; [`Checkpoint::layer`] gives a [`MoeLayer`]: its shape, its router and views of its
//! weights in bf16, f16, f32, e4m3, MXFP4 or int4, as any of the [families](Family::all) that are known names them. [`Ids`] reads
//! `topk_ids`; [`LayerInput`] and [`LayerOutput`] are the files of one call; [`QuantizedLayer`] writes a layer's experts
//! in another format.
//!
//! Everything here looks at foreign bytes: whatever they hold, the worst that happens is an [`Error`]. Each reader
//! works over bytes as well as files, so that it can be fuzzed.

pub mod checkpoint;
mod config;
pub mod error;
mod family;
pub mod ids;
mod json;
mod keys;
mod matrix;
pub mod moe_layer;
mod quantization;
mod quantized;
mod read;
mod tensors;
pub mod tokens;

pub use checkpoint::Checkpoint;
pub use error::{Error, Result};
pub use family::Family;
pub use ids::Ids;
pub use matrix::{WeightMatrix, WeightRows, WeightScales};
pub use moe_layer::{Biases, Expert, MoeLayer, SharedExpert};
pub use quantized::{QuantizedExpert, QuantizedLayer, QuantizedMatrix};
pub use tokens::{HiddenStates, LayerInput, LayerOutput};
