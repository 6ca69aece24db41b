//! An expert layer's weights in device memory, knowing what they are.

use super::arguments::require_aligned;
use super::device::{Buffer, Device};
use crate::dtype::{E4m3, MatrixRef};
use crate::error::{Error, Result, checked_mul};
use crate::gemm::{WEIGHT_BLOCK, WeightFormat};
use crate::routing::require_experts;
use half::bf16;

/// Weights `[E, N, K]` in device memory as the GEMM reads them: row-major, with their scales if they are e4m3.
#[derive(Debug)]
pub struct Weights {
    format: WeightFormat,
    experts: usize,
    n: usize,
    k: usize,
    values: u64,
    scales: u64,
    /// What the addresses point into, where this value owns it.
    _memory: Vec<Buffer>,
}

impl Weights {
    /// Weights that are in device memory already: `values [E, N, K]` on 16 bytes; for e4m3, `scales` f32
    /// `[E, ceil(N / 128), ceil(K / 128)]`, else 0.
    ///
    /// # Safety
    /// The memory holds that much, and outlives every launch that takes the value.
    ///
    /// # Errors
    /// [`Error::Value`] if `n` is not a multiple of 8, `k` not one of 16, an address is not aligned, or there are no
    /// experts; [`Error::Overflow`] if the scales would pass 2^31.
    #[allow(unsafe_code)]
    pub unsafe fn from_device(
        format: WeightFormat,
        (experts, n, k): (usize, usize, usize),
        values: u64,
        scales: u64,
    ) -> Result<Self> {
        check_sizes(experts, n, k)?;
        require_aligned("values", values, 16)?;
        if format == WeightFormat::E4m3 {
            require_aligned("scales", scales, 4)?;
        }
        Ok(Self { format, experts, n, k, values, scales, _memory: Vec::new() })
    }

