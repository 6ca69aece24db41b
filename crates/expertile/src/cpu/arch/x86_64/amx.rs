//! GEMM kernels for AMX with BF16: up to 32 rows by 32 columns in tile registers.
//!
//! `tdpbf16ps` adds up the even and the odd products of 16 K-pairs in f32, each by themselves, and adds both to a sum.
//! It takes bf16 subnormals for zero, as `vdpbf16ps` does. A panel's lines are its second operand as they are. Of its
//! first, [`STEP_PAIRS`] pairs of every row of a block stand together: `[steps][rows][STEP_PAIRS]`.

use super::avx512::{Decoder, load_sums, store_pairs, store_sums};
use super::prefetch::Prefetch;
use crate::cpu::arch::panel::{
    Ahead, BLOCK_PAIRS, BLOCK_TILE_ROWS as TILE_ROWS, BlockScales, ByteLine, BytePanel, PANEL, PairLine, Scratch, Sums,
};
use crate::cpu::arch::{Isa, Level};
use std::arch::asm;
use std::arch::x86_64::*;
use std::ops::Range;
use std::sync::OnceLock;

/// K-pairs of one product of tiles.
pub(crate) const STEP_PAIRS: usize = 16;
/// Bytes of a row of a tile.
const ROW_BYTES: usize = STEP_PAIRS * size_of::<u32>();
/// Steps of a block of K.
const BLOCK_STEPS: usize = BLOCK_PAIRS / STEP_PAIRS;
const _: () = assert!(BLOCK_PAIRS.is_multiple_of(STEP_PAIRS) && PANEL == 2 * STEP_PAIRS);

/// Whether the CPU has the instructions and the kernel lets this process use them. Linux is asked once: it gives every
/// thread of the process room for tile registers from then on.
#[allow(unsafe_code)]
pub(crate) fn is_usable() -> bool {
    static USABLE: OnceLock<bool> = OnceLock::new();
    // AMX-BF16 and AMX-TILE.
    const FEATURES: u32 = 1 << 22 | 1 << 24;
    // SAFETY: every x86-64 has `cpuid`. Where leaf 7 is not there it reads as the last one that is, so it is looked for.
    #[allow(unused_unsafe)]
    let has = || unsafe { __cpuid(0).eax >= 7 && __cpuid_count(7, 0).edx & FEATURES == FEATURES };
    *USABLE.get_or_init(|| cfg!(target_os = "linux") && has() && ask_for_tiles())
}

/// Linux: `arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)`.
#[allow(unsafe_code)]
fn ask_for_tiles() -> bool {
    const ARCH_PRCTL: isize = 158;
    const REQUEST_PERMISSION: usize = 0x1023;
    const TILE_DATA: usize = 18;
    let mut result = ARCH_PRCTL;
    // SAFETY: a system call that takes two numbers, and reads and writes no memory of the program. The kernel leaves
    // rcx and r11 changed.
    unsafe {
        asm!("syscall", inout("rax") result, in("rdi") REQUEST_PERMISSION, in("rsi") TILE_DATA,
            out("rcx") _, out("r11") _, options(nostack));
    }
    result == 0
}

/// `sums[r][c] = sum_k rows[r, k] * panel[c, k]` for the rows of a block and all of K.
///
/// A row has the bits that it has in any other block. `ahead` is where what is read next starts.
pub(crate) fn multiply(isa: Isa, rows: &[u32], panel: &[PairLine], sums: &mut [Sums], ahead: Ahead<'_>) {
    let tiles = Tiles::begin(isa, sums.len());
    let mut next = ahead.bytes;
    for pair in tiles.pairs() {
        let at = [pair.start, pair.end - 1].map(|tile| tiles.first_row(tile));
        let mut product = tiles.product(pair, rows, panel);
        for step in 0..product.steps {
            prefetch_step(&mut next);
            product.step(step);
        }
        product.finish(sums, at);
        // Later passes have the panel in a cache: what follows it comes meanwhile.
        next = &ahead.bytes[size_of_val(panel).min(ahead.bytes.len())..];
    }
}

