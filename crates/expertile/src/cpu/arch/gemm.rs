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
/// One K-pair of a panel as e4m3: byte `e4m3_position(c, j)` holds column `c` of K `2 * pair + j`.
pub(crate) type ByteLine = [u8; 2 * PANEL];
/// A row's running sums for the columns of a panel.
pub(crate) type Sums = [f32; PANEL];

/// Where a line keeps column `column`, parity `parity` of K.
///
/// AVX-512 decodes a line into the low and the high bytes of 64 bf16 and interleaves them within 128-bit lanes: the
/// lower half of each lane gives columns 0..16, the upper half columns 16..32.
#[inline(always)]
pub(crate) const fn e4m3_position(column: usize, parity: usize) -> usize {
    let (half, column) = (column / 16, column % 16);
    column / 4 * 16 + half * 8 + column % 4 * 2 + parity
}

/// A panel's weights, in the form they have at hand.
#[derive(Clone, Copy)]
pub(crate) enum Panel<'a> {
    /// bf16 pairs.
    Bf16(&'a [PairLine]),
    /// e4m3 pairs.
    E4m3(&'a [ByteLine]),
}

impl Panel<'_> {
    fn pairs(&self) -> usize {
        match self {
            Self::Bf16(lines) => lines.len(),
            Self::E4m3(lines) => lines.len(),
        }
    }
}

/// What each block of [`BLOCK_PAIRS`] is multiplied by.
#[derive(Clone, Copy)]
pub(crate) struct BlockScales<'a> {
    /// `[blocks]`: the panel's scales.
    pub(crate) panel: &'a [f32],
    /// `[blocks][rows]`: the rows' scales, if they have any.
    pub(crate) rows: Option<&'a [f32]>,
}

/// `sums[r][c] += sum_k rows[r, k] * panel[c, k]`.
pub(crate) fn multiply(isa: Isa, rows: &[u32], panel: &[PairLine], sums: &mut [Sums]) {
    check_tile(rows, panel.len(), sums);
    #[cfg(target_arch = "x86_64")]
    match isa.level() {
        Level::Avx512 => return super::x86_64::avx512::multiply(isa, rows, panel, sums),
        Level::Avx2 => return super::x86_64::avx2::multiply(isa, rows, panel, sums),
        Level::Portable => {}
    }
    let _ = isa;
    portable::multiply(rows, panel, sums);
}

/// `sums[r][c] += sum_block scale[r, block] * sum_k rows[r, k] * panel[c, k]`, with a fresh sum for every block.
pub(crate) fn multiply_scaled(isa: Isa, rows: &[u32], panel: Panel<'_>, scales: BlockScales<'_>, sums: &mut [Sums]) {
    check_tile(rows, panel.pairs(), sums);
    let blocks = panel.pairs().div_ceil(BLOCK_PAIRS);
    assert_eq!(scales.panel.len(), blocks);
    assert!(scales.rows.is_none_or(|rows| rows.len() == blocks * sums.len()));
    #[cfg(target_arch = "x86_64")]
    if isa.level() == Level::Avx512 {
        return super::x86_64::avx512::multiply_scaled(isa, rows, panel, scales, sums);
    }
    promote_blocks(isa, rows, panel, scales, sums);
}

/// The bf16 of every e4m3 byte, exactly; NaN stays NaN.
pub(crate) fn decode(isa: Isa, lines: &[ByteLine], pairs: &mut [PairLine]) {
    assert_eq!(lines.len(), pairs.len());
    #[cfg(target_arch = "x86_64")]
    if isa.level() == Level::Avx512 {
        return super::x86_64::avx512::decode(isa, lines, pairs);
    }
    portable::decode(isa, lines, pairs);
}

/// The bf16 bits of an e4m3 byte, exactly; NaN stays NaN.
#[inline(always)]
pub(crate) fn e4m3_as_bf16(byte: u8) -> u16 {
    portable::E4M3_AS_BF16[byte as usize]
}

fn check_tile(rows: &[u32], pairs: usize, sums: &[Sums]) {
    assert!((1..=MAX_ROWS).contains(&sums.len()), "a tile of {} rows", sums.len());
    assert_eq!(rows.len(), pairs * sums.len());
}

/// [`multiply_scaled`] by way of [`multiply`], one block at a time.
fn promote_blocks(isa: Isa, rows: &[u32], panel: Panel<'_>, scales: BlockScales<'_>, sums: &mut [Sums]) {
    let tile = sums.len();
    let mut decoded = [[0; PANEL]; BLOCK_PAIRS];
    for (block, &panel_scale) in scales.panel.iter().enumerate() {
        let pairs = block * BLOCK_PAIRS..panel.pairs().min((block + 1) * BLOCK_PAIRS);
        let lines = match panel {
            Panel::Bf16(lines) => &lines[pairs.clone()],
            Panel::E4m3(lines) => {
                decode(isa, &lines[pairs.clone()], &mut decoded[..pairs.len()]);
                &decoded[..pairs.len()]
            }
        };
        let mut fresh = [[0.0; PANEL]; MAX_ROWS];
        multiply(isa, &rows[pairs.start * tile..pairs.end * tile], lines, &mut fresh[..tile]);
        for (row, (sums, fresh)) in sums.iter_mut().zip(&fresh).enumerate() {
            let scale = panel_scale * scales.rows.map_or(1.0, |rows| rows[block * tile + row]);
            for (sum, &fresh) in sums.iter_mut().zip(fresh) {
                *sum += fresh * scale;
            }
        }
    }
}
