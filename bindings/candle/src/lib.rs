#![doc = include_str!("../README.md")]

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
mod error;
mod layer;
mod operands;
mod weights;

pub use expertile::{Activation, ActivationFormat, Dtype, LayerConfig, LayerShape, WeightFormat};
pub use layer::Layer;
pub use weights::Weights;
