//! Routing to quantized rows in their places: one launch where the slots are few, two above.

use super::arguments::{RouteExtra, RowsArgs};
use super::call::{LayoutPtrs, RoutingPtrs, RowsPtrs};
use super::driver::{Device, DevicePtr, Resident, Resources, Source, Stream};
use super::route::{self, Route, RouteCall, RouteConfig};
use super::route_permute::{RoutePermute, RoutePermuteConfig, SLAB};
use crate::dtype::Dtype;
#[cfg(doc)]
use crate::error::Error;
use crate::error::{Result, checked_add, checked_mul};
use crate::layout::Padding;
use crate::plan::Plan;
use crate::quantize::ScaleFormat;

/// What quantize + permute is specialised for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QuantizePermuteConfig {
    /// The routing's part.
    pub route: RouteConfig,
    /// `H`, as [`ScaleFormat::groups`] takes it.
    pub hidden: usize,
    /// Type of the rows: [`Dtype::Bf16`] or [`Dtype::F16`].
    pub input: Dtype,
    /// The scales.
    pub format: ScaleFormat,
    /// What becomes of padding rows.
    pub padding: Padding,
    /// Whether router weights multiply the input (`topk` 1 only).
    pub weighted: bool,
    /// Whether `x` and each of its rows start on 16 bytes, which lets them be read 16 bytes at a time.
    pub aligned: bool,
}

impl QuantizePermuteConfig {
    /// The kernels' sources for this configuration: of the single launch, and of the rows after the routing.
    ///
    /// # Errors
    /// As [`RouteConfig::source`]; [`Error::Dtype`] unless rows are bf16 or f16, [`Error::Value`] unless the groups
    /// fit `hidden` and, with weights, `topk` is 1.
    pub fn sources(&self) -> Result<[Source; 2]> {
        let few = self.few().source()?;
        let mut definitions = self.few().row_definitions()?;
        definitions.extend([("TOPK", self.route.topk as i64), ("ROWS_THREADS", i64::from(rows_threads(self.hidden)))]);
        let text = include_str!("kernels/rows/quantize_permute.cu");
        Ok([few, Source::new("quantize_permute.cu", text, definitions)])
    }

    /// The single launch.
    fn few(&self) -> RoutePermuteConfig {
        let &Self { route, hidden, input, format, padding, weighted, aligned } = self;
        RoutePermuteConfig { route, hidden, input, scales: Some(format), padding, weighted, aligned }
    }

    /// [`QuantizePermute::workspace_bytes`] on a device of that many multiprocessors.
    pub(super) fn workspace_bytes(&self, plan: &Plan, multiprocessors: usize) -> Result<usize> {
        let words_of_a_row = self.format.words(4, self.hidden)? / 4;
        let row = words_of_a_row.next_multiple_of(4) * 4;
        let scales = checked_mul("bytes of the tokens' scales", plan.tokens(), row)?;
        checked_add("bytes of workspace", route::workspace_bytes(plan, multiprocessors)?, scales)
    }
}

/// What one call works on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QuantizePermuteCall {
    /// `M`, `topk`, `E`, the alignment and `M_sum`.
    pub plan: Plan,
    /// What is read.
    pub routing: RoutingPtrs,
    /// Rows, and where they and their scales go.
    pub rows: RowsPtrs,
    /// What is written: every list.
    pub layout: LayoutPtrs,
    /// [`super::STATE_BYTES`], 16-byte aligned, initialised once. Calls that share it follow each other.
    pub state: DevicePtr,
    /// [`QuantizePermute::workspace_bytes`], 16-byte aligned, whatever is in it.
    pub workspace: DevicePtr,
}

impl QuantizePermuteCall {
    /// The routing's part.
    fn route(&self) -> RouteCall {
        let Self { plan, routing, layout, state, workspace, .. } = *self;
        RouteCall { plan, routing, layout, state, workspace }
    }
}

/// From routing to quantized rows in their places, prepared.
///
/// Up to 8192 slots (512 tokens of 16) take one launch. More take two, the second set up while the first runs: the
/// layout; then the rows, and their scales, which are cheaper to write row by row once every token has its own.
#[derive(Debug)]
pub struct QuantizePermute {
    device: Device,
    config: QuantizePermuteConfig,
    route: Route,
    few: RoutePermute,
    many: Resident,
}

