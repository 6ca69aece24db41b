//! MXFP4 weights with AVX-512 BF16: nibbles are looked up as bf16 in a register, 32 at a time.

use super::{Prefetch, Tile, load_pairs, load_sums, multiply_pair, store_pairs, store_sums};
use crate::cpu::arch::panel::{
    Ahead, BLOCK_GROUPS, E2M1_AS_BF16, GROUP_PAIRS, LEAST_SCALE, Mxfp4Group, NibbleLine, PANEL, PairLine, Sums,
};
use crate::cpu::arch::{Isa, Level};
use std::arch::x86_64::*;

/// See [`crate::cpu::arch::mxfp4::multiply_mxfp4`].
#[allow(unsafe_code)]
pub(crate) fn multiply_mxfp4(
    isa: Isa,
    rows: &[u32],
    groups: &[Mxfp4Group],
    row_scales: Option<&[f32]>,
    sums: &mut [Sums],
    decoded: &mut [PairLine],
    ahead: Ahead<'_>,
) {
    assert!(isa.level() >= Level::Avx512);
    // SAFETY: an `Isa` of this level exists only if the CPU has every feature the kernel enables.
    unsafe { for_rows!(sums.len(), promote_groups(rows, groups, row_scales, sums, decoded, ahead)) }
}

/// See [`crate::cpu::arch::mxfp4::multiply_mxfp4_decoded`].
#[allow(unsafe_code)]
pub(crate) fn multiply_mxfp4_decoded(
    isa: Isa,
    rows: &[u32],
    lines: &[PairLine],
    groups: &[Mxfp4Group],
    row_scales: Option<&[f32]>,
    sums: &mut [Sums],
    ahead: Ahead<'_>,
) {
    assert!(isa.level() >= Level::Avx512);
    // SAFETY: an `Isa` of this level exists only if the CPU has every feature the kernel enables.
    unsafe { for_rows!(sums.len(), promote_decoded_groups(rows, lines, groups, row_scales, sums, ahead)) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vbmi,avx512bf16")]
fn promote_groups<const R: usize>(
    rows: &[u32],
    groups: &[Mxfp4Group],
    row_scales: Option<&[f32]>,
    sums: &mut [Sums],
    decoded: &mut [PairLine],
    ahead: Ahead<'_>,
) {
    let mut prefetch = Prefetch::new(ahead, groups.len() * GROUP_PAIRS);
    let table = table();
    let mut decoded = decoded.iter_mut();
    for (index, (rows, group)) in rows.chunks(GROUP_PAIRS * R).zip(groups).enumerate() {
        let mut tile = [[_mm512_setzero_ps(); 2]; R];
        for (pair, line) in rows.as_chunks::<R>().0.iter().zip(&group.lines) {
            prefetch.step();
            let weights = look_up(table, line);
            if let Some(decoded) = decoded.next() {
                store_pairs(decoded, weights);
            }
            multiply_pair(&mut tile, pair, weights);
        }
        promote(&tile, &group.scales, index, row_scales, sums);
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vbmi,avx512bf16")]
fn promote_decoded_groups<const R: usize>(
    rows: &[u32],
    lines: &[PairLine],
    groups: &[Mxfp4Group],
    row_scales: Option<&[f32]>,
    sums: &mut [Sums],
    ahead: Ahead<'_>,
) {
    let mut prefetch = Prefetch::new(ahead, lines.len());
    let each = rows.chunks(GROUP_PAIRS * R).zip(lines.chunks(GROUP_PAIRS)).zip(groups);
    for (index, ((rows, lines), group)) in each.enumerate() {
        let mut tile = [[_mm512_setzero_ps(); 2]; R];
        for (pair, line) in rows.as_chunks::<R>().0.iter().zip(lines) {
            prefetch.step();
            multiply_pair(&mut tile, pair, load_pairs(line));
        }
        promote(&tile, &group.scales, index, row_scales, sums);
    }
}

/// `sums += (tile * row scale) * column scale` for one group.
#[inline]
#[target_feature(enable = "avx512f")]
fn promote<const R: usize>(
    tile: &Tile<R>,
    scales: &[u8; PANEL],
    group: usize,
    row_scales: Option<&[f32]>,
    sums: &mut [Sums],
) {
    let [low_scale, high_scale] = powers_of_two(scales);
    for (row, (tile, sums)) in tile.iter().zip(sums).enumerate() {
        let [mut low, mut high] = *tile;
        if let Some(row_scales) = row_scales {
            let row_scale = _mm512_set1_ps(row_scales[group / BLOCK_GROUPS * R + row]);
            (low, high) = (_mm512_mul_ps(low, row_scale), _mm512_mul_ps(high, row_scale));
        }
        let [low_sum, high_sum] = load_sums(sums);
        store_sums(sums, &[_mm512_fmadd_ps(low, low_scale, low_sum), _mm512_fmadd_ps(high, high_scale, high_sum)]);
    }
}

/// The scales' values.
#[inline]
#[target_feature(enable = "avx512f")]
#[allow(unsafe_code)]
fn powers_of_two(scales: &[u8; PANEL]) -> [__m512; 2] {
    // SAFETY: the scales are two registers of 16 bytes; unaligned loads.
    let halves = unsafe { [_mm_loadu_si128(scales.as_ptr().cast()), _mm_loadu_si128(scales[16..].as_ptr().cast())] };
    let least = _mm512_set1_epi32(LEAST_SCALE as i32);
    halves.map(|bytes| {
        let exponents = _mm512_slli_epi32::<23>(_mm512_cvtepu8_epi32(bytes));
        _mm512_castsi512_ps(_mm512_max_epu32(exponents, least))
    })
}

/// The bf16 of a nibble, twice: a look-up takes the low five bits of a word, of which the fifth is not the nibble's.
static TABLE: [[u16; 16]; 2] = [E2M1_AS_BF16; 2];

#[inline]
#[target_feature(enable = "avx512f")]
#[allow(unsafe_code)]
fn table() -> __m512i {
    // SAFETY: the table is one register of 64 bytes; an unaligned load.
    unsafe { _mm512_loadu_si512(TABLE.as_ptr().cast()) }
}

/// A line's pairs: columns 0..16, then 16..32.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
#[allow(unsafe_code)]
fn look_up(table: __m512i, line: &NibbleLine) -> [__m512i; 2] {
    // SAFETY: a line is one register of 32 bytes; an unaligned load.
    let words = _mm512_cvtepu8_epi16(unsafe { _mm256_loadu_si256(line.as_ptr().cast()) });
    [_mm512_permutexvar_epi16(words, table), _mm512_permutexvar_epi16(_mm512_srli_epi16::<4>(words), table)]
}
