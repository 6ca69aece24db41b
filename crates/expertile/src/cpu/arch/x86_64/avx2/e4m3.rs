//! e4m3 weights with AVX2: bytes become bf16 by a shift in registers, and the few that do not by a look-up there.

use super::{LANES, Prefetch, SplitRows, WIDE_ROWS, accumulate, split_tile, widen};
use crate::cpu::arch::panel::{
    Ahead, BLOCK_PAIRS, BlockScales, ByteLine, BytePanel, DECODED_UNIT, MAX_ROWS, PANEL, PairLine, REBIAS,
    SHIFTED_BITS, Sums,
};
use crate::cpu::arch::portable::e4m3_as_bf16;
use crate::cpu::arch::{Isa, Level};
use std::arch::x86_64::*;

/// Most rows of a tile that [`multiply_few`] takes.
pub(crate) const FEW_ROWS: usize = WIDE_ROWS;

/// See [`crate::cpu::arch::gemm::multiply_e4m3`], for a few rows whose weights nobody else wants: they are multiplied as
/// they are decoded. The bits are those of decoding first.
#[allow(unsafe_code)]
pub(crate) fn multiply_few(
    isa: Isa,
    rows: &[u32],
    panel: BytePanel<'_>,
    scales: BlockScales<'_>,
    sums: &mut [Sums],
    ahead: Ahead<'_>,
) {
    assert!(isa.level() == Level::Avx2 && (1..=FEW_ROWS).contains(&sums.len()));
    let (tile, blocks) = (sums.len(), panel.special.len());
    let mut split_rows = [[[0.0; MAX_ROWS]; 2]; BLOCK_PAIRS];
    let each = rows.chunks(tile * BLOCK_PAIRS).zip(panel.lines.chunks(BLOCK_PAIRS)).zip(panel.special).enumerate();
    for (block, ((rows, lines), &special)) in each {
        split_tile(rows, tile, &mut split_rows);
        let ahead = ahead.part(block, blocks);
        // SAFETY: an `Isa` of this level exists only if the CPU has every feature the kernel enables.
        unsafe {
            match tile {
                1 => multiply_block::<1>(&split_rows, lines, special, scales, block, sums, ahead),
                _ => multiply_block::<FEW_ROWS>(&split_rows, lines, special, scales, block, sums, ahead),
            }
        }
    }
}

/// One block of K: a fresh sum, scaled, onto `sums`.
#[target_feature(enable = "avx2,fma")]
#[allow(unsafe_code)]
fn multiply_block<const R: usize>(
    rows: &SplitRows,
    lines: &[ByteLine],
    mut special: u64,
    scales: BlockScales<'_>,
    block: usize,
    sums: &mut [Sums],
    ahead: Ahead<'_>,
) {
    let mut prefetch = Prefetch::new(ahead, lines.len());
    let mut tile = [[_mm256_setzero_ps(); PANEL / LANES]; R];
    for ([even, odd], line) in rows.iter().zip(lines) {
        prefetch.step();
        let pairs = pairs(line, special & 1 != 0);
        special >>= 1;
        let mut low = [_mm256_setzero_ps(); PANEL / LANES];
        let mut high = [_mm256_setzero_ps(); PANEL / LANES];
        for (index, pairs) in pairs.into_iter().enumerate() {
            (low[index], high[index]) = widen(pairs);
        }
        accumulate(&mut tile, &even[..R], low);
        accumulate(&mut tile, &odd[..R], high);
    }
    for (row, (tile, sums)) in tile.iter().zip(sums).enumerate() {
        let scale = _mm256_set1_ps(scales.of(block, row, R));
        for (&fresh, sums) in tile.iter().zip(sums.chunks_exact_mut(LANES)) {
            // SAFETY: a chunk is one register of 8 f32; unaligned access.
            unsafe {
                // Rounded twice, as where the weights are decoded first.
                let sum = _mm256_add_ps(_mm256_loadu_ps(sums.as_ptr()), _mm256_mul_ps(fresh, scale));
                _mm256_storeu_ps(sums.as_mut_ptr(), sum);
            }
        }
    }
}

/// See [`crate::cpu::arch::gemm::multiply_e4m3`]: every byte as bf16, in units of `DECODED_UNIT`.
#[allow(unsafe_code)]
pub(crate) fn decode(isa: Isa, panel: BytePanel<'_>, lines: &mut [PairLine], ahead: Ahead<'_>) {
    assert!(isa.level() == Level::Avx2);
    // SAFETY: an `Isa` of this level exists only if the CPU has AVX2.
    unsafe { decode_lines(panel, lines, ahead) }
}

