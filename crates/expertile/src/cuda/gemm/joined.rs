//! Both grouped GEMMs of a layer, and the activation between them, in one launch: for few rows of every expert.
//!
//! docs/kernels/joined.md explains the kernel.

use super::arguments::Arguments as GemmArguments;
use super::shared_memory::{groups, joined_bytes, joined_stages};
use super::{FewRowsCut, GemmCall, GemmConfig, GemmKernel, RowEnds};
use crate::activation::Activation;
use crate::cuda::call::LayoutPtrs;
use crate::cuda::definitions::activation_definitions;
use crate::cuda::driver::{Device, DevicePtr, Kernel, Launch, Source, Stream};
use crate::cuda::weights::Weights;
use crate::error::{Error, Result, checked_add, checked_mul};
use crate::gemm::{ActivationFormat, WeightFormat};
use half::bf16;
use std::ffi::c_void;
use std::sync::Arc;

/// Columns of `gate` (and of `up`) that one consumer has: they divide I.
const PIECE_OUTPUTS: usize = 64;
/// Columns that are activated together.
const ACTIVATED_GROUP: usize = 128;

/// What the launch is specialised for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct JoinedConfig {
    /// What weights are made of.
    pub format: WeightFormat,
    /// What rows are made of: as [`GemmConfig::activation_format`].
    pub activation_format: ActivationFormat,
    /// Whether the scales of some mxfp4 weights are too far apart to be folded into the decoded values
    /// ([`GemmConfig::spread_source`]).
    pub spread: bool,
    /// How both GEMMs are cut.
    pub kernel: GemmKernel,
    /// The activation between them.
    pub activation: Activation,
}

impl JoinedConfig {
    /// Whether there is such a kernel. Narrow tiles of e4m3 multiply less than memory gives, with one warpgroup. mxfp4 and
    /// int4 have no warps of their own for the activation; a multiprocessor with several of their narrow tiles waits
    /// longer than one launch saves, and tiles of more rows are for layers beside which a launch is short.
    pub(in crate::cuda) fn takes(format: WeightFormat, kernel: &GemmKernel, intermediate: usize) -> bool {
        use FewRowsCut::{Broad, Narrow, Plain};
        use WeightFormat::{Bf16, E4m3, Int4, Mxfp4};
        let GemmKernel::FewRows { row_tile, cut } = *kernel else { return false };
        let few = match format {
            E4m3 => row_tile <= 128 && cut == Plain,
            Bf16 => row_tile <= 128 && cut == Plain || cut == Narrow,
            Mxfp4 | Int4 => row_tile <= 64 && matches!(cut, Plain | Broad),
        };
        few && intermediate.is_multiple_of(PIECE_OUTPUTS)
    }

    /// The words of counters that a call has, all zero before the launch: of all rows the groups that are activated; of
    /// each row tile the same, and what of each group is stored.
    pub(in crate::cuda) fn counters(row_tiles: usize, intermediate: usize) -> Result<usize> {
        let of_tiles = checked_mul("words of counters", row_tiles, 1 + intermediate.div_ceil(ACTIVATED_GROUP))?;
        checked_add("words of counters", of_tiles, 1)
    }

    fn gemm(&self) -> GemmConfig {
        let Self { format, activation_format, kernel, .. } = *self;
        GemmConfig { format, activation_format, kernel, activation: None }
    }

    /// One warpgroup more than the GEMMs have activates, but where all registers are the consumers'.
    fn threads(&self) -> u32 {
        self.kernel.threads() + if self.format.has_groups() { 0 } else { 128 }
    }

    fn stages(&self) -> usize {
        match self.format.has_groups() {
            true => groups::stages(&self.gemm().storage(true)),
            false => joined_stages(&self.kernel),
        }
    }

    fn shared_bytes(&self) -> u32 {
        let bytes = match self.format.has_groups() {
            true => groups::bytes(&self.gemm().storage(true), self.stages()),
            false => joined_bytes(&self.kernel, self.format, self.stages()),
        };
        bytes as u32
    }

    /// The kernel's source for this configuration.
    ///
    /// # Errors
    /// [`Error::Name`] for a cut or a format that there is no kernel for; [`Error::WeightFormat`] for rows of another
    /// format than the weights take; as [`ActivateConfig::source`](crate::cuda::ActivateConfig::source).
    pub fn source(&self) -> Result<Source> {
        if !Self::takes(self.format, &self.kernel, PIECE_OUTPUTS) {
            let expected = match self.format.has_groups() {
                true => {
                    "at least 128 outputs by at most 64 rows, one block to a tile, for joined GEMMs of mxfp4 and int4"
                }
                false => "128 outputs by at most 128 rows (bf16: or 64 outputs), weights on M, for joined GEMMs",
            };
            return Err(Error::Name { argument: "kernel", actual: self.kernel.to_string(), expected });
        }
        let gemm = self.gemm();
        gemm.check()?;
        let mut definitions = gemm.definitions(self.stages(), self.threads(), self.shared_bytes());
        let (file, text) = match self.format.has_groups() {
            true => {
                definitions.extend(gemm.group_definitions(self.spread));
                ("sm90_joined_groups.cu", include_str!("../kernels/joined/sm90_joined_groups.cu"))
            }
            false => {
                definitions.push(("HOST_OUTPUTS", self.kernel.outputs() as i64));
                ("sm90_joined_few_rows.cu", include_str!("../kernels/joined/sm90_joined_few_rows.cu"))
            }
        };
        definitions.push(("HOST_JOINED", 1));
        definitions.extend(activation_definitions(&self.activation)?);
        Ok(Source::new(file, text, definitions))
    }
}

