//! Routing, plan and layout on the device: one launch, the CPU backend's bits.

use super::arguments::{RouteArgs, RouteExtra, require_int};
use super::call::{LayoutPtrs, RoutingPtrs, worklist_capacity};
use super::driver::{Device, DevicePtr, Kernel, Launch, Resources, Source, Stream};
use super::few_tokens::COUNTER_BYTES;
use crate::dtype::Dtype;
use crate::error::{Error, Result, checked_mul};
use crate::plan::Plan;
use std::ffi::c_void;
use std::sync::Arc;

/// Local experts that the kernels' shared memory has room for.
pub(super) const MAX_EXPERTS: usize = 1024;
/// Slots per token: a lane each.
pub(super) const MAX_TOPK: usize = 32;

const THREADS: u32 = 512;
const WARPS: u32 = THREADS / 32;
/// Bytes of the state that survives from call to call: what kernels found wrong, a barrier, the queue of the rows'
/// kernel, and the counters of the kernel for few tokens, each in a part of its own. Zeroed once; every launch leaves
/// barrier and queue as it found them, and the counters ready for the next.
pub const STATE_BYTES: usize = COUNTERS_OFFSET + COUNTER_BYTES;
const STATUS_BYTES: usize = 32;
const BARRIER_OFFSET: usize = STATUS_BYTES;
pub(super) const QUEUE_OFFSET: usize = 48;
pub(super) const COUNTERS_OFFSET: usize = 64;

/// What the kernel is specialised for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RouteConfig {
    /// Slots per token, 1 to 32.
    pub topk: usize,
    /// Type of the ids: [`Dtype::I32`] or [`Dtype::I64`].
    pub ids: Dtype,
    /// Rows of a worklist entry: the GEMM's row tile, which need not divide the plan's alignment.
    pub row_tile: usize,
}

impl RouteConfig {
    pub(super) fn definitions(&self) -> Result<Vec<(&'static str, i64)>> {
        if self.topk == 0 || self.topk > MAX_TOPK {
            return Err(Error::value("topk", self.topk, format!("1 to {MAX_TOPK} on a GPU")));
        }
        let wide = match self.ids {
            Dtype::I32 => 0,
            Dtype::I64 => 1,
            actual => return Err(Error::Dtype { argument: "topk_ids", actual, expected: "i32 or i64" }),
        };
        Ok(vec![("TOPK", self.topk as i64), ("IDS_I64", wide), ("HOST_MAX_EXPERTS", MAX_EXPERTS as i64)])
    }

    /// The kernel's source for this configuration.
    ///
    /// # Errors
    /// [`Error::Value`] for a `topk` outside 1 to 32, [`Error::Dtype`] unless ids are i32 or i64.
    pub fn source(&self) -> Result<Source> {
        let mut definitions = self.definitions()?;
        definitions.push(("HOST_THREADS", i64::from(THREADS)));
        Ok(Source::new("route_plan.cu", include_str!("kernels/route/route_plan.cu"), definitions))
    }

    /// Checks a call and puts it into the kernels' terms.
    pub(super) fn arguments(&self, call: &RouteCall) -> Result<RouteArgs> {
        let RouteCall { plan, routing, layout, state, workspace } = call;
        if plan.topk() != self.topk {
            return Err(Error::value("topk", plan.topk(), format!("{}, as prepared", self.topk)));
        }
        let (experts, alignment) = (plan.local_experts(), plan.alignment());
        require_experts(experts)?;
        let slots = require_int("M * topk", checked_mul("M * topk", plan.tokens(), self.topk)?)? as usize;
        // However the slots are spread, no segment's end passes this.
        let most = slots.checked_add(checked_mul("E * (A - 1)", experts, alignment - 1)?);
        require_int("M * topk + E * (A - 1)", most.unwrap_or(usize::MAX))?;
        if slots > 0 {
            routing.ids.ptr.require_aligned("topk_ids", if self.ids == Dtype::I64 { 8 } else { 4 })?;
        }
        let limit = routing.limit(experts);
        state.require_aligned("state", 16)?;
        workspace.require_aligned("workspace", 16)?;
        for (name, list) in [
            ("expert_num_tokens", layout.expert_num_tokens),
            ("expert_start", layout.expert_start),
            ("psum", layout.psum),
            ("m_indices", layout.m_indices),
            ("row_tokens", layout.row_tokens),
            ("inv_perm", layout.inv_perm),
            ("header", layout.header),
        ] {
            list.require_aligned(name, 4)?;
        }
        layout.worklist.require_aligned("worklist", 8)?;
        Ok(RouteArgs {
            ids: routing.ids.ptr.address(),
            expert_map: DevicePtr::or_null(routing.expert_map),
            ids_row_stride: routing.ids.row_stride as i64,
            ids_col_stride: routing.ids.col_stride as i64,
            layout: *layout,
            status: state.address(),
            barrier: state.byte_add(BARRIER_OFFSET).address(),
            chunk_counts: workspace.address(),
            second_header: 0,
            second_worklist: 0,
            tokens: plan.tokens() as i32,
            experts: experts as i32,
            ids_limit: require_int("global_experts", limit)?,
            alignment: alignment as i32,
            m_sum: require_int("m_sum", plan.m_sum())?,
            row_tile: self.row_tile as i32,
            worklist_capacity: worklist_capacity(plan, self.row_tile)? as i32,
            second_row_tile: 0,
            second_capacity: 0,
            counted: 0,
            counters: 0,
        })
    }
}

