//! The grouped GEMM on Hopper: `D[r, n] = sum_k A[r, k] * B[expert of r, n, k]`, live rows only.
//!
//! It walks the worklist that the plan left on the device: no count is needed on the host, padding costs nothing, and the
//! layout's alignment and the GEMM's row tile know nothing of each other.

use super::arguments::require_int;
use super::cost;
use super::definitions::activation_definitions;
use super::driver::{Device, DevicePtr, Kernel, Launch, Resources, Source, Stream, TensorMap};
use super::weights::Weights;
use crate::activation::Activation;
use crate::error::{Error, Result, checked_mul};
use crate::gemm::{WEIGHT_BLOCK, WeightFormat};
use std::ffi::c_void;
use std::fmt;
use std::sync::Arc;

/// Weight rows (outputs) of most tiles.
const OUTPUTS: usize = 128;
/// Outputs of a narrow tile, and of a warpgroup of any that has weights on the matrix unit's M side.
pub const NARROW_OUTPUTS: usize = 64;
/// Outputs of the large tile.
pub const LARGE_OUTPUTS: usize = 256;
/// Most rows of a narrow tile.
const NARROW_ROWS: usize = 64;
/// Shared memory that a block of Hopper may have, and the most stages that are worth their barriers.
const SHARED_BYTES: usize = 227 * 1024;
const MOST_STAGES: usize = 12;
const MOST_NARROW_STAGES: usize = 16;
/// Row tiles there are kernels for, ascending.
pub const ROW_TILES: [usize; 5] = [16, 32, 64, 128, 192];
/// The row tile of the wide kernel.
pub const WIDE_ROW_TILE: usize = 192;
/// The row tile of the large kernel: the wide one of e4m3 whose tiles have 256 outputs.
pub const LARGE_ROW_TILE: usize = 128;

/// How the GEMM cuts its work. Plain data: choosing one is a pure function of the shape and the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct GemmTile {
    /// Most rows of one tile; one of [`ROW_TILES`]. An expert's last tile costs what its rows cost. It is the row tile of
    /// the worklist: [`super::RouteConfig::row_tile`].
    pub row_tile: usize,
    /// Weight rows (outputs) of one tile: 128; or, for tiles of few rows, [`NARROW_OUTPUTS`]: where there are few tiles, twice
    /// as many multiprocessors then read weights. [`LARGE_OUTPUTS`] for a wide tile of [`LARGE_ROW_TILE`] rows, and only for it.
    pub outputs: usize,
    /// Blocks of a cluster that share a tile's rows, each with 128 outputs of its own: 1 or 2.
    pub shared: usize,
    /// Blocks of a cluster that each take a part of K of one tile: 1, 2, 4 or 8. Only where `shared` is 1. Every tile that does
    /// not split K adds up in the same order, so that a row's results have the same bits in all of them; one that does has
    /// an order of its own.
    pub splits: usize,
    /// Which operand's rows stand on the matrix unit's M side, in 64s: the weights' (for few rows; a tile's cost then grows
    /// by 16 or 32 rows) or, where `wide`, the tokens' (for many; by 64, and `row_tile` is [`WIDE_ROW_TILE`] or, for e4m3
    /// whose rows are not shared, [`LARGE_ROW_TILE`]).
    pub wide: bool,
}

/// What a choice of tile depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct GemmShape {
    /// Outputs.
    pub n: usize,
    /// Inputs.
    pub k: usize,
    /// What both operands are made of.
    pub format: WeightFormat,
    /// Local experts.
    pub experts: usize,
    /// Live rows that are expected in all.
    pub rows: usize,
    /// Most rows that one expert can have: as many as there are tokens.
    pub most_rows: usize,
}

impl GemmTile {
    /// The tile that is expected to take least on a device of that many multiprocessors.
    #[must_use]
    pub fn choose(shape: &GemmShape, multiprocessors: usize) -> Self {
        cost::cheapest(shape, false, multiprocessors).0
    }

    /// The same for a GEMM whose `[gate | up]` an activation follows, and whether that should be inside the GEMM. For bf16, and where
    /// 256 does not divide N, it never is.
    #[must_use]
    pub fn choose_before_activation(shape: &GemmShape, multiprocessors: usize) -> (Self, bool) {
        cost::cheapest(shape, true, multiprocessors)
    }

