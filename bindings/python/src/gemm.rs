//! The grouped GEMM alone: its operands, and the product on the CPU.

use crate::array::{Apart, Array, Element};
use crate::autograd::written;
use crate::error::{Actual, Wrong, exception, optional_size, size};
use crate::layer::{check_unpacked, pack, unpack};
use crate::limits;
use crate::pool::{cpu, work};
use expertile::cpu::{Activations, PackedWeights, grouped_gemm_of_segments, grouped_gemm_workspace_bytes};
use expertile::gemm::{WEIGHT_BLOCK, WeightFormat};
use expertile::{
    ActivationFormat, E4m3, GateUpOrder, Group, MatrixRef, ScaleFormat, ScaleLayout, ScaleRounding, Scales, Segments,
};
use half::bf16;
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

/// What weights are made of.
pub(crate) fn format(array: &Array<'_>) -> PyResult<WeightFormat> {
    match array.element() {
        Element::Bf16 => Ok(WeightFormat::Bf16),
        Element::E4m3 => Ok(WeightFormat::E4m3),
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

/// Prepacked weights: what `expertile.torch.Gemm` documents.
#[pyclass(frozen, name = "Gemm", module = "expertile._native")]
pub(crate) struct PyGemm(PackedWeights);

#[pymethods]
impl PyGemm {
    /// Between parts of the packing it looks whether it has been interrupted.
    #[new]
    fn new(py: Python<'_>, weights: &Bound<'_, PyAny>, weight_scale: Option<&Bound<'_, PyAny>>) -> PyResult<Self> {
        pack(py, ("weights", weights), ("weight_scale", weight_scale), (1, GateUpOrder::Halves), None).map(Self)
    }

    #[getter]
    fn shape(&self) -> (usize, usize, usize) {
        (self.0.experts(), self.0.n(), self.0.k())
    }

    /// Writes the weights as they were packed, bit for bit.
    fn unpack(&self, py: Python<'_>, weights: &Bound<'_, PyAny>) -> PyResult<()> {
        let weights = Array::output("weights", weights)?;
        let apart = Apart::check(&[&weights], &[])?;
        check_unpacked(&self.0, &weights)?;
        let done = unpack(py, &self.0, (1, GateUpOrder::Halves), &weights, apart);
        written(py, &[&weights])?;
        done
    }

    /// `rows [M_sum, K]` to `out [M_sum, N]`: rows of experts, and no others; `rows_at_once` before it looks whether it
    /// has been interrupted.
    #[pyo3(signature = (rows, scale, psum, m_indices, alignment, out, *, rows_at_once=None))]
    fn run(
        &self,
        py: Python<'_>,
        rows: &Bound<'_, PyAny>,
        scale: Option<&Bound<'_, PyAny>>,
        psum: Option<&Bound<'_, PyAny>>,
        m_indices: Option<&Bound<'_, PyAny>>,
        alignment: &Bound<'_, PyAny>,
        out: &Bound<'_, PyAny>,
        rows_at_once: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<()> {
        let (experts, n, k) = self.shape();
        let rows = Rows::new(rows, scale, (psum, m_indices), alignment, (experts, k))?;
        let out = Array::output("out", out)?;
        require_out(&out, rows.m_sum, n)?;
        let apart = Apart::check(&[&out], &rows.arrays())?;
        let list = rows.list().copied_list(py)?;
        let segments = match rows.list {
            List::Psum { alignment, .. } => Segments::from_psum(&list, alignment, rows.m_sum),
            List::MIndices(_) => Segments::from_m_indices(&list, experts),
        };
        let segments = segments.map_err(exception)?;
        let scales = rows.scale.as_ref().map(row_major).transpose()?;
        let values = match &scales {
            None => Values::Bf16(rows.rows.contiguous()?),
            Some(scales) => Values::E4m3(rows.rows.contiguous()?, scales),
        };
        let results = out.contiguous_mut::<bf16>(apart)?;
        let products = limits::PRODUCTS_AT_ONCE * cpu()?.threads();
        let at_once = optional_size("rows_at_once", rows_at_once)?.unwrap_or(products / (n * k)).max(1);
        let done = if rows.m_sum <= at_once {
            self.multiply(py, &segments, values, results)
        } else {
            self.multiply_in_parts(py, &segments, values, results, at_once)
        };
        // Also after an interruption, which leaves rows that are done.
        written(py, &[&out])?;
        done
    }
}

/// What the rows are, row by row.
#[derive(Clone, Copy)]
enum Values<'a> {
    Bf16(&'a [bf16]),
    E4m3(&'a [E4m3], &'a [f32]),
}

impl PyGemm {
    /// A row's result does not depend on the rows beside it.
    fn multiply_in_parts(
        &self,
        py: Python<'_>,
        segments: &Segments<'_>,
        values: Values<'_>,
        results: &mut [bf16],
        at_once: usize,
    ) -> PyResult<()> {
        let (experts, n, k) = self.shape();
        let groups = k.div_ceil(WEIGHT_BLOCK);
        let mut m_indices: Vec<i32> = limits::vec("m_indices", segments.m_sum())?;
        m_indices.resize(segments.m_sum(), -1);
        for (expert, rows) in segments.iter() {
            m_indices[rows].fill(expert as i32);
        }
        for rows in limits::stretches(segments.m_sum(), at_once) {
            let part = Segments::from_m_indices(&m_indices[rows.clone()], experts).map_err(exception)?;
            let of = |width: usize| rows.start * width..rows.end * width;
            let values = match values {
                Values::Bf16(rows) => Values::Bf16(&rows[of(k)]),
                Values::E4m3(rows, scales) => Values::E4m3(&rows[of(k)], &scales[of(groups)]),
            };
            self.multiply(py, &part, values, &mut results[of(n)])?;
            py.check_signals()?;
        }
        Ok(())
    }

    fn multiply(
        &self,
        py: Python<'_>,
        segments: &Segments<'_>,
        values: Values<'_>,
        results: &mut [bf16],
    ) -> PyResult<()> {
        let activations = match values {
            Values::Bf16(rows) => Activations::Bf16(rows),
            Values::E4m3(rows, scales) => Activations::E4m3 { rows, scales: Scales::f32(row_major_format()?, scales) },
        };
        let bytes = grouped_gemm_workspace_bytes(segments.live_rows(), self.0.k(), activations.format());
        let bytes = bytes.map_err(exception)?;
        let mut workspace = limits::vec("workspace", bytes)?;
        let cpu = cpu()?;
        work(py, || {
            workspace.resize(bytes, 0u8);
            grouped_gemm_of_segments(&cpu, segments, activations, &self.0, &mut workspace, results).map_err(exception)
        })
    }
}

fn row_major_format() -> PyResult<ScaleFormat> {
    ScaleFormat::new(Group::G128, ScaleLayout::RowMajor, ScaleRounding::Exact).map_err(exception)
}

/// A copy of scales of any strides, row by row.
pub(crate) fn row_major(scale: &Array<'_>) -> PyResult<Vec<f32>> {
    let scales: MatrixRef<'_, f32> = scale.matrix()?;
    let mut copy = limits::vec("scale", scales.rows() * scales.cols())?;
    copy.extend((0..scales.rows()).flat_map(|row| (0..scales.cols()).map(move |col| scales.get(row, col))));
    Ok(copy)
}
