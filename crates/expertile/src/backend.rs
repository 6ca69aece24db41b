//! One API on every backend: what an engine needs to write a layer once.
//!
//! [`Backend`] is where work runs ([`Cpu`](crate::cpu::Cpu), [`cuda::Device`](crate::cuda::Device)) and what lives
//! there: buffers, weights, prepared layers. [`ExpertLayer`] is the layer's verbs. Everything here is safe; engines
//! that bring their own device memory and stream use [`cuda::Layer::launch`](crate::cuda::Layer::launch) directly.
//!
//! ```
//! use expertile::backend::{Backend, ExpertLayer, Ids, LayerInputs};
//! use expertile::cpu::Cpu;
//! use expertile::{ActivationFormat, LayerConfig, LayerShape, MatrixRef, WeightFormat, WeightsBuilder};
//! use half::bf16;
//!
//! /// One token through a layer of one expert, on any backend.
//! fn forward<B: Backend>(backend: &B) -> expertile::Result<Vec<bf16>> {
//!     let shape = LayerShape::new(128, 64, 1)?;
//!     let mut w13 = backend.w13_builder(WeightFormat::Bf16, &shape)?;
//!     w13.add_bf16_rows(0, 0, MatrixRef::new(&[bf16::from_f32(0.1); 128 * 128], 128, 128)?)?;
//!     let mut w2 = backend.w2_builder(WeightFormat::Bf16, &shape)?;
//!     w2.add_bf16_rows(0, 0, MatrixRef::new(&[bf16::from_f32(0.1); 128 * 64], 128, 64)?)?;
//!     let config = LayerConfig::new(1, 1, ActivationFormat::Bf16);
//!     let layer = backend.prepare(w13.finish()?, w2.finish()?, config, 16)?;
//!
//!     let inputs = LayerInputs {
//!         tokens: 1,
//!         hidden_states: &backend.upload(&[bf16::ONE; 128])?,
//!         topk_ids: Ids::I32(&backend.upload(&[0])?),
//!         topk_weights: &backend.upload(&[1.0])?,
//!         expert_map: None,
//!     };
//!     let (mut workspace, mut output) = (layer.workspace(1)?, backend.allocate(128)?);
//!     layer.run(&inputs, &mut workspace, &mut output)?;
//!     layer.check(&mut workspace)?;
//!     let mut values = vec![bf16::ZERO; 128];
//!     backend.download(&output, &mut values)?;
//!     Ok(values)
//! }
//!
//! assert!(forward(&Cpu::new())?[0].to_f32() > 1.0);
//! # Ok::<(), expertile::Error>(())
//! ```

use crate::dtype::{Dtype, E4m3, Float};
use crate::error::{Error, Result};
use crate::gemm::WeightFormat;
use crate::int4::Int4Scales;
use crate::layer::{LayerConfig, LayerShape};
use crate::matrix::MatrixRef;
use bytemuck::Pod;
use half::bf16;
use std::fmt;

/// Where work runs, and what lives there.
pub trait Backend: Clone + fmt::Debug + Send + Sync {
    /// Values in this backend's memory.
    type Buffer<T: Pod>;
    /// Weights of all experts, as the GEMM reads them.
    type Weights: fmt::Debug;
    /// Takes weights in parts.
    type WeightsBuilder: WeightsBuilder<Weights = Self::Weights>;
    /// Memory for what stands between a call's steps.
    type Workspace: fmt::Debug;
    /// An expert layer, prepared.
    type Layer: ExpertLayer<Self>;

    /// `len` values, whatever they are.
    ///
    /// # Errors
    /// [`Error::Memory`] or [`Error::Cuda`] if there is not enough memory, [`Error::Overflow`].
    fn allocate<T: Pod>(&self, len: usize) -> Result<Self::Buffer<T>>;

    /// A buffer of these values.
    ///
    /// # Errors
    /// As [`Backend::allocate`].
    fn upload<T: Pod>(&self, values: &[T]) -> Result<Self::Buffer<T>>;

    /// Copies the start of a buffer to the host, after everything queued before.
    ///
    /// # Errors
    /// [`Error::BufferTooSmall`], [`Error::Cuda`].
    fn download<T: Pod>(&self, buffer: &Self::Buffer<T>, to: &mut [T]) -> Result<()>;

    /// Room for `w13 [E, 2 I, H]` (gate's rows first, then up's; `[E, I, H]` without a gate).
    ///
    /// # Errors
    /// [`Error::Value`] for a width that the backend does not take, [`Error::Memory`] or [`Error::Cuda`] if there is
    /// not enough memory.
    fn w13_builder(&self, format: WeightFormat, shape: &LayerShape) -> Result<Self::WeightsBuilder>;

    /// Room for `w2 [E, H, I]`.
    ///
    /// # Errors
    /// As [`Backend::w13_builder`].
    fn w2_builder(&self, format: WeightFormat, shape: &LayerShape) -> Result<Self::WeightsBuilder>;

