//! What a matrix product can do.

use super::clock::Clock;
use super::{random_bytes, uploaded};
use crate::cuda::{
    ALIGNMENT, Device, Gemm, GemmBuffers, GemmConfig, GemmKernel, GemmShape, LayoutBuffers, Route, RouteConfig,
    RoutingBuffers, Stream, Tensor2, Weights,
};
use crate::dtype::Dtype;
use crate::error::Result;
use crate::gemm::{WEIGHT_BLOCK, WeightFormat};
use crate::plan::{Plan, TokenExperts};
use crate::quantize::ScaleFormat;

/// Operations per second of the GEMM where nothing but the matrix units limits it: one expert, `[16384, 8192]` times
/// `[8192, 8192]`, random bits.
///
/// # Errors
/// As [`Gemm::prepare`]; [`Error::Device`](crate::Error::Device) with a driver that is too old to time.
#[allow(unsafe_code)]
pub fn matrix_flops_per_second(device: &Device, format: WeightFormat) -> Result<f64> {
    const ROWS: usize = 16384;
    const WIDTH: usize = 8192;
    let shape = GemmShape { n: WIDTH, k: WIDTH, format, experts: 1, rows: ROWS, most_rows: ROWS };
    let kernel = GemmKernel::choose(&shape, device.info().multiprocessors as usize);
    let row_tile = kernel.row_tile();
    let gemm = Gemm::prepare(device, GemmConfig { format, kernel, activation: None })?;
    let route = Route::prepare(device, RouteConfig { topk: 1, ids: Dtype::I32, row_tile })?;
    let plan = Plan::tight(ROWS, 1, 1, ALIGNMENT, TokenExperts::Distinct)?;

    let weights = random_bytes(format, WIDTH * WIDTH);
    let values = uploaded(device, &weights)?;
    let rows = uploaded(device, &[&weights[..], &weights[..]].concat())?;
    let block_scales = uploaded(device, &vec![1f32; WIDTH / WEIGHT_BLOCK * (WIDTH / WEIGHT_BLOCK)])?;
    let row_scales = uploaded(device, &vec![1f32; ScaleFormat::HOPPER.words(plan.m_sum(), WIDTH)?])?;
    let ids = uploaded(device, &vec![0i32; ROWS])?;
    let lists = device.allocate(LayoutBuffers::space_bytes(&plan, row_tile)?)?;
    let workspace = device.allocate(route.workspace_bytes(&plan)?)?;
    let out = device.allocate(2 * plan.m_sum() * WIDTH)?;
    let layout = LayoutBuffers::carve(lists.address(), &plan, row_tile)?;
    let routing = RoutingBuffers {
        ids: Tensor2 { address: ids.address(), row_stride: 1, col_stride: 1 },
        expert_map: 0,
        global_experts: 1,
    };
    let call = GemmBuffers {
        rows: rows.address(),
        scales: row_scales.address(),
        out: out.address(),
        out_scales: 0,
        header: layout.header,
        worklist: layout.worklist,
        psum: layout.psum,
        m_sum: plan.m_sum(),
        alignment: plan.alignment(),
    };
    // SAFETY: every buffer is as large as its step says and outlives the waits of `check` and of the clock.
    unsafe {
        let weights = Weights::from_device(format, (1, WIDTH, WIDTH), values.address(), block_scales.address())?;
        route.initialise_workspace(Stream(0), workspace.address())?;
        route.launch(Stream(0), &plan, &routing, &layout, workspace.address())?;
        route.check(Stream(0), &plan, &routing, workspace.address())?;
        let clock = Clock::new(device)?;
        let (seconds, _) = clock.graph_and_eager(|stream| gemm.launch(stream, &weights, &call))?;
        Ok((2 * ROWS * WIDTH * WIDTH) as f64 / seconds)
    }
}
