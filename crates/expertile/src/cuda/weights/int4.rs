//! int4 weights on the device: in place, copied there, and arranged once for the GEMM.

use super::mxfp4::{Arranged, THREADS};
use super::{Weights, WeightsBuilder, check_sizes, copy_bytes, elements};
use crate::cuda::arguments::require_int;
use crate::cuda::driver::{Device, DevicePtr, Resident, Source, Stream};
use crate::dtype::Dtype;
use crate::error::{Error, Result, checked_mul, require_exact};
use crate::gemm::{ActivationFormat, WeightFormat};
use crate::int4::{Int4Scales, groups};
use crate::matrix::MatrixRef;
use std::sync::Arc;

/// Bytes of a scale.
const SCALE_BYTES: usize = 2;

/// The kernel's `ArrangeArgs`.
#[repr(C)]
struct Arguments {
    blocks: u64,
    scales: u64,
    packed: u64,
    report: u64,
    experts: i32,
    n: i32,
    k: i32,
    f16_scales: i32,
}

/// The kernel's `UnpackArgs`.
#[repr(C)]
struct UnpackArguments {
    packed: u64,
    blocks: u64,
    scales: u64,
    experts: i32,
    n: i32,
    k: i32,
    reserved: i32,
}

impl Weights {
    /// int4 weights that are in device memory already: `blocks [E, N, K / 2]` on 16 bytes and `scales [E, N, K / 32]`, of
    /// `scale_type` bf16 or f16: see [`crate::int4`]. They are read in place, when they are arranged.
    ///
    /// # Safety
    /// As [`Weights::from_device`]; once they are arranged, nothing reads them any more.
    ///
    /// # Errors
    /// As [`Weights::from_device_mxfp4`]; [`Error::Dtype`] for scales of another type.
    #[allow(unsafe_code)]
    pub unsafe fn from_device_int4(
        (experts, n, k): (usize, usize, usize),
        blocks: DevicePtr,
        (scale_type, scales): (Dtype, DevicePtr),
    ) -> Result<Self> {
        check(experts, n, k)?;
        let f16_scales = match scale_type {
            Dtype::Bf16 => false,
            Dtype::F16 => true,
            actual => return Err(Error::Dtype { argument: "scales", actual, expected: "bf16 or f16" }),
        };
        blocks.require_aligned("blocks", 16)?;
        scales.require_aligned("scales", SCALE_BYTES as u64)?;
        let weights = Self::new(WeightFormat::Int4, (experts, n, k), blocks, Some(scales), Arc::from([]));
        Ok(Self { f16_scales, ..weights })
    }

    /// Copies int4 weights, `blocks [E, N, K / 2]` with `scales [E * N, K / 32]`, to the device.
    ///
    /// # Errors
    /// As [`Weights::from_device_int4`]; [`Error::Shape`] for another number of blocks or scales, [`Error::Value`] for
    /// a scale that is not finite, [`Error::Cuda`].
    pub fn upload_int4(
        device: &Device,
        blocks: &[u8],
        scales: Int4Scales<'_>,
        (experts, n, k): (usize, usize, usize),
    ) -> Result<Self> {
        let mut builder = WeightsBuilder::new(device, WeightFormat::Int4, (experts, n, k))?;
        require_exact("blocks", blocks.len(), &[experts, n, k / 2])?;
        scales.check(experts * n, groups(k)?, 0)?;
        for (expert, blocks) in blocks.chunks_exact(n * k / 2).enumerate() {
            builder.add_int4_rows(expert, 0, MatrixRef::new(blocks, n, k / 2)?, scales.every(expert * n, 1, n))?;
        }
        builder.finish()
    }

    /// Whether their scales are f16.
    pub(in crate::cuda) fn has_f16_scales(&self) -> bool {
        self.f16_scales
    }

    /// [`Weights::arrange_in`] of int4 weights, in memory that is aligned.
    ///
    /// # Safety
    /// As [`Weights::arrange_in`].
    #[allow(unsafe_code)]
    pub(super) unsafe fn arrange_int4_in(
        self,
        device: &Device,
        stream: Stream,
        activation_format: ActivationFormat,
        memory: DevicePtr,
    ) -> Result<Self> {
        let Self { experts, n, k, f16_scales, .. } = self;
        let report = device.upload(&[0u64; 1])?;
        let arguments = Arguments {
            blocks: self.values.address(),
            scales: DevicePtr::or_null(self.scales),
            packed: memory.address(),
            report: report.ptr().address(),
            experts: require_int("experts", experts)?,
            n: require_int("n", n)?,
            k: require_int("k", k)?,
            f16_scales: i32::from(f16_scales),
        };
        let kernel = Resident::prepare(device, &source(activation_format), c"arrange", THREADS)?;
        let mut complement = [0u64; 1];
        // SAFETY: the kernel takes one `ArrangeArgs`; the memory is as large as it writes, by the caller's promise, and
        // the report lives until it has come, for which the host waits. The weights' memory is the promise of who made
        // the value, or this value's.
        unsafe {
            kernel.launch(stream, &arguments)?;
            device.read(stream, report.ptr().cast(), bytemuck::cast_slice_mut(&mut complement))?;
        }
        if complement != [0] {
            let (row, bits) = ((!complement[0] >> 16) as usize, !complement[0] as u16);
            let (name, row, expert) = (if f16_scales { "f16" } else { "bf16" }, row % n, row / n);
            let expected = format!("the bits of a finite {name}: one of row {row} of expert {expert} is none");
            return Err(Error::value("scales", bits.into(), expected));
        }
        let arranged = Arranged { activation_format, exponents: None, spread: None };
        Ok(Self { values: memory, scales: None, arranged: Some(arranged), _memory: Arc::from([]), ..self })
    }