/// What one call works on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RouteCall {
    /// `M`, `topk`, `E`, the alignment and `M_sum`.
    pub plan: Plan,
    /// What is read.
    pub routing: RoutingPtrs,
    /// What is written: every list.
    pub layout: LayoutPtrs,
    /// [`STATE_BYTES`], 16-byte aligned, initialised once. Calls that share it follow each other.
    pub state: DevicePtr,
    /// [`Route::workspace_bytes`], 16-byte aligned, whatever is in it.
    pub workspace: DevicePtr,
}

/// Fails unless the kernels' shared memory has room for that many local experts.
pub(super) fn require_experts(experts: usize) -> Result<()> {
    if experts == 0 || experts > MAX_EXPERTS {
        return Err(Error::value("local_experts", experts, format!("1 to {MAX_EXPERTS} on a GPU")));
    }
    Ok(())
}

/// Routing, plan and layout, prepared.
#[derive(Debug)]
pub struct Route {
    device: Device,
    config: RouteConfig,
    kernel: Arc<Kernel>,
}

impl Route {
    /// Compiles (or loads) the kernel: the warm-up, after which nothing compiles.
    ///
    /// # Errors
    /// As [`RouteConfig::source`]; [`Error::Kernel`] if it does not compile, [`Error::Cuda`].
    pub fn prepare(device: &Device, config: RouteConfig) -> Result<Self> {
        let kernel = device.kernel(&config.source()?, c"route_plan")?;
        kernel.allow_shared_bytes(shared_bytes(MAX_EXPERTS))?;
        Ok(Self { device: device.clone(), config, kernel })
    }

    /// What the kernel takes of a multiprocessor.
    #[must_use]
    pub fn resources(&self) -> Resources {
        self.kernel.resources()
    }

    /// Bytes of workspace that a call of this plan needs, a multiple of 16.
    ///
    /// # Errors
    /// [`Error::Value`] for more experts than the kernels take.
    pub fn workspace_bytes(&self, plan: &Plan) -> Result<usize> {
        workspace_bytes(plan, self.device.info().multiprocessors as usize)
    }

