//! The grouped GEMM on Hopper: `D[r, n] = sum_k A[r, k] * B[expert of r, n, k]`, live rows only.
//!
//! It walks the worklist that the plan left on the device: no count is needed on the host, padding costs nothing, and
//! the layout's alignment and the GEMM's row tile are independent. `kernel` says which kernels there are and how they
//! cut the work, `config` what a kernel is compiled with, `shared_memory` how many stages it has; docs/kernels/gemm.md
//! explains the kernels themselves.

use super::driver::{Device, DevicePtr, Kernel, Launch, Resources, Source, Stream};
use super::weights::Weights;
use crate::error::{Error, Result};
use arguments::Arguments;
use std::ffi::c_void;
use std::sync::Arc;

mod arguments;
mod config;
mod joined;
mod kernel;
mod shared_memory;

pub use config::GemmConfig;
pub(super) use config::{row_bytes, values_of_block};
pub use joined::JoinedConfig;
pub(super) use joined::{JoinedCall, JoinedGemms};
pub use kernel::{FewRowsCut, GemmKernel, GemmShape, ROW_TILES};
pub(super) use kernel::{GemmKey, LARGE_ROW_TILE, WIDE_ROW_TILE};

/// Where an expert's rows end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RowEnds {
    /// [`super::LayoutPtrs::psum`]: an expert's rows stand together.
    Psum(DevicePtr<i32>),
    /// Of each entry of the worklist, the rows to the end of its segment: an expert may have several.
    Tiles(DevicePtr<i32>),
}

/// What one call works on.
#[derive(Debug, Clone, Copy)]
pub struct GemmCall<'a> {
    /// `[E, N, K]`, of the GEMM's format.
    pub weights: &'a Weights,
    /// `[M_sum, K]`, e4m3 or bf16, 16-byte aligned.
    pub rows: DevicePtr,
    /// Scales of e4m3 rows: one to 128 values, MN-major ([`crate::ScaleFormat::HOPPER`]), 16-byte aligned; absent for
    /// bf16.
    pub scales: Option<DevicePtr<f32>>,
    /// `[M_sum, N]` bf16, 16-byte aligned; with an activation `[M_sum, N / 2]` e4m3. Only live rows are written.
    pub out: DevicePtr,
    /// With an activation, the results' scales, as `scales` has its own; only those of live rows are written. Else
    /// absent.
    pub out_scales: Option<DevicePtr<f32>>,
    /// `[E, N]`, added to the sums before they are rounded; absent for none, and with an activation.
    pub bias: Option<DevicePtr<f32>>,
    /// [`super::LayoutPtrs::header`]. Blocks claim tiles in its last word, so GEMMs of one layout run one after the
    /// other.
    pub header: DevicePtr<i32>,
    /// [`super::LayoutPtrs::worklist`], of the tile's row tile.
    pub worklist: DevicePtr<i32>,
    /// Where the rows of each entry of the worklist end.
    pub ends: RowEnds,
    /// `M_sum`
    pub m_sum: usize,
}

/// The grouped GEMM, prepared.
#[derive(Debug)]
pub struct Gemm {
    device: Device,
    config: GemmConfig,
    kernel: Resident,
    /// For mxfp4 weights whose scales are too far apart to be folded in.
    spread_kernel: Option<Resident>,
}

/// A kernel, and the blocks of it that the device holds.
#[derive(Debug)]
struct Resident {
    kernel: Arc<Kernel>,
    blocks: u32,
}

impl Gemm {
    /// Compiles (or loads) the kernel: the warm-up, after which nothing compiles.
    ///
    /// # Errors
    /// [`Error::Device`] unless the device is a Hopper; as [`GemmConfig::source`]; [`Error::Kernel`] if the kernel does
    /// not compile, [`Error::Cuda`].
    pub fn prepare(device: &Device, config: GemmConfig) -> Result<Self> {
        let source = config.source()?;
        let info = device.info();
        if info.capability != (9, 0) {
            let (major, minor) = info.capability;
            return Err(Error::Device {
                argument: "device",
                actual: format!("{}, compute capability {major}.{minor}", info.name),
                expected: "compute capability 9.0 (Hopper) for the grouped GEMM".into(),
            });
        }
        let load = |source: &Source| -> Result<Resident> {
            let kernel = device.kernel(source, c"gemm")?;
            let shared_bytes = config.shared_bytes();
            kernel.allow_shared_bytes(shared_bytes)?;
            let cluster = config.cluster() as u32;
            let blocks = device.resident_clusters(&kernel, config.kernel.threads(), shared_bytes, cluster)? * cluster;
            Ok(Resident { kernel, blocks })
        };
        let spread_kernel = config.spread_source()?.map(|source| load(&source)).transpose()?;
        Ok(Self { device: device.clone(), config, kernel: load(&source)?, spread_kernel })
    }

    /// What the kernel is specialised for.
    #[must_use]
    pub fn config(&self) -> &GemmConfig {
        &self.config
    }

    /// What the kernel takes of a multiprocessor.
    #[must_use]
    pub fn resources(&self) -> Resources {
        self.kernel.kernel.resources()
    }

    /// Queues the launch: live rows of `out`; nothing else is written.
    ///
    /// # Safety
    /// As [`super::Route::launch`]; the weights' memory outlives the launch.
    ///
    /// # Errors
    /// [`Error::WeightFormat`] for weights of another format; [`Error::Value`] for what does not fit the kernel;
    /// [`Error::Cuda`].
    #[allow(unsafe_code)]
    pub unsafe fn launch(&self, stream: Stream, call: &GemmCall<'_>) -> Result<()> {
        self.check(call)?;
        // SAFETY: the caller's promise.
        unsafe { self.launch_checked(stream, call) }
    }

    /// The same for a call that [`Gemm::check`] has passed.
    ///
    /// # Safety
    /// As [`Gemm::launch`].
    #[allow(unsafe_code)]
    pub(super) unsafe fn launch_checked(&self, stream: Stream, call: &GemmCall<'_>) -> Result<()> {
        if call.m_sum == 0 {
            return Ok(());
        }
        // SAFETY: the caller's promise.
        unsafe {
            match self.config.kernel.row_maps() {
                1 => self.queue::<1>(stream, call),
                2 => self.queue::<2>(stream, call),
                3 => self.queue::<3>(stream, call),
                4 => self.queue::<4>(stream, call),
                _ => self.queue::<6>(stream, call),
            }
        }
    }

    /// Fails for what does not fit the kernel.
    pub(super) fn check(&self, call: &GemmCall<'_>) -> Result<()> {
        self.config.check_call(call)
    }

    /// # Safety
    /// As [`Gemm::launch`]; `PATHS` is the tile's.
    #[allow(unsafe_code)]
    unsafe fn queue<const PATHS: usize>(&self, stream: Stream, call: &GemmCall<'_>) -> Result<()> {
        // The driver encodes maps in a context only.
        let _current = self.device.current()?;
        let arguments = Arguments::<PATHS>::new(&self.config, call)?;
        let resident = self.spread_kernel.as_ref().filter(|_| call.weights.is_spread()).unwrap_or(&self.kernel);
        let shape = Launch {
            blocks: resident.blocks,
            threads: self.config.kernel.threads(),
            shared_bytes: self.config.shared_bytes(),
            cooperative: false,
            overlap: true,
        };
        let pointers = [std::ptr::from_ref(&arguments).cast::<c_void>()];
        // SAFETY: the kernel takes one `GemmArgs` with as many maps; the rest is the caller's promise.
        unsafe { self.device.launch(&resident.kernel, shape, stream, &pointers) }
    }
}
