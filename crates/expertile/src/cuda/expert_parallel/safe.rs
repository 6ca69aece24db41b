//! The safe door: typed buffers that know their length and device, on the default stream.

use super::{ExpertParallelCall, ExpertParallelChoice, ExpertParallelLayer};
use crate::backend::{ExpandedRows, ExpertLayer, Ids, LayerInputs};
use crate::cuda::call::DeviceMatrix;
use crate::cuda::driver::{Device, DeviceBuffer, Graph, Stream};
use crate::cuda::layer::Workspace;
use crate::dtype::Float;
use crate::error::{Error, Result, checked_mul};
use crate::layer::{LayerConfig, LayerShape};
use half::bf16;

/// A call captured as a CUDA graph. Every rank replays its own. It borrows all that it works on.
#[derive(Debug)]
pub struct CapturedExpertParallelLayer<'a> {
    graph: Graph,
    layer: &'a ExpertParallelLayer,
    call: ExpertParallelCall,
    _workspace: &'a mut Workspace,
}

impl CapturedExpertParallelLayer<'_> {
    /// Queues the call; the inputs' values are those of now.
    ///
    /// # Errors
    /// [`Error::Cuda`].
    #[allow(unsafe_code)]
    pub fn replay(&mut self) -> Result<()> {
        // SAFETY: the captured operands are borrowed for as long as this value lives, the workspace exclusively; stream
        // 0 always lives, and orders the replay among everything else that is safe.
        unsafe { self.graph.replay(Stream(0)) }
    }

    /// As [`ExpertParallelLayer::check`].
    ///
    /// # Errors
    /// As [`ExpertParallelLayer::check`].
    #[allow(unsafe_code)]
    pub fn check(&mut self) -> Result<()> {
        // SAFETY: the state is of the workspace, which is borrowed exclusively; stream 0 always lives.
        unsafe { self.layer.check_launch(Stream(0), &self.call) }
    }
}

impl ExpertParallelLayer {
    /// A workspace for calls whose ranks bring up to `capacity` tokens each, made ready.
    ///
    /// # Errors
    /// As [`ExpertParallelLayer::choice`]; [`Error::Cuda`].
    pub fn workspace(&self, capacity: usize) -> Result<Workspace> {
        LayerConfig::require_tokens(capacity, self.choice.capacity)?;
        self.layer.workspace(self.choice.ranks * capacity)
    }

    /// Queues the call on the default stream: this rank's tokens with global ids, `output [M, H]`. Every rank brings at
    /// most `capacity` tokens, the same number on all of them.
    ///
    /// # Errors
    /// [`Error::BufferTooSmall`], [`Error::Dtype`], [`Error::Value`] and [`Error::Device`] for what does not fit the
    /// layer, before anything is queued; as [`ExpertParallelLayer::launch`].
    #[allow(unsafe_code)]
    pub fn run<T: Float, O: Float>(
        &self,
        inputs: &LayerInputs<'_, Device, T>,
        capacity: usize,
        workspace: &mut Workspace,
        output: &DeviceBuffer<O>,
    ) -> Result<()> {
        let call = self.safe_call(inputs, capacity, workspace, output)?;
        // SAFETY: every buffer is on this device and as large as the call reads or writes, as was checked. The default
        // stream orders the call before the buffers are freed or copied to, and the workspace is borrowed exclusively.
        unsafe { self.launch(Stream(0), &call) }
    }