    /// A layer for calls of up to `max_tokens` tokens. Compiling and loading happen here and never in a call.
    ///
    /// # Errors
    /// As [`cpu::Layer::prepare`](crate::cpu::Layer::prepare) and `cuda::Layer::prepare`.
    fn prepare(
        &self,
        w13: Self::Weights,
        w2: Self::Weights,
        config: LayerConfig,
        max_tokens: usize,
    ) -> Result<Self::Layer>;
}

/// Takes weights that come in parts: expert by expert, gate and up apart.
pub trait WeightsBuilder: Sized {
    /// What comes out.
    type Weights;

    /// Adds `rows [R, K]`, rounded to the nearest bf16, as rows `first_row..first_row + R` of an expert.
    ///
    /// # Errors
    /// [`Error::WeightFormat`] if this is a builder of another format, [`Error::Value`] if there is no such expert,
    /// [`Error::Shape`] if the rows do not fit, [`Error::Count`] if one of them was added before.
    fn add_bf16_rows<T: Float>(&mut self, expert: usize, first_row: usize, rows: MatrixRef<'_, T>) -> Result<()>;

    /// Adds `rows [R, K]` with block scales `[ceil(R / 128), ceil(K / 128)]`, as rows `first_row..first_row + R` of an
    /// expert.
    ///
    /// # Errors
    /// As [`WeightsBuilder::add_bf16_rows`]; [`Error::Value`] for a first row inside a block.
    fn add_e4m3_rows(
        &mut self,
        expert: usize,
        first_row: usize,
        rows: MatrixRef<'_, E4m3>,
        scales: MatrixRef<'_, f32>,
    ) -> Result<()>;

    /// Adds `rows [R, K]` with one scale for each of them.
    ///
    /// # Errors
    /// As [`WeightsBuilder::add_e4m3_rows`]; [`Error::Unsupported`] on a GPU.
    fn add_e4m3_channel_rows(
        &mut self,
        expert: usize,
        first_row: usize,
        rows: MatrixRef<'_, E4m3>,
        scales: &[f32],
    ) -> Result<()>;

    /// Adds rows of MXFP4 weights, `blocks [R, K / 2]` with `scales [R, K / 32]`, as rows `first_row..first_row + R` of
    /// an expert: see [`crate::mxfp4`].
    ///
    /// # Errors
    /// As [`WeightsBuilder::add_bf16_rows`]; [`Error::Value`] for a scale of 255, which is NaN.
    fn add_mxfp4_rows(
        &mut self,
        expert: usize,
        first_row: usize,
        blocks: MatrixRef<'_, u8>,
        scales: MatrixRef<'_, u8>,
    ) -> Result<()>;

    /// Adds rows of int4 weights, `blocks [R, K / 2]` with `scales [R, K / 32]`, as rows `first_row..first_row + R` of an
    /// expert: see [`crate::int4`].
    ///
    /// # Errors
    /// As [`WeightsBuilder::add_bf16_rows`]; [`Error::Value`] for a scale that is not finite, [`Error::WeightFormat`] for
    /// scales of another type than those before.
    fn add_int4_rows(
        &mut self,
        expert: usize,
        first_row: usize,
        blocks: MatrixRef<'_, u8>,
        scales: Int4Scales<'_>,
    ) -> Result<()>;

    /// The weights.
    ///
    /// # Errors
    /// [`Error::Count`] if rows of an expert are missing.
    fn finish(self) -> Result<Self::Weights>;
}

/// `topk_ids [M, topk]`, row-major; a negative id is an empty slot.
pub enum Ids<'a, B: Backend> {
    /// 32-bit ids.
    I32(&'a B::Buffer<i32>),
    /// 64-bit ids.
    I64(&'a B::Buffer<i64>),
}

// Not derived: a derive would ask the same of `B`.
impl<B: Backend> Clone for Ids<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<B: Backend> Copy for Ids<'_, B> {}

impl<B: Backend> Ids<'_, B> {
    /// Their type.
    #[must_use]
    pub fn dtype(&self) -> Dtype {
        match self {
            Self::I32(_) => Dtype::I32,
            Self::I64(_) => Dtype::I64,
        }
    }
}

/// One call's inputs, row-major in the backend's memory.
pub struct LayerInputs<'a, B: Backend, T: Float> {
    /// `M`
    pub tokens: usize,
    /// `[M, H]`
    pub hidden_states: &'a B::Buffer<T>,
    /// `[M, topk]`
    pub topk_ids: Ids<'a, B>,
    /// `[M, topk]`
    pub topk_weights: &'a B::Buffer<f32>,
    /// `[G]`: global id to local id, negative if not here. Without one, ids are local.
    pub expert_map: Option<&'a B::Buffer<i32>>,
}

impl<B: Backend, T: Float> Clone for LayerInputs<'_, B, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<B: Backend, T: Float> Copy for LayerInputs<'_, B, T> {}

