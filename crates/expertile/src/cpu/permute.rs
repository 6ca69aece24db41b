//! Rows to their place: read once, quantized or converted once if asked, written once per live slot.
//!
//! Work is spread over tokens. The rows a token is written to are its own (`inv_perm` never names a row twice), so
//! threads need no lock; tokens without a live slot are not read.

use super::Cpu;
use super::arch::{Isa, multiversion, stream};
use super::disjoint::Disjoint;
use super::quantize::{ScaleSink, quantize_row};
use super::rows::{each_token, gather, gather_space, live};
use crate::dtype::{E4m3, Float, RowElement};
use crate::error::{Error, Result, checked_mul, require_len};
use crate::layout::{Layout, Padding};
use crate::matrix::MatrixRef;
use crate::quantize::{ScaleFormat, ScaleLayout, ScalesMut};
use rayon::prelude::*;

/// Scales of rows that come in already quantized, one per group: `[M, H / group]`.
#[derive(Debug, Clone, Copy)]
pub enum RowScales<'a> {
    /// f32, for the f32 layouts.
    F32(MatrixRef<'a, f32>),
    /// UE8M0 exponent bytes, for the packed layout.
    Ue8m0(MatrixRef<'a, u8>),
}

/// Copies rows without looking at them: `x [M, H]` to `out [M_sum, H]`, any element of 1, 2 or 4 bytes.
///
/// # Errors
/// [`Error::Shape`] unless `x` has `M` rows, [`Error::BufferTooSmall`] for a short `out`, [`Error::Overflow`].
pub fn permute_rows<T: RowElement>(
    cpu: &Cpu,
    x: MatrixRef<'_, T>,
    layout: &Layout<'_>,
    padding: Padding,
    out: &mut [T],
) -> Result<()> {
    let out = rows_out("out", x, layout, out)?;
    let target = Target::new(cpu, out, x.cols());
    each_token(
        cpu,
        layout,
        x.cols(),
        || gather_space(x),
        |space, token, rows| target.write(rows, gather(x, token, space)),
    );
    zero_padding(cpu, layout, padding, x.cols(), out);
    Ok(())
}

/// Copies rows of numbers, converted to `O` (and first multiplied by `weights [M, 1]`, rounded to `T`, if given).
///
/// # Errors
/// As [`permute_rows`]; [`Error::Value`] for weights with `topk != 1`, [`Error::Shape`] if they are not `[M, 1]`.
pub fn permute_convert<T: Float, O: Float>(
    cpu: &Cpu,
    x: MatrixRef<'_, T>,
    weights: Option<MatrixRef<'_, f32>>,
    layout: &Layout<'_>,
    padding: Padding,
    out: &mut [O],
) -> Result<()> {
    check_weights(weights, layout)?;
    let out = rows_out("out", x, layout, out)?;
    let target = Target::new(cpu, out, x.cols());
    each_token(
        cpu,
        layout,
        x.cols(),
        || (gather_space(x), vec![O::zeroed(); x.cols()]),
        |(space, converted), token, rows| {
            let row = gather(x, token, space);
            match weights {
                Some(weights) => {
                    let weight = weights.get(token, 0);
                    for (to, from) in converted.iter_mut().zip(row) {
                        *to = O::from_f32(T::from_f32(weight * from.to_f32()).to_f32());
                    }
                }
                None => convert_row(cpu.isa(), row, converted),
            }
            target.write(rows, converted);
        },
    );
    zero_padding(cpu, layout, padding, x.cols(), out);
    Ok(())
}

multiversion! {
    /// Every value of `from`, rounded to nearest.
    pub(super) fn convert_row<T: Float, O: Float>(isa: Isa, from: &[T], to: &mut [O]) {
        for (to, from) in to.iter_mut().zip(from) {
            *to = O::from_f32(from.to_f32());
        }
    }
}

/// Quantizes rows while it permutes them: `x [M, H]` to `out [M_sum, H]` e4m3 and its scales. `weights [M, 1]`, if
/// given, multiply the input first (rounded to `T`): `apply_router_weight_on_input`.
///
/// # Errors
/// [`Error::Shape`] unless `x` has `M` rows (and `weights` is `[M, 1]`), [`Error::Value`] unless the groups fit `H`
/// (and `topk` is 1 if there are weights), [`Error::Dtype`] if `scales` is not of the format's word type,
/// [`Error::BufferTooSmall`], [`Error::Overflow`].
pub fn quantize_permute<T: Float>(
    cpu: &Cpu,
    x: MatrixRef<'_, T>,
    weights: Option<MatrixRef<'_, f32>>,
    layout: &Layout<'_>,
    padding: Padding,
    out: &mut [E4m3],
    scales: ScalesMut<'_>,
) -> Result<()> {
    let (hidden, format) = (x.cols(), scales.format());
    let groups = format.groups(hidden)?;
    check_weights(weights, layout)?;
    scales.check("scales", layout.m_sum(), hidden)?;
    let out = rows_out("out", x, layout, out)?;
    let sink = ScaleSink::new(layout, groups, scales);
    let target = Target::new(cpu, out, hidden);
    each_token(
        cpu,
        layout,
        hidden,
        || (vec![T::zeroed(); hidden], vec![E4m3(0); hidden], vec![0.0; groups]),
        |(space, bytes, scales), token, rows| {
            let row = match weights {
                Some(weights) => weighted(x, token, weights.get(token, 0), space),
                None => gather(x, token, space),
            };
            quantize_row(cpu.isa(), row, format.group().size(), format.rounding(), bytes, scales);
            target.write(rows, bytes);
            write_scales(&sink, rows, scales);
        },
    );
    zero_padding(cpu, layout, padding, hidden, out);
    Ok(())
}

/// Moves rows that are already e4m3, with their scales (the reference's `ep_scatter`).
///
/// f32 scales go to either f32 layout as they are; UE8M0 bytes go to the packed layout.
///
/// # Errors
/// As [`quantize_permute`]; [`Error::Dtype`] also if `x_scales` and the format disagree.
pub fn permute_quantized(
    cpu: &Cpu,
    x: MatrixRef<'_, E4m3>,
    x_scales: RowScales<'_>,
    layout: &Layout<'_>,
    padding: Padding,
    out: &mut [E4m3],
    scales: ScalesMut<'_>,
) -> Result<()> {
    let (hidden, format) = (x.cols(), scales.format());
    let groups = format.groups(hidden)?;
    check_row_scales(x_scales, format, layout.tokens(), groups)?;
    scales.check("scales", layout.m_sum(), hidden)?;
    let out = rows_out("out", x, layout, out)?;
    let sink = ScaleSink::new(layout, groups, scales);
    let target = Target::new(cpu, out, hidden);
    each_token(
        cpu,
        layout,
        hidden,
        || (gather_space(x), vec![0.0; groups]),
        |(space, scales), token, rows| {
            target.write(rows, gather(x, token, space));
            for (group, scale) in scales.iter_mut().enumerate() {
                *scale = match x_scales {
                    RowScales::F32(values) => values.get(token, group),
                    RowScales::Ue8m0(bytes) => ue8m0_for_packing(bytes.get(token, group)),
                };
            }
            write_scales(&sink, rows, scales);
        },
    );
    zero_padding(cpu, layout, padding, hidden, out);
    Ok(())
}

/// A value whose exponent field is `byte`, so that packing gives the byte back: 0 and 255 included.
fn ue8m0_for_packing(byte: u8) -> f32 {
    f32::from_bits(u32::from(byte) << 23)
}

fn check_row_scales(x_scales: RowScales<'_>, format: ScaleFormat, tokens: usize, groups: usize) -> Result<()> {
    use crate::dtype::Dtype;
    let packed = format.layout() == ScaleLayout::PackedUe8m0;
    match x_scales {
        RowScales::F32(_) if packed => {
            Err(Error::Dtype { argument: "x_scales", actual: Dtype::F32, expected: "u8 for packed UE8M0 scales" })
        }
        RowScales::Ue8m0(_) if !packed => Err(Error::Dtype {
            argument: "x_scales",
            actual: Dtype::U8,
            expected: "f32 for row-major and MN-major scales",
        }),
        RowScales::F32(scales) => scales.require_shape("x_scales", tokens, groups),
        RowScales::Ue8m0(scales) => scales.require_shape("x_scales", tokens, groups),
    }
}

fn check_weights(weights: Option<MatrixRef<'_, f32>>, layout: &Layout<'_>) -> Result<()> {
    let Some(weights) = weights else { return Ok(()) };
    if layout.topk() != 1 {
        return Err(Error::value("topk", layout.topk(), "1, where router weights multiply the input"));
    }
    weights.require_shape("topk_weights", layout.tokens(), 1)
}

/// The part of `out` that is `[M_sum, H]`, once `x` is known to fit the layout.
fn rows_out<'o, T: Copy, O>(
    argument: &'static str,
    x: MatrixRef<'_, T>,
    layout: &Layout<'_>,
    out: &'o mut [O],
) -> Result<&'o mut [O]> {
    x.require_shape("x", layout.tokens(), x.cols())?;
    if x.cols() == 0 {
        return Err(Error::value("hidden", 0, "at least 1"));
    }
    let needed = checked_mul("M_sum * H", layout.m_sum(), x.cols())?;
    require_len(argument, out.len(), needed)?;
    Ok(&mut out[..needed])
}

