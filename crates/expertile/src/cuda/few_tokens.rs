//! The whole layer on Hopper for few tokens: one launch.
//!
//! Where tokens are few, weights are read in less time than a chain of launches takes to begin and end. The kernel
//! (kernels/few_tokens, docs/kernels/few_tokens.md) routes, quantizes, multiplies, activates and reduces in one launch,
//! with the bits of the steps by themselves.

mod config;

pub use config::FewTokensConfig;
pub(super) use config::{COUNTER_BYTES, gate_up_bytes_of_slot};

use super::call::DeviceMatrix;
use super::driver::{Device, DevicePtr, Kernel, Launch, Stream, TensorMap};
use super::route::{COUNTERS_OFFSET, RouteCall};
use super::weights::{Weights, weight_bytes};
use crate::error::Result;
use config::THREADS;
use half::bf16;
use std::ffi::c_void;
use std::sync::Arc;

/// What one call works on.
#[derive(Debug, Clone, Copy)]
pub(super) struct FewTokensCall<'a> {
    /// The routing and the state. The layout is not written.
    pub(super) route: RouteCall,
    pub(super) hidden_states: DeviceMatrix,
    pub(super) topk_weights: DeviceMatrix<f32>,
    pub(super) w13: &'a Weights,
    pub(super) w2: &'a Weights,
    /// `[E, 2 I]` and `[E, H]`
    pub(super) biases: [Option<DevicePtr<f32>>; 2],
    /// `[M * topk, 2 I]`
    pub(super) gate_up: DevicePtr<bf16>,
    /// `[M, H]`
    pub(super) output: DevicePtr,
}

/// The kernel's `FewTokensArgs`.
#[repr(C)]
struct Arguments {
    w13: TensorMap,
    w2: TensorMap,
    x: u64,
    x_row_stride: i64,
    router_weights: u64,
    weights_row_stride: i64,
    w13_scales: u64,
    w2_scales: u64,
    biases: [u64; 2],
    gate_up: u64,
    out: u64,
    counters: u64,
}

/// The kernel for up to a number of tokens, prepared.
#[derive(Debug)]
pub(super) struct FewTokens {
    device: Device,
    config: FewTokensConfig,
    kernel: Arc<Kernel>,
}

impl FewTokens {
    /// Compiles (or loads) the kernel.
    pub(super) fn prepare(device: &Device, config: FewTokensConfig) -> Result<Self> {
        let kernel = device.kernel(&config.source()?, c"few_tokens")?;
        kernel.allow_shared_bytes(config.shared_bytes() as u32)?;
        Ok(Self { device: device.clone(), config, kernel })
    }

    /// Queues the launch.
    ///
    /// # Safety
    /// As [`super::Layer::launch`]; operands are those of the layer that this was prepared for, and tokens at most as
    /// many as the kernel is for.
    #[allow(unsafe_code)]
    pub(super) unsafe fn launch(&self, stream: Stream, call: &FewTokensCall<'_>) -> Result<()> {
        let routing = self.config.route().arguments(&call.route)?;
        // The driver encodes maps in a context only.
        let _current = self.device.current()?;
        let map = |weights: &Weights, box_rows| {
            let sizes = (weights.experts(), weights.n(), weights.k());
            TensorMap::encode(weights.values().address(), weight_bytes(self.config.format()), 3, sizes, box_rows)
        };
        let box_rows = self.config.weight_box_rows();
        let arguments = Arguments {
            w13: map(call.w13, box_rows[0])?,
            w2: map(call.w2, box_rows[1])?,
            x: call.hidden_states.ptr.address(),
            x_row_stride: call.hidden_states.row_stride as i64,
            router_weights: call.topk_weights.ptr.address(),
            weights_row_stride: call.topk_weights.row_stride as i64,
            w13_scales: DevicePtr::or_null(call.w13.scales()),
            w2_scales: DevicePtr::or_null(call.w2.scales()),
            biases: call.biases.map(DevicePtr::or_null),
            gate_up: call.gate_up.address(),
            out: call.output.address(),
            counters: call.route.state.byte_add(COUNTERS_OFFSET).address(),
        };
        let shape = Launch {
            blocks: self.device.info().multiprocessors,
            threads: THREADS,
            shared_bytes: self.config.shared_bytes() as u32,
            cooperative: false,
            overlap: true,
        };
        let pointers = [std::ptr::from_ref(&routing).cast::<c_void>(), std::ptr::from_ref(&arguments).cast::<c_void>()];
        // SAFETY: the kernel takes a `RouteArgs` and a `FewTokensArgs`; the rest is the caller's promise.
        unsafe { self.device.launch(&self.kernel, shape, stream, &pointers) }
    }
}
