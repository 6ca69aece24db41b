//! Kernels and tiles by name.

use crate::case::*;
use expertile::cuda::{FewRowsCut, GemmKernel};

pub(crate) const FORMATS: [Format; 6] = [E4M3, BF16, W4A8, W4A16, INT4_A8, INT4_A16];
/// Those with kernels that split K and that take tokens as the M operand.
pub(crate) const WHOLE_BYTES: [Format; 2] = [E4M3, BF16];

pub(crate) fn few_rows(row_tile: usize, cut: FewRowsCut) -> GemmKernel {
    GemmKernel::FewRows { row_tile, cut }
}

pub(crate) fn plain(row_tile: usize) -> GemmKernel {
    few_rows(row_tile, FewRowsCut::Plain)
}

pub(crate) fn narrow(row_tile: usize) -> GemmKernel {
    few_rows(row_tile, FewRowsCut::Narrow)
}

pub(crate) fn broad(row_tile: usize) -> GemmKernel {
    few_rows(row_tile, FewRowsCut::Broad)
}

pub(crate) fn sharing(row_tile: usize) -> GemmKernel {
    few_rows(row_tile, FewRowsCut::SharedRows)
}

pub(crate) fn split(row_tile: usize, parts: usize) -> GemmKernel {
    few_rows(row_tile, FewRowsCut::SplitK { parts })
}

pub(crate) const WIDE: GemmKernel = GemmKernel::Wide { shares_rows: false };
pub(crate) const WIDE_SHARING: GemmKernel = GemmKernel::Wide { shares_rows: true };
pub(crate) const LARGE: GemmKernel = GemmKernel::Large;

/// Whether a kernel is one of the format's.
pub(crate) fn runs(kernel: &GemmKernel, format: Format) -> bool {
    format.config(*kernel, None).source().is_ok()
}

/// Those for many rows.
pub(crate) fn wide_kernels(format: Format) -> Vec<GemmKernel> {
    if format.weights.has_groups() {
        return vec![plain(128), plain(192)];
    }
    let mut kernels = vec![WIDE, WIDE_SHARING];
    if format == E4M3 {
        kernels.push(LARGE);
    }
    kernels
}