    /// The tile whose K is split, where so few tiles of few rows are expected that most multiprocessors would have none.
    ///
    /// Results then have other bits than those of tiles that do not split K, or that split it otherwise.
    #[must_use]
    pub fn choose_split(shape: &GemmShape, multiprocessors: usize) -> Option<Self> {
        /// Blocks of K below which a part spends its time on starting and on meeting the others.
        const SHORTEST_PART: usize = 4;
        let rows = shape.rows.div_ceil(shape.experts.max(1));
        let row_tile = [16, 32, 64].into_iter().find(|&tile| rows <= tile)?;
        let tiles = shape.experts.min(shape.rows) * shape.n.div_ceil(OUTPUTS);
        let blocks = shape.k.div_ceil(values_of_block(shape.format));
        // Half of the multiprocessors already read weights as fast as all of them would.
        let fits = |splits: &usize| 2 * splits * tiles <= multiprocessors && blocks >= splits * SHORTEST_PART;
        let splits = [8, 4, 2].into_iter().find(fits)?;
        Some(Self { row_tile, outputs: OUTPUTS, shared: 1, splits, wide: false })
    }

    /// Whether tiles have 256 outputs.
    fn is_large(&self) -> bool {
        self.outputs == LARGE_OUTPUTS
    }

    /// Whether tiles have 64 outputs.
    fn is_narrow(&self) -> bool {
        self.outputs == NARROW_OUTPUTS
    }

    /// Every tile that there is a kernel for and that does not split K, by format: a row's results have the same bits in all of
    /// them.
    #[must_use]
    pub fn all(format: WeightFormat) -> Vec<Self> {
        let mut tiles = Vec::new();
        for row_tile in ROW_TILES {
            for (outputs, shared) in [(NARROW_OUTPUTS, 1), (OUTPUTS, 1), (OUTPUTS, 2), (LARGE_OUTPUTS, 1)] {
                for wide in [false, true] {
                    let config = GemmConfig {
                        format,
                        tile: Self { row_tile, outputs, shared, splits: 1, wide },
                        activation: None,
                    };
                    if config.check().is_ok() {
                        tiles.push(config.tile);
                    }
                }
            }
        }
        tiles
    }

    /// Whether there is a kernel of this tile with an activation inside, for e4m3.
    #[must_use]
    pub fn takes_activation(&self) -> bool {
        self.wide && self.shared == 1
    }

    fn cluster(&self) -> usize {
        self.shared * self.splits
    }

    /// Rows by which a tile's cost grows.
    #[must_use]
    pub fn row_step(&self) -> usize {
        match self.row_tile {
            _ if self.wide => 64,
            ..=64 => 16,
            _ => 32,
        }
    }

    /// Threads of a block: a warpgroup that copies, and those that multiply.
    fn threads(&self) -> u32 {
        let multiplying = match self {
            _ if self.is_narrow() => 1,
            Self { wide: true, .. } if !self.is_large() => 3,
            _ => 2,
        };
        128 * (1 + multiplying)
    }

    fn paths(&self) -> usize {
        self.row_tile / self.row_step()
    }

    fn check(&self) -> Result<()> {
        if !ROW_TILES.contains(&self.row_tile) {
            return Err(Error::value("row_tile", self.row_tile, format!("one of {ROW_TILES:?}")));
        }
        if !matches!(self.shared, 1 | 2) {
            return Err(Error::value("shared", self.shared, "1 or 2"));
        }
        if !matches!(self.splits, 1 | 2 | 4 | 8) || (self.shared > 1 && self.splits > 1) {
            return Err(Error::value("splits", self.splits, "1, 2, 4 or 8, and 1 where rows are shared"));
        }
        if self.wide && !matches!(self.row_tile, LARGE_ROW_TILE | WIDE_ROW_TILE) {
            let expected = format!("{LARGE_ROW_TILE} or {WIDE_ROW_TILE}, for the wide kernels");
            return Err(Error::value("row_tile", self.row_tile, expected));
        }
        if self.wide && self.splits > 1 {
            return Err(Error::value("splits", self.splits, "1, for the wide kernels"));
        }
        let outputs = match self {
            Self { wide: true, row_tile: LARGE_ROW_TILE, .. } => [LARGE_OUTPUTS; 2],
            Self { wide: false, row_tile: ..=NARROW_ROWS, shared: 1, splits: 1, .. } => [NARROW_OUTPUTS, OUTPUTS],
            _ => [OUTPUTS; 2],
        };
        if !outputs.contains(&self.outputs) {
            return Err(Error::value("outputs", self.outputs, format!("one of {outputs:?}, for such a tile")));
        }
        if self.is_large() && self.shared != 1 {
            return Err(Error::value("shared", self.shared, format!("1, for a wide tile of {LARGE_ROW_TILE} rows")));
        }
        Ok(())
    }

