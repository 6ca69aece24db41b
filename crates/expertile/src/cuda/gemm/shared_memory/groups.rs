//! Shared memory of the kernel for mxfp4 and int4 weights, of which a multiprocessor holds several blocks where tiles
//! have few rows.

use super::{
    ALIGNMENT, BARRIER, CLAIM_QUEUE, F32, LISTED_OF_FEW_ROWS, MOST_BYTES, ROW_BYTES, STAGING_GAP, Sum, TILE,
    TILE_QUEUE, list_bytes,
};
use crate::cuda::gemm::GemmKernel;
use crate::cuda::gemm::config::values_of_block;
use crate::cuda::weights::mxfp4::{UNIT_K, UNIT_OUTPUTS, unit_bytes};
use crate::gemm::{ActivationFormat, WeightFormat};

/// More stages are not worth their barriers.
const MOST_STAGES: usize = 16;
/// Shared memory that the system takes of every block.
const RESERVED_BYTES: usize = 1024;

/// Blocks that a multiprocessor holds.
pub(in crate::cuda::gemm) fn blocks(kernel: &GemmKernel) -> usize {
    let consumers = kernel.outputs() / UNIT_OUTPUTS;
    match (kernel.row_tile(), consumers) {
        (..=32, 1) => 3,
        (..=64, ..=2) => 2,
        _ => 1,
    }
}

/// What the kernel's `SharedStorage` depends on.
#[derive(Debug, Clone, Copy)]
pub(in crate::cuda::gemm) struct Storage {
    pub(in crate::cuda::gemm) kernel: GemmKernel,
    pub(in crate::cuda::gemm) weights: WeightFormat,
    pub(in crate::cuda::gemm) rows: ActivationFormat,
    /// Whether both GEMMs are one launch.
    pub(in crate::cuda::gemm) joined: bool,
}

/// Blocks of K in flight: as many as fit.
pub(in crate::cuda::gemm) fn stages(of: &Storage) -> usize {
    let most = (MOST_BYTES + RESERVED_BYTES) / blocks(&of.kernel) - RESERVED_BYTES;
    (1..=MOST_STAGES).rev().find(|&stages| bytes(of, stages) <= most).unwrap_or(1)
}

/// `sizeof(SharedStorage)`.
pub(in crate::cuda::gemm) fn bytes(of: &Storage, stages: usize) -> usize {
    let &Storage { kernel, weights, rows, joined } = of;
    let (row_tile, consumers) = (kernel.row_tile(), kernel.outputs() / UNIT_OUTPUTS);
    // `rows`, `weights`, `staging`, `row_scales`, `tiles`, `full`, `empty`; `numbers` and `queue`, or `claims`; `list`.
    let mut sum = Sum(stages * row_tile * ROW_BYTES);
    sum.add(ALIGNMENT, stages * consumers * values_of_block(rows) / UNIT_K * unit_bytes(weights));
    sum.add(ALIGNMENT, row_tile * consumers * (UNIT_OUTPUTS * 2 + STAGING_GAP));
    sum.add(ALIGNMENT, stages * row_tile * F32);
    sum.add(TILE, stages * TILE);
    sum.add(BARRIER, 2 * stages * BARRIER);
    if joined {
        sum.add(F32, stages * F32);
        sum.add(ALIGNMENT, TILE_QUEUE);
    } else {
        sum.add(BARRIER, CLAIM_QUEUE);
    }
    sum.add(BARRIER, list_bytes(LISTED_OF_FEW_ROWS));
    sum.0.next_multiple_of(ALIGNMENT)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kernel_has_at_least_four_stages_and_as_many_blocks_as_it_says() {
        for weights in [WeightFormat::Mxfp4, WeightFormat::Int4] {
            for kernel in GemmKernel::all(weights) {
                for (rows, joined) in ActivationFormat::ALL.into_iter().flat_map(|rows| [(rows, false), (rows, true)]) {
                    let of = Storage { kernel, weights, rows, joined };
                    let stages = stages(&of);
                    let all = blocks(&kernel) * (bytes(&of, stages) + RESERVED_BYTES);
                    assert!(
                        stages >= 4 && all <= MOST_BYTES + RESERVED_BYTES,
                        "{kernel}, {weights}: {stages} stages, {all} bytes"
                    );
                }
            }
        }
    }
}
