//! How the live rows are cut into tiles, and their packing for the kernels.
//!
//! The rows of one expert are cut into blocks that share a pass over the weights, a block into tiles of a few rows.
//! Tiles stand one after another in the workspace, `[pairs][rows]` each, in the order of the live rows, so row `i` of
//! them starts at `i * pairs` whatever the tiles are. Kernels that take a whole block have its rows in steps instead,
//! `[steps][rows][pairs of a step]`.

use super::Activations;
use crate::cpu::arch::gemm::E4M3_AS_BF16;
use crate::cpu::arch::panel::{BLOCK_PAIRS, MAX_ROWS};
use crate::cpu::disjoint::Disjoint;
use crate::gemm::WEIGHT_BLOCK;
use bytemuck::{Pod, Zeroable};
use rayon::prelude::*;
use std::ops::Range;

/// Most rows that share a pass over a panel: their sums and a block of weights fit the L1 and L2 caches.
pub(super) const BLOCK_ROWS: usize = 8 * MAX_ROWS;

/// Rows of one expert that share a pass over its weights.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(super) struct RowBlock {
    expert: u32,
    /// First row in the permuted buffer.
    row: u32,
    rows: u32,
    /// First row among the live ones.
    live_row: u32,
}

/// `u32` that describe one block.
pub(super) const ROW_BLOCK_WORDS: usize = size_of::<RowBlock>() / size_of::<u32>();

impl RowBlock {
    pub(super) fn expert(&self) -> usize {
        self.expert as usize
    }

    /// Rows of the permuted buffer.
    pub(super) fn rows(&self) -> Range<usize> {
        self.row as usize..(self.row + self.rows) as usize
    }

    /// Rows counted from the first live one.
    pub(super) fn live_rows(&self) -> Range<usize> {
        self.live_row as usize..(self.live_row + self.rows) as usize
    }

    /// All rows, as a range within the block.
    pub(super) fn all(&self) -> Range<usize> {
        0..self.rows as usize
    }

    /// Tiles of nearly the same size, as ranges within the block.
    pub(super) fn tiles(&self) -> impl Iterator<Item = Range<usize>> + Clone {
        parts(self.rows as usize, MAX_ROWS)
    }

    pub(super) fn tile_count(&self) -> usize {
        (self.rows as usize).div_ceil(MAX_ROWS)
    }
}

/// Cuts `len` into as few parts of at most `most` as there can be, of nearly the same size.
fn parts(len: usize, most: usize) -> impl Iterator<Item = Range<usize>> + Clone {
    let count = len.div_ceil(most);
    (0..count).map(move |part| part * len / count..(part + 1) * len / count)
}

/// Writes the blocks of experts' rows into the start of `space` (one for each live row will do) and returns them.
pub(super) fn cut_into_blocks(
    segments: impl Iterator<Item = (usize, Range<usize>)>,
    space: &mut [RowBlock],
) -> &[RowBlock] {
    let mut count = 0;
    let mut live_row = 0;
    for (expert, rows) in segments {
        for part in parts(rows.len(), BLOCK_ROWS) {
            space[count] = RowBlock {
                expert: expert as u32,
                row: (rows.start + part.start) as u32,
                rows: part.len() as u32,
                live_row,
            };
            count += 1;
            live_row += part.len() as u32;
        }
    }
    &space[..count]
}

/// Live rows in tiles.
#[derive(Clone, Copy)]
pub(super) struct PackedRows<'a> {
    k_pairs: usize,
    /// Blocks of K.
    pub(super) k_blocks: usize,
    /// Tiles of `[pairs][rows]`.
    pairs: &'a [u32],
    /// Tiles of `[blocks of K][rows]`, if the activations have scales.
    scales: Option<&'a [f32]>,
}

impl<'a> PackedRows<'a> {
    /// `count` pairs of a tile, from a block of K on.
    pub(super) fn pairs(&self, block: &RowBlock, tile: &Range<usize>, k_block: usize, count: usize) -> &'a [u32] {
        let start = (block.live_rows().start + tile.start) * self.k_pairs;
        &self.pairs[start + k_block * BLOCK_PAIRS * tile.len()..][..count * tile.len()]
    }

    /// The scales of a tile for `count` blocks of K, if the activations have scales.
    pub(super) fn scales(
        &self,
        block: &RowBlock,
        tile: &Range<usize>,
        k_block: usize,
        count: usize,
    ) -> Option<&'a [f32]> {
        let start = (block.live_rows().start + tile.start) * self.k_blocks;
        self.scales.map(|scales| &scales[start + k_block * tile.len()..][..count * tile.len()])
    }
}

/// Values from which on packing is worth waking other threads for.
const PARALLEL_FROM_VALUES: usize = 1 << 17;

