//! The safe door: typed buffers that know their length and device, on the default stream.
//!
//! The default stream orders every call here and every copy of a [`DeviceBuffer`], so that nothing that is safe can
//! change an operand while a call uses it. A workspace is borrowed for a call, because its parts are read as indices.

use super::{Layer, LayerCall};
use crate::backend::{Ids, LayerInputs};
use crate::cuda::call::{DeviceMatrix, RoutingPtrs};
use crate::cuda::driver::{Device, DeviceBuffer, DevicePtr, Graph, Stream};
use crate::cuda::route;
use crate::dtype::Float;
use crate::error::{Result, checked_mul};

/// A workspace of the safe door, and the state of its calls. Layers of one device may share it, one call after the
/// other.
#[derive(Debug)]
pub struct Workspace {
    memory: DeviceBuffer,
    state: DeviceBuffer,
    /// Of calls whose rows came in their places: what their kernels note means other things.
    expanded_state: DeviceBuffer,
    /// Of the last call.
    tokens: usize,
}

impl Workspace {
    /// As many bytes of memory, and states that are ready.
    #[allow(unsafe_code)]
    pub(super) fn new(device: &Device, bytes: usize) -> Result<Self> {
        let memory = device.allocate(bytes)?;
        let [state, expanded_state] = [device.allocate(route::STATE_BYTES)?, device.allocate(route::STATE_BYTES)?];
        // SAFETY: the memory is new and as large as a state; stream 0 always lives.
        unsafe {
            route::initialise_state(device, Stream(0), state.ptr())?;
            route::initialise_state(device, Stream(0), expanded_state.ptr())?;
        }
        Ok(Self { memory, state, expanded_state, tokens: 0 })
    }

    /// Where the state of calls is whose rows came in their places.
    pub(super) fn expanded_state(&self) -> DevicePtr {
        self.expanded_state.ptr()
    }

    /// Bytes of device memory.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.memory.bytes()
    }

    /// Where it and the state of its calls are.
    pub(in crate::cuda) fn addresses(&self) -> (DevicePtr, DevicePtr) {
        (self.memory.ptr(), self.state.ptr())
    }

    /// Its memory, for inspection: [`Layer::parts`] gives addresses in it.
    #[must_use]
    pub fn memory(&self) -> &DeviceBuffer {
        &self.memory
    }
}

/// A call captured as a CUDA graph: one launch from the host. It borrows all that it works on.
#[derive(Debug)]
pub struct CapturedLayer<'a> {
    graph: Graph,
    layer: &'a Layer,
    workspace: &'a mut Workspace,
}

impl CapturedLayer<'_> {
    /// Queues the call; the inputs' values are those of now.
    ///
    /// # Errors
    /// [`crate::Error::Cuda`].
    #[allow(unsafe_code)]
    pub fn replay(&mut self) -> Result<()> {
        // SAFETY: the captured operands are borrowed for as long as this value lives, the workspace exclusively;
        // stream 0 always lives, and orders the replay among everything else that is safe.
        unsafe { self.graph.replay(Stream(0)) }
    }

    /// As [`Layer::check`].
    ///
    /// # Errors
    /// As [`Layer::check`].
    pub fn check(&mut self) -> Result<()> {
        self.layer.check(self.workspace)
    }
}

impl Layer {
    /// A workspace for calls of up to that many tokens, made ready.
    ///
    /// # Errors
    /// As [`Layer::choice`]; [`crate::Error::Cuda`].
    pub fn workspace(&self, tokens: usize) -> Result<Workspace> {
        Workspace::new(self.device(), self.workspace_bytes(tokens)?)
    }

    /// Queues the call on the default stream: `output [M, H]`, every element.
    ///
    /// # Errors
    /// [`crate::Error::BufferTooSmall`], [`crate::Error::Dtype`], [`crate::Error::Value`] and [`crate::Error::Device`]
    /// (a buffer of another device) for what does not fit the layer, before anything is queued;
    /// [`crate::Error::Cuda`].
    #[allow(unsafe_code)]
    pub fn run<T: Float, O: Float>(
        &self,
        inputs: &LayerInputs<'_, Device, T>,
        workspace: &mut Workspace,
        output: &DeviceBuffer<O>,
    ) -> Result<()> {
        let call = self.safe_call(inputs, workspace, output)?;
        // SAFETY: every buffer is on this device and as large as the call reads or writes, as was checked. The default
        // stream orders the call before the buffers are freed or copied to, and the workspace is borrowed exclusively.
        unsafe { self.launch(Stream(0), &call)? };
        workspace.tokens = inputs.tokens;
        Ok(())
    }

