//! The whole layer: one call in device memory of its own, run, read back and timed.

use super::StageTime;
use super::clock::Clock;
use crate::cuda::{
    Device, DeviceBuffer, DeviceMatrix, DevicePtr, Layer, LayerCall, LayerChoice, RoutingPtrs, STATE_BYTES, Stream,
};
use crate::dtype::Dtype;
use crate::error::{Error, Result, checked_mul, require_len};
use crate::layer::Stage;
use half::bf16;

/// One call's inputs on the host.
#[derive(Debug, Clone, Copy)]
pub struct HostInputs<'a> {
    /// `M`
    pub tokens: usize,
    /// `[M, H]`: the bits of bf16 or f16, as the layer was prepared for.
    pub hidden_states: &'a [u16],
    /// `[M, topk]`
    pub topk_ids: &'a [i32],
    /// `[M, topk]`
    pub topk_weights: &'a [f32],
    /// `[G]`, for a layer of which not all experts are local.
    pub expert_map: Option<&'a [i32]>,
}

/// How long a call takes.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerTimes {
    /// How the call is cut.
    pub choice: LayerChoice,
    /// Seconds inside a graph.
    pub graph_seconds: f64,
    /// Seconds when launched from the host.
    pub eager_seconds: f64,
    /// Every stage that has launches of its own, by itself; none where one launch does it all. By itself a stage may find
    /// in the cache what inside the layer comes from memory.
    pub stages: Vec<StageTime>,
}

/// A call of a layer of i32 ids and a bf16 result: inputs, workspace and output in device memory of its own.
#[derive(Debug)]
pub struct LayerBench<'a> {
    device: &'a Device,
    layer: &'a Layer,
    call: LayerCall,
    workspace: DeviceBuffer,
    output: DeviceBuffer<bf16>,
    /// What the other addresses point into.
    _inputs: Vec<DeviceBuffer>,
}

impl<'a> LayerBench<'a> {
    /// Brings the inputs to the device.
    ///
    /// # Errors
    /// [`Error::Dtype`] for a layer of other ids or another result, [`Error::BufferTooSmall`] for inputs shorter than
    /// `tokens` says; as [`Layer::choice`]; [`Error::Cuda`].
    #[allow(unsafe_code)]
    pub fn new(device: &'a Device, layer: &'a Layer, inputs: &HostInputs<'_>) -> Result<Self> {
        let (tokens, topk, hidden) = (inputs.tokens, layer.config().topk, layer.shape().hidden());
        for (argument, actual, only, expected) in [
            ("topk_ids", layer.config().ids, Dtype::I32, "i32"),
            ("output", layer.config().output, Dtype::Bf16, "bf16"),
        ] {
            if actual != only {
                return Err(Error::Dtype { argument, actual, expected });
            }
        }
        let (values, slots) = (checked_mul("M * H", tokens, hidden)?, checked_mul("M * topk", tokens, topk)?);
        require_len("hidden_states", inputs.hidden_states.len(), values)?;
        require_len("topk_ids", inputs.topk_ids.len(), slots)?;
        require_len("topk_weights", inputs.topk_weights.len(), slots)?;
        let x = device.upload(&inputs.hidden_states[..values])?;
        let ids = device.upload(&inputs.topk_ids[..slots])?;
        let weights = device.upload(&inputs.topk_weights[..slots])?;
        let map = inputs.expert_map.map(|map| device.upload(map)).transpose()?;
        let state: DeviceBuffer = device.allocate(STATE_BYTES)?;
        let workspace: DeviceBuffer = device.allocate(layer.workspace_bytes(tokens)?)?;
        let output = device.allocate(values)?;
        let routing = RoutingPtrs {
            ids: DeviceMatrix::row_major(ids.ptr().cast(), topk),
            expert_map: map.as_ref().map(DeviceBuffer::ptr),
            global_experts: inputs.expert_map.map_or(layer.shape().local_experts(), <[i32]>::len),
        };
        let call = LayerCall {
            tokens,
            hidden_states: DeviceMatrix::row_major(x.ptr().cast(), hidden),
            routing,
            topk_weights: DeviceMatrix::row_major(weights.ptr(), topk),
            output: output.ptr().cast(),
            state: state.ptr(),
            workspace: workspace.ptr(),
        };
        // SAFETY: the state is this call's own; stream 0 always lives.
        unsafe {
            layer.initialise_state(Stream(0), state.ptr())?;
            device.synchronize(Stream(0))?;
        }
        let inputs = [x.into_bytes(), ids.into_bytes(), weights.into_bytes(), state].into_iter();
        let inputs = inputs.chain(map.map(DeviceBuffer::into_bytes)).collect();
        Ok(Self { device, layer, call, workspace, output, _inputs: inputs })
    }

