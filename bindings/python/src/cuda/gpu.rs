//! A device, and what is kept for it: prepared steps, and a workspace for each stream.

use super::lock;
use crate::error::{exception, wrong};
use crate::exchange;
use expertile::Error;
use expertile::cuda::{
    Compiler, CubinCache, Device, DeviceBuffer, Permute, PermuteConfig, QuantizePermute, QuantizePermuteConfig, Route,
    RouteCall, RouteConfig, Stream, Unpermute, UnpermuteConfig,
};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

/// Steps by configuration.
pub(super) struct Prepared<C, S>(Mutex<Vec<(C, Arc<S>)>>);

impl<C: PartialEq + Copy, S> Prepared<C, S> {
    const fn new() -> Self {
        Self(Mutex::new(Vec::new()))
    }

    pub(super) fn get(&self, config: C, prepare: impl FnOnce(C) -> expertile::Result<S>) -> PyResult<Arc<S>> {
        let find =
            |steps: &[(C, Arc<S>)]| steps.iter().find(|(known, _)| *known == config).map(|(_, step)| step.clone());
        if let Some(step) = find(&lock(&self.0)) {
            return Ok(step);
        }
        let step = Arc::new(prepare(config).map_err(exception)?);
        let mut steps = lock(&self.0);
        Ok(find(&steps).unwrap_or_else(|| {
            steps.push((config, step.clone()));
            step
        }))
    }
}

/// One stream's state and workspace, and the call that used them last.
pub(super) struct Workspace {
    pub(super) stream: Stream,
    pub(super) state: DeviceBuffer,
    pub(super) buffer: DeviceBuffer,
    pub(super) last: Option<(Arc<Route>, RouteCall)>,
}

impl Workspace {
    /// Waits for the stream and raises what kernels found wrong with ids since the last time.
    pub(super) fn check(&self) -> PyResult<()> {
        let Some((route, call)) = &self.last else { return Ok(()) };
        #[allow(unsafe_code)]
        // SAFETY: the stream is torch's, and the state was initialised when it was made.
        let checked = unsafe { route.check(self.stream, call) };
        checked.map_err(found_by_a_kernel)
    }
}

/// What a kernel found wrong with ids or lists, long after the call: the exception says so.
pub(super) fn found_by_a_kernel(error: Error) -> PyErr {
    let note = match error {
        Error::ExpertId { .. } | Error::MapEntry { .. } => "found by a kernel; the slot was treated as empty",
        Error::RowExpert { .. } => "found by a kernel; the row was treated as padding",
        Error::Count { .. } => "found by a kernel; the expert had the rows that fit",
        error => return exception(error),
    };
    match wrong(error) {
        Ok((wrong, _)) => wrong.noting(note).value(),
        Err(error) => exception(error),
    }
}

/// A device and what is kept for it.
pub(super) struct Gpu {
    pub(super) ordinal: usize,
    pub(super) device: Device,
    routes: Prepared<RouteConfig, Route>,
    pub(super) permutes: Prepared<PermuteConfig, Permute>,
    pub(super) quantize_permutes: Prepared<QuantizePermuteConfig, QuantizePermute>,
    pub(super) unpermutes: Prepared<UnpermuteConfig, Unpermute>,
    pub(super) workspaces: Mutex<Vec<Workspace>>,
}

pub(super) fn gpu(py: Python<'_>, ordinal: usize) -> PyResult<Arc<Gpu>> {
    static GPUS: Mutex<Vec<Arc<Gpu>>> = Mutex::new(Vec::new());
    let known = |gpus: &[Arc<Gpu>]| gpus.iter().find(|gpu| gpu.ordinal == ordinal).cloned();
    if let Some(gpu) = known(&lock(&GPUS)) {
        return Ok(gpu);
    }
    let device = Device::open_with(ordinal, compiler(py)?, CubinCache::from_environment()).map_err(exception)?;
    let gpu = Arc::new(Gpu {
        ordinal,
        device,
        routes: Prepared::new(),
        permutes: Prepared::new(),
        quantize_permutes: Prepared::new(),
        unpermutes: Prepared::new(),
        workspaces: Mutex::new(Vec::new()),
    });
    let mut gpus = lock(&GPUS);
    Ok(known(&gpus).unwrap_or_else(|| {
        gpus.push(gpu.clone());
        gpu
    }))
}

/// NVRTC from where the machine has it, else from torch's own packages.
pub(super) fn compiler(py: Python<'_>) -> PyResult<Compiler> {
    Compiler::find().or_else(|missing| {
        let beside_torch: Vec<PathBuf> = py.import("expertile._nvrtc")?.call_method0("beside_torch")?.extract()?;
        beside_torch.iter().find_map(|path| Compiler::load(path).ok()).ok_or_else(|| exception(missing))
    })
}

/// The stream that torch's own operators would use now.
pub(super) fn current_stream(py: Python<'_>, ordinal: usize) -> PyResult<Stream> {
    if let Some(stream) = exchange::current_stream(py, ordinal) {
        return Ok(Stream(stream));
    }
    static CURRENT: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    let current = CURRENT.get_or_try_init(py, || {
        let torch = py.import("torch")?;
        let raw = torch.getattr("_C")?.getattr_opt("_cuda_getCurrentRawStream")?;
        raw.map_or_else(|| torch.getattr("cuda")?.getattr("current_stream"), Ok).map(Bound::unbind)
    })?;
    let stream = current.bind(py).call1((ordinal,))?;
    Ok(Stream(match stream.extract::<u64>() {
        Ok(raw) => raw,
        Err(_) => stream.getattr(intern!(py, "cuda_stream"))?.extract()?,
    }))
}

impl Gpu {
    pub(super) fn route(&self, config: RouteConfig) -> PyResult<Arc<Route>> {
        self.routes.get(config, |config| Route::prepare(&self.device, config))
    }
}
