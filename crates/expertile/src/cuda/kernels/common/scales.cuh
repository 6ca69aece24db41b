// Addresses of scales in each scale layout, and zeros where there is no row. Set by the host: GROUP, SCALE_LAYOUT,
// WIDTH (values in a row).
#pragma once
#include "common/quantize.cuh"

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

// The same where a lane has 8 values of each half of the slab, and a scale for each: the word of half `half`.
__device__ __forceinline__ u32 word_of_half(const float (&scales)[2], int half) {
    if (!IS_PACKED) return __float_as_uint(scales[half]);
    // A word of small groups is all in one half; one of large groups takes two from each.
    constexpr int LANES_PER_GROUP = GROUP / 8;
    constexpr int IN_A_HALF = 32 / LANES_PER_GROUP;
    const int first = IN_A_HALF > 4 ? lane_of_thread() & ~(4 * LANES_PER_GROUP - 1) : 0;
    u32 word = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float scale = scales[IN_A_HALF < 4 ? i / IN_A_HALF : half];
        word |= __shfl_sync(WARP, __float_as_uint(scale) >> 23, first + i % IN_A_HALF * LANES_PER_GROUP) << (8 * i);
    }
    return word;
}

// Writes a slab's scales for COPIES rows; lane k holds the k-th row, -1 for none. Lanes take (row, word) pairs, so that
// one store instruction carries many. Every lane of the warp calls.
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

// Zeros in rows [begin, end) of one column of scales, a line of 32 words to a store: stores to the L2 take their time
// by lines, and wider ones, which would have to begin on their own width, touch one line more. Every lane of the warp
// calls.
__device__ __forceinline__ void zero_column(u32* column, int begin, int end) {
    for (int row = (begin & ~31) + lane_of_thread(); row < end; row += 32)
        if (row >= begin) column[row] = 0;
}

// Zeros in rows [begin, end) of the columns that are part `part` of `parts`: eight lanes to a column, where a warp
// would be too many.
__device__ __forceinline__ void zero_few_rows(u32* scales, i64 stride, int begin, int end, int part, int parts) {
    const int lane = lane_of_thread();
    for (int column = part * 4 + lane / 8; column < WORDS_PER_ROW; column += parts * 4)
        for (int row = begin + lane % 8; row < end; row += 8) scales[column * stride + row] = 0;
}

// Zeros in the scales of padding: behind each expert's rows up to the next one's, and behind the last one's up to m_sum
// and the few words that round the stride up. `start` and `end` are the experts' lists, `used` the end of the last
// segment. Warps of the whole grid share the work; `warp` of `warps`.
template <typename Start, typename End>
__device__ __forceinline__ void zero_padding_scales(u32* scales, int m_sum, int experts, int used, int warp, int warps,
                                                    Start start, End end) {
    const int lane = lane_of_thread();
    // Parts of an expert's run: one column (or a share of its words) to a warp while there are warps.
    const int parts = max(1, min(WORDS_PER_ROW, warps / experts));
    const int stride = SCALE_LAYOUT == ROW_MAJOR ? m_sum : (m_sum + 3) & ~3;
    for (int unit = warp; unit < experts * parts; unit += warps) {
        const int expert = unit % experts;
        const int part = unit / experts;
        const int from = end(expert);
        const int to = expert + 1 < experts ? start(expert + 1) : used;
        if (SCALE_LAYOUT == ROW_MAJOR) {
            for (i64 word = (i64)from * WORDS_PER_ROW + part * 32 + lane; word < (i64)to * WORDS_PER_ROW;
                 word += parts * 32)
                scales[word] = 0;
        } else {
            constexpr int FEW_ROWS = 16;
            if (to - from <= FEW_ROWS) {
                zero_few_rows(scales, stride, from, to, part, parts);
                continue;
            }
            for (int column = part; column < WORDS_PER_ROW; column += parts)
                zero_column(scales + (i64)column * stride, from, to);
        }
    }
    // What is left of the buffer may be most of it: cut by rows too.
    constexpr int ROWS = 1024;
    const int chunks = (stride - used + ROWS - 1) / ROWS;
    for (int unit = warp; unit < chunks * WORDS_PER_ROW; unit += warps) {
        const int from = used + unit / WORDS_PER_ROW * ROWS;
        const int to = min(from + ROWS, stride);
        const int column = unit % WORDS_PER_ROW;
        if (SCALE_LAYOUT == ROW_MAJOR) {
            for (int row = from + lane; row < to; row += 32) scales[(i64)row * WORDS_PER_ROW + column] = 0;
        } else {
            zero_column(scales + (i64)column * stride, from, to);
        }
    }
}

// Zeros in the scales of every 32 rows that are all padding, and in the words that round the stride up. `token_of(row)`
// is -1 on padding. Warps of the whole grid share the work; `warp` of `warps`.
template <typename TokenOf>
__device__ __forceinline__ void zero_padding_groups(u32* scales, int m_sum, int warp, int warps, TokenOf token_of) {
    const int rows = SCALE_LAYOUT == ROW_MAJOR ? m_sum : (m_sum + 3) & ~3;
    for (int first = warp * 32; first < rows; first += warps * 32) {
        const int row = first + lane_of_thread();
        if (__any_sync(WARP, token_of(row) >= 0) || row >= rows) continue;
#pragma unroll 4
        for (int word = 0; word < WORDS_PER_ROW; ++word) scales[scale_word(row, word, m_sum)] = 0;
    }
}

// The tokens' scales to their rows, 32 neighbours at a time, so that a column's words, which are neighbours in memory,
// are written together: scales of one token go to rows far apart, and a store of 4 bytes to each costs memory more than
// one of 32. Padding among the 32 gets zeros. `quad_of(token, i)` gives words 4i..4i+3 of a token's scales.
template <typename TokenOf, typename QuadOf>
__device__ __forceinline__ void spread_scales(u32* scales, int m_sum, int warp, int warps, TokenOf token_of,
                                              QuadOf quad_of) {
    // Columns to a unit: at most 32, all of them in flight at once.
    constexpr int UNITS_PER_ROW = (WORDS_PER_ROW + 31) / 32;
    constexpr int QUADS = ((WORDS_PER_ROW + UNITS_PER_ROW - 1) / UNITS_PER_ROW + 3) / 4;
    const int rows = SCALE_LAYOUT == ROW_MAJOR ? m_sum : (m_sum + 3) & ~3;
    const i64 units = (i64)((rows + 31) / 32) * UNITS_PER_ROW;
    for (i64 unit = warp; unit < units; unit += warps) {
        const int row = (int)(unit / UNITS_PER_ROW) * 32 + lane_of_thread();
        const int first = (int)(unit % UNITS_PER_ROW) * QUADS;
        const int token = token_of(row);
        if (!__any_sync(WARP, token >= 0) || row >= rows) continue;
        uint4 quads[QUADS];
#pragma unroll
        for (int i = 0; i < QUADS; ++i)
            quads[i] =
                token >= 0 && 4 * (first + i) < WORDS_PER_ROW ? quad_of(token, first + i) : make_uint4(0, 0, 0, 0);
#pragma unroll
        for (int i = 0; i < QUADS; ++i) {
            const u32 words[4] = {quads[i].x, quads[i].y, quads[i].z, quads[i].w};
#pragma unroll
            for (int j = 0; j < 4; ++j)
                if (4 * (first + i) + j < WORDS_PER_ROW) scales[scale_word(row, 4 * (first + i) + j, m_sum)] = words[j];
        }
    }
}