/// `sums[r][c] += sum_block scale[r, block] * sum_k rows[r, k] * panel[c, k]`, with a fresh sum for every block.
///
/// A block is decoded between the products of the one before. These take long and leave the other units alone, and tiles
/// are loaded from the cache, where stores have to arrive first.
pub(crate) fn multiply_e4m3(
    isa: Isa,
    rows: &[u32],
    panel: BytePanel<'_>,
    scales: BlockScales<'_>,
    sums: &mut [Sums],
    Scratch { decoded: buffers, fresh }: &mut Scratch,
    ahead: Ahead<'_>,
) {
    let (tiles, count) = (Tiles::begin(isa, sums.len()), sums.len());
    let parts = panel.lines.len().div_ceil(STEP_PAIRS);
    // A step of 16 lines of a block, if it has that many.
    let decode_step = |block: usize, step: usize, decoded: &mut [PairLine; BLOCK_PAIRS]| {
        let (first, part) = (step * STEP_PAIRS, block * BLOCK_STEPS + step);
        let Some(lines) = panel.lines.chunks(STEP_PAIRS).nth(part) else { return };
        let special = panel.special[block] >> first;
        // SAFETY: `Tiles::begin` has seen an `Isa` of AMX, which exists only if the CPU has AVX-512, too.
        #[allow(unsafe_code)]
        unsafe {
            decode(lines, special, &mut decoded[first..], ahead.part(part, parts));
        }
    };
    for step in 0..BLOCK_STEPS {
        decode_step(0, step, &mut buffers[0]);
    }
    for (block, rows) in rows.chunks(BLOCK_PAIRS * count).enumerate() {
        let [even, odd] = &mut *buffers;
        let (decoded, other) = if block % 2 == 0 { (&*even, odd) } else { (&*odd, even) };
        for pair in tiles.pairs() {
            let mut product = tiles.product(pair.clone(), rows, &decoded[..rows.len() / count]);
            for step in 0..product.steps {
                product.step(step);
                if pair.start == 0 {
                    decode_step(block + 1, step, other);
                }
            }
            product.finish(fresh, [0, TILE_ROWS]);
            for (tile, fresh) in pair.zip(fresh.chunks(TILE_ROWS)) {
                let own = tiles.own_rows(tile);
                // SAFETY: as above.
                #[allow(unsafe_code)]
                unsafe {
                    promote(&fresh[own.start - tiles.first_row(tile)..], scales, block, own, sums);
                }
            }
        }
    }
}

/// Some lines as bf16.
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
fn decode(lines: &[ByteLine], mut special: u64, decoded: &mut [PairLine], ahead: Ahead<'_>) {
    let (mut prefetch, decoder) = (Prefetch::new(ahead, lines.len()), Decoder::new());
    for (line, decoded) in lines.iter().zip(decoded) {
        prefetch.step();
        store_pairs(decoded, decoder.pairs(line, special & 1 != 0));
        special >>= 1;
    }
}

/// Asks for as many bytes as a step of a panel has.
#[inline(always)]
fn prefetch_step(next: &mut &[u8]) {
    let (lines, rest) = next.split_at(next.len().min(STEP_PAIRS * size_of::<PairLine>()));
    let mut prefetch = Prefetch::new(Ahead { bytes: lines, soon: true }, STEP_PAIRS);
    for _ in 0..STEP_PAIRS {
        prefetch.step();
    }
    *next = rest;
}

/// `sums += fresh * scale` for some of the rows.
#[target_feature(enable = "avx512f")]
fn promote(fresh: &[Sums], scales: BlockScales<'_>, block: usize, rows: Range<usize>, sums: &mut [Sums]) {
    let count = sums.len();
    for ((row, sums), fresh) in rows.clone().zip(&mut sums[rows]).zip(fresh) {
        let scale = _mm512_set1_ps(scales.of(block, row, count));
        let ([low, high], fresh) = (load_sums(sums), load_sums(fresh));
        store_sums(sums, &[_mm512_fmadd_ps(fresh[0], scale, low), _mm512_fmadd_ps(fresh[1], scale, high)]);
    }
}

/// The tile registers of this thread, set up for the rows of a block.
///
/// Registers 0 to 3 are the sums of two tiles of rows by 32 columns, 4 and 5 their rows, 6 and 7 the weights. All
/// tiles of a block have as many rows, so that one configuration does for all: the last ones start earlier instead, and
/// compute some rows again. Nothing but this module's functions touches tile registers, so that they keep what they hold
/// from one to the next.
struct Tiles {
    /// Rows of the block.
    count: usize,
    /// Tiles of the block.
    tiles: usize,
    /// Rows of a tile.
    rows: usize,
}

/// What `ldtilecfg` reads.
#[repr(C)]
struct TileConfig {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

impl Tiles {
    #[allow(unsafe_code)]
    fn begin(isa: Isa, count: usize) -> Self {
        assert!(isa.level() == Level::Amx && count > 0);
        let tiles = count.div_ceil(TILE_ROWS);
        let rows = count.div_ceil(tiles);
        let mut config = TileConfig { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
        config.row_bytes[..8].fill(ROW_BYTES as u16);
        config.rows[..6].fill(rows as u8);
        config.rows[6..8].fill(STEP_PAIRS as u8);
        // SAFETY: an `Isa` of this level exists only if the CPU has AMX and Linux gives tile registers to this process.
        // The configuration is of 64 bytes, and palette 1 has 8 tiles of up to 16 rows of 64 bytes.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const config, options(nostack, readonly)) };
        Self { count, tiles, rows }
    }

    /// Tiles that are multiplied together: two, or the last one.
    fn pairs(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        let tiles = self.tiles;
        (0..tiles).step_by(2).map(move |tile| tile..tiles.min(tile + 2))
    }

    fn first_row(&self, tile: usize) -> usize {
        (tile * self.rows).min(self.count - self.rows)
    }

    /// Rows that no tile before this one has.
    fn own_rows(&self, tile: usize) -> Range<usize> {
        (tile * self.rows).min(self.count)..self.first_row(tile) + self.rows
    }

    /// The product of one or two tiles of the block's rows with lines of a panel, not begun.
    #[allow(unsafe_code)]
    fn product<'a>(&'a self, tiles: Range<usize>, rows: &'a [u32], panel: &'a [PairLine]) -> Product<'a> {
        assert!(tiles.end <= self.tiles && rows.len() == panel.len() * self.count);
        let first = [tiles.start, tiles.end - 1].map(|tile| self.first_row(tile));
        let steps = panel.len() / STEP_PAIRS;
        // SAFETY: `begin` has set the tiles up.
        unsafe {
            asm!("tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3",
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _, options(nostack));
        }
        Product { tiles: self, first, two: tiles.len() == 2, rows, panel, steps }
    }
}

