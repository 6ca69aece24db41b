//! An expert layer's weights in device memory, knowing what they are.

use super::driver::{Device, DeviceBuffer, DevicePtr, Source};
use crate::dtype::{Dtype, E4m3, Float};
use crate::error::{Error, Result, checked_mul, require_exact, require_len};
use crate::gemm::{ActivationFormat, WEIGHT_BLOCK, WeightFormat};
use crate::matrix::MatrixRef;
use crate::mxfp4::{GROUP, require_numbers};
use crate::routing::require_experts;
use crate::weights::RowLedger;
use half::bf16;
use std::ops::Range;
use std::sync::Arc;

mod decode;
pub(super) mod int4;
pub(super) mod mxfp4;

use mxfp4::Arranged;

/// Weights `[E, N, K]` in device memory: row-major, with their scales unless they are bf16. The GEMM reads e4m3 and bf16
/// as they are, mxfp4 and int4 once they are [arranged](Weights::arrange). Cheap to clone: clones share the memory.
#[derive(Debug, Clone)]
pub struct Weights {
    format: WeightFormat,
    experts: usize,
    n: usize,
    k: usize,
    values: DevicePtr,
    /// f32 of e4m3, bytes of mxfp4, bf16 or f16 of int4.
    scales: Option<DevicePtr>,
    /// Whether scales are f16, which only those of int4 may be.
    f16_scales: bool,
    /// mxfp4 or int4 as the GEMM reads it: `values` is the address of all, and `scales` is none.
    arranged: Option<Arranged>,
    /// The same weights in e4m3, beside mxfp4.
    e4m3_copy: Option<Arc<Weights>>,
    /// What the addresses point into, where this value owns it.
    _memory: Arc<[DeviceBuffer]>,
}

impl Weights {
    /// Weights that are in device memory already: `values [E, N, K]` on 16 bytes; for e4m3, `scales`
    /// `[E, ceil(N / 128), ceil(K / 128)]`, else none.
    ///
    /// # Safety
    /// The memory holds that much, and outlives every launch that takes the value.
    ///
    /// # Errors
    /// [`Error::Value`] if `n` is not a multiple of 8, `k` not one of 16, an address is not aligned, or there are no
    /// experts; [`Error::WeightFormat`] for mxfp4 and int4, which [`Weights::from_device_mxfp4`] and
    /// [`Weights::from_device_int4`] take; [`Error::Overflow`] if the scales would pass 2^31.
    #[allow(unsafe_code)]
    pub unsafe fn from_device(
        format: WeightFormat,
        (experts, n, k): (usize, usize, usize),
        values: DevicePtr,
        scales: Option<DevicePtr<f32>>,
    ) -> Result<Self> {
        require_whole_bytes(format)?;
        check_sizes(experts, n, k)?;
        values.require_aligned("values", 16)?;
        if format == WeightFormat::E4m3 {
            DevicePtr::require(scales, "scales", 4)?;
        }
        Ok(Self::new(format, (experts, n, k), values, scales.map(DevicePtr::cast), Arc::from([])))
    }

    /// bf16 weights `[E, N, K]` that are in a buffer already; the value owns it.
    ///
    /// # Errors
    /// As [`Weights::from_device`]; [`Error::BufferTooSmall`] for fewer than `E * N * K` weights.
    pub fn from_bf16_buffer(values: DeviceBuffer<bf16>, (experts, n, k): (usize, usize, usize)) -> Result<Self> {
        check_sizes(experts, n, k)?;
        require_len("values", values.len(), experts * n * k)?;
        let values = values.into_bytes();
        let ptr = values.ptr();
        Ok(Self::new(WeightFormat::Bf16, (experts, n, k), ptr, None, Arc::from([values])))
    }

