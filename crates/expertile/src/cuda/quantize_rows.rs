//! Rows in their places, quantized as they are: what a dispatcher delivers in 16 bits, for GEMMs of e4m3 rows.

use super::activation::{ActivateCall, Arguments, THREADS, source_with};
use super::arguments::require_int;
use super::definitions::{half_number, scale_definitions};
use super::driver::{Device, DevicePtr, Resident, Resources, Source, Stream};
use super::route::MAX_EXPERTS;
use crate::dtype::Dtype;
#[cfg(doc)]
use crate::error::Error;
use crate::error::Result;
use crate::quantize::ScaleFormat;

/// What the kernel is specialised for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QuantizeRowsConfig {
    /// `H`, as [`ScaleFormat::groups`] takes it.
    pub hidden: usize,
    /// Type of the rows: [`Dtype::Bf16`] or [`Dtype::F16`].
    pub input: Dtype,
    /// The scales.
    pub format: ScaleFormat,
}

impl QuantizeRowsConfig {
    /// The kernel's source for this configuration.
    ///
    /// # Errors
    /// [`Error::Value`] unless the groups fit `hidden`, [`Error::Dtype`] unless rows are bf16 or f16.
    pub fn source(&self) -> Result<Source> {
        let mut definitions = scale_definitions(self.format, self.hidden)?;
        definitions.extend([
            ("INTERMEDIATE", i64::from(require_int("hidden", self.hidden)?)),
            ("GATED", 0),
            ("QUANTIZED", 1),
            ("INPUT_F16", half_number("rows", self.input)?),
            ("ALIGNED", 1),
            ("HOST_THREADS", i64::from(THREADS)),
            ("HOST_MAX_EXPERTS", MAX_EXPERTS as i64),
        ]);
        Ok(source_with(definitions))
    }
}

/// What one call works on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct QuantizeRowsCall {
    /// `[M_sum, H]` bf16 or f16, 16-byte aligned.
    pub rows: DevicePtr,
    /// `[E]` i32; with the alignment it says which rows are live.
    pub psum: DevicePtr<i32>,
    /// `[M_sum, H]` e4m3, 16-byte aligned.
    pub out: DevicePtr,
    /// Scales as their format says, 16-byte aligned.
    pub scales: DevicePtr,
    /// `E`
    pub local_experts: usize,
    /// `A`
    pub alignment: usize,
    /// `M_sum`
    pub m_sum: usize,
}

/// Quantizing rows in their places, prepared.
#[derive(Debug)]
pub struct QuantizeRows {
    kernel: Resident,
}

impl QuantizeRows {
    /// Compiles (or loads) the kernel: the warm-up, after which nothing compiles.
    ///
    /// # Errors
    /// As [`QuantizeRowsConfig::source`]; [`Error::Kernel`] if it does not compile, [`Error::Cuda`].
    pub fn prepare(device: &Device, config: QuantizeRowsConfig) -> Result<Self> {
        Ok(Self { kernel: Resident::prepare(device, &config.source()?, c"activation", THREADS)? })
    }

    /// What the kernel takes of a multiprocessor.
    #[must_use]
    pub fn resources(&self) -> Resources {
        self.kernel.resources()
    }

    /// Queues the launch: live rows of `out`, their scales, zeros in the padding's scales. Padding rows are neither read
    /// nor written.
    ///
    /// # Safety
    /// As [`super::Route::launch`].
    ///
    /// # Errors
    /// [`Error::Value`] and [`Error::Alignment`] for what does not fit the kernel; [`Error::Cuda`].
    #[allow(unsafe_code)]
    pub unsafe fn launch(&self, stream: Stream, call: &QuantizeRowsCall) -> Result<()> {
        let QuantizeRowsCall { rows, psum, out, scales, local_experts, alignment, m_sum } = *call;
        let (gate_up, scales) = (rows.cast(), Some(scales));
        let call = ActivateCall { gate_up, psum, out, scales, local_experts, alignment, m_sum };
        let arguments = Arguments::new("rows", true, &call)?;
        // SAFETY: the kernel takes one `ActivationArgs`; the rest is the caller's promise.
        unsafe { self.kernel.launch(stream, &arguments) }
    }
}
