//! The experts alone on CUDA tensors, on rows that a dispatcher has expanded and sorted.

use super::gpu::{Gpu, current_stream};
use super::{lock, matrix};
use crate::array::Array;
use crate::array::Element;
use crate::error::{Wrong, exception};
use crate::placed_rows::{List, Rows};
use crate::tensor::{self, Form};
use expertile::cuda::{DeviceBuffer, DevicePtr, ExpandedCall, ExpandedLayer, STATE_BYTES, Stream, expected_rows};
use pyo3::prelude::*;
use std::sync::{Arc, Mutex};

/// What calls have been prepared.
pub(super) struct Expanded {
    /// Never dropped before the layer: a captured graph launches their kernels.
    prepared: Mutex<Vec<Arc<ExpandedLayer>>>,
    /// Of all calls.
    state: DeviceBuffer,
}

impl Expanded {
    pub(super) fn new(gpu: &Gpu) -> PyResult<Self> {
        let state = gpu.device.upload(&[0u8; STATE_BYTES]).map_err(exception)?;
        Ok(Self { prepared: Mutex::default(), state })
    }

    /// Prepares for calls of up to `max_rows` rows, unless such have been prepared.
    pub(super) fn prepare(&self, max_rows: usize, prepare: impl FnOnce() -> PyResult<ExpandedLayer>) -> PyResult<()> {
        let known = lock(&self.prepared).iter().any(|layer| max_rows > 0 && layer.max_rows() >= max_rows);
        if !known {
            let layer = prepare()?;
            lock(&self.prepared).push(Arc::new(layer));
        }
        Ok(())
    }

    /// What takes so many rows: the smallest.
    pub(super) fn find(&self, m_sum: usize) -> PyResult<Arc<ExpandedLayer>> {
        let prepared = lock(&self.prepared);
        let fits = prepared.iter().filter(|layer| layer.max_rows() >= m_sum).min_by_key(|layer| layer.max_rows());
        fits.cloned().ok_or_else(|| {
            let expected = match prepared.iter().map(|layer| layer.max_rows()).max() {
                Some(most) => format!("at most {most}, as prepare_expanded() was told"),
                None => "prepare_expanded(max_rows) to have been called".into(),
            };
            Wrong::new("rows", format_args!("has {m_sum} rows"), m_sum, expected).value()
        })
    }

    /// Queues the call.
    pub(super) fn launch(
        &self,
        py: Python<'_>,
        gpu: &Gpu,
        layer: &ExpandedLayer,
        rows: &Rows<'_>,
        expected: Option<usize>,
        out: &Array<'_>,
    ) -> PyResult<()> {
        let List::Psum { alignment, .. } = rows.list else { unreachable!("callers bring a psum") };
        let (m_sum, experts) = (rows.m_sum, layer.shape().local_experts());
        rows.rows.require_contiguous()?;
        let bytes = layer.workspace_bytes(m_sum).map_err(exception)?;
        let workspace = tensor::empty(py, gpu.ordinal, Form::list(Element::U8, bytes))?;
        let call = ExpandedCall {
            m_sum,
            alignment,
            rows: DevicePtr::new(rows.rows.require_aligned(16)?),
            scales: rows.scale.as_ref().map(matrix).transpose()?,
            psum: DevicePtr::new(rows.list().require_device_memory::<i32>(experts, 4)?),
            expected_rows: expected.unwrap_or_else(|| expected_rows(m_sum, experts, alignment)),
            out: DevicePtr::new(out.require_aligned(16)?),
            state: self.state.ptr(),
            workspace: DevicePtr::new(workspace.require_device_memory::<u8>(bytes, 256)?),
        };
        let stream = current_stream(py, gpu.ordinal)?;
        #[allow(unsafe_code)]
        // SAFETY: every address is a live tensor's of the size and type that was checked, what is written overlaps nothing
        // else, and torch hands memory on in stream order. The state was zero when it was new. Users keep the layer as
        // long as graphs that captured a call of it, as every tensor of a graph.
        unsafe { layer.launch(stream, &call) }.map_err(exception)
    }

    /// Waits for the stream, and says what was wrong with a psum since the last time.
    pub(super) fn check(&self, stream: Stream) -> expertile::Result<()> {
        let Some(layer) = lock(&self.prepared).last().cloned() else { return Ok(()) };
        #[allow(unsafe_code)]
        // SAFETY: the stream is torch's, and the state was zeroed when it was made.
        unsafe {
            layer.check(stream, self.state.ptr())
        }
    }
}
