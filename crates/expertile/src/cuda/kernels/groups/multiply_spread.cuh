// MXFP4 weights whose scales are too far apart to be folded in: products are scaled by group of 32.
#pragma once
#include "groups/mxfp4.cuh"
#include "groups/storage.cuh"

// A unit whose scales are not folded in: the M operand, and for each of its two groups of 32 the powers of two of this
// thread's outputs, whose largest scales are `largest`.
struct SpreadUnit {
    static constexpr int GROUP_INSTRUCTIONS = GROUP_REGISTERS<FORMAT> / 4;

    u32 a[2 * GROUP_REGISTERS<FORMAT>];
    float powers[2][2];

    __device__ __forceinline__ SpreadUnit(const Unit& mine, const int (&largest)[2]) {
        decode_group<FORMAT, 0, false>(mine.words, mine.steps, a);
        decode_group<FORMAT, 1, false>(mine.words, mine.steps, a + GROUP_REGISTERS<FORMAT>);
#pragma unroll
        for (int i = 0; i < 4; ++i)
            powers[i / 2][i % 2] = power_of_two(exponent_of_sum<FORMAT>(largest[i % 2] - (int)mine.steps[i]));
    }
};

// Adds the products of a few rows with a unit, group by group: times the rows' scales, times the powers.
template <int ROWS, int GROUP = 0>
__device__ __forceinline__ void add_groups(const SpreadUnit& unit, u64 rows, u32 row_scales, float* sum) {
    constexpr int INSTRUCTIONS = SpreadUnit::GROUP_INSTRUCTIONS;
    float part[ROWS / 2];
    begin_products();
#pragma unroll
    for (int i = 0; i < INSTRUCTIONS; ++i)
        multiply_registers<FORMAT, ROWS>(part, unit.a + 4 * (GROUP * INSTRUCTIONS + i),
                                         rows + 2 * (GROUP * INSTRUCTIONS + i), i > 0);
    commit_products();
    wait_for_products<0>();
    fence_accumulators(part);
#pragma unroll
    for (int i = 0; i < ROWS / 2; i += 4) {
        float2 scale = make_float2(1.0f, 1.0f);
        if constexpr (Config::SCALED) scale = load_shared_pair(row_scales + (2 * i + lane_of_thread() % 4 * 2) * 4);
#pragma unroll
        for (int j = i; j < i + 4; ++j)
            sum[j] =
                __fmaf_rn(__fmul_rn(part[j], j % 2 == 0 ? scale.x : scale.y), unit.powers[GROUP][j / 2 % 2], sum[j]);
    }
    if constexpr (GROUP == 0) add_groups<ROWS, 1>(unit, rows, row_scales, sum);
}

// Adds up the blocks of K of a slab whose scales are too far apart. `largest`: the outputs' largest scales.
template <int N>
__device__ __forceinline__ void multiply_spread(Ring& ring, int k, int consumer, const int (&largest)[2],
                                                float (&sum)[N / 2]) {
    constexpr int ROWS = FORMAT == Format::BF16 && N % 32 == 0 ? 32 : 16;
    static_assert(N % ROWS == 0, "every row is in a piece");
    const UnitOffsets<N> mine;
    const int blocks = blocks_of(k);
    int units = (k + UNIT_K - 1) / UNIT_K;
    for (int block = 0; block < blocks; ++block) {
        wait_for_phase(ring.full(), ring.parity());
#pragma unroll 1
        for (int i = 0; i < min(units, Config::UNITS); ++i) {
            SpreadUnit unit(Unit(ring.weights(consumer) + i * UNIT_BYTES, mine), largest);
#pragma unroll
            for (int piece = 0; piece < N / ROWS; ++piece) {
                // A unit of e4m3 is 64 of the row's 128 bytes.
                const u64 rows = operand(ring.rows() + piece * ROWS * ROW_BYTES) + i * 4;
                add_groups<ROWS>(unit, rows, ring.row_scales() + piece * ROWS * 4, sum + piece * (ROWS / 2));
            }
            fence_operands(unit.a);
        }
        units -= Config::UNITS;
        StageLoads loads;
        if constexpr (Config::SCALED) {
            // The sums come of the scales.
#pragma unroll
            for (int i = 0; i < N / 2; i += 4) loads.add(sum[i]);
        }
        release<Config>(loads.then(ring.empty()));
        ring.advance();
    }
}
