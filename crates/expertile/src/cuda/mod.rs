//! The CUDA backend: a token's path on the caller's stream and in the caller's memory. The GEMM, and so the layer as a
//! whole, needs Hopper.
//!
//! | step | here | kernel |
//! |---|---|---|
//! | routing, plan, layout | [`Route`] | `route/route_plan.cu` |
//! | routing to quantized rows, one launch for few slots | [`QuantizePermute`] | `rows/quantize_permute.cu` |
//! | permute of rows as they are | [`Permute`] | `rows/permute.cu` |
//! | grouped GEMM | [`Gemm`] | `gemm/sm90_gemm_*.cu`, three of them |
//! | its worklist, of rows that came in their places | [`ListTiles`] | `route/list_tiles.cu` |
//! | both of these | [`GroupedGemm`] | |
//! | activation, quantized or not | [`Activate`] | `rows/activation.cu` |
//! | quantizing rows that came in their places | [`QuantizeRows`] | the same, without the activation |
//! | unpermute | [`Unpermute`] | `rows/unpermute.cu` |
//! | the whole layer | [`Layer`] | all of them |
//! | the experts alone, of rows that came in their places | [`ExpandedLayer`] | |
//! | the layer over several GPUs | [`ExpertParallelLayer`] | and `exchange/*.cu` |
//!
//! Building needs nothing of CUDA. [`Device::open`] looks for the driver and says what is missing; kernels are
//! compiled by NVRTC (see [`Compiler`]) when a step is *prepared*, never when it runs, and kept as cubins on disk.
//!
//! A prepared step takes a [`Plan`](crate::Plan), raw device addresses and a raw [`Stream`]. It checks what the host
//! can see, launches, and returns: it allocates nothing, never waits, and can be captured in a graph. What only a
//! kernel can see (an expert id past the limit) is kept in the state and comes back from [`Route::check`] or
//! [`QuantizePermute::check`] (or [`Layer::check`], [`GroupedGemm::check`]); until then nothing was read or written outside the buffers.
//! Results are the CPU backend's, bit for bit (where a result is NaN, a NaN); only the sums of the GEMM have an order
//! of their own.

mod activation;
mod arguments;
#[cfg(test)]
mod arithmetic;
mod backend;
mod call;
mod cost;
mod definitions;
mod driver;
mod expert_parallel;
mod few_tokens;
mod gemm;
mod grouped_gemm;
mod layer;
mod list_tiles;
pub mod measure;
mod nccl;
mod permute;
mod prepare;
mod quantize_permute;
mod quantize_rows;
mod route;
mod route_permute;
mod unpermute;
mod weights;

pub use activation::{Activate, ActivateCall, ActivateConfig};
pub use call::{DeviceMatrix, LayoutPtrs, RoutingPtrs, RowsPtrs};
pub use driver::{
    Compiler, CubinCache, Device, DeviceBuffer, DevicePtr, Graph, Info, Resources, Source, Stream, availability,
};
pub use expert_parallel::{
    CapturedExpertParallelLayer, ExpertParallelCall, ExpertParallelChoice, ExpertParallelLayer, Link,
};
pub use few_tokens::FewTokensConfig;
pub use gemm::{FewRowsCut, Gemm, GemmCall, GemmConfig, GemmKernel, GemmShape, JoinedConfig, ROW_TILES, RowEnds};
pub use grouped_gemm::{GroupedGemm, GroupedGemmCall, GroupedGemmShape, expected_rows};
pub use layer::{
    ALIGNMENT, Biases, CapturedLayer, ExpandedCall, ExpandedChoice, ExpandedLayer, Layer, LayerCall, LayerChoice,
    LayerParts, Workspace,
};
pub use list_tiles::{Grouping, ListTiles, ListTilesCall, TileLists};
pub use nccl::Nccl;
pub use permute::{Permute, PermuteCall, PermuteConfig};
pub use quantize_permute::{QuantizePermute, QuantizePermuteCall, QuantizePermuteConfig};
pub use quantize_rows::{QuantizeRows, QuantizeRowsCall, QuantizeRowsConfig};
pub use route::{Route, RouteCall, RouteConfig, STATE_BYTES};
pub use route_permute::RoutePermuteConfig;
pub use unpermute::{Unpermute, UnpermuteCall, UnpermuteConfig};
pub use weights::{Weights, WeightsBuilder};

/// One call's inputs in device memory.
pub type LayerInputs<'a, T> = crate::backend::LayerInputs<'a, Device, T>;
/// A call's ids in device memory.
pub type Ids<'a> = crate::backend::Ids<'a, Device>;