    /// Bytes of shared memory for a number of stages; `BARRIERS` and all before it in gemm.cuh, and the barriers.
    fn shared_bytes(&self, stages: usize, activated: bool) -> usize {
        let operands = 128 * (self.outputs + self.row_tile);
        let staging = match self {
            _ if self.is_large() => self.row_tile * (128 + 16),
            Self { wide: true, .. } if activated => self.row_tile * (OUTPUTS * 2 + 16 + 12) + 80,
            Self { wide: true, .. } => self.row_tile * (OUTPUTS * 2 + 16),
            Self { splits: 2.., .. } => self.row_tile * (OUTPUTS * 4 + 16),
            _ => self.outputs / NARROW_OUTPUTS * self.row_tile * (2 * NARROW_OUTPUTS + 16),
        };
        let weight_scales = if activated || self.is_large() { 8 } else { 4 };
        let scales = stages * self.row_tile * 4 + (stages * weight_scales).next_multiple_of(16);
        let products = if self.wide { 0 } else { stages * 4 * (self.row_tile / 4 + 4) * 4 };
        // `NEXT_TILE` in gemm_large.cu, and its barriers.
        let planning = if self.is_large() { 8 + 16 + 2 * 8 } else { 0 };
        stages * operands + staging + scales + stages * 16 + products + (3 * stages + 2) * 8 + planning
    }
}

impl fmt::Display for GemmTile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let side = if self.wide { "tokens" } else { "weights" };
        write!(f, "{} outputs x {} rows ({side} on M)", self.outputs, self.row_tile)?;
        if self.shared > 1 {
            write!(f, ", {} blocks share rows", self.shared)?;
        }
        if self.splits > 1 {
            write!(f, ", K in {} parts", self.splits)?;
        }
        Ok(())
    }
}

/// Values in the 128 bytes that a block of K has of each row.
pub(super) fn values_of_block(format: WeightFormat) -> usize {
    128 / format.bytes()
}

/// What the GEMM is specialised for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GemmConfig {
    /// What both operands are made of: e4m3 with scales, or bf16.
    pub format: WeightFormat,
    /// How the work is cut.
    pub tile: GemmTile,
    /// The activation that turns `[gate | up]` into the next GEMM's e4m3 rows before anything is stored. Only for e4m3 with a
    /// wide tile whose rows are not shared, and an `N / 2` that 128 divides; the results are those of [`super::Activate`].
    pub activation: Option<Activation>,
}

impl GemmConfig {
    /// Blocks of K that are on their way at once.
    #[must_use]
    pub fn stages(&self) -> usize {
        let activated = self.activation.is_some();
        let fits = |&stages: &usize| self.tile.shared_bytes(stages, activated) <= SHARED_BYTES;
        let most = if self.tile.is_narrow() { MOST_NARROW_STAGES } else { MOST_STAGES };
        (1..=most).rev().find(fits).unwrap_or(1)
    }

    /// Blocks of a cluster; with an activation a pair, whose results share scales, unless a tile has all of those.
    fn cluster(&self) -> usize {
        self.tile.cluster() * if self.activation.is_some() && !self.tile.is_large() { 2 } else { 1 }
    }

    /// Weight rows that are copied at once: all of a tile's, or those that have a place or a scale of their own.
    fn weight_box_rows(&self) -> usize {
        self.tile.outputs / if self.activation.is_some() || self.tile.is_large() { 2 } else { 1 }
    }

