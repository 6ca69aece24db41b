//! Which kernel of the grouped GEMM, and how it cuts the work.

use super::config::values_of_block;
use crate::cuda::cost;
use crate::error::{Error, Result};
use crate::gemm::{ActivationFormat, WeightFormat};
use std::fmt;

/// Row tiles that there are kernels for, ascending.
pub const ROW_TILES: [usize; 5] = [16, 32, 64, 128, 192];
/// Outputs of a narrow tile, and of a consumer warpgroup of any tile that has weights as the M operand.
const NARROW_OUTPUTS: usize = 64;
/// Outputs of the other tiles for few rows.
const FEW_ROWS_OUTPUTS: usize = 128;
/// Most rows of a narrow tile.
const NARROW_ROWS: usize = 64;
/// Outputs of a broad tile of at most so many rows: more rows leave registers for fewer consumer warpgroups.
const BROAD_OUTPUTS: [(usize, usize); 3] = [(32, 384), (64, 256), (128, 192)];
/// Row tiles that K is split for.
const SPLIT_ROW_TILES: [usize; 3] = [16, 32, 64];
/// Parts in which K may be split, most first.
const K_PARTS: [usize; 3] = [8, 4, 2];
/// Rows and outputs of the wide kernel's tiles.
pub(in crate::cuda) const WIDE_ROW_TILE: usize = 192;
const WIDE_OUTPUTS: usize = 128;
/// Rows and outputs of the large kernel's tiles.
pub(in crate::cuda) const LARGE_ROW_TILE: usize = 128;
const LARGE_OUTPUTS: usize = 256;

/// Outputs of a broad tile of that many rows, where there is one.
fn broad_outputs(row_tile: usize) -> Option<usize> {
    BROAD_OUTPUTS.iter().find(|&&(most, _)| row_tile <= most).map(|&(_, outputs)| outputs)
}

/// One of the grouped GEMM's kernels, and how it cuts its work. Plain data: choosing one is a pure function of the
/// shape and the device.
///
/// All but a split K add up in the same order, so that a row's results have the same bits in all of them; a split K has
/// an order of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum GemmKernel {
    /// `sm90_gemm_few_rows.cu`: weights are the M operand, so that a tile's cost grows by 16 or 32 rows.
    FewRows {
        /// Most rows of one tile; one of [`ROW_TILES`].
        row_tile: usize,
        /// Outputs of a tile, and what the blocks of a cluster do.
        cut: FewRowsCut,
    },
    /// `sm90_gemm_192x128.cu`: tokens are the M operand; tiles of 192 rows by 128 outputs. Only e4m3 and bf16.
    Wide {
        /// Whether two blocks of a cluster share a tile's rows, each with 128 outputs of its own.
        shares_rows: bool,
    },
    /// `sm90_gemm_128x256.cu`: tokens are the M operand; tiles of 128 rows by 256 outputs. Only e4m3.
    Large,
}

/// How [`GemmKernel::FewRows`] cuts a row tile's outputs and its K.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum FewRowsCut {
    /// 64 outputs to a tile: where there are few tiles, twice as many multiprocessors then read weights. For row tiles
    /// up to 64.
    Narrow,
    /// 128 outputs to a tile.
    Plain,
    /// 384 outputs to a tile of up to 32 rows, 256 to one of 64, 192 to one of 128; a block to a multiprocessor: as many
    /// warps decode as there are registers for. For mxfp4 and int4 weights.
    Broad,
    /// 128 outputs to a tile; two blocks of a cluster share a tile's rows.
    SharedRows,
    /// 128 outputs to a tile; the blocks of a cluster each take a part of K of one tile.
    SplitK {
        /// Parts: 2, 4 or 8.
        parts: usize,
    },
}

/// What a choice of kernel depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct GemmShape {
    /// Outputs.
    pub n: usize,
    /// Inputs.
    pub k: usize,
    /// What weights are made of.
    pub format: WeightFormat,
    /// What rows are made of.
    pub activation_format: ActivationFormat,
    /// Local experts.
    pub experts: usize,
    /// Live rows that are expected in all.
    pub rows: usize,
    /// Most rows that one expert can have: as many as there are tokens.
    pub most_rows: usize,
}