    /// Readies the state; once, before its first call.
    ///
    /// # Safety
    /// `state` is device memory of [`STATE_BYTES`] that nobody else uses when the stream comes to it.
    ///
    /// # Errors
    /// [`Error::Cuda`].
    #[allow(unsafe_code)]
    pub unsafe fn initialise_state(&self, stream: Stream, state: DevicePtr) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { initialise_state(&self.device, stream, state) }
    }

    /// Queues the launch: reads the routing, writes every list of the layout.
    ///
    /// # Safety
    /// Every address is device memory as large as its description says, and nobody else writes it (or, for what is
    /// written here, uses it) when the stream comes to the launch. Calls that share a workspace follow each other.
    ///
    /// # Errors
    /// [`Error::Value`], [`Error::Alignment`] and [`Error::Overflow`] for what does not fit the configuration or the
    /// kernels; [`Error::Cuda`].
    #[allow(unsafe_code)]
    pub unsafe fn launch(&self, stream: Stream, call: &RouteCall) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.launch_with(stream, call, None) }
    }

    /// The same, with what a layer wants besides.
    ///
    /// # Safety
    /// As [`Route::launch`].
    #[allow(unsafe_code)]
    pub(super) unsafe fn launch_with(
        &self,
        stream: Stream,
        call: &RouteCall,
        extra: Option<&RouteExtra>,
    ) -> Result<()> {
        let arguments = self.config.arguments(call)?.with(&call.plan, extra)?;
        // SAFETY: the caller's promise.
        unsafe { self.queue(stream, &arguments) }
    }

    /// # Safety
    /// As [`Route::launch`].
    #[allow(unsafe_code)]
    pub(super) unsafe fn queue(&self, stream: Stream, arguments: &RouteArgs) -> Result<()> {
        const MOST_SLOTS_OF_A_BLOCK: u32 = 65_535;
        let slots = arguments.tokens as u32 * self.config.topk as u32;
        let blocks = slots.div_ceil(THREADS).clamp(1, self.device.info().multiprocessors);
        if slots.div_ceil(blocks) > MOST_SLOTS_OF_A_BLOCK {
            let most = MOST_SLOTS_OF_A_BLOCK * blocks;
            return Err(Error::value("M * topk", slots as usize, format!("at most {most} on this device")));
        }
        let shape = Launch {
            blocks,
            threads: THREADS,
            shared_bytes: shared_bytes(arguments.experts as usize),
            cooperative: blocks > 1,
            overlap: blocks == 1,
        };
        let pointers = [std::ptr::from_ref(arguments).cast::<c_void>()];
        // SAFETY: the kernel takes one `RouteArgs`; the rest is the caller's promise.
        unsafe { self.device.launch(&self.kernel, shape, stream, &pointers) }
    }

    /// Waits for the stream and says what was wrong with the ids since the last time; the state then knows nothing.
    ///
    /// # Safety
    /// `stream` is a live stream of this device (or 0), and the state was initialised.
    ///
    /// # Errors
    /// [`Error::MapEntry`] or [`Error::ExpertId`] for the first id or map entry past its limit (such slots were treated
    /// as empty), [`Error::MSum`] if a routing needed more rows than its plan (rows past the end were left out);
    /// [`Error::Cuda`].
    #[allow(unsafe_code)]
    pub unsafe fn check(&self, stream: Stream, call: &RouteCall) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { check(&self.device, stream, &call.plan, call.routing.limit(call.plan.local_experts()), call.state) }
    }
}

/// # Safety
/// As [`Route::initialise_state`].
#[allow(unsafe_code)]
pub(super) unsafe fn initialise_state(device: &Device, stream: Stream, state: DevicePtr) -> Result<()> {
    // SAFETY: the caller's promise.
    unsafe { device.zero(stream, state, STATE_BYTES) }
}

/// [`Route::workspace_bytes`] on a device of that many multiprocessors.
pub(super) fn workspace_bytes(plan: &Plan, multiprocessors: usize) -> Result<usize> {
    require_experts(plan.local_experts())?;
    Ok(multiprocessors * plan.local_experts().next_multiple_of(8) * 2)
}

/// [`Route::check`] of ids below `limit`.
///
/// # Safety
/// As [`Route::check`].
#[allow(unsafe_code)]
pub(super) unsafe fn check(device: &Device, stream: Stream, plan: &Plan, limit: usize, state: DevicePtr) -> Result<()> {
    let topk = plan.topk();
    let mut status = [0u64; STATUS_BYTES / 8];
    // SAFETY: the caller's promise; the status is the state's first bytes.
    unsafe {
        device.read(stream, state, bytemuck::must_cast_slice_mut(&mut status))?;
        if status == [0; STATUS_BYTES / 8] {
            return Ok(());
        }
        device.zero(stream, state, STATUS_BYTES)?;
    }
    let place = |word: u64| !(word >> 32) as u32 as usize;
    let [id, entry, rows, _] = status;
    if entry != 0 {
        let (index, value) = (place(entry), entry as u32 as i32);
        return Err(Error::MapEntry { index, value, local_experts: plan.local_experts() });
    }
    if id != 0 {
        let slot = place(id);
        return Err(Error::ExpertId { token: slot / topk, slot: slot % topk, id: i64::from(id as u32), limit });
    }
    Err(Error::MSum { m_sum: plan.m_sum(), needed: rows as u32 as usize, alignment: plan.alignment() })
}

/// Dynamic shared memory: a 16-bit counter for each warp and expert.
fn shared_bytes(experts: usize) -> u32 {
    WARPS * 2 * experts as u32
}
