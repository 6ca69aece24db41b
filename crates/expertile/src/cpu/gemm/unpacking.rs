//! Packed weights back in the order they came in: packing moves bits and changes none.

use super::packing::{PackedWeights, PanelWeights};
use crate::cpu::Cpu;
use crate::cpu::arch::panel::{BLOCK_PAIRS, GroupScale, NibbleGroup, e4m3_position, nibble_position};
use crate::dtype::E4m3;
use crate::error::{Error, Result, require_exact};
use crate::gemm::{WEIGHT_BLOCK, WeightFormat};
use crate::mxfp4;
use half::bf16;
use rayon::prelude::*;
use std::ops::Range;

impl PackedWeights {
    /// Writes rows `first_row..` of an expert to `out [R, K]`, as many as it holds, bit for bit as they were packed:
    /// gate's rows first, then up's.
    ///
    /// # Errors
    /// [`Error::WeightFormat`] if the weights are e4m3, [`Error::Value`] if there is no such expert, [`Error::Shape`]
    /// unless `out` holds whole rows that the expert has.
    pub fn unpack_bf16_rows(&self, cpu: &Cpu, expert: usize, first_row: usize, out: &mut [bf16]) -> Result<()> {
        self.check_unpack(WeightFormat::Bf16, expert, first_row, out.len())?;
        self.for_each_part(cpu, first_row, self.k(), out, |panel, columns, out| {
            let PanelWeights::Bf16(lines) = self.panel(expert, panel).weights else {
                unreachable!("the format was checked");
            };
            unpack_panel(self.k(), columns, out, |pair, column, parity| {
                bf16::from_bits((lines[pair][column] >> (16 * parity)) as u16)
            });
        });
        Ok(())
    }

    /// The same for e4m3 rows; their scales are not among them.
    ///
    /// # Errors
    /// As [`PackedWeights::unpack_bf16_rows`]; [`Error::WeightFormat`] if the weights are bf16.
    pub fn unpack_e4m3_rows(&self, cpu: &Cpu, expert: usize, first_row: usize, out: &mut [E4m3]) -> Result<()> {
        self.check_unpack(WeightFormat::E4m3, expert, first_row, out.len())?;
        self.for_each_part(cpu, first_row, self.k(), out, |panel, columns, out| {
            let PanelWeights::E4m3(bytes, _) = self.panel(expert, panel).weights else {
                unreachable!("the format was checked");
            };
            unpack_panel(self.k(), columns, out, |pair, column, parity| {
                E4m3(bytes.lines[pair][e4m3_position(column, parity)])
            });
        });
        Ok(())
    }

    /// The same for MXFP4 rows: `blocks [R, K / 2]` and `scales [R, K / 32]`.
    ///
    /// # Errors
    /// As [`PackedWeights::unpack_bf16_rows`], for weights of another format than mxfp4; [`Error::Shape`] unless blocks
    /// and scales are of as many rows.
    pub fn unpack_mxfp4_rows(
        &self,
        cpu: &Cpu,
        expert: usize,
        first_row: usize,
        blocks: &mut [u8],
        scales: &mut [u8],
    ) -> Result<()> {
        self.check_unpack(WeightFormat::Mxfp4, expert, first_row, blocks.len().saturating_mul(2))?;
        let (width, groups) = (self.k() / 2, self.k() / mxfp4::GROUP);
        require_exact("scales", scales.len(), &[blocks.len() / width, groups])?;
        let groups_of = |panel| match self.panel(expert, panel).weights {
            PanelWeights::Mxfp4(groups) => groups,
            _ => unreachable!("the format was checked"),
        };
        self.for_each_part(cpu, first_row, width, blocks, |panel, columns, out| {
            unpack_blocks(groups_of(panel), columns, width, out);
        });
        self.for_each_part(cpu, first_row, groups, scales, |panel, columns, out| {
            for (column, row) in columns.zip(out.chunks_exact_mut(groups)) {
                for (scale, group) in row.iter_mut().zip(groups_of(panel)) {
                    *scale = group.scales[column];
                }
            }
        });
        Ok(())
    }

