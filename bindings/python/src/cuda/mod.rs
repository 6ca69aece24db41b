//! The CUDA backend on tensors: their addresses, the current stream, and what is kept between calls.
//!
//! Kept, for the life of the process: a device and its prepared steps (a kernel is compiled by the first call that
//! needs it), and a workspace for each stream. A call that is being captured into a graph has a workspace of its own.

mod expanded;
mod expert_parallel;
mod gemm;
mod gpu;
mod layer;

pub(crate) use expert_parallel::CudaExpertParallelLayer;
pub(crate) use gemm::CudaGemm;
pub(crate) use layer::CudaLayer;

use crate::array::{Array, Element};
use crate::error::exception;
use crate::operands::{Ids, LayoutTarget, Lists, Rows, padding};
use crate::tensor::{self, Form};
use expertile::cuda::{
    DeviceBuffer, DeviceMatrix, DevicePtr, LayoutPtrs, Permute, PermuteCall, PermuteConfig, QuantizePermute,
    QuantizePermuteCall, QuantizePermuteConfig, Route, RouteCall, RouteConfig, RoutingPtrs, RowsPtrs, STATE_BYTES,
    Stream, Unpermute, UnpermuteCall, UnpermuteConfig,
};
use expertile::layout::List;
use expertile::{Dtype, Layout, Plan, ScaleFormat};
use gpu::{Gpu, Workspace, compiler, current_stream, gpu};
use pyo3::prelude::*;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn ids_dtype(ids: &Ids<'_>) -> PyResult<Dtype> {
    match ids.ids.element() {
        Element::I32 => Ok(Dtype::I32),
        Element::I64 => Ok(Dtype::I64),
        _ => Err(ids.ids.dtype_error("int32 or int64")),
    }
}

/// Ids, the map if there is one, and how many experts the ids count.
fn routing(ids: &Array<'_>, map: Option<&Array<'_>>, local_experts: usize) -> PyResult<RoutingPtrs> {
    let (expert_map, global_experts) = match map {
        None => (None, local_experts),
        Some(map) => {
            let &[len] = map.shape() else { return Err(map.shape_error("one dimension")) };
            if len == 0 {
                return Err(map.shape_error("at least one entry"));
            }
            map.require_strides(&[1])?;
            (Some(DevicePtr::new(map.require_device_memory::<i32>(len, 4)?)), len)
        }
    };
    Ok(RoutingPtrs { ids: matrix(ids)?, expert_map, global_experts })
}

fn ptr<T>(array: &Array<'_>) -> DevicePtr<T> {
    DevicePtr::new(array.address())
}

fn matrix<T>(array: &Array<'_>) -> PyResult<DeviceMatrix<T>> {
    let (row_stride, col_stride) = array.matrix_strides()?;
    Ok(DeviceMatrix { ptr: ptr(array), row_stride, col_stride })
}

/// A layout's lists, then what a GPU adds.
fn layout(target: &LayoutTarget<'_>) -> PyResult<LayoutPtrs> {
    let plan = &target.plan;
    let words = Layout::device_space_len(plan).map_err(exception)?;
    let next = &mut target.lists.require_device_memory::<i32>(words, 4)?;
    let take = |next: &mut u64, list: &List| {
        let bytes = 4 * list.len(plan).map_err(exception)? as u64;
        *next += bytes;
        Ok::<_, PyErr>(DevicePtr::new(*next - bytes))
    };
    let [expert_num_tokens, expert_start, psum, m_indices, inv_perm] = &Layout::LISTS;
    let [_spare, header, worklist, row_tokens] = &Layout::DEVICE_LISTS;
    Ok(LayoutPtrs {
        expert_num_tokens: take(next, expert_num_tokens)?,
        expert_start: take(next, expert_start)?,
        psum: take(next, psum)?,
        m_indices: take(next, m_indices)?,
        inv_perm: take(next, inv_perm)?,
        header: {
            *next = next.next_multiple_of(8);
            take(next, header)?
        },
        worklist: take(next, worklist)?,
        row_tokens: take(next, row_tokens)?,
    })
}

/// A call on its way: the device, the stream, the routing.
struct Call<'py> {
    py: Python<'py>,
    gpu: Arc<Gpu>,
    stream: Stream,
    plan: Plan,
    routing: RoutingPtrs,
    route_config: RouteConfig,
    route: Arc<Route>,
}