    /// e4m3 weights `[E, N, K]` and their scales `[E, ceil(N / 128), ceil(K / 128)]` that are in buffers already; the
    /// value owns them.
    ///
    /// # Errors
    /// As [`Weights::from_device`]; [`Error::BufferTooSmall`] for fewer weights or scales; [`Error::Device`] for
    /// buffers of two devices.
    pub fn from_e4m3_buffers(
        values: DeviceBuffer<E4m3>,
        scales: DeviceBuffer<f32>,
        (experts, n, k): (usize, usize, usize),
    ) -> Result<Self> {
        check_sizes(experts, n, k)?;
        require_len("values", values.len(), experts * n * k)?;
        scales.require("scales", values.device(), experts * n.div_ceil(WEIGHT_BLOCK) * k.div_ceil(WEIGHT_BLOCK))?;
        Ok(Self::of_buffers(WeightFormat::E4m3, (experts, n, k), values.into_bytes(), scales.into_bytes()))
    }

    fn new(
        format: WeightFormat,
        (experts, n, k): (usize, usize, usize),
        values: DevicePtr,
        scales: Option<DevicePtr>,
        memory: Arc<[DeviceBuffer]>,
    ) -> Self {
        Self {
            format,
            experts,
            n,
            k,
            values,
            scales,
            f16_scales: false,
            arranged: None,
            e4m3_copy: None,
            _memory: memory,
        }
    }

    fn of_buffers(
        format: WeightFormat,
        sizes: (usize, usize, usize),
        values: DeviceBuffer,
        scales: DeviceBuffer,
    ) -> Self {
        let (ptr, scale_ptr) = (values.ptr(), scales.ptr());
        Self::new(format, sizes, ptr, Some(scale_ptr), Arc::from([values, scales]))
    }

    /// Copies bf16 weights `[E, N, K]` to the device.
    ///
    /// # Errors
    /// As [`Weights::from_device`]; [`Error::Shape`] unless there are `E * N * K` weights, [`Error::Cuda`].
    pub fn upload_bf16(device: &Device, weights: &[bf16], (experts, n, k): (usize, usize, usize)) -> Result<Self> {
        let mut builder = WeightsBuilder::new(device, WeightFormat::Bf16, (experts, n, k))?;
        require_exact("weights", weights.len(), &[experts, n, k])?;
        for (expert, rows) in weights.chunks_exact(n * k).enumerate() {
            builder.add_bf16_rows(expert, 0, MatrixRef::new(rows, n, k)?)?;
        }
        builder.finish()
    }

    /// Copies e4m3 weights `[E, N, K]` and their scales `[E, ceil(N / 128), ceil(K / 128)]` to the device.
    ///
    /// # Errors
    /// As [`Weights::upload_bf16`].
    pub fn upload_e4m3(
        device: &Device,
        weights: &[E4m3],
        weight_scales: &[f32],
        (experts, n, k): (usize, usize, usize),
    ) -> Result<Self> {
        let mut builder = WeightsBuilder::new(device, WeightFormat::E4m3, (experts, n, k))?;
        let [rows, cols] = [n, k].map(|extent| extent.div_ceil(WEIGHT_BLOCK));
        require_exact("weights", weights.len(), &[experts, n, k])?;
        require_exact("weight_scales", weight_scales.len(), &[experts, rows, cols])?;
        let parts = weights.chunks_exact(n * k).zip(weight_scales.chunks_exact(rows * cols));
        for (expert, (values, scales)) in parts.enumerate() {
            let (values, scales) = (MatrixRef::new(values, n, k)?, MatrixRef::new(scales, rows, cols)?);
            builder.add_e4m3_rows(expert, 0, values, scales)?;
        }
        builder.finish()
    }

    /// The sources of the kernels that arrange weights of 4 bits for rows of that format, give them back, and copy them.
    #[must_use]
    pub fn sources(activation_format: ActivationFormat) -> Vec<Source> {
        vec![mxfp4::source(activation_format), int4::source(activation_format), decode::source()]
    }

