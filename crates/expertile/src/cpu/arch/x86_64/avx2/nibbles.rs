//! 4-bit weights with AVX2: nibbles are looked up as the two bytes of a bf16 in registers, 32 at a time.

use super::{LANES, Prefetch, ROWS, SplitRows, WIDE_ROWS, accumulate, split_tile, widen};
use crate::cpu::arch::panel::{
    Ahead, BLOCK_GROUPS, BLOCK_PAIRS, GROUP_PAIRS, GroupScale, LEAST_SCALE, MAX_ROWS, NibbleGroup, NibbleLine, PANEL,
    PairLine, ScaleKind, Sums,
};
use crate::cpu::arch::{Isa, Level};
use std::arch::x86_64::*;

/// See [`crate::cpu::arch::nibbles::multiply_nibbles`].
///
/// One row or two are multiplied by what has just been looked up; for more rows it is kept, and read again.
#[allow(unsafe_code)]
pub(crate) fn multiply_nibbles<S: GroupScale>(
    isa: Isa,
    rows: &[u32],
    groups: &[NibbleGroup<S>],
    row_scales: Option<&[f32]>,
    sums: &mut [Sums],
    decoded: &mut [PairLine],
    ahead: Ahead<'_>,
) {
    assert!(isa.level() == Level::Avx2);
    let tile = sums.len();
    let mut split_rows = [[[0.0; MAX_ROWS]; 2]; BLOCK_PAIRS];
    let mut scratch = [[0; PANEL]; BLOCK_PAIRS];
    let blocks = groups.len().div_ceil(BLOCK_GROUPS);
    let each = rows.chunks(tile * BLOCK_PAIRS).zip(groups.chunks(BLOCK_GROUPS)).enumerate();
    for (block, (rows, groups)) in each {
        split_tile(rows, tile, &mut split_rows);
        let (ahead, row_scales) = (ahead.part(block, blocks), of_block(row_scales, block, tile));
        if decoded.is_empty() && tile <= WIDE_ROWS {
            // SAFETY: an `Isa` of this level exists only if the CPU has every feature the kernel enables.
            unsafe {
                match tile {
                    1 => multiply_groups::<1, S>(&split_rows, groups, row_scales, sums, ahead),
                    _ => multiply_groups::<WIDE_ROWS, S>(&split_rows, groups, row_scales, sums, ahead),
                }
            }
            continue;
        }
        let lines = match decoded.chunks_mut(BLOCK_PAIRS).nth(block) {
            Some(decoded) => decoded,
            None => &mut scratch[..groups.len() * GROUP_PAIRS],
        };
        // SAFETY: as above.
        unsafe { decode(groups, lines, ahead) };
        multiply_block(&split_rows, lines, groups, row_scales, sums, Ahead::NOTHING);
    }
}

/// See [`crate::cpu::arch::nibbles::multiply_nibbles_decoded`].
pub(crate) fn multiply_nibbles_decoded<S: GroupScale>(
    isa: Isa,
    rows: &[u32],
    lines: &[PairLine],
    groups: &[NibbleGroup<S>],
    row_scales: Option<&[f32]>,
    sums: &mut [Sums],
    ahead: Ahead<'_>,
) {
    assert!(isa.level() == Level::Avx2);
    let tile = sums.len();
    let mut split_rows = [[[0.0; MAX_ROWS]; 2]; BLOCK_PAIRS];
    let blocks = groups.len().div_ceil(BLOCK_GROUPS);
    let each = rows.chunks(tile * BLOCK_PAIRS).zip(lines.chunks(BLOCK_PAIRS)).zip(groups.chunks(BLOCK_GROUPS));
    for (block, ((rows, lines), groups)) in each.enumerate() {
        split_tile(rows, tile, &mut split_rows);
        let row_scales = of_block(row_scales, block, tile);
        multiply_block(&split_rows, lines, groups, row_scales, sums, ahead.part(block, blocks));
    }
}

/// A block's scales of the rows of a tile.
fn of_block(row_scales: Option<&[f32]>, block: usize, tile: usize) -> Option<&[f32]> {
    row_scales.map(|scales| &scales[block * tile..][..tile])
}