#[target_feature(enable = "avx2")]
#[allow(unsafe_code)]
fn decode_lines(panel: BytePanel<'_>, decoded: &mut [PairLine], ahead: Ahead<'_>) {
    let mut prefetch = Prefetch::new(ahead, panel.lines.len());
    let blocks = panel.lines.chunks(BLOCK_PAIRS).zip(panel.special).zip(decoded.chunks_mut(BLOCK_PAIRS));
    for ((lines, &special), decoded) in blocks {
        for (index, (line, decoded)) in lines.iter().zip(decoded).enumerate() {
            prefetch.step();
            for (target, found) in decoded.chunks_exact_mut(LANES).zip(pairs(line, special >> index & 1 != 0)) {
                // SAFETY: a target is one register of 8 u32; an unaligned store.
                unsafe { _mm256_storeu_si256(target.as_mut_ptr().cast(), found) };
            }
        }
    }
}

/// A line's pairs, 8 columns to a register: the low bytes of its words are the first half of the columns.
#[inline]
#[target_feature(enable = "avx2")]
#[allow(unsafe_code)]
fn pairs(line: &ByteLine, special: bool) -> [__m256i; PANEL / LANES] {
    // SAFETY: a line is two registers of 32 bytes; unaligned loads.
    let [first, second] =
        unsafe { [_mm256_loadu_si256(line.as_ptr().cast()), _mm256_loadu_si256(line[32..].as_ptr().cast())] };
    let words = [_mm256_slli_epi16::<8>(first), _mm256_slli_epi16::<8>(second), first, second];
    let mut pairs = [_mm256_setzero_si256(); PANEL / LANES];
    for (pairs, words) in pairs.iter_mut().zip(words) {
        *pairs = shift(words);
        if special {
            *pairs = look_up(words, *pairs);
        }
    }
    pairs
}

/// The upper bytes of words as bf16, unless they are special.
#[inline]
#[target_feature(enable = "avx2")]
fn shift(words: __m256i) -> __m256i {
    let shifted = _mm256_and_si256(_mm256_srai_epi16::<4>(words), _mm256_set1_epi16(SHIFTED_BITS as i16));
    _mm256_or_si256(shifted, _mm256_set1_epi16(REBIAS as i16))
}

/// The same with zeros and subnormals, which are looked up by their three bits, and NaN put right in `shifted`.
#[inline]
#[target_feature(enable = "avx2")]
#[allow(unsafe_code)]
fn look_up(words: __m256i, shifted: __m256i) -> __m256i {
    // SAFETY: a table is one register of 32 bytes; unaligned loads.
    let [low_bytes, high_bytes] =
        SUBNORMALS.each_ref().map(|table| unsafe { _mm256_loadu_si256(table.as_ptr().cast()) });
    let bytes = _mm256_srli_epi16::<8>(words);
    let mantissa = _mm256_and_si256(bytes, _mm256_set1_epi16(7));
    // The upper byte of a word looks up entry 0, which is zero.
    let low = _mm256_shuffle_epi8(low_bytes, mantissa);
    let high = _mm256_slli_epi16::<8>(_mm256_shuffle_epi8(high_bytes, mantissa));
    let sign = _mm256_and_si256(words, _mm256_set1_epi16(i16::MIN));
    let subnormal = _mm256_or_si256(_mm256_or_si256(low, high), sign);
    let exponent = _mm256_and_si256(bytes, _mm256_set1_epi16(0x78));
    let is_subnormal = _mm256_cmpeq_epi16(exponent, _mm256_setzero_si256());
    let magnitude = _mm256_and_si256(bytes, _mm256_set1_epi16(0x7f));
    let is_nan = _mm256_cmpeq_epi16(magnitude, _mm256_set1_epi16(0x7f));
    let finite = _mm256_blendv_epi8(shifted, subnormal, is_subnormal);
    _mm256_blendv_epi8(finite, _mm256_set1_epi16(0x7fc0), is_nan)
}

/// The low bytes, then the high bytes, of the bf16 of e4m3 bytes 0..8, in both halves of a register.
static SUBNORMALS: [[u8; 32]; 2] = subnormals();

const fn subnormals() -> [[u8; 32]; 2] {
    let decoded = e4m3_as_bf16(DECODED_UNIT);
    let mut tables = [[0; 32]; 2];
    let mut at = 0;
    while at < 32 {
        [tables[0][at], tables[1][at]] = decoded[at % 8].to_le_bytes();
        at += 1;
    }
    tables
}