    /// The weights of some experts, in the same memory.
    pub(super) fn of_experts(&self, experts: Range<usize>) -> Self {
        let (n, k, first) = (self.n, self.k, experts.start);
        let (value_bytes, scale_bytes) = part_bytes(self.format, (first, n, k));
        let mut part = self.clone();
        part.e4m3_copy = self.e4m3_copy.as_ref().map(|copy| Arc::new(copy.of_experts(experts.clone())));
        part.experts = experts.len();
        part.values =
            self.values.byte_add(self.arranged.map_or(value_bytes, |_| mxfp4::units_bytes(self.format, (first, n, k))));
        part.scales = self.scales.map(|scales| scales.byte_add(scale_bytes));
        part.arranged = self.arranged.map(|arranged| arranged.of_experts_from(first, n));
        part
    }

    /// What they are made of.
    #[must_use]
    pub fn format(&self) -> WeightFormat {
        self.format
    }

    /// `E`
    #[must_use]
    pub fn experts(&self) -> usize {
        self.experts
    }

    /// Outputs of an expert.
    #[must_use]
    pub fn n(&self) -> usize {
        self.n
    }

    /// Inputs of an expert.
    #[must_use]
    pub fn k(&self) -> usize {
        self.k
    }

    /// Address of the values; of arranged mxfp4 and int4, that of all.
    #[must_use]
    pub fn values(&self) -> DevicePtr {
        self.values
    }

    /// Address of the scales of e4m3; else none.
    #[must_use]
    pub fn scales(&self) -> Option<DevicePtr<f32>> {
        self.scales.filter(|_| self.format == WeightFormat::E4m3).map(DevicePtr::cast)
    }

    /// Bytes of device memory, scales and a copy in e4m3 included.
    #[must_use]
    pub fn bytes(&self) -> usize {
        let copy = self.e4m3_copy.as_ref().map_or(0, |copy| copy.bytes());
        copy + match &self.arranged {
            Some(_) => mxfp4::bytes(self.format, (self.experts, self.n, self.k)),
            None => {
                let (values, scales) = part_bytes(self.format, (self.experts, self.n, self.k));
                values + scales
            }
        }
    }
}

/// Copies weights that come in parts (expert by expert, gate and up apart) to the device: the host never holds them
/// all.
#[derive(Debug)]
pub struct WeightsBuilder {
    weights: Weights,
    values: DeviceBuffer,
    scales: Option<DeviceBuffer>,
    /// Whether scales of int4 are f16, when some have come.
    f16_scales: Option<bool>,
    ledger: RowLedger,
}

impl WeightsBuilder {
    /// Room for `[E, N, K]` of `format` on the device.
    ///
    /// # Errors
    /// As [`Weights::from_device`]; [`Error::Cuda`] if there is not enough memory.
    pub fn new(device: &Device, format: WeightFormat, (experts, n, k): (usize, usize, usize)) -> Result<Self> {
        check_sizes(experts, n, k)?;
        match format {
            WeightFormat::Mxfp4 => drop(crate::mxfp4::groups(k)?),
            WeightFormat::Int4 => drop(crate::int4::groups(k)?),
            WeightFormat::E4m3 | WeightFormat::Bf16 => {}
        }
        let (value_bytes, scale_bytes) = part_bytes(format, (experts, n, k));
        let values = device.allocate(value_bytes)?;
        let scales = (scale_bytes > 0).then(|| device.allocate(scale_bytes)).transpose()?;
        let scale_ptr = scales.as_ref().map(DeviceBuffer::ptr);
        let weights = Weights::new(format, (experts, n, k), values.ptr(), scale_ptr, Arc::from([]));
        let ledger = RowLedger::new(format, n, k, vec![false; experts * n]);
        Ok(Self { weights, values, scales, f16_scales: None, ledger })
    }

