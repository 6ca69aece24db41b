//! Shared memory of the grouped GEMM's kernels: how many bytes, and so how many stages.
//!
//! Mirrors each kernel's `SharedStorage` member by member. The kernel gets the sum as `HOST_SHARED_BYTES` and does not
//! compile where its own is another.

use super::{FewRowsCut, GemmKernel};

pub(super) mod groups;

use crate::gemm::WeightFormat;

/// Shared memory that a block may have on Hopper.
const MOST_BYTES: usize = 227 * 1024;
/// More stages are not worth their barriers.
const MOST_STAGES: usize = 12;
const MOST_NARROW_STAGES: usize = 16;

/// Bytes of a row of a block of K.
const ROW_BYTES: usize = 128;
/// Alignment of `Tile`, of what the copy engine writes, and so of the whole.
const ALIGNMENT: usize = 16;
const F32: usize = 4;
const BF16: usize = 2;
const TILE: usize = 16;
const BARRIER: usize = 8;
/// `ClaimQueue`: two barriers and a word for each of four claims.
const CLAIM_QUEUE: usize = 4 * (2 * BARRIER + 4);
/// Row tiles that a block of the kernels for few rows, and of those for many, lists.
const LISTED_OF_FEW_ROWS: usize = 512;
const LISTED_OF_MANY_ROWS: usize = 1024;
/// `StoredTiles`: a tile, two words and two barriers for each of two tiles.
const STORED_TILES: usize = 2 * (TILE + 2 * 4 + 2 * BARRIER);
/// `TileQueue`: a tile, a word and three barriers for each of four tiles.
const TILE_QUEUE: usize = 4 * (TILE + 4 + 3 * BARRIER);
/// Bytes between staged rows, so that eight of them start on different banks.
const STAGING_GAP: usize = 16;
/// Most rows of a tile of the few-row kernel that has no scaling warps.
const ROWS_SCALED_BY_CONSUMERS: usize = 32;
/// Warps of the wide kernel that activate.
const ACTIVATING_WARPS: usize = 3;

/// Blocks of K in flight: as many as fit.
pub(super) fn stages(kernel: &GemmKernel, activated: bool) -> usize {
    // bf16 takes a little less than e4m3, and gets as many stages: those it was measured with.
    let fits = |&stages: &usize| bytes(kernel, WeightFormat::E4m3, activated, stages) <= MOST_BYTES;
    let most = match kernel {
        GemmKernel::FewRows { cut: FewRowsCut::Narrow, .. } => MOST_NARROW_STAGES,
        GemmKernel::FewRows { .. } | GemmKernel::Wide { .. } | GemmKernel::Large => MOST_STAGES,
    };
    (1..=most).rev().find(fits).unwrap_or(1)
}

/// Boxes in which a stage's weights are loaded; each has a scale. `WEIGHT_BOXES` of the kernel.
pub(super) fn weight_boxes(kernel: &GemmKernel, activated: bool) -> usize {
    match kernel {
        GemmKernel::FewRows { .. } => 1,
        GemmKernel::Wide { .. } => 1 + usize::from(activated),
        GemmKernel::Large => 2,
    }
}

/// Blocks of K in flight where both GEMMs are one launch: as many as fit.
pub(super) fn joined_stages(kernel: &GemmKernel) -> usize {
    let fits = |&stages: &usize| joined_bytes(kernel, WeightFormat::E4m3, stages) <= MOST_BYTES;
    (1..=stages(kernel, false)).rev().find(fits).unwrap_or(1)
}

/// `sizeof(SharedStorage)`.
pub(super) fn bytes(kernel: &GemmKernel, format: WeightFormat, activated: bool, stages: usize) -> usize {
    members(kernel, format, activated, stages).0.next_multiple_of(ALIGNMENT)
}

/// The same where both GEMMs are one launch.
pub(super) fn joined_bytes(kernel: &GemmKernel, format: WeightFormat, stages: usize) -> usize {
    let mut sum = members(kernel, format, false, stages);
    // `numbers`, `stored`.
    sum.add(F32, stages * F32);
    sum.add(ALIGNMENT, STORED_TILES);
    sum.0.next_multiple_of(ALIGNMENT)
}

