//! GEMM kernels for AVX-512 with BF16 and VBMI: a tile of up to 12 rows by 32 columns in registers.
//!
//! `vdpbf16ps` multiplies two bf16 pairs into an f32 with its own rounding, and takes bf16 subnormals for zero. No e4m3
//! value is subnormal in bf16.

use super::prefetch::Prefetch;
use crate::cpu::arch::panel::{
    Ahead, BLOCK_PAIRS, BlockScales, ByteLine, BytePanel, DECODED_UNIT, PairLine, REBIAS, SHIFTED_BITS, Sums,
};
use crate::cpu::arch::portable::e4m3_as_bf16;
use crate::cpu::arch::{Isa, Level};
use std::arch::x86_64::*;

/// Calls a kernel compiled for just this number of rows; `kernel::<_>` is generic in something else, too.
macro_rules! for_rows {
    ($rows:expr, $kernel:ident($($arg:expr),*)) => {
        for_rows!(@ $rows, $kernel, (), ($($arg),*))
    };
    ($rows:expr, $kernel:ident::<_>($($arg:expr),*)) => {
        for_rows!(@ $rows, $kernel, (_,), ($($arg),*))
    };
    (@ $rows:expr, $kernel:ident, $types:tt, $args:tt) => {
        for_rows!(@@ $rows, $kernel, $types, $args, 1 2 3 4 5 6 7 8 9 10 11 12)
    };
    (@@ $rows:expr, $kernel:ident, $types:tt, $args:tt, $($count:literal)*) => {
        match $rows {
            $($count => for_rows!(call $kernel, $types, $count, $args),)*
            rows => unreachable!("a tile of {rows} rows"),
        }
    };
    (call $kernel:ident, ($($type:tt)*), $count:literal, ($($arg:expr),*)) => {
        $kernel::<$($type)* $count>($($arg),*)
    };
}

pub(crate) mod nibbles;

/// See [`crate::cpu::arch::gemm::multiply`].
#[allow(unsafe_code)]
pub(crate) fn multiply(isa: Isa, rows: &[u32], panel: &[PairLine], sums: &mut [Sums], ahead: Ahead<'_>) {
    assert!(isa.level() >= Level::Avx512);
    // SAFETY: an `Isa` of this level exists only if the CPU has every feature the kernel enables.
    unsafe { for_rows!(sums.len(), multiply_rows(rows, panel, sums, ahead)) }
}

/// See [`crate::cpu::arch::gemm::multiply_e4m3`].
#[allow(unsafe_code)]
pub(crate) fn multiply_e4m3(
    isa: Isa,
    rows: &[u32],
    panel: BytePanel<'_>,
    scales: BlockScales<'_>,
    sums: &mut [Sums],
    decoded: &mut [PairLine],
    ahead: Ahead<'_>,
) {
    assert!(isa.level() >= Level::Avx512);
    // SAFETY: an `Isa` of this level exists only if the CPU has every feature the kernel enables.
    unsafe { for_rows!(sums.len(), promote_e4m3(rows, panel, scales, sums, decoded, ahead)) }
}

/// See [`crate::cpu::arch::gemm::multiply_decoded`].
#[allow(unsafe_code)]
pub(crate) fn multiply_decoded(
    isa: Isa,
    rows: &[u32],
    panel: &[PairLine],
    scales: BlockScales<'_>,
    sums: &mut [Sums],
    ahead: Ahead<'_>,
) {
    assert!(isa.level() >= Level::Avx512);
    // SAFETY: an `Isa` of this level exists only if the CPU has every feature the kernel enables.
    unsafe { for_rows!(sums.len(), promote_decoded(rows, panel, scales, sums, ahead)) }
}

/// A tile's sums: 32 columns of a row are two registers.
type Tile<const R: usize> = [[__m512; 2]; R];

