//! MXFP4 weights on the device: in place, copied there, and arranged once for the GEMM, as int4 weights are.

use super::{Weights, WeightsBuilder, check_sizes};
use crate::cuda::arguments::require_int;
use crate::cuda::driver::{Device, DeviceBuffer, DevicePtr, Resident, Source, Stream};
use crate::error::{Error, Result, checked_mul, require_exact};
use crate::gemm::{ActivationFormat, WeightFormat};
use crate::matrix::MatrixRef;
use crate::mxfp4::{NAN_SCALE, groups};
use std::sync::Arc;

/// A unit: what a warpgroup multiplies at once. The kernels' own are in kernels/groups/mxfp4.cuh.
pub(in crate::cuda) const UNIT_OUTPUTS: usize = 64;
pub(in crate::cuda) const UNIT_K: usize = 64;

pub(super) const THREADS: u32 = 256;

/// Bytes of a unit: values, and scales of one byte, or of int4 two.
pub(in crate::cuda) fn unit_bytes(format: WeightFormat) -> usize {
    let scale = if format == WeightFormat::Int4 { 2 } else { 1 };
    UNIT_OUTPUTS * (UNIT_K / 2 + UNIT_K / 32 * scale)
}

/// Bytes of the units of `[E, N, K]`.
pub(super) fn units_bytes(format: WeightFormat, (experts, n, k): (usize, usize, usize)) -> usize {
    experts * n.div_ceil(UNIT_OUTPUTS) * k.div_ceil(UNIT_K) * unit_bytes(format)
}

/// How arranged weights stand in memory.
#[derive(Debug, Clone, Copy)]
pub(in crate::cuda) struct Arranged {
    /// For rows of which format.
    pub(in crate::cuda) activation_format: ActivationFormat,
    /// `[E, N]`, N rounded up to 64: of a row's largest scale. Absent for int4.
    pub(in crate::cuda) exponents: Option<DevicePtr>,
    /// `[E, N / 64]`, rounded up: 1 where scales are too far apart to be folded in. Absent where none are, and for int4.
    pub(in crate::cuda) spread: Option<DevicePtr>,
}

/// The parts of arranged mxfp4 weights, one behind the other.
#[derive(Debug, Clone, Copy)]
struct Parts {
    exponents: usize,
    spread: usize,
    end: usize,
}

impl Parts {
    /// Where those of `[E, N, K]` begin, in bytes.
    fn new(experts: usize, n: usize, k: usize) -> Self {
        let slabs = experts * n.div_ceil(UNIT_OUTPUTS);
        let exponents = units_bytes(WeightFormat::Mxfp4, (experts, n, k));
        let spread = exponents + slabs * UNIT_OUTPUTS;
        Self { exponents, spread, end: spread + slabs }
    }
}

impl Arranged {
    /// Those of weights whose first expert is another one of `[E, N, K]`.
    pub(super) fn of_experts_from(self, expert: usize, n: usize) -> Self {
        let slabs = expert * n.div_ceil(UNIT_OUTPUTS);
        Self {
            exponents: self.exponents.map(|exponents| exponents.byte_add(slabs * UNIT_OUTPUTS)),
            spread: self.spread.map(|spread| spread.byte_add(slabs)),
            ..self
        }
    }
}

/// Bytes of arranged `[E, N, K]`, mxfp4 or int4.
pub(super) fn bytes(format: WeightFormat, (experts, n, k): (usize, usize, usize)) -> usize {
    if format == WeightFormat::Int4 { units_bytes(format, (experts, n, k)) } else { Parts::new(experts, n, k).end }
}

/// The kernel's `ArrangeArgs`.
#[repr(C)]
struct Arguments {
    blocks: u64,
    scales: u64,
    packed: u64,
    exponents: u64,
    spread: u64,
    report: u64,
    experts: i32,
    n: i32,
    k: i32,
    reserved: i32,
}

/// The kernel's `UnpackArgs`.
#[repr(C)]
struct UnpackArguments {
    packed: u64,
    exponents: u64,
    spread: u64,
    blocks: u64,
    scales: u64,
    experts: i32,
    n: i32,
    k: i32,
    reserved: i32,
}

