//! GEMM kernels in plain Rust, written so that the compiler can use whatever vectors the target has.

use super::panel::{BLOCK_PAIRS, ByteLine, DECODED_UNIT, PANEL, PairLine, Sums};
use crate::dtype::E4M3_VALUES;

/// Columns and rows whose sums stay in registers: 4 by 8 f32 are eight 128-bit registers.
const COLUMNS: usize = 8;
const ROWS: usize = 4;

/// See [`super::gemm::multiply`].
pub(super) fn multiply(rows: &[u32], panel: &[PairLine], sums: &mut [Sums]) {
    let tile = sums.len();
    // A sum of its own for every block of K, as a caller with several tiles asks for them: a row's sums do not depend
    // on how many rows there are.
    for (rows, panel) in rows.chunks(BLOCK_PAIRS * tile).zip(panel.chunks(BLOCK_PAIRS)) {
        for first in (0..tile).step_by(ROWS) {
            let part = &mut sums[first..tile.min(first + ROWS)];
            match part.len() {
                1 => multiply_rows::<1>(&rows[first..], tile, panel, part),
                2 => multiply_rows::<2>(&rows[first..], tile, panel, part),
                3 => multiply_rows::<3>(&rows[first..], tile, panel, part),
                _ => multiply_rows::<ROWS>(&rows[first..], tile, panel, part),
            }
        }
    }
}

/// `R` rows whose pairs stand `stride` apart.
fn multiply_rows<const R: usize>(rows: &[u32], stride: usize, panel: &[PairLine], sums: &mut [Sums]) {
    for first in (0..PANEL).step_by(COLUMNS) {
        let mut partial = [[0f32; COLUMNS]; R];
        for (pair, line) in rows.chunks(stride).zip(panel) {
            let line = &line[first..first + COLUMNS];
            for (row, partial) in partial.iter_mut().enumerate() {
                let (even, odd) = split(pair[row]);
                for (sum, &weights) in partial.iter_mut().zip(line) {
                    let (weight_even, weight_odd) = split(weights);
                    *sum += even * weight_even;
                    *sum += odd * weight_odd;
                }
            }
        }
        for (sums, partial) in sums.iter_mut().zip(&partial) {
            for (sum, partial) in sums[first..first + COLUMNS].iter_mut().zip(partial) {
                *sum += partial;
            }
        }
    }
}

/// The two bf16 of a pair, as f32.
#[inline(always)]
pub(super) fn split(pair: u32) -> (f32, f32) {
    (f32::from_bits(pair << 16), f32::from_bits(pair & 0xffff_0000))
}

/// The bf16 bits of every e4m3 byte, in units of `unit`, a power of two.
pub(super) const fn e4m3_as_bf16(unit: f32) -> [u16; 256] {
    let mut table = [0; 256];
    let mut byte = 0;
    while byte < 256 {
        // e4m3 has 3 mantissa bits and bf16 7: nothing is cut off.
        table[byte] = ((E4M3_VALUES[byte] / unit).to_bits() >> 16) as u16;
        byte += 1;
    }
    table
}

/// Every byte of a line as bf16, in units of [`DECODED_UNIT`]: arithmetic rather than a table, so that it becomes
/// vector code.
pub(super) fn decode_line(line: &ByteLine, pairs: &mut PairLine) {
    let (first, second) = pairs.split_at_mut(PANEL / 2);
    for ((bytes, first), second) in line.as_chunks::<4>().0.iter().zip(first).zip(second) {
        // A chunk is a pair of a column of the first half beside one of the second: see `e4m3_position`.
        let [a, b, c, d] = bytes.map(|byte| u32::from(bf16_bits(byte)));
        (*first, *second) = (a | c << 16, b | d << 16);
    }
}

/// The bf16 of an e4m3 byte, in units of [`DECODED_UNIT`].
#[inline(always)]
fn bf16_bits(byte: u8) -> u16 {
    // The bits in their place, with an exponent 120 too small; multiplying by a power of two is exact, and turns what
    // is subnormal here into what it means.
    const UNIT: f32 = f32::from_bits((120 + 127) << 23) / DECODED_UNIT;
    let bits = (u32::from(byte) & 0x80) << 24 | (u32::from(byte) & 0x7f) << 20;
    let value = f32::from_bits(bits) * UNIT;
    let value = (value.to_bits() >> 16) as u16;
    if byte & 0x7f == 0x7f { 0x7fc0 } else { value }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::arch::panel::e4m3_position;

    #[test]
    fn a_line_is_decoded_in_the_order_it_is_packed() {
        let mut line = [0; 2 * PANEL];
        for column in 0..PANEL {
            for parity in 0..2 {
                line[e4m3_position(column, parity)] = (1 + column + PANEL * parity) as u8;
            }
        }
        let mut pairs = [0; PANEL];
        decode_line(&line, &mut pairs);
        for (column, pair) in pairs.into_iter().enumerate() {
            let [even, odd] = [1 + column, 1 + column + PANEL].map(|byte| u32::from(bf16_bits(byte as u8)));
            assert_eq!(pair, even | odd << 16, "column {column}");
        }
    }

    #[test]
    fn arithmetic_and_table_agree_on_every_byte() {
        for byte in 0..=255u8 {
            let (bits, table) = (bf16_bits(byte), e4m3_as_bf16(DECODED_UNIT)[byte as usize]);
            let nan = |bits| bits & 0x7fff > 0x7f80;
            assert!(bits == table || (nan(bits) && nan(table) && byte & 0x7f == 0x7f), "{byte:#x}");
        }
    }
}