/// The permuted rows while several threads write them.
struct Target<'a, O> {
    isa: Isa,
    rows: Disjoint<'a, O>,
    cols: usize,
    streamed: bool,
}

impl<'a, O: RowElement> Target<'a, O> {
    fn new(cpu: &Cpu, out: &'a mut [O], cols: usize) -> Self {
        let streamed = size_of_val(out) >= stream::STREAM_BYTES;
        Self { isa: cpu.isa(), rows: Disjoint::new(out), cols, streamed }
    }

    /// Writes `values` to every live row of a token.
    #[allow(unsafe_code)]
    fn write(&self, rows: &[i32], values: &[O]) {
        for row in live(rows) {
            // SAFETY: `inv_perm` names a row at most once, and its slots are handed to one task each.
            let target = unsafe { self.rows.part(row * self.cols, self.cols) };
            if self.streamed {
                stream::copy(self.isa, bytemuck::must_cast_slice_mut(target), bytemuck::must_cast_slice(values));
            } else {
                target.copy_from_slice(values);
            }
        }
    }
}

#[allow(unsafe_code)]
fn write_scales(sink: &ScaleSink<'_>, rows: &[i32], scales: &[f32]) {
    for row in live(rows) {
        // SAFETY: as in `Target::write`: the row is this token's alone.
        unsafe { sink.write_row(row, scales) };
    }
}

/// A row times its router weight, rounded to the row's own type.
pub(super) fn weighted<'s, T: Float>(x: MatrixRef<'_, T>, token: usize, weight: f32, space: &'s mut [T]) -> &'s [T] {
    for (col, value) in space.iter_mut().enumerate() {
        *value = T::from_f32(weight * x.get(token, col).to_f32());
    }
    space
}

fn zero_padding<O: RowElement>(cpu: &Cpu, layout: &Layout<'_>, padding: Padding, cols: usize, out: &mut [O]) {
    const ROWS_PER_TASK: usize = 64;
    if padding == Padding::Untouched || out.is_empty() {
        return;
    }
    cpu.install(|| {
        out.par_chunks_mut(ROWS_PER_TASK * cols).zip(layout.m_indices().par_chunks(ROWS_PER_TASK)).for_each(
            |(rows, experts)| {
                for (row, &expert) in rows.chunks_exact_mut(cols).zip(experts) {
                    if expert < 0 {
                        row.fill(O::zeroed());
                    }
                }
            },
        );
    });
}
