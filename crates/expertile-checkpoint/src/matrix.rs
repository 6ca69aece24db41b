//! A weight matrix as a view of a tensor in a mapped file.

use crate::error::{Error, Result};
use crate::quantization::Scheme;
use crate::tensors::Tensor;
use expertile::gemm::WEIGHT_BLOCK;
use expertile::int4::{self, Int4Scales};
use expertile::quantize::ue8m0_value;
use expertile::{E4m3, MatrixRef, WeightFormat, WeightsBuilder, mxfp4};
use half::{bf16, f16};
use safetensors::Dtype;
use std::borrow::Cow;

/// A weight matrix `[rows, cols]` (outputs, inputs), possibly a strided view of a fused or transposed tensor.
#[derive(Debug)]
pub struct WeightMatrix<'a> {
    rows: usize,
    cols: usize,
    /// Position of the first element, and of its neighbours, in `values`.
    start: usize,
    row_stride: usize,
    col_stride: usize,
    values: Values<'a>,
    /// Of e4m3 values.
    scales: Option<WeightScales>,
}

#[derive(Debug, Clone)]
enum Values<'a> {
    Bf16(Cow<'a, [bf16]>),
    F16(Cow<'a, [f16]>),
    F32(Cow<'a, [f32]>),
    E4m3(&'a [E4m3]),
    Mxfp4 { blocks: MatrixRef<'a, u8>, scales: MatrixRef<'a, u8> },
    Int4 { blocks: MatrixRef<'a, u8>, scales: HalfScales<'a> },
}

/// Scales of int4 weights `[rows, cols / 32]`, row by row.
#[derive(Debug, Clone)]
pub(crate) enum HalfScales<'a> {
    Bf16(Cow<'a, [bf16]>),
    F16(Cow<'a, [f16]>),
}

impl HalfScales<'_> {
    fn view(&self, rows: usize) -> expertile::Result<Int4Scales<'_>> {
        Ok(match self {
            Self::Bf16(scales) => Int4Scales::Bf16(MatrixRef::new(scales, rows, scales.len() / rows)?),
            Self::F16(scales) => Int4Scales::F16(MatrixRef::new(scales, rows, scales.len() / rows)?),
        })
    }

    fn get(&self, at: usize) -> f64 {
        match self {
            Self::Bf16(scales) => scales[at].to_f64(),
            Self::F16(scales) => scales[at].to_f64(),
        }
    }
}

/// The scales of e4m3 weights; a weight is `value * scale`.
#[derive(Debug, Clone, PartialEq)]
pub enum WeightScales {
    /// `[ceil(rows / 128), ceil(cols / 128)]`, one per block of 128 x 128.
    Block(Vec<f32>),
    /// `[rows]`, one per row.
    Row(Vec<f32>),
}

/// The rows of a matrix in the type that the checkpoint holds.
#[derive(Debug, Clone, Copy)]
pub enum WeightRows<'m> {
    /// bf16.
    Bf16(MatrixRef<'m, bf16>),
    /// f16.
    F16(MatrixRef<'m, f16>),
    /// f32.
    F32(MatrixRef<'m, f32>),
    /// e4m3 with scales.
    E4m3 {
        /// The values.
        values: MatrixRef<'m, E4m3>,
        /// Their scales.
        scales: &'m WeightScales,
    },
    /// MXFP4.
    Mxfp4 {
        /// `[rows, cols / 2]`: two values to a byte.
        blocks: MatrixRef<'m, u8>,
        /// `[rows, cols / 32]`.
        scales: MatrixRef<'m, u8>,
    },
    /// int4.
    Int4 {
        /// `[rows, cols / 2]`: two values to a byte.
        blocks: MatrixRef<'m, u8>,
        /// `[rows, cols / 32]`.
        scales: Int4Scales<'m>,
    },
}

impl WeightRows<'_> {
    /// Adds them to a backend's weights, as rows from `first_row` on of an expert. f16 and f32 are rounded to bf16.
    ///
    /// # Errors
    /// As the builder's.
    pub fn add_to<W: WeightsBuilder>(self, builder: &mut W, expert: usize, first_row: usize) -> expertile::Result<()> {
        match self {
            Self::Bf16(rows) => builder.add_bf16_rows(expert, first_row, rows),
            Self::F16(rows) => builder.add_bf16_rows(expert, first_row, rows),
            Self::F32(rows) => builder.add_bf16_rows(expert, first_row, rows),
            Self::E4m3 { values, scales: WeightScales::Block(scales) } => {
                let [rows, cols] = [values.rows(), values.cols()].map(|extent| extent.div_ceil(WEIGHT_BLOCK));
                builder.add_e4m3_rows(expert, first_row, values, MatrixRef::new(scales, rows, cols)?)
            }
            Self::E4m3 { values, scales: WeightScales::Row(scales) } => {
                builder.add_e4m3_channel_rows(expert, first_row, values, scales)
            }
            Self::Mxfp4 { blocks, scales } => builder.add_mxfp4_rows(expert, first_row, blocks, scales),
            Self::Int4 { blocks, scales } => builder.add_int4_rows(expert, first_row, blocks, scales),
        }
    }
}

/// Where a matrix lies in a tensor of one or several experts.
#[derive(Debug, Clone, Copy)]
pub(crate) struct View {
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    /// Of the tensor's elements, those that this expert has.
    pub(crate) first: usize,
    pub(crate) len: usize,
    /// Position of element [0, 0] among these.
    pub(crate) start: usize,
    pub(crate) row_stride: usize,
    pub(crate) col_stride: usize,
}

impl View {
    /// All of a tensor `[rows, cols]`.
    pub(crate) fn whole(rows: usize, cols: usize) -> Self {
        Self { rows, cols, first: 0, len: rows * cols, start: 0, row_stride: cols, col_stride: 1 }
    }
}

/// The type that weights of this dtype are packed as.
pub(crate) fn weight_format(dtype: Dtype) -> Option<WeightFormat> {
    match dtype {
        Dtype::BF16 | Dtype::F16 | Dtype::F32 => Some(WeightFormat::Bf16),
        Dtype::F8_E4M3 => Some(WeightFormat::E4m3),
        _ => None,
    }
}

/// The dtypes of weights, for messages.
pub(crate) const WEIGHT_DTYPES: &str = "BF16, F16, F32 or F8_E4M3";

impl<'a> WeightMatrix<'a> {
    /// The view of a tensor whose shape was checked; `scales` for e4m3.
    pub(crate) fn new(tensor: &Tensor<'a>, view: View, scales: Option<WeightScales>) -> Result<Self> {
        let View { rows, cols, first, len, start, row_stride, col_stride } = view;
        let size = tensor.dtype.bitsize() / 8;
        let bytes = &tensor.bytes[first * size..][..len * size];
        let values = match tensor.dtype {
            Dtype::BF16 => Values::Bf16(tensor.values(bytes, bf16::from_le_bytes)?),
            Dtype::F16 => Values::F16(tensor.values(bytes, f16::from_le_bytes)?),
            Dtype::F32 => Values::F32(tensor.values(bytes, f32::from_le_bytes)?),
            Dtype::F8_E4M3 => Values::E4m3(bytemuck::cast_slice(bytes)),
            _ => return Err(tensor.wrong_dtype(WEIGHT_DTYPES)),
        };
        Ok(Self { rows, cols, start, row_stride, col_stride, values, scales })
    }

    /// MXFP4: `blocks [rows, cols / 2]` with `scales [rows, cols / 32]`.
    pub(crate) fn mxfp4(blocks: MatrixRef<'a, u8>, scales: MatrixRef<'a, u8>) -> Self {
        let (rows, cols) = (blocks.rows(), 2 * blocks.cols());
        let values = Values::Mxfp4 { blocks, scales };
        Self { rows, cols, start: 0, row_stride: 0, col_stride: 0, values, scales: None }
    }

    /// int4: `blocks [rows, cols / 2]` with `scales [rows, cols / 32]`.
    pub(crate) fn int4(blocks: MatrixRef<'a, u8>, scales: HalfScales<'a>) -> Self {
        let (rows, cols) = (blocks.rows(), 2 * blocks.cols());
        let values = Values::Int4 { blocks, scales };
        Self { rows, cols, start: 0, row_stride: 0, col_stride: 0, values, scales: None }
    }

    /// Rows: outputs.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns: inputs.
    #[must_use]
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// What the matrix is packed as: e4m3, MXFP4, int4, or bf16 for bf16, f16 and f32 (rounded to nearest even).
    #[must_use]
    pub fn format(&self) -> WeightFormat {
        match self.values {
            Values::Bf16(_) | Values::F16(_) | Values::F32(_) => WeightFormat::Bf16,
            Values::E4m3(_) => WeightFormat::E4m3,
            Values::Mxfp4 { .. } => WeightFormat::Mxfp4,
            Values::Int4 { .. } => WeightFormat::Int4,
        }
    }

    /// Whether packing rounds the values: f16 and f32 become bf16.
    #[must_use]
    pub fn is_rounded(&self) -> bool {
        matches!(self.values, Values::F16(_) | Values::F32(_))
    }

    /// The type that the checkpoint holds, as safetensors names it, or MXFP4 or INT4.
    #[must_use]
    pub fn dtype(&self) -> &'static str {
        match self.values {
            Values::Bf16(_) => "BF16",
            Values::F16(_) => "F16",
            Values::F32(_) => "F32",
            Values::E4m3(_) => "F8_E4M3",
            Values::Mxfp4 { .. } => "MXFP4",
            Values::Int4 { .. } => "INT4",
        }
    }

    /// The rows, in place.
    ///
    /// # Errors
    /// None for a matrix that this crate made: its strides were checked against the tensor.
    pub fn view(&self) -> expertile::Result<WeightRows<'_>> {
        Ok(match (&self.values, &self.scales) {
            (Values::Bf16(values), _) => WeightRows::Bf16(self.strided(values)?),
            (Values::F16(values), _) => WeightRows::F16(self.strided(values)?),
            (Values::F32(values), _) => WeightRows::F32(self.strided(values)?),
            (Values::E4m3(values), Some(scales)) => WeightRows::E4m3 { values: self.strided(values)?, scales },
            (&Values::Mxfp4 { blocks, scales }, _) => WeightRows::Mxfp4 { blocks, scales },
            (Values::Int4 { blocks, scales }, _) => {
                WeightRows::Int4 { blocks: *blocks, scales: scales.view(self.rows)? }
            }
            (Values::E4m3(_), None) => unreachable!("e4m3 matrices are made with scales"),
        })
    }

    fn strided<'m, T: Copy>(&self, values: &'m [T]) -> expertile::Result<MatrixRef<'m, T>> {
        let values = values.get(self.start..).unwrap_or_default();
        MatrixRef::with_strides(values, self.rows, self.cols, self.row_stride, self.col_stride)
    }

    fn blocks(&self) -> [usize; 2] {
        [self.rows, self.cols].map(|extent| extent.div_ceil(WEIGHT_BLOCK))
    }

    /// Writes row `row` as f64, scales applied; panics outside the matrix or if `out` is not one row long.
    pub fn write_row(&self, row: usize, out: &mut [f64]) {
        assert_eq!(out.len(), self.cols, "a row has {} values", self.cols);
        assert!(row < self.rows, "row {row} of {}", self.rows);
        let at = |col: usize| self.start + row * self.row_stride + col * self.col_stride;
        let blocks = self.blocks()[1];
        for (col, out) in out.iter_mut().enumerate() {
            *out = match &self.values {
                Values::Bf16(values) => values[at(col)].to_f64(),
                Values::F16(values) => values[at(col)].to_f64(),
                Values::F32(values) => f64::from(values[at(col)]),
                Values::Mxfp4 { blocks, scales } => {
                    let nibble = blocks.get(row, col / 2) >> (col % 2 * 4) & 15;
                    let scale = ue8m0_value(scales.get(row, col / mxfp4::GROUP));
                    f64::from(mxfp4::E2M1_VALUES[usize::from(nibble)]) * f64::from(scale)
                }
                Values::Int4 { blocks, scales } => {
                    let nibble = blocks.get(row, col / 2) >> (col % 2 * 4) & 15;
                    let scale = scales.get(row * (self.cols / int4::GROUP) + col / int4::GROUP);
                    f64::from(int4::VALUES[usize::from(nibble)]) * scale
                }
                Values::E4m3(values) => {
                    let scale = match &self.scales {
                        Some(WeightScales::Block(scales)) => scales[row / WEIGHT_BLOCK * blocks + col / WEIGHT_BLOCK],
                        Some(WeightScales::Row(scales)) => scales[row],
                        None => unreachable!("e4m3 matrices are made with scales"),
                    };
                    f64::from(values[at(col)].to_f32()) * f64::from(scale)
                }
            };
        }
    }

    /// The values as bf16, row by row, rounded to nearest even; for matrices that are packed as bf16.
    #[must_use]
    pub fn to_bf16(&self) -> Vec<bf16> {
        let mut row = vec![0.0; self.cols];
        let mut values = Vec::with_capacity(self.rows * self.cols);
        for index in 0..self.rows {
            self.write_row(index, &mut row);
            // f32 holds every bf16, f16 and f32 value exactly.
            values.extend(row.iter().map(|&value| bf16::from_f32(value as f32)));
        }
        values
    }
}

/// The scales of a whole matrix `[rows, cols]` out of their tensor.
pub(crate) fn matrix_scales(tensor: &Tensor<'_>, scheme: Scheme, rows: usize, cols: usize) -> Result<WeightScales> {
    let blocks = [rows, cols].map(|extent| extent.div_ceil(WEIGHT_BLOCK));
    match scheme {
        Scheme::Block => {
            tensor.require_shape(&blocks)?;
            Ok(WeightScales::Block(tensor.to_f32()?))
        }
        Scheme::TensorOrRow => match tensor.shape {
            [] | [1] if rows > 1 || tensor.shape.is_empty() => {
                let scale = tensor.to_f32()?[0];
                Ok(WeightScales::Block(vec![scale; blocks[0] * blocks[1]]))
            }
            [count] | [count, 1] if *count == rows => Ok(WeightScales::Row(tensor.to_f32()?)),
            shape => {
                let expected = format!("[], [1], [{rows}] or [{rows}, 1]");
                Err(Error::shape(tensor.file, &tensor.name, shape, expected))
            }
        },
    }
}