    /// Runs the layer, and waits.
    ///
    /// # Errors
    /// As [`Layer::launch`] and [`Layer::check_launch`].
    #[allow(unsafe_code)]
    pub fn run(&self) -> Result<()> {
        // SAFETY: the buffers are this call's own, sized by the layer; stream 0 always lives.
        unsafe {
            self.layer.launch(Stream(0), &self.call)?;
            self.layer.check_launch(Stream(0), &self.call)
        }
    }

    /// `[M, H]`: the result of the last run.
    ///
    /// # Errors
    /// [`Error::Cuda`].
    pub fn output(&self) -> Result<Vec<bf16>> {
        let mut output = vec![bf16::ZERO; self.call.tokens * self.layer.shape().hidden()];
        self.output.download(&mut output)?;
        Ok(output)
    }

    /// After a run: the rows of GEMM 2 `[M_sum, H]` (padding rows hold nothing in particular), and the row of each slot
    /// `[M, topk]`, -1 for none; nothing where one launch did it all.
    ///
    /// # Errors
    /// As [`Layer::parts`]; [`Error::Cuda`].
    pub fn rows(&self) -> Result<Option<(Vec<bf16>, Vec<i32>)>> {
        let choice = self.layer.choice(self.call.tokens)?;
        if choice.one_launch.is_some() {
            return Ok(None);
        }
        let parts = self.layer.parts(self.call.tokens, self.workspace.ptr())?;
        let plan = choice.plan;
        let offset = |ptr: DevicePtr| (ptr.address() - self.workspace.ptr().address()) as usize;
        let mut rows = vec![bf16::ZERO; plan.m_sum() * self.layer.shape().hidden()];
        let mut row_of_slot = vec![0; plan.tokens() * plan.topk()];
        self.workspace.download_at(offset(parts.back.cast()), &mut rows)?;
        self.workspace.download_at(offset(parts.layout.inv_perm.cast()), &mut row_of_slot)?;
        Ok(Some((rows, row_of_slot)))
    }

    /// Queues the call.
    #[allow(unsafe_code)]
    pub(super) fn launch(&self, stream: Stream) -> Result<()> {
        // SAFETY: the buffers are this call's own, sized by the layer, and the caller waits before they are freed.
        unsafe { self.layer.launch(stream, &self.call) }
    }

    /// Times the call and each of its stages; the median of several.
    ///
    /// # Errors
    /// As [`Layer::launch`]; [`Error::Device`] with a driver that is too old to time.
    #[allow(unsafe_code)]
    pub fn time(&self) -> Result<LayerTimes> {
        let clock = Clock::new(self.device)?;
        // SAFETY: the buffers are this call's own, sized by the layer, and outlive the clock's waits.
        let launch = |stream| unsafe { self.layer.launch(stream, &self.call) };
        let (graph_seconds, eager_seconds) = clock.graph_and_eager(launch)?;
        let call = self.layer.call(&self.call)?;
        let choice = self.layer.choice(self.call.tokens)?;
        // In order: each finds what the one before has left, as in the layer.
        let apart = |&stage: &Stage| choice.one_launch.is_none() && self.layer.has_stage(&call, stage);
        let stages = Stage::ALL.into_iter().filter(apart);
        // SAFETY: as above.
        let time = |stage| clock.time(stage, |stream| unsafe { self.layer.launch_stage(stream, &call, stage) });
        let stages = stages.map(time).collect::<Result<_>>()?;
        Ok(LayerTimes { choice, graph_seconds, eager_seconds, stages })
    }
}
