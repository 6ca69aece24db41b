//! The CUDA backend on tensors: their addresses, the current stream, and what is kept between calls.
//!
//! Kept, for the life of the process: a device and its prepared steps (a kernel is compiled by the first call that needs
//! it), and a workspace for each stream. A call that is being captured into a graph brings a workspace of its own.

use crate::array::{Array, Element};
use crate::error::{exception, size};
use crate::exchange;
use crate::permute::{Ids, Place};
use expertile::cuda::compiler::Compiler;
use expertile::cuda::{
    Buffer, CubinCache, Device, LayoutBuffers, Permute, PermuteConfig, QuantizePermute, QuantizePermuteConfig, Route,
    RouteConfig, RoutingBuffers, RowsBuffers, Stream, Tensor2, Unpermute, UnpermuteBuffers, UnpermuteConfig,
};
use expertile::{Dtype, Padding, Plan, ScaleFormat};
use pyo3::exceptions::PyValueError;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Steps by configuration.
struct Prepared<C, S>(Mutex<Vec<(C, Arc<S>)>>);

impl<C: PartialEq + Copy, S> Prepared<C, S> {
    const fn new() -> Self {
        Self(Mutex::new(Vec::new()))
    }

    fn get(&self, config: C, prepare: impl FnOnce(C) -> expertile::Result<S>) -> PyResult<Arc<S>> {
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

/// One stream's workspace, and the call that used it last.
struct Workspace {
    stream: Stream,
    buffer: Buffer,
    last: Option<(Arc<Route>, Plan, RoutingBuffers)>,
}

impl Workspace {
    /// Waits for the stream and raises what kernels found wrong with ids since the last time.
    fn check(&self) -> PyResult<()> {
        let Some((route, plan, routing)) = &self.last else { return Ok(()) };
        #[allow(unsafe_code)]
        // SAFETY: the stream is torch's, and the workspace was initialised when it was made.
        let checked = unsafe { route.check(self.stream, plan, routing, self.buffer.address()) };
        checked.map_err(|error| match error {
            error @ expertile::Error::Cuda { .. } => exception(error),
            error => PyValueError::new_err(format!("{error} (found by a kernel; the slot was treated as empty)")),
        })
    }
}

/// A device and what is kept for it.
struct Gpu {
    ordinal: usize,
    device: Device,
    routes: Prepared<RouteConfig, Route>,
    permutes: Prepared<PermuteConfig, Permute>,
    quantize_permutes: Prepared<QuantizePermuteConfig, QuantizePermute>,
    unpermutes: Prepared<UnpermuteConfig, Unpermute>,
    workspaces: Mutex<Vec<Workspace>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn gpu(py: Python<'_>, ordinal: usize) -> PyResult<Arc<Gpu>> {
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
fn compiler(py: Python<'_>) -> PyResult<Compiler> {
    Compiler::find().or_else(|missing| {
        let beside_torch: Vec<PathBuf> = py.import("expertile._nvrtc")?.call_method0("beside_torch")?.extract()?;
        beside_torch.iter().find_map(|path| Compiler::load(path).ok()).ok_or_else(|| exception(missing))
    })
}

/// The stream that torch's own operators would use now.
fn current_stream(py: Python<'_>, ordinal: usize) -> PyResult<Stream> {
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
    /// The address of `bytes` of workspace for a call: the caller's own, made ready on the stream, or the stream's.
    fn workspace(
        &self,
        stream: Stream,
        own: Option<&Array<'_>>,
        bytes: usize,
        route: &Arc<Route>,
        call: &Routed,
    ) -> PyResult<u64> {
        if let Some(own) = own {
            let address = own.require_device_memory::<u8>(bytes, 16)?;
            #[allow(unsafe_code)]
            // SAFETY: the tensor is alive during the call, and its allocator hands its memory on in stream order.
            unsafe { route.initialise_workspace(stream, address) }.map_err(exception)?;
            return Ok(address);
        }
        let mut workspaces = lock(&self.workspaces);
        let found = workspaces.iter().position(|workspace| workspace.stream == stream);
        let index = match found {
            Some(index) if workspaces[index].buffer.bytes() >= bytes => index,
            _ => {
                if let Some(small) = found.map(|index| workspaces.swap_remove(index)) {
                    // Freeing waits for the device, so this is where what its kernels found is told.
                    small.check()?;
                }
                let buffer = self.device.allocate(bytes.next_power_of_two()).map_err(exception)?;
                #[allow(unsafe_code)]
                // SAFETY: the buffer is new and lives until it is replaced here, which waits for its last use.
                unsafe { route.initialise_workspace(stream, buffer.address()) }.map_err(exception)?;
                workspaces.push(Workspace { stream, buffer, last: None });
                workspaces.len() - 1
            }
        };
        workspaces[index].last = Some((route.clone(), call.plan, call.routing));
        Ok(workspaces[index].buffer.address())
    }

    fn route(&self, config: RouteConfig) -> PyResult<Arc<Route>> {
        self.routes.get(config, |config| Route::prepare(&self.device, config))
    }
}

/// What every call that makes a layout hands to the device.
struct Routed {
    plan: Plan,
    routing: RoutingBuffers,
    layout: LayoutBuffers,
    config: RouteConfig,
}

impl Routed {
    fn new(place: &Place<'_>) -> PyResult<Self> {
        let plan = place.plan()?;
        let config = RouteConfig { topk: plan.topk(), ids: ids_dtype(&place.ids)?, row_tile: plan.alignment() };
        Ok(Self { plan, routing: routing(&place.ids)?, layout: layout(place, &plan)?, config })
    }
}

fn ids_dtype(ids: &Ids<'_>) -> PyResult<Dtype> {
    match ids.ids.element() {
        Element::I32 => Ok(Dtype::I32),
        Element::I64 => Ok(Dtype::I64),
        _ => Err(ids.ids.dtype_error("int32 or int64")),
    }
}

fn routing(ids: &Ids<'_>) -> PyResult<RoutingBuffers> {
    let (expert_map, global_experts) = match &ids.map {
        None => (0, ids.local_experts),
        Some(map) => {
            let &[len] = map.shape() else { return Err(map.shape_error("one dimension")) };
            if len == 0 {
                return Err(map.shape_error("at least one entry"));
            }
            map.require_strides(&[1])?;
            (map.require_device_memory::<i32>(len, 4)?, len)
        }
    };
    Ok(RoutingBuffers { ids: matrix(&ids.ids)?, expert_map, global_experts })
}

fn matrix(array: &Array<'_>) -> PyResult<Tensor2> {
    let (row_stride, col_stride) = array.matrix_strides()?;
    Ok(Tensor2 { address: array.address(), row_stride, col_stride })
}

/// The lists as the CPU has them, then (on 8 bytes) the header, the worklist and each row's token.
fn layout(place: &Place<'_>, plan: &Plan) -> PyResult<LayoutBuffers> {
    let words = crate::plan::layout_words(plan)?;
    let mut next = place.lists.require_device_memory::<i32>(words, 4)?;
    let mut list = |words: usize| {
        let start = next;
        next += 4 * words as u64;
        start
    };
    let experts = plan.local_experts();
    let (expert_num_tokens, expert_start, psum) = (list(experts), list(experts), list(experts));
    let (m_indices, inv_perm) = (list(plan.m_sum()), list(plan.tokens() * plan.topk()));
    let header = next.next_multiple_of(8);
    let worklist = header + 16;
    let row_tokens = worklist + 8 * (plan.m_sum() / plan.alignment()) as u64;
    Ok(LayoutBuffers { expert_num_tokens, expert_start, psum, m_indices, row_tokens, inv_perm, header, worklist })
}

fn padding(zero_padding: bool) -> Padding {
    if zero_padding { Padding::Zero } else { Padding::Untouched }
}

/// A call on its way: the device, the stream, the routing.
struct Call {
    gpu: Arc<Gpu>,
    stream: Stream,
    routed: Routed,
    route: Arc<Route>,
}

impl Call {
    fn new(py: Python<'_>, ordinal: usize, place: &Place<'_>) -> PyResult<Self> {
        let gpu = gpu(py, ordinal)?;
        let stream = current_stream(py, ordinal)?;
        let routed = Routed::new(place)?;
        let route = gpu.route(routed.config)?;
        Ok(Self { gpu, stream, routed, route })
    }

    fn workspace(&self, own: Option<&Array<'_>>, bytes: expertile::Result<usize>) -> PyResult<u64> {
        self.gpu.workspace(self.stream, own, bytes.map_err(exception)?, &self.route, &self.routed)
    }

    fn launch_route(&self, workspace: Option<&Array<'_>>) -> PyResult<()> {
        let Routed { plan, routing, layout, .. } = &self.routed;
        let workspace = self.workspace(workspace, self.route.workspace_bytes(plan))?;
        #[allow(unsafe_code)]
        // SAFETY: every address is a live tensor's, of the size and type that was checked, and `Apart` has seen that what
        // is written overlaps nothing else. torch hands memory on in stream order, and the workspace is this stream's.
        unsafe { self.route.launch(self.stream, plan, routing, layout, workspace) }.map_err(exception)
    }
}

pub(crate) fn build_layout(
    py: Python<'_>,
    ordinal: usize,
    place: &Place<'_>,
    workspace: Option<&Array<'_>>,
) -> PyResult<()> {
    Call::new(py, ordinal, place)?.launch_route(workspace)
}

/// Rows as they are, with their scales if there are any.
pub(crate) fn permute(
    py: Python<'_>,
    ordinal: usize,
    place: &Place<'_>,
    (x, out): (&Array<'_>, &Array<'_>),
    quantized: Option<(&Array<'_>, &Array<'_>, ScaleFormat)>,
    zero_padding: bool,
    workspace: Option<&Array<'_>>,
) -> PyResult<()> {
    let dtype = match x.element() {
        Element::E4m3 => Dtype::E4m3,
        Element::U8 | Element::I8 if quantized.is_some() => Dtype::E4m3,
        Element::U8 | Element::I8 => Dtype::U8,
        Element::Bf16 => Dtype::Bf16,
        Element::F16 => Dtype::F16,
        Element::F32 => Dtype::F32,
        Element::I32 => Dtype::I32,
        Element::I64 | Element::Other => {
            return Err(x.dtype_error("float8_e4m3fn, bfloat16, float16, float32, int32 or uint8"));
        }
    };
    let (tokens, hidden) = x.matrix_shape("[M, H]")?;
    let rows_x = matrix(x)?;
    let call = Call::new(py, ordinal, place)?;
    let row_bytes = if tokens > 1 { rows_x.row_stride * x.item_bytes() } else { 16 };
    let common = x.address() | out.address() | row_bytes as u64 | 16;
    let config = PermuteConfig {
        topk: call.routed.plan.topk(),
        hidden,
        dtype,
        scales: quantized.map(|(_, _, format)| format),
        padding: padding(zero_padding),
        alignment_bytes: 1 << common.trailing_zeros(),
    };
    let (x_scales, scales) = match quantized {
        Some((x_scales, scales, _)) => (matrix(x_scales)?, scales.address()),
        None => (Tensor2::default(), 0),
    };
    let step = call.gpu.permutes.get(config, |config| Permute::prepare(&call.gpu.device, config))?;
    let rows = RowsBuffers { x: rows_x, x_scales, weights: Tensor2::default(), out: out.address(), scales };
    call.launch_route(workspace)?;
    #[allow(unsafe_code)]
    // SAFETY: as in `launch_route`; shapes and strides were checked against the configuration.
    unsafe { step.launch(call.stream, &call.routed.plan, &rows, &call.routed.layout) }.map_err(exception)
}

/// Rows quantized on their way.
pub(crate) fn quantize_permute(
    py: Python<'_>,
    ordinal: usize,
    place: &Place<'_>,
    (x, weights, out, scales): (&Array<'_>, Option<&Array<'_>>, &Array<'_>, &Array<'_>),
    format: ScaleFormat,
    zero_padding: bool,
    workspace: Option<&Array<'_>>,
) -> PyResult<()> {
    let input = match x.element() {
        Element::Bf16 => Dtype::Bf16,
        Element::F16 => Dtype::F16,
        _ => return Err(x.dtype_error("bfloat16 or float16 on a GPU")),
    };
    let (tokens, hidden) = x.matrix_shape("[M, H]")?;
    let rows_x = matrix(x)?;
    let call = Call::new(py, ordinal, place)?;
    if let Some(weights) = weights {
        weights.require_shape(&[tokens, 1])?;
    }
    let config = QuantizePermuteConfig {
        route: call.routed.config,
        hidden,
        input,
        format,
        padding: padding(zero_padding),
        weighted: weights.is_some(),
        aligned: x.address().is_multiple_of(16) && (rows_x.row_stride * 2).is_multiple_of(16),
    };
    let step = call.gpu.quantize_permutes.get(config, |config| QuantizePermute::prepare(&call.gpu.device, config))?;
    let rows = RowsBuffers {
        x: rows_x,
        x_scales: Tensor2::default(),
        weights: weights.map(matrix).transpose()?.unwrap_or_default(),
        out: out.address(),
        scales: scales.address(),
    };
    let Routed { plan, routing, layout, .. } = &call.routed;
    let workspace = call.workspace(workspace, step.workspace_bytes(plan))?;
    #[allow(unsafe_code)]
    // SAFETY: as in `launch_route`; shapes and strides were checked against the configuration.
    unsafe { step.launch(call.stream, plan, routing, &rows, layout, workspace) }.map_err(exception)
}

/// The weighted sum; every array's shape and type has been checked, rows, inv_perm and out are contiguous.
pub(crate) fn unpermute(
    py: Python<'_>,
    ordinal: usize,
    rows: &Array<'_>,
    inv_perm: &Array<'_>,
    weights: Option<&Array<'_>>,
    out: &Array<'_>,
) -> PyResult<()> {
    let gpu = gpu(py, ordinal)?;
    let float = |array: &Array<'_>| match array.element() {
        Element::Bf16 => Ok(Dtype::Bf16),
        Element::F16 => Ok(Dtype::F16),
        Element::F32 => Ok(Dtype::F32),
        _ => Err(array.dtype_error("bfloat16, float16 or float32")),
    };
    let (m_sum, hidden) = rows.matrix_shape("[M_sum, H]")?;
    let (tokens, topk) = inv_perm.matrix_shape("[M, topk]")?;
    let config = UnpermuteConfig {
        hidden,
        topk,
        input: float(rows)?,
        output: float(out)?,
        weighted: weights.is_some(),
        aligned: (rows.address() | out.address()).is_multiple_of(16),
    };
    if let Some(weights) = weights {
        weights.require_shape(&[tokens, topk])?;
    }
    let call = UnpermuteBuffers {
        rows: rows.address(),
        inv_perm: inv_perm.require_device_memory::<i32>(tokens * topk, 4)?,
        weights: weights.map(matrix).transpose()?.unwrap_or_default(),
        out: out.address(),
        tokens,
        m_sum,
    };
    let step = gpu.unpermutes.get(config, |config| Unpermute::prepare(&gpu.device, config))?;
    let stream = current_stream(py, ordinal)?;
    #[allow(unsafe_code)]
    // SAFETY: every address is a live tensor's of the size and type that was checked, in stream order; rows past `m_sum`
    // are skipped by the kernel.
    unsafe { step.launch(stream, &call) }.map_err(exception)
}

/// Why CUDA tensors cannot be used, or None.
#[pyfunction]
pub(crate) fn cuda_unavailable(py: Python<'_>) -> Option<String> {
    let found = expertile::cuda::availability().map_err(exception).and_then(|_| compiler(py));
    found.err().map(|error| error.value(py).to_string())
}

/// Bytes of a workspace that suffice for a call of these sizes, whatever it does: what it brings when it is captured.
#[pyfunction]
pub(crate) fn cuda_workspace_bytes(
    py: Python<'_>,
    ordinal: usize,
    tokens: &Bound<'_, PyAny>,
    local_experts: &Bound<'_, PyAny>,
    hidden: &Bound<'_, PyAny>,
) -> PyResult<usize> {
    const SMALLEST_GROUP: usize = 32;
    let (tokens, experts, hidden) =
        (size("tokens", tokens)?, size("local_num_experts", local_experts)?, size("hidden", hidden)?);
    let route = gpu(py, ordinal)?.route(RouteConfig { topk: 1, ids: Dtype::I64, row_tile: 1 })?;
    let plan = Plan::with_m_sum(0, 1, experts, 1, 0).map_err(exception)?;
    let scales_of_a_token = hidden.div_ceil(SMALLEST_GROUP).next_multiple_of(4) * 4;
    Ok(route.workspace_bytes(&plan).map_err(exception)? + tokens * scales_of_a_token)
}

/// Waits for the current stream and raises what its kernels found wrong with ids since the last time.
#[pyfunction]
pub(crate) fn cuda_check(py: Python<'_>, ordinal: usize) -> PyResult<()> {
    let gpu = gpu(py, ordinal)?;
    let stream = current_stream(py, ordinal)?;
    let workspaces = lock(&gpu.workspaces);
    workspaces.iter().find(|workspace| workspace.stream == stream).map_or(Ok(()), Workspace::check)
}
