// Where a scale stands, and zeros where no row is. Set by whoever compiles: GROUP, SCALE_LAYOUT, WIDTH (values in a row).
#pragma once
#include "quantize.cuh"

constexpr int ROW_MAJOR = 0;
constexpr int PACKED = 2;

constexpr int GROUPS = (WIDTH + GROUP - 1) / GROUP;
constexpr int GROUPS_PER_SLAB = SLAB / GROUP;
constexpr bool IS_PACKED = SCALE_LAYOUT == PACKED;
// 4-byte words of scales: to a slab, to a row, and how many lanes share one.
constexpr int WORDS_PER_SLAB = IS_PACKED ? GROUPS_PER_SLAB / 4 : GROUPS_PER_SLAB;
constexpr int WORDS_PER_ROW = IS_PACKED ? (GROUPS + 3) / 4 : GROUPS;
constexpr int LANES_PER_WORD = 32 / WORDS_PER_SLAB;

__device__ __forceinline__ i64 scale_word(int row, int word, int m_sum) {
    if (SCALE_LAYOUT == ROW_MAJOR) return (i64)row * WORDS_PER_ROW + word;
    return row + (i64)word * ((m_sum + 3) & ~3);
}

// The word a lane's scale is part of, the same in all lanes that share it. Lanes past the row pass 0.
__device__ __forceinline__ u32 word_of_scale(float scale) {
    if (!IS_PACKED) return __float_as_uint(scale);
    constexpr int LANES_PER_GROUP = GROUP / PER_LANE;
    const u32 byte = __float_as_uint(scale) >> 23;
    const int first = lane_of_thread() & ~(LANES_PER_WORD - 1);
    u32 word = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) word |= __shfl_sync(WARP, byte, first + i * LANES_PER_GROUP) << (8 * i);
    return word;
}

// Writes a slab's scales for COPIES rows; lane k holds the k-th row, -1 for none. Lanes take (row, word) pairs, so that one
// store instruction carries many. Every lane of the warp calls.
template <int COPIES>
__device__ __forceinline__ void store_slab_scales(u32* scales, float scale, int slab, int rows, int m_sum) {
    const u32 word = word_of_scale(scale);
#pragma unroll
    for (int base = 0; base < COPIES * WORDS_PER_SLAB; base += 32) {
        const int item = base + lane_of_thread();
        const int copy = item / WORDS_PER_SLAB;
        const int in_slab = item % WORDS_PER_SLAB;
        const u32 value = __shfl_sync(WARP, word, in_slab * LANES_PER_WORD);
        const int row = __shfl_sync(WARP, rows, copy & 31);
        const int in_row = slab * WORDS_PER_SLAB + in_slab;
        if (copy < COPIES && row >= 0 && in_row < WORDS_PER_ROW) scales[scale_word(row, in_row, m_sum)] = value;
    }
}

// Zeros in the scales of every row that `is_live(row)` denies, the few words past m_sum that round the stride up included.
// Warps of the whole grid share the work; `warp` of `warps`.
template <typename IsLive>
__device__ __forceinline__ void zero_padding_scales(u32* scales, int m_sum, int warp, int warps, IsLive is_live) {
    const int lane = lane_of_thread();
    if (SCALE_LAYOUT == ROW_MAJOR) {
        for (int first = warp * 32; first < m_sum; first += warps * 32) {
            const bool padding = first + lane < m_sum && !is_live(first + lane);
            u32 rows = __ballot_sync(WARP, padding);
            while (rows != 0) {
                const int row = first + __ffs(rows) - 1;
                rows &= rows - 1;
                for (int word = lane; word < WORDS_PER_ROW; word += 32) scales[scale_word(row, word, m_sum)] = 0;
            }
        }
        return;
    }
    // Columns of rows: four rows (16 bytes) to a lane, 128 to a warp, COLUMNS columns at a time.
    constexpr int COLUMNS = 8;
    constexpr int CHUNKS = (WORDS_PER_ROW + COLUMNS - 1) / COLUMNS;
    const int stride = (m_sum + 3) & ~3;
    const int blocks = (stride + 127) / 128;
    for (int unit = warp; unit < blocks * CHUNKS; unit += warps) {
        const int row = unit / CHUNKS * 128 + lane * 4;
        if (row >= stride) continue;
        const int first_column = unit % CHUNKS * COLUMNS;
        bool padding[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) padding[i] = row + i >= m_sum || !is_live(row + i);
        const bool all = padding[0] && padding[1] && padding[2] && padding[3];
        const bool any = padding[0] || padding[1] || padding[2] || padding[3];
        if (!any) continue;
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c) {
            if (first_column + c >= WORDS_PER_ROW) break;
            u32* word = scales + row + (i64)(first_column + c) * stride;
            if (all) {
                *reinterpret_cast<uint4*>(word) = make_uint4(0, 0, 0, 0);
            } else {
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    if (padding[i]) word[i] = 0;
            }
        }
    }
}
