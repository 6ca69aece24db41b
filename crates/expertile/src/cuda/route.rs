//! Routing, plan and layout on the device: one launch, the CPU backend's bits.

use super::arguments::{
    LayoutBuffers, RouteArgs, RoutingBuffers, SecondWorklist, require_aligned, require_int, worklist_capacity,
};
use super::device::{Device, Launch, Stream};
use super::kernel::{Kernel, Resources, Source};
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
/// Status, barrier and the queue of the rows' kernel, each in a part of its own; the chunks' counts follow.
const STATUS_BYTES: usize = 32;
pub(super) const QUEUE_OFFSET: u64 = 48;
const STATE_BYTES: usize = 64;

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
    pub(super) fn arguments(
        &self,
        plan: &Plan,
        routing: &RoutingBuffers,
        layout: &LayoutBuffers,
        workspace: u64,
    ) -> Result<RouteArgs> {
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
            require_aligned("topk_ids", routing.ids.address, if self.ids == Dtype::I64 { 8 } else { 4 })?;
        }
        let limit = if routing.expert_map == 0 { experts } else { routing.global_experts };
        require_aligned("workspace", workspace, 16)?;
        for (name, address) in [
            ("expert_num_tokens", layout.expert_num_tokens),
            ("expert_start", layout.expert_start),
            ("psum", layout.psum),
            ("m_indices", layout.m_indices),
            ("row_tokens", layout.row_tokens),
            ("inv_perm", layout.inv_perm),
            ("header", layout.header),
        ] {
            require_aligned(name, address, 4)?;
        }
        require_aligned("worklist", layout.worklist, 8)?;
        Ok(RouteArgs {
            ids: routing.ids.address,
            expert_map: routing.expert_map,
            ids_row_stride: routing.ids.row_stride as i64,
            ids_col_stride: routing.ids.col_stride as i64,
            layout: *layout,
            status: workspace,
            barrier: workspace + STATUS_BYTES as u64,
            chunk_counts: workspace + STATE_BYTES as u64,
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
            reserved: 0,
        })
    }
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

    /// Bytes of workspace that a call of this plan needs, a multiple of 16; the first 64 must survive from call to call.
    ///
    /// # Errors
    /// [`Error::Value`] for more experts than the kernels take.
    pub fn workspace_bytes(&self, plan: &Plan) -> Result<usize> {
        workspace_bytes(plan, self.device.info().multiprocessors as usize)
    }

    /// Readies a workspace; once, before its first call.
    ///
    /// # Safety
    /// `workspace` is device memory of [`Route::workspace_bytes`] that nobody else uses when the stream comes to it.
    ///
    /// # Errors
    /// [`Error::Cuda`].
    #[allow(unsafe_code)]
    pub unsafe fn initialise_workspace(&self, stream: Stream, workspace: u64) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { initialise_workspace(&self.device, stream, workspace) }
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
    pub unsafe fn launch(
        &self,
        stream: Stream,
        plan: &Plan,
        routing: &RoutingBuffers,
        layout: &LayoutBuffers,
        workspace: u64,
    ) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.launch_with(stream, plan, routing, layout, None, workspace) }
    }

    /// The same, with a second worklist.
    ///
    /// # Safety
    /// As [`Route::launch`].
    #[allow(unsafe_code)]
    pub(super) unsafe fn launch_with(
        &self,
        stream: Stream,
        plan: &Plan,
        routing: &RoutingBuffers,
        layout: &LayoutBuffers,
        second: Option<&SecondWorklist>,
        workspace: u64,
    ) -> Result<()> {
        let arguments = self.config.arguments(plan, routing, layout, workspace)?.with_second(plan, second)?;
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

    /// Waits for the stream and says what was wrong with the ids since the last time; the workspace then knows nothing.
    ///
    /// # Safety
    /// `stream` is a live stream of this device (or 0), and `workspace` was initialised.
    ///
    /// # Errors
    /// [`Error::MapEntry`] or [`Error::ExpertId`] for the first id or map entry past its limit (such slots were treated
    /// as empty), [`Error::MSum`] if a routing needed more rows than its plan (rows past the end were left out);
    /// [`Error::Cuda`].
    #[allow(unsafe_code)]
    pub unsafe fn check(&self, stream: Stream, plan: &Plan, routing: &RoutingBuffers, workspace: u64) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { check(&self.device, self.config.topk, stream, plan, routing, workspace) }
    }
}

/// # Safety
/// As [`Route::initialise_workspace`].
#[allow(unsafe_code)]
pub(super) unsafe fn initialise_workspace(device: &Device, stream: Stream, workspace: u64) -> Result<()> {
    // SAFETY: the caller's promise.
    unsafe { device.zero(stream, workspace, STATE_BYTES) }
}

/// [`Route::workspace_bytes`] on a device of that many multiprocessors.
pub(super) fn workspace_bytes(plan: &Plan, multiprocessors: usize) -> Result<usize> {
    require_experts(plan.local_experts())?;
    Ok(STATE_BYTES + multiprocessors * plan.local_experts().next_multiple_of(8) * 2)
}

/// # Safety
/// As [`Route::check`].
#[allow(unsafe_code)]
pub(super) unsafe fn check(
    device: &Device,
    topk: usize,
    stream: Stream,
    plan: &Plan,
    routing: &RoutingBuffers,
    workspace: u64,
) -> Result<()> {
    let mut status = [0u64; STATUS_BYTES / 8];
    // SAFETY: the caller's promise; the status is the workspace's first bytes.
    unsafe {
        device.read(stream, workspace, bytemuck::must_cast_slice_mut(&mut status))?;
        if status == [0; STATUS_BYTES / 8] {
            return Ok(());
        }
        device.zero(stream, workspace, STATUS_BYTES)?;
    }
    let place = |word: u64| !(word >> 32) as u32 as usize;
    let [id, entry, rows, _] = status;
    if entry != 0 {
        let (index, value) = (place(entry), entry as u32 as i32);
        return Err(Error::MapEntry { index, value, local_experts: plan.local_experts() });
    }
    if id != 0 {
        let limit = if routing.expert_map == 0 { plan.local_experts() } else { routing.global_experts };
        let slot = place(id);
        return Err(Error::ExpertId { token: slot / topk, slot: slot % topk, id: i64::from(id as u32), limit });
    }
    Err(Error::MSum { m_sum: plan.m_sum(), needed: rows as u32 as usize, alignment: plan.alignment() })
}

/// Dynamic shared memory: a 16-bit counter for each warp and expert.
fn shared_bytes(experts: usize) -> u32 {
    WARPS * 2 * experts as u32
}
