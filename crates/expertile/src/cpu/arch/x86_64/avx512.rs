//! GEMM kernels for AVX-512 with BF16 and VBMI: a tile of up to 12 rows by 32 columns in registers.
//!
//! `vdpbf16ps` multiplies two bf16 pairs into an f32 with its own rounding, and takes bf16 subnormals for zero. No e4m3
//! value is subnormal in bf16.

use crate::cpu::arch::gemm::{BLOCK_PAIRS, BlockScales, ByteLine, PairLine, Panel, Sums};
use crate::cpu::arch::portable::E4M3_AS_BF16;
use crate::cpu::arch::{Isa, Level};
use std::arch::x86_64::*;

/// Calls a kernel compiled for just this number of rows.
macro_rules! for_rows {
    ($rows:expr, $kernel:ident($($arg:expr),*)) => {
        match $rows {
            1 => $kernel::<1>($($arg),*),
            2 => $kernel::<2>($($arg),*),
            3 => $kernel::<3>($($arg),*),
            4 => $kernel::<4>($($arg),*),
            5 => $kernel::<5>($($arg),*),
            6 => $kernel::<6>($($arg),*),
            7 => $kernel::<7>($($arg),*),
            8 => $kernel::<8>($($arg),*),
            9 => $kernel::<9>($($arg),*),
            10 => $kernel::<10>($($arg),*),
            11 => $kernel::<11>($($arg),*),
            12 => $kernel::<12>($($arg),*),
            rows => unreachable!("a tile of {rows} rows"),
        }
    };
}

/// See [`crate::cpu::arch::gemm::multiply`].
#[allow(unsafe_code)]
pub(crate) fn multiply(isa: Isa, rows: &[u32], panel: &[PairLine], sums: &mut [Sums]) {
    assert!(isa.level() == Level::Avx512);
    // SAFETY: an `Isa` of this level exists only if the CPU has every feature the kernel enables.
    unsafe { for_rows!(sums.len(), multiply_rows(rows, panel, sums)) }
}

/// See [`crate::cpu::arch::gemm::multiply_scaled`].
#[allow(unsafe_code)]
pub(crate) fn multiply_scaled(isa: Isa, rows: &[u32], panel: Panel<'_>, scales: BlockScales<'_>, sums: &mut [Sums]) {
    assert!(isa.level() == Level::Avx512);
    match panel {
        // SAFETY: an `Isa` of this level exists only if the CPU has every feature the kernel enables.
        Panel::Bf16(lines) => unsafe { for_rows!(sums.len(), promote_bf16(rows, lines, scales, sums)) },
        // SAFETY: as above.
        Panel::E4m3(lines) => unsafe { for_rows!(sums.len(), promote_e4m3(rows, lines, scales, sums)) },
    }
}

/// See [`crate::cpu::arch::gemm::decode`].
#[allow(unsafe_code)]
pub(crate) fn decode(isa: Isa, lines: &[ByteLine], pairs: &mut [PairLine]) {
    assert!(isa.level() == Level::Avx512);
    // SAFETY: an `Isa` of this level exists only if the CPU has every feature the kernel enables.
    unsafe { decode_lines(lines, pairs) }
}

/// A tile's sums: 32 columns of a row are two registers.
type Tile<const R: usize> = [[__m512; 2]; R];