impl Weights {
    /// MXFP4 weights that are in device memory already: `blocks [E, N, K / 2]` on 16 bytes and `scales [E, N, K / 32]`,
    /// as checkpoints have them. They are read in place, when they are arranged.
    ///
    /// # Safety
    /// As [`Weights::from_device`]; once they are arranged, nothing reads them any more.
    ///
    /// # Errors
    /// [`Error::Value`] if `n` is not a multiple of 8, `k` not one of 32, an address is not aligned, or there are no
    /// experts; [`Error::Overflow`].
    #[allow(unsafe_code)]
    pub unsafe fn from_device_mxfp4(
        (experts, n, k): (usize, usize, usize),
        blocks: DevicePtr,
        scales: DevicePtr,
    ) -> Result<Self> {
        check(experts, n, k)?;
        blocks.require_aligned("blocks", 16)?;
        scales.require_aligned("scales", 1)?;
        Ok(Self::new(WeightFormat::Mxfp4, (experts, n, k), blocks, Some(scales), Arc::from([])))
    }

    /// MXFP4 weights, `blocks [E, N, K / 2]` and `scales [E, N, K / 32]`, that are in buffers already; the value owns
    /// them, and frees them when it is arranged.
    ///
    /// # Errors
    /// As [`Weights::from_device_mxfp4`]; [`Error::BufferTooSmall`], [`Error::Device`] for buffers of two devices.
    pub fn from_mxfp4_buffers(
        blocks: DeviceBuffer,
        scales: DeviceBuffer,
        (experts, n, k): (usize, usize, usize),
    ) -> Result<Self> {
        check(experts, n, k)?;
        blocks.require("blocks", scales.device(), experts * n * k / 2)?;
        scales.require("scales", blocks.device(), experts * n * groups(k)?)?;
        Ok(Self::of_buffers(WeightFormat::Mxfp4, (experts, n, k), blocks, scales))
    }

    /// Copies MXFP4 weights, `blocks [E, N, K / 2]` and `scales [E, N, K / 32]`, to the device.
    ///
    /// # Errors
    /// As [`Weights::from_device_mxfp4`]; [`Error::Shape`] for another number of blocks or scales, [`Error::Value`] for
    /// a scale of 255, which is NaN, [`Error::Cuda`].
    pub fn upload_mxfp4(
        device: &Device,
        blocks: &[u8],
        scales: &[u8],
        (experts, n, k): (usize, usize, usize),
    ) -> Result<Self> {
        let mut builder = WeightsBuilder::new(device, WeightFormat::Mxfp4, (experts, n, k))?;
        let groups = groups(k)?;
        require_exact("blocks", blocks.len(), &[experts, n, k / 2])?;
        require_exact("scales", scales.len(), &[experts, n, groups])?;
        let parts = blocks.chunks_exact(n * k / 2).zip(scales.chunks_exact(n * groups));
        for (expert, (blocks, scales)) in parts.enumerate() {
            builder.add_mxfp4_rows(expert, 0, MatrixRef::new(blocks, n, k / 2)?, MatrixRef::new(scales, n, groups)?)?;
        }
        builder.finish()
    }

    /// The weights as the GEMM reads them, for rows of that format: mxfp4 and int4 are arranged anew, in memory of their
    /// own (4.25 and 4.5 bits to a weight where 64 divides N and K); what this value owned is freed. Others stay as
    /// they are.
    ///
    /// A layer does this when it is prepared; only a GEMM alone wants it done before. Waits for the device.
    ///
    /// # Errors
    /// [`Error::WeightFormat`] if they are arranged for rows of the other format; [`Error::Value`] for a scale that is
    /// no number; [`Error::Kernel`] if the kernel does not compile, [`Error::Cuda`].
    pub fn arrange(self, device: &Device, activation_format: ActivationFormat) -> Result<Self> {
        if self.is_ready_for(activation_format)? {
            return Ok(self);
        }
        let memory: DeviceBuffer = device.allocate(bytes(self.format, (self.experts, self.n, self.k)))?;
        #[allow(unsafe_code)]
        // SAFETY: the memory is as large as asked for, and the value that comes back owns it.
        let arranged = unsafe { self.arrange_in(device, Stream(0), activation_format, memory.ptr())? };
        Ok(Self { _memory: Arc::from([memory]), ..arranged })
    }

