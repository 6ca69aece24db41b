//! The steps that any supported device runs, each by itself.

use super::StageTime;
use super::clock::Clock;
use super::uploaded;
use crate::activation::Activation;
use crate::cuda::device::check_call;
use crate::cuda::{
    Activate, ActivateBuffers, ActivateConfig, Buffer, Device, LayoutBuffers, QuantizePermute, QuantizePermuteConfig,
    Route, RouteConfig, RoutingBuffers, RowsBuffers, Stream, Tensor2, Unpermute, UnpermuteBuffers, UnpermuteConfig,
};
use crate::dtype::Dtype;
use crate::error::{Error, Result, checked_mul, require_len};
use crate::layer::{LayerShape, Stage};
use crate::layout::Padding;
use crate::plan::Plan;
use crate::quantize::ScaleFormat;
use cudarc::driver::sys;
use half::bf16;

/// One layer call's inputs on the host.
#[derive(Debug, Clone, Copy)]
pub struct Inputs<'a> {
    /// The layer.
    pub shape: LayerShape,
    /// `M`, `topk`, `E`, the alignment and `M_sum`.
    pub plan: Plan,
    /// `[M, topk]`, local ids.
    pub topk_ids: &'a [i32],
    /// `[M, H]`
    pub hidden_states: &'a [bf16],
}

/// Times routing, quantize + permute (with routing), activation + quantize and unpermute. In place of a GEMM's results, the
/// activation and the unpermute read the hidden states over and over.
///
/// # Errors
/// [`Error::Value`] for a plan of no tokens, [`Error::BufferTooSmall`] for inputs shorter than it says, and whatever preparing and launching the steps may
/// refuse.
#[allow(unsafe_code)]
pub fn stage_times(device: &Device, inputs: &Inputs<'_>) -> Result<Vec<StageTime>> {
    let call = Call::new(device, inputs)?;
    let clock = Clock::new(device)?;
    // SAFETY: `call` owns every buffer, each as large as its step asks, and outlives the clock's waits.
    unsafe {
        let permute = clock.time(Stage::Permute, |stream| call.permute(stream))?;
        call.quantize_permute.check(Stream(0), &call.plan, &call.routing, call.workspace.address())?;
        Ok(vec![
            clock.time(Stage::Routing, |stream| call.route(stream))?,
            permute,
            clock.time(Stage::Activation, |stream| call.activate(stream))?,
            clock.time(Stage::Unpermute, |stream| call.unpermute(stream))?,
        ])
    }
}

/// Prepared steps and the device memory of one call.
struct Call {
    plan: Plan,
    route: Route,
    quantize_permute: QuantizePermute,
    activate: Activate,
    unpermute: Unpermute,
    routing: RoutingBuffers,
    rows: RowsBuffers,
    layout: LayoutBuffers,
    activate_buffers: ActivateBuffers,
    unpermute_buffers: UnpermuteBuffers,
    workspace: Buffer,
    /// What the addresses above point into.
    _memory: Vec<Buffer>,
}