/// What one call works on: operands of the layer that it is for, which have passed the layer's checks.
#[derive(Debug, Clone, Copy)]
pub(in crate::cuda) struct JoinedCall<'a> {
    pub(in crate::cuda) weights: [&'a Weights; 2],
    pub(in crate::cuda) biases: [Option<DevicePtr<f32>>; 2],
    /// Of each GEMM.
    pub(in crate::cuda) rows: [DevicePtr; 2],
    /// Of its e4m3 rows.
    pub(in crate::cuda) scales: [Option<DevicePtr<f32>>; 2],
    /// `gate | up`, and the second's results.
    pub(in crate::cuda) out: [DevicePtr<bf16>; 2],
    pub(in crate::cuda) layout: LayoutPtrs,
    pub(in crate::cuda) m_sum: usize,
    /// Zeroed by the routing.
    pub(in crate::cuda) counters: DevicePtr<u32>,
}

/// The kernel's `JoinedArgs`, with as many maps of rows as it has.
#[repr(C)]
struct Arguments<const PATHS: usize> {
    gemms: [GemmArguments<PATHS>; 2],
    activated: u64,
    activated_scales: u64,
    counters: u64,
}

/// The launch, prepared.
#[derive(Debug)]
pub(in crate::cuda) struct JoinedGemms {
    device: Device,
    config: JoinedConfig,
    kernel: Arc<Kernel>,
    blocks: u32,
}

impl JoinedGemms {
    /// Compiles (or loads) the kernel, for a device that the GEMMs have been prepared for.
    pub(in crate::cuda) fn prepare(device: &Device, config: JoinedConfig) -> Result<Self> {
        let kernel = device.kernel(&config.source()?, c"joined_gemms")?;
        kernel.allow_shared_bytes(config.shared_bytes())?;
        let blocks = device.resident_clusters(&kernel, config.threads(), config.shared_bytes(), 1)?;
        Ok(Self { device: device.clone(), config, kernel, blocks })
    }

    /// Queues the launch: live rows of both GEMMs' results and of the activated ones.
    ///
    /// # Safety
    /// As [`super::Gemm::launch`].
    #[allow(unsafe_code)]
    pub(in crate::cuda) unsafe fn launch(&self, stream: Stream, call: &JoinedCall<'_>) -> Result<()> {
        if call.m_sum == 0 {
            return Ok(());
        }
        // SAFETY: the caller's promise.
        unsafe {
            match self.config.kernel.row_maps() {
                1 => self.queue::<1>(stream, call),
                2 => self.queue::<2>(stream, call),
                _ => self.queue::<4>(stream, call),
            }
        }
    }

    /// # Safety
    /// As [`JoinedGemms::launch`]; `PATHS` is the tile's.
    #[allow(unsafe_code)]
    unsafe fn queue<const PATHS: usize>(&self, stream: Stream, call: &JoinedCall<'_>) -> Result<()> {
        let config = self.config.gemm();
        // The driver encodes maps in a context only.
        let _current = self.device.current()?;
        let gemm = |i: usize| {
            let gemm = GemmCall {
                weights: call.weights[i],
                rows: call.rows[i],
                scales: call.scales[i],
                out: call.out[i].cast(),
                out_scales: None,
                bias: call.biases[i],
                header: call.layout.header,
                worklist: call.layout.worklist,
                ends: RowEnds::Psum(call.layout.psum),
                m_sum: call.m_sum,
            };
            config.check_call(&gemm)?;
            GemmArguments::<PATHS>::new(&config, &gemm)
        };
        let arguments = Arguments {
            gemms: [gemm(0)?, gemm(1)?],
            activated: call.rows[1].address(),
            activated_scales: DevicePtr::or_null(call.scales[1]),
            counters: call.counters.address(),
        };
        let shape = Launch {
            blocks: self.blocks,
            threads: self.config.threads(),
            shared_bytes: self.config.shared_bytes(),
            cooperative: false,
            overlap: true,
        };
        let pointers = [std::ptr::from_ref(&arguments).cast::<c_void>()];
        // SAFETY: the kernel takes one `JoinedArgs` with as many maps; the rest is the caller's promise.
        unsafe { self.device.launch(&self.kernel, shape, stream, &pointers) }
    }
}