    /// Fails unless there is a kernel for the tile and the format, with the activation.
    fn check(&self) -> Result<()> {
        self.tile.check()?;
        let expected = match (self.activation.is_some(), self.tile.is_large()) {
            (true, _) => "e4m3, for a GEMM with an activation",
            (false, true) => "e4m3, for a tile of 256 outputs",
            (false, false) => return Ok(()),
        };
        if self.format != WeightFormat::E4m3 {
            return Err(Error::WeightFormat { argument: "weights", actual: self.format.name(), expected });
        }
        if self.activation.is_some() && !self.tile.wide {
            let expected = format!("{LARGE_ROW_TILE} or {WIDE_ROW_TILE} of a wide tile, for a GEMM with an activation");
            return Err(Error::value("row_tile", self.tile.row_tile, expected));
        }
        if self.activation.is_some() && self.tile.shared != 1 {
            return Err(Error::value("shared", self.tile.shared, "1, for a GEMM with an activation"));
        }
        Ok(())
    }

    fn shared_bytes(&self) -> u32 {
        self.tile.shared_bytes(self.stages(), self.activation.is_some()) as u32
    }

    /// The kernel's source for this configuration.
    ///
    /// # Errors
    /// [`Error::Value`] for a tile that there is no kernel for, [`Error::WeightFormat`] for bf16 with an activation or a
    /// wide tile of [`LARGE_ROW_TILE`] rows.
    pub fn source(&self) -> Result<Source> {
        self.check()?;
        let mut definitions = vec![
            ("BF16", i64::from(self.format == WeightFormat::Bf16)),
            ("TOKENS", self.tile.row_tile as i64),
            ("STEP", self.tile.row_step() as i64),
            ("SHARED", self.tile.shared as i64),
            ("SPLITS", self.tile.splits as i64),
            ("STAGES", self.stages() as i64),
        ];
        if self.tile.wide {
            definitions.push(("ACTIVATION", i64::from(self.activation.is_some())));
        } else {
            definitions.push(("OUTPUTS_OF_TILE", self.tile.outputs as i64));
        }
        if let Some(activation) = &self.activation {
            definitions.extend(activation_definitions(activation)?);
        }
        Ok(if self.tile.is_large() {
            Source::new("gemm_large.cu", include_str!("kernels/gemm_large.cu"), definitions)
        } else if self.tile.wide {
            Source::new("gemm_wide.cu", include_str!("kernels/gemm_wide.cu"), definitions)
        } else {
            Source::new("gemm.cu", include_str!("kernels/gemm.cu"), definitions)
        })
    }
}

/// What one call works on.
#[derive(Debug, Clone, Copy)]
pub struct GemmCall<'a> {
    /// `[E, N, K]`, of the GEMM's format.
    pub weights: &'a Weights,
    /// `[M_sum, K]`, e4m3 or bf16, 16-byte aligned.
    pub rows: DevicePtr,
    /// Scales of e4m3 rows: one to 128 values, MN-major ([`crate::ScaleFormat::HOPPER`]), 16-byte aligned; absent for bf16.
    pub scales: Option<DevicePtr<f32>>,
    /// `[M_sum, N]` bf16, 16-byte aligned; with an activation `[M_sum, N / 2]` e4m3. Only live rows are written.
    pub out: DevicePtr,
    /// With an activation, the results' scales, as `scales` has its own; only those of live rows are written. Else absent.
    pub out_scales: Option<DevicePtr<f32>>,
    /// [`super::LayoutPtrs::header`]. Blocks claim tiles in its last word, so GEMMs of one layout run one after the other.
    pub header: DevicePtr<i32>,
    /// [`super::LayoutPtrs::worklist`], of the tile's row tile.
    pub worklist: DevicePtr<i32>,
    /// [`super::LayoutPtrs::psum`].
    pub psum: DevicePtr<i32>,
    /// `M_sum`
    pub m_sum: usize,
    /// `A`: for e4m3 a multiple of 4, so that a segment's scales start on 16 bytes.
    pub alignment: usize,
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
    n: i32,
    k: i32,
    m_sum: i32,
    reserved: i32,
}

