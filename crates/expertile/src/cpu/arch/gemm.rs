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

/// A panel's e4m3 weights, in the form they have at hand.
#[derive(Clone, Copy)]
pub(crate) enum ScaledPanel<'a> {
    /// As they are packed.
    E4m3(BytePanel<'a>),
    /// As [`decode`] leaves them.
    Decoded(&'a [PairLine]),
}

impl ScaledPanel<'_> {
    fn pairs(&self) -> usize {
        match self {
            Self::E4m3(panel) => panel.lines.len(),
            Self::Decoded(lines) => lines.len(),
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

impl BlockScales<'_> {
    /// What a block's sum for one of `tile` rows is multiplied by.
    #[inline(always)]
    pub(super) fn of(&self, block: usize, row: usize, tile: usize) -> f32 {
        self.panel[block] * self.rows.map_or(1.0, |rows| rows[block * tile + row]) * DECODED_UNIT
    }
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
pub(crate) fn multiply_scaled(
    isa: Isa,
    rows: &[u32],
    panel: ScaledPanel<'_>,
    scales: BlockScales<'_>,
    sums: &mut [Sums],
) {
    check_tile(rows, panel.pairs(), sums);
    let blocks = panel.pairs().div_ceil(BLOCK_PAIRS);
    assert_eq!(scales.panel.len(), blocks);
    assert!(!matches!(panel, ScaledPanel::E4m3(panel) if panel.special.len() != blocks));
    assert!(scales.rows.is_none_or(|rows| rows.len() == blocks * sums.len()));
    #[cfg(target_arch = "x86_64")]
    if isa.level() == Level::Avx512 {
        return super::x86_64::avx512::multiply_scaled(isa, rows, panel, scales, sums);
    }
    promote_blocks(isa, rows, panel, scales, sums);
}

/// Every e4m3 byte as bf16, in units of [`DECODED_UNIT`]: exact, and NaN stays NaN.
pub(crate) fn decode(isa: Isa, panel: BytePanel<'_>, pairs: &mut [PairLine]) {
    assert_eq!(panel.lines.len(), pairs.len());
    assert_eq!(panel.special.len(), pairs.len().div_ceil(BLOCK_PAIRS));
    #[cfg(target_arch = "x86_64")]
    if isa.level() == Level::Avx512 {
        return super::x86_64::avx512::decode(isa, panel, pairs);
    }
    portable::decode(isa, panel.lines, pairs);
}

/// The bf16 bits of every e4m3 byte, exactly; NaN stays NaN.
pub(crate) static E4M3_AS_BF16: [u16; 256] = portable::e4m3_as_bf16(1.0);

fn check_tile(rows: &[u32], pairs: usize, sums: &[Sums]) {
    assert!((1..=MAX_ROWS).contains(&sums.len()), "a tile of {} rows", sums.len());
    assert_eq!(rows.len(), pairs * sums.len());
}

/// [`multiply_scaled`] by way of [`multiply`], one block at a time.
fn promote_blocks(isa: Isa, rows: &[u32], panel: ScaledPanel<'_>, scales: BlockScales<'_>, sums: &mut [Sums]) {
    let tile = sums.len();
    let mut decoded = [[0; PANEL]; BLOCK_PAIRS];
    for block in 0..scales.panel.len() {
        let pairs = block * BLOCK_PAIRS..panel.pairs().min((block + 1) * BLOCK_PAIRS);
        let lines = match panel {
            ScaledPanel::Decoded(lines) => &lines[pairs.clone()],
            ScaledPanel::E4m3(panel) => {
                let panel = BytePanel { lines: &panel.lines[pairs.clone()], special: &panel.special[block..=block] };
                decode(isa, panel, &mut decoded[..pairs.len()]);
                &decoded[..pairs.len()]
            }
        };
        let mut fresh = [[0.0; PANEL]; MAX_ROWS];
        multiply(isa, &rows[pairs.start * tile..pairs.end * tile], lines, &mut fresh[..tile]);
        for (row, (sums, fresh)) in sums.iter_mut().zip(&fresh).enumerate() {
            let scale = scales.of(block, row, tile);
            for (sum, &fresh) in sums.iter_mut().zip(fresh) {
                *sum += fresh * scale;
            }
        }
    }
}