    /// Captures the call as a graph, to be replayed with one launch; the buffers' values may change between replays.
    ///
    /// # Errors
    /// As [`Layer::run`].
    #[allow(unsafe_code)]
    pub fn capture<'a, T: Float, O: Float>(
        &'a self,
        inputs: &LayerInputs<'a, Device, T>,
        workspace: &'a mut Workspace,
        output: &'a DeviceBuffer<O>,
    ) -> Result<CapturedLayer<'a>> {
        let call = self.safe_call(inputs, workspace, output)?;
        // SAFETY: as in `run`; nothing runs before a replay, for which the operands stay borrowed.
        let graph = Graph::capture(self.device(), |stream| unsafe { self.launch(stream, &call) })?;
        workspace.tokens = inputs.tokens;
        Ok(CapturedLayer { graph, layer: self, workspace })
    }

    /// Waits for the default stream, and reports what was wrong with the ids (or `psum`) of calls in this workspace
    /// since the last time.
    ///
    /// # Errors
    /// [`crate::Error::MapEntry`] or [`crate::Error::ExpertId`] for the first id or map entry past its limit (such
    /// slots were treated as empty); as [`crate::cuda::GroupedGemm::check`], after [`Layer::run_expanded`];
    /// [`crate::Error::Cuda`].
    #[allow(unsafe_code)]
    pub fn check(&self, workspace: &mut Workspace) -> Result<()> {
        let plan = self.choice(workspace.tokens)?.plan;
        // SAFETY: the state was made ready, is borrowed exclusively, and stream 0 always lives.
        unsafe { route::check(self.device(), Stream(0), &plan, self.config().global_experts, workspace.state.ptr())? };
        self.check_expanded(workspace)
    }

    /// Checks lengths and devices, and turns buffers into addresses.
    fn safe_call<T: Float, O: Float>(
        &self,
        inputs: &LayerInputs<'_, Device, T>,
        workspace: &Workspace,
        output: &DeviceBuffer<O>,
    ) -> Result<LayerCall> {
        let LayerInputs { tokens, hidden_states, topk_ids, topk_weights, expert_map } = *inputs;
        let (device, config, hidden) = (self.device(), self.config(), self.shape().hidden());
        inputs.check::<O>(config, self.shape().local_experts())?;
        let needed = self.workspace_bytes(tokens)?;
        let (values, slots) = (checked_mul("M * H", tokens, hidden)?, checked_mul("M * topk", tokens, config.topk)?);
        hidden_states.require("hidden_states", device, values)?;
        let ids = match topk_ids {
            Ids::I32(ids) => ids.require("topk_ids", device, slots).map(|()| ids.ptr().cast())?,
            Ids::I64(ids) => ids.require("topk_ids", device, slots).map(|()| ids.ptr().cast())?,
        };
        topk_weights.require("topk_weights", device, slots)?;
        if let Some(map) = expert_map {
            map.require("expert_map", device, config.global_experts)?;
        }
        workspace.memory.require("workspace", device, needed)?;
        output.require("output", device, values)?;
        Ok(LayerCall {
            tokens,
            hidden_states: DeviceMatrix::row_major(hidden_states.ptr().cast(), hidden),
            routing: RoutingPtrs {
                ids: DeviceMatrix::row_major(ids, config.topk),
                expert_map: expert_map.map(DeviceBuffer::ptr),
                global_experts: config.global_experts,
            },
            topk_weights: DeviceMatrix::row_major(topk_weights.ptr(), config.topk),
            output: output.ptr().cast(),
            state: workspace.state.ptr(),
            workspace: workspace.memory.ptr(),
        })
    }
}
