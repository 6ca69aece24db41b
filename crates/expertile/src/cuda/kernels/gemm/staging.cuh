// From a consumer's sums to global memory by way of shared memory, where tokens are the M operand.
//
// A kernel's `Config` has STAGING_ROW: bytes from one staged row to the next.
#pragma once
#include "gemm/pipeline.cuh"

// Adds to COUNT sums of each lane what their outputs have, if there is such: `column` is the first of the warp's. Of every
// four sums two are neighbouring outputs of one row, the others the same of another.
template <typename Config, int COUNT>
__device__ __forceinline__ void add_bias(const GemmArgs<Config>& a, const Tile& tile, int column, float* sum) {
    if (a.bias == nullptr) return;
    const float* bias = a.bias + (i64)tile.expert * a.n;
#pragma unroll
    for (int i = 0; i < COUNT; i += 4) {
        // Past the last output there is any.
        const float* pair = bias + min(column + 2 * i + 2 * (read_lane() % 4), a.n - 2);
        const float even = pair[0];
        const float odd = pair[1];
        sum[i] = __fadd_rn(sum[i], even);
        sum[i + 1] = __fadd_rn(sum[i + 1], odd);
        sum[i + 2] = __fadd_rn(sum[i + 2], even);
        sum[i + 3] = __fadd_rn(sum[i + 3], odd);
    }
}

// Stores COUNT sums of each lane to shared memory as bf16: a warp's 16 rows of 4 * COUNT bytes.
template <typename Config, int COUNT>
__device__ __forceinline__ void stage_rows(u32 staging, u32 lane, const float* sum) {
    const u32 mine = staging + lane % 16 * Config::STAGING_ROW + lane / 16 * 16;
#pragma unroll
    for (int i = 0; i < COUNT; i += 8)
        store_matrices(mine + i * 4, pack_bf16(sum[i], sum[i + 1]), pack_bf16(sum[i + 2], sum[i + 3]),
                       pack_bf16(sum[i + 4], sum[i + 5]), pack_bf16(sum[i + 6], sum[i + 7]));
}

// Stores those of a warp's 16 staged rows of BYTES that are live, in rows of `width` bytes from byte `column` on. (The
// bulk copy engine takes one row at a time from a warp.)
template <typename Config, int BYTES>
__device__ __forceinline__ void store_staged(void* out, i64 width, const Tile& tile, int first, int column,
                                             u32 staging) {
    constexpr int CHUNKS = BYTES / 16;
    constexpr int EACH = CHUNKS / 2;
    constexpr int AT_ONCE = EACH < 4 ? EACH : 4;
    static_assert(EACH % AT_ONCE == 0 && 32 % CHUNKS == 0 && BYTES + 16 == Config::STAGING_ROW,
                  "lanes have as many chunks of 16 bytes, some at a time");
    // Read here, so that nothing that follows from it takes a register while a tile is multiplied.
    const u32 lane = read_lane();
    const int at = column + lane % CHUNKS * 16;
    __syncwarp();
#pragma unroll
    for (int begin = 0; begin < EACH; begin += AT_ONCE) {
        uint4 chunks[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i)
            chunks[i] = load_shared_words(staging + ((begin + i) * 32 + lane) / CHUNKS * Config::STAGING_ROW +
                                          lane % CHUNKS * 16);
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) {
            const int row = first + ((begin + i) * 32 + lane) / CHUNKS;
            if (row < tile.rows && at < width)
                *reinterpret_cast<uint4*>(static_cast<u8*>(out) + (tile.first + row) * width + at) = chunks[i];
        }
    }
}

// Stores the scale of a live row of activated results.
template <typename Config>
__device__ __forceinline__ void store_scale(const GemmArgs<Config>& a, const Tile& tile, int row, float scale) {
    if (row < tile.rows)
        a.out_scales[(i64)(tile.column / SCALE_BLOCK) * ((a.m_sum + 3) & ~3) + tile.first + row] = scale;
}