impl<B: Backend, T: Float> LayerInputs<'_, B, T> {
    /// Fails unless the types are those that a layer was prepared for, and the ids are local where there is no map.
    pub(crate) fn check<O: Float>(&self, config: &LayerConfig, local_experts: usize) -> Result<()> {
        config.require_types(T::DTYPE, O::DTYPE)?;
        let (argument, actual) = ("topk_ids", self.topk_ids.dtype());
        if actual != config.ids {
            return Err(Error::Dtype { argument, actual, expected: config.ids.as_prepared() });
        }
        if self.expert_map.is_none() && config.global_experts != local_experts {
            let expected = format!("{local_experts} without an expert map");
            return Err(Error::value("global_experts", config.global_experts, expected));
        }
        Ok(())
    }
}

impl<B: Backend> fmt::Debug for Ids<'_, B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Ids({})", self.dtype())
    }
}

impl<B: Backend, T: Float> fmt::Debug for LayerInputs<'_, B, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut all = f.debug_struct("LayerInputs");
        all.field("tokens", &self.tokens).field("hidden_states", &T::DTYPE).field("topk_ids", &self.topk_ids);
        all.field("expert_map", &self.expert_map.is_some()).finish_non_exhaustive()
    }
}

impl<B: Backend, T: Float> fmt::Debug for ExpandedRows<'_, B, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut all = f.debug_struct("ExpandedRows");
        all.field("m_sum", &self.m_sum).field("alignment", &self.alignment).field("rows", &T::DTYPE);
        all.finish_non_exhaustive()
    }
}

/// Rows that a dispatcher has expanded (one for each token and expert) and sorted by expert.
pub struct ExpandedRows<'a, B: Backend, T: Float> {
    /// `M_sum`
    pub m_sum: usize,
    /// `A`: every expert's rows start on a multiple of it.
    pub alignment: usize,
    /// `[M_sum, H]`; rows between the experts' are not read.
    pub rows: &'a B::Buffer<T>,
    /// `[E]`: the end of each expert's rows; an expert without rows stores its start.
    pub psum: &'a B::Buffer<i32>,
}

/// The verbs of a prepared layer.
pub trait ExpertLayer<B: Backend>: fmt::Debug {
    /// What a call does: plain data, which prints itself.
    type Choice: fmt::Debug + fmt::Display + Clone + PartialEq;

    /// The layer's sizes.
    fn shape(&self) -> &LayerShape;

    /// What it computes, and what its calls are made of.
    fn config(&self) -> &LayerConfig;

    /// The most tokens of a call.
    fn max_tokens(&self) -> usize;

    /// What a call with that many tokens does.
    ///
    /// # Errors
    /// [`Error::Value`] for more tokens than the layer was prepared for.
    fn choice(&self, tokens: usize) -> Result<Self::Choice>;

    /// Bytes of workspace that serve calls of up to that many tokens.
    ///
    /// # Errors
    /// As [`ExpertLayer::choice`].
    fn workspace_bytes(&self, tokens: usize) -> Result<usize>;

    /// A workspace for calls of up to that many tokens, ready to use.
    ///
    /// # Errors
    /// As [`ExpertLayer::choice`] and [`Backend::allocate`].
    fn workspace(&self, tokens: usize) -> Result<B::Workspace>;

    /// Runs (on a GPU: queues) the layer, `output [M, H]`.
    ///
    /// # Errors
    /// [`Error::BufferTooSmall`], [`Error::Dtype`], [`Error::Value`], [`Error::Device`] for what does not fit the
    /// layer; nothing is written to `output` then. A CPU also returns [`Error::ExpertId`] and [`Error::MapEntry`]
    /// here.
    fn run<T: Float, O: Float>(
        &self,
        inputs: &LayerInputs<'_, B, T>,
        workspace: &mut B::Workspace,
        output: &mut B::Buffer<O>,
    ) -> Result<()>;

    /// Waits for what was queued, and reports what was wrong with the ids of calls since the last time: on a GPU only a
    /// kernel can see them, and treats a slot with a bad one as empty.
    ///
    /// # Errors
    /// [`Error::ExpertId`], [`Error::MapEntry`]; [`Error::Cuda`].
    fn check(&self, workspace: &mut B::Workspace) -> Result<()>;

    /// A workspace for [`ExpertLayer::run_expanded`] of up to `m_sum` rows.
    ///
    /// # Errors
    /// As [`ExpertLayer::run_expanded`] and [`Backend::allocate`].
    fn expanded_workspace(&self, m_sum: usize) -> Result<B::Workspace>;

    /// Runs the experts alone on rows that are in their places: `out [M_sum, H]`, live rows only. Router weights and a
    /// shared expert belong to tokens and have no part in it.
    ///
    /// # Errors
    /// As [`ExpertLayer::run`]; [`Error::Count`] and [`Error::MSum`] for a `psum` that does not fit;
    /// [`Error::Unsupported`] on a backend that does not take such rows.
    fn run_expanded<T: Float>(
        &self,
        rows: &ExpandedRows<'_, B, T>,
        workspace: &mut B::Workspace,
        out: &mut B::Buffer<bf16>,
    ) -> Result<()>;
}
