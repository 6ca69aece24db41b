//! GEMM kernels for AVX2 with FMA: up to 5 rows by 16 columns in registers, or 2 by 32; bf16 pairs split into two f32.

pub(crate) mod e4m3;
pub(crate) mod nibbles;

use super::prefetch::Prefetch;
use crate::cpu::arch::panel::{Ahead, BLOCK_PAIRS, MAX_ROWS, PANEL, PairLine, Sums};
use crate::cpu::arch::portable::split;
use crate::cpu::arch::{Isa, Level};
use std::arch::x86_64::*;

/// Rows whose sums stay in registers beside 16 columns: ten of the sixteen; weights and a row's value take five.
const ROWS: usize = 5;
/// Rows that all 32 columns of a panel can stand beside. One row or two then read a panel from its first byte to its
/// last, and have enough sums to add to while others are still being added.
const WIDE_ROWS: usize = 2;
/// f32 of a register.
const LANES: usize = 8;

/// Rows of a tile as f32: `[pairs][even, odd][rows]`.
type SplitRows = [[[f32; MAX_ROWS]; 2]; BLOCK_PAIRS];

/// See [`crate::cpu::arch::gemm::multiply`].
#[allow(unsafe_code)]
pub(crate) fn multiply(isa: Isa, rows: &[u32], panel: &[PairLine], sums: &mut [Sums], ahead: Ahead<'_>) {
    assert!(isa.level() == Level::Avx2);
    let tile = sums.len();
    let mut split_rows = [[[0.0; MAX_ROWS]; 2]; BLOCK_PAIRS];
    let blocks = panel.len().div_ceil(BLOCK_PAIRS);
    let each = rows.chunks(tile * BLOCK_PAIRS).zip(panel.chunks(BLOCK_PAIRS)).enumerate();
    for (block, (rows, lines)) in each {
        split_tile(rows, tile, &mut split_rows);
        // As few parts as there can be, of nearly the same size.
        let part = tile.div_ceil(tile.div_ceil(ROWS));
        for first in (0..tile).step_by(part) {
            let sums = &mut sums[first..tile.min(first + part)];
            let ahead = if first == 0 { ahead.part(block, blocks) } else { Ahead::NOTHING };
            // SAFETY: an `Isa` of this level exists only if the CPU has every feature the kernel enables.
            unsafe {
                match sums.len() {
                    1 => multiply_rows::<1, 4>(&split_rows, first, lines, sums, ahead),
                    2 => multiply_rows::<WIDE_ROWS, 4>(&split_rows, first, lines, sums, ahead),
                    3 => multiply_rows::<3, 2>(&split_rows, first, lines, sums, ahead),
                    4 => multiply_rows::<4, 2>(&split_rows, first, lines, sums, ahead),
                    5 => multiply_rows::<ROWS, 2>(&split_rows, first, lines, sums, ahead),
                    rows => unreachable!("a part of {rows} rows"),
                }
            }
        }
    }
}

/// Splits the pairs of a tile's rows, up to a block of them.
fn split_tile(rows: &[u32], tile: usize, split_rows: &mut SplitRows) {
    for ([even, odd], pair) in split_rows.iter_mut().zip(rows.chunks_exact(tile)) {
        for (row, &pair) in pair.iter().enumerate() {
            (even[row], odd[row]) = split(pair);
        }
    }
}

/// `R` rows by `C` registers of columns at a time.
#[target_feature(enable = "avx2,fma")]
#[allow(unsafe_code)]
fn multiply_rows<const R: usize, const C: usize>(
    rows: &SplitRows,
    first: usize,
    panel: &[PairLine],
    sums: &mut [Sums],
    ahead: Ahead<'_>,
) {
    let passes = PANEL / (C * LANES);
    for (pass, column) in (0..PANEL).step_by(C * LANES).enumerate() {
        let mut prefetch = Prefetch::new(ahead.part(pass, passes), panel.len());
        let mut tile = [[_mm256_setzero_ps(); C]; R];
        for ([even, odd], line) in rows.iter().zip(panel) {
            prefetch.step();
            // Written out: `map` is compiled without AVX2, and what it calls is then not inlined.
            let mut low = [_mm256_setzero_ps(); C];
            let mut high = [_mm256_setzero_ps(); C];
            for (index, columns) in line[column..column + C * LANES].chunks_exact(LANES).enumerate() {
                // SAFETY: a chunk is one register of 8 u32; an unaligned load.
                (low[index], high[index]) = widen(unsafe { _mm256_loadu_si256(columns.as_ptr().cast()) });
            }
            accumulate(&mut tile, &even[first..first + R], low);
            accumulate(&mut tile, &odd[first..first + R], high);
        }
        for (sums, tile) in sums.iter_mut().zip(&tile) {
            for (sums, &tile) in sums[column..column + C * LANES].chunks_exact_mut(LANES).zip(tile) {
                // SAFETY: a chunk is one register of 8 f32; unaligned access.
                unsafe { _mm256_storeu_ps(sums.as_mut_ptr(), _mm256_add_ps(_mm256_loadu_ps(sums.as_ptr()), tile)) };
            }
        }
    }
}

/// The even and the odd values of pairs, as f32.
#[inline]
#[target_feature(enable = "avx2")]
fn widen(pairs: __m256i) -> (__m256, __m256) {
    let low = _mm256_castsi256_ps(_mm256_slli_epi32::<16>(pairs));
    let high = _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(0xffff_0000_u32 as i32)));
    (low, high)
}

#[inline]
#[target_feature(enable = "avx2,fma")]
fn accumulate<const R: usize, const C: usize>(tile: &mut [[__m256; C]; R], rows: &[f32], weights: [__m256; C]) {
    for (sums, &row) in tile.iter_mut().zip(rows) {
        let row = _mm256_set1_ps(row);
        for (sum, weights) in sums.iter_mut().zip(weights) {
            *sum = _mm256_fmadd_ps(row, weights, *sum);
        }
    }
}
