//! The grouped GEMM alone on CUDA tensors: on torch's current stream, in torch's memory.

use super::gpu::{self, Gpu, current_stream, found_by_a_kernel};
use super::layer::{arranged, in_place, weights_format};
use super::{lock, matrix};
use crate::array::{Apart, Array, Element, place};
use crate::autograd::written;
use crate::error::{Actual, Wrong, exception, optional_size, size};
use crate::gemm::format;
use crate::layer::named_activations;
use crate::placed_rows::{List, Rows, require_out, rows_format};
use crate::tensor::{self, Form};
use expertile::cuda::{
    DeviceBuffer, DevicePtr, GroupedGemm, GroupedGemmCall, GroupedGemmShape, Grouping, STATE_BYTES, Weights,
    expected_rows,
};
use expertile::gemm::WeightFormat;
use pyo3::prelude::*;
use std::sync::{Arc, Mutex};

/// What has been prepared for weights of one shape on one device: what `expertile.torch.Gemm` documents. Each call
/// brings the weights; of MXFP4, which is arranged here, they are held.
#[pyclass(frozen, module = "expertile._native")]
pub(crate) struct CudaGemm {
    gpu: Arc<Gpu>,
    shape: GroupedGemmShape,
    /// And torch's memory that they are in.
    arranged: Option<(Weights, Py<PyAny>)>,
    /// Never dropped before this: a captured graph launches their kernels.
    prepared: Mutex<Vec<Arc<GroupedGemm>>>,
    /// What kernels found wrong; of all calls.
    state: DeviceBuffer,
}

#[pymethods]
impl CudaGemm {
    /// For weights of that shape, type and device; of MXFP4 and int4 with their scales, for rows of the type `activations`.
    #[new]
    #[pyo3(signature = (weights, weight_scale=None, activations=None))]
    fn new(
        py: Python<'_>,
        weights: &Bound<'_, PyAny>,
        weight_scale: Option<&Bound<'_, PyAny>>,
        activations: Option<&str>,
    ) -> PyResult<Self> {
        let (weights, weight_scale) = (Array::new("weights", weights)?, Array::optional("weight_scale", weight_scale)?);
        let Some(ordinal) = Array::common_device(&[Some(&weights), weight_scale.as_ref()])? else {
            return Err(Wrong::new("weights", "is on the CPU", "the CPU", "a CUDA device").value());
        };
        let &[experts, n, width] = weights.shape() else { return Err(weights.shape_error("[E, N, K]")) };
        let format = weights_format(&weights, ("weight_scale", weight_scale.as_ref()))?;
        let k = if format.has_groups() { 2 * width } else { width };
        let activation_format = match activations {
            Some(name) => named_activations(name)?,
            None => format.usual_activations(),
        };
        let shape = GroupedGemmShape { format, activation_format, experts, n, k };
        let gpu = gpu::gpu(py, ordinal)?;
        let mut held = None;
        if format.has_groups() {
            let sizes = [experts, n, k];
            let plain = in_place(&weights, sizes, ("weight_scale", weight_scale.as_ref()), format)?;
            let (weights, memory) = arranged(py, &gpu, plain, sizes, activation_format)?;
            held = memory.map(|memory| (weights, memory.into_object().unbind()));
        }
        let state = gpu.device.upload(&[0u8; STATE_BYTES]).map_err(exception)?;
        Ok(Self { gpu, shape, arranged: held, prepared: Mutex::default(), state })
    }

    #[getter]
    fn shape(&self) -> (usize, usize, usize) {
        (self.shape.experts, self.shape.n, self.shape.k)
    }

    /// The most rows of a call; 0 before anything is prepared.
    #[getter]
    fn max_rows(&self) -> usize {
        lock(&self.prepared).iter().map(|gemm| gemm.max_rows()).max().unwrap_or(0)
    }

    /// How many rows, of all experts together, are likely in a buffer for whatever routing, with aligned segments.
    #[staticmethod]
    fn expected_rows(m_sum: usize, experts: usize, alignment: usize) -> usize {
        expertile::cuda::expected_rows(m_sum, experts, alignment)
    }

    /// Compiles (or loads) everything that calls of up to `max_rows` rows can launch.
    fn prepare(&self, py: Python<'_>, max_rows: &Bound<'_, PyAny>) -> PyResult<()> {
        let max_rows = size("max_rows", max_rows)?;
        if max_rows > 0 && max_rows <= self.max_rows() {
            return Ok(());
        }
        let gemm = py.detach(|| GroupedGemm::prepare(&self.gpu.device, self.shape, max_rows)).map_err(exception)?;
        lock(&self.prepared).push(Arc::new(gemm));
        Ok(())
    }

