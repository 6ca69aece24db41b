//! Times the steps on a device: what a benchmark needs and a serving program does not.
//!
//! A step's time inside a graph is that of one of many calls captured together and replayed, so neither the launch nor
//! the clock's resolution is in it; its eager time is that of one call between two events, launches included.

mod clock;
mod expert_parallel;
mod layer;
mod matrix;
mod steps;
mod tiles;

pub use expert_parallel::{ExpertParallelBench, ExpertParallelTimes, SharedDeviceTimes};
pub use layer::{HostInputs, LayerBench, LayerTimes};
pub use matrix::matrix_flops_per_second;
pub use steps::{Inputs, stage_times};
pub use tiles::{TileBench, TileInputs, TileTime, TileTimes};

use super::Device;
use crate::error::Result;
use crate::gemm::WeightFormat;
use crate::layer::Stage;
use clock::Clock;

/// How long one call of a step takes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StageTime {
    /// The step; [`Stage::Permute`] includes routing and plan, as one call does it all.
    pub stage: Stage,
    /// Seconds inside a graph.
    pub graph_seconds: f64,
    /// Seconds when launched from the host.
    pub eager_seconds: f64,
}

/// Bytes per second (read and written together) of a device-to-device copy of 1 GiB: the ceiling for steps that move
/// rows.
///
/// # Errors
/// [`Error::Cuda`](crate::Error::Cuda).
pub fn copy_bytes_per_second(device: &Device) -> Result<f64> {
    const BYTES: usize = 1 << 30;
    let (from, to) = (device.allocate::<u8>(BYTES)?, device.allocate::<u8>(BYTES)?);
    from.fill(1)?;
    let clock = Clock::new(device)?;
    let seconds = clock.median(1, |stream| device.copy(stream, &from, &to))?;
    Ok(2.0 * BYTES as f64 / seconds)
}

/// Bytes of `count` values without a NaN among them. Power, and with it the clock, depends on how many bits change.
fn random_bytes(format: WeightFormat, count: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let words = (0..count * format.bits() / 64).flat_map(|_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        match format {
            // Without the highest exponent bit: below 2 in magnitude.
            WeightFormat::E4m3 => state & 0xbfbf_bfbf_bfbf_bfbf,
            // Signs and mantissas: from 1 to below 2 in magnitude.
            WeightFormat::Bf16 => state & 0x807f_807f_807f_807f | 0x3f80_3f80_3f80_3f80,
            // Every nibble is a number.
            WeightFormat::Mxfp4 | WeightFormat::Int4 => state,
        }
        .to_le_bytes()
    });
    words.collect()
}
