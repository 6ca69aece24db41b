//! Rows in their places, as calls of the grouped GEMM and of the experts alone bring them.

use crate::array::{Array, Element};
use crate::error::{Actual, Wrong, size};
use crate::limits;
use expertile::gemm::WEIGHT_BLOCK;
use expertile::{ActivationFormat, MatrixRef};
use pyo3::prelude::*;

/// Rows in their places, and what says whose they are.
pub(crate) struct Rows<'py> {
    pub(crate) rows: Array<'py>,
    /// Of e4m3 rows.
    pub(crate) scale: Option<Array<'py>>,
    pub(crate) list: List<'py>,
    pub(crate) m_sum: usize,
}

/// Which rows are whose.
pub(crate) enum List<'py> {
    Psum { ends: Array<'py>, alignment: usize },
    MIndices(Array<'py>),
}

impl<'py> Rows<'py> {
    /// Rows of `k` values for so many experts, of shapes and types that go together.
    pub(crate) fn new(
        rows: &Bound<'py, PyAny>,
        scale: Option<&Bound<'py, PyAny>>,
        (psum, m_indices): (Option<&Bound<'py, PyAny>>, Option<&Bound<'py, PyAny>>),
        alignment: &Bound<'py, PyAny>,
        (experts, k): (usize, usize),
    ) -> PyResult<Self> {
        let (rows, scale) = (Array::new("rows", rows)?, Array::optional("scale", scale)?);
        let (m_sum, _) = rows.matrix_shape("[M_sum, K]")?;
        rows.require_shape(&[m_sum, k])?;
        match (rows_format(&rows)?, &scale) {
            (ActivationFormat::Bf16, None) => {}
            (ActivationFormat::E4m3, Some(scale)) => {
                scale.require_dtype::<f32>()?;
                scale.require_shape(&[m_sum, k.div_ceil(WEIGHT_BLOCK)])?;
            }
            (ActivationFormat::Bf16, Some(scale)) => {
                return Err(Wrong::new("scale", "is given", scale.object(), "none for bfloat16 rows").value());
            }
            (ActivationFormat::E4m3, None) => {
                return Err(Wrong::new("scale", "is None", Actual::Nothing, "scales for float8_e4m3fn rows").value());
            }
        }
        let list = match (Array::optional("psum", psum)?, Array::optional("m_indices", m_indices)?) {
            (Some(ends), None) => {
                ends.require_dtype::<i32>()?;
                ends.require_shape(&[experts])?;
                List::Psum { ends, alignment: size("alignment", alignment)? }
            }
            (None, Some(experts)) => {
                experts.require_dtype::<i32>()?;
                experts.require_shape(&[m_sum])?;
                List::MIndices(experts)
            }
            (None, None) => {
                return Err(Wrong::new("psum", "is None", Actual::Nothing, "one of psum and m_indices").value());
            }
            (Some(ends), Some(_)) => {
                let expected = "none of the two beside the other";
                return Err(Wrong::new("psum", "is given beside m_indices", ends.object(), expected).value());
            }
        };
        Ok(Self { rows, scale, list, m_sum })
    }

    /// Fails unless the last segment is padded as the others are.
    pub(crate) fn require_whole_segments(&self) -> PyResult<()> {
        match self.list {
            List::Psum { alignment, .. } if !self.m_sum.is_multiple_of(alignment.max(1)) => {
                Err(Wrong::number("m_sum", self.m_sum, format!("a multiple of the alignment {alignment}")).value())
            }
            _ => Ok(()),
        }
    }

    pub(crate) fn list(&self) -> &Array<'py> {
        match &self.list {
            List::Psum { ends, .. } => ends,
            List::MIndices(experts) => experts,
        }
    }

    pub(crate) fn arrays(&self) -> [Option<&Array<'py>>; 3] {
        [Some(&self.rows), self.scale.as_ref(), Some(self.list())]
    }
}

/// What rows are made of.
pub(crate) fn rows_format(array: &Array<'_>) -> PyResult<ActivationFormat> {
    match array.element() {
        Element::Bf16 => Ok(ActivationFormat::Bf16),
        Element::E4m3 => Ok(ActivationFormat::E4m3),
        _ => Err(array.dtype_error("bfloat16 or float8_e4m3fn")),
    }
}

/// Fails unless results may be written there: bfloat16 `[M_sum, N]`, contiguous.
pub(crate) fn require_out(out: &Array<'_>, m_sum: usize, n: usize) -> PyResult<()> {
    out.require_shape(&[m_sum, n])?;
    if out.element() != Element::Bf16 {
        return Err(out.dtype_error("bfloat16"));
    }
    out.require_contiguous()
}

/// A copy of scales of any strides, row by row.
pub(crate) fn row_major(scale: &Array<'_>) -> PyResult<Vec<f32>> {
    let scales: MatrixRef<'_, f32> = scale.matrix()?;
    let mut copy = limits::vec("scale", scales.rows() * scales.cols())?;
    copy.extend((0..scales.rows()).flat_map(|row| (0..scales.cols()).map(move |col| scales.get(row, col))));
    Ok(copy)
}