impl Drop for Tiles {
    #[allow(unsafe_code)]
    fn drop(&mut self) {
        // SAFETY: `begin` made this, on a CPU with AMX. The kernel saves no tiles that have been released.
        unsafe { asm!("tilerelease", options(nostack)) };
    }
}

/// A product under way; its sums are in registers.
struct Product<'a> {
    tiles: &'a Tiles,
    /// The first row of either tile, the same if there is one.
    first: [usize; 2],
    two: bool,
    rows: &'a [u32],
    panel: &'a [PairLine],
    /// Whole steps of K.
    steps: usize,
}

impl Product<'_> {
    /// Adds the products of a step's pairs.
    #[inline]
    fn step(&mut self, step: usize) {
        let rows = &self.rows[step * STEP_PAIRS * self.tiles.count..][..STEP_PAIRS * self.tiles.count];
        let lines = &self.panel[step * STEP_PAIRS..][..STEP_PAIRS];
        self.add(self.first.map(|row| rows[row * STEP_PAIRS..].as_chunks().0), lines);
    }

    #[inline]
    #[allow(unsafe_code)]
    fn add(&mut self, rows: [&[[u32; STEP_PAIRS]]; 2], lines: &[PairLine]) {
        assert!(lines.len() == STEP_PAIRS && rows.iter().all(|rows| rows.len() >= self.tiles.rows));
        // SAFETY: `Tiles::begin` has set the tiles up. As many rows of 64 bytes as a tile has are read, and 16 lines.
        unsafe {
            asm!(
                "tileloadd tmm4, [{rows} + 1 * {row_bytes}]",
                "tileloadd tmm6, [{lines} + 1 * {line_bytes}]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm7, [{lines} + 1 * {line_bytes} + 64]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                rows = in(reg) rows[0].as_ptr(),
                lines = in(reg) lines.as_ptr(),
                row_bytes = in(reg) ROW_BYTES,
                line_bytes = in(reg) size_of::<PairLine>(),
                out("tmm0") _, out("tmm1") _, out("tmm4") _, out("tmm6") _, out("tmm7") _,
                options(nostack, readonly),
            );
            if self.two {
                asm!(
                    "tileloadd tmm5, [{rows} + 1 * {row_bytes}]",
                    "tdpbf16ps tmm2, tmm5, tmm6",
                    "tdpbf16ps tmm3, tmm5, tmm7",
                    rows = in(reg) rows[1].as_ptr(),
                    row_bytes = in(reg) ROW_BYTES,
                    out("tmm2") _, out("tmm3") _, out("tmm5") _,
                    options(nostack, readonly),
                );
            }
        }
    }

    /// Adds the pairs that make no whole step, and writes the sums of each tile from a row of `sums` on.
    #[allow(unsafe_code)]
    fn finish(mut self, sums: &mut [Sums], at: [usize; 2]) {
        let (_, rest) = self.panel.as_chunks::<STEP_PAIRS>();
        if !rest.is_empty() {
            // Zeros make a whole step of them.
            let (mut lines, mut padded) = ([[0; PANEL]; STEP_PAIRS], [[[0; STEP_PAIRS]; TILE_ROWS]; 2]);
            lines[..rest.len()].copy_from_slice(rest);
            let rows = &self.rows[self.steps * STEP_PAIRS * self.tiles.count..];
            for (padded, first) in padded.iter_mut().zip(self.first) {
                for (padded, row) in padded.iter_mut().zip(rows[first * rest.len()..].chunks(rest.len())) {
                    padded[..rest.len()].copy_from_slice(row);
                }
            }
            self.add(padded.each_ref().map(|padded| &padded[..]), &lines);
        }
        let rows = self.tiles.rows;
        let sums = at.map(|at| sums[at..][..rows].as_mut_ptr());
        // SAFETY: `Tiles::begin` has set the tiles up; as many rows of 128 bytes as a tile has are written.
        unsafe {
            asm!(
                "tilestored [{sums} + 1 * {row_bytes}], tmm0",
                "tilestored [{sums} + 1 * {row_bytes} + 64], tmm1",
                sums = in(reg) sums[0],
                row_bytes = in(reg) size_of::<Sums>(),
                options(nostack),
            );
            if self.two {
                asm!(
                    "tilestored [{sums} + 1 * {row_bytes}], tmm2",
                    "tilestored [{sums} + 1 * {row_bytes} + 64], tmm3",
                    sums = in(reg) sums[1],
                    row_bytes = in(reg) size_of::<Sums>(),
                    options(nostack),
                );
            }
        }
    }
}
