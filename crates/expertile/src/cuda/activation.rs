//! The activation over live rows, quantized or not.

use super::arguments::require_int;
use super::definitions::{activation_definitions, scale_definitions};
use super::driver::{Device, DevicePtr, Resident, Resources, Source, Stream};
use super::route::{MAX_EXPERTS, require_experts};
use crate::activation::Activation;
use crate::error::{Error, Result};
use crate::quantize::{Group, ScaleFormat, ScaleLayout, ScaleRounding};
use half::bf16;

pub(super) const THREADS: u32 = 768;

/// What the kernel is specialised for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ActivateConfig {
    /// `I`, as [`ScaleFormat::groups`] takes it (a multiple of 16 without scales).
    pub intermediate: usize,
    /// Which activation.
    pub activation: Activation,
    /// The scales of an e4m3 result; without them it is bf16.
    pub format: Option<ScaleFormat>,
}

impl ActivateConfig {
    /// The kernel's source for this configuration.
    ///
    /// # Errors
    /// [`Error::Value`] unless the groups fit `intermediate` (16 divides it, for a bf16 result), [`Error::Name`] for an
    /// activation other than SwiGLU, [`Error::Parameter`] as [`Activation::check`].
    pub fn source(&self) -> Result<Source> {
        const PER_LANE: usize = 16;
        if self.intermediate == 0 || !self.intermediate.is_multiple_of(PER_LANE) {
            return Err(Error::value("intermediate", self.intermediate, "a positive multiple of 16 on a GPU"));
        }
        // Without scales the format's definitions still have to compile; any that fits will do.
        let unused = ScaleFormat::new(Group::G32, ScaleLayout::RowMajor, ScaleRounding::Exact)?;
        let mut definitions = match self.format {
            Some(format) => scale_definitions(format, self.intermediate)?,
            None => scale_definitions(unused, 32)?,
        };
        definitions.extend(activation_definitions(&self.activation)?);
        definitions.extend([
            ("INTERMEDIATE", i64::from(require_int("intermediate", self.intermediate)?)),
            ("GATED", 1),
            ("QUANTIZED", i64::from(self.format.is_some())),
            ("INPUT_F16", 0),
            ("ALIGNED", 1),
            ("HOST_THREADS", i64::from(THREADS)),
            ("HOST_MAX_EXPERTS", MAX_EXPERTS as i64),
        ]);
        Ok(source_with(definitions))
    }
}

/// What one call works on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ActivateCall {
    /// `[M_sum, 2 I]` bf16, 16-byte aligned.
    pub gate_up: DevicePtr<bf16>,
    /// `[E]` i32; with the alignment it says which rows are live.
    pub psum: DevicePtr<i32>,
    /// `[M_sum, I]` e4m3 or bf16, 16-byte aligned.
    pub out: DevicePtr,
    /// Scales as their format says, 16-byte aligned; absent for a bf16 result.
    pub scales: Option<DevicePtr>,
    /// `E`
    pub local_experts: usize,
    /// `A`
    pub alignment: usize,
    /// `M_sum`
    pub m_sum: usize,
}

/// The kernel's `ActivationArgs`.
#[repr(C)]
pub(super) struct Arguments {
    gate_up: u64,
    psum: u64,
    out: u64,
    scales: u64,
    experts: i32,
    alignment: i32,
    m_sum: i32,
    reserved: i32,
}

impl Arguments {
    /// Those of a call, checked; `rows` is the name of what it reads.
    pub(super) fn new(rows: &'static str, quantized: bool, call: &ActivateCall) -> Result<Self> {
        require_experts(call.local_experts)?;
        if call.alignment == 0 {
            return Err(Error::Alignment { actual: 0, expected: "at least 1".into() });
        }
        let m_sum = require_int("m_sum", call.m_sum)?;
        call.psum.require_aligned("psum", 4)?;
        call.gate_up.require_aligned(rows, 16)?;
        call.out.require_aligned("out", 16)?;
        if quantized {
            DevicePtr::require(call.scales, "scales", 16)?;
        }
        Ok(Self {
            gate_up: call.gate_up.address(),
            psum: call.psum.address(),
            out: call.out.address(),
            scales: DevicePtr::or_null(call.scales),
            experts: call.local_experts as i32,
            alignment: require_int("alignment", call.alignment)?,
            m_sum,
            reserved: 0,
        })
    }
}

/// The kernel's text; [`super::QuantizeRows`] is it without the activation.
pub(super) fn source_with(definitions: Vec<(&'static str, i64)>) -> Source {
    Source::new("activation.cu", include_str!("kernels/rows/activation.cu"), definitions)
}

/// The activation, prepared.
#[derive(Debug)]
pub struct Activate {
    config: ActivateConfig,
    kernel: Resident,
}

impl Activate {
    /// Compiles (or loads) the kernel: the warm-up, after which nothing compiles.
    ///
    /// # Errors
    /// As [`ActivateConfig::source`]; [`Error::Kernel`] if it does not compile, [`Error::Cuda`].
    pub fn prepare(device: &Device, config: ActivateConfig) -> Result<Self> {
        Ok(Self { config, kernel: Resident::prepare(device, &config.source()?, c"activation", THREADS)? })
    }

    /// What the kernel takes of a multiprocessor.
    #[must_use]
    pub fn resources(&self) -> Resources {
        self.kernel.resources()
    }

    /// Queues the launch: live rows of `out`, their scales, zeros in the padding's scales. Padding rows are untouched.
    ///
    /// # Safety
    /// As [`super::Route::launch`].
    ///
    /// # Errors
    /// [`Error::Value`] and [`Error::Alignment`] for what does not fit the configuration or the kernel;
    /// [`Error::Cuda`].
    #[allow(unsafe_code)]
    pub unsafe fn launch(&self, stream: Stream, call: &ActivateCall) -> Result<()> {
        let arguments = Arguments::new("gate_up", self.config.format.is_some(), call)?;
        // SAFETY: the kernel takes one `ActivationArgs`; the rest is the caller's promise.
        unsafe { self.kernel.launch(stream, &arguments) }
    }
}