    /// Copies bf16 weights `[E, N, K]` to the device.
    ///
    /// # Errors
    /// As [`Weights::from_device`]; [`Error::Shape`] unless there are `E * N * K` weights, [`Error::Cuda`].
    pub fn upload_bf16(device: &Device, weights: &[bf16], (experts, n, k): (usize, usize, usize)) -> Result<Self> {
        let mut builder = WeightsBuilder::new(device, WeightFormat::Bf16, (experts, n, k))?;
        require_count("weights", weights.len(), &[experts, n, k])?;
        for (expert, rows) in weights.chunks_exact(n * k).enumerate() {
            builder.upload_bf16_rows(expert, 0, MatrixRef::new(rows, n, k)?)?;
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
        require_count("weights", weights.len(), &[experts, n, k])?;
        require_count("weight_scales", weight_scales.len(), &[experts, rows, cols])?;
        let parts = weights.chunks_exact(n * k).zip(weight_scales.chunks_exact(rows * cols));
        for (expert, (values, scales)) in parts.enumerate() {
            let (values, scales) = (MatrixRef::new(values, n, k)?, MatrixRef::new(scales, rows, cols)?);
            builder.upload_e4m3_rows(expert, 0, values, scales)?;
        }
        builder.finish()
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

    /// Address of the values.
    #[must_use]
    pub fn values(&self) -> u64 {
        self.values
    }

    /// Address of the scales; 0 for bf16.
    #[must_use]
    pub fn scales(&self) -> u64 {
        self.scales
    }

    /// Bytes of device memory, scales included.
    #[must_use]
    pub fn bytes(&self) -> usize {
        let scales = match self.format {
            WeightFormat::E4m3 => 4 * self.experts * self.n.div_ceil(WEIGHT_BLOCK) * self.k.div_ceil(WEIGHT_BLOCK),
            WeightFormat::Bf16 => 0,
        };
        self.experts * self.n * self.k * self.format.bytes() + scales
    }
}

/// Copies weights that come in parts (expert by expert, gate and up apart) to the device: the host never holds them all.
#[derive(Debug)]
pub struct WeightsBuilder {
    weights: Weights,
    values: Buffer,
    scales: Option<Buffer>,
    /// `[E, N]`: which rows have come.
    uploaded: Vec<bool>,
}

impl WeightsBuilder {
    /// Room for `[E, N, K]` of `format` on the device.
    ///
    /// # Errors
    /// As [`Weights::from_device`]; [`Error::Cuda`] if there is not enough memory.
    pub fn new(device: &Device, format: WeightFormat, (experts, n, k): (usize, usize, usize)) -> Result<Self> {
        check_sizes(experts, n, k)?;
        let mut weights = Weights { format, experts, n, k, values: 0, scales: 0, _memory: Vec::new() };
        let values = device.allocate(experts * n * k * format.bytes())?;
        let scale_bytes = weights.bytes() - values.bytes();
        let scales = (format == WeightFormat::E4m3).then(|| device.allocate(scale_bytes)).transpose()?;
        weights.values = values.address();
        weights.scales = scales.as_ref().map_or(0, Buffer::address);
        Ok(Self { weights, values, scales, uploaded: vec![false; experts * n] })
    }

    /// Copies `rows [R, K]` as rows `first_row..first_row + R` of an expert.
    ///
    /// # Errors
    /// [`Error::WeightFormat`] if this is a builder of e4m3, [`Error::Value`] if there is no such expert,
    /// [`Error::Shape`] if the rows do not fit, [`Error::Stride`] unless they stand one behind the other,
    /// [`Error::Count`] if one of them has come before, [`Error::Cuda`].
    pub fn upload_bf16_rows(&mut self, expert: usize, first_row: usize, rows: MatrixRef<'_, bf16>) -> Result<()> {
        self.require_format(WeightFormat::Bf16)?;
        let values = rows.require_contiguous("rows")?;
        self.mark_uploaded(expert, first_row, rows.rows(), rows.cols())?;
        self.copy_values::<u16>(expert, first_row, bytemuck::must_cast_slice(values))
    }

    /// Copies `rows [R, K]` with block scales `[ceil(R / 128), ceil(K / 128)]` as rows `first_row..first_row + R` of an
    /// expert. `first_row` is a multiple of 128, and so is `R` unless these rows are the expert's last.
    ///
    /// # Errors
    /// As [`WeightsBuilder::upload_bf16_rows`], for bf16; [`Error::Value`] for rows that end or start inside a block.
    pub fn upload_e4m3_rows(
        &mut self,
        expert: usize,
        first_row: usize,
        rows: MatrixRef<'_, E4m3>,
        scales: MatrixRef<'_, f32>,
    ) -> Result<()> {
        self.require_format(WeightFormat::E4m3)?;
        let Weights { n, k, .. } = self.weights;
        let blocks = k.div_ceil(WEIGHT_BLOCK);
        scales.require_shape("scales", rows.rows().div_ceil(WEIGHT_BLOCK), blocks)?;
        let end = first_row.saturating_add(rows.rows());
        for (argument, row) in [("first_row", first_row), ("first_row + rows", end)] {
            if !row.is_multiple_of(WEIGHT_BLOCK) && row != n {
                return Err(Error::value(argument, row, format!("a multiple of {WEIGHT_BLOCK} on a GPU, or {n}")));
            }
        }
        let (values, scale_values) = (rows.require_contiguous("rows")?, scales.require_contiguous("scales")?);
        self.mark_uploaded(expert, first_row, rows.rows(), rows.cols())?;
        let start = (expert * n.div_ceil(WEIGHT_BLOCK) + first_row / WEIGHT_BLOCK) * blocks;
        if let Some(buffer) = &self.scales {
            buffer.upload_at(4 * start, scale_values)?;
        }
        self.copy_values::<u8>(expert, first_row, bytemuck::must_cast_slice(values))
    }

    /// The weights on the device.
    ///
    /// # Errors
    /// [`Error::Count`] if rows of an expert are missing.
    pub fn finish(self) -> Result<Weights> {
        let n = self.weights.n;
        for (expert, uploaded) in self.uploaded.chunks_exact(n).enumerate() {
            let count = uploaded.iter().filter(|&&uploaded| uploaded).count();
            if count != n {
                let expected = format!("{n}: every row of every expert");
                return Err(Error::Count { argument: "uploaded_rows", expert, actual: count as i64, expected });
            }
        }
        let memory = std::iter::once(self.values).chain(self.scales).collect();
        Ok(Weights { _memory: memory, ..self.weights })
    }

    fn require_format(&self, given: WeightFormat) -> Result<()> {
        if self.weights.format != given {
            let (actual, expected) = (self.weights.format.name(), given.name());
            return Err(Error::WeightFormat { argument: "builder", actual, expected });
        }
        Ok(())
    }

    fn mark_uploaded(&mut self, expert: usize, first_row: usize, rows: usize, cols: usize) -> Result<()> {
        let Weights { experts, n, k, .. } = self.weights;
        if expert >= experts {
            return Err(Error::value("expert", expert, format!("below {experts}")));
        }
        if cols != k || first_row > n || rows > n - first_row {
            let expected = format!("[at most {}, {k}]", n - first_row.min(n));
            return Err(Error::shape("rows", &[rows, cols], expected));
        }
        let part = &mut self.uploaded[expert * n + first_row..][..rows];
        if let Some(row) = part.iter().position(|&uploaded| uploaded) {
            let (argument, actual) = ("row", (first_row + row) as i64);
            return Err(Error::Count { argument, expert, actual, expected: "a row that has not come yet".into() });
        }
        part.fill(true);
        Ok(())
    }

    fn copy_values<T: bytemuck::NoUninit>(&self, expert: usize, first_row: usize, values: &[T]) -> Result<()> {
        let Weights { n, k, .. } = self.weights;
        self.values.upload_at((expert * n + first_row) * k * size_of::<T>(), values)
    }
}

fn check_sizes(experts: usize, n: usize, k: usize) -> Result<()> {
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

fn require_count(argument: &'static str, actual: usize, shape: &[usize; 3]) -> Result<()> {
    if actual != shape.iter().product::<usize>() {
        return Err(Error::shape(argument, &[actual], format!("{shape:?}")));
    }
    Ok(())
}
