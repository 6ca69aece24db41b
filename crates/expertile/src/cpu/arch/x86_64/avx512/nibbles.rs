//! 4-bit weights with AVX-512 BF16: nibbles are looked up as bf16 in a register, 32 at a time.

use super::{Prefetch, Tile, load_pairs, load_sums, multiply_pair, store_pairs, store_sums};
use crate::cpu::arch::panel::{
    Ahead, BLOCK_GROUPS, GROUP_PAIRS, GroupScale, LEAST_SCALE, NibbleGroup, NibbleLine, PANEL, PairLine, ScaleKind,
    Sums,
};
use crate::cpu::arch::{Isa, Level};
use std::arch::x86_64::*;

/// See [`crate::cpu::arch::nibbles::multiply_nibbles`].
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
    assert!(isa.level() >= Level::Avx512);
    // SAFETY: an `Isa` of this level exists only if the CPU has every feature the kernel enables.
    unsafe { for_rows!(sums.len(), promote_groups::<_>(rows, groups, row_scales, sums, decoded, ahead)) }
}

/// See [`crate::cpu::arch::nibbles::multiply_nibbles_decoded`].
#[allow(unsafe_code)]
pub(crate) fn multiply_nibbles_decoded<S: GroupScale>(
    isa: Isa,
    rows: &[u32],
    lines: &[PairLine],
    groups: &[NibbleGroup<S>],
    row_scales: Option<&[f32]>,
    sums: &mut [Sums],
    ahead: Ahead<'_>,
) {
    assert!(isa.level() >= Level::Avx512);
    // SAFETY: an `Isa` of this level exists only if the CPU has every feature the kernel enables.
    unsafe { for_rows!(sums.len(), promote_decoded_groups::<_>(rows, lines, groups, row_scales, sums, ahead)) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vbmi,avx512bf16")]
fn promote_groups<S: GroupScale, const R: usize>(
    rows: &[u32],
    groups: &[NibbleGroup<S>],
    row_scales: Option<&[f32]>,
    sums: &mut [Sums],
    decoded: &mut [PairLine],
    ahead: Ahead<'_>,
) {
    let mut prefetch = Prefetch::new(ahead, groups.len() * GROUP_PAIRS);
    let table = table::<S>();
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
fn promote_decoded_groups<S: GroupScale, const R: usize>(
    rows: &[u32],
    lines: &[PairLine],
    groups: &[NibbleGroup<S>],
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
fn promote<S: GroupScale, const R: usize>(
    tile: &Tile<R>,
    scales: &[S; PANEL],
    group: usize,
    row_scales: Option<&[f32]>,
    sums: &mut [Sums],
) {
    let [low_scale, high_scale] = widened(scales);
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
fn widened<S: GroupScale>(scales: &[S; PANEL]) -> [__m512; 2] {
    let halves = [scales[..PANEL / 2].as_ptr(), scales[PANEL / 2..].as_ptr()];
    if S::KIND == ScaleKind::Exponent {
        let least = _mm512_set1_epi32(LEAST_SCALE as i32);
        return halves.map(|half| {
            // SAFETY: half of the scales is one register of 16 bytes; an unaligned load.
            let bytes = unsafe { _mm_loadu_si128(half.cast()) };
            let exponents = _mm512_slli_epi32::<23>(_mm512_cvtepu8_epi32(bytes));
            _mm512_castsi512_ps(_mm512_max_epu32(exponents, least))
        });
    }
    halves.map(|half| {
        // SAFETY: half of the scales, of the two other kinds, is one register of 32 bytes; an unaligned load.
        let words = unsafe { _mm256_loadu_si256(half.cast()) };
        match S::KIND {
            ScaleKind::F16 => _mm512_cvtph_ps(words),
            _ => _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(words))),
        }
    })
}

#[inline]
#[target_feature(enable = "avx512f")]
#[allow(unsafe_code)]
fn table<S: GroupScale>() -> __m512i {
    // The bf16 of a nibble, twice: a look-up takes the low five bits of a word, of which the fifth is not the nibble's.
    let table: &[[u16; 16]; 2] = const { &[S::NIBBLES; 2] };
    // SAFETY: the table is one register of 64 bytes; an unaligned load.
    unsafe { _mm512_loadu_si512(table.as_ptr().cast()) }
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
