//! Rows to their places: quantized on the way, with the routing in the same launch where the slots are few; or as they are.

use super::arguments::{
    LayoutBuffers, RoutingBuffers, RowsArgs, RowsBuffers, SecondWorklist, require_aligned, require_columns, require_int,
};
use super::device::{Device, Launch, Stream};
use super::kernel::{Kernel, Resources, Source};
use super::resident::Resident;
use super::route::{self, Route, RouteConfig};
use crate::dtype::Dtype;
use crate::error::{Error, Result, checked_add, checked_mul};
use crate::layout::Padding;
use crate::plan::Plan;
use crate::quantize::{ScaleFormat, ScaleLayout, ScaleRounding};
use std::ffi::c_void;
use std::sync::Arc;

const THREADS: u32 = 256;
/// Values of a row that a warp takes at a time.
const SLAB: usize = 512;
/// The single launch: one block to a multiprocessor, each of which counts all slots for itself.
const FEW_THREADS: u32 = 1024;
/// Slots that it takes at most.
const FEW_SLOTS: usize = 8192;
/// Of them, those of the tokens whose rows a block brings: what its shared memory has room for.
const OWN_SLOTS: usize = 4096;

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

/// Definitions that describe scales.
pub(super) fn scale_definitions(format: ScaleFormat, width: usize) -> Result<Vec<(&'static str, i64)>> {
    format.groups(width)?;
    let layout = match format.layout() {
        ScaleLayout::RowMajor => 0,
        ScaleLayout::MnMajor => 1,
        ScaleLayout::PackedUe8m0 => 2,
    };
    Ok(vec![
        ("WIDTH", i64::from(require_int("hidden", width)?)),
        ("GROUP", format.group().size() as i64),
        ("SCALE_LAYOUT", layout),
        ("POWER_OF_TWO", i64::from(format.rounding() == ScaleRounding::PowerOfTwo)),
    ])
}

/// The kernels' number for a type that has a 16- or 32-bit float.
pub(super) fn float_number(argument: &'static str, dtype: Dtype, expected: &'static str) -> Result<i64> {
    match dtype {
        Dtype::Bf16 => Ok(0),
        Dtype::F16 => Ok(1),
        Dtype::F32 if expected.contains("f32") => Ok(2),
        actual => Err(Error::Dtype { argument, actual, expected }),
    }
}

impl QuantizePermuteConfig {
    /// The kernels' source for this configuration.
    ///
    /// # Errors
    /// As [`RouteConfig::source`]; [`Error::Dtype`] unless rows are bf16 or f16, [`Error::Value`] unless the group divides
    /// `hidden` and, with weights, `topk` is 1.
    pub fn source(&self) -> Result<Source> {
        if self.weighted && self.route.topk != 1 {
            return Err(Error::value("topk", self.route.topk, "1, where router weights multiply the input"));
        }
        let mut definitions = self.route.definitions()?;
        definitions.extend(scale_definitions(self.format, self.hidden)?);
        definitions.extend([
            ("HIDDEN", self.hidden as i64),
            ("INPUT", float_number("x", self.input, "bf16 or f16")?),
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

    fn check(&self, rows: &RowsBuffers, plan: &Plan) -> Result<()> {
        let m_sum = plan.m_sum();
        if plan.tokens() > 0 {
            require_columns("x", &rows.x, self.hidden)?;
            require_aligned("x", rows.x.address, if self.aligned { 16 } else { 2 })?;
            if self.aligned && !(rows.x.row_stride * 2).is_multiple_of(16) {
                return Err(Error::Stride {
                    argument: "x",
                    actual: vec![rows.x.row_stride, rows.x.col_stride],
                    expected: "rows 16 bytes apart, as prepared".into(),
                });
            }
            if self.weighted {
                require_aligned("topk_weights", rows.weights.address, 4)?;
            }
        }
        if m_sum > 0 {
            require_aligned("out", rows.out, 16)?;
            require_aligned("scales", rows.scales, 16)?;
        }
        Ok(())
    }
}

/// From routing to quantized rows in their places, prepared.
///
/// Up to 8192 slots (512 tokens of 16) take one launch. More take two, the second set up while the first runs: the layout; then
/// the rows, and their scales, which are cheaper to write row by row once every token has its own.
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

    /// As [`Route::initialise_workspace`].
    ///
    /// # Safety
    /// As [`Route::initialise_workspace`].
    ///
    /// # Errors
    /// As [`Route::initialise_workspace`].
    #[allow(unsafe_code)]
    pub unsafe fn initialise_workspace(&self, stream: Stream, workspace: u64) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.route.initialise_workspace(stream, workspace) }
    }