fn members(kernel: &GemmKernel, format: WeightFormat, activated: bool, stages: usize) -> Sum {
    let rows = kernel.row_tile();
    // `stages`, `staging`, `row_scales`, `weight_scales`, `tiles`.
    let mut sum = Sum(stages * (kernel.outputs() + rows) * ROW_BYTES);
    sum.add(ALIGNMENT, staging_bytes(kernel, activated));
    sum.add(ALIGNMENT, stages * rows * F32);
    sum.add(F32, stages * weight_boxes(kernel, activated) * F32);
    sum.add(TILE, stages * TILE);
    match kernel {
        GemmKernel::FewRows { .. } => {
            if format == WeightFormat::E4m3 && rows > ROWS_SCALED_BY_CONSUMERS {
                // `products`: four lanes of a quad, 4 words between their quarters of the rows; `scaled`.
                sum.add(F32, stages * 4 * (rows / 4 + 4) * F32);
                sum.add(BARRIER, stages * BARRIER);
            }
            // `full`, `empty`; `partials_ready`, `partials_read`; `claims`; `list`.
            sum.add(BARRIER, (2 * stages + 2) * BARRIER);
            sum.add(BARRIER, CLAIM_QUEUE);
            sum.add(BARRIER, list_bytes(LISTED_OF_FEW_ROWS));
        }
        // `full`, `empty`; `list`.
        GemmKernel::Wide { .. } => {
            sum.add(BARRIER, 2 * stages * BARRIER);
            sum.add(BARRIER, list_bytes(LISTED_OF_MANY_ROWS));
        }
        GemmKernel::Large => {
            // `full`, `empty`, `unused`; `next_tile`; `next_tile_ready`, `next_tile_taken`; `list`.
            sum.add(BARRIER, (3 * stages + 2) * BARRIER);
            sum.add(TILE, TILE);
            sum.add(BARRIER, 2 * BARRIER);
            sum.add(BARRIER, list_bytes(LISTED_OF_MANY_ROWS));
        }
    }
    sum
}

/// `staging`: results on their way out.
fn staging_bytes(kernel: &GemmKernel, activated: bool) -> usize {
    let (rows, outputs) = (kernel.row_tile(), kernel.outputs());
    match kernel {
        GemmKernel::FewRows { cut: FewRowsCut::SplitK { .. }, .. } => rows * (outputs * F32 + STAGING_GAP),
        GemmKernel::FewRows { .. } => outputs / 64 * rows * (64 * BF16 + STAGING_GAP),
        GemmKernel::Wide { .. } => {
            let mut sum = Sum(rows * (outputs * BF16 + STAGING_GAP));
            if activated {
                // `row_magnitudes`, `tiles`; `staged`, `activated`, `magnitudes`.
                sum.add(F32, 3 * rows * F32);
                sum.add(TILE, 2 * TILE);
                sum.add(BARRIER, (2 + ACTIVATING_WARPS) * BARRIER);
            }
            sum.0.next_multiple_of(ALIGNMENT)
        }
        GemmKernel::Large => rows * (128 + STAGING_GAP),
    }
}

/// `TileList`: two words, and two of each row tile that it has room for.
fn list_bytes(listed: usize) -> usize {
    8 + 8 * listed
}

/// Members one behind the other, as a C++ compiler lays them out.
struct Sum(usize);

impl Sum {
    fn add(&mut self, alignment: usize, bytes: usize) {
        self.0 = self.0.next_multiple_of(alignment) + bytes;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kernel_fits_a_multiprocessor_with_at_least_four_stages() {
        for format in [WeightFormat::E4m3, WeightFormat::Bf16] {
            for kernel in GemmKernel::all(format).into_iter().chain(GemmKernel::all_split()) {
                for activated in [false, kernel.takes_activation()] {
                    let stages = stages(&kernel, activated);
                    assert!(stages >= 4, "{kernel}: {stages} stages");
                    assert!(bytes(&kernel, format, activated, stages) <= MOST_BYTES, "{kernel}");
                }
            }
        }
    }

    /// Both sides of the ring's size: a stage more would not fit, or would be past the most.
    #[test]
    fn stages_are_as_many_as_fit() {
        let few = |row_tile, cut| GemmKernel::FewRows { row_tile, cut };
        for (kernel, activated, expected) in [
            (few(16, FewRowsCut::Narrow), false, 16),
            (few(16, FewRowsCut::SplitK { parts: 2 }), false, 11),
            (few(64, FewRowsCut::Plain), false, 8),
            (few(192, FewRowsCut::SharedRows), false, 4),
            (GemmKernel::Wide { shares_rows: false }, false, 4),
            (GemmKernel::Wide { shares_rows: false }, true, 4),
            (GemmKernel::Large, true, 4),
        ] {
            assert_eq!(stages(&kernel, activated), expected, "{kernel}, activated {activated}");
        }
        let joined = |row_tile, cut| joined_stages(&few(row_tile, cut));
        assert_eq!([16, 32, 64, 128].map(|row_tile| joined(row_tile, FewRowsCut::Plain)), [12, 10, 8, 5]);
        assert_eq!([16, 32, 64].map(|row_tile| joined(row_tile, FewRowsCut::Narrow)), [16, 16, 12]);
    }
}
