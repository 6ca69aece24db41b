//! What a matrix product can do.

use super::clock::Clock;
use super::random_bytes;
use crate::cuda::{
    ALIGNMENT, Device, DeviceBuffer, DeviceMatrix, Gemm, GemmCall, GemmConfig, GemmKernel, GemmShape, LayoutPtrs,
    Route, RouteCall, RouteConfig, RoutingPtrs, RowEnds, STATE_BYTES, Stream, Weights,
};
use crate::dtype::Dtype;
use crate::error::Result;
use crate::gemm::{WEIGHT_BLOCK, WeightFormat};
use crate::plan::{Plan, TokenExperts};
use crate::quantize::ScaleFormat;

/// Operations per second of the GEMM where nothing but the matrix units limits it: one expert, `[16384, 8192]` times
/// `[8192, 8192]`, random bits. That of mxfp4 and int4 is that of the rows that they usually go with.
///
/// # Errors
/// As [`Gemm::prepare`]; [`Error::Device`](crate::Error::Device) with a driver that is too old to time.
#[allow(unsafe_code)]
pub fn matrix_flops_per_second(device: &Device, format: WeightFormat) -> Result<f64> {
    const ROWS: usize = 16384;
    const WIDTH: usize = 8192;
    let format = match format {
        WeightFormat::Mxfp4 => WeightFormat::E4m3,
        WeightFormat::Int4 => WeightFormat::Bf16,
        format => format,
    };
    let activation_format = format.usual_activations();
    let shape = GemmShape { n: WIDTH, k: WIDTH, format, activation_format, experts: 1, rows: ROWS, most_rows: ROWS };
    let kernel = GemmKernel::choose(&shape, device.info().multiprocessors as usize);
    let row_tile = kernel.row_tile();
    let gemm = Gemm::prepare(device, GemmConfig { format, activation_format, kernel, activation: None })?;
    let route = Route::prepare(device, RouteConfig { topk: 1, ids: Dtype::I32, row_tile })?;
    let plan = Plan::tight(ROWS, 1, 1, ALIGNMENT, TokenExperts::Distinct)?;

    let weights = random_bytes(format, WIDTH * WIDTH);
    let values = device.upload(&weights)?;
    let rows = device.upload(&[&weights[..], &weights[..]].concat())?;
    let block_scales = device.upload(&vec![1f32; WIDTH / WEIGHT_BLOCK * (WIDTH / WEIGHT_BLOCK)])?;
    let row_scales = device.upload(&vec![1f32; ScaleFormat::HOPPER.words(plan.m_sum(), WIDTH)?])?;
    let ids = device.upload(&vec![0i32; ROWS])?;
    let lists: DeviceBuffer = device.allocate(LayoutPtrs::space_bytes(&plan, row_tile)?)?;
    let state: DeviceBuffer = device.allocate(STATE_BYTES)?;
    let workspace: DeviceBuffer = device.allocate(route.workspace_bytes(&plan)?)?;
    let out: DeviceBuffer = device.allocate(2 * plan.m_sum() * WIDTH)?;
    let layout = LayoutPtrs::carve(lists.ptr(), &plan, row_tile)?;
    let routing =
        RoutingPtrs { ids: DeviceMatrix::row_major(ids.ptr().cast(), 1), expert_map: None, global_experts: 1 };
    let route_call = RouteCall { plan, routing, layout, state: state.ptr(), workspace: workspace.ptr() };
    // SAFETY: every buffer is as large as its step says and outlives the waits of `check` and of the clock.
    unsafe {
        let scales = Some(block_scales.ptr());
        let weights = Weights::from_device(format, (1, WIDTH, WIDTH), values.ptr(), scales)?;
        let call = GemmCall {
            weights: &weights,
            rows: rows.ptr(),
            scales: Some(row_scales.ptr()),
            out: out.ptr(),
            out_scales: None,
            bias: None,
            header: layout.header,
            worklist: layout.worklist,
            ends: RowEnds::Psum(layout.psum),
            m_sum: plan.m_sum(),
        };
        route.initialise_state(Stream(0), state.ptr())?;
        route.launch(Stream(0), &route_call)?;
        route.check(Stream(0), &route_call)?;
        let clock = Clock::new(device)?;
        let (seconds, _) = clock.graph_and_eager(|stream| gemm.launch(stream, &call))?;
        Ok((2 * ROWS * WIDTH * WIDTH) as f64 / seconds)
    }
}