    /// Copies `rows [R, K]`, rounded to the nearest bf16, as rows `first_row..first_row + R` of an expert. Rows of
    /// bf16 that are contiguous are copied as they are, others by way of a copy on the host.
    ///
    /// # Errors
    /// [`Error::WeightFormat`] if this is a builder of e4m3, [`Error::Value`] if there is no such expert,
    /// [`Error::Shape`] if the rows do not fit, [`Error::Count`] if one of them was added before, [`Error::Cuda`].
    pub fn add_bf16_rows<T: Float>(&mut self, expert: usize, first_row: usize, rows: MatrixRef<'_, T>) -> Result<()> {
        self.ledger.require_format(WeightFormat::Bf16)?;
        self.ledger.add(expert, first_row, rows.rows(), rows.cols())?;
        let contiguous = rows.contiguous().filter(|_| T::DTYPE == Dtype::Bf16);
        match contiguous {
            Some(values) => self.copy_values(expert, first_row, bytemuck::cast_slice::<T, u8>(values)),
            None => {
                let values: Vec<bf16> = elements(rows).map(Float::to_bf16).collect();
                self.copy_values(expert, first_row, bytemuck::cast_slice(&values))
            }
        }
    }

    /// Copies `rows [R, K]` with block scales `[ceil(R / 128), ceil(K / 128)]` as rows `first_row..first_row + R` of an
    /// expert. `first_row` is a multiple of 128, and so is `R` unless these rows are the expert's last.
    ///
    /// # Errors
    /// As [`WeightsBuilder::add_bf16_rows`], for bf16; [`Error::Value`] for rows that end or start inside a block.
    pub fn add_e4m3_rows(
        &mut self,
        expert: usize,
        first_row: usize,
        rows: MatrixRef<'_, E4m3>,
        scales: MatrixRef<'_, f32>,
    ) -> Result<()> {
        self.ledger.require_format(WeightFormat::E4m3)?;
        let Weights { n, k, .. } = self.weights;
        let blocks = k.div_ceil(WEIGHT_BLOCK);
        scales.require_shape("scales", rows.rows().div_ceil(WEIGHT_BLOCK), blocks)?;
        let end = first_row.saturating_add(rows.rows());
        for (argument, row) in [("first_row", first_row), ("first_row + rows", end)] {
            if !row.is_multiple_of(WEIGHT_BLOCK) && row != n {
                return Err(Error::value(argument, row, format!("a multiple of {WEIGHT_BLOCK} on a GPU, or {n}")));
            }
        }
        self.ledger.add(expert, first_row, rows.rows(), rows.cols())?;
        let start = (expert * n.div_ceil(WEIGHT_BLOCK) + first_row / WEIGHT_BLOCK) * blocks;
        if let Some(buffer) = &self.scales {
            buffer.upload_at(4 * start, &elements(scales).collect::<Vec<_>>())?;
        }
        match rows.contiguous() {
            Some(values) => self.copy_values(expert, first_row, bytemuck::must_cast_slice(values)),
            None => {
                let values: Vec<E4m3> = elements(rows).collect();
                self.copy_values(expert, first_row, bytemuck::must_cast_slice(&values))
            }
        }
    }

    /// Copies rows of mxfp4, `blocks [R, K / 2]` with `scales [R, K / 32]`, as rows `first_row..first_row + R` of an
    /// expert.
    ///
    /// # Errors
    /// As [`WeightsBuilder::add_bf16_rows`], for bf16; [`Error::Value`] for a scale of 255, which is NaN.
    pub fn add_mxfp4_rows(
        &mut self,
        expert: usize,
        first_row: usize,
        blocks: MatrixRef<'_, u8>,
        scales: MatrixRef<'_, u8>,
    ) -> Result<()> {
        self.ledger.require_format(WeightFormat::Mxfp4)?;
        let Weights { n, k, .. } = self.weights;
        let (rows, groups) = (blocks.rows(), k / GROUP);
        blocks.require_shape("blocks", rows, k / 2)?;
        scales.require_shape("scales", rows, groups)?;
        require_numbers(rows, groups, first_row, |row, group| scales.get(row, group))?;
        self.ledger.add(expert, first_row, rows, k)?;
        let start = expert * n + first_row;
        if let Some(buffer) = &self.scales {
            copy_bytes(buffer, start * groups, scales)?;
        }
        copy_bytes(&self.values, start * (k / 2), blocks)
    }