#[target_feature(enable = "avx512f,avx512bw,avx512vbmi,avx512bf16")]
fn multiply_rows<const R: usize>(rows: &[u32], panel: &[PairLine], sums: &mut [Sums]) {
    let mut tile = [[_mm512_setzero_ps(); 2]; R];
    for (tile, sums) in tile.iter_mut().zip(sums.iter()) {
        *tile = load_sums(sums);
    }
    for (pair, line) in rows.as_chunks::<R>().0.iter().zip(panel) {
        multiply_pair(&mut tile, pair, load_pairs(line));
    }
    for (tile, sums) in tile.iter().zip(sums.iter_mut()) {
        store_sums(sums, tile);
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vbmi,avx512bf16")]
fn promote_bf16<const R: usize>(rows: &[u32], panel: &[PairLine], scales: BlockScales<'_>, sums: &mut [Sums]) {
    let blocks = rows.chunks(BLOCK_PAIRS * R).zip(panel.chunks(BLOCK_PAIRS));
    for (block, (rows, lines)) in blocks.enumerate() {
        let mut tile = [[_mm512_setzero_ps(); 2]; R];
        for (pair, line) in rows.as_chunks::<R>().0.iter().zip(lines) {
            multiply_pair(&mut tile, pair, load_pairs(line));
        }
        promote(&tile, scales, block, sums);
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vbmi,avx512bf16")]
fn promote_e4m3<const R: usize>(rows: &[u32], panel: &[ByteLine], scales: BlockScales<'_>, sums: &mut [Sums]) {
    let decoder = Decoder::new();
    let blocks = rows.chunks(BLOCK_PAIRS * R).zip(panel.chunks(BLOCK_PAIRS));
    for (block, (rows, lines)) in blocks.enumerate() {
        let mut tile = [[_mm512_setzero_ps(); 2]; R];
        for (pair, line) in rows.as_chunks::<R>().0.iter().zip(lines) {
            multiply_pair(&mut tile, pair, decoder.pairs(line));
        }
        promote(&tile, scales, block, sums);
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
fn decode_lines(lines: &[ByteLine], pairs: &mut [PairLine]) {
    let decoder = Decoder::new();
    for (line, pairs) in lines.iter().zip(pairs) {
        let [low, high] = decoder.pairs(line);
        store_pairs(pairs, [low, high]);
    }
}

/// One K-pair of all rows into the tile.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
#[allow(unsafe_code)]
fn multiply_pair<const R: usize>(tile: &mut Tile<R>, pair: &[u32; R], weights: [__m512i; 2]) {
    for (sums, &row) in tile.iter_mut().zip(pair) {
        let row = _mm512_set1_epi32(row as i32);
        for (sum, weights) in sums.iter_mut().zip(weights) {
            // SAFETY: `__m512i` and `__m512bh` are both 64 bytes of plain data.
            let (row, weights) = unsafe { (std::mem::transmute(row), std::mem::transmute(weights)) };
            *sum = _mm512_dpbf16_ps(*sum, row, weights);
        }
    }
}

/// `sums += tile * scale` for one block of K.
#[inline]
#[target_feature(enable = "avx512f")]
fn promote<const R: usize>(tile: &Tile<R>, scales: BlockScales<'_>, block: usize, sums: &mut [Sums]) {
    let panel_scale = scales.panel[block];
    for (row, (tile, sums)) in tile.iter().zip(sums).enumerate() {
        let scale = _mm512_set1_ps(panel_scale * scales.rows.map_or(1.0, |rows| rows[block * R + row]));
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
fn store_pairs(line: &mut PairLine, [low, high]: [__m512i; 2]) {
    // SAFETY: a line is two registers of 16 u32; unaligned stores.
    unsafe {
        _mm512_storeu_si512(line.as_mut_ptr().cast(), low);
        _mm512_storeu_si512(line[16..].as_mut_ptr().cast(), high);
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
#[allow(unsafe_code)]
fn load_sums(sums: &Sums) -> [__m512; 2] {
    // SAFETY: 32 f32 are two registers of 16; unaligned loads.
    unsafe { [_mm512_loadu_ps(sums.as_ptr()), _mm512_loadu_ps(sums[16..].as_ptr())] }
}

#[inline]
#[target_feature(enable = "avx512f")]
#[allow(unsafe_code)]
fn store_sums(sums: &mut Sums, tile: &[__m512; 2]) {
    // SAFETY: 32 f32 are two registers of 16; unaligned stores.
    unsafe {
        _mm512_storeu_ps(sums.as_mut_ptr(), tile[0]);
        _mm512_storeu_ps(sums[16..].as_mut_ptr(), tile[1]);
    }
}

/// e4m3 to bf16 by look-up: 128 low bytes and 128 high bytes, the sign carried over.
///
/// A table is exact for subnormals and NaN, where shifting bits into place is not.
#[derive(Clone, Copy)]
struct Decoder {
    low: [__m512i; 2],
    high: [__m512i; 2],
}

/// The low bytes, then the high bytes, of the bf16 of e4m3 bytes 0..128.
static DECODE_BYTES: [[u8; 128]; 2] = decode_bytes();

const fn decode_bytes() -> [[u8; 128]; 2] {
    let mut tables = [[0; 128]; 2];
    let mut byte = 0;
    while byte < 128 {
        [tables[0][byte], tables[1][byte]] = E4M3_AS_BF16[byte].to_le_bytes();
        byte += 1;
    }
    tables
}

impl Decoder {
    #[inline]
    #[target_feature(enable = "avx512f")]
    #[allow(unsafe_code)]
    fn new() -> Self {
        // SAFETY: each table is two registers of 64 bytes; unaligned loads.
        let [low, high] = DECODE_BYTES.each_ref().map(|table| unsafe {
            [_mm512_loadu_si512(table.as_ptr().cast()), _mm512_loadu_si512(table[64..].as_ptr().cast())]
        });
        Self { low, high }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
    #[allow(unsafe_code)]
    fn pairs(&self, line: &ByteLine) -> [__m512i; 2] {
        // SAFETY: a line is one register of 64 bytes; an unaligned load.
        let bytes = unsafe { _mm512_loadu_si512(line.as_ptr().cast()) };
        // The look-up takes the low seven bits of a byte as its index.
        let low = _mm512_permutex2var_epi8(self.low[0], bytes, self.low[1]);
        let high = _mm512_permutex2var_epi8(self.high[0], bytes, self.high[1]);
        // high | bytes & 0x80
        let high = _mm512_ternarylogic_epi64::<0xf8>(high, bytes, _mm512_set1_epi8(-128));
        [_mm512_unpacklo_epi8(low, high), _mm512_unpackhi_epi8(low, high)]
    }
}
