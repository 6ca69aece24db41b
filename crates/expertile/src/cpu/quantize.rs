//! Quantizing a row, and putting its scales where their format wants them.

use super::Cpu;
use super::arch::multiversion;
use super::disjoint::Disjoint;
use super::rows::{gather, gather_space};
use crate::dtype::{E4m3, Float, e4m3_byte};
use crate::error::{Result, checked_mul, require_len};
use crate::layout::Layout;
use crate::matrix::MatrixRef;
use crate::quantize::{ScaleFormat, ScaleLayout, ScaleRounding, ScalesMut, Words, scale_of, ue8m0_byte};
use rayon::prelude::*;

multiversion! {
    /// Quantizes `row` group by group: `bytes [H]` and `scales [ceil(H / group)]`, both of the right length.
    pub(crate) fn quantize_row<T: Float>(
        isa: Isa,
        row: &[T],
        group: usize,
        rounding: ScaleRounding,
        bytes: &mut [E4m3],
        scales: &mut [f32],
    ) {
        for ((values, bytes), scale) in row.chunks(group).zip(bytes.chunks_mut(group)).zip(scales) {
            *scale = scale_of(amax(values), rounding);
            for (byte, &value) in bytes.iter_mut().zip(values) {
                byte.0 = e4m3_byte(value.to_f32() / *scale);
            }
        }
    }
}

/// The largest magnitude, NaN ignored. Magnitudes of floats compare as their bits do, and an integer maximum (unlike a
/// float one) may be taken in any order, which lets the compiler use vectors.
#[inline(always)]
fn amax<T: Float>(values: &[T]) -> f32 {
    let mut largest = 0u32;
    for value in values {
        let magnitude = value.to_f32().to_bits() & 0x7fff_ffff;
        largest = largest.max(if magnitude > 0x7f80_0000 { 0 } else { magnitude });
    }
    f32::from_bits(largest)
}

/// The scales of a permuted buffer while several threads write their rows' own.
#[derive(Clone, Copy)]
pub(crate) struct ScaleSink<'a> {
    format: ScaleFormat,
    m_sum: usize,
    groups: usize,
    words: Words<Disjoint<'a, f32>, Disjoint<'a, i32>>,
}

impl<'a> ScaleSink<'a> {
    /// Over scales that were checked for `[layout.m_sum(), groups]`; zeroes what no live row will write.
    pub(crate) fn new(layout: &Layout<'_>, groups: usize, scales: ScalesMut<'a>) -> Self {
        let (m_sum, format) = (layout.m_sum(), scales.format());
        let words = match scales.into_words() {
            Words::F32(words) => {
                zero_padding(format, layout, groups, words);
                Words::F32(Disjoint::new(words))
            }
            Words::Ue8m0(words) => {
                zero_padding(format, layout, groups, words);
                Words::Ue8m0(Disjoint::new(words))
            }
        };
        Self { format, m_sum, groups, words }
    }

    /// Writes the scales of one row.
    ///
    /// # Safety
    /// No other thread writes this row's scales at the same time.
    #[allow(unsafe_code)]
    pub(crate) unsafe fn write_row(&self, row: usize, scales: &[f32]) {
        let word = |group| self.format.word(row, group, self.m_sum, self.groups);
        match &self.words {
            Words::F32(words) if self.format.layout() == ScaleLayout::RowMajor => {
                // SAFETY: a row's words belong to that row alone, and the caller has the row to itself.
                let target = unsafe { words.part(word(0), self.groups) };
                target.copy_from_slice(scales);
            }
            Words::F32(words) => {
                for (group, &scale) in scales.iter().enumerate() {
                    // SAFETY: the word of (row, group) is no other row's, and the caller has the row to itself.
                    let target = unsafe { words.part(word(group), 1) };
                    target[0] = scale;
                }
            }
            Words::Ue8m0(words) => {
                for (index, four) in scales.chunks(4).enumerate() {
                    let mut packed = [0; 4];
                    for (byte, &scale) in packed.iter_mut().zip(four) {
                        *byte = ue8m0_byte(scale);
                    }
                    // SAFETY: as above; the four bytes of a word belong to one row.
                    let target = unsafe { words.part(word(4 * index), 1) };
                    target[0] = i32::from_le_bytes(packed);
                }
            }
        }
    }
}

/// Zeroes the words of padding rows, and those between `M_sum` and the stride of the MN-major layouts.
fn zero_padding<W: Copy + Default>(format: ScaleFormat, layout: &Layout<'_>, groups: usize, words: &mut [W]) {
    let m_sum = layout.m_sum();
    if m_sum == 0 {
        return;
    }
    let (columns, stride) = match format.layout() {
        ScaleLayout::RowMajor => {
            for rows in layout.padding() {
                words[rows.start * groups..rows.end * groups].fill(W::default());
            }
            return;
        }
        ScaleLayout::MnMajor => (groups, m_sum.next_multiple_of(4)),
        ScaleLayout::PackedUe8m0 => (groups.div_ceil(4), m_sum.next_multiple_of(4)),
    };
    for column in words.chunks_exact_mut(stride).take(columns) {
        for rows in layout.padding() {
            column[rows].fill(W::default());
        }
        column[m_sum..].fill(W::default());
    }
}

/// Quantizes rows that are already in the layout's order: live rows of `rows [M_sum, H]` to `out [M_sum, H]` and its
/// scales.
///
/// For dispatchers that deliver rows expanded and sorted ([`Layout::from_psum`]). Padding rows are neither read nor
/// written; their scales are zero.
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape) unless `rows` has `M_sum` rows, [`Error::Value`](crate::Error::Value) unless
/// the groups fit `H`, [`Error::Dtype`](crate::Error::Dtype) if `scales` is not of the format's word type,
/// [`Error::BufferTooSmall`](crate::Error::BufferTooSmall), [`Error::Overflow`](crate::Error::Overflow).
pub fn quantize_rows<T: Float>(
    cpu: &Cpu,
    rows: MatrixRef<'_, T>,
    layout: &Layout<'_>,
    out: &mut [E4m3],
    scales: ScalesMut<'_>,
) -> Result<()> {
    let (hidden, format) = (rows.cols(), scales.format());
    let groups = format.groups(hidden)?;
    rows.require_shape("rows", layout.m_sum(), hidden)?;
    scales.check("scales", layout.m_sum(), hidden)?;
    let needed = checked_mul("M_sum * H", layout.m_sum(), hidden)?;
    require_len("out", out.len(), needed)?;
    if needed == 0 {
        // Without rows nothing bounds their width, and even no row would have its space.
        return Ok(());
    }
    let sink = ScaleSink::new(layout, groups, scales);
    cpu.install(|| {
        out[..needed].par_chunks_exact_mut(hidden).zip(layout.m_indices()).enumerate().for_each_init(
            || (gather_space(rows), vec![0.0; groups]),
            |(space, scales), (row, (out, &expert))| {
                if expert >= 0 {
                    let values = gather(rows, row, space);
                    quantize_row(cpu.isa(), values, format.group().size(), format.rounding(), out, scales);
                    #[allow(unsafe_code)]
                    // SAFETY: each row is visited once.
                    unsafe {
                        sink.write_row(row, scales);
                    }
                }
            },
        );
    });
    Ok(())
}
