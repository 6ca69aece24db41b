//! The kernels' arguments, from a call that has been checked.

use super::config::{row_bytes, values_of_block};
use super::{GemmCall, GemmConfig, RowEnds};
use crate::cuda::arguments::require_int;
use crate::cuda::driver::{DevicePtr, TensorMap};
use crate::cuda::weights::weight_bytes;
use crate::error::{Error, Result, checked_mul};
use crate::gemm::{ActivationFormat, WEIGHT_BLOCK};

/// The kernel's `GemmArgs`, with as many maps of rows as it has.
#[derive(Debug)]
#[repr(C)]
pub(in crate::cuda) struct Arguments<const PATHS: usize> {
    weights: TensorMap,
    rows: [TensorMap; PATHS],
    row_scales: u64,
    weight_scales: u64,
    out: u64,
    out_scales: u64,
    header: u64,
    worklist: u64,
    psum: u64,
    rows_left: u64,
    n: i32,
    k: i32,
    m_sum: i32,
    f16_scales: i32,
    bias: u64,
    packed: u64,
    exponents: u64,
    spread: u64,
}

impl<const PATHS: usize> Arguments<PATHS> {
    /// Of a call that [`GemmConfig::check_call`] has passed; the device's context is current.
    pub(in crate::cuda) fn new(config: &GemmConfig, call: &GemmCall<'_>) -> Result<Self> {
        let weights = call.weights;
        let kernel = &config.kernel;
        let (n, k) = (weights.n(), weights.k());
        let arranged = weights.require_arranged(config.activation_format)?;
        let bytes = row_bytes(config.activation_format);
        let mut rows = [TensorMap::EMPTY; PATHS];
        for (path, map) in rows.iter_mut().enumerate() {
            let box_rows = (path + 1) * kernel.row_step() / kernel.shared();
            *map = TensorMap::encode(call.rows.address(), bytes, 2, (1, call.m_sum, k), box_rows)?;
        }
        let box_rows = config.weight_box_rows();
        let (psum, rows_left) = match call.ends {
            RowEnds::Psum(psum) => (psum.address(), 0),
            RowEnds::Tiles(rows_left) => (0, rows_left.address()),
        };
        let map = match arranged {
            None => {
                let bytes = weight_bytes(config.format);
                TensorMap::encode(weights.values().address(), bytes, 3, (weights.experts(), n, k), box_rows)?
            }
            Some(_) => TensorMap::EMPTY,
        };
        Ok(Self {
            weights: map,
            rows,
            row_scales: DevicePtr::or_null(call.scales),
            weight_scales: DevicePtr::or_null(weights.scales()),
            out: call.out.address(),
            out_scales: DevicePtr::or_null(call.out_scales),
            header: call.header.address(),
            worklist: call.worklist.address(),
            psum,
            rows_left,
            n: require_int("n", n)?,
            k: require_int("k", k)?,
            m_sum: require_int("m_sum", call.m_sum)?,
            f16_scales: i32::from(weights.has_f16_scales()),
            bias: DevicePtr::or_null(call.bias),
            packed: arranged.map_or(0, |_| weights.values().address()),
            exponents: arranged.map_or(0, |arranged| DevicePtr::or_null(arranged.exponents)),
            spread: arranged.map_or(0, |arranged| DevicePtr::or_null(arranged.spread)),
        })
    }
}

impl GemmConfig {
    /// Fails for what does not fit the kernel.
    pub(in crate::cuda) fn check_call(&self, call: &GemmCall<'_>) -> Result<()> {
        let (weights, format) = (call.weights, self.format);
        if weights.format() != format {
            return Err(Error::WeightFormat {
                argument: "weights",
                actual: weights.format().name(),
                expected: format.name(),
            });
        }
        weights.require_arranged(self.activation_format)?;
        let splits = self.kernel.splits();
        let too_short = (splits - 1) * values_of_block(self.activation_format);
        if weights.k() <= too_short {
            return Err(Error::value("k", weights.k(), format!("more than {too_short}, for a K in {splits} parts")));
        }
        require_int("m_sum", call.m_sum)?;
        call.rows.require_aligned("rows", 16)?;
        call.out.require_aligned("out", 16)?;
        call.header.require_aligned("header", 4)?;
        call.worklist.require_aligned("worklist", 8)?;
        match call.ends {
            RowEnds::Psum(psum) => psum.require_aligned("psum", 4)?,
            RowEnds::Tiles(rows_left) => rows_left.require_aligned("rows_left", 4)?,
        }
        if let Some(bias) = call.bias {
            bias.require_aligned("bias", 4)?;
            if self.activation.is_some() {
                return Err(Error::value("bias", bias.address() as usize, "none, for a GEMM with an activation"));
            }
        }
        if self.activation.is_some() {
            DevicePtr::require(call.out_scales, "out_scales", 4)?;
            if !weights.n().is_multiple_of(2 * WEIGHT_BLOCK) {
                return Err(Error::value("n", weights.n(), "a multiple of 256 for a GEMM with an activation"));
            }
        }
        if self.activation_format == ActivationFormat::E4m3 {
            DevicePtr::require(call.scales, "scales", 16)?;
            let words = checked_mul("scales", call.m_sum.next_multiple_of(4), weights.k().div_ceil(WEIGHT_BLOCK))?;
            require_int("scales", words)?;
        }
        Ok(())
    }
}
