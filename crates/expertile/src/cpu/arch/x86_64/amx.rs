//! GEMM kernels for AMX with BF16: up to 32 rows by 32 columns in tile registers.
//!
//! `tdpbf16ps` adds up the even and the odd products of 16 K-pairs in f32, each by themselves, and adds both to a sum.
//! It takes bf16 subnormals for zero, as `vdpbf16ps` does. A panel's lines are its second operand as they are. Of its
//! first, [`STEP_PAIRS`] pairs of every row of a block stand together: `[steps][rows][STEP_PAIRS]`.

use super::avx512::{Decoder, load_sums, store_pairs, store_sums};
use super::prefetch::Prefetch;
use crate::cpu::arch::panel::{Ahead, BLOCK_PAIRS, BlockScales, BytePanel, PANEL, PairLine, Sums};
use crate::cpu::arch::{Isa, Level};
use std::arch::asm;
use std::arch::x86_64::*;
use std::ops::Range;
use std::sync::OnceLock;

/// K-pairs of one product of tiles.
pub(crate) const STEP_PAIRS: usize = 16;
/// Rows of a tile register.
const TILE_ROWS: usize = 16;
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
    let mut next = ahead.bytes.as_ptr();
    for pair in tiles.pairs() {
        let at = [pair.start, pair.end - 1].map(|tile| tiles.first_row(tile));
        tiles.multiply(pair, rows, panel, sums, at, next);
        // Everything has been asked for by the first.
        next = panel.as_ptr().cast();
    }
}

