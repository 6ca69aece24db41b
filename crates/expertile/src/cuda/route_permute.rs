//! Routing, plan and permute in one launch, where the slots are few: rows quantized on the way, or as they are.

use super::arguments::{RouteExtra, RowsArgs, SecondWorklist, require_columns, require_int};
use super::call::RowsPtrs;
use super::definitions::{half_number, scale_definitions};
use super::driver::{Device, DevicePtr, Kernel, Launch, Resources, Source, Stream};
use super::route::{RouteCall, RouteConfig};
use crate::dtype::Dtype;
use crate::error::{Error, Result, checked_mul};
use crate::layout::Padding;
use crate::plan::Plan;
use crate::quantize::ScaleFormat;
use std::ffi::c_void;
use std::sync::Arc;

/// One block to a multiprocessor, each of which counts all slots for itself.
const THREADS: u32 = 1024;
/// Slots that it takes at most.
pub(super) const MOST_SLOTS: usize = 8192;
/// Of them, those of the tokens whose rows a block brings: what its shared memory has room for.
const OWN_SLOTS: usize = 4096;
/// Values of a row that a warp takes at a time.
pub(super) const SLAB: usize = 512;
/// Of them, those of a lane.
const PER_LANE: usize = SLAB / 32;

/// Launches from the routing to rows in their places: more slots than one launch takes have two.
pub(super) fn launches(slots: usize) -> usize {
    if slots <= MOST_SLOTS { 1 } else { 2 }
}

/// What the single launch from routing to rows in their places is specialised for: a part of
/// [`super::QuantizePermute`], and of a layer of bf16.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RoutePermuteConfig {
    /// The routing's part.
    pub route: RouteConfig,
    /// `H`: as [`ScaleFormat::groups`] takes it where rows are quantized, else a multiple of 16.
    pub hidden: usize,
    /// Type of the rows: [`Dtype::Bf16`] or [`Dtype::F16`].
    pub input: Dtype,
    /// Scales of quantized rows; none for rows as they are.
    pub scales: Option<ScaleFormat>,
    /// What becomes of padding rows.
    pub padding: Padding,
    /// Whether router weights multiply the input (`topk` 1 only).
    pub weighted: bool,
    /// Whether `x` and each of its rows start on 16 bytes, which lets them be read 16 bytes at a time.
    pub aligned: bool,
}

impl RoutePermuteConfig {
    /// What is said of rows, of this launch and of the one after a routing by itself.
    pub(super) fn row_definitions(&self) -> Result<Vec<(&'static str, i64)>> {
        if self.weighted && self.route.topk != 1 {
            return Err(Error::value("topk", self.route.topk, "1, where router weights multiply the input"));
        }
        let mut definitions = match self.scales {
            Some(format) => scale_definitions(format, self.hidden)?,
            None => Vec::new(),
        };
        definitions.extend([
            ("HIDDEN", i64::from(require_int("hidden", self.hidden)?)),
            ("INPUT", half_number("x", self.input)?),
            ("WEIGHTED", i64::from(self.weighted)),
            ("ZERO_ROWS", i64::from(self.padding == Padding::Zero)),
            ("ALIGNED", i64::from(self.aligned)),
            ("HOST_SLAB", SLAB as i64),
        ]);
        Ok(definitions)
    }

    /// The kernel's source for this configuration.
    ///
    /// # Errors
    /// As [`RouteConfig::source`]; [`Error::Dtype`] unless rows are bf16 or f16, [`Error::Value`] unless the group (or
    /// 16) divides `hidden` and, with weights, `topk` is 1.
    pub fn source(&self) -> Result<Source> {
        if self.scales.is_none() && !self.hidden.is_multiple_of(PER_LANE) {
            return Err(Error::value("hidden", self.hidden, format!("a multiple of {PER_LANE}")));
        }
        let mut definitions = self.row_definitions()?;
        definitions.extend(self.route.definitions()?);
        definitions.extend([
            ("QUANTIZED", i64::from(self.scales.is_some())),
            ("OWN_SLOTS", OWN_SLOTS as i64),
            ("HOST_THREADS", i64::from(THREADS)),
        ]);
        Ok(Source::new("route_permute.cu", include_str!("kernels/rows/route_permute.cu"), definitions))
    }

    /// Fails for rows that the configuration did not promise.
    pub(super) fn check(&self, plan: &Plan, rows: &RowsPtrs) -> Result<()> {
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
        if plan.m_sum() > 0 {
            rows.out.require_aligned("out", 16)?;
            if self.scales.is_some() {
                DevicePtr::require(rows.scales, "scales", 16)?;
            }
        }
        Ok(())
    }
}

/// The launch, prepared.
#[derive(Debug)]
pub(super) struct RoutePermute {
    device: Device,
    config: RoutePermuteConfig,
    kernel: Arc<Kernel>,
    most_slots: usize,
}

impl RoutePermute {
    /// Compiles (or loads) the kernel.
    pub(super) fn prepare(device: &Device, config: RoutePermuteConfig) -> Result<Self> {
        let kernel = device.kernel(&config.source()?, c"route_permute")?;
        Ok(Self { device: device.clone(), config, kernel, most_slots: MOST_SLOTS })
    }

    pub(super) fn with_most_slots(self, slots: usize) -> Self {
        Self { most_slots: slots.min(MOST_SLOTS), ..self }
    }

    pub(super) fn config(&self) -> &RoutePermuteConfig {
        &self.config
    }

    pub(super) fn resources(&self) -> Resources {
        self.kernel.resources()
    }

    /// Whether it takes as many slots.
    pub(super) fn takes(&self, plan: &Plan) -> bool {
        let slots = plan.tokens() * plan.topk();
        // A block's share of the rows may begin and end within a token.
        let own = slots / self.device.info().multiprocessors as usize + 3 * plan.topk();
        slots <= self.most_slots && own <= OWN_SLOTS
    }

    /// Queues the launch: the layout's lists, the rows, their scales and zeros in the padding's scales.
    ///
    /// # Safety
    /// As [`super::Route::launch`].
    #[allow(unsafe_code)]
    pub(super) unsafe fn launch(
        &self,
        stream: Stream,
        call: &RouteCall,
        rows: &RowsPtrs,
        extra: Option<&RouteExtra>,
    ) -> Result<()> {
        let plan = &call.plan;
        self.config.check(plan, rows)?;
        let route = self.config.route.arguments(call)?.with(plan, extra)?;
        let arguments = RowsArgs::new(rows, &call.layout, plan)?;
        let shape = Launch {
            blocks: self.device.info().multiprocessors,
            threads: THREADS,
            shared_bytes: 0,
            cooperative: false,
            overlap: true,
        };
        let few = FewArgs::new(plan, &self.config, extra.and_then(RouteExtra::second_worklist), shape.blocks)?;
        let pointers = [
            std::ptr::from_ref(&route).cast::<c_void>(),
            std::ptr::from_ref(&arguments).cast(),
            std::ptr::from_ref(&few).cast(),
        ];
        // SAFETY: the kernel takes a `RouteArgs`, a `RowsArgs` and a `FewArgs`; the rest is the caller's promise.
        unsafe { self.device.launch(&self.kernel, shape, stream, &pointers) }
    }
}

/// Quotients computed on the host, so that the kernel never divides.
#[repr(C)]
struct FewArgs {
    units: i32,
    more_units: i32,
    alignment_inverse: u32,
    tile_inverse: u32,
    second_inverse: u32,
}

impl FewArgs {
    fn new(plan: &Plan, config: &RoutePermuteConfig, second: Option<&SecondWorklist>, blocks: u32) -> Result<Self> {
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
