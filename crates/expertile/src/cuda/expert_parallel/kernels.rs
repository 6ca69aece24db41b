//! The kernels of dispatch and combine, what they are specialised for, and their arguments in the kernels' own layout.

use crate::combine::Combine;
use crate::cuda::definitions::{float_number, half_number, scale_definitions};
use crate::cuda::driver::{Device, Kernel, Launch, Source, Stream};
use crate::dispatch::{Dispatch, TokenRow};
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::expert_parallel::ParallelChoice;
use crate::gemm::ActivationFormat;
use crate::layer::LayerConfig;
use crate::quantize::ScaleFormat;
use std::ffi::c_void;
use std::sync::Arc;

/// The kernels' `MAX_WINDOWS`.
pub(super) const MAX_WINDOWS: usize = 64;
const THREADS: u32 = 128;
/// The kernels' `PLAN_THREADS`.
const PLAN_THREADS: u32 = 1024;
const WARPS: usize = THREADS as usize / 32;
/// Values that a warp of dispatch takes at a time, and one of combine.
const SLAB: usize = 512;
const STEP: usize = 256;
/// Up to so many slots of all ranks, a warp of combine takes the shortest piece of a row that there is.
const FEW_SLOTS: usize = 2048;

/// How rows get to other ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    /// Kernels store them there.
    Stored,
    /// A library moves the same number of bytes of every rank.
    Gathered,
    /// A library moves as many rows as there are, which the host has waited for.
    Counted,
}

impl Way {
    pub(super) fn new(dispatch: Dispatch, mapped: bool) -> Self {
        match (mapped, dispatch) {
            (true, _) => Self::Stored,
            (false, Dispatch::Gather) => Self::Gathered,
            (false, Dispatch::Routed) => Self::Counted,
        }
    }
}

/// The kernels' `RankArgs`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct RankArgs {
    pub(super) state: u64,
    pub(super) limit_ns: u64,
    pub(super) ranks: i32,
    pub(super) rank: i32,
    pub(super) tokens: i32,
    pub(super) capacity: i32,
    pub(super) headers_at: i64,
    pub(super) header_bytes: i64,
    pub(super) rows_at: i64,
    pub(super) returned_at: i64,
    pub(super) outgoing: u64,
    pub(super) copies: u64,
    pub(super) places: u64,
    pub(super) slot_places: u64,
    pub(super) row_bytes: i32,
    pub(super) copies_at: i32,
    pub(super) weights_at: i32,
    pub(super) place_at: i32,
    pub(super) windows: [u64; MAX_WINDOWS],
}

/// The kernels' `DispatchArgs`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct DispatchArgs {
    pub(super) ranks: RankArgs,
    pub(super) x: u64,
    pub(super) x_row_stride: i64,
    pub(super) ids: u64,
    pub(super) ids_row_stride: i64,
    pub(super) ids_col_stride: i64,
    pub(super) weights: u64,
    pub(super) weights_row_stride: i64,
    pub(super) first_choice: u64,
    pub(super) choices: u64,
    pub(super) copy_ranks: u64,
    pub(super) experts: i32,
    pub(super) reserved: i32,
}

/// The kernels' `CombineArgs`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct CombineArgs {
    pub(super) ranks: RankArgs,
    pub(super) rows: u64,
    pub(super) inv_perm: u64,
    pub(super) copy_ranks: u64,
    pub(super) weights: u64,
    pub(super) weights_row_stride: i64,
    pub(super) out: u64,
    pub(super) m_sum: i32,
    pub(super) reserved: i32,
}

/// The kernel's source of dispatch, of tokens that travel as `row` says.
///
/// # Errors
/// As [`scale_definitions`]; [`Error::Dtype`] for hidden states that are not bf16 or f16.
pub(super) fn dispatch_source(
    choice: &ParallelChoice,
    row: &TokenRow,
    config: &LayerConfig,
    mapped: bool,
) -> Result<Source> {
    let mut definitions = scale_definitions_of(row)?;
    definitions.extend(row_definitions(choice, mapped));
    definitions.extend([
        ("IDS_I64", i64::from(config.ids == Dtype::I64)),
        ("INPUT", half_number("hidden_states", config.input)?),
        ("QUANTIZED", i64::from(row.activation_format() == ActivationFormat::E4m3)),
        ("WEIGHTED", i64::from(config.weight_on_input)),
        ("WEIGHTS_TRAVEL", i64::from(!row.weights().is_empty())),
        ("ROUTED", i64::from(choice.dispatch == Dispatch::Routed)),
        ("SCALES_AT", row.scales().start as i64),
    ]);
    Ok(Source::new("dispatch.cu", include_str!("../kernels/exchange/dispatch.cu"), definitions))
}

