//! The grouped GEMM's innermost loops: a tile of rows times one panel of weights.
//!
//! A row tile is `[pairs][rows]`, a panel line is one K-pair of 32 output columns. A pair is two bf16 in a `u32`, the
//! lower K in the lower half. These functions know nothing of experts, layouts or threads.

use super::panel::{Ahead, BLOCK_PAIRS, BlockScales, BytePanel, MAX_ROWS, PANEL, PairLine, Scratch, Sums};
use super::{Isa, Level, portable};

/// `sums[r][c] = sum_k rows[r, k] * panel[c, k]` for all rows of a block: of every row
/// [`Isa::step_pairs`] pairs of K stand together.
pub(crate) fn multiply_block(isa: Isa, rows: &[u32], panel: &[PairLine], sums: &mut [Sums], ahead: Ahead<'_>) {
    #[cfg(target_arch = "x86_64")]
    if isa.level() == Level::Amx {
        return super::x86_64::amx::multiply(isa, rows, panel, sums, ahead);
    }
    let _ = (rows, panel, sums, ahead);
    unreachable!("{isa} takes tiles of rows")
}

/// `sums[r][c] += sum_block scale[r, block] * sum_k rows[r, k] * panel[c, k]` for such rows.
pub(crate) fn multiply_e4m3_block(
    isa: Isa,
    rows: &[u32],
    panel: BytePanel<'_>,
    scales: BlockScales<'_>,
    sums: &mut [Sums],
    scratch: &mut Scratch,
    ahead: Ahead<'_>,
) {
    #[cfg(target_arch = "x86_64")]
    if isa.level() == Level::Amx {
        return super::x86_64::amx::multiply_e4m3(isa, rows, panel, scales, sums, scratch, ahead);
    }
    let _ = (rows, panel, scales, sums, scratch, ahead);
    unreachable!("{isa} takes tiles of rows")
}

/// `sums[r][c] += sum_k rows[r, k] * panel[c, k]`.
///
/// One call for several blocks of K gives the bits of one call for each, and a row those it has in any other tile:
/// callers cut K and rows by what the caches hold, and a token's result must not depend on its company.
///
/// `ahead`, here and below, is asked for bit by bit as the kernel goes, by those for AVX2 and AVX-512.
pub(crate) fn multiply(isa: Isa, rows: &[u32], panel: &[PairLine], sums: &mut [Sums], ahead: Ahead<'_>) {
    check_tile(rows, panel.len(), sums);
    #[cfg(target_arch = "x86_64")]
    match isa.level() {
        Level::Avx512 | Level::Amx => return super::x86_64::avx512::multiply(isa, rows, panel, sums, ahead),
        Level::Avx2 => return super::x86_64::avx2::multiply(isa, rows, panel, sums, ahead),
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
    if isa.level() >= Level::Avx512 {
        return super::x86_64::avx512::multiply_e4m3(isa, rows, panel, scales, sums, decoded, ahead);
    }
    #[cfg(target_arch = "x86_64")]
    if isa.level() == Level::Avx2 && decoded.is_empty() && sums.len() <= super::x86_64::avx2::e4m3::FEW_ROWS {
        return super::x86_64::avx2::e4m3::multiply_few(isa, rows, panel, scales, sums, ahead);
    }
    let mut scratch = [[0; PANEL]; BLOCK_PAIRS];
    let blocks = scales.panel.len();
    for (block, lines) in panel.lines.chunks(BLOCK_PAIRS).enumerate() {
        let decoded = match decoded.chunks_mut(BLOCK_PAIRS).nth(block) {
            Some(decoded) => decoded,
            None => &mut scratch[..lines.len()],
        };
        decode(isa, BytePanel { lines, special: &panel.special[block..=block] }, decoded, ahead.part(block, blocks));
        promote(isa, rows, decoded, scales, block, sums, Ahead::NOTHING);
    }
}

/// Every byte as bf16, in units of [`DECODED_UNIT`].
fn decode(isa: Isa, panel: BytePanel<'_>, pairs: &mut [PairLine], ahead: Ahead<'_>) {
    #[cfg(target_arch = "x86_64")]
    if isa.level() == Level::Avx2 {
        return super::x86_64::avx2::e4m3::decode(isa, panel, pairs, ahead);
    }
    let _ = (isa, ahead);
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
    if isa.level() >= Level::Avx512 {
        return super::x86_64::avx512::multiply_decoded(isa, rows, panel, scales, sums, ahead);
    }
    let blocks = scales.panel.len();
    for (block, lines) in panel.chunks(BLOCK_PAIRS).enumerate() {
        promote(isa, rows, lines, scales, block, sums, ahead.part(block, blocks));
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
fn promote(
    isa: Isa,
    rows: &[u32],
    lines: &[PairLine],
    scales: BlockScales<'_>,
    block: usize,
    sums: &mut [Sums],
    ahead: Ahead<'_>,
) {
    let tile = sums.len();
    let mut fresh = [[0.0; PANEL]; MAX_ROWS];
    multiply(isa, &rows[block * BLOCK_PAIRS * tile..][..lines.len() * tile], lines, &mut fresh[..tile], ahead);
    for (row, (sums, fresh)) in sums.iter_mut().zip(&fresh).enumerate() {
        let scale = scales.of(block, row, tile);
        for (sum, &fresh) in sums.iter_mut().zip(fresh) {
            *sum += fresh * scale;
        }
    }
}
