// int4 weights: the products of a group of 32 are multiplied by its scale.
#pragma once
#include "groups/storage.cuh"

// Starts the products of a piece's rows with a unit of int4: each group's apart.
template <int ROWS>
__device__ __forceinline__ void start_int4_piece(float (&parts)[2][ROWS / 2], const Int4Unit<FORMAT>& unit, u64 rows) {
    constexpr int INSTRUCTIONS = GROUP_REGISTERS<FORMAT> / 4;  // for a group
    begin_products();
#pragma unroll
    for (int i = 0; i < 2 * INSTRUCTIONS; ++i)
        multiply_registers<FORMAT, ROWS>(parts[i / INSTRUCTIONS], unit.a + 4 * i, rows + 2 * i, i % INSTRUCTIONS > 0);
    commit_products();
}

// Adds a piece's products to its sums: each group's times its scales, both groups' times the rows'.
template <int ROWS>
__device__ __forceinline__ void add_int4_piece(const float (&parts)[2][ROWS / 2], const float (&scales)[2][2],
                                               u32 row_scales, float* sum, StageLoads& loads) {
#pragma unroll
    for (int i = 0; i < ROWS / 2; i += 4) {
        float2 scale = make_float2(1.0f, 1.0f);
        if constexpr (Config::SCALED) {
            scale = load_shared_pair(row_scales + (2 * i + lane_of_thread() % 4 * 2) * 4);
            loads.add(scale.x);
        }
#pragma unroll
        for (int j = i; j < i + 4; ++j) {
            const float first = scales[0][j / 2 % 2];
            const float second = scales[1][j / 2 % 2];
            if constexpr (Config::SCALED)
                sum[j] = __fmaf_rn(__fmaf_rn(parts[1][j], second, __fmul_rn(parts[0][j], first)),
                                   j % 2 == 0 ? scale.x : scale.y, sum[j]);
            else
                sum[j] = __fmaf_rn(parts[1][j], second, __fmaf_rn(parts[0][j], first, sum[j]));
        }
    }
}

// The N operand of unit `index` of a block of K: a unit of e4m3 is 64 of the row's 128 bytes.
__device__ __forceinline__ u64 int4_rows(u32 rows, int index) { return operand(rows) + index * 4; }

// Adds the products of unit `index`, of which those of the first piece have been started.
template <int N>
__device__ __forceinline__ void add_int4_pieces(float (&parts)[2][PIECE<N> / 2], const Int4Unit<FORMAT>& unit, u32 rows,
                                                int index, const float (&scales)[2][2], u32 row_scales,
                                                float (&sum)[N / 2], StageLoads& loads) {
    constexpr int ROWS = PIECE<N>;
#pragma unroll
    for (int piece = 0; piece < N / ROWS; ++piece) {
        if (piece > 0) start_int4_piece<ROWS>(parts, unit, int4_rows(rows + piece * ROWS * ROW_BYTES, index));
        wait_for_products<0>();
        fence_accumulators(parts[0]);
        fence_accumulators(parts[1]);
        add_int4_piece<ROWS>(parts, scales, row_scales + piece * ROWS * 4, sum + piece * (ROWS / 2), loads);
    }
}

// Adds unit INDEX of a block of K, and meanwhile decodes the next one, if there is MORE.
template <int N, int INDEX>
__device__ __forceinline__ void add_int4_unit(Ring& ring, int consumer, bool more, bool f16_scales,
                                              Int4Unit<FORMAT>& unit, Int4Unit<FORMAT>& next, float (&sum)[N / 2]) {
    constexpr bool LAST = INDEX + 1 == Config::UNITS;
    const u32 rows = ring.rows();
    const u32 row_scales = ring.row_scales();
    const u32 current = ring.empty();
    float parts[2][PIECE<N> / 2];
    start_int4_piece<PIECE<N>>(parts, unit, int4_rows(rows, INDEX));
    if (LAST || !more) ring.advance();
    if (more) {
        if (LAST) wait_unless_over(ring.full(), ring.parity(), false);
        next.decode(ring.weights(consumer) + (LAST ? 0 : INDEX + 1) * UNIT_BYTES);
    }
    float scales[2][2];
    unit.scales(f16_scales, scales);
    StageLoads loads;
    add_int4_pieces<N>(parts, unit, rows, INDEX, scales, row_scales, sum, loads);
    fence_operands(unit.a);
    if (LAST || !more) release_without_branch<Config>(loads.then(current));
}

// Adds up the units of K of int4 weights: two at a time, which take turns with the registers of the M operand.
template <int N>
__device__ __forceinline__ void multiply_int4_ahead(Ring& ring, int k, int consumer, bool f16_scales,
                                                    float (&sum)[N / 2]) {
    Int4Unit<FORMAT> unit[2];
    int units = (k + UNIT_K - 1) / UNIT_K;
    wait_unless_over(ring.full(), ring.parity(), false);
    unit[0].decode(ring.weights(consumer));
    while (true) {
        add_int4_unit<N, 0>(ring, consumer, units > 1, f16_scales, unit[0], unit[1], sum);
        if (--units == 0) break;
        add_int4_unit<N, Config::UNITS - 1>(ring, consumer, units > 1, f16_scales, unit[1], unit[0], sum);
        if (--units == 0) break;
    }
}

// The same where there are registers for one unit.
template <int N>
__device__ __forceinline__ void multiply_int4(Ring& ring, int k, int consumer, bool f16_scales, float (&sum)[N / 2]) {
    const int blocks = blocks_of(k);
    int units = (k + UNIT_K - 1) / UNIT_K;
    for (int block = 0; block < blocks; ++block) {
        wait_for_phase(ring.full(), ring.parity());
        StageLoads loads;
#pragma unroll 1
        for (int i = 0; i < min(units, Config::UNITS); ++i) {
            Int4Unit<FORMAT> unit;
            unit.decode(ring.weights(consumer) + i * UNIT_BYTES);
            float scales[2][2];
            unit.scales(f16_scales, scales);
            float parts[2][PIECE<N> / 2];
            start_int4_piece<PIECE<N>>(parts, unit, int4_rows(ring.rows(), i));
            add_int4_pieces<N>(parts, unit, ring.rows(), i, scales, ring.row_scales(), sum, loads);
            fence_operands(unit.a);
        }
        units -= Config::UNITS;
        release<Config>(loads.then(ring.empty()));
        ring.advance();
    }
}