/// Scales of the rows' groups; of rows without any, what the headers need to compile.
fn scale_definitions_of(row: &TokenRow) -> Result<Vec<(&'static str, i64)>> {
    match row.activation_format() {
        ActivationFormat::E4m3 => scale_definitions(ScaleFormat::HOPPER, row.hidden()),
        ActivationFormat::Bf16 => Ok(vec![("GROUP", 128), ("POWER_OF_TWO", 0)]),
    }
}

/// The kernel's source of combine.
///
/// # Errors
/// [`Error::Dtype`] for an output that is no float.
pub(super) fn combine_source(choice: &ParallelChoice, config: &LayerConfig, mapped: bool) -> Result<Source> {
    let mut definitions = row_definitions(choice, mapped).to_vec();
    definitions.extend([
        ("ROWS", i64::from(choice.combine == Combine::Rows)),
        ("OUTPUT", float_number("output", config.output)?),
        ("WEIGHTED", i64::from(!config.weight_on_input)),
    ]);
    Ok(Source::new("combine.cu", include_str!("../kernels/exchange/combine.cu"), definitions))
}

fn row_definitions(choice: &ParallelChoice, mapped: bool) -> [(&'static str, i64); 5] {
    let row = choice.token_row;
    [
        ("COUNTED", i64::from(Way::new(choice.dispatch, mapped) == Way::Counted)),
        ("HIDDEN", row.hidden() as i64),
        ("TOPK", row.topk() as i64),
        ("MAPPED", i64::from(mapped)),
        ("HOST_THREADS", i64::from(THREADS)),
    ]
}

/// A kernel, and how many of its blocks the device holds.
#[derive(Debug)]
struct Filling {
    kernel: Arc<Kernel>,
    most_blocks: u32,
}

impl Filling {
    fn prepare(device: &Device, source: &Source, entry: &'static std::ffi::CStr) -> Result<Self> {
        let kernel = device.kernel(source, entry)?;
        let blocks = device.blocks_per_multiprocessor(&kernel, THREADS, 0)?.max(1);
        Ok(Self { kernel, most_blocks: blocks * device.info().multiprocessors })
    }

    /// Blocks that loop over so many units, a warp each.
    fn blocks(&self, units: usize) -> u32 {
        u32::try_from(units.div_ceil(WARPS)).unwrap_or(u32::MAX).clamp(1, self.most_blocks)
    }
}

/// The kernels of dispatch, of tokens that travel in one form.
#[derive(Debug)]
struct DispatchKernels {
    /// Where rows are counted.
    plan: Option<Arc<Kernel>>,
    send: Filling,
    /// Unless what came needs nothing more.
    receive: Option<Filling>,
    /// Both, where windows are mapped.
    whole: Option<Filling>,
}

impl DispatchKernels {
    fn prepare(device: &Device, source: &Source, way: Way) -> Result<Self> {
        let filling = |entry, is_there: bool| is_there.then(|| Filling::prepare(device, source, entry)).transpose();
        let plan = (way == Way::Counted).then(|| device.kernel(source, c"dispatch_plan"));
        Ok(Self {
            plan: plan.transpose()?,
            send: Filling::prepare(device, source, c"dispatch_send")?,
            receive: filling(c"dispatch_receive", way != Way::Gathered)?,
            whole: filling(c"dispatch", way == Way::Stored)?,
        })
    }
}

/// The kernels, prepared.
#[derive(Debug)]
pub(super) struct Kernels {
    device: Device,
    hidden: usize,
    topk: usize,
    way: Way,
    dispatch: DispatchKernels,
    /// Of tokens that travel as they are.
    plain_dispatch: Option<DispatchKernels>,
    combine_send: [Filling; 2],
    combine_receive: [Arc<Kernel>; 2],
}

impl Kernels {
    pub(super) fn prepare(
        device: &Device,
        choice: &ParallelChoice,
        plain: Option<&TokenRow>,
        config: &LayerConfig,
        mapped: bool,
    ) -> Result<Self> {
        let way = Way::new(choice.dispatch, mapped);
        let dispatch = |row| DispatchKernels::prepare(device, &dispatch_source(choice, row, config, mapped)?, way);
        let combine = combine_source(choice, config, mapped)?;
        Ok(Self {
            device: device.clone(),
            hidden: choice.token_row.hidden(),
            topk: choice.token_row.topk(),
            way,
            dispatch: dispatch(&choice.token_row)?,
            plain_dispatch: plain.map(dispatch).transpose()?,
            combine_send: [
                Filling::prepare(device, &combine, c"combine_send")?,
                Filling::prepare(device, &combine, c"combine_send_few")?,
            ],
            combine_receive: [
                device.kernel(&combine, c"combine_receive")?,
                device.kernel(&combine, c"combine_receive_few")?,
            ],
        })
    }

    /// # Safety
    /// `arguments` is what the kernel takes, and its addresses are of memory that it may use when the stream comes to it.
    #[allow(unsafe_code)]
    unsafe fn launch<A>(&self, kernel: &Kernel, blocks: u32, stream: Stream, arguments: &A) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.launch_with(kernel, (blocks, THREADS), stream, arguments) }
    }

    /// # Safety
    /// As [`Kernels::launch`].
    #[allow(unsafe_code)]
    unsafe fn launch_with<A>(
        &self,
        kernel: &Kernel,
        (blocks, threads): (u32, u32),
        stream: Stream,
        arguments: &A,
    ) -> Result<()> {
        let shape = Launch { blocks, threads, shared_bytes: 0, cooperative: false, overlap: true };
        // SAFETY: the caller's promise.
        unsafe { self.device.launch(kernel, shape, stream, &[std::ptr::from_ref(arguments).cast::<c_void>()]) }
    }

    fn of_tokens(&self, plain: bool) -> &DispatchKernels {
        self.plain_dispatch.as_ref().filter(|_| plain).unwrap_or(&self.dispatch)
    }

    /// # Safety
    /// As [`Kernels::launch`].
    #[allow(unsafe_code)]
    unsafe fn send(&self, kernel: &Filling, stream: Stream, arguments: &DispatchArgs) -> Result<()> {
        let RankArgs { tokens, capacity, .. } = arguments.ranks;
        let rest = (capacity - tokens) as usize * self.topk;
        let units = tokens as usize * self.hidden.div_ceil(SLAB) + rest.div_ceil(32);
        // SAFETY: the caller's promise.
        unsafe { self.launch(&kernel.kernel, kernel.blocks(units), stream, arguments) }
    }

    /// # Safety
    /// As [`Kernels::launch`]; `plain`: the arguments are of tokens that travel as they are.
    #[allow(unsafe_code)]
    pub(super) unsafe fn dispatch_send(&self, stream: Stream, plain: bool, arguments: &DispatchArgs) -> Result<()> {
        let kernels = self.of_tokens(plain);
        // SAFETY: the caller's promise.
        unsafe {
            if let Some(plan) = &kernels.plan {
                self.launch_with(plan, (arguments.ranks.ranks as u32, PLAN_THREADS), stream, arguments)?;
            }
            self.send(&kernels.send, stream, arguments)
        }
    }

    /// # Safety
    /// As [`Kernels::dispatch_send`].
    #[allow(unsafe_code)]
    pub(super) unsafe fn dispatch_receive(&self, stream: Stream, plain: bool, arguments: &DispatchArgs) -> Result<()> {
        let Some(receive) = &self.of_tokens(plain).receive else { return Ok(()) };
        let RankArgs { ranks, capacity, .. } = arguments.ranks;
        let slots = ranks as usize * capacity as usize * self.topk;
        let blocks = if self.way == Way::Counted { receive.blocks(slots.div_ceil(32)) } else { 1 };
        // SAFETY: the caller's promise.
        unsafe { self.launch(&receive.kernel, blocks, stream, arguments) }
    }

    /// Both of them.
    ///
    /// # Safety
    /// As [`Kernels::dispatch_send`].
    #[allow(unsafe_code)]
    pub(super) unsafe fn dispatch(&self, stream: Stream, plain: bool, arguments: &DispatchArgs) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe {
            match &self.of_tokens(plain).whole {
                Some(whole) => self.send(whole, stream, arguments),
                None => {
                    self.dispatch_send(stream, plain, arguments)?;
                    self.dispatch_receive(stream, plain, arguments)
                }
            }
        }
    }

    /// Which of two kernels, and the units of a token that its warps take.
    fn piece(&self, arguments: &RankArgs) -> (usize, usize) {
        let steps = self.hidden.div_ceil(STEP);
        let slots = (arguments.ranks * arguments.capacity) as usize * self.topk;
        if slots <= FEW_SLOTS { (1, steps) } else { (0, steps.div_ceil(2)) }
    }

    /// # Safety
    /// As [`Kernels::launch`].
    #[allow(unsafe_code)]
    pub(super) unsafe fn combine_send(&self, stream: Stream, arguments: &CombineArgs) -> Result<()> {
        let RankArgs { ranks, capacity, .. } = arguments.ranks;
        let (which, pieces) = self.piece(&arguments.ranks);
        let others = (ranks - 1) as usize;
        let send = &self.combine_send[which];
        // SAFETY: the caller's promise.
        unsafe { self.launch(&send.kernel, send.blocks(others * capacity as usize * pieces), stream, arguments) }
    }

    /// # Safety
    /// As [`Kernels::launch`].
    #[allow(unsafe_code)]
    pub(super) unsafe fn combine_receive(&self, stream: Stream, arguments: &CombineArgs) -> Result<()> {
        let (which, pieces) = self.piece(&arguments.ranks);
        let blocks = (arguments.ranks.tokens as usize * pieces).div_ceil(WARPS).max(1);
        let blocks = u32::try_from(blocks).map_err(|_| Error::value("tokens", blocks, "fewer"))?;
        // SAFETY: the caller's promise.
        unsafe { self.launch(&self.combine_receive[which], blocks, stream, arguments) }
    }
}
