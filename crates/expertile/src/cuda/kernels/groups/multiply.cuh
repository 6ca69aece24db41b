// A tile of weights with groups, from its stages to its stored rows.
#pragma once
#include "groups/multiply_folded.cuh"
#include "groups/multiply_int4.cuh"
#include "groups/multiply_spread.cuh"

// The exponents of the largest scales of this thread's outputs.
__device__ __forceinline__ int largest_scale(const Args& a, const Tile& tile, int consumer, int half) {
    const int outputs = (a.n + UNIT_OUTPUTS - 1) / UNIT_OUTPUTS * UNIT_OUTPUTS;
    const int output = min(tile.column + consumer * UNIT_OUTPUTS + output_of_thread() + 8 * half, outputs - 1);
    // Volatile: loaded here, long before it is needed.
    return *static_cast<const volatile u8*>(a.exponents + (i64)tile.expert * outputs + output);
}

// A tile of up to N rows. SPREAD: this warpgroup's scales are too far apart.
template <int N, bool SPREAD>
__device__ __forceinline__ void finish_tile(const Args& a, const Tile& tile, Ring& ring, int consumer) {
    float sum[N / 2];
#pragma unroll
    for (int i = 0; i < N / 2; ++i) sum[i] = 0.0f;
    if constexpr (HOST_INT4) {
        if constexpr (DECODES_AHEAD<N>)
            multiply_int4_ahead<N>(ring, a.k, consumer, a.f16_scales != 0, sum);
        else
            multiply_int4<N>(ring, a.k, consumer, a.f16_scales != 0, sum);
    } else {
        int exponents[2] = {largest_scale(a, tile, consumer, 0), largest_scale(a, tile, consumer, 1)};
        if constexpr (SPREAD) {
            multiply_spread<N>(ring, a.k, consumer, exponents, sum);
        } else {
            multiply<N>(ring, a.k, consumer, sum);
            exponents[0] = exponent_of_sum<FORMAT>(exponents[0]);
            exponents[1] = exponent_of_sum<FORMAT>(exponents[1]);
            multiply_by_powers<N>(exponents, sum);
        }
    }
    if (a.bias != nullptr) add_bias<N>(OutputPair(a.bias + (i64)tile.expert * a.n, a, tile, consumer), sum);
    store_rows<Config, SharedStorage, N>(a, tile, ring.memory, consumer, sum);
}

// Takes the code for the fewest steps that the tile's rows fit: N of wgmma is a constant of the instruction. Where
// scales are spread, that for the most: sums of rows that are not there are not stored.
template <int STEPS>
__device__ __forceinline__ void multiply_tile(const Args& a, const Tile& tile, Ring& ring, int consumer, bool spread) {
    if constexpr (HOST_SPREAD && STEPS == 1) {
        if (spread) {
            finish_tile<Config::ROW_TILE, true>(a, tile, ring, consumer);
            return;
        }
    }
    if (STEPS == Config::ROW_MAPS || tile.rows <= STEPS * Config::ROW_STEP)
        finish_tile<STEPS * Config::ROW_STEP, false>(a, tile, ring, consumer);
    else if constexpr (STEPS < Config::ROW_MAPS)
        multiply_tile<STEPS + 1>(a, tile, ring, consumer, spread);
}