/// Memory that a call works in: a tensor's, or that of the stream, which no other thread's call gets in between.
/// Nothing of Python's is called while it is held, or a thread could wait for it that holds the interpreter's lock.
struct Space<'a, 'py> {
    state: DevicePtr,
    workspace: DevicePtr,
    _tensor: Option<Array<'py>>,
    _held: Option<MutexGuard<'a, Vec<Workspace>>>,
}

impl<'py> Call<'py> {
    fn new(py: Python<'py>, ordinal: usize, ids: &Ids<'_>, plan: Plan) -> PyResult<Self> {
        let gpu = gpu(py, ordinal)?;
        let stream = current_stream(py, ordinal)?;
        let config = RouteConfig { topk: plan.topk(), ids: ids_dtype(ids)?, row_tile: plan.alignment() };
        let route = gpu.route(config)?;
        Ok(Self {
            py,
            gpu,
            stream,
            plan,
            routing: routing(&ids.ids, ids.map.as_ref(), ids.local_experts)?,
            route_config: config,
            route,
        })
    }

    /// `bytes` of workspace: the stream's, or a new tensor where the call is being captured into a graph, to which it
    /// then belongs.
    fn workspace(&self, bytes: expertile::Result<usize>) -> PyResult<Space<'_, 'py>> {
        let bytes = bytes.map_err(exception)?;
        #[allow(unsafe_code)]
        // SAFETY: the stream is torch's current one.
        if unsafe { self.gpu.device.is_capturing(self.stream) }.map_err(exception)? {
            let bytes = bytes + STATE_BYTES;
            let tensor = tensor::empty(self.py, self.gpu.ordinal, Form::list(Element::U8, bytes))?;
            let state: DevicePtr = DevicePtr::new(tensor.require_device_memory::<u8>(bytes, 16)?);
            #[allow(unsafe_code)]
            // SAFETY: the tensor is alive during the call, and its allocator hands its memory on in stream order.
            unsafe { self.route.initialise_state(self.stream, state) }.map_err(exception)?;
            let workspace = state.byte_add(STATE_BYTES);
            return Ok(Space { state, workspace, _tensor: Some(tensor), _held: None });
        }
        let mut workspaces = lock(&self.gpu.workspaces);
        let found = workspaces.iter().position(|workspace| workspace.stream == self.stream);
        let index = match found {
            Some(index) if workspaces[index].buffer.bytes() >= bytes => index,
            _ => {
                if let Some(small) = found.map(|index| workspaces.swap_remove(index)) {
                    // Freeing waits for the device, so this is where what its kernels found is told.
                    small.check()?;
                }
                let buffer = self.gpu.device.allocate(bytes.next_power_of_two()).map_err(exception)?;
                let state: DeviceBuffer = self.gpu.device.allocate(STATE_BYTES).map_err(exception)?;
                #[allow(unsafe_code)]
                // SAFETY: the state is new and lives until it is replaced here, which waits for its last use.
                unsafe { self.route.initialise_state(self.stream, state.ptr()) }.map_err(exception)?;
                workspaces.push(Workspace { stream: self.stream, state, buffer, last: None });
                workspaces.len() - 1
            }
        };
        let (state, workspace) = (workspaces[index].state.ptr(), workspaces[index].buffer.ptr());
        let call =
            RouteCall { plan: self.plan, routing: self.routing, layout: LayoutPtrs::default(), state, workspace };
        workspaces[index].last = Some((self.route.clone(), call));
        Ok(Space { state, workspace, _tensor: None, _held: Some(workspaces) })
    }

    fn launch_route(&self, layout: &LayoutPtrs, space: &Space<'_, '_>) -> PyResult<()> {
        #[allow(unsafe_code)]
        // SAFETY: every address is a live tensor's, of the size and type that was checked, and `Apart` has seen that
        // what is written overlaps nothing else. torch hands memory on in stream order, and the workspace is this
        // stream's.
        unsafe { self.route.launch(self.stream, &self.route_call(layout, space)) }.map_err(exception)
    }

    fn route_call(&self, layout: &LayoutPtrs, space: &Space<'_, '_>) -> RouteCall {
        let Space { state, workspace, .. } = *space;
        RouteCall { plan: self.plan, routing: self.routing, layout: *layout, state, workspace }
    }

