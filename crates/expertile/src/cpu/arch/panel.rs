//! What the GEMM's innermost loops read and write: panels of weights, lines of them, sums, and the scales of blocks.

use half::{bf16, f16};

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

/// K-pairs of a [`NibbleGroup`].
pub(crate) const GROUP_PAIRS: usize = crate::mxfp4::GROUP / 2;
const _: () = assert!(crate::int4::GROUP == crate::mxfp4::GROUP);
/// Groups of a block of [`BLOCK_PAIRS`].
pub(crate) const BLOCK_GROUPS: usize = BLOCK_PAIRS / GROUP_PAIRS;

/// One K-pair of a panel as nibbles: half a byte at [`nibble_position`] holds column `c` of K `2 * pair + j`.
pub(crate) type NibbleLine = [u8; PANEL];

/// 32 values of K of a panel in 4 bits: scales and nibbles are next to each other, so that a kernel reads one stream.
#[derive(Clone, Copy, bytemuck::Zeroable)]
#[repr(C)]
pub(crate) struct NibbleGroup<S> {
    /// One for each column; none is NaN.
    pub(crate) scales: [S; PANEL],
    pub(crate) lines: [NibbleLine; GROUP_PAIRS],
}

// SAFETY: arrays of plain data, in the order of C; lines of bytes need no padding behind scales of an even size, and
// scales of one byte none at all. The size is checked below.
#[allow(unsafe_code)]
unsafe impl<S: GroupScale> bytemuck::Pod for NibbleGroup<S> {}

const fn has_no_padding<S>() -> bool {
    size_of::<NibbleGroup<S>>() == PANEL * size_of::<S>() + GROUP_PAIRS * PANEL
}
const _: () = assert!(has_no_padding::<u8>() && has_no_padding::<bf16>() && has_no_padding::<f16>());

/// A scale of MXFP4 (an exponent) or of int4 (bf16 or f16), and with it what the nibbles beside it mean.
pub(crate) trait GroupScale: bytemuck::Pod + Send + Sync {
    /// The bf16 of every nibble; none is subnormal.
    const NIBBLES: [u16; 16];
    /// How a register of such scales is widened.
    const KIND: ScaleKind;

    fn widened(self) -> f32;
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ScaleKind {
    /// UE8M0.
    Exponent,
    Bf16,
    F16,
}

impl GroupScale for u8 {
    const NIBBLES: [u16; 16] = as_bf16(&crate::mxfp4::E2M1_VALUES);
    const KIND: ScaleKind = ScaleKind::Exponent;

    fn widened(self) -> f32 {
        crate::quantize::ue8m0_value(self)
    }
}

impl GroupScale for bf16 {
    const NIBBLES: [u16; 16] = as_bf16(&crate::int4::VALUES);
    const KIND: ScaleKind = ScaleKind::Bf16;

    fn widened(self) -> f32 {
        self.to_f32()
    }
}

impl GroupScale for f16 {
    const NIBBLES: [u16; 16] = as_bf16(&crate::int4::VALUES);
    const KIND: ScaleKind = ScaleKind::F16;

    fn widened(self) -> f32 {
        self.to_f32()
    }
}

/// The bits of 2^-127, the value of the exponent 0: an f32's exponent of 0 alone would be zero.
pub(super) const LEAST_SCALE: u32 = 1 << 22;

/// The byte of a line that keeps column `column`, parity `parity` of K, and how far up its nibble stands.
///
/// The low nibbles are columns 0..16 and the high ones columns 16..32, in the order of a [`PairLine`]: widened to
/// words, either half is looked up at once.
#[inline(always)]
pub(crate) const fn nibble_position(column: usize, parity: usize) -> (usize, u32) {
    (column % 16 * 2 + parity, (column / 16 * 4) as u32)
}

/// The upper halves of what a nibble stands for, which are all that is not zero.
const fn as_bf16(values: &[f32; 16]) -> [u16; 16] {
    let mut table = [0; 16];
    let mut nibble = 0;
    while nibble < 16 {
        let bits = values[nibble].to_bits();
        assert!(bits & 0xffff == 0);
        table[nibble] = (bits >> 16) as u16;
        nibble += 1;
    }
    table
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

/// What a kernel that takes whole blocks of rows writes on the way; kept from call to call, which saves clearing it.
pub(crate) struct Scratch {
    /// Two blocks of K as bf16.
    pub(crate) decoded: [[PairLine; BLOCK_PAIRS]; 2],
    /// Sums of two tiles.
    pub(crate) fresh: [Sums; 2 * BLOCK_TILE_ROWS],
}

impl Scratch {
    pub(crate) const NEW: Self =
        Self { decoded: [[[0; PANEL]; BLOCK_PAIRS]; 2], fresh: [[0.0; PANEL]; 2 * BLOCK_TILE_ROWS] };
}

/// Most rows of a tile of such a kernel.
pub(crate) const BLOCK_TILE_ROWS: usize = 16;

/// Memory that the caller will read, to be brought into a cache meanwhile.
#[derive(Clone, Copy)]
pub(crate) struct Ahead<'a> {
    pub(crate) bytes: &'a [u8],
    /// Read by the next calls, so that it belongs into the L1 cache; else L2 will do.
    pub(crate) soon: bool,
}

impl<'a> Ahead<'a> {
    /// One of so many parts of nearly the same size.
    pub(super) fn part(&self, index: usize, count: usize) -> Ahead<'a> {
        let [start, end] = [index, index + 1].map(|part| part * self.bytes.len() / count);
        Ahead { bytes: &self.bytes[start..end], soon: self.soon }
    }
}

impl Ahead<'_> {
    pub(super) const NOTHING: Self = Self { bytes: &[], soon: true };
}
