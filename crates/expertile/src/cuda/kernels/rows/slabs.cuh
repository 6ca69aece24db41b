// Rows a slab at a time, a lane's values in its registers. Set by the host: HIDDEN, INPUT (0 bf16, 1 f16), WEIGHTED,
// ALIGNED (x and its rows stand on 16 bytes), HOST_SLAB.
#pragma once
#include "common/quantize.cuh"
#include "rows/rows.cuh"

static_assert(SLAB == HOST_SLAB, "the host counts slabs, too");

constexpr int SLABS = (HIDDEN + SLAB - 1) / SLAB;

struct Slab {
    u32 pairs[PER_LANE / 2];
};

__device__ __forceinline__ Slab load_slab(const RowsArgs& a, int token, int slab) {
    Slab s;
    const int column = slab * SLAB + lane_of_thread() * PER_LANE;
    const u16* row = static_cast<const u16*>(a.x) + token * a.x_row_stride + column;
    if (column >= HIDDEN) {
#pragma unroll
        for (int i = 0; i < PER_LANE / 2; ++i) s.pairs[i] = 0;
        return s;
    }
#if ALIGNED
    const uint4 low = load_through_l1(row);
    const uint4 high = load_through_l1(row + 8);
    s.pairs[0] = low.x, s.pairs[1] = low.y, s.pairs[2] = low.z, s.pairs[3] = low.w;
    s.pairs[4] = high.x, s.pairs[5] = high.y, s.pairs[6] = high.z, s.pairs[7] = high.w;
#else
#pragma unroll
    for (int i = 0; i < PER_LANE / 2; ++i) s.pairs[i] = row[2 * i] | (u32)row[2 * i + 1] << 16;
#endif
    return s;
}

// What load_slab is going to read.
__device__ __forceinline__ void prefetch_slab(const RowsArgs& a, int token, int slab) {
    constexpr int LANES_TO_A_LINE = 128 / (2 * PER_LANE);
    const int column = slab * SLAB + lane_of_thread() * PER_LANE;
    if (lane_of_thread() % LANES_TO_A_LINE == 0 && column < HIDDEN)
        prefetch_line(static_cast<const u16*>(a.x) + token * a.x_row_stride + column);
}

// The router weight times the row, rounded to the row's own type.
__device__ __forceinline__ void apply_weight(const RowsArgs& a, int token, Slab& s) {
#if WEIGHTED
    const float weight = a.weights[token * a.weights_row_stride];
#pragma unroll
    for (int i = 0; i < PER_LANE / 2; ++i)
        s.pairs[i] = pack_halves<INPUT>(__fmul_rn(weight, low_half<INPUT>(s.pairs[i])),
                                        __fmul_rn(weight, high_half<INPUT>(s.pairs[i])));
#endif
}