/// What a kernel is prepared by, for weights and rows of one format each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(in crate::cuda) struct GemmKey {
    /// How the work is cut.
    pub(in crate::cuda) kernel: GemmKernel,
    /// Whether the activation is inside.
    pub(in crate::cuda) activated: bool,
    /// Whether it reads the weights' copy in e4m3.
    pub(in crate::cuda) e4m3_copy: bool,
}

impl GemmKey {
    /// What it reads, of weights of a format.
    pub(in crate::cuda) fn format(&self, own: WeightFormat) -> WeightFormat {
        if self.e4m3_copy { WeightFormat::E4m3 } else { own }
    }
}

impl GemmKernel {
    /// The kernel that is expected to take least on a device of that many multiprocessors.
    #[must_use]
    pub fn choose(shape: &GemmShape, multiprocessors: usize) -> Self {
        cost::cheapest(shape, false, false, multiprocessors).kernel
    }

    /// The same for a GEMM whose `[gate | up]` an activation follows, and whether that should be inside the GEMM. For
    /// bf16, and where 256 does not divide N, it never is.
    #[must_use]
    pub fn choose_before_activation(shape: &GemmShape, multiprocessors: usize) -> (Self, bool) {
        let found = cost::cheapest(shape, true, false, multiprocessors);
        (found.kernel, found.activated)
    }

    /// The kernel whose K is split, where so few tiles of few rows are expected that most multiprocessors would have
    /// none.
    ///
    /// Results then have other bits than those of kernels that do not split K, or that split it otherwise.
    #[must_use]
    pub fn choose_split(shape: &GemmShape, multiprocessors: usize) -> Option<Self> {
        /// Blocks of K below which a part spends its time on starting and on meeting the others.
        const SHORTEST_PART: usize = 4;
        if shape.format.has_groups() {
            return None;
        }
        let rows = shape.rows.div_ceil(shape.experts.max(1));
        let row_tile = SPLIT_ROW_TILES.into_iter().find(|&tile| rows <= tile)?;
        let tiles = shape.experts.min(shape.rows) * shape.n.div_ceil(FEW_ROWS_OUTPUTS);
        let blocks = shape.k.div_ceil(values_of_block(shape.activation_format));
        // Half of the multiprocessors already read weights as fast as all of them would.
        let fits = |parts: &usize| 2 * parts * tiles <= multiprocessors && blocks >= parts * SHORTEST_PART;
        let parts = K_PARTS.into_iter().find(fits)?;
        Some(Self::FewRows { row_tile, cut: FewRowsCut::SplitK { parts } })
    }

    /// Every kernel of a format that does not split K: a row's results have the same bits in all of them.
    #[must_use]
    pub fn all(format: WeightFormat) -> Vec<Self> {
        let mut kernels = Vec::new();
        for row_tile in ROW_TILES {
            for cut in [FewRowsCut::Narrow, FewRowsCut::Plain, FewRowsCut::Broad, FewRowsCut::SharedRows] {
                kernels.push(Self::FewRows { row_tile, cut });
            }
        }
        if format.has_groups() {
            kernels.retain(|kernel| kernel.check().is_ok() && kernel.shared() == 1);
            return kernels;
        }
        kernels.extend([Self::Wide { shares_rows: false }, Self::Wide { shares_rows: true }]);
        if format == WeightFormat::E4m3 {
            kernels.push(Self::Large);
        }
        kernels.retain(|kernel| kernel.check().is_ok() && !kernel.is_broad());
        kernels
    }

    /// Whether there is a kernel only for weights with groups.
    pub(super) fn is_broad(&self) -> bool {
        matches!(self, Self::FewRows { cut: FewRowsCut::Broad, .. })
    }

    /// Every kernel that splits K. No two have the same bits.
    pub fn all_split() -> impl Iterator<Item = Self> {
        SPLIT_ROW_TILES.into_iter().flat_map(|row_tile| {
            K_PARTS.into_iter().rev().map(move |parts| Self::FewRows { row_tile, cut: FewRowsCut::SplitK { parts } })
        })
    }