    /// Queues a call; returns `out`, or the tensor that was made in its place.
    #[pyo3(signature = (
        rows, scale, weights, weight_scale, psum, m_indices, alignment, expected_rows=None, out=None
    ))]
    fn run<'py>(
        &self,
        py: Python<'py>,
        rows: &Bound<'py, PyAny>,
        scale: Option<&Bound<'py, PyAny>>,
        weights: Option<&Bound<'py, PyAny>>,
        weight_scale: Option<&Bound<'py, PyAny>>,
        psum: Option<&Bound<'py, PyAny>>,
        m_indices: Option<&Bound<'py, PyAny>>,
        alignment: &Bound<'py, PyAny>,
        expected_rows: Option<&Bound<'py, PyAny>>,
        out: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let GroupedGemmShape { format: own, activation_format, experts, n, k } = self.shape;
        let (weights, weight_scale) =
            (Array::optional("weights", weights)?, Array::optional("weight_scale", weight_scale)?);
        let given = match (&weights, &self.arranged) {
            (Some(weights), None) => {
                weights.require_shape(&[experts, n, k])?;
                if format(weights)? != own {
                    return Err(weights.dtype_error(&format!("{own}, as prepared")));
                }
                self.require_here(weights)?;
                Some(in_place(weights, [experts, n, k], ("weight_scale", weight_scale.as_ref()), own)?)
            }
            (None, Some(_)) => None,
            (None, None) => return Err(Wrong::new("weights", "is None", Actual::Nothing, "those of the call").value()),
            (Some(weights), Some(_)) => {
                return Err(
                    Wrong::new("weights", "is given", weights.object(), "None: weights of 4 bits are held").value()
                );
            }
        };
        let rows = Rows::new(rows, scale, (psum, m_indices), alignment, (experts, k))?;
        if rows_format(&rows.rows)? != activation_format {
            let expected = match own {
                WeightFormat::Mxfp4 | WeightFormat::Int4 => {
                    format!("{activation_format}, for which the weights are arranged")
                }
                _ => "that of the weights, on a GPU".into(),
            };
            return Err(rows.rows.dtype_error(&expected));
        }
        let [first, second, third] = rows.arrays();
        let inputs = [weights.as_ref(), weight_scale.as_ref(), first, second, third];
        Array::common_device(&inputs)?;
        self.require_here(&rows.rows)?;
        let taken = given.as_ref().or(self.arranged.as_ref().map(|(weights, _)| weights));
        let taken = taken.expect("given or arranged");
        let expected_rows = optional_size("expected_rows", expected_rows)?;
        let made = || tensor::empty(py, self.gpu.ordinal, Form::row_major(Element::Bf16, rows.m_sum, n));
        let out = out.map_or_else(made, |out| Array::output("out", out))?;
        require_out(&out, rows.m_sum, n)?;
        self.require_here(&out)?;
        Apart::check(&[&out], &inputs)?;
        let gemm = self.find(rows.m_sum)?;
        if rows.m_sum > 0 {
            self.launch(py, &gemm, taken, &rows, expected_rows, &out)?;
        }
        written(py, &[&out])?;
        Ok(out.into_object())
    }

    /// Waits for the current stream and raises what its kernels found wrong with lists since the last time.
    fn check(&self, py: Python<'_>) -> PyResult<()> {
        let stream = current_stream(py, self.gpu.ordinal)?;
        let Some(gemm) = lock(&self.prepared).last().cloned() else { return Ok(()) };
        #[allow(unsafe_code)]
        // SAFETY: the stream is torch's, and the state was zeroed when it was made.
        py.detach(|| unsafe { gemm.check(stream, self.state.ptr()) }).map_err(found_by_a_kernel)
    }
}

impl CudaGemm {
    /// What takes so many rows.
    fn find(&self, m_sum: usize) -> PyResult<Arc<GroupedGemm>> {
        let prepared = lock(&self.prepared);
        let fits = prepared.iter().find(|gemm| gemm.max_rows() >= m_sum).cloned();
        fits.ok_or_else(|| {
            let expected = match prepared.iter().map(|gemm| gemm.max_rows()).max() {
                Some(most) => format!("at most {most}, as prepare() was told"),
                None => "prepare(max_rows) to have been called".into(),
            };
            Wrong::new("rows", format_args!("has {m_sum} rows"), m_sum, expected).value()
        })
    }

    fn require_here(&self, array: &Array<'_>) -> PyResult<()> {
        if array.device() == Some(self.gpu.ordinal) {
            return Ok(());
        }
        let actual = place(array.device());
        let expected = format!("{}, as prepared", place(Some(self.gpu.ordinal)));
        Err(Wrong::new(array.argument(), format_args!("is on {actual}"), &actual[..], expected).value())
    }

    fn launch(
        &self,
        py: Python<'_>,
        gemm: &GroupedGemm,
        weights: &Weights,
        rows: &Rows<'_>,
        expected: Option<usize>,
        out: &Array<'_>,
    ) -> PyResult<()> {
        let m_sum = rows.m_sum;
        let list = rows.list().require_device_memory::<i32>(rows.list().shape()[0], 4)?;
        let (grouping, likely) = match rows.list {
            List::Psum { alignment, .. } => {
                (Grouping::Psum { alignment }, expected_rows(m_sum, self.shape.experts, alignment))
            }
            List::MIndices(_) => (Grouping::MIndices, m_sum),
        };
        rows.rows.require_contiguous()?;
        let scales = rows.scale.as_ref().map(matrix).transpose()?;
        let copies = scales.is_some_and(|scales| !gemm.reads_in_place(&scales, m_sum));
        let bytes = gemm.workspace_bytes(m_sum, &grouping, copies).map_err(exception)?;
        let workspace = tensor::empty(py, self.gpu.ordinal, Form::list(Element::U8, bytes))?;
        let call = GroupedGemmCall {
            weights,
            rows: DevicePtr::new(rows.rows.require_aligned(16)?),
            scales,
            bias: None,
            out: DevicePtr::new(out.require_aligned(16)?),
            m_sum,
            grouping,
            list: DevicePtr::new(list),
            expected_rows: expected.unwrap_or(likely),
            state: self.state.ptr(),
            workspace: DevicePtr::new(workspace.require_device_memory::<u8>(bytes, 16)?),
        };
        let stream = current_stream(py, self.gpu.ordinal)?;
        #[allow(unsafe_code)]
        // SAFETY: every address is a live tensor's of the size and type that was checked, `Apart` has seen that what is
        // written overlaps nothing else, and torch hands memory on in stream order. The state was zero when it was new.
        // Users keep `self` and the weights as long as graphs that captured a call, as every tensor of a graph.
        unsafe { gemm.launch(stream, &call) }.map_err(exception)
    }
}
