//! Descriptions of matrices for Hopper's copy engine.

use super::check_call;
use crate::error::{Error, Result};
use cudarc::driver::sys;

/// Bytes of a row of a box: the width of the swizzle.
pub(in crate::cuda) const BOX_ROW_BYTES: usize = 128;

/// What the copy engine needs to know of a matrix, as a kernel takes it.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
pub(in crate::cuda) struct TensorMap([u64; 16]);

impl TensorMap {
    pub(in crate::cuda) const EMPTY: Self = Self([0; 16]);

    /// `matrices` (1, where `rank` is 2) row-major matrices of `rows` by `columns`, one behind the other, of which
    /// boxes of `box_rows` rows by 128 bytes are copied, swizzled. What a box has past an edge is zeros.
    #[allow(unsafe_code)]
    pub(in crate::cuda) fn encode(
        address: u64,
        element_bytes: usize,
        rank: u32,
        (matrices, rows, columns): (usize, usize, usize),
        box_rows: usize,
    ) -> Result<Self> {
        use sys::CUtensorMapDataType as Type;
        let dtype = match element_bytes {
            1 => Type::CU_TENSOR_MAP_DATA_TYPE_UINT8,
            2 => Type::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            _ => return Err(Error::value("element_bytes", element_bytes, "1 or 2")),
        };
        let row_bytes = (columns * element_bytes) as u64;
        let sizes = [columns as u64, rows as u64, matrices as u64];
        let strides = [row_bytes, row_bytes * rows as u64];
        let extents = [(BOX_ROW_BYTES / element_bytes) as u32, box_rows as u32, 1];
        let mut map = sys::CUtensorMap { opaque: [0; 16] };
        // SAFETY: the lists have as many entries as the matrix has dimensions (one fewer strides) and live for the
        // call, which only encodes: nothing is read at the address.
        let result = unsafe {
            sys::cuTensorMapEncodeTiled(
                &mut map,
                dtype,
                rank,
                address as *mut _,
                sizes.as_ptr(),
                strides.as_ptr(),
                extents.as_ptr(),
                [1; 3].as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
                // A box's rows are 128 bytes. With 256 an H200's memory gives 5 to 10 % less.
                sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        };
        check_call("cuTensorMapEncodeTiled", result)?;
        Ok(Self(map.opaque))
    }
}
