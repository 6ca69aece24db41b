//! Routing to quantized rows in their places: one launch where the slots are few, two above.

use super::arguments::{RowsArgs, SecondWorklist, require_columns, require_int};
use super::call::{LayoutPtrs, RoutingPtrs, RowsPtrs};
use super::definitions::{half_number, scale_definitions};
use super::driver::{Device, DevicePtr, Kernel, Launch, Resident, Resources, Source, Stream};
use super::route::{self, Route, RouteCall, RouteConfig};
use crate::dtype::Dtype;
use crate::error::{Error, Result, checked_add, checked_mul};
use crate::layout::Padding;
use crate::plan::Plan;
use crate::quantize::ScaleFormat;
use std::ffi::c_void;
use std::sync::Arc;

/// The single launch: one block to a multiprocessor, each of which counts all slots for itself.
const FEW_THREADS: u32 = 1024;
/// Slots that it takes at most.
pub(super) const FEW_SLOTS: usize = 8192;
/// Of them, those of the tokens whose rows a block brings: what its shared memory has room for.
const OWN_SLOTS: usize = 4096;
/// Values of a row that a warp takes at a time.
const SLAB: usize = 512;

/// Launches of quantize + permute: more slots than one takes have two, the layout; then rows and scales.
pub(super) fn launches(slots: usize) -> usize {
    if slots <= FEW_SLOTS { 1 } else { 2 }
}

/// What quantize + permute is specialised for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QuantizePermuteConfig {
    /// The routing's part.
    pub route: RouteConfig,
    /// `H`, a multiple of the group.
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
    /// The kernels' source for this configuration.
    ///
    /// # Errors
    /// As [`RouteConfig::source`]; [`Error::Dtype`] unless rows are bf16 or f16, [`Error::Value`] unless the group
    /// divides `hidden` and, with weights, `topk` is 1.
    pub fn source(&self) -> Result<Source> {
        if self.weighted && self.route.topk != 1 {
            return Err(Error::value("topk", self.route.topk, "1, where router weights multiply the input"));
        }
        let mut definitions = self.route.definitions()?;
        definitions.extend(scale_definitions(self.format, self.hidden)?);
        definitions.extend([
            ("HIDDEN", self.hidden as i64),
            ("INPUT", half_number("x", self.input)?),
            ("WEIGHTED", i64::from(self.weighted)),
            ("ZERO_ROWS", i64::from(self.padding == Padding::Zero)),
            ("ALIGNED", i64::from(self.aligned)),
            ("ROWS_THREADS", i64::from(rows_threads(self.hidden))),
            ("OWN_SLOTS", OWN_SLOTS as i64),
            ("HOST_FEW_THREADS", i64::from(FEW_THREADS)),
            ("HOST_SLAB", SLAB as i64),
        ]);
        Ok(Source::new("quantize_permute.cu", include_str!("kernels/rows/quantize_permute.cu"), definitions))
    }

    /// [`QuantizePermute::workspace_bytes`] on a device of that many multiprocessors.
    pub(super) fn workspace_bytes(&self, plan: &Plan, multiprocessors: usize) -> Result<usize> {
        let words_of_a_row = self.format.words(4, self.hidden)? / 4;
        let row = words_of_a_row.next_multiple_of(4) * 4;
        let scales = checked_mul("bytes of the tokens' scales", plan.tokens(), row)?;
        checked_add("bytes of workspace", route::workspace_bytes(plan, multiprocessors)?, scales)
    }

    fn check(&self, QuantizePermuteCall { plan, rows, .. }: &QuantizePermuteCall) -> Result<()> {
        let m_sum = plan.m_sum();
        if plan.tokens() > 0 {
            require_columns("x", &rows.x, self.hidden)?;
            rows.x.ptr.require_aligned("x", if self.aligned { 16 } else { 2 })?;
            if self.aligned && !(rows.x.row_stride * 2).is_multiple_of(16) {
                return Err(Error::Stride {
                    argument: "x",
                    actual: vec![rows.x.row_stride, rows.x.col_stride],
                    expected: "rows 16 bytes apart, as prepared".into(),
                });
            }
            if self.weighted {
                rows.weights.unwrap_or_default().ptr.require_aligned("topk_weights", 4)?;
            }
        }
        if m_sum > 0 {
            rows.out.require_aligned("out", 16)?;
            DevicePtr::require(rows.scales, "scales", 16)?;
        }
        Ok(())
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
    few: Arc<Kernel>,
    many: Resident,
    single_launch_slots: usize,
}