    fn permute(&self, config: PermuteConfig) -> PyResult<Arc<Permute>> {
        self.gpu.permutes.get(config, |config| Permute::prepare(&self.gpu.device, config))
    }

    /// Layout, then rows.
    fn launch_permute(
        &self,
        step: &Permute,
        rows: &RowsPtrs,
        layout: &LayoutPtrs,
        workspace: &Space<'_, '_>,
    ) -> PyResult<()> {
        self.launch_route(layout, workspace)?;
        #[allow(unsafe_code)]
        // SAFETY: as in `launch_route`; shapes and strides were checked against the configuration.
        unsafe { step.launch(self.stream, &PermuteCall { plan: self.plan, rows: *rows, layout: *layout }) }
            .map_err(exception)
    }
}

pub(crate) fn build_layout(py: Python<'_>, ordinal: usize, target: &LayoutTarget<'_>) -> PyResult<()> {
    let call = Call::new(py, ordinal, &target.ids, target.plan)?;
    let layout = layout(target)?;
    let workspace = call.workspace(call.route.workspace_bytes(&call.plan))?;
    call.launch_route(&layout, &workspace)
}

impl Rows<'_> {
    fn prepare(&self, plan: &Plan) -> PyResult<(PermuteConfig, RowsPtrs)> {
        let (tokens, hidden) = self.x.matrix_shape("[M, H]")?;
        let x = matrix::<u8>(self.x)?;
        let row_bytes = if tokens > 1 { x.row_stride * self.x.item_bytes() } else { 16 };
        let common = self.x.address() | self.out.address() | row_bytes as u64 | 16;
        let config = PermuteConfig {
            topk: plan.topk(),
            hidden,
            dtype: self.dtype()?,
            scales: self.scales.map(|(_, _, format)| format),
            padding: padding(self.zero_padding),
            alignment_bytes: 1 << common.trailing_zeros(),
        };
        let (x_scales, scales) = match self.scales {
            Some((x_scales, scales, _)) => (Some(matrix(x_scales)?), Some(ptr(scales))),
            None => (None, None),
        };
        Ok((config, RowsPtrs { x, x_scales, weights: None, out: ptr(self.out), scales }))
    }

    fn dtype(&self) -> PyResult<Dtype> {
        match self.x.element() {
            Element::E4m3 => Ok(Dtype::E4m3),
            Element::U8 | Element::I8 if self.scales.is_some() => Ok(Dtype::E4m3),
            Element::U8 | Element::I8 => Ok(Dtype::U8),
            Element::Bf16 => Ok(Dtype::Bf16),
            Element::F16 => Ok(Dtype::F16),
            Element::F32 => Ok(Dtype::F32),
            Element::I32 => Ok(Dtype::I32),
            Element::E8m0 | Element::I64 | Element::Other => {
                Err(self.x.dtype_error("float8_e4m3fn, bfloat16, float16, float32, int32 or uint8"))
            }
        }
    }
}

pub(crate) fn permute(py: Python<'_>, ordinal: usize, target: &LayoutTarget<'_>, rows: &Rows<'_>) -> PyResult<()> {
    let call = Call::new(py, ordinal, &target.ids, target.plan)?;
    let layout = layout(target)?;
    let (config, rows) = rows.prepare(&call.plan)?;
    let step = call.permute(config)?;
    let workspace = call.workspace(call.route.workspace_bytes(&call.plan))?;
    call.launch_permute(&step, &rows, &layout, &workspace)
}

/// As `permute`, where not every list is wanted.
pub(crate) fn permute_to_lists(
    py: Python<'_>,
    ordinal: usize,
    ids: &Ids<'_>,
    plan: Plan,
    rows: &Rows<'_>,
    lists: &Lists<'_>,
) -> PyResult<()> {
    let call = Call::new(py, ordinal, ids, plan)?;
    let (config, rows) = rows.prepare(&plan)?;
    let step = call.permute(config)?;
    let bytes = call.route.workspace_bytes(&plan).map_err(exception)?;
    let all = LayoutPtrs::space_bytes(&plan, plan.alignment()).map_err(exception)?;
    let workspace = call.workspace(Ok(bytes + all))?;
    let scratch = LayoutPtrs::carve(workspace.workspace.byte_add(bytes), &plan, plan.alignment());
    let mut layout = scratch.map_err(exception)?;
    // An empty tensor is nowhere; its list then has room in the scratch, of which nothing is written.
    let of_tensor = |tensor: Option<&Array<'_>>| tensor.map(ptr).filter(|&ptr| ptr != DevicePtr::default());
    layout.inv_perm = of_tensor(Some(lists.inv_perm)).unwrap_or(layout.inv_perm);
    layout.psum = of_tensor(lists.psum).unwrap_or(layout.psum);
    layout.m_indices = of_tensor(lists.m_indices).unwrap_or(layout.m_indices);
    call.launch_permute(&step, &rows, &layout, &workspace)
}

