//! The kernels' arguments, in the kernels' own layout, and checks of what they ask for.

use super::call::{DeviceMatrix, LayoutPtrs, RowsPtrs, worklist_capacity};
use super::driver::DevicePtr;
use crate::error::{Error, Result, checked_add, checked_mul};
use crate::plan::Plan;

/// This backend's name in errors.
pub(super) const BACKEND: &str = "cuda";

/// Fails unless the columns of a matrix, if there are several, stand next to each other.
pub(super) fn require_columns<T>(argument: &'static str, matrix: &DeviceMatrix<T>, cols: usize) -> Result<()> {
    if matrix.col_stride != 1 && cols > 1 {
        return Err(Error::Stride {
            argument,
            actual: vec![matrix.row_stride, matrix.col_stride],
            expected: "columns next to each other on a GPU".into(),
        });
    }
    Ok(())
}

/// Fails unless a number fits the kernels' `int`.
pub(super) fn require_int(argument: &'static str, value: usize) -> Result<i32> {
    i32::try_from(value).map_err(|_| Error::value(argument, value, format!("at most {}", i32::MAX)))
}

/// The kernels' `RouteArgs`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct RouteArgs {
    pub(super) ids: u64,
    pub(super) expert_map: u64,
    pub(super) ids_row_stride: i64,
    pub(super) ids_col_stride: i64,
    pub(super) layout: LayoutPtrs,
    pub(super) status: u64,
    pub(super) barrier: u64,
    pub(super) chunk_counts: u64,
    pub(super) second_header: u64,
    pub(super) second_worklist: u64,
    pub(super) tokens: i32,
    pub(super) experts: i32,
    pub(super) ids_limit: i32,
    pub(super) alignment: i32,
    pub(super) m_sum: i32,
    pub(super) row_tile: i32,
    pub(super) worklist_capacity: i32,
    pub(super) second_row_tile: i32,
    pub(super) second_capacity: i32,
    pub(super) counted: i32,
    pub(super) counters: u64,
}

/// What the routing writes for a layer besides its layout.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum RouteExtra {
    /// Another worklist.
    Worklist(SecondWorklist),
    /// Zeros in the counters of both GEMMs in one launch.
    Counters { counters: DevicePtr<u32>, words: usize },
}

impl RouteExtra {
    pub(super) fn second_worklist(&self) -> Option<&SecondWorklist> {
        match self {
            Self::Worklist(second) => Some(second),
            Self::Counters { .. } => None,
        }
    }
}

/// Another worklist of the same layout, for a GEMM whose row tile is another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct SecondWorklist {
    /// As [`LayoutPtrs::header`], for the GEMM: the first two words are not written.
    pub(super) header: DevicePtr<i32>,
    /// As [`LayoutPtrs::worklist`].
    pub(super) worklist: DevicePtr<i32>,
    pub(super) row_tile: usize,
}

impl SecondWorklist {
    const HEADER_BYTES: usize = 16;

    /// Bytes that [`SecondWorklist::carve`] takes.
    pub(super) fn space_bytes(plan: &Plan, row_tile: usize) -> Result<usize> {
        let list = checked_mul("bytes of a worklist", 8, worklist_capacity(plan, row_tile)?)?;
        checked_add("bytes of a worklist", Self::HEADER_BYTES, list)
    }

    /// Header and list from `address` (16-byte aligned) on.
    pub(super) fn carve(address: DevicePtr, row_tile: usize) -> Self {
        let address = address.cast();
        Self { header: address, worklist: address.byte_add(Self::HEADER_BYTES), row_tile }
    }
}

impl RouteArgs {
    /// The same, with what else is to be written.
    pub(super) fn with(self, plan: &Plan, extra: Option<&RouteExtra>) -> Result<Self> {
        match extra {
            None => Ok(self),
            Some(RouteExtra::Worklist(second)) => Ok(Self {
                second_header: second.header.address(),
                second_worklist: second.worklist.address(),
                second_row_tile: require_int("row_tile", second.row_tile)?,
                second_capacity: require_int("worklist", worklist_capacity(plan, second.row_tile)?)?,
                ..self
            }),
            Some(RouteExtra::Counters { counters, words }) => {
                Ok(Self { counted: require_int("counters", *words)?, counters: counters.address(), ..self })
            }
        }
    }
}

/// The kernels' `RowsArgs`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct RowsArgs {
    pub(super) x: u64,
    pub(super) x_row_stride: i64,
    pub(super) x_scales: u64,
    pub(super) x_scales_row_stride: i64,
    pub(super) x_scales_col_stride: i64,
    pub(super) weights: u64,
    pub(super) weights_row_stride: i64,
    pub(super) out: u64,
    pub(super) scales: u64,
    pub(super) token_scales: u64,
    pub(super) queue: u64,
    pub(super) row_tokens: u64,
    pub(super) inv_perm: u64,
    pub(super) tokens: i32,
    pub(super) m_sum: i32,
}

impl RowsArgs {
    pub(super) fn new(rows: &RowsPtrs, layout: &LayoutPtrs, plan: &Plan) -> Result<Self> {
        let (x_scales, weights) = (rows.x_scales.unwrap_or_default(), rows.weights.unwrap_or_default());
        Ok(Self {
            x: rows.x.ptr.address(),
            x_row_stride: rows.x.row_stride as i64,
            x_scales: x_scales.ptr.address(),
            x_scales_row_stride: x_scales.row_stride as i64,
            x_scales_col_stride: x_scales.col_stride as i64,
            weights: weights.ptr.address(),
            weights_row_stride: weights.row_stride as i64,
            out: rows.out.address(),
            scales: DevicePtr::or_null(rows.scales),
            token_scales: 0,
            queue: 0,
            row_tokens: layout.row_tokens.address(),
            inv_perm: layout.inv_perm.address(),
            tokens: require_int("tokens", plan.tokens())?,
            m_sum: require_int("m_sum", plan.m_sum())?,
        })
    }
}
