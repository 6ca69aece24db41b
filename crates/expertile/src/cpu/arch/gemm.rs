//! The grouped GEMM's innermost loops: a tile of rows times one panel of weights.
//!
//! A row tile is `[pairs][rows]`, a panel line is one K-pair of 32 output columns. A pair is two bf16 in a `u32`, the
//! lower K in the lower half. These functions know nothing of experts, layouts or threads.

use super::{Isa, Level, portable};

/// Output columns of a panel.
pub(crate) const PANEL: usize = 32;
/// Most rows of a tile: 12 rows by two AVX-512 registers leave room for two weights and a broadcast.
pub(crate) const MAX_ROWS: usize = 12;
/// K-pairs that share one scale: [`crate::gemm::WEIGHT_BLOCK`] values of K.
pub(crate) const BLOCK_PAIRS: usize = crate::gemm::WEIGHT_BLOCK / 2;

/// One K-pair of a panel as bf16: column `c` at index `c`.
pub(crate) type PairLine = [u32; PANEL];
/// One K-pair of a panel as e4m3: byte [`e4m3_position`]`(c, j)` holds column `c` of K `2 * pair + j`.
pub(crate) type ByteLine = [u8; 2 * PANEL];
/// A row's running sums for the columns of a panel.
pub(crate) type Sums = [f32; PANEL];

/// Decoded e4m3 are in units of this: an exponent that `|` can put in place, where a true one would take an addition.
pub(crate) const DECODED_UNIT: f32 = 256.0;

/// What a byte shifted into a bf16 keeps: its sign, four bits of exponent and three of mantissa.
pub(super) const SHIFTED_BITS: u16 = 0x87f0;
/// What is then set to turn e4m3's exponent (bias 7) into bf16's (bias 127) in units of [`DECODED_UNIT`] (2^8).
pub(super) const REBIAS: u16 = (127 - 7 - 8) << 7;
const _: () = assert!(DECODED_UNIT == 256.0 && REBIAS & SHIFTED_BITS == 0);

/// Where a line keeps column `column`, parity `parity` of K.
///
/// Seen as 16-bit words, the low bytes are columns 0..16 and the high bytes columns 16..32, in the order of a
/// [`PairLine`]: shifting words turns either half into bf16.
#[inline(always)]
pub(crate) const fn e4m3_position(column: usize, parity: usize) -> usize {
    (column % 16 * 2 + parity) * 2 + column / 16
}

/// Whether a byte's bf16 is other than its bits shifted into place: zero, subnormal or NaN.
#[inline(always)]
pub(crate) const fn e4m3_is_special(byte: u8) -> bool {
    byte & 0x78 == 0 || byte & 0x7f == 0x7f
}

/// e4m3 weights of a panel, or of a run of its blocks.
#[derive(Clone, Copy)]
pub(crate) struct BytePanel<'a> {
    pub(crate) lines: &'a [ByteLine],
    /// A mask for each block of [`BLOCK_PAIRS`] lines: bit `i` is set if line `i` holds a special byte.
    pub(crate) special: &'a [u64],
}

/// What each block of [`BLOCK_PAIRS`] is multiplied by.
#[derive(Clone, Copy)]
pub(crate) struct BlockScales<'a> {
    /// `[blocks]`: the panel's scales.
    pub(crate) panel: &'a [f32],
    /// `[blocks][rows]`: the rows' scales, if they have any.
    pub(crate) rows: Option<&'a [f32]>,
}

impl BlockScales<'_> {
    /// What a block's sum for one of `tile` rows is multiplied by.
    #[inline(always)]
    pub(super) fn of(&self, block: usize, row: usize, tile: usize) -> f32 {
        self.panel[block] * self.rows.map_or(1.0, |rows| rows[block * tile + row]) * DECODED_UNIT
    }
}

/// Memory that the caller will read, to be brought into a cache meanwhile.
#[derive(Clone, Copy)]
pub(crate) struct Ahead<'a> {
    pub(crate) bytes: &'a [u8],
    /// Read by the next calls, so that it belongs into the L1 cache; else L2 will do.
    pub(crate) soon: bool,
}

impl Ahead<'_> {
    const NOTHING: Self = Self { bytes: &[], soon: true };
}

/// `sums[r][c] += sum_k rows[r, k] * panel[c, k]`.
///
/// One call for several blocks of K gives the bits of one call for each, and a row those it has in any other tile: callers
/// cut K and rows by what the caches hold, and a token's result must not depend on its company.
///
/// `ahead`, here and below, is asked for bit by bit as the kernel goes, by those for AVX-512.
pub(crate) fn multiply(isa: Isa, rows: &[u32], panel: &[PairLine], sums: &mut [Sums], ahead: Ahead<'_>) {
    check_tile(rows, panel.len(), sums);
    #[cfg(target_arch = "x86_64")]
    match isa.level() {
        Level::Avx512 => return super::x86_64::avx512::multiply(isa, rows, panel, sums, ahead),
        Level::Avx2 => return super::x86_64::avx2::multiply(isa, rows, panel, sums),
        Level::Portable => {}
    }
    let _ = (isa, ahead);
    portable::multiply(rows, panel, sums);
}

