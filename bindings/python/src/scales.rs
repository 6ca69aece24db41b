//! Scales: their format by name, and arrays that have to fit it.

use crate::array::{Apart, Array, Element};
use crate::error::{exception, size};
use crate::tensor::{self, Form};
use expertile::quantize::ScaleMatrix;
use expertile::{Group, ScaleFormat, ScaleLayout, ScaleRounding, ScalesMut};
use pyo3::prelude::*;
use pyo3::types::PyDict;

/// Shape and strides of the matrix that an array of scales is read as.
pub(crate) type Shaped = ((usize, usize), (usize, usize));

/// The format of that name, group and rounding; by default a power of two only where the layout holds nothing else.
pub(crate) fn scale_format(
    layout: &str,
    group: &Bound<'_, PyAny>,
    power_of_two: Option<bool>,
) -> PyResult<ScaleFormat> {
    let group = Group::from_size(size("group", group)?).map_err(exception)?;
    let layout: ScaleLayout = layout.parse().map_err(exception)?;
    let power_of_two = power_of_two.unwrap_or(layout == ScaleLayout::PackedUe8m0);
    let rounding = if power_of_two { ScaleRounding::PowerOfTwo } else { ScaleRounding::Exact };
    ScaleFormat::new(group, layout, rounding).map_err(exception)
}

/// Fails unless a scale array is flat, or a matrix with the strides that its format asks for, and large enough. The
/// matrix of a flat one.
pub(crate) fn require_scales(
    scales: &Array<'_>,
    format: ScaleFormat,
    m_sum: usize,
    hidden: usize,
) -> PyResult<Option<Shaped>> {
    let element = word(format.layout());
    if scales.element() != element {
        let packed = element == Element::I32;
        return Err(scales.dtype_error(if packed { "int32 for packed UE8M0 scales" } else { "float32" }));
    }
    let matrix = format.matrix(m_sum, hidden).map_err(exception)?;
    let flat = scales.shape().len() == 1;
    if flat {
        scales.require_strides(&[1])?;
    } else {
        scales.require_shape(&[matrix.rows, matrix.columns])?;
        scales.require_strides(&[matrix.row_stride, matrix.column_stride])?;
    }
    scales.require_span(matrix.words().map_err(exception)?)?;
    Ok(flat.then(|| shaped(matrix)))
}

fn shaped(matrix: ScaleMatrix) -> Shaped {
    ((matrix.rows, matrix.columns), (matrix.row_stride, matrix.column_stride))
}

/// What the words of a layout are.
fn word(layout: ScaleLayout) -> Element {
    if layout == ScaleLayout::PackedUe8m0 { Element::I32 } else { Element::F32 }
}

/// A scale array that fits its format.
pub(crate) fn scale_memory<'a>(scales: &'a Array<'_>, format: ScaleFormat, apart: Apart) -> PyResult<ScalesMut<'a>> {
    match scales.element() {
        Element::I32 => Ok(ScalesMut::ue8m0(format, scales.memory_mut(apart)?)),
        _ => Ok(ScalesMut::f32(format, scales.memory_mut(apart)?)),
    }
}

/// Fails unless rows quantized by others have scales `[M, ceil(H / group)]` of the type that the format takes.
pub(crate) fn require_row_scales(x: &Array<'_>, x_scales: &Array<'_>, format: ScaleFormat) -> PyResult<()> {
    let (tokens, hidden) = x.matrix_shape("[M, H]")?;
    let (element, expected) = match format.layout() {
        ScaleLayout::PackedUe8m0 => (Element::U8, "uint8, for packed UE8M0"),
        _ => (Element::F32, "float32, or uint8 for packed UE8M0"),
    };
    if x_scales.element() != element {
        return Err(x_scales.dtype_error(expected));
    }
    x_scales.require_shape(&[tokens, format.groups(hidden).map_err(exception)?])
}

/// `scales`, or new ones on the device of `x`: the matrix of their layout, or flat where a matrix would not own all
/// words.
pub(crate) fn scales_out<'py>(
    py: Python<'py>,
    scales: Option<&Bound<'py, PyAny>>,
    x: &Array<'py>,
    format: ScaleFormat,
    m_sum: usize,
    hidden: usize,
) -> PyResult<Array<'py>> {
    tensor::given_or_made(py, "scales", scales, x.device(), || {
        let element = word(format.layout());
        let matrix = format.matrix(m_sum, hidden).map_err(exception)?;
        if owns_all_words(format.layout(), m_sum) {
            let (shape, strides) = shaped(matrix);
            return Ok(Form::matrix(element, shape, strides));
        }
        Ok(Form::list(element, matrix.words().map_err(exception)?))
    })
}

/// Whether a matrix of `m_sum` rows covers all words up to the last column's end: words between the last row and the
/// next column belong to nobody's element.
pub(crate) fn owns_all_words(layout: ScaleLayout, m_sum: usize) -> bool {
    layout.column_multiple().is_none_or(|multiple| m_sum.is_multiple_of(multiple))
}

/// Words, dtype, shape, strides, whether such an array has all the words.
type Facts = (usize, &'static str, (usize, usize), (usize, usize), bool);

/// 4-byte words that the scales of `[m_sum, hidden]` take, then dtype, shape and strides of the matrix that they are,
/// and whether an array of that shape and these strides has all of the words.
#[pyfunction]
pub(crate) fn scale_matrix(
    m_sum: &Bound<'_, PyAny>,
    hidden: &Bound<'_, PyAny>,
    scale_layout: &str,
    group: &Bound<'_, PyAny>,
) -> PyResult<Facts> {
    let format = scale_format(scale_layout, group, None)?;
    let m_sum = size("m_sum", m_sum)?;
    let matrix = format.matrix(m_sum, size("hidden", hidden)?).map_err(exception)?;
    let (shape, strides) = shaped(matrix);
    let dtype = word(format.layout()).name();
    Ok((matrix.words().map_err(exception)?, dtype, shape, strides, owns_all_words(format.layout(), m_sum)))
}

/// For code that computes with numbers that are not known yet: each layout's dtype, groups to a word, and what the
/// words from one column to the next are a multiple of, or None where rows stand together.
pub(crate) fn scale_layouts(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
    let layouts = PyDict::new(py);
    for layout in ScaleLayout::ALL {
        let facts = (word(layout).name(), layout.groups_per_word(), layout.column_multiple());
        layouts.set_item(layout.name(), facts)?;
    }
    Ok(layouts)
}
