#![doc = include_str!("../README.md")]

pub mod activation;
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod dtype;
pub mod error;
pub mod gemm;
pub mod layer;
pub mod layout;
pub mod plan;
pub mod quantize;
pub mod routing;

pub use activation::Activation;
pub use dtype::{Dtype, E4m3, Float, MatrixRef, RowElement};
pub use error::{Error, Result};
pub use gemm::{ActivationFormat, GateUpOrder, WeightFormat};
pub use layer::{LayerShape, Stage, StageCost};
pub use layout::{Layout, Padding};
pub use plan::{AlignmentRule, Arch, Plan, TokenExperts};
pub use quantize::{Group, ScaleFormat, ScaleLayout, ScaleRounding, Scales, ScalesMut};
pub use routing::router::{GroupWorth, Groups, Normalization, Router, Scoring};
pub use routing::{Routing, TopkIds};