    /// Captures the call as a graph, to be replayed with one launch; the buffers' values may change between replays.
    ///
    /// # Errors
    /// As [`ExpertParallelLayer::run`].
    #[allow(unsafe_code)]
    pub fn capture<'a, T: Float, O: Float>(
        &'a self,
        inputs: &LayerInputs<'a, Device, T>,
        capacity: usize,
        workspace: &'a mut Workspace,
        output: &'a DeviceBuffer<O>,
    ) -> Result<CapturedExpertParallelLayer<'a>> {
        let call = self.safe_call(inputs, capacity, workspace, output)?;
        // SAFETY: as in `run`; nothing runs before a replay, for which the operands stay borrowed.
        let graph = Graph::capture(self.device(), |stream| unsafe { self.launch(stream, &call) })?;
        Ok(CapturedExpertParallelLayer { graph, layer: self, call, _workspace: workspace })
    }

    /// Waits for the default stream, and reports what was wrong with calls in this workspace since the last time: the
    /// same on every rank.
    ///
    /// # Errors
    /// As [`ExpertParallelLayer::check_launch`].
    #[allow(unsafe_code)]
    pub fn check(&self, workspace: &mut Workspace) -> Result<()> {
        let (_, state) = workspace.addresses();
        let call = ExpertParallelCall { state, capacity: self.choice.capacity, ..ExpertParallelCall::default() };
        // SAFETY: the state was made ready, is borrowed exclusively, and stream 0 always lives.
        unsafe { self.check_launch(Stream(0), &call)? };
        self.layer.check_expanded(workspace)
    }

    /// Checks lengths and devices, and turns buffers into addresses.
    fn safe_call<T: Float, O: Float>(
        &self,
        inputs: &LayerInputs<'_, Device, T>,
        capacity: usize,
        workspace: &Workspace,
        output: &DeviceBuffer<O>,
    ) -> Result<ExpertParallelCall> {
        let LayerInputs { tokens, hidden_states, topk_ids, topk_weights, expert_map } = *inputs;
        let (device, topk, hidden) = (self.device(), self.config.topk, self.shape().hidden());
        if expert_map.is_some() {
            let (argument, actual) = ("expert_map", "given");
            return Err(Error::Unsupported { argument, actual, backend: "cuda", expected: "none: ids are global" });
        }
        inputs.check::<O>(&self.config, self.config.global_experts)?;
        let needed = self.workspace_bytes(capacity)?;
        let (values, slots) = (checked_mul("M * H", tokens, hidden)?, checked_mul("M * topk", tokens, topk)?);
        hidden_states.require("hidden_states", device, values)?;
        let ids = match topk_ids {
            Ids::I32(ids) => ids.require("topk_ids", device, slots).map(|()| ids.ptr().cast())?,
            Ids::I64(ids) => ids.require("topk_ids", device, slots).map(|()| ids.ptr().cast())?,
        };
        topk_weights.require("topk_weights", device, slots)?;
        workspace.memory().require("workspace", device, needed)?;
        output.require("output", device, values)?;
        let (memory, state) = workspace.addresses();
        Ok(ExpertParallelCall {
            tokens,
            capacity,
            hidden_states: DeviceMatrix::row_major(hidden_states.ptr().cast(), hidden),
            topk_ids: DeviceMatrix::row_major(ids, topk),
            topk_weights: DeviceMatrix::row_major(topk_weights.ptr(), topk),
            output: output.ptr().cast(),
            state,
            workspace: memory,
        })
    }
}

/// The verbs of every layer. Calls take the capacity that the layer was prepared for, whatever this rank brings: code
/// written over the trait does not know what others bring.
impl ExpertLayer<Device> for ExpertParallelLayer {
    type Choice = ExpertParallelChoice;

    fn shape(&self) -> &LayerShape {
        self.shape()
    }

    fn config(&self) -> &LayerConfig {
        self.config()
    }

    fn max_tokens(&self) -> usize {
        self.max_tokens()
    }

    fn choice(&self, tokens: usize) -> Result<ExpertParallelChoice> {
        LayerConfig::require_tokens(tokens, self.choice.capacity)?;
        self.choice(self.choice.capacity)
    }

    fn workspace_bytes(&self, tokens: usize) -> Result<usize> {
        LayerConfig::require_tokens(tokens, self.choice.capacity)?;
        self.workspace_bytes(self.choice.capacity)
    }

    fn workspace(&self, tokens: usize) -> Result<Workspace> {
        LayerConfig::require_tokens(tokens, self.choice.capacity)?;
        self.workspace(self.choice.capacity)
    }

    fn run<T: Float, O: Float>(
        &self,
        inputs: &LayerInputs<'_, Device, T>,
        workspace: &mut Workspace,
        output: &mut DeviceBuffer<O>,
    ) -> Result<()> {
        self.run(inputs, self.choice.capacity, workspace, output)
    }

    fn check(&self, workspace: &mut Workspace) -> Result<()> {
        self.check(workspace)
    }

    /// Of this rank's experts alone, as [`crate::cuda::Layer::run_expanded`]: no rank waits for another.
    fn expanded_workspace(&self, m_sum: usize) -> Result<Workspace> {
        self.layer.expanded_workspace(m_sum)
    }

    fn run_expanded<T: Float>(
        &self,
        rows: &ExpandedRows<'_, Device, T>,
        workspace: &mut Workspace,
        out: &mut DeviceBuffer<bf16>,
    ) -> Result<()> {
        self.layer.run_expanded(rows, workspace, out)
    }
}