    /// Queues what arranged weights were made of, bit for bit: `blocks [E, N, K / 2]`, and `scales [E, N, K / 32]` of
    /// their own type if asked for.
    ///
    /// # Safety
    /// As [`Weights::unpack_mxfp4`].
    ///
    /// # Errors
    /// [`Error::WeightFormat`] unless these are arranged int4 weights; [`Error::Value`] unless the addresses are
    /// aligned; [`Error::Kernel`], [`Error::Cuda`].
    #[allow(unsafe_code)]
    pub unsafe fn unpack_int4(
        &self,
        device: &Device,
        stream: Stream,
        blocks: DevicePtr,
        scales: Option<DevicePtr>,
    ) -> Result<()> {
        let Some(arranged) = self.arranged.as_ref().filter(|_| self.format == WeightFormat::Int4) else {
            let actual = if self.format == WeightFormat::Int4 { "int4, not arranged" } else { self.format.name() };
            return Err(Error::WeightFormat { argument: "weights", actual, expected: "arranged int4" });
        };
        blocks.require_aligned("blocks", 4)?;
        if let Some(scales) = scales {
            scales.require_aligned("scales", SCALE_BYTES as u64)?;
        }
        let arguments = UnpackArguments {
            packed: self.values.address(),
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
}

impl WeightsBuilder {
    /// Copies rows of int4, `blocks [R, K / 2]` with `scales [R, K / 32]`, as rows `first_row..first_row + R` of an
    /// expert: see [`crate::int4`]. All scales of the weights are of one type.
    ///
    /// # Errors
    /// As [`WeightsBuilder::add_mxfp4_rows`]; [`Error::Value`] for a scale that is not finite,
    /// [`Error::WeightFormat`] for scales of another type than those before.
    pub fn add_int4_rows(
        &mut self,
        expert: usize,
        first_row: usize,
        blocks: MatrixRef<'_, u8>,
        scales: Int4Scales<'_>,
    ) -> Result<()> {
        self.ledger.require_format(WeightFormat::Int4)?;
        let Weights { n, k, .. } = self.weights;
        let (rows, groups) = (blocks.rows(), groups(k)?);
        blocks.require_shape("blocks", rows, k / 2)?;
        scales.check(rows, groups, first_row)?;
        let are_f16 = matches!(scales, Int4Scales::F16(_));
        if self.f16_scales.is_some_and(|before| before != are_f16) {
            let expected = if are_f16 { "bf16, as those before" } else { "f16, as those before" };
            return Err(Error::WeightFormat { argument: "scales", actual: scales.name(), expected });
        }
        self.ledger.add(expert, first_row, rows, k)?;
        self.f16_scales = Some(are_f16);
        self.weights.f16_scales = are_f16;
        let start = expert * n + first_row;
        if let Some(buffer) = &self.scales {
            let bits: Vec<u16> = match scales {
                Int4Scales::Bf16(scales) => elements(scales).map(half::bf16::to_bits).collect(),
                Int4Scales::F16(scales) => elements(scales).map(half::f16::to_bits).collect(),
            };
            buffer.upload_at(SCALE_BYTES * start * groups, &bits)?;
        }
        copy_bytes(&self.values, start * (k / 2), blocks)
    }
}

/// The source of the kernels that arrange for rows of that format, and unpack.
pub(in crate::cuda) fn source(activation_format: ActivationFormat) -> Source {
    let bf16 = i64::from(activation_format == ActivationFormat::Bf16);
    let definitions = vec![("HOST_BF16", bf16), ("HOST_THREADS", i64::from(THREADS)), ("HOST_INT4", 1)];
    Source::new("arrange_int4.cu", include_str!("../kernels/gemm/arrange_int4.cu"), definitions)
}

pub(super) fn check(experts: usize, n: usize, k: usize) -> Result<()> {
    check_sizes(experts, n, k)?;
    groups(k)?;
    // The report counts rows in 32 bits.
    require_int("rows of the weights", checked_mul("rows of the weights", experts, n)?).map(|_| ())
}