/// The grouped GEMM, prepared.
#[derive(Debug)]
pub struct Gemm {
    device: Device,
    config: GemmConfig,
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
        let kernel = device.kernel(&source, c"gemm")?;
        let shared_bytes = config.shared_bytes();
        kernel.allow_shared_bytes(shared_bytes)?;
        let cluster = config.cluster() as u32;
        let blocks = device.resident_clusters(&kernel, config.tile.threads(), shared_bytes, cluster)? * cluster;
        Ok(Self { device: device.clone(), config, kernel, blocks })
    }

    /// What the kernel is specialised for.
    #[must_use]
    pub fn config(&self) -> &GemmConfig {
        &self.config
    }

    /// What the kernel takes of a multiprocessor.
    #[must_use]
    pub fn resources(&self) -> Resources {
        self.kernel.resources()
    }

    /// Queues the launch: live rows of `out`; nothing else is written.
    ///
    /// # Safety
    /// As [`super::Route::launch`]; the weights' memory outlives the launch.
    ///
    /// # Errors
    /// [`Error::WeightFormat`] for weights of another format; [`Error::Value`] and [`Error::Alignment`] for what does not
    /// fit the kernel; [`Error::Cuda`].
    #[allow(unsafe_code)]
    pub unsafe fn launch(&self, stream: Stream, call: &GemmCall<'_>) -> Result<()> {
        self.check(call)?;
        if call.m_sum == 0 {
            return Ok(());
        }
        // SAFETY: the caller's promise.
        unsafe {
            match self.config.tile.paths() {
                1 => self.queue::<1>(stream, call),
                2 => self.queue::<2>(stream, call),
                3 => self.queue::<3>(stream, call),
                4 => self.queue::<4>(stream, call),
                _ => self.queue::<6>(stream, call),
            }
        }
    }

    fn check(&self, call: &GemmCall<'_>) -> Result<()> {
        let (weights, format) = (call.weights, self.config.format);
        if weights.format() != format {
            return Err(Error::WeightFormat {
                argument: "weights",
                actual: weights.format().name(),
                expected: format.name(),
            });
        }
        let splits = self.config.tile.splits;
        let too_short = (splits - 1) * values_of_block(format);
        if weights.k() <= too_short {
            return Err(Error::value("k", weights.k(), format!("more than {too_short}, for a K in {splits} parts")));
        }
        require_int("m_sum", call.m_sum)?;
        call.rows.require_aligned("rows", 16)?;
        call.out.require_aligned("out", 16)?;
        call.header.require_aligned("header", 4)?;
        call.worklist.require_aligned("worklist", 8)?;
        call.psum.require_aligned("psum", 4)?;
        if self.config.activation.is_some() {
            DevicePtr::require(call.out_scales, "out_scales", 4)?;
            if !weights.n().is_multiple_of(2 * WEIGHT_BLOCK) {
                return Err(Error::value("n", weights.n(), "a multiple of 256 for a GEMM with an activation"));
            }
        }
        if format == WeightFormat::E4m3 {
            DevicePtr::require(call.scales, "scales", 16)?;
            if call.alignment == 0 || !call.alignment.is_multiple_of(4) {
                let expected = "a multiple of 4 for e4m3 rows on a GPU".into();
                return Err(Error::Alignment { actual: call.alignment, expected });
            }
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
        let tile = &self.config.tile;
        let (bytes, n, k) = (self.config.format.bytes(), weights.n(), weights.k());
        let mut rows = [TensorMap::EMPTY; PATHS];
        for (path, map) in rows.iter_mut().enumerate() {
            let box_rows = (path + 1) * tile.row_step() / tile.shared;
            *map = TensorMap::encode(call.rows.address(), bytes, 2, (1, call.m_sum, k), box_rows)?;
        }
        let box_rows = self.config.weight_box_rows();
        let arguments = Arguments {
            weights: TensorMap::encode(weights.values().address(), bytes, 3, (weights.experts(), n, k), box_rows)?,
            rows,
            row_scales: DevicePtr::or_null(call.scales),
            weight_scales: DevicePtr::or_null(weights.scales()),
            out: call.out.address(),
            out_scales: DevicePtr::or_null(call.out_scales),
            header: call.header.address(),
            worklist: call.worklist.address(),
            psum: call.psum.address(),
            n: require_int("n", n)?,
            k: require_int("k", k)?,
            m_sum: require_int("m_sum", call.m_sum)?,
            reserved: 0,
        };
        let shape = Launch {
            blocks: self.blocks,
            threads: tile.threads(),
            shared_bytes: self.config.shared_bytes(),
            cooperative: false,
            overlap: true,
        };
        let pointers = [std::ptr::from_ref(&arguments).cast::<c_void>()];
        // SAFETY: the kernel takes one `GemmArgs` with as many maps; the rest is the caller's promise.
        unsafe { self.device.launch(&self.kernel, shape, stream, &pointers) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tile_says_what_it_is() {
        let tile = GemmTile { row_tile: 32, outputs: OUTPUTS, shared: 1, splits: 2, wide: false };
        assert_eq!(tile.to_string(), "128 outputs x 32 rows (weights on M), K in 2 parts");
        let tile = GemmTile { row_tile: 192, outputs: OUTPUTS, shared: 2, splits: 1, wide: true };
        assert_eq!(tile.to_string(), "128 outputs x 192 rows (tokens on M), 2 blocks share rows");
        let tile = GemmTile { row_tile: 128, outputs: LARGE_OUTPUTS, shared: 1, splits: 1, wide: true };
        assert_eq!(tile.to_string(), "256 outputs x 128 rows (tokens on M)");
    }

    #[test]
    fn every_tile_fits_a_multiprocessor_with_at_least_four_stages() {
        for row_tile in ROW_TILES {
            for ((shared, splits, wide), outputs) in
                [(1, 1, false), (2, 1, false), (1, 8, false), (1, 1, true), (2, 1, true)]
                    .into_iter()
                    .flat_map(|tile| [NARROW_OUTPUTS, OUTPUTS, LARGE_OUTPUTS].map(|outputs| (tile, outputs)))
            {
                let tile = GemmTile { row_tile, outputs, shared, splits, wide };
                if tile.check().is_err() || (splits > 1 && row_tile > 64) {
                    continue;
                }
                let config = GemmConfig { format: WeightFormat::E4m3, tile, activation: None };
                assert!(config.stages() >= 4, "{tile}: {} stages", config.stages());
                assert!(config.shared_bytes() as usize <= SHARED_BYTES, "{tile}");
            }
        }
    }

    #[test]
    fn tiles_without_a_kernel_are_refused() {
        let tile = GemmTile { row_tile: 64, outputs: OUTPUTS, shared: 1, splits: 1, wide: false };
        let refused = |tile: GemmTile, activation| {
            GemmConfig { format: WeightFormat::E4m3, tile, activation }.source().unwrap_err().to_string()
        };
        assert!(refused(GemmTile { row_tile: 48, ..tile }, None).starts_with("row_tile is 48"));
        assert!(refused(GemmTile { shared: 3, ..tile }, None).starts_with("shared is 3"));
        assert!(refused(GemmTile { splits: 3, ..tile }, None).starts_with("splits is 3"));
        assert!(refused(GemmTile { shared: 2, splits: 2, ..tile }, None).starts_with("splits is 2"));
        assert!(refused(GemmTile { wide: true, ..tile }, None).starts_with("row_tile is 64"));
        let with = Some(Activation::default());
        assert!(refused(tile, with).starts_with("row_tile is 64"));
        let many = GemmTile { row_tile: WIDE_ROW_TILE, wide: true, ..tile };
        assert!(refused(GemmTile { shared: 2, ..many }, with).starts_with("shared is 2"));
        let large = GemmTile { row_tile: LARGE_ROW_TILE, outputs: LARGE_OUTPUTS, ..many };
        assert!(refused(GemmTile { outputs: OUTPUTS, ..large }, None).starts_with("outputs is 128"));
        let narrow = GemmTile { outputs: NARROW_OUTPUTS, ..tile };
        for tile in [
            GemmTile { outputs: 32, ..tile },
            GemmTile { row_tile: 128, ..narrow },
            GemmTile { shared: 2, ..narrow },
            GemmTile { splits: 2, ..narrow },
            GemmTile { outputs: NARROW_OUTPUTS, ..many },
        ] {
            assert!(refused(tile, None).starts_with("outputs is "), "{tile}");
        }
        assert!(refused(GemmTile { shared: 2, ..large }, None).starts_with("shared is 2"));
        assert!(refused(GemmTile { splits: 2, ..large }, None).starts_with("splits is 2"));
        for (tile, activation) in [(large, None), (large, with), (many, with)] {
            let config = GemmConfig { format: WeightFormat::Bf16, tile, activation };
            let error = config.source().unwrap_err();
            assert!(matches!(error, Error::WeightFormat { argument: "weights", actual: "bf16", .. }), "{error}");
        }
    }
}