    /// Most rows of one tile. An expert's last tile costs what its rows cost. It is the row tile of the worklist:
    /// [`crate::cuda::RouteConfig::row_tile`].
    #[must_use]
    pub fn row_tile(&self) -> usize {
        match self {
            Self::FewRows { row_tile, .. } => *row_tile,
            Self::Wide { .. } => WIDE_ROW_TILE,
            Self::Large => LARGE_ROW_TILE,
        }
    }

    /// Weight rows (outputs) of one tile.
    #[must_use]
    pub fn outputs(&self) -> usize {
        match self {
            Self::FewRows { cut: FewRowsCut::Narrow, .. } => NARROW_OUTPUTS,
            Self::FewRows { cut: FewRowsCut::Broad, row_tile } => broad_outputs(*row_tile).unwrap_or(FEW_ROWS_OUTPUTS),
            Self::FewRows { .. } => FEW_ROWS_OUTPUTS,
            Self::Wide { .. } => WIDE_OUTPUTS,
            Self::Large => LARGE_OUTPUTS,
        }
    }

    /// Blocks of a cluster that share a tile's rows, each with outputs of its own: 1 or 2.
    #[must_use]
    pub fn shared(&self) -> usize {
        match self {
            Self::FewRows { cut: FewRowsCut::SharedRows, .. } | Self::Wide { shares_rows: true } => 2,
            Self::FewRows { .. } | Self::Wide { shares_rows: false } | Self::Large => 1,
        }
    }

    /// Blocks of a cluster that each take a part of K of one tile: 1, 2, 4 or 8.
    #[must_use]
    pub fn splits(&self) -> usize {
        match self {
            Self::FewRows { cut: FewRowsCut::SplitK { parts }, .. } => *parts,
            Self::FewRows { .. } | Self::Wide { .. } | Self::Large => 1,
        }
    }

    /// Whether tokens are the M operand (for many rows), else the weights are (for few).
    #[must_use]
    pub fn tokens_on_m(&self) -> bool {
        match self {
            Self::FewRows { .. } => false,
            Self::Wide { .. } | Self::Large => true,
        }
    }

    /// Whether the kernel takes an activation inside, for e4m3.
    #[must_use]
    pub fn takes_activation(&self) -> bool {
        match self {
            Self::FewRows { .. } => false,
            Self::Wide { shares_rows } => !shares_rows,
            Self::Large => true,
        }
    }

    /// Rows by which a tile's cost grows.
    #[must_use]
    pub fn row_step(&self) -> usize {
        match self {
            Self::FewRows { row_tile: ..=64, .. } => 16,
            Self::FewRows { .. } => 32,
            Self::Wide { .. } | Self::Large => 64,
        }
    }

    /// Numbers of steps that a tile may have, each with a tensor map of rows.
    pub(super) fn row_maps(&self) -> usize {
        self.row_tile() / self.row_step()
    }

    pub(super) fn cluster(&self) -> usize {
        self.shared() * self.splits()
    }

    /// Warpgroups that multiply.
    fn consumers(&self) -> usize {
        match self {
            Self::FewRows { .. } => self.outputs() / NARROW_OUTPUTS,
            Self::Wide { .. } => WIDE_ROW_TILE / 64,
            Self::Large => LARGE_ROW_TILE / 64,
        }
    }

    /// Threads of a block: a warpgroup that loads, and those that multiply. Passed to the kernel, which has its own
    /// count and compares.
    pub(super) fn threads(&self) -> u32 {
        128 * (1 + self.consumers() as u32)
    }

    pub(super) fn check(&self) -> Result<()> {
        let Self::FewRows { row_tile, cut } = *self else { return Ok(()) };
        if !ROW_TILES.contains(&row_tile) {
            return Err(Error::value("row_tile", row_tile, format!("one of {ROW_TILES:?}")));
        }
        match cut {
            FewRowsCut::Narrow if row_tile > NARROW_ROWS => {
                let expected = format!("at most {NARROW_ROWS}, for a tile of {NARROW_OUTPUTS} outputs");
                Err(Error::value("row_tile", row_tile, expected))
            }
            FewRowsCut::Broad if broad_outputs(row_tile).is_none() => {
                Err(Error::value("row_tile", row_tile, "at most 128, for a broad tile"))
            }
            FewRowsCut::SplitK { parts } if !K_PARTS.contains(&parts) => {
                Err(Error::value("parts", parts, "2, 4 or 8 parts of K"))
            }
            FewRowsCut::SplitK { .. } if !SPLIT_ROW_TILES.contains(&row_tile) => {
                let expected = format!("one of {SPLIT_ROW_TILES:?}, for a split K");
                Err(Error::value("row_tile", row_tile, expected))
            }
            FewRowsCut::Narrow
            | FewRowsCut::Plain
            | FewRowsCut::Broad
            | FewRowsCut::SharedRows
            | FewRowsCut::SplitK { .. } => Ok(()),
        }
    }
}

