// Rows on their way to their places. Set by whoever compiles: TOPK.
#pragma once
#include "access.cuh"

// What the blocks of permute_rows agree by. Zero between calls.
struct Queue {
    u32 claimed;  // pieces of rows that teams have taken on
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
    u8* out;      // [m_sum, row]
    u32* scales;  // of [m_sum, groups], as SCALE_LAYOUT says
    u32* token_scales;  // words of each token's scales, on their way to the token's rows: [tokens, words up to 4]
    Queue* queue;
    const int* row_tokens;
    const int* inv_perm;
    int tokens;
    int m_sum;
};

// Writes a lane's vector, `at` bytes into a row, to every row that the lanes below TOPK hold. Every lane of the warp calls.
template <typename Vector>
__device__ __forceinline__ void store_copies(u8* out, Vector bytes, i64 row_bytes, i64 at, bool active, int rows) {
#pragma unroll
    for (int copy = 0; copy < TOPK; ++copy) {
        const int row = __shfl_sync(WARP, rows, copy);
        if (row >= 0 && active) *reinterpret_cast<Vector*>(out + row * row_bytes + at) = bytes;
    }
}

// Zeros in the rows that `is_live(row)` denies. Warps of the whole grid share them; `warp` of `warps`.
template <typename Vector, typename IsLive>
__device__ __forceinline__ void zero_padding_rows(u8* rows, i64 row_bytes, int m_sum, int warp, int warps, IsLive is_live) {
    for (int row = warp; row < m_sum; row += warps) {
        if (is_live(row)) continue;
        for (i64 at = lane_of_thread() * sizeof(Vector); at < row_bytes; at += 32 * sizeof(Vector))
            *reinterpret_cast<Vector*>(rows + row * row_bytes + at) = Vector();
    }
}