impl QuantizePermute {
    /// Compiles (or loads) the kernels: the warm-up, after which nothing compiles.
    ///
    /// # Errors
    /// As [`QuantizePermuteConfig::source`]; [`Error::Kernel`] if one does not compile, [`Error::Cuda`].
    pub fn prepare(device: &Device, config: QuantizePermuteConfig) -> Result<Self> {
        let source = config.source()?;
        let few = device.kernel(&source, c"route_quantize_permute")?;
        Ok(Self {
            device: device.clone(),
            config,
            route: Route::prepare(device, config.route)?,
            few,
            many: Resident::prepare(device, &source, c"permute_rows", rows_threads(config.hidden))?,
            single_launch_slots: FEW_SLOTS,
        })
    }

    /// Takes two launches for more than `slots` (at most 8192, the default).
    #[must_use]
    pub fn with_single_launch_slots(self, slots: usize) -> Self {
        Self { single_launch_slots: slots.min(FEW_SLOTS), ..self }
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

    /// The same, with a second worklist.
    ///
    /// # Safety
    /// As [`Route::launch`].
    #[allow(unsafe_code)]
    pub(super) unsafe fn launch_with(
        &self,
        stream: Stream,
        call: &QuantizePermuteCall,
        second: Option<&SecondWorklist>,
    ) -> Result<()> {
        let QuantizePermuteCall { plan, rows, layout, state, workspace, .. } = call;
        self.config.check(call)?;
        let route = self.config.route.arguments(&call.route())?.with_second(plan, second)?;
        let token_scales = workspace.byte_add(self.route.workspace_bytes(plan)?).address();
        let queue = state.byte_add(route::QUEUE_OFFSET).address();
        let arguments = RowsArgs { token_scales, queue, ..RowsArgs::new(rows, layout, plan)? };
        if !self.takes_one_launch(plan) {
            // SAFETY: the caller's promise.
            unsafe {
                self.route.queue(stream, &route)?;
                return self.many.launch(stream, &arguments);
            }
        }
        let shape = Launch {
            blocks: self.device.info().multiprocessors,
            threads: FEW_THREADS,
            shared_bytes: 0,
            cooperative: false,
            overlap: true,
        };
        let few = FewArgs::new(plan, &self.config, second, shape.blocks)?;
        let pointers = [
            std::ptr::from_ref(&route).cast::<c_void>(),
            std::ptr::from_ref(&arguments).cast(),
            std::ptr::from_ref(&few).cast(),
        ];
        // SAFETY: the kernel takes a `RouteArgs`, a `RowsArgs` and a `FewArgs`; the rest is the caller's promise.
        unsafe { self.device.launch(&self.few, shape, stream, &pointers) }
    }

    fn takes_one_launch(&self, plan: &Plan) -> bool {
        let slots = plan.tokens() * plan.topk();
        // A block's share of the rows may begin and end within a token.
        let own = slots / self.device.info().multiprocessors as usize + 3 * plan.topk();
        slots <= self.single_launch_slots && own <= OWN_SLOTS
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

/// Quotients computed on the host, so that the kernel of the single launch never divides.
#[repr(C)]
struct FewArgs {
    units: i32,
    more_units: i32,
    alignment_inverse: u32,
    tile_inverse: u32,
    second_inverse: u32,
}

impl FewArgs {
    fn new(plan: &Plan, config: &QuantizePermuteConfig, second: Option<&SecondWorklist>, blocks: u32) -> Result<Self> {
        let units = require_int("M * slabs", checked_mul("M * slabs", plan.tokens(), config.hidden.div_ceil(SLAB))?)?;
        let inverse = |divisor: usize| ((1u64 << 31) / divisor as u64) as u32;
        Ok(Self {
            units: units / blocks as i32,
            more_units: units % blocks as i32,
            alignment_inverse: inverse(plan.alignment()),
            tile_inverse: inverse(config.route.row_tile),
            second_inverse: second.map_or(0, |second| inverse(second.row_tile)),
        })
    }
}