/// `sums[r][c] += sum_block scale[r, block] * sum_k rows[r, k] * panel[c, k]`, with a fresh sum for every block.
///
/// `decoded` is empty, or of the panel's length and keeps the weights for [`multiply_decoded`] with the next tile.
pub(crate) fn multiply_e4m3(
    isa: Isa,
    rows: &[u32],
    panel: BytePanel<'_>,
    scales: BlockScales<'_>,
    sums: &mut [Sums],
    decoded: &mut [PairLine],
    ahead: Ahead<'_>,
) {
    check_scaled_tile(rows, panel.lines.len(), scales, sums);
    assert!(panel.special.len() == scales.panel.len());
    assert!(decoded.is_empty() || decoded.len() == panel.lines.len());
    #[cfg(target_arch = "x86_64")]
    if isa.level() == Level::Avx512 {
        return super::x86_64::avx512::multiply_e4m3(isa, rows, panel, scales, sums, decoded, ahead);
    }
    let _ = ahead;
    let mut scratch = [[0; PANEL]; BLOCK_PAIRS];
    for (block, lines) in panel.lines.chunks(BLOCK_PAIRS).enumerate() {
        let decoded = match decoded.chunks_mut(BLOCK_PAIRS).nth(block) {
            Some(decoded) => decoded,
            None => &mut scratch[..lines.len()],
        };
        decode(isa, BytePanel { lines, special: &panel.special[block..=block] }, decoded);
        promote(isa, rows, decoded, scales, block, sums);
    }
}

/// Every byte as bf16, in units of [`DECODED_UNIT`].
fn decode(isa: Isa, panel: BytePanel<'_>, pairs: &mut [PairLine]) {
    #[cfg(target_arch = "x86_64")]
    if isa.level() == Level::Avx2 {
        return super::x86_64::avx2::decode(isa, panel, pairs);
    }
    let _ = isa;
    for (line, pairs) in panel.lines.iter().zip(pairs) {
        portable::decode_line(line, pairs);
    }
}

/// [`multiply_e4m3`] with the weights as it left them.
pub(crate) fn multiply_decoded(
    isa: Isa,
    rows: &[u32],
    panel: &[PairLine],
    scales: BlockScales<'_>,
    sums: &mut [Sums],
    ahead: Ahead<'_>,
) {
    check_scaled_tile(rows, panel.len(), scales, sums);
    #[cfg(target_arch = "x86_64")]
    if isa.level() == Level::Avx512 {
        return super::x86_64::avx512::multiply_decoded(isa, rows, panel, scales, sums, ahead);
    }
    let _ = ahead;
    for (block, lines) in panel.chunks(BLOCK_PAIRS).enumerate() {
        promote(isa, rows, lines, scales, block, sums);
    }
}

/// The bf16 bits of every e4m3 byte, exactly; NaN stays NaN.
pub(crate) static E4M3_AS_BF16: [u16; 256] = portable::e4m3_as_bf16(1.0);

fn check_tile(rows: &[u32], pairs: usize, sums: &[Sums]) {
    assert!((1..=MAX_ROWS).contains(&sums.len()), "a tile of {} rows", sums.len());
    assert_eq!(rows.len(), pairs * sums.len());
}

fn check_scaled_tile(rows: &[u32], pairs: usize, scales: BlockScales<'_>, sums: &[Sums]) {
    check_tile(rows, pairs, sums);
    let blocks = pairs.div_ceil(BLOCK_PAIRS);
    assert_eq!(scales.panel.len(), blocks);
    assert!(scales.rows.is_none_or(|rows| rows.len() == blocks * sums.len()));
}

/// One block of K: a fresh sum, scaled, onto `sums`.
fn promote(isa: Isa, rows: &[u32], lines: &[PairLine], scales: BlockScales<'_>, block: usize, sums: &mut [Sums]) {
    let tile = sums.len();
    let mut fresh = [[0.0; PANEL]; MAX_ROWS];
    multiply(isa, &rows[block * BLOCK_PAIRS * tile..][..lines.len() * tile], lines, &mut fresh[..tile], Ahead::NOTHING);
    for (row, (sums, fresh)) in sums.iter_mut().zip(&fresh).enumerate() {
        let scale = scales.of(block, row, tile);
        for (sum, &fresh) in sums.iter_mut().zip(fresh) {
            *sum += fresh * scale;
        }
    }
}
