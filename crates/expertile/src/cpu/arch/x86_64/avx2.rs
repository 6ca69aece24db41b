//! GEMM kernels for AVX2 with FMA: up to 5 rows by 16 columns in registers, bf16 pairs split into two f32.

use crate::cpu::arch::panel::{
    BLOCK_PAIRS, ByteLine, BytePanel, MAX_ROWS, PANEL, PairLine, REBIAS, SHIFTED_BITS, Sums,
};
use crate::cpu::arch::portable::{decode_line, split};
use crate::cpu::arch::{Isa, Level};
use std::arch::x86_64::*;

/// Rows whose sums stay in registers: with 16 columns, ten of the sixteen; weights and a row's value take five.
const ROWS: usize = 5;
/// Columns whose sums stay in registers: two of eight f32.
const COLUMNS: usize = 16;

/// Rows of a tile as f32: `[pairs][even, odd][rows]`.
type SplitRows = [[[f32; MAX_ROWS]; 2]; BLOCK_PAIRS];

/// See [`crate::cpu::arch::gemm::multiply`].
#[allow(unsafe_code)]
pub(crate) fn multiply(isa: Isa, rows: &[u32], panel: &[PairLine], sums: &mut [Sums]) {
    assert!(isa.level() == Level::Avx2);
    let tile = sums.len();
    let mut split_rows = [[[0.0; MAX_ROWS]; 2]; BLOCK_PAIRS];
    for (rows, lines) in rows.chunks(tile * BLOCK_PAIRS).zip(panel.chunks(BLOCK_PAIRS)) {
        for (split_rows, pair) in split_rows.iter_mut().zip(rows.chunks_exact(tile)) {
            let [even, odd] = split_rows;
            for (row, &pair) in pair.iter().enumerate() {
                (even[row], odd[row]) = split(pair);
            }
        }
        // As few parts as there can be, of nearly the same size.
        let part = tile.div_ceil(tile.div_ceil(ROWS));
        for first in (0..tile).step_by(part) {
            let sums = &mut sums[first..tile.min(first + part)];
            // SAFETY: an `Isa` of this level exists only if the CPU has every feature the kernel enables.
            unsafe {
                match sums.len() {
                    1 => multiply_rows::<1>(&split_rows, first, lines, sums),
                    2 => multiply_rows::<2>(&split_rows, first, lines, sums),
                    3 => multiply_rows::<3>(&split_rows, first, lines, sums),
                    4 => multiply_rows::<4>(&split_rows, first, lines, sums),
                    5 => multiply_rows::<5>(&split_rows, first, lines, sums),
                    rows => unreachable!("a part of {rows} rows"),
                }
            }
        }
    }
}

#[target_feature(enable = "avx2,fma")]
#[allow(unsafe_code)]
fn multiply_rows<const R: usize>(rows: &SplitRows, first: usize, panel: &[PairLine], sums: &mut [Sums]) {
    for column in (0..PANEL).step_by(COLUMNS) {
        let mut tile = [[_mm256_setzero_ps(); 2]; R];
        for ([even, odd], line) in rows.iter().zip(panel) {
            // Written out: `map` is compiled without AVX2, and what it calls is then not inlined.
            let columns = &line[column..column + COLUMNS];
            // SAFETY: 16 columns are two registers of 8 u32; unaligned loads.
            let [a, b] = unsafe {
                [_mm256_loadu_si256(columns.as_ptr().cast()), _mm256_loadu_si256(columns[8..].as_ptr().cast())]
            };
            let weights = [_mm256_slli_epi32::<16>(a), _mm256_slli_epi32::<16>(b)];
            let weights = [_mm256_castsi256_ps(weights[0]), _mm256_castsi256_ps(weights[1])];
            accumulate(&mut tile, &even[first..first + R], weights);
            let high = _mm256_set1_epi32(0xffff_0000_u32 as i32);
            let weights = [_mm256_and_si256(a, high), _mm256_and_si256(b, high)];
            let weights = [_mm256_castsi256_ps(weights[0]), _mm256_castsi256_ps(weights[1])];
            accumulate(&mut tile, &odd[first..first + R], weights);
        }
        for (sums, tile) in sums.iter_mut().zip(&tile) {
            for (sums, &tile) in sums[column..column + COLUMNS].chunks_exact_mut(8).zip(tile) {
                // SAFETY: a chunk is one register of 8 f32; unaligned access.
                unsafe { _mm256_storeu_ps(sums.as_mut_ptr(), _mm256_add_ps(_mm256_loadu_ps(sums.as_ptr()), tile)) };
            }
        }
    }
}

/// See [`crate::cpu::arch::gemm::multiply_e4m3`]: every byte as bf16, in units of `DECODED_UNIT`.
#[allow(unsafe_code)]
pub(crate) fn decode(isa: Isa, panel: BytePanel<'_>, pairs: &mut [PairLine]) {
    assert!(isa.level() == Level::Avx2);
    let blocks = panel.lines.chunks(BLOCK_PAIRS).zip(panel.special).zip(pairs.chunks_mut(BLOCK_PAIRS));
    for ((lines, &special), pairs) in blocks {
        for (index, (line, pairs)) in lines.iter().zip(pairs).enumerate() {
            if special >> index & 1 != 0 {
                decode_line(line, pairs);
            } else {
                // SAFETY: an `Isa` of this level exists only if the CPU has AVX2.
                unsafe { shift_line(line, pairs) };
            }
        }
    }
}

/// Shifts the words of a line without special bytes into bf16: the low bytes are the first half of its columns.
#[target_feature(enable = "avx2")]
#[allow(unsafe_code)]
fn shift_line(line: &ByteLine, pairs: &mut PairLine) {
    let (kept, rebias) = (_mm256_set1_epi16(SHIFTED_BITS as i16), _mm256_set1_epi16(REBIAS as i16));
    let (first, second) = pairs.split_at_mut(PANEL / 2);
    let targets = first.chunks_exact_mut(8).zip(second.chunks_exact_mut(8));
    for (bytes, (low, high)) in line.chunks_exact(32).zip(targets) {
        // SAFETY: a chunk is one register of 32 bytes; an unaligned load.
        let bytes = unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) };
        for (words, target) in [(_mm256_slli_epi16::<8>(bytes), low), (bytes, high)] {
            let shifted = _mm256_and_si256(_mm256_srai_epi16::<4>(words), kept);
            // SAFETY: a target is one register of 8 u32; an unaligned store.
            unsafe { _mm256_storeu_si256(target.as_mut_ptr().cast(), _mm256_or_si256(shifted, rebias)) };
        }
    }
}

#[inline]
#[target_feature(enable = "avx2,fma")]
fn accumulate<const R: usize>(tile: &mut [[__m256; 2]; R], rows: &[f32], weights: [__m256; 2]) {
    for (sums, &row) in tile.iter_mut().zip(rows) {
        let row = _mm256_set1_ps(row);
        for (sum, weights) in sums.iter_mut().zip(weights) {
            *sum = _mm256_fmadd_ps(row, weights, *sum);
        }
    }
}