    /// The blocks of int4 rows, `[R, K / 2]`; their scales are not among them.
    ///
    /// # Errors
    /// As [`PackedWeights::unpack_bf16_rows`], for weights of another format than int4.
    pub fn unpack_int4_rows(&self, cpu: &Cpu, expert: usize, first_row: usize, blocks: &mut [u8]) -> Result<()> {
        self.check_unpack(WeightFormat::Int4, expert, first_row, blocks.len().saturating_mul(2))?;
        let width = self.k() / 2;
        self.for_each_part(cpu, first_row, width, blocks, |panel, columns, out| {
            match self.panel(expert, panel).weights {
                PanelWeights::Int4Bf16(groups) => unpack_blocks(groups, columns, width, out),
                PanelWeights::Int4F16(groups) => unpack_blocks(groups, columns, width, out),
                _ => unreachable!("the format was checked"),
            }
        });
        Ok(())
    }

    fn check_unpack(&self, format: WeightFormat, expert: usize, first_row: usize, len: usize) -> Result<()> {
        if self.format() != format {
            let (actual, expected) = (self.format().name(), format.name());
            return Err(Error::WeightFormat { argument: "weights", actual, expected });
        }
        if expert >= self.experts() {
            return Err(Error::value("expert", expert, format!("below {}", self.experts())));
        }
        let room = self.n().saturating_sub(first_row);
        if !len.is_multiple_of(self.k()) || len / self.k() > room {
            let expected = format!("[R, {}] with R at most {room}", self.k());
            return Err(Error::shape("out", &[len], expected));
        }
        Ok(())
    }

    /// Runs `unpack(panel, columns of it, their rows in out)` for the panels that the rows of `out [R, width]` are in.
    fn for_each_part<T: Send>(
        &self,
        cpu: &Cpu,
        first_row: usize,
        width: usize,
        out: &mut [T],
        unpack: impl Fn(usize, Range<usize>, &mut [T]) + Sync,
    ) {
        let rows = first_row..first_row + out.len() / width;
        let mut rest = out;
        let mut parts = Vec::new();
        for panel in 0..self.panels() {
            let own = self.columns(panel);
            let (start, end) = (rows.start.max(own.start), rows.end.min(own.end));
            if start < end {
                let (part, after) = std::mem::take(&mut rest).split_at_mut((end - start) * width);
                parts.push((panel, start - own.start..end - own.start, part));
                rest = after;
            }
        }
        cpu.install(|| parts.into_par_iter().for_each(|(panel, columns, out)| unpack(panel, columns, out)));
    }
}

/// Writes columns of a panel as rows of two values to a byte.
fn unpack_blocks<S: GroupScale>(groups: &[NibbleGroup<S>], columns: Range<usize>, width: usize, out: &mut [u8]) {
    for (column, row) in columns.zip(out.chunks_exact_mut(width)) {
        let [even, odd] = [0, 1].map(|parity| nibble_position(column, parity));
        let lines = groups.iter().flat_map(|group| &group.lines);
        for (byte, line) in row.iter_mut().zip(lines) {
            let [even, odd] = [even, odd].map(|(at, up)| line[at] >> up & 15);
            *byte = even | odd << 4;
        }
    }
}

/// Writes columns of a panel as rows; `value(pair, column, parity)` is one of its weights.
fn unpack_panel<T>(k: usize, columns: Range<usize>, out: &mut [T], value: impl Fn(usize, usize, usize) -> T) {
    // A block of K at a time, so that the lines that the columns take turns to read stay in the L1 cache.
    for block in 0..k.div_ceil(WEIGHT_BLOCK) {
        let part = block * WEIGHT_BLOCK..k.min((block + 1) * WEIGHT_BLOCK);
        for (column, row) in columns.clone().zip(out.chunks_exact_mut(k)) {
            for (offset, out) in row[part.clone()].iter_mut().enumerate() {
                *out = value(block * BLOCK_PAIRS + offset / 2, column, offset % 2);
            }
        }
    }
}