impl Call {
    #[allow(unsafe_code)]
    fn new(device: &Device, inputs: &Inputs<'_>) -> Result<Self> {
        let Inputs { shape, plan, topk_ids, hidden_states } = *inputs;
        let (hidden, intermediate) = (shape.hidden(), shape.intermediate());
        let (tokens, topk, m_sum) = (plan.tokens(), plan.topk(), plan.m_sum());
        if tokens == 0 {
            return Err(Error::value("tokens", 0, "at least 1, to time steps"));
        }
        require_len("topk_ids", topk_ids.len(), tokens * topk)?;
        require_len("hidden_states", hidden_states.len(), checked_mul("M * H", tokens, hidden)?)?;
        if plan.local_experts() != shape.local_experts() {
            return Err(Error::value("local_experts", plan.local_experts(), shape.local_experts().to_string()));
        }
        let route = RouteConfig { topk, ids: Dtype::I32, row_tile: plan.alignment() };
        let (format, row_tile) = (ScaleFormat::HOPPER, plan.alignment());
        let quantize_permute = QuantizePermuteConfig {
            route,
            hidden,
            input: Dtype::Bf16,
            format,
            padding: Padding::Untouched,
            weighted: false,
            aligned: true,
        };
        let activate = ActivateConfig { intermediate, activation: Activation::default(), format: Some(format) };
        let unpermute =
            UnpermuteConfig { hidden, topk, input: Dtype::Bf16, output: Dtype::Bf16, weighted: true, aligned: true };
        let quantize_permute = QuantizePermute::prepare(device, quantize_permute)?;

        let mut memory = Vec::new();
        let mut allocate = |bytes: usize| {
            let buffer = device.allocate(bytes)?;
            buffer.fill(0)?;
            let address = buffer.address();
            memory.push(buffer);
            Ok::<u64, Error>(address)
        };
        let layout = LayoutBuffers::carve(allocate(LayoutBuffers::space_bytes(&plan, row_tile)?)?, &plan, row_tile)?;
        let widest = hidden.max(2 * intermediate);
        let front = allocate(m_sum * hidden.max(intermediate))?;
        let back = allocate(2 * m_sum * widest)?;
        let scales = allocate(4 * format.words(m_sum, hidden)?.max(format.words(m_sum, intermediate)?))?;
        let out = allocate(2 * tokens * hidden)?;
        let ids = uploaded(device, &topk_ids[..tokens * topk])?;
        let x = uploaded(device, bytemuck::must_cast_slice::<bf16, u16>(&hidden_states[..tokens * hidden]))?;
        let weights = uploaded(device, &vec![1.0 / topk as f32; tokens * topk])?;
        repeat(device, x.address(), x.bytes(), back, 2 * m_sum * widest)?;
        let workspace = device.allocate(quantize_permute.workspace_bytes(&plan)?)?;
        // SAFETY: the workspace is this call's own and as large as the step says; stream 0 always lives.
        unsafe {
            quantize_permute.initialise_workspace(Stream(0), workspace.address())?;
            device.synchronize(Stream(0))?;
        }

        let matrix = |address, row_stride| Tensor2 { address, row_stride, col_stride: 1 };
        let routing =
            RoutingBuffers { ids: matrix(ids.address(), topk), expert_map: 0, global_experts: shape.local_experts() };
        let rows = RowsBuffers { x: matrix(x.address(), hidden), out: front, scales, ..RowsBuffers::default() };
        let activate_buffers = ActivateBuffers {
            gate_up: back,
            psum: layout.psum,
            out: front,
            scales,
            local_experts: shape.local_experts(),
            alignment: plan.alignment(),
            m_sum,
        };
        let weights_matrix = matrix(weights.address(), topk);
        let unpermute_buffers =
            UnpermuteBuffers { rows: back, inv_perm: layout.inv_perm, weights: weights_matrix, out, tokens, m_sum };
        memory.extend([ids, x, weights]);
        Ok(Self {
            plan,
            route: Route::prepare(device, route)?,
            quantize_permute,
            activate: Activate::prepare(device, activate)?,
            unpermute: Unpermute::prepare(device, unpermute)?,
            routing,
            rows,
            layout,
            activate_buffers,
            unpermute_buffers,
            workspace,
            _memory: memory,
        })
    }

    /// # Safety
    /// The call outlives the launch.
    #[allow(unsafe_code)]
    unsafe fn route(&self, stream: Stream) -> Result<()> {
        // SAFETY: the buffers are this call's own, sized by the plan.
        unsafe { self.route.launch(stream, &self.plan, &self.routing, &self.layout, self.workspace.address()) }
    }

    /// # Safety
    /// The call outlives the launch.
    #[allow(unsafe_code)]
    unsafe fn permute(&self, stream: Stream) -> Result<()> {
        let workspace = self.workspace.address();
        // SAFETY: the buffers are this call's own, sized by the plan.
        unsafe { self.quantize_permute.launch(stream, &self.plan, &self.routing, &self.rows, &self.layout, workspace) }
    }

    /// # Safety
    /// The call outlives the launch, and its layout was written before.
    #[allow(unsafe_code)]
    unsafe fn activate(&self, stream: Stream) -> Result<()> {
        // SAFETY: the buffers are this call's own, sized by the plan.
        unsafe { self.activate.launch(stream, &self.activate_buffers) }
    }

    /// # Safety
    /// The call outlives the launch, and its layout was written before.
    #[allow(unsafe_code)]
    unsafe fn unpermute(&self, stream: Stream) -> Result<()> {
        // SAFETY: the buffers are this call's own, sized by the plan.
        unsafe { self.unpermute.launch(stream, &self.unpermute_buffers) }
    }
}

/// Fills `bytes` at `to` with the `period` bytes at `from`, over and over.
#[allow(unsafe_code)]
pub(super) fn repeat(device: &Device, from: u64, period: usize, to: u64, bytes: usize) -> Result<()> {
    let _current = device.current()?;
    let mut done = 0;
    while done < bytes {
        // What is there already doubles with every copy.
        let (source, len) = if done == 0 { (from, period) } else { (to, done) };
        let len = len.min(bytes - done);
        // SAFETY: both ranges lie within buffers that the caller owns, and they do not overlap.
        check_call("cuMemcpyDtoD", unsafe { sys::cuMemcpyDtoD_v2(to + done as u64, source, len) })?;
        done += len;
    }
    Ok(())
}
