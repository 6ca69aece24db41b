// Arguments of the permute kernels: source rows, destination rows, scales. Set by the host: TOPK.
#pragma once
#include "ptx/access.cuh"

// Counters that the blocks of permute_rows share. Zero between calls.
struct Queue {
    u32 claimed;  // pieces of rows that teams have claimed
    u32 done;     // pieces that are done
    u32 left;     // blocks past their wait for all pieces
    u32 reserved;
};

struct RowsArgs {
    const void* x;  // [tokens, row]
    i64 x_row_stride;
    const void* x_scales;  // of rows that come quantized: [tokens, groups]
    i64 x_scales_row_stride;
    i64 x_scales_col_stride;
    const float* weights;  // [tokens, 1]
    i64 weights_row_stride;
    u8* out;            // [m_sum, row]
    u32* scales;        // of [m_sum, groups], as SCALE_LAYOUT says
    u32* token_scales;  // each token's scales, before they are copied to its rows: [tokens, words up to 4]
    Queue* queue;
    const int* row_tokens;
    const int* inv_perm;
    int tokens;
    int m_sum;
};

// Stores a lane's vector, `at` bytes into a row, to every row whose number one of the lanes below TOPK has. Every lane
// of the warp calls.
template <typename Vector>
__device__ __forceinline__ void store_copies(u8* out, Vector bytes, i64 row_bytes, i64 at, bool active, int rows) {
#pragma unroll
    for (int copy = 0; copy < TOPK; ++copy) {
        const int row = __shfl_sync(WARP, rows, copy);
        if (row >= 0 && active) *reinterpret_cast<Vector*>(out + row * row_bytes + at) = bytes;
    }
}

// Stores zeros to the rows for which `is_live(row)` is false. Warps of the whole grid share them; `warp` of `warps`.
template <typename Vector, typename IsLive>
__device__ __forceinline__ void zero_padding_rows(u8* rows, i64 row_bytes, int m_sum, int warp, int warps,
                                                  IsLive is_live) {
    for (int row = warp; row < m_sum; row += warps) {
        if (is_live(row)) continue;
        for (i64 at = lane_of_thread() * sizeof(Vector); at < row_bytes; at += 32 * sizeof(Vector))
            *reinterpret_cast<Vector*>(rows + row * row_bytes + at) = Vector();
    }
}