/// Rows quantized on their way.
pub(crate) fn quantize_permute(
    py: Python<'_>,
    ordinal: usize,
    target: &LayoutTarget<'_>,
    (x, weights, out, scales): (&Array<'_>, Option<&Array<'_>>, &Array<'_>, &Array<'_>),
    format: ScaleFormat,
    zero_padding: bool,
) -> PyResult<()> {
    let input = match x.element() {
        Element::Bf16 => Dtype::Bf16,
        Element::F16 => Dtype::F16,
        _ => return Err(x.dtype_error("bfloat16 or float16 on a GPU")),
    };
    let (tokens, hidden) = x.matrix_shape("[M, H]")?;
    let rows_x = matrix::<u8>(x)?;
    let call = Call::new(py, ordinal, &target.ids, target.plan)?;
    let layout = layout(target)?;
    if let Some(weights) = weights {
        weights.require_shape(&[tokens, 1])?;
        weights.require_dtype::<f32>()?;
    }
    let config = QuantizePermuteConfig {
        route: call.route_config,
        hidden,
        input,
        format,
        padding: padding(zero_padding),
        weighted: weights.is_some(),
        aligned: x.address().is_multiple_of(16) && (rows_x.row_stride * 2).is_multiple_of(16),
    };
    let step = call.gpu.quantize_permutes.get(config, |config| QuantizePermute::prepare(&call.gpu.device, config))?;
    let rows = RowsPtrs {
        x: rows_x,
        x_scales: None,
        weights: weights.map(matrix).transpose()?,
        out: ptr(out),
        scales: Some(ptr(scales)),
    };
    let Space { state, workspace, .. } = &call.workspace(step.workspace_bytes(&call.plan))?;
    let (plan, routing) = (call.plan, call.routing);
    let quantize_call = QuantizePermuteCall { plan, routing, rows, layout, state: *state, workspace: *workspace };
    #[allow(unsafe_code)]
    // SAFETY: as in `launch_route`; shapes and strides were checked against the configuration.
    unsafe { step.launch(call.stream, &quantize_call) }.map_err(exception)
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
        weights.require_dtype::<f32>()?;
    }
    let call = UnpermuteCall {
        rows: ptr(rows),
        inv_perm: DevicePtr::new(inv_perm.require_device_memory::<i32>(tokens * topk, 4)?),
        weights: weights.map(matrix).transpose()?,
        out: ptr(out),
        tokens,
        m_sum,
    };
    let step = gpu.unpermutes.get(config, |config| Unpermute::prepare(&gpu.device, config))?;
    let stream = current_stream(py, ordinal)?;
    #[allow(unsafe_code)]
    // SAFETY: every address is a live tensor's of the size and type that was checked, in stream order; rows past
    // `m_sum` are skipped by the kernel.
    unsafe { step.launch(stream, &call) }.map_err(exception)
}

/// Why CUDA tensors cannot be used, or None.
#[pyfunction]
pub(crate) fn cuda_unavailable(py: Python<'_>) -> Option<String> {
    let found = expertile::cuda::availability().map_err(exception).and_then(|_| compiler(py));
    found.err().map(|error| error.value(py).to_string())
}

/// Waits for the current stream and raises what its kernels found wrong with ids since the last time.
#[pyfunction]
pub(crate) fn cuda_check(py: Python<'_>, ordinal: usize) -> PyResult<()> {
    let gpu = gpu(py, ordinal)?;
    let stream = current_stream(py, ordinal)?;
    let workspaces = lock(&gpu.workspaces);
    workspaces.iter().find(|workspace| workspace.stream == stream).map_or(Ok(()), Workspace::check)
}