impl QuantizePermute {
    /// Compiles (or loads) the kernels: the warm-up, after which nothing compiles.
    ///
    /// # Errors
    /// As [`QuantizePermuteConfig::sources`]; [`Error::Kernel`] if one does not compile, [`Error::Cuda`].
    pub fn prepare(device: &Device, config: QuantizePermuteConfig) -> Result<Self> {
        let [_, many] = config.sources()?;
        Ok(Self {
            device: device.clone(),
            config,
            route: Route::prepare(device, config.route)?,
            few: RoutePermute::prepare(device, config.few())?,
            many: Resident::prepare(device, &many, c"permute_rows", rows_threads(config.hidden))?,
        })
    }

    /// Takes two launches for more than `slots` (at most 8192, the default).
    #[must_use]
    pub fn with_single_launch_slots(self, slots: usize) -> Self {
        Self { few: self.few.with_most_slots(slots), ..self }
    }

    /// What the kernels take of a multiprocessor: the single launch's, and the two launches'.
    #[must_use]
    pub fn resources(&self) -> [Resources; 3] {
        [self.few.resources(), self.route.resources(), self.many.resources()]
    }

    /// As [`Route::workspace_bytes`]: the routing's, and the tokens' scales on their way to their rows.
    ///
    /// # Errors
    /// As [`Route::workspace_bytes`]; [`Error::Overflow`].
    pub fn workspace_bytes(&self, plan: &Plan) -> Result<usize> {
        self.config.workspace_bytes(plan, self.device.info().multiprocessors as usize)
    }

    /// As [`Route::initialise_state`].
    ///
    /// # Safety
    /// As [`Route::initialise_state`].
    ///
    /// # Errors
    /// As [`Route::initialise_state`].
    #[allow(unsafe_code)]
    pub unsafe fn initialise_state(&self, stream: Stream, state: DevicePtr) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.route.initialise_state(stream, state) }
    }

    /// Queues it all: the layout's lists, the rows, their scales, zeros in the padding's scales.
    ///
    /// # Safety
    /// As [`Route::launch`].
    ///
    /// # Errors
    /// As [`Route::launch`]; [`Error::Stride`] for rows that the configuration did not promise.
    #[allow(unsafe_code)]
    pub unsafe fn launch(&self, stream: Stream, call: &QuantizePermuteCall) -> Result<()> {
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
        call: &QuantizePermuteCall,
        extra: Option<&RouteExtra>,
    ) -> Result<()> {
        let QuantizePermuteCall { plan, rows, layout, state, workspace, .. } = call;
        if self.few.takes(plan) {
            // SAFETY: the caller's promise.
            return unsafe { self.few.launch(stream, &call.route(), rows, extra) };
        }
        self.few.config().check(plan, rows)?;
        let route = self.config.route.arguments(&call.route())?.with(plan, extra)?;
        let token_scales = workspace.byte_add(self.route.workspace_bytes(plan)?).address();
        let queue = state.byte_add(route::QUEUE_OFFSET).address();
        let arguments = RowsArgs { token_scales, queue, ..RowsArgs::new(rows, layout, plan)? };
        // SAFETY: the caller's promise.
        unsafe {
            self.route.queue(stream, &route)?;
            self.many.launch(stream, &arguments)
        }
    }

    /// As [`Route::check`].
    ///
    /// # Safety
    /// As [`Route::check`].
    ///
    /// # Errors
    /// As [`Route::check`].
    #[allow(unsafe_code)]
    pub unsafe fn check(&self, stream: Stream, call: &QuantizePermuteCall) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.route.check(stream, &call.route()) }
    }
}

/// Threads per block of `permute_rows`. A row is cut into pieces of at most 16 slabs; a team has one
/// warp per two slabs; a block holds as many teams as fit in 8 warps.
fn rows_threads(hidden: usize) -> u32 {
    let slabs = hidden.div_ceil(SLAB);
    let slabs_of_a_piece = slabs.div_ceil(slabs.div_ceil(16));
    let warps_of_a_team = slabs_of_a_piece.div_ceil(2);
    (8 / warps_of_a_team * warps_of_a_team * 32) as u32
}