/// One block of K, decoded, for all rows of a tile. Called by functions that hold an `Isa` of AVX2.
#[allow(unsafe_code)]
fn multiply_block<S: GroupScale>(
    rows: &SplitRows,
    lines: &[PairLine],
    groups: &[NibbleGroup<S>],
    row_scales: Option<&[f32]>,
    sums: &mut [Sums],
    ahead: Ahead<'_>,
) {
    let tile = sums.len();
    // As few parts as there can be, of nearly the same size.
    let part = tile.div_ceil(tile.div_ceil(ROWS));
    for first in (0..tile).step_by(part) {
        let rows_of_part = first..tile.min(first + part);
        let row_scales = row_scales.map(|scales| &scales[rows_of_part.clone()]);
        let sums = &mut sums[rows_of_part];
        let ahead = if first == 0 { ahead } else { Ahead::NOTHING };
        // SAFETY: the callers hold an `Isa` of AVX2, which exists only if the CPU has every feature the kernel enables.
        unsafe {
            match sums.len() {
                1 => multiply_lines::<1, 4, S>(rows, first, lines, groups, row_scales, sums, ahead),
                2 => multiply_lines::<WIDE_ROWS, 4, S>(rows, first, lines, groups, row_scales, sums, ahead),
                3 => multiply_lines::<3, 2, S>(rows, first, lines, groups, row_scales, sums, ahead),
                4 => multiply_lines::<4, 2, S>(rows, first, lines, groups, row_scales, sums, ahead),
                5 => multiply_lines::<ROWS, 2, S>(rows, first, lines, groups, row_scales, sums, ahead),
                rows => unreachable!("a part of {rows} rows"),
            }
        }
    }
}

/// `R` rows by `C` registers of columns at a time.
#[target_feature(enable = "avx2,fma,f16c")]
#[allow(unsafe_code)]
fn multiply_lines<const R: usize, const C: usize, S: GroupScale>(
    rows: &SplitRows,
    first: usize,
    lines: &[PairLine],
    groups: &[NibbleGroup<S>],
    row_scales: Option<&[f32]>,
    sums: &mut [Sums],
    ahead: Ahead<'_>,
) {
    let passes = PANEL / (C * LANES);
    for (pass, column) in (0..PANEL).step_by(C * LANES).enumerate() {
        let mut prefetch = Prefetch::new(ahead.part(pass, passes), lines.len());
        let each = rows.chunks(GROUP_PAIRS).zip(lines.chunks(GROUP_PAIRS)).zip(groups);
        for ((rows, lines), group) in each {
            let mut tile = [[_mm256_setzero_ps(); C]; R];
            for ([even, odd], line) in rows.iter().zip(lines) {
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
            promote(&tile, group, column, row_scales, sums);
        }
    }
}

/// `R` rows by all columns, nibbles looked up on the way.
#[target_feature(enable = "avx2,fma,f16c")]
fn multiply_groups<const R: usize, S: GroupScale>(
    rows: &SplitRows,
    groups: &[NibbleGroup<S>],
    row_scales: Option<&[f32]>,
    sums: &mut [Sums],
    ahead: Ahead<'_>,
) {
    let mut prefetch = Prefetch::new(ahead, groups.len() * GROUP_PAIRS);
    let tables = tables::<S>();
    for (rows, group) in rows.chunks(GROUP_PAIRS).zip(groups) {
        let mut tile = [[_mm256_setzero_ps(); PANEL / LANES]; R];
        for ([even, odd], line) in rows.iter().zip(&group.lines) {
            prefetch.step();
            let pairs = look_up(tables, line);
            let mut low = [_mm256_setzero_ps(); PANEL / LANES];
            let mut high = [_mm256_setzero_ps(); PANEL / LANES];
            for (index, pairs) in pairs.into_iter().enumerate() {
                (low[index], high[index]) = widen(pairs);
            }
            accumulate(&mut tile, &even[..R], low);
            accumulate(&mut tile, &odd[..R], high);
        }
        promote(&tile, group, 0, row_scales, sums);
    }
}

/// `sums += (tile * row scale) * column scale` for one group, from a column on.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
#[allow(unsafe_code)]
fn promote<const R: usize, const C: usize, S: GroupScale>(
    tile: &[[__m256; C]; R],
    group: &NibbleGroup<S>,
    column: usize,
    row_scales: Option<&[f32]>,
    sums: &mut [Sums],
) {
    for (index, scales) in group.scales[column..column + C * LANES].chunks_exact(LANES).enumerate() {
        let scale = widened(scales);
        for (row, (tile, sums)) in tile.iter().zip(&mut *sums).enumerate() {
            let mut fresh = tile[index];
            if let Some(row_scales) = row_scales {
                fresh = _mm256_mul_ps(fresh, _mm256_set1_ps(row_scales[row]));
            }
            let sums = &mut sums[column + index * LANES..][..LANES];
            // SAFETY: the slice is one register of 8 f32; unaligned access.
            unsafe {
                let sum = _mm256_fmadd_ps(fresh, scale, _mm256_loadu_ps(sums.as_ptr()));
                _mm256_storeu_ps(sums.as_mut_ptr(), sum);
            }
        }
    }
}

/// Every nibble as bf16.
#[target_feature(enable = "avx2")]
#[allow(unsafe_code)]
fn decode<S: GroupScale>(groups: &[NibbleGroup<S>], pairs: &mut [PairLine], ahead: Ahead<'_>) {
    let mut prefetch = Prefetch::new(ahead, pairs.len());
    let tables = tables::<S>();
    for (line, pairs) in groups.iter().flat_map(|group| &group.lines).zip(pairs) {
        prefetch.step();
        for (target, found) in pairs.chunks_exact_mut(LANES).zip(look_up(tables, line)) {
            // SAFETY: a target is one register of 8 u32; an unaligned store.
            unsafe { _mm256_storeu_si256(target.as_mut_ptr().cast(), found) };
        }
    }
}

/// The values of 8 scales.
#[inline]
#[target_feature(enable = "avx2,f16c")]
#[allow(unsafe_code)]
fn widened<S: GroupScale>(scales: &[S]) -> __m256 {
    assert_eq!(scales.len(), LANES);
    match S::KIND {
        ScaleKind::Exponent => {
            // SAFETY: the scales are 8 bytes, which this loads; unaligned.
            let bytes = unsafe { _mm_loadl_epi64(scales.as_ptr().cast()) };
            let exponents = _mm256_slli_epi32::<23>(_mm256_cvtepu8_epi32(bytes));
            _mm256_castsi256_ps(_mm256_max_epu32(exponents, _mm256_set1_epi32(LEAST_SCALE as i32)))
        }
        ScaleKind::Bf16 => {
            // SAFETY: the scales are one register of 16 bytes; an unaligned load.
            let words = unsafe { _mm_loadu_si128(scales.as_ptr().cast()) };
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(words)))
        }
        ScaleKind::F16 => {
            // SAFETY: as above.
            _mm256_cvtph_ps(unsafe { _mm_loadu_si128(scales.as_ptr().cast()) })
        }
    }
}

