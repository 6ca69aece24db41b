//! MXFP4 weights on the device: in place, copied there, and arranged once for the GEMM.

use super::{Weights, WeightsBuilder, check_sizes};
use crate::cuda::arguments::require_int;
use crate::cuda::driver::{Device, DeviceBuffer, DevicePtr, Resident, Source, Stream};
use crate::error::{Error, Result, require_exact};
use crate::gemm::{ActivationFormat, WeightFormat};
use crate::matrix::MatrixRef;
use crate::mxfp4::{NAN_SCALE, groups};
use std::sync::Arc;

/// A unit: what a warpgroup multiplies at once. The kernels' own are in kernels/gemm/mxfp4.cuh.
pub(in crate::cuda) const UNIT_OUTPUTS: usize = 64;
pub(in crate::cuda) const UNIT_K: usize = 64;
pub(in crate::cuda) const UNIT_BYTES: usize = UNIT_OUTPUTS * (UNIT_K / 2 + UNIT_K / 32);

const THREADS: u32 = 256;

/// How arranged weights stand in memory.
#[derive(Debug, Clone, Copy)]
pub(in crate::cuda) struct Arranged {
    /// For rows of which format.
    pub(in crate::cuda) activation_format: ActivationFormat,
    /// `[E, N]`, N rounded up to 64: of a row's largest scale.
    pub(in crate::cuda) exponents: DevicePtr,
    /// `[E, N / 64]`, rounded up: 1 where scales are too far apart to be folded in. Absent where none are.
    pub(in crate::cuda) spread: Option<DevicePtr>,
}

impl Arranged {
    /// Bytes of `[E, N, K]`.
    pub(super) fn bytes(&self, experts: usize, n: usize, k: usize) -> usize {
        let slabs = experts * n.div_ceil(UNIT_OUTPUTS);
        slabs * (k.div_ceil(UNIT_K) * UNIT_BYTES + UNIT_OUTPUTS + 1)
    }
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

    /// The weights as the GEMM reads them, for rows of that format: mxfp4 is arranged anew, in memory of its own
    /// (4.25 bits to a weight where 64 divides N and K); what this value owned is freed. Others stay as they are.
    ///
    /// A layer does this when it is prepared; only a GEMM alone wants it done before. Waits for the device.
    ///
    /// # Errors
    /// [`Error::WeightFormat`] if they are arranged for rows of the other format; [`Error::Value`] for a scale of 255;
    /// [`Error::Kernel`] if the kernel does not compile, [`Error::Cuda`].
    pub fn arrange(self, device: &Device, activation_format: ActivationFormat) -> Result<Self> {
        if self.format != WeightFormat::Mxfp4 || self.require_arranged(activation_format).is_ok() {
            return Ok(self);
        }
        if self.arranged.is_some() {
            self.require_arranged(activation_format)?;
        }
        let Self { experts, n, k, .. } = self;
        let slabs = experts * n.div_ceil(UNIT_OUTPUTS);
        let packed: DeviceBuffer = device.allocate(slabs * k.div_ceil(UNIT_K) * UNIT_BYTES)?;
        let exponents: DeviceBuffer = device.allocate(slabs * UNIT_OUTPUTS)?;
        let spread: DeviceBuffer = device.allocate(slabs)?;
        let report = device.upload(&[0u32; 2])?;
        let arguments = Arguments {
            blocks: self.values.address(),
            scales: DevicePtr::or_null(self.scales),
            packed: packed.ptr().address(),
            exponents: exponents.ptr().address(),
            spread: spread.ptr().address(),
            report: report.ptr().address(),
            experts: require_int("experts", experts)?,
            n: require_int("n", n)?,
            k: require_int("k", k)?,
            reserved: 0,
        };
        let kernel = Resident::prepare(device, &source(activation_format), c"arrange", THREADS)?;
        // SAFETY: the kernel takes one `ArrangeArgs`; the buffers are as large as it writes, and live until the report
        // has come, for which the host waits. The weights' memory is the caller's promise, or this value's.
        #[allow(unsafe_code)]
        unsafe {
            kernel.launch(Stream(0), &arguments)?;
        }
        let mut words = [0; 2];
        report.download(&mut words)?;
        let [any_spread, complement] = words;
        if complement != 0 {
            let (row, expert) = (!complement as usize % n, !complement as usize / n);
            let expected = format!("at most 254, as 255 is NaN: one of row {row} of expert {expert}");
            return Err(Error::value("scales", usize::from(NAN_SCALE), expected));
        }
        let arranged =
            Arranged { activation_format, exponents: exponents.ptr(), spread: (any_spread != 0).then(|| spread.ptr()) };
        let values = packed.ptr();
        let memory = Arc::from([packed, exponents, spread]);
        let format = WeightFormat::Mxfp4;
        Ok(Self { format, experts, n, k, values, scales: None, arranged: Some(arranged), _memory: memory })
    }

    /// How mxfp4 is arranged; none for other formats.
    ///
    /// # Errors
    /// [`Error::WeightFormat`] unless it is arranged for rows of that format.
    pub(in crate::cuda) fn require_arranged(&self, activation_format: ActivationFormat) -> Result<Option<&Arranged>> {
        if self.format != WeightFormat::Mxfp4 {
            return Ok(None);
        }
        let expected = match activation_format {
            ActivationFormat::E4m3 => "mxfp4 arranged for e4m3 rows",
            ActivationFormat::Bf16 => "mxfp4 arranged for bf16 rows",
        };
        match &self.arranged {
            Some(arranged) if arranged.activation_format == activation_format => Ok(Some(arranged)),
            Some(_) => {
                let actual = "mxfp4 arranged for rows of another format";
                Err(Error::WeightFormat { argument: "weights", actual, expected })
            }
            None => Err(Error::WeightFormat { argument: "weights", actual: "mxfp4, not arranged", expected }),
        }
    }
}

/// The source of the kernel that arranges for rows of that format.
pub(in crate::cuda) fn source(activation_format: ActivationFormat) -> Source {
    let bf16 = i64::from(activation_format == ActivationFormat::Bf16);
    let definitions = vec![("HOST_BF16", bf16), ("HOST_THREADS", i64::from(THREADS))];
    Source::new("arrange_mxfp4.cu", include_str!("../kernels/gemm/arrange_mxfp4.cu"), definitions)
}

fn check(experts: usize, n: usize, k: usize) -> Result<()> {
    check_sizes(experts, n, k)?;
    groups(k)?;
    // The report counts rows in 32 bits.
    require_int("rows of the weights", experts * n).map(|_| ())
}