    /// The weights on the device.
    ///
    /// # Errors
    /// [`Error::Count`] if rows of an expert are missing.
    pub fn finish(self) -> Result<Weights> {
        self.ledger.finish()?;
        let memory = std::iter::once(self.values).chain(self.scales).collect();
        Ok(Weights { _memory: memory, ..self.weights })
    }

    fn copy_values(&self, expert: usize, first_row: usize, values: &[u8]) -> Result<()> {
        let Weights { n, k, format, .. } = self.weights;
        self.values.upload_from((expert * n + first_row) * k * weight_bytes(format), values)
    }
}

/// A matrix's elements, row by row.
fn elements<T: Copy>(matrix: MatrixRef<'_, T>) -> impl Iterator<Item = T> + '_ {
    (0..matrix.rows()).flat_map(move |row| (0..matrix.cols()).map(move |col| matrix.get(row, col)))
}

/// Copies a matrix of bytes, row by row.
fn copy_bytes(buffer: &DeviceBuffer, start: usize, matrix: MatrixRef<'_, u8>) -> Result<()> {
    match matrix.contiguous() {
        Some(bytes) => buffer.upload_from(start, bytes),
        None => buffer.upload_from(start, &elements(matrix).collect::<Vec<_>>()),
    }
}

/// Fails for two values to a byte.
fn require_whole_bytes(format: WeightFormat) -> Result<()> {
    match format {
        WeightFormat::E4m3 | WeightFormat::Bf16 => Ok(()),
        WeightFormat::Mxfp4 | WeightFormat::Int4 => {
            let (argument, actual) = ("format", format.name());
            Err(Error::WeightFormat { argument, actual, expected: "e4m3 or bf16" })
        }
    }
}

/// Bytes of the values and of the scales of `[E, N, K]`.
fn part_bytes(format: WeightFormat, (experts, n, k): (usize, usize, usize)) -> (usize, usize) {
    let scales = match format {
        WeightFormat::E4m3 => 4 * n.div_ceil(WEIGHT_BLOCK) * k.div_ceil(WEIGHT_BLOCK),
        WeightFormat::Bf16 => 0,
        WeightFormat::Mxfp4 => n * k.div_ceil(GROUP),
        WeightFormat::Int4 => 2 * n * k.div_ceil(GROUP),
    };
    (experts * (n * k * format.bits()).div_ceil(8), experts * scales)
}

/// Bytes of a weight of whole bytes.
pub(super) fn weight_bytes(format: WeightFormat) -> usize {
    format.bits() / 8
}

/// Fails for sizes that the kernels do not take.
pub(super) fn check_sizes(experts: usize, n: usize, k: usize) -> Result<()> {
    require_experts(experts)?;
    if n == 0 || !n.is_multiple_of(8) {
        return Err(Error::value("n", n, "a positive multiple of 8 on a GPU"));
    }
    if k == 0 || !k.is_multiple_of(16) {
        return Err(Error::value("k", k, "a positive multiple of 16 on a GPU"));
    }
    let what = "scales of the weights";
    let scales = checked_mul(what, experts, checked_mul(what, n.div_ceil(WEIGHT_BLOCK), k.div_ceil(WEIGHT_BLOCK))?)?;
    super::arguments::require_int(what, scales)?;
    checked_mul("bytes of the weights", 2 * experts, checked_mul("bytes of the weights", n, k)?)?;
    Ok(())
}