    /// Bytes that weights `[E, N, K]` of mxfp4 or int4 take when they are arranged.
    ///
    /// # Errors
    /// As [`Weights::from_device_mxfp4`]; [`Error::WeightFormat`] for another format, which is not arranged.
    pub fn arranged_bytes(format: WeightFormat, (experts, n, k): (usize, usize, usize)) -> Result<usize> {
        match format {
            WeightFormat::Mxfp4 => check(experts, n, k)?,
            WeightFormat::Int4 => super::int4::check(experts, n, k)?,
            WeightFormat::E4m3 | WeightFormat::Bf16 => {
                let (argument, actual) = ("format", format.name());
                return Err(Error::WeightFormat { argument, actual, expected: "mxfp4 or int4" });
            }
        }
        Ok(bytes(format, (experts, n, k)))
    }

    /// As [`Weights::arrange`], in the caller's memory: [`Weights::arranged_bytes`], on 128 bytes. Waits for the stream.
    /// Weights that need no arranging stay as they are, and the memory is not touched.
    ///
    /// # Safety
    /// The memory is that large, nobody else uses it when the stream comes to it, and it outlives every launch that
    /// takes the value. `stream` is a live stream of the device (or 0).
    ///
    /// # Errors
    /// As [`Weights::arrange`]; [`Error::Value`] unless the memory is aligned.
    #[allow(unsafe_code)]
    pub unsafe fn arrange_in(
        self,
        device: &Device,
        stream: Stream,
        activation_format: ActivationFormat,
        memory: DevicePtr,
    ) -> Result<Self> {
        if self.is_ready_for(activation_format)? {
            return Ok(self);
        }
        memory.require_aligned("memory", 128)?;
        if self.format == WeightFormat::Int4 {
            // SAFETY: the caller's promise.
            return unsafe { self.arrange_int4_in(device, stream, activation_format, memory) };
        }
        let Self { experts, n, k, .. } = self;
        let parts = Parts::new(experts, n, k);
        let (exponents, spread) = (memory.byte_add(parts.exponents), memory.byte_add(parts.spread));
        let report = device.upload(&[0u32; 2])?;
        let arguments = Arguments {
            blocks: self.values.address(),
            scales: DevicePtr::or_null(self.scales),
            packed: memory.address(),
            exponents: exponents.address(),
            spread: spread.address(),
            report: report.ptr().address(),
            experts: require_int("experts", experts)?,
            n: require_int("n", n)?,
            k: require_int("k", k)?,
            reserved: 0,
        };
        let kernel = Resident::prepare(device, &source(activation_format), c"arrange", THREADS)?;
        let mut words = [0u32; 2];
        // SAFETY: the kernel takes one `ArrangeArgs`; the memory is as large as it writes, by the caller's promise, and
        // the report lives until it has come, for which the host waits. The weights' memory is the promise of who made
        // the value, or this value's.
        unsafe {
            kernel.launch(stream, &arguments)?;
            device.read(stream, report.ptr().cast(), bytemuck::cast_slice_mut(&mut words))?;
        }
        let [any_spread, complement] = words;
        if complement != 0 {
            let (row, expert) = (!complement as usize % n, !complement as usize / n);
            let expected = format!("at most 254, as 255 is NaN: one of row {row} of expert {expert}");
            return Err(Error::value("scales", usize::from(NAN_SCALE), expected));
        }
        let spread = (any_spread != 0).then_some(spread);
        let arranged = Arranged { activation_format, exponents: Some(exponents), spread };
        Ok(Self { values: memory, scales: None, arranged: Some(arranged), _memory: Arc::from([]), ..self })
    }