#[target_feature(enable = "avx512f,avx512bw,avx512vbmi,avx512bf16")]
fn multiply_rows<const R: usize>(rows: &[u32], panel: &[PairLine], sums: &mut [Sums], ahead: Ahead<'_>) {
    let mut prefetch = Prefetch::new(ahead, panel.len());
    let mut tile = [[_mm512_setzero_ps(); 2]; R];
    for (tile, sums) in tile.iter_mut().zip(sums.iter()) {
        *tile = load_sums(sums);
    }
    for (pair, line) in rows.as_chunks::<R>().0.iter().zip(panel) {
        prefetch.step();
        multiply_pair(&mut tile, pair, load_pairs(line));
    }
    for (tile, sums) in tile.iter().zip(sums.iter_mut()) {
        store_sums(sums, tile);
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vbmi,avx512bf16")]
fn promote_decoded<const R: usize>(
    rows: &[u32],
    panel: &[PairLine],
    scales: BlockScales<'_>,
    sums: &mut [Sums],
    ahead: Ahead<'_>,
) {
    let mut prefetch = Prefetch::new(ahead, panel.len());
    let blocks = rows.chunks(BLOCK_PAIRS * R).zip(panel.chunks(BLOCK_PAIRS));
    for (block, (rows, lines)) in blocks.enumerate() {
        let mut tile = [[_mm512_setzero_ps(); 2]; R];
        for (pair, line) in rows.as_chunks::<R>().0.iter().zip(lines) {
            prefetch.step();
            multiply_pair(&mut tile, pair, load_pairs(line));
        }
        promote(&tile, scales, block, sums);
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vbmi,avx512bf16")]
fn promote_e4m3<const R: usize>(
    rows: &[u32],
    panel: BytePanel<'_>,
    scales: BlockScales<'_>,
    sums: &mut [Sums],
    decoded: &mut [PairLine],
    ahead: Ahead<'_>,
) {
    let mut prefetch = Prefetch::new(ahead, panel.lines.len());
    let decoder = Decoder::new();
    let mut decoded = decoded.iter_mut();
    let blocks = rows.chunks(BLOCK_PAIRS * R).zip(panel.lines.chunks(BLOCK_PAIRS)).zip(panel.special);
    for (block, ((rows, lines), &special)) in blocks.enumerate() {
        let mut special = special;
        let mut tile = [[_mm512_setzero_ps(); 2]; R];
        for (pair, line) in rows.as_chunks::<R>().0.iter().zip(lines) {
            prefetch.step();
            let weights = decoder.pairs(line, special & 1 != 0);
            if let Some(decoded) = decoded.next() {
                store_pairs(decoded, weights);
            }
            multiply_pair(&mut tile, pair, weights);
            special >>= 1;
        }
        promote(&tile, scales, block, sums);
    }
}

/// One K-pair of all rows into the tile.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn multiply_pair<const R: usize>(tile: &mut Tile<R>, pair: &[u32; R], weights: [__m512i; 2]) {
    for (sums, &row) in tile.iter_mut().zip(pair) {
        let row = bf16_lanes(_mm512_set1_epi32(row as i32));
        for (sum, weights) in sums.iter_mut().zip(weights) {
            *sum = _mm512_dpbf16_ps(*sum, row, bf16_lanes(weights));
        }
    }
}

/// The same bits, as the type that `vdpbf16ps` takes.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
#[allow(unsafe_code)]
fn bf16_lanes(words: __m512i) -> __m512bh {
    // SAFETY: both types are 64 bytes of plain data, and every bit pattern is valid in both.
    unsafe { std::mem::transmute::<__m512i, __m512bh>(words) }
}

/// `sums += tile * scale` for one block of K.
#[inline]
#[target_feature(enable = "avx512f")]
fn promote<const R: usize>(tile: &Tile<R>, scales: BlockScales<'_>, block: usize, sums: &mut [Sums]) {
    for (row, (tile, sums)) in tile.iter().zip(sums).enumerate() {
        let scale = _mm512_set1_ps(scales.of(block, row, R));
        let [low, high] = load_sums(sums);
        store_sums(sums, &[_mm512_fmadd_ps(tile[0], scale, low), _mm512_fmadd_ps(tile[1], scale, high)]);
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
#[allow(unsafe_code)]
fn load_pairs(line: &PairLine) -> [__m512i; 2] {
    // SAFETY: a line is two registers of 16 u32; unaligned loads.
    unsafe { [_mm512_loadu_si512(line.as_ptr().cast()), _mm512_loadu_si512(line[16..].as_ptr().cast())] }
}

#[inline]
#[target_feature(enable = "avx512f")]
#[allow(unsafe_code)]
pub(super) fn store_pairs(line: &mut PairLine, [low, high]: [__m512i; 2]) {
    // SAFETY: a line is two registers of 16 u32; unaligned stores.
    unsafe {
        _mm512_storeu_si512(line.as_mut_ptr().cast(), low);
        _mm512_storeu_si512(line[16..].as_mut_ptr().cast(), high);
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
#[allow(unsafe_code)]
pub(super) fn load_sums(sums: &Sums) -> [__m512; 2] {
    // SAFETY: 32 f32 are two registers of 16; unaligned loads.
    unsafe { [_mm512_loadu_ps(sums.as_ptr()), _mm512_loadu_ps(sums[16..].as_ptr())] }
}

#[inline]
#[target_feature(enable = "avx512f")]
#[allow(unsafe_code)]
pub(super) fn store_sums(sums: &mut Sums, tile: &[__m512; 2]) {
    // SAFETY: 32 f32 are two registers of 16; unaligned stores.
    unsafe {
        _mm512_storeu_ps(sums.as_mut_ptr(), tile[0]);
        _mm512_storeu_ps(sums[16..].as_mut_ptr(), tile[1]);
    }
}

/// e4m3 to bf16 in units of [`DECODED_UNIT`].
///
/// A line without special bytes is decoded by shifting its words: 4 places leave exponent and mantissa where bf16 has
/// them and the sign on top, a mask clears the rest, and setting the exponent's upper bits rebiases it. A line with
/// zeros, subnormals or NaN goes through tables of the 128 low and high bytes. Random weights have less than one such
/// line in a hundred, so the branch is nearly free.
#[derive(Clone, Copy)]
pub(super) struct Decoder {
    low: [__m512i; 2],
    high: [__m512i; 2],
}

/// The low bytes, then the high bytes, of the bf16 of e4m3 bytes 0..128.
static DECODED_BYTES: [[u8; 128]; 2] = decoded_bytes();

const fn decoded_bytes() -> [[u8; 128]; 2] {
    let decoded = e4m3_as_bf16(DECODED_UNIT);
    let mut tables = [[0; 128]; 2];
    let mut byte = 0;
    while byte < 128 {
        [tables[0][byte], tables[1][byte]] = decoded[byte].to_le_bytes();
        byte += 1;
    }
    tables
}

impl Decoder {
    #[inline]
    #[target_feature(enable = "avx512f")]
    #[allow(unsafe_code)]
    pub(super) fn new() -> Self {
        // SAFETY: each table is two registers of 64 bytes; unaligned loads.
        let [low, high] = DECODED_BYTES.each_ref().map(|table| unsafe {
            [_mm512_loadu_si512(table.as_ptr().cast()), _mm512_loadu_si512(table[64..].as_ptr().cast())]
        });
        Self { low, high }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
    #[allow(unsafe_code)]
    pub(super) fn pairs(&self, line: &ByteLine, special: bool) -> [__m512i; 2] {
        // SAFETY: a line is one register of 64 bytes; an unaligned load.
        let bytes = unsafe { _mm512_loadu_si512(line.as_ptr().cast()) };
        if special { self.look_up(bytes) } else { shift(bytes) }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
    fn look_up(&self, bytes: __m512i) -> [__m512i; 2] {
        // The look-up takes the low seven bits of a byte as its index.
        let low = _mm512_permutex2var_epi8(self.low[0], bytes, self.low[1]);
        let high = _mm512_permutex2var_epi8(self.high[0], bytes, self.high[1]);
        // high | bytes & 0x80
        let high = _mm512_ternarylogic_epi64::<0xf8>(high, bytes, _mm512_set1_epi8(-128));
        // Bytes 2i of both tables are word i of columns 0..16, bytes 2i + 1 that of columns 16..32.
        let odd_bytes = 0xaaaa_aaaa_aaaa_aaaa;
        [
            _mm512_mask_blend_epi8(odd_bytes, low, _mm512_slli_epi16::<8>(high)),
            _mm512_mask_blend_epi8(odd_bytes, _mm512_srli_epi16::<8>(low), high),
        ]
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn shift(bytes: __m512i) -> [__m512i; 2] {
    let (kept, rebias) = (_mm512_set1_epi16(SHIFTED_BITS as i16), _mm512_set1_epi16(REBIAS as i16));
    // words >> 4 & kept | rebias, the sign moving along
    [_mm512_slli_epi16::<8>(bytes), bytes]
        .map(|words| _mm512_ternarylogic_epi64::<0xea>(_mm512_srai_epi16::<4>(words), kept, rebias))
}
