//! The layer over the ranks of a torch.distributed group, on the CPU; and the group as an exchange, on any device.

use crate::array::{Apart, Array, Element, Native};
use crate::autograd::written;
use crate::error::{Wrong, exception, size};
use crate::layer::PyLayer;
use crate::pool::{cpu, work};
use expertile::cpu::ExpertParallelLayer;
use expertile::exchange::Exchange;
use expertile::{Combine, Dispatch, Dtype, Error, Float, LayerConfig, MatrixRef, ParallelConfig, Placement, TopkIds};
use half::{bf16, f16};
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use std::sync::Arc;

/// Ranks joined by a Python function, which takes what goes to each rank and returns what comes from each.
pub(crate) struct PyExchange {
    pub(crate) exchange: Py<PyAny>,
    pub(crate) rank: usize,
    pub(crate) ranks: usize,
}

impl std::fmt::Debug for PyExchange {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "rank {} of {} of a torch.distributed group", self.rank, self.ranks)
    }
}

impl Exchange for PyExchange {
    fn rank(&self) -> usize {
        self.rank
    }

    fn ranks(&self) -> usize {
        self.ranks
    }

    fn all_to_all_v(&self, send: &[&[u8]], receive: &mut [&mut [u8]]) -> expertile::Result<()> {
        let came: PyResult<Vec<Vec<u8>>> = Python::attach(|py| {
            let send: Vec<_> = send.iter().map(|bytes| PyBytes::new(py, bytes)).collect();
            let came: Vec<Bound<'_, PyBytes>> = self.exchange.bind(py).call1((send,))?.extract()?;
            Ok(came.iter().map(|bytes| bytes.as_bytes().to_vec()).collect())
        });
        let came = came.map_err(|error| Error::Device {
            argument: "group",
            actual: format!("failing: {error}"),
            expected: "a torch.distributed group whose ranks all come".into(),
        })?;
        for (rank, (came, receive)) in came.iter().zip(receive).enumerate() {
            if came.len() != receive.len() {
                return Err(Error::Message { rank, actual: came.len(), expected: receive.len() });
            }
            receive.copy_from_slice(came);
        }
        Ok(())
    }
}

/// Where experts are, and how rows travel.
pub(crate) fn parallel(placement: Vec<Vec<usize>>, dispatch: Option<&str>, combine: &str) -> PyResult<ParallelConfig> {
    let experts = placement.iter().flatten().max().map_or(0, |&last| last + 1);
    let placement = Placement::from_lists(experts, placement).map_err(exception)?;
    Ok(ParallelConfig {
        dispatch: dispatch.map(str::parse::<Dispatch>).transpose().map_err(exception)?,
        combine: combine.parse::<Combine>().map_err(exception)?,
        ..ParallelConfig::new(placement)
    })
}

/// A CPU layer of a rank's experts, and the way to the others: what `expertile.torch.ExpertParallelLayer` documents.
#[pyclass(frozen, name = "ExpertParallelLayer", module = "expertile._native")]
pub(crate) struct PyExpertParallelLayer(ExpertParallelLayer);

#[pymethods]
impl PyExpertParallelLayer {
    #[new]
    #[pyo3(signature = (layer, placement, capacity, topk, input, output, exchange, rank, *, dispatch, combine))]
    fn new(
        py: Python<'_>,
        layer: &Bound<'_, PyLayer>,
        placement: Vec<Vec<usize>>,
        capacity: &Bound<'_, PyAny>,
        topk: &Bound<'_, PyAny>,
        input: &Bound<'_, PyAny>,
        output: &Bound<'_, PyAny>,
        exchange: Py<PyAny>,
        rank: usize,
        dispatch: Option<&str>,
        combine: &str,
    ) -> PyResult<Self> {
        let ranks = placement.len();
        let parallel = parallel(placement, dispatch, combine)?;
        let config = LayerConfig {
            topk: size("topk", topk)?,
            global_experts: parallel.placement.global_experts(),
            input: float("dtype", input)?,
            output: float("out_dtype", output)?,
            ..*layer.get().0.config()
        };
        let layer = layer.get().0.with_config(config, size("capacity", capacity)?).map_err(exception)?.on(&cpu()?);
        let exchange: Arc<dyn Exchange> = Arc::new(PyExchange { exchange, rank, ranks });
        py.detach(|| ExpertParallelLayer::prepare(layer, parallel, exchange)).map(Self).map_err(exception)
    }

