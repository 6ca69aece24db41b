//! Rows to their places as they are, with their scales if they have any.

use super::arguments::{RowsArgs, require_columns, require_int};
use super::call::{LayoutPtrs, RowsPtrs};
use super::definitions::scale_definitions;
use super::driver::{Device, DevicePtr, Resident, Resources, Source, Stream};
use super::route;
use crate::dtype::Dtype;
use crate::error::{Error, Result, checked_mul};
use crate::layout::Padding;
use crate::plan::Plan;
use crate::quantize::ScaleFormat;

const THREADS: u32 = 256;

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

/// What one call works on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PermuteCall {
    /// `M`, `topk`, `E`, the alignment and `M_sum`.
    pub plan: Plan,
    /// Rows, and where they and their scales go.
    pub rows: RowsPtrs,
    /// The plan's layout, written before.
    pub layout: LayoutPtrs,
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
    /// As [`super::Route::launch`]; the lists hold a layout of this plan.
    ///
    /// # Errors
    /// [`Error::Value`] and [`Error::Stride`] for what does not fit the configuration; [`Error::Cuda`].
    #[allow(unsafe_code)]
    pub unsafe fn launch(&self, stream: Stream, PermuteCall { plan, rows, layout }: &PermuteCall) -> Result<()> {
        if plan.topk() != self.config.topk {
            return Err(Error::value("topk", plan.topk(), format!("{}, as prepared", self.config.topk)));
        }
        let vector = self.config.vector_bytes()?;
        if plan.tokens() > 0 {
            require_columns("x", &rows.x, self.config.hidden)?;
            rows.x.ptr.require_aligned("x", vector as u64)?;
            if self.config.scales.is_some() {
                rows.x_scales.unwrap_or_default().ptr.require_aligned("x_scales", 1)?;
            }
        }
        if plan.m_sum() > 0 {
            rows.out.require_aligned("out", vector as u64)?;
            if self.config.scales.is_some() {
                DevicePtr::require(rows.scales, "scales", 16)?;
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
