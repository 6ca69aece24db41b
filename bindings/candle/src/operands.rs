//! A call's tensors as the library takes them: types by their names, extents checked, strides kept.

use crate::error::{refused, require_shape};
use candle_core::{DType, Error, Layout, Result};
use expertile::{Dtype, Float, LayerConfig, LayerShape, MatrixRef};

/// A type of a [`LayerConfig`] as candle calls it.
pub(crate) fn dtype(dtype: Dtype) -> Result<DType> {
    match dtype {
        Dtype::Bf16 => Ok(DType::BF16),
        Dtype::F16 => Ok(DType::F16),
        Dtype::F32 => Ok(DType::F32),
        Dtype::I32 => Ok(DType::I32),
        Dtype::I64 => Ok(DType::I64),
        other => Err(refused("dtype", format_args!("is {other}"), "a type of hidden states or ids")),
    }
}

/// `M`, of layouts that fit each other and the layer.
pub(crate) fn tokens(
    shape: &LayerShape,
    config: &LayerConfig,
    hidden_states: &Layout,
    topk_ids: &Layout,
    topk_weights: &Layout,
) -> Result<usize> {
    let Some(&tokens) = hidden_states.dims().first() else {
        return Err(refused("hidden_states", "is a scalar", format_args!("[M, {}]", shape.hidden())));
    };
    require_shape("hidden_states", hidden_states, &[tokens, shape.hidden()])?;
    require_shape("topk_ids", topk_ids, &[tokens, config.topk])?;
    require_shape("topk_weights", topk_weights, &[tokens, config.topk])?;
    Ok(tokens)
}

/// A view of two dimensions, its offset and strides kept.
pub(crate) fn matrix<'a, T: Copy>(data: &'a [T], layout: &Layout) -> Result<MatrixRef<'a, T>> {
    let (&[rows, cols], &[row_stride, col_stride]) = (layout.dims(), layout.stride()) else {
        return Err(refused("tensor", format_args!("is {:?}", layout.dims()), "a matrix"));
    };
    // A tensor without elements may start past the end.
    let data = data.get(layout.start_offset()..).unwrap_or_default();
    MatrixRef::with_strides(data, rows, cols, row_stride, col_stride).map_err(Error::wrap)
}

/// Fails for a value that bf16 does not hold: weights are never rounded unasked.
pub(crate) fn require_bf16_values<T: Float>(argument: &str, rows: &MatrixRef<'_, T>) -> Result<()> {
    for row in 0..rows.rows() {
        for col in 0..rows.cols() {
            let value = Float::to_f32(rows.get(row, col));
            let nearest = half::bf16::from_f32(value).to_f32();
            if nearest != value && !value.is_nan() {
                let (place, expected) = (format!("{argument}[.., {row}, {col}]"), "a value that bf16 holds");
                let expected = format_args!("{expected} (to_dtype(DType::BF16) rounds it)");
                return Err(refused(&place, format_args!("is {value}"), expected));
            }
        }
    }
    Ok(())
}
