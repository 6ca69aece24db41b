//! The steps that any supported device runs, each by itself.

use super::StageTime;
use super::clock::Clock;
use crate::activation::Activation;
use crate::cuda::driver::check_call;
use crate::cuda::{
    Activate, ActivateCall, ActivateConfig, Device, DeviceBuffer, DeviceMatrix, DevicePtr, LayoutPtrs, QuantizePermute,
    QuantizePermuteCall, QuantizePermuteConfig, Route, RouteCall, RouteConfig, RoutingPtrs, RowsPtrs, STATE_BYTES,
    Stream, Unpermute, UnpermuteCall, UnpermuteConfig,
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

/// Times routing, quantize + permute (with routing), activation + quantize and unpermute. In place of a GEMM's
/// results, the activation and the unpermute read the hidden states over and over.
///
/// # Errors
/// [`Error::Value`] for a plan of no tokens, [`Error::BufferTooSmall`] for inputs shorter than it says, and whatever
/// preparing and launching the steps may refuse.
#[allow(unsafe_code)]
pub fn stage_times(device: &Device, inputs: &Inputs<'_>) -> Result<Vec<StageTime>> {
    let call = Call::new(device, inputs)?;
    let clock = Clock::new(device)?;
    // SAFETY: `call` owns every buffer, each as large as its step asks, and outlives the clock's waits.
    unsafe {
        let permute = clock.time(Stage::Permute, |stream| call.permute(stream))?;
        call.quantize_permute.check(Stream(0), &call.permute_call)?;
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
    route: Route,
    quantize_permute: QuantizePermute,
    activate: Activate,
    unpermute: Unpermute,
    route_call: RouteCall,
    permute_call: QuantizePermuteCall,
    activate_call: ActivateCall,
    unpermute_call: UnpermuteCall,
    /// What the addresses above point into.
    _memory: Vec<DeviceBuffer>,
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
            let ptr = buffer.ptr();
            memory.push(buffer);
            Ok::<DevicePtr, Error>(ptr)
        };
        let layout = LayoutPtrs::carve(allocate(LayoutPtrs::space_bytes(&plan, row_tile)?)?, &plan, row_tile)?;
        let widest = hidden.max(2 * intermediate);
        let front = allocate(m_sum * hidden.max(intermediate))?;
        let back = allocate(2 * m_sum * widest)?;
        let scales = allocate(4 * format.words(m_sum, hidden)?.max(format.words(m_sum, intermediate)?))?;
        let out = allocate(2 * tokens * hidden)?;
        let ids = device.upload(&topk_ids[..tokens * topk])?;
        let x = device.upload(&hidden_states[..tokens * hidden])?;
        let weights = device.upload(&vec![1.0 / topk as f32; tokens * topk])?;
        repeat(device, x.ptr().cast(), x.bytes(), back, 2 * m_sum * widest)?;
        let state: DeviceBuffer = device.allocate(STATE_BYTES)?;
        let workspace: DeviceBuffer = device.allocate(quantize_permute.workspace_bytes(&plan)?)?;
        // SAFETY: the state is this call's own; stream 0 always lives.
        unsafe {
            quantize_permute.initialise_state(Stream(0), state.ptr())?;
            device.synchronize(Stream(0))?;
        }

        let routing = RoutingPtrs {
            ids: DeviceMatrix::row_major(ids.ptr().cast(), topk),
            expert_map: None,
            global_experts: shape.local_experts(),
        };
        let rows = RowsPtrs {
            x: DeviceMatrix::row_major(x.ptr().cast(), hidden),
            x_scales: None,
            weights: None,
            out: front,
            scales: Some(scales),
        };
        let (state_ptr, workspace_ptr) = (state.ptr(), workspace.ptr());
        let call = Self {
            route: Route::prepare(device, route)?,
            quantize_permute,
            activate: Activate::prepare(device, activate)?,
            unpermute: Unpermute::prepare(device, unpermute)?,
            route_call: RouteCall { plan, routing, layout, state: state_ptr, workspace: workspace_ptr },
            permute_call: QuantizePermuteCall {
                plan,
                routing,
                rows,
                layout,
                state: state_ptr,
                workspace: workspace_ptr,
            },
            activate_call: ActivateCall {
                gate_up: back.cast(),
                psum: layout.psum,
                out: front,
                scales: Some(scales),
                local_experts: shape.local_experts(),
                alignment: plan.alignment(),
                m_sum,
            },
            unpermute_call: UnpermuteCall {
                rows: back,
                inv_perm: layout.inv_perm,
                weights: Some(DeviceMatrix::row_major(weights.ptr(), topk)),
                out,
                tokens,
                m_sum,
            },
            _memory: {
                memory.extend([ids.into_bytes(), x.into_bytes(), weights.into_bytes(), state, workspace]);
                memory
            },
        };
        Ok(call)
    }

    /// # Safety
    /// The call outlives the launch.
    #[allow(unsafe_code)]
    unsafe fn route(&self, stream: Stream) -> Result<()> {
        // SAFETY: the buffers are this call's own, sized by the plan.
        unsafe { self.route.launch(stream, &self.route_call) }
    }

    /// # Safety
    /// The call outlives the launch.
    #[allow(unsafe_code)]
    unsafe fn permute(&self, stream: Stream) -> Result<()> {
        // SAFETY: the buffers are this call's own, sized by the plan.
        unsafe { self.quantize_permute.launch(stream, &self.permute_call) }
    }

    /// # Safety
    /// The call outlives the launch, and its layout was written before.
    #[allow(unsafe_code)]
    unsafe fn activate(&self, stream: Stream) -> Result<()> {
        // SAFETY: the buffers are this call's own, sized by the plan.
        unsafe { self.activate.launch(stream, &self.activate_call) }
    }

    /// # Safety
    /// The call outlives the launch, and its layout was written before.
    #[allow(unsafe_code)]
    unsafe fn unpermute(&self, stream: Stream) -> Result<()> {
        // SAFETY: the buffers are this call's own, sized by the plan.
        unsafe { self.unpermute.launch(stream, &self.unpermute_call) }
    }
}

/// Fills `bytes` at `to` with the `period` bytes at `from`, over and over.
#[allow(unsafe_code)]
pub(super) fn repeat(device: &Device, from: DevicePtr, period: usize, to: DevicePtr, bytes: usize) -> Result<()> {
    let _current = device.current()?;
    let mut done = 0;
    while done < bytes {
        // What is there already doubles with every copy.
        let (source, len) = if done == 0 { (from, period) } else { (to, done) };
        let len = len.min(bytes - done);
        // SAFETY: both ranges lie within buffers that the caller owns, and they do not overlap.
        check_call("cuMemcpyDtoD", unsafe {
            sys::cuMemcpyDtoD_v2(to.byte_add(done).address(), source.address(), len)
        })?;
        done += len;
    }
    Ok(())
}