/// `sums[r][c] += sum_block scale[r, block] * sum_k rows[r, k] * panel[c, k]`, with a fresh sum for every block.
pub(crate) fn multiply_e4m3(
    isa: Isa,
    rows: &[u32],
    panel: BytePanel<'_>,
    scales: BlockScales<'_>,
    sums: &mut [Sums],
    ahead: Ahead<'_>,
) {
    let (tiles, count) = (Tiles::begin(isa, sums.len()), sums.len());
    let (mut decoded, mut fresh) = ([[0; PANEL]; BLOCK_PAIRS], [[0.0; PANEL]; 2 * TILE_ROWS]);
    let blocks = panel.lines.chunks(BLOCK_PAIRS).zip(panel.special).zip(rows.chunks(BLOCK_PAIRS * count));
    for (block, ((lines, &special), rows)) in blocks.enumerate() {
        let decoded = &mut decoded[..lines.len()];
        // SAFETY: `Tiles::begin` has seen an `Isa` of AMX, which exists only if the CPU has AVX-512, too.
        #[allow(unsafe_code)]
        unsafe {
            decode(BytePanel { lines, special: &[special] }, decoded, ahead.part(block, scales.panel.len()));
        }
        for pair in tiles.pairs() {
            tiles.multiply(pair.clone(), rows, decoded, &mut fresh, [0, TILE_ROWS], decoded.as_ptr().cast());
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

/// A block of K as bf16.
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
fn decode(panel: BytePanel<'_>, decoded: &mut [PairLine], ahead: Ahead<'_>) {
    let (mut prefetch, decoder, mut special) = (Prefetch::new(ahead, decoded.len()), Decoder::new(), panel.special[0]);
    for (line, decoded) in panel.lines.iter().zip(decoded) {
        prefetch.step();
        store_pairs(decoded, decoder.pairs(line, special & 1 != 0));
        special >>= 1;
    }
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
/// compute some rows again.
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

/// Runs a loop over steps of K: `$start` sets the sums, then every step asks for `$ahead` and multiplies, then the sums
/// are written. `$two` is what a second tile of rows adds.
macro_rules! steps {
    ([$($start:literal),*] [$($ahead:literal),*] [$($two:literal),*] [$($store:literal),*], $regs:expr) => {{
        let Registers { rows, panel, steps, step_bytes, sums, next } = $regs;
        asm!(
            "/* {c1} */",
            $($start,)*
            "test {n}, {n}",
            "jz 3f",
            "2:",
            "tileloadd tmm4, [{a0} + 1 * {row_bytes}]",
            "tileloadd tmm6, [{b} + 1 * {line_bytes}]",
            $($ahead,)*
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm7, [{b} + 1 * {line_bytes} + 64]",
            "tdpbf16ps tmm1, tmm4, tmm7",
            $($two,)*
            "add {a0}, {step}",
            "add {a1}, {step}",
            "add {b}, 2048",
            "add {next}, 2048",
            "dec {n}",
            "jnz 2b",
            "3:",
            "tilestored [{c0} + 1 * {line_bytes}], tmm0",
            "tilestored [{c0} + 1 * {line_bytes} + 64], tmm1",
            $($store,)*
            a0 = inout(reg) rows[0] => _,
            a1 = inout(reg) rows[1] => _,
            b = inout(reg) panel => _,
            next = inout(reg) next => _,
            n = inout(reg) steps => _,
            step = in(reg) step_bytes,
            c0 = in(reg) sums[0],
            c1 = in(reg) sums[1],
            row_bytes = in(reg) STEP_PAIRS * size_of::<u32>(),
            line_bytes = in(reg) size_of::<PairLine>(),
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        )
    }};
}

/// What a loop over steps of K takes.
#[derive(Clone, Copy)]
struct Registers {
    rows: [*const u32; 2],
    panel: *const PairLine,
    steps: usize,
    /// From a row's pairs of one step to those of the next.
    step_bytes: usize,
    sums: [*mut f32; 2],
    /// Asked for on the way, as many bytes as the panel has.
    next: *const u8,
}

/// Sums that start from zero; one tile of rows.
#[allow(unsafe_code)]
unsafe fn from_zero_one(registers: Registers) {
    // SAFETY: the caller's.
    unsafe {
        steps!(["tilezero tmm0", "tilezero tmm1"]
         []
         []
         [], registers);
    }
}

/// Sums that start from zero; two tiles of rows.
#[allow(unsafe_code)]
unsafe fn from_zero_two(registers: Registers) {
    // SAFETY: the caller's.
    unsafe {
        steps!(["tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3"]
         []
         ["tileloadd tmm5, [{a1} + 1 * {row_bytes}]", "tdpbf16ps tmm2, tmm5, tmm6", "tdpbf16ps tmm3, tmm5, tmm7"]
         ["tilestored [{c1} + 1 * {line_bytes}], tmm2", "tilestored [{c1} + 1 * {line_bytes} + 64], tmm3"], registers);
    }
}

/// Sums that start from zero; one tile of rows, asking for `next`.
#[allow(unsafe_code)]
unsafe fn from_zero_one_ahead(registers: Registers) {
    // SAFETY: the caller's.
    unsafe {
        steps!(["tilezero tmm0", "tilezero tmm1"]
         [".irp line, 0, 256, 512, 768, 1024, 1280, 1536, 1792", "prefetcht0 [{next} + \\line]",
          "prefetcht0 [{next} + \\line + 64]", "prefetcht0 [{next} + \\line + 128]", "prefetcht0 [{next} + \\line + 192]",
          ".endr"]
         []
         [], registers);
    }
}

/// Sums that start from zero; two tiles of rows, asking for `next`.
#[allow(unsafe_code)]
unsafe fn from_zero_two_ahead(registers: Registers) {
    // SAFETY: the caller's.
    unsafe {
        steps!(["tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3"]
         [".irp line, 0, 256, 512, 768, 1024, 1280, 1536, 1792", "prefetcht0 [{next} + \\line]",
          "prefetcht0 [{next} + \\line + 64]", "prefetcht0 [{next} + \\line + 128]", "prefetcht0 [{next} + \\line + 192]",
          ".endr"]
         ["tileloadd tmm5, [{a1} + 1 * {row_bytes}]", "tdpbf16ps tmm2, tmm5, tmm6", "tdpbf16ps tmm3, tmm5, tmm7"]
         ["tilestored [{c1} + 1 * {line_bytes}], tmm2", "tilestored [{c1} + 1 * {line_bytes} + 64], tmm3"], registers);
    }
}

/// Sums that are added to; two tiles of rows.
#[allow(unsafe_code)]
unsafe fn onto_two(registers: Registers) {
    // SAFETY: the caller's.
    unsafe {
        steps!(["tileloadd tmm0, [{c0} + 1 * {line_bytes}]", "tileloadd tmm1, [{c0} + 1 * {line_bytes} + 64]",
         "tileloadd tmm2, [{c1} + 1 * {line_bytes}]", "tileloadd tmm3, [{c1} + 1 * {line_bytes} + 64]"]
         []
         ["tileloadd tmm5, [{a1} + 1 * {row_bytes}]", "tdpbf16ps tmm2, tmm5, tmm6", "tdpbf16ps tmm3, tmm5, tmm7"]
         ["tilestored [{c1} + 1 * {line_bytes}], tmm2", "tilestored [{c1} + 1 * {line_bytes} + 64], tmm3"], registers);
    }
}

impl Tiles {
    #[allow(unsafe_code)]
    fn begin(isa: Isa, count: usize) -> Self {
        assert!(isa.level() == Level::Amx && count > 0);
        let tiles = count.div_ceil(TILE_ROWS);
        let rows = count.div_ceil(tiles);
        let mut config = TileConfig { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
        config.row_bytes[..8].fill((STEP_PAIRS * size_of::<u32>()) as u16);
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

    /// The product of one or two tiles, from row `at` of `sums` on each; `next` is asked for meanwhile.
    #[allow(unsafe_code)]
    fn multiply(
        &self,
        tiles: Range<usize>,
        rows: &[u32],
        panel: &[PairLine],
        sums: &mut [Sums],
        at: [usize; 2],
        next: *const u8,
    ) {
        let first = [tiles.start, tiles.end - 1].map(|tile| self.first_row(tile));
        assert!(tiles.end <= self.tiles && rows.len() == panel.len() * self.count);
        assert!(at.iter().all(|at| at + self.rows <= sums.len()));
        let (whole, rest) = panel.as_chunks::<STEP_PAIRS>();
        let (whole_rows, rest_rows) = rows.split_at(whole.len() * STEP_PAIRS * self.count);
        let sums = at.map(|at| sums[at..].as_mut_ptr().cast::<f32>());
        let registers = Registers {
            rows: first.map(|row| whole_rows.as_ptr().wrapping_add(row * STEP_PAIRS)),
            panel: panel.as_ptr(),
            steps: whole.len(),
            step_bytes: self.count * STEP_PAIRS * size_of::<u32>(),
            sums,
            next,
        };
        let two = tiles.len() == 2;
        // SAFETY: `begin` has set the tiles up. Every step reads `self.rows` rows of 64 bytes from `first` on of its
        // `self.count` rows, and its 16 lines of the panel, which both have for `steps` steps (the length of `rows` is
        // checked above). Of `sums`, `self.rows` rows from `at` on are written. What is only asked for may be anywhere.
        unsafe {
            match (two, std::ptr::eq(next, panel.as_ptr().cast())) {
                (true, false) => from_zero_two_ahead(registers),
                (true, true) => from_zero_two(registers),
                (false, false) => from_zero_one_ahead(registers),
                (false, true) => from_zero_one(registers),
            }
        }
        if rest.is_empty() {
            return;
        }
        // A last step of fewer pairs: zeros make it a whole one.
        let mut lines = [[0; PANEL]; STEP_PAIRS];
        lines[..rest.len()].copy_from_slice(rest);
        let mut padded = [[[0; STEP_PAIRS]; TILE_ROWS]; 2];
        for (padded, first) in padded.iter_mut().zip(first) {
            for (padded, row) in padded.iter_mut().zip(rest_rows[first * rest.len()..].chunks(rest.len())) {
                padded[..rest.len()].copy_from_slice(row);
            }
        }
        let registers = Registers {
            rows: [0, 1].map(|tile| padded[tile].as_ptr().cast()),
            panel: lines.as_ptr(),
            steps: 1,
            step_bytes: 0,
            sums,
            next: lines.as_ptr().cast(),
        };
        // SAFETY: as above, for one step of the padded rows and lines; `sums` is read, too. If there is one tile, both
        // are it.
        unsafe { onto_two(registers) }
    }
}

impl Drop for Tiles {
    #[allow(unsafe_code)]
    fn drop(&mut self) {
        // SAFETY: whoever made this has AMX. Tiles without contents are not saved when threads change.
        unsafe { asm!("tilerelease", options(nomem, nostack)) };
    }
}
