//! An expert layer's weights in device memory, knowing what they are.

use super::arguments::require_aligned;
use super::device::{Buffer, Device};
use crate::dtype::E4m3;
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
        check_sizes(experts, n, k)?;
        require_count("weights", weights.len(), &[experts, n, k])?;
        let values = device.allocate(2 * weights.len())?;
        values.upload::<u16>(bytemuck::must_cast_slice(weights))?;
        let address = values.address();
        Ok(Self { format: WeightFormat::Bf16, experts, n, k, values: address, scales: 0, _memory: vec![values] })
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
        check_sizes(experts, n, k)?;
        require_count("weights", weights.len(), &[experts, n, k])?;
        require_count(
            "weight_scales",
            weight_scales.len(),
            &[experts, n.div_ceil(WEIGHT_BLOCK), k.div_ceil(WEIGHT_BLOCK)],
        )?;
        let (values, scales) = (device.allocate(weights.len())?, device.allocate(4 * weight_scales.len())?);
        values.upload::<u8>(bytemuck::must_cast_slice(weights))?;
        scales.upload(weight_scales)?;
        let (value, scale) = (values.address(), scales.address());
        let memory = vec![values, scales];
        Ok(Self { format: WeightFormat::E4m3, experts, n, k, values: value, scales: scale, _memory: memory })
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
