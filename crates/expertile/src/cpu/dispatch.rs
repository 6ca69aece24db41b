//! Tokens packed for their way to other ranks, and read where they arrive.
//!
//! Values are quantized or converted here, once, at the source: quantizing looks at one row, so the bits are those that
//! the destination would have made. A row is the same for every rank that it goes to.

use super::Cpu;
use super::layer::TokenRows;
use super::permute::{convert_row, weighted};
use super::quantize::quantize_row;
use super::rows::gather;
use crate::dispatch::TokenRow;
use crate::dtype::{E4m3, Float};
use crate::error::Result;
use crate::gemm::ActivationFormat;
use crate::matrix::MatrixRef;
use crate::quantize::ScaleFormat;
use half::bf16;
use rayon::prelude::*;

/// Packs `x [M, H]` into `out [M, row bytes]`: values (first multiplied by `on_input [M, 1]`, if given), `copies
/// [M, topk]`, and `weights [M, topk]` where they travel. Values of a token without a live slot are left out: nobody
/// reads them. Shapes are the caller's promise.
pub(super) fn pack<T: Float>(
    cpu: &Cpu,
    row: &TokenRow,
    x: MatrixRef<'_, T>,
    on_input: Option<MatrixRef<'_, f32>>,
    copies: &[i32],
    weights: Option<MatrixRef<'_, f32>>,
    out: &mut [u8],
) {
    let space = || vec![T::zeroed(); row.hidden()];
    cpu.install(|| {
        let tokens = out.par_chunks_exact_mut(row.bytes()).zip(copies.par_chunks_exact(row.topk())).enumerate();
        tokens.for_each_init(space, |space, (token, (out, copies))| {
            let slots: &mut [i32] = bytemuck::cast_slice_mut(&mut out[row.copies()]);
            slots.copy_from_slice(copies);
            if copies.iter().all(|&copy| copy < 0) {
                return;
            }
            let values = match on_input {
                Some(weights) => weighted(x, token, weights.get(token, 0), space),
                None => gather(x, token, space),
            };
            pack_values(cpu, row, values, out);
            if let Some(weights) = weights {
                let slots: &mut [f32] = bytemuck::cast_slice_mut(&mut out[row.weights()]);
                slots.iter_mut().enumerate().for_each(|(slot, to)| *to = weights.get(token, slot));
            }
        });
    });
}

fn pack_values<T: Float>(cpu: &Cpu, row: &TokenRow, values: &[T], out: &mut [u8]) {
    match row.activation_format() {
        ActivationFormat::Bf16 => {
            convert_row::<T, bf16>(cpu.isa(), values, bytemuck::cast_slice_mut(&mut out[row.values()]))
        }
        ActivationFormat::E4m3 => {
            let (bytes, rest) = out.split_at_mut(row.scales().start);
            let bytes: &mut [E4m3] = bytemuck::cast_slice_mut(&mut bytes[row.values()]);
            let scales: &mut [f32] = bytemuck::cast_slice_mut(&mut rest[..row.scales().len()]);
            let format = ScaleFormat::ROW_MAJOR;
            quantize_row(cpu.isa(), values, format.group().size(), format.rounding(), bytes, scales);
        }
    }
}

/// Copies the rows of `tokens`, one list after the other, into `out`.
pub(super) fn pick(cpu: &Cpu, row: &TokenRow, packed: &[u8], tokens: &[i32], out: &mut [u8]) {
    let bytes = row.bytes();
    cpu.install(|| {
        out.par_chunks_exact_mut(bytes).with_min_len(8).zip(tokens).for_each(|(out, &token)| {
            out.copy_from_slice(&packed[token as usize * bytes..][..bytes]);
        });
    });
}

/// Received rows, read in place.
#[derive(Debug, Clone, Copy)]
pub(super) struct Received<'a> {
    row: TokenRow,
    tokens: usize,
    bytes: &'a [u8],
}

impl<'a> Received<'a> {
    /// `bytes [tokens, row bytes]`, which start on 16 bytes.
    pub(super) fn new(row: TokenRow, bytes: &'a [u8]) -> Self {
        Self { row, tokens: bytes.len() / row.bytes(), bytes }
    }

    /// One part of every row.
    fn part<T: bytemuck::Pod>(&self, part: std::ops::Range<usize>) -> Result<MatrixRef<'a, T>> {
        let columns = part.len() / size_of::<T>();
        if self.tokens == 0 || columns == 0 {
            return MatrixRef::with_strides(&[], self.tokens, columns, 0, 1);
        }
        // Rows are multiples of 16 bytes, and parts start on 4: what is behind a start is whole elements.
        let values: &[T] = bytemuck::cast_slice(&self.bytes[part.start..]);
        MatrixRef::with_strides(values, self.tokens, columns, self.row.bytes() / size_of::<T>(), 1)
    }

    /// The tokens.
    pub(super) fn rows(&self) -> Result<TokenRows<'a>> {
        Ok(match self.row.activation_format() {
            ActivationFormat::Bf16 => TokenRows::Bf16(self.part(self.row.values())?),
            ActivationFormat::E4m3 => {
                TokenRows::E4m3 { rows: self.part(self.row.values())?, scales: self.part(self.row.scales())? }
            }
        })
    }

    /// `[tokens, topk]`: the number of each slot's copy.
    pub(super) fn copies(&self) -> Result<MatrixRef<'a, i32>> {
        self.part(self.row.copies())
    }

    /// `[tokens, topk]`: the router's weights, where they travel.
    pub(super) fn weights(&self) -> Result<Option<MatrixRef<'a, f32>>> {
        let part = self.row.weights();
        if part.is_empty() { Ok(None) } else { self.part(part).map(Some) }
    }
}