    /// Queues what arranged weights were made of: `blocks [E, N, K / 2]` bit for bit, and `scales [E, N, K / 32]` if
    /// asked for. A group of zeros has the largest scale of its output then, as its own is not kept.
    ///
    /// # Safety
    /// Both are device memory of that many bytes, blocks on 4, that nobody else uses when the stream comes to it;
    /// `stream` is a live stream of the device (or 0), and the weights live until it has come that far.
    ///
    /// # Errors
    /// [`Error::WeightFormat`] unless these are arranged mxfp4 weights; [`Error::Value`] unless the addresses are
    /// aligned; [`Error::Kernel`], [`Error::Cuda`].
    #[allow(unsafe_code)]
    pub unsafe fn unpack_mxfp4(
        &self,
        device: &Device,
        stream: Stream,
        blocks: DevicePtr,
        scales: Option<DevicePtr>,
    ) -> Result<()> {
        let Some(arranged) = self.arranged.as_ref().filter(|_| self.format == WeightFormat::Mxfp4) else {
            let actual = if self.format == WeightFormat::Mxfp4 { "mxfp4, not arranged" } else { self.format.name() };
            return Err(Error::WeightFormat { argument: "weights", actual, expected: "arranged mxfp4" });
        };
        blocks.require_aligned("blocks", 4)?;
        if let Some(scales) = scales {
            scales.require_aligned("scales", 1)?;
        }
        let arguments = UnpackArguments {
            packed: self.values.address(),
            exponents: DevicePtr::or_null(arranged.exponents),
            spread: DevicePtr::or_null(arranged.spread),
            blocks: blocks.address(),
            scales: DevicePtr::or_null(scales),
            experts: require_int("experts", self.experts)?,
            n: require_int("n", self.n)?,
            k: require_int("k", self.k)?,
            reserved: 0,
        };
        let kernel = Resident::prepare(device, &source(arranged.activation_format), c"unpack", THREADS)?;
        // SAFETY: the kernel takes one `UnpackArgs`; the rest is the caller's promise.
        unsafe { kernel.launch(stream, &arguments) }
    }

    /// Whether a GEMM over rows of that format reads them as they are; fails if they are arranged for others.
    fn is_ready_for(&self, activation_format: ActivationFormat) -> Result<bool> {
        if self.format.has_groups() && self.arranged.is_none() {
            return Ok(false);
        }
        self.require_arranged(activation_format).map(|_| true)
    }

    /// Whether scales are too far apart to be folded into the decoded values.
    pub(in crate::cuda) fn is_spread(&self) -> bool {
        self.arranged.is_some_and(|arranged| arranged.spread.is_some())
    }

    /// How mxfp4 or int4 is arranged; none for other formats.
    ///
    /// # Errors
    /// [`Error::WeightFormat`] unless it is arranged for rows of that format.
    pub(in crate::cuda) fn require_arranged(&self, activation_format: ActivationFormat) -> Result<Option<&Arranged>> {
        let int4 = match self.format {
            WeightFormat::E4m3 | WeightFormat::Bf16 => return Ok(None),
            WeightFormat::Mxfp4 => false,
            WeightFormat::Int4 => true,
        };
        let actual = match &self.arranged {
            Some(arranged) if arranged.activation_format == activation_format => return Ok(Some(arranged)),
            Some(_) if int4 => "int4 arranged for rows of another format",
            Some(_) => "mxfp4 arranged for rows of another format",
            None if int4 => "int4, not arranged",
            None => "mxfp4, not arranged",
        };
        let expected = match (int4, activation_format) {
            (false, ActivationFormat::E4m3) => "mxfp4 arranged for e4m3 rows",
            (false, ActivationFormat::Bf16) => "mxfp4 arranged for bf16 rows",
            (true, ActivationFormat::E4m3) => "int4 arranged for e4m3 rows",
            (true, ActivationFormat::Bf16) => "int4 arranged for bf16 rows",
        };
        Err(Error::WeightFormat { argument: "weights", actual, expected })
    }
}

/// The source of the kernels that arrange for rows of that format, and unpack.
pub(in crate::cuda) fn source(activation_format: ActivationFormat) -> Source {
    let bf16 = i64::from(activation_format == ActivationFormat::Bf16);
    let definitions = vec![("HOST_BF16", bf16), ("HOST_THREADS", i64::from(THREADS)), ("HOST_INT4", 0)];
    Source::new("arrange_mxfp4.cu", include_str!("../kernels/gemm/arrange_mxfp4.cu"), definitions)
}

fn check(experts: usize, n: usize, k: usize) -> Result<()> {
    check_sizes(experts, n, k)?;
    groups(k)?;
    // The report counts rows in 32 bits.
    require_int("rows of the weights", checked_mul("rows of the weights", experts, n)?).map(|_| ())
}