/// The low bytes, then the high bytes, of the bf16 of every nibble, each in both halves of a register.
const fn split_bytes(nibbles: [u16; 16]) -> [[u8; 32]; 2] {
    let mut tables = [[0; 32]; 2];
    let mut at = 0;
    while at < 32 {
        [tables[0][at], tables[1][at]] = nibbles[at % 16].to_le_bytes();
        at += 1;
    }
    tables
}

#[inline]
#[target_feature(enable = "avx2")]
#[allow(unsafe_code)]
fn tables<S: GroupScale>() -> [__m256i; 2] {
    let tables: &[[u8; 32]; 2] = const { &split_bytes(S::NIBBLES) };
    // SAFETY: a table is one register of 32 bytes; unaligned loads.
    unsafe { [_mm256_loadu_si256(tables[0].as_ptr().cast()), _mm256_loadu_si256(tables[1].as_ptr().cast())] }
}

/// A line's pairs, 8 columns to a register.
#[inline]
#[target_feature(enable = "avx2")]
#[allow(unsafe_code)]
fn look_up([low_bytes, high_bytes]: [__m256i; 2], line: &NibbleLine) -> [__m256i; PANEL / LANES] {
    let nibble = _mm256_set1_epi8(15);
    // SAFETY: a line is one register of 32 bytes; an unaligned load.
    let bytes = unsafe { _mm256_loadu_si256(line.as_ptr().cast()) };
    // Quarters 0, 2, 1, 3: what is then interleaved within halves comes out in the order of columns.
    let bytes = _mm256_permute4x64_epi64::<0b11_01_10_00>(bytes);
    let (first, second) = (_mm256_and_si256(bytes, nibble), _mm256_and_si256(_mm256_srli_epi16::<4>(bytes), nibble));
    let (first_low, first_high) = (_mm256_shuffle_epi8(low_bytes, first), _mm256_shuffle_epi8(high_bytes, first));
    let (second_low, second_high) = (_mm256_shuffle_epi8(low_bytes, second), _mm256_shuffle_epi8(high_bytes, second));
    [
        _mm256_unpacklo_epi8(first_low, first_high),
        _mm256_unpackhi_epi8(first_low, first_high),
        _mm256_unpacklo_epi8(second_low, second_high),
        _mm256_unpackhi_epi8(second_low, second_high),
    ]
}