    /// Queues it all: the layout's lists, the rows, their scales, zeros in the padding's scales.
    ///
    /// # Safety
    /// As [`Route::launch`].
    ///
    /// # Errors
    /// As [`Route::launch`]; [`Error::Stride`] for rows that the configuration did not promise.
    #[allow(unsafe_code)]
    pub unsafe fn launch(
        &self,
        stream: Stream,
        plan: &Plan,
        routing: &RoutingBuffers,
        rows: &RowsBuffers,
        layout: &LayoutBuffers,
        workspace: u64,
    ) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.launch_with(stream, plan, routing, rows, (layout, None), workspace) }
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
        rows: &RowsBuffers,
        (layout, second): (&LayoutBuffers, Option<&SecondWorklist>),
        workspace: u64,
    ) -> Result<()> {
        self.config.check(rows, plan)?;
        let route = self.config.route.arguments(plan, routing, layout, workspace)?.with_second(plan, second)?;
        let token_scales = workspace + self.route.workspace_bytes(plan)? as u64;
        let queue = workspace + route::QUEUE_OFFSET;
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
    pub unsafe fn check(&self, stream: Stream, plan: &Plan, routing: &RoutingBuffers, workspace: u64) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.route.check(stream, plan, routing, workspace) }
    }
}

/// Threads per block of `permute_rows`. A row is cut into pieces of at most 16 slabs; a team has one warp per two slabs; a
/// block holds as many teams as fit in 8 warps.
fn rows_threads(hidden: usize) -> u32 {
    let slabs = hidden.div_ceil(SLAB);
    let slabs_of_a_piece = slabs.div_ceil(slabs.div_ceil(16));
    let warps_of_a_team = slabs_of_a_piece.div_ceil(2);
    (8 / warps_of_a_team * warps_of_a_team * 32) as u32
}

/// Quotients computed on the host so that the kernel never divides.
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

/// What permuting rows as they are is specialised for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PermuteConfig {
    /// Slots per token.
    pub topk: usize,
    /// `H`.
    pub hidden: usize,
    /// Type of the rows; nothing looks at the values.
    pub dtype: Dtype,
    /// Scales that travel with the rows.
    pub scales: Option<ScaleFormat>,
    /// What becomes of padding rows.
    pub padding: Padding,
    /// Bytes that `x`, each of its rows and `out` start on: 1, 2, 4, 8 or 16.
    pub alignment_bytes: usize,
}

impl PermuteConfig {
    /// Bytes moved at a time: what the addresses and a row's length allow.
    fn vector_bytes(&self) -> Result<usize> {
        let row = checked_mul("bytes of a row", self.hidden, self.dtype.bytes())?;
        if !self.alignment_bytes.is_power_of_two() {
            return Err(Error::value("alignment_bytes", self.alignment_bytes, "1, 2, 4, 8 or 16"));
        }
        Ok([16, 8, 4, 2, 1].into_iter().find(|&v| self.alignment_bytes >= v && row.is_multiple_of(v)).unwrap_or(1))
    }