impl fmt::Display for GemmKernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let side = if self.tokens_on_m() { "tokens" } else { "weights" };
        write!(f, "{} outputs x {} rows ({side} on M)", self.outputs(), self.row_tile())?;
        if self.shared() > 1 {
            write!(f, ", {} blocks share rows", self.shared())?;
        }
        if self.splits() > 1 {
            write!(f, ", K in {} parts", self.splits())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_says_what_it_is() {
        let kernel = GemmKernel::FewRows { row_tile: 32, cut: FewRowsCut::SplitK { parts: 2 } };
        assert_eq!(kernel.to_string(), "128 outputs x 32 rows (weights on M), K in 2 parts");
        let kernel = GemmKernel::FewRows { row_tile: 16, cut: FewRowsCut::Broad };
        assert_eq!(kernel.to_string(), "384 outputs x 16 rows (weights on M)");
        let kernel = GemmKernel::FewRows { row_tile: 128, cut: FewRowsCut::Broad };
        assert_eq!(kernel.to_string(), "192 outputs x 128 rows (weights on M)");
        let kernel = GemmKernel::Wide { shares_rows: true };
        assert_eq!(kernel.to_string(), "128 outputs x 192 rows (tokens on M), 2 blocks share rows");
        assert_eq!(GemmKernel::Large.to_string(), "256 outputs x 128 rows (tokens on M)");
    }

    #[test]
    fn every_kernel_has_as_many_row_maps_as_a_launch() {
        // The cases of `Gemm::launch`.
        const LAUNCHED: [usize; 5] = [1, 2, 3, 4, 6];
        for format in [WeightFormat::E4m3, WeightFormat::Bf16, WeightFormat::Mxfp4, WeightFormat::Int4] {
            for kernel in GemmKernel::all(format).into_iter().chain(GemmKernel::all_split()) {
                assert!(LAUNCHED.contains(&kernel.row_maps()), "{kernel} has {} row maps", kernel.row_maps());
                assert_eq!(kernel.row_maps() * kernel.row_step(), kernel.row_tile(), "{kernel}");
            }
        }
    }

    #[test]
    fn only_weights_with_groups_have_broad_tiles() {
        for (format, row_tiles) in [
            (WeightFormat::E4m3, &[][..]),
            (WeightFormat::Bf16, &[]),
            (WeightFormat::Mxfp4, &[16, 32, 64, 128]),
            (WeightFormat::Int4, &[16, 32, 64, 128]),
        ] {
            let broad = GemmKernel::all(format).into_iter().filter(GemmKernel::is_broad);
            assert_eq!(broad.map(|kernel| kernel.row_tile()).collect::<Vec<_>>(), row_tiles, "{format}");
        }
    }

    #[test]
    fn cuts_without_a_kernel_are_refused() {
        let refused = |row_tile, cut| GemmKernel::FewRows { row_tile, cut }.check().unwrap_err().to_string();
        assert!(refused(48, FewRowsCut::Plain).starts_with("row_tile is 48"));
        assert!(refused(128, FewRowsCut::Narrow).starts_with("row_tile is 128"));
        assert!(refused(192, FewRowsCut::Broad).starts_with("row_tile is 192, expected at most 128"));
        assert!(refused(64, FewRowsCut::SplitK { parts: 3 }).starts_with("parts is 3"));
        assert!(refused(64, FewRowsCut::SplitK { parts: 1 }).starts_with("parts is 1"));
        assert!(refused(192, FewRowsCut::SplitK { parts: 2 }).starts_with("row_tile is 192"));
    }
}
