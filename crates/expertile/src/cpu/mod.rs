//! The CPU backend: the steps of a token's path, run by threads and vector instructions.
//!
//! Every step takes a [`Cpu`], which says which instruction set to use and where the threads come from. By default
//! that is the best this machine has and the rayon pool one is called from, so a caller who already has a pool wraps
//! the call in `pool.install(..)` or hands it over with [`Cpu::in_pool`].

mod activation;
pub mod arch;
mod backend;
mod disjoint;
mod dispatch;
mod expert_parallel;
pub mod gemm;
mod layer;
mod permute;
mod quantize;
mod rows;
mod unpermute;
mod workspace;

pub use activation::{activate, activate_quantize};
pub use arch::Isa;
pub use expert_parallel::{ExpertParallelChoice, ExpertParallelLayer, ParallelStageDone};
pub use gemm::{
    Activations, PackedWeights, PackedWeightsBuilder, grouped_gemm, grouped_gemm_of_segments, grouped_gemm_with_bias,
    grouped_gemm_workspace_bytes,
};
pub use layer::{ALIGNMENT, Layer, LayerChoice, SharedExpert, StageDone, TokenRows};
pub use permute::{RowScales, permute_convert, permute_quantized, permute_rows, quantize_permute};
pub use quantize::quantize_rows;
use std::sync::Arc;
pub use unpermute::{unpermute, unpermute_slots};

/// Where CPU work runs: an instruction set and a thread pool.
#[derive(Debug, Clone)]
pub struct Cpu {
    isa: Isa,
    pool: Option<Arc<rayon::ThreadPool>>,
}

impl Default for Cpu {
    fn default() -> Self {
        Self::new()
    }
}

impl Cpu {
    /// The best instruction set of this machine, on the rayon pool that a call comes from.
    #[must_use]
    pub fn new() -> Self {
        Self::with_isa(Isa::best())
    }

    /// A given instruction set, on the rayon pool that a call comes from.
    #[must_use]
    pub fn with_isa(isa: Isa) -> Self {
        Self { isa, pool: None }
    }

    /// The same, on the caller's pool.
    #[must_use]
    pub fn in_pool(self, pool: Arc<rayon::ThreadPool>) -> Self {
        Self { pool: Some(pool), ..self }
    }

    /// The instruction set.
    #[must_use]
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// Threads that work may be spread over.
    #[must_use]
    pub fn threads(&self) -> usize {
        self.pool.as_ref().map_or_else(rayon::current_num_threads, |pool| pool.current_num_threads())
    }

    /// Runs `work` where rayon finds this backend's threads.
    pub(crate) fn install<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R {
        match &self.pool {
            Some(pool) => pool.install(work),
            None => work(),
        }
    }
}
