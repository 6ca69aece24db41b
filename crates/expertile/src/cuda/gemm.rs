//! The grouped GEMM on Hopper: `D[r, n] = sum_k A[r, k] * B[expert of r, n, k]`, live rows only.
//!
//! It walks the worklist that the plan left on the device: no count is needed on the host, padding costs nothing, and
//! the layout's alignment and the GEMM's row tile are independent. `kernel` says which kernels there are and how they
//! cut the work, `config` what a kernel is compiled with, `shared_memory` how many stages it has; docs/kernels/gemm.md
//! explains the kernels themselves.

use super::arguments::require_int;
use super::driver::{Device, DevicePtr, Kernel, Launch, Resources, Source, Stream, TensorMap};
use super::weights::{Weights, weight_bytes};
use crate::error::{Error, Result, checked_mul};
use crate::gemm::{ActivationFormat, WEIGHT_BLOCK};
use std::ffi::c_void;
use std::sync::Arc;

mod config;
mod kernel;
mod shared_memory;

pub use config::GemmConfig;
pub(super) use config::{row_bytes, values_of_block};
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

/// The kernel's `GemmArgs`, with as many maps of rows as any kernel has.
#[repr(C)]
struct Arguments<const PATHS: usize> {
    weights: TensorMap,
    rows: [TensorMap; PATHS],
    row_scales: u64,
    weight_scales: u64,
    out: u64,
    out_scales: u64,
    header: u64,
    worklist: u64,
    psum: u64,
    rows_left: u64,
    n: i32,
    k: i32,
    m_sum: i32,
    f16_scales: i32,
    bias: u64,
    packed: u64,
    exponents: u64,
    spread: u64,
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
        let (weights, format) = (call.weights, self.config.format);
        if weights.format() != format {
            return Err(Error::WeightFormat {
                argument: "weights",
                actual: weights.format().name(),
                expected: format.name(),
            });
        }
        weights.require_arranged(self.config.activation_format)?;
        let splits = self.config.kernel.splits();
        let too_short = (splits - 1) * values_of_block(self.config.activation_format);
        if weights.k() <= too_short {
            return Err(Error::value("k", weights.k(), format!("more than {too_short}, for a K in {splits} parts")));
        }
        require_int("m_sum", call.m_sum)?;
        call.rows.require_aligned("rows", 16)?;
        call.out.require_aligned("out", 16)?;
        call.header.require_aligned("header", 4)?;
        call.worklist.require_aligned("worklist", 8)?;
        match call.ends {
            RowEnds::Psum(psum) => psum.require_aligned("psum", 4)?,
            RowEnds::Tiles(rows_left) => rows_left.require_aligned("rows_left", 4)?,
        }
        if let Some(bias) = call.bias {
            bias.require_aligned("bias", 4)?;
            if self.config.activation.is_some() {
                return Err(Error::value("bias", bias.address() as usize, "none, for a GEMM with an activation"));
            }
        }
        if self.config.activation.is_some() {
            DevicePtr::require(call.out_scales, "out_scales", 4)?;
            if !weights.n().is_multiple_of(2 * WEIGHT_BLOCK) {
                return Err(Error::value("n", weights.n(), "a multiple of 256 for a GEMM with an activation"));
            }
        }
        if self.config.activation_format == ActivationFormat::E4m3 {
            DevicePtr::require(call.scales, "scales", 16)?;
            let words = checked_mul("scales", call.m_sum.next_multiple_of(4), weights.k().div_ceil(WEIGHT_BLOCK))?;
            require_int("scales", words)?;
        }
        Ok(())
    }

    /// # Safety
    /// As [`Gemm::launch`]; `PATHS` is the tile's.
    #[allow(unsafe_code)]
    unsafe fn queue<const PATHS: usize>(&self, stream: Stream, call: &GemmCall<'_>) -> Result<()> {
        let weights = call.weights;
        // The driver encodes maps in a context only.
        let _current = self.device.current()?;
        let kernel = &self.config.kernel;
        let (n, k) = (weights.n(), weights.k());
        let arranged = weights.require_arranged(self.config.activation_format)?;
        let bytes = row_bytes(self.config.activation_format);
        let mut rows = [TensorMap::EMPTY; PATHS];
        for (path, map) in rows.iter_mut().enumerate() {
            let box_rows = (path + 1) * kernel.row_step() / kernel.shared();
            *map = TensorMap::encode(call.rows.address(), bytes, 2, (1, call.m_sum, k), box_rows)?;
        }
        let box_rows = self.config.weight_box_rows();
        let (psum, rows_left) = match call.ends {
            RowEnds::Psum(psum) => (psum.address(), 0),
            RowEnds::Tiles(rows_left) => (0, rows_left.address()),
        };
        let map = match arranged {
            None => {
                let bytes = weight_bytes(self.config.format);
                TensorMap::encode(weights.values().address(), bytes, 3, (weights.experts(), n, k), box_rows)?
            }
            Some(_) => TensorMap::EMPTY,
        };
        let arguments = Arguments {
            weights: map,
            rows,
            row_scales: DevicePtr::or_null(call.scales),
            weight_scales: DevicePtr::or_null(weights.scales()),
            out: call.out.address(),
            out_scales: DevicePtr::or_null(call.out_scales),
            header: call.header.address(),
            worklist: call.worklist.address(),
            psum,
            rows_left,
            n: require_int("n", n)?,
            k: require_int("k", k)?,
            m_sum: require_int("m_sum", call.m_sum)?,
            f16_scales: i32::from(weights.has_f16_scales()),
            bias: DevicePtr::or_null(call.bias),
            packed: arranged.map_or(0, |_| weights.values().address()),
            exponents: arranged.map_or(0, |arranged| DevicePtr::or_null(arranged.exponents)),
            spread: arranged.map_or(0, |arranged| DevicePtr::or_null(arranged.spread)),
        };
        let resident = self.spread_kernel.as_ref().filter(|_| weights.is_spread()).unwrap_or(&self.kernel);
        let shape = Launch {
            blocks: resident.blocks,
            threads: kernel.threads(),
            shared_bytes: self.config.shared_bytes(),
            cooperative: false,
            overlap: true,
        };
        let pointers = [std::ptr::from_ref(&arguments).cast::<c_void>()];
        // SAFETY: the kernel takes one `GemmArgs` with as many maps; the rest is the caller's promise.
        unsafe { self.device.launch(&resident.kernel, shape, stream, &pointers) }
    }
}
