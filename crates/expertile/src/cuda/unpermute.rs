//! Rows back to their tokens: a weighted sum in slot order.

use super::arguments::{require_columns, require_int};
use super::call::DeviceMatrix;
use super::definitions::float_number;
use super::driver::{Device, DevicePtr, Kernel, Launch, Resources, Source, Stream};
use super::route::MAX_TOPK;
use crate::dtype::Dtype;
use crate::error::{Error, Result, checked_mul};
use std::ffi::c_void;
use std::sync::Arc;

const THREADS: u32 = 128;
/// Up to this many slots, of tokens with more than `SHORT_TOPK` each, a warp takes the shortest piece of a row that
/// there is.
const FEW_SLOTS: usize = 2048;
const SHORT_TOPK: usize = 4;
/// Rows and sums of that many bytes are twice what the L2 of an H200 holds.
const LARGE_BYTES: usize = 96 << 20;

/// What the kernel is specialised for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UnpermuteConfig {
    /// `H`
    pub hidden: usize,
    /// Slots per token.
    pub topk: usize,
    /// Type of the rows: [`Dtype::Bf16`], [`Dtype::F16`] or [`Dtype::F32`].
    pub input: Dtype,
    /// Type of the result: the same.
    pub output: Dtype,
    /// Whether router weights multiply the rows.
    pub weighted: bool,
    /// Whether `rows` and `out` start on 16 bytes.
    pub aligned: bool,
}

impl UnpermuteConfig {
    /// Elements a lane takes at a time: 16 bytes of rows where they and the result allow it.
    fn vector(&self) -> usize {
        let elements = if self.input == Dtype::F32 { 4 } else { 8 };
        if self.aligned && self.hidden.is_multiple_of(elements) { elements } else { 1 }
    }

    /// The kernel's source for this configuration.
    ///
    /// # Errors
    /// [`Error::Value`] for a `topk` outside 1 to 32 or `hidden` 0, [`Error::Dtype`] for types that are not floats.
    pub fn source(&self) -> Result<Source> {
        if self.topk == 0 || self.topk > MAX_TOPK {
            return Err(Error::value("topk", self.topk, format!("1 to {MAX_TOPK} on a GPU")));
        }
        if self.hidden == 0 {
            return Err(Error::value("hidden", 0, "at least 1"));
        }
        let definitions = vec![
            ("HIDDEN", i64::from(require_int("hidden", self.hidden)?)),
            ("TOPK", self.topk as i64),
            ("INPUT", float_number("rows", self.input)?),
            ("OUTPUT", float_number("out", self.output)?),
            ("WEIGHTED", i64::from(self.weighted)),
            ("VECTOR", self.vector() as i64),
            ("HOST_THREADS", i64::from(THREADS)),
        ];
        Ok(Source::new("unpermute.cu", include_str!("kernels/rows/unpermute.cu"), definitions))
    }
}

/// What one call works on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct UnpermuteCall {
    /// `[M_sum, H]`, row-major.
    pub rows: DevicePtr,
    /// `[M, topk]` i32: row of each slot, -1 for none.
    pub inv_perm: DevicePtr<i32>,
    /// `topk_weights [M, topk]` f32; its columns are adjacent. Absent where nothing is
    /// weighted.
    pub weights: Option<DeviceMatrix<f32>>,
    /// `[M, H]`, row-major.
    pub out: DevicePtr,
    /// `M`
    pub tokens: usize,
    /// `M_sum`
    pub m_sum: usize,
}

/// The kernel's `UnpermuteArgs`.
#[repr(C)]
struct Arguments {
    rows: u64,
    inv_perm: u64,
    weights: u64,
    weights_row_stride: i64,
    out: u64,
    tokens: i32,
    m_sum: i32,
}

/// Unpermute + reduce, prepared.
#[derive(Debug)]
pub struct Unpermute {
    device: Device,
    config: UnpermuteConfig,
    many: Arc<Kernel>,
    few: Arc<Kernel>,
    large: Arc<Kernel>,
}

impl Unpermute {
    /// Compiles (or loads) the kernel: the warm-up, after which nothing compiles.
    ///
    /// # Errors
    /// As [`UnpermuteConfig::source`]; [`Error::Kernel`] if it does not compile, [`Error::Cuda`].
    pub fn prepare(device: &Device, config: UnpermuteConfig) -> Result<Self> {
        let source = config.source()?;
        let many = device.kernel(&source, c"unpermute")?;
        let few = device.kernel(&source, c"unpermute_few")?;
        let large = device.kernel(&source, c"unpermute_large")?;
        Ok(Self { device: device.clone(), config, many, few, large })
    }

    /// What the kernels take of a multiprocessor: the one for many tokens, the one for few, and the one for more than
    /// a cache holds.
    #[must_use]
    pub fn resources(&self) -> [Resources; 3] {
        [self.many.resources(), self.few.resources(), self.large.resources()]
    }

    /// The kernel for so many tokens, and the steps of a row that a warp of it takes.
    fn kernel(&self, tokens: usize) -> (&Kernel, usize) {
        let UnpermuteConfig { hidden, topk, input, output, .. } = self.config;
        let bytes_of_a_token = hidden.saturating_mul(topk * input.bytes() + output.bytes());
        if topk > SHORT_TOPK && tokens.saturating_mul(topk) <= FEW_SLOTS {
            (&self.few, 1)
        } else if tokens.saturating_mul(bytes_of_a_token) >= LARGE_BYTES {
            (&self.large, 2)
        } else {
            (&self.many, 2)
        }
    }

    /// Queues the launch.
    ///
    /// # Safety
    /// As [`super::Route::launch`].
    ///
    /// # Errors
    /// [`Error::Value`] and [`Error::Stride`] for what does not fit the configuration or the kernel; [`Error::Cuda`].
    #[allow(unsafe_code)]
    pub unsafe fn launch(&self, stream: Stream, call: &UnpermuteCall) -> Result<()> {
        let tokens = require_int("tokens", call.tokens)?;
        let m_sum = require_int("m_sum", call.m_sum)?;
        if tokens == 0 {
            return Ok(());
        }
        let bytes = if self.config.vector() > 1 { 16 } else { 2 };
        call.inv_perm.require_aligned("inv_perm", 4)?;
        call.out.require_aligned("out", bytes)?;
        if m_sum > 0 {
            call.rows.require_aligned("rows", bytes)?;
        }
        let weights = call.weights.unwrap_or_default();
        if self.config.weighted {
            weights.ptr.require_aligned("topk_weights", 4)?;
            require_columns("topk_weights", &weights, self.config.topk)?;
        }
        let arguments = Arguments {
            rows: call.rows.address(),
            inv_perm: call.inv_perm.address(),
            weights: weights.ptr.address(),
            weights_row_stride: weights.row_stride as i64,
            out: call.out.address(),
            tokens,
            m_sum,
        };
        let (kernel, steps_of_a_warp) = self.kernel(call.tokens);
        let steps = self.config.hidden.div_ceil(32 * self.config.vector());
        let warps = checked_mul("warps of a launch", call.tokens, steps.div_ceil(steps_of_a_warp))?;
        let blocks = require_int("blocks of a launch", warps.div_ceil(THREADS as usize / 32))? as u32;
        let shape = Launch { blocks, threads: THREADS, shared_bytes: 0, cooperative: false, overlap: true };
        let pointers = [std::ptr::from_ref(&arguments).cast::<c_void>()];
        // SAFETY: the kernel takes one `UnpermuteArgs`; the rest is the caller's promise.
        unsafe { self.device.launch(kernel, shape, stream, &pointers) }
    }
}
