#![doc = include_str!("../README.md")]

pub mod activation;
pub mod alignment;
pub mod backend;
pub mod combine;
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod dispatch;
pub mod dtype;
pub mod error;
pub mod exchange;
pub mod expert_parallel;
pub mod gemm;
pub mod int4;
pub mod layer;
pub mod layout;
pub mod matrix;
pub mod mxfp4;
pub mod placement;
pub mod plan;
pub mod quantize;
pub mod routing;
mod weights;

pub use activation::Activation;
pub use alignment::{AlignmentRule, Arch};
pub use backend::{Backend, ExpertLayer, WeightsBuilder};
pub use combine::Combine;
pub use dispatch::{Dispatch, TokenRow};
pub use dtype::{Dtype, E4m3, Float, RowElement};
pub use error::{Error, Result};
pub use exchange::Exchange;
pub use expert_parallel::{ParallelChoice, ParallelConfig, ParallelStage};
pub use gemm::{ActivationFormat, GateUpOrder, WeightFormat};
pub use layer::{LayerConfig, LayerShape, Stage, StageCost};
pub use layout::{Layout, Padding, Segments};
pub use matrix::MatrixRef;
pub use placement::{ExpertCopy, Placement};
pub use plan::{Plan, TokenExperts};
pub use quantize::{Group, ScaleFormat, ScaleLayout, ScaleRounding, Scales, ScalesMut};
pub use routing::router::{GroupWorth, Groups, Normalization, Router, Scoring};
pub use routing::{Routing, TopkIds};