    /// The kernel's source for this configuration.
    ///
    /// # Errors
    /// [`Error::Value`] for a `topk` outside 1 to 32, `hidden` 0 or, with scales, one that the group does not divide;
    /// [`Error::Dtype`] for scales of rows that are not e4m3.
    pub fn source(&self) -> Result<Source> {
        if self.topk == 0 || self.topk > route::MAX_TOPK {
            return Err(Error::value("topk", self.topk, format!("1 to {} on a GPU", route::MAX_TOPK)));
        }
        if self.hidden == 0 {
            return Err(Error::value("hidden", 0, "at least 1"));
        }
        let mut definitions = match self.scales {
            Some(_) if self.dtype != Dtype::E4m3 => {
                return Err(Error::Dtype { argument: "x", actual: self.dtype, expected: "e4m3 for rows with scales" });
            }
            Some(format) => scale_definitions(format, self.hidden)?,
            None => Vec::new(),
        };
        let row = checked_mul("bytes of a row", self.hidden, self.dtype.bytes())?;
        definitions.extend([
            ("TOPK", self.topk as i64),
            ("ROW_BYTES", i64::from(require_int("bytes of a row", row)?)),
            ("VECTOR", self.vector_bytes()? as i64),
            ("ZERO_ROWS", i64::from(self.padding == Padding::Zero)),
            ("SCALED", i64::from(self.scales.is_some())),
            ("HOST_THREADS", i64::from(THREADS)),
        ]);
        Ok(Source::new("permute.cu", include_str!("kernels/rows/permute.cu"), definitions))
    }
}

/// Permuting rows as they are, prepared.
#[derive(Debug)]
pub struct Permute {
    config: PermuteConfig,
    kernel: Resident,
}

impl Permute {
    /// Compiles (or loads) the kernel: the warm-up, after which nothing compiles.
    ///
    /// # Errors
    /// As [`PermuteConfig::source`]; [`Error::Kernel`] if it does not compile, [`Error::Cuda`].
    pub fn prepare(device: &Device, config: PermuteConfig) -> Result<Self> {
        Ok(Self { config, kernel: Resident::prepare(device, &config.source()?, c"permute", THREADS)? })
    }

    /// What the kernel takes of a multiprocessor.
    #[must_use]
    pub fn resources(&self) -> Resources {
        self.kernel.resources()
    }

    /// Queues the launch: rows, their scales if there are any, zeros in the padding's scales.
    ///
    /// # Safety
    /// As [`Route::launch`]; the lists hold a layout of this plan.
    ///
    /// # Errors
    /// [`Error::Value`] and [`Error::Stride`] for what does not fit the configuration; [`Error::Cuda`].
    #[allow(unsafe_code)]
    pub unsafe fn launch(&self, stream: Stream, plan: &Plan, rows: &RowsBuffers, layout: &LayoutBuffers) -> Result<()> {
        if plan.topk() != self.config.topk {
            return Err(Error::value("topk", plan.topk(), format!("{}, as prepared", self.config.topk)));
        }
        let vector = self.config.vector_bytes()?;
        if plan.tokens() > 0 {
            require_columns("x", &rows.x, self.config.hidden)?;
            require_aligned("x", rows.x.address, vector as u64)?;
            if self.config.scales.is_some() {
                require_aligned("x_scales", rows.x_scales.address, 1)?;
            }
        }
        if plan.m_sum() > 0 {
            require_aligned("out", rows.out, vector as u64)?;
            if self.config.scales.is_some() {
                require_aligned("scales", rows.scales, 16)?;
            }
        }
        let mut arguments = RowsArgs::new(rows, layout, plan)?;
        let row_bytes = checked_mul("bytes of a row", rows.x.row_stride, self.config.dtype.bytes())?;
        if plan.tokens() > 1 && !row_bytes.is_multiple_of(vector) {
            return Err(Error::Stride {
                argument: "x",
                actual: vec![rows.x.row_stride, rows.x.col_stride],
                expected: format!("rows {vector} bytes apart, as prepared"),
            });
        }
        arguments.x_row_stride = row_bytes as i64;
        // SAFETY: the kernel takes one `RowsArgs`; the rest is the caller's promise.
        unsafe { self.kernel.launch(stream, &arguments) }
    }
}
