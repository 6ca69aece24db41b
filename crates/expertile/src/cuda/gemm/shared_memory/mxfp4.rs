//! Shared memory of the kernels for mxfp4 and int4 weights: that for few rows, of which a multiprocessor holds several blocks where
//! tiles have few rows, and the wide one, which decodes weights for all rows of a tile.

use super::{ALIGNMENT, BARRIER, F32, MOST_BYTES, ROW_BYTES, STAGING_GAP, Sum, TILE};
use crate::cuda::gemm::GemmKernel;
use crate::cuda::gemm::config::values_of_block;
use crate::cuda::weights::mxfp4::{UNIT_K, UNIT_OUTPUTS, unit_bytes};
use crate::gemm::{ActivationFormat, WeightFormat};

/// More stages are not worth their barriers.
const MOST_STAGES: usize = 16;
/// Blocks of K of the wide kernel, decoded; the others are packed.
const WIDE_STAGES: usize = 3;
/// Packed blocks of K of the wide kernel, of which one is decoded.
const MOST_PACKED: usize = 8;
/// Shared memory that the system takes of every block.
const RESERVED_BYTES: usize = 1024;

/// Blocks that a multiprocessor holds.
pub(in crate::cuda::gemm) fn blocks(kernel: &GemmKernel) -> usize {
    let consumers = kernel.outputs() / UNIT_OUTPUTS;
    match (kernel.row_tile(), consumers) {
        _ if kernel.tokens_on_m() => 1,
        (..=32, 1) => 3,
        (..=64, _) => 2,
        _ => 1,
    }
}

/// Blocks of K in flight: as many as fit.
pub(in crate::cuda::gemm) fn stages(kernel: &GemmKernel, weights: WeightFormat, rows: ActivationFormat) -> usize {
    if kernel.tokens_on_m() {
        return WIDE_STAGES;
    }
    let most = (MOST_BYTES + RESERVED_BYTES) / blocks(kernel) - RESERVED_BYTES;
    (1..=MOST_STAGES).rev().find(|&stages| bytes(kernel, weights, rows, stages) <= most).unwrap_or(1)
}

/// Packed blocks of K: as many as fit beside the stages; none where consumers decode.
pub(in crate::cuda::gemm) fn packed(kernel: &GemmKernel, rows: ActivationFormat) -> usize {
    if !kernel.tokens_on_m() {
        return 0;
    }
    let fits = |&packed: &usize| wide_bytes(kernel, rows, WIDE_STAGES, packed) <= MOST_BYTES;
    (1..=MOST_PACKED).rev().find(fits).unwrap_or(1)
}

/// `sizeof(SharedStorage)` of the wide kernel.
fn wide_bytes(kernel: &GemmKernel, rows: ActivationFormat, stages: usize, packed: usize) -> usize {
    let mut sum = Sum(super::bytes(kernel, WeightFormat::Mxfp4, false, stages));
    let slabs = kernel.outputs() / UNIT_OUTPUTS;
    // `packed`, `packed_full`.
    sum.add(ALIGNMENT, packed * slabs * values_of_block(rows) / UNIT_K * unit_bytes(WeightFormat::Mxfp4));
    sum.add(BARRIER, packed * BARRIER);
    sum.0.next_multiple_of(ALIGNMENT)
}

/// `sizeof(SharedStorage)`.
pub(in crate::cuda::gemm) fn bytes(
    kernel: &GemmKernel,
    weights: WeightFormat,
    rows: ActivationFormat,
    stages: usize,
) -> usize {
    if kernel.tokens_on_m() {
        return wide_bytes(kernel, rows, stages, packed(kernel, rows));
    }
    let (row_tile, consumers) = (kernel.row_tile(), kernel.outputs() / UNIT_OUTPUTS);
    // `rows`, `weights`, `staging`, `row_scales`, `tiles`, `full`, `empty`.
    let mut sum = Sum(stages * row_tile * ROW_BYTES);
    sum.add(ALIGNMENT, stages * consumers * values_of_block(rows) / UNIT_K * unit_bytes(weights));
    sum.add(ALIGNMENT, row_tile * consumers * (UNIT_OUTPUTS * 2 + STAGING_GAP));
    sum.add(ALIGNMENT, stages * row_tile * F32);
    sum.add(TILE, stages * TILE);
    sum.add(BARRIER, 2 * stages * BARRIER);
    sum.0.next_multiple_of(ALIGNMENT)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kernel_has_at_least_three_stages_and_as_many_blocks_as_it_says() {
        for weights in [WeightFormat::Mxfp4, WeightFormat::Int4] {
            for kernel in GemmKernel::all(weights) {
                for rows in ActivationFormat::ALL {
                    let stages = stages(&kernel, weights, rows);
                    let all = blocks(&kernel) * (bytes(&kernel, weights, rows, stages) + RESERVED_BYTES);
                    assert!(
                        stages >= WIDE_STAGES && all <= MOST_BYTES + RESERVED_BYTES,
                        "{kernel}, {weights}: {stages} stages, {all} bytes"
                    );
                }
            }
        }
    }
}