/// Packs the live rows into `pairs` and `scales`, on the threads of the pool this is called in; in steps of so many
/// pairs if a number is given.
pub(super) fn pack_rows<'a>(
    blocks: &[RowBlock],
    step_pairs: Option<usize>,
    activations: Activations<'_>,
    (m_sum, k): (usize, usize),
    pairs: &'a mut [u32],
    scales: &'a mut [f32],
) -> PackedRows<'a> {
    let values = pairs.len();
    let target = Target { m_sum, k, step_pairs, pairs: Disjoint::new(pairs), scales: Disjoint::new(scales) };
    let pack = |block: &RowBlock| {
        let whole = step_pairs.map(|_| block.all());
        let tiles = block.tiles().filter(|_| whole.is_none());
        for tile in whole.clone().into_iter().chain(tiles) {
            // SAFETY: every block is packed by one task, and every tile of it once.
            #[allow(unsafe_code)]
            unsafe {
                target.pack(block, tile, activations);
            }
        }
    };
    if values < PARALLEL_FROM_VALUES {
        blocks.iter().for_each(pack)
    } else {
        blocks.par_iter().for_each(pack)
    }
    let scales = matches!(activations, Activations::E4m3 { .. }).then_some(&*scales);
    PackedRows { k_pairs: k.div_ceil(2), k_blocks: k.div_ceil(WEIGHT_BLOCK), pairs, scales }
}

/// Where packed rows go.
struct Target<'a> {
    m_sum: usize,
    k: usize,
    step_pairs: Option<usize>,
    pairs: Disjoint<'a, u32>,
    scales: Disjoint<'a, f32>,
}

impl Target<'_> {
    /// Packs one tile.
    ///
    /// # Safety
    /// Nobody else reads or writes this tile's pairs and scales meanwhile.
    #[allow(unsafe_code)]
    unsafe fn pack(&self, block: &RowBlock, tile: Range<usize>, activations: Activations<'_>) {
        let (k_pairs, k_blocks) = (self.k.div_ceil(2), self.k.div_ceil(WEIGHT_BLOCK));
        let (row, live_row) = (block.rows().start + tile.start, block.live_rows().start + tile.start);
        // SAFETY: tiles cut the live rows into parts that do not overlap, and the caller has this one to itself.
        let pairs = unsafe { self.pairs.part(live_row * k_pairs, tile.len() * k_pairs) };
        let values = row * self.k..(row + tile.len()) * self.k;
        match activations {
            Activations::Bf16(rows) => self.pack_tile(&rows[values], pairs, |value| value.to_bits()),
            Activations::E4m3 { rows, scales } => {
                self.pack_tile(&rows[values], pairs, |value| E4M3_AS_BF16[usize::from(value.0)]);
                // SAFETY: as above.
                let packed = unsafe { self.scales.part(live_row * k_blocks, tile.len() * k_blocks) };
                for (group, packed) in packed.chunks_exact_mut(tile.len()).enumerate() {
                    for (packed, row) in packed.iter_mut().zip(row..) {
                        *packed = scales.value(row, group, self.m_sum, k_blocks);
                    }
                }
            }
        }
    }

    fn pack_tile<T: Copy>(&self, rows: &[T], tile: &mut [u32], bits: impl Fn(T) -> u16) {
        match self.step_pairs {
            Some(step_pairs) => pack_steps(rows, self.k, step_pairs, tile, bits),
            None => pack_tile(rows, self.k, tile, bits),
        }
    }
}

/// `[rows][k]` to `[steps][rows][step_pairs]`, an odd k filled up with zero; the last step may have fewer pairs.
fn pack_steps<T: Copy>(rows: &[T], k: usize, step_pairs: usize, tile: &mut [u32], bits: impl Fn(T) -> u16) {
    let count = rows.len() / k;
    for (row, values) in rows.chunks_exact(k).enumerate() {
        for (values, tile) in values.chunks(2 * step_pairs).zip(tile.chunks_mut(step_pairs * count)) {
            let pairs = tile.len() / count;
            let (whole, odd) = values.as_chunks::<2>();
            let own = &mut tile[row * pairs..][..pairs];
            for (pair, &[even, odd]) in own.iter_mut().zip(whole) {
                *pair = u32::from(bits(even)) | u32::from(bits(odd)) << 16;
            }
            if let &[last] = odd {
                own[whole.len()] = u32::from(bits(last));
            }
        }
    }
}

/// `[rows][k]` to `[pairs][rows]`, an odd k filled up with zero.
fn pack_tile<T: Copy>(rows: &[T], k: usize, tile: &mut [u32], bits: impl Fn(T) -> u16) {
    let count = rows.len() / k;
    // A block of K at a time, so that what the rows take turns to write stays in the L1 cache.
    for (first, tile) in (0..k).step_by(2 * BLOCK_PAIRS).zip(tile.chunks_mut(BLOCK_PAIRS * count)) {
        for (row, values) in rows.chunks_exact(k).enumerate() {
            let (whole, odd) = values[first..k.min(first + 2 * BLOCK_PAIRS)].as_chunks::<2>();
            for (pair, &[even, odd]) in tile.chunks_exact_mut(count).zip(whole) {
                pair[row] = u32::from(bits(even)) | u32::from(bits(odd)) << 16;
            }
            if let &[last] = odd {
                tile[whole.len() * count + row] = u32::from(bits(last));
            }
        }
    }
}
