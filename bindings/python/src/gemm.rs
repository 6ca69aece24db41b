//! The grouped GEMM alone on the CPU.

use crate::array::{Apart, Array, Element};
use crate::autograd::written;
use crate::error::{exception, optional_size};
use crate::layer::{check_unpacked, pack, unpack};
use crate::limits;
use crate::placed_rows::{List, Rows, require_out, row_major};
use crate::pool::{cpu, work};
use expertile::cpu::{Activations, PackedWeights, grouped_gemm_of_segments, grouped_gemm_workspace_bytes};
use expertile::gemm::{WEIGHT_BLOCK, WeightFormat};
use expertile::{E4m3, GateUpOrder, Group, ScaleFormat, ScaleLayout, ScaleRounding, Scales, Segments};
use half::bf16;
use pyo3::prelude::*;

/// What weights are made of.
pub(crate) fn format(array: &Array<'_>) -> PyResult<WeightFormat> {
    match array.element() {
        Element::Bf16 => Ok(WeightFormat::Bf16),
        Element::E4m3 => Ok(WeightFormat::E4m3),
        _ => Err(array.dtype_error("bfloat16 or float8_e4m3fn")),
    }
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