    #[getter]
    fn choice(&self) -> PyResult<String> {
        self.0.choice(self.0.max_tokens()).map(|choice| choice.to_string()).map_err(exception)
    }

    /// Bytes of workspace for so many tokens of this rank.
    fn workspace_bytes(&self, tokens: &Bound<'_, PyAny>) -> PyResult<usize> {
        self.0.workspace_bytes(size("tokens", tokens)?).map_err(exception)
    }

    /// `hidden_states [M, H]` to `out [M, H]`. Bad input is an error on all ranks.
    fn run(
        &self,
        py: Python<'_>,
        hidden_states: &Bound<'_, PyAny>,
        topk_ids: &Bound<'_, PyAny>,
        topk_weights: &Bound<'_, PyAny>,
        workspace: &Bound<'_, PyAny>,
        out: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        let call = Call {
            layer: &self.0,
            hidden_states: Array::new("hidden_states", hidden_states)?,
            ids: Array::new("topk_ids", topk_ids)?,
            weights: Array::new("topk_weights", topk_weights)?,
            workspace: Array::output("workspace", workspace)?,
            out: Array::output("out", out)?,
        };
        let inputs = [Some(&call.hidden_states), Some(&call.ids), Some(&call.weights)];
        let apart = Apart::check(&[&call.out, &call.workspace], &inputs)?;
        let done = match (self.0.config().input, self.0.config().output) {
            (Dtype::Bf16, Dtype::Bf16) => call.run::<bf16, bf16>(py, apart),
            (Dtype::F16, Dtype::F16) => call.run::<f16, f16>(py, apart),
            (Dtype::F32, Dtype::F32) => call.run::<f32, f32>(py, apart),
            (Dtype::Bf16, _) => call.run::<bf16, f32>(py, apart),
            (Dtype::F16, _) => call.run::<f16, f32>(py, apart),
            _ => call.run::<f32, bf16>(py, apart),
        };
        written(py, &[&call.out, &call.workspace])?;
        done
    }
}

struct Call<'a, 'py> {
    layer: &'a ExpertParallelLayer,
    hidden_states: Array<'py>,
    ids: Array<'py>,
    weights: Array<'py>,
    workspace: Array<'py>,
    out: Array<'py>,
}

impl Call<'_, '_> {
    fn run<T: Native + Float, O: Native + Float>(&self, py: Python<'_>, apart: Apart) -> PyResult<()> {
        let rows = self.hidden_states.matrix::<T>()?;
        let weights: MatrixRef<'_, f32> = self.weights.matrix()?;
        let (ids32, ids64);
        let ids: TopkIds<'_> = match self.ids.element() {
            Element::I32 => {
                ids32 = self.ids.matrix::<i32>()?;
                ids32.into()
            }
            Element::I64 => {
                ids64 = self.ids.matrix::<i64>()?;
                ids64.into()
            }
            _ => return Err(self.ids.dtype_error("int32 or int64")),
        };
        let workspace = self.workspace.contiguous_mut::<u8>(apart)?;
        let out = self.out.contiguous_mut::<O>(apart)?;
        work(py, || self.layer.run(rows, ids, weights, workspace, out).map_err(exception))
    }
}

fn float(argument: &'static str, dtype: &Bound<'_, PyAny>) -> PyResult<Dtype> {
    match Element::of_torch(dtype)? {
        Element::Bf16 => Ok(Dtype::Bf16),
        Element::F16 => Ok(Dtype::F16),
        Element::F32 => Ok(Dtype::F32),
        _ => Err(Wrong::new(argument, format_args!("is {dtype}"), dtype, "bfloat16, float16 or float32").of_type()),
    }
}
