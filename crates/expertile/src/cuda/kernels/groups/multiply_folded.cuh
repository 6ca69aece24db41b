// MXFP4 weights whose scales are folded into the decoded values: products of a block of K at once, and the largest
// scale of an output at the end.
#pragma once
#include "groups/mxfp4.cuh"
#include "groups/storage.cuh"

// The M operand of a block of K, of which `units` are there, or more. Past the last unit of K it is whatever the stage
// has, times rows that are zero (see clear_weights); where slabs may be spread it is zero, because what an earlier tile's
// scales make of values may be no number here.
template <int N>
__device__ __forceinline__ void decode_block(const Ring& ring, int consumer, const UnitOffsets<N>& mine, int units,
                                             u32 (&a)[Config::REGISTERS]) {
    constexpr int EACH = 2 * GROUP_REGISTERS<FORMAT>;
#pragma unroll
    for (int unit = 0; unit < Config::UNITS; ++unit) {
        u32* to = a + EACH * unit;
        if (!HOST_SPREAD || unit == 0 || unit < units) {
            Unit(ring.weights(consumer) + unit * UNIT_BYTES, mine).template decode<FORMAT>(to);
        } else {
#pragma unroll
            for (int i = 0; i < EACH; ++i) to[i] = 0;
        }
    }
}

// Starts the products of a piece's rows with a block of K.
template <int ROWS>
__device__ __forceinline__ void start_piece(float (&part)[ROWS / 2], const u32 (&a)[Config::REGISTERS], u32 rows) {
    const u64 b = operand(rows);
    begin_products();
#pragma unroll
    for (int i = 0; i < Config::INSTRUCTIONS; ++i) multiply_registers<FORMAT, ROWS>(part, a + 4 * i, b + 2 * i, i > 0);
    commit_products();
}

// Adds a piece's products, times the rows' scales, to its sums. `scales` are those of its first row on.
template <int ROWS>
__device__ __forceinline__ void add_scaled(u32 scales, const float (&part)[ROWS / 2], float* sum, StageLoads& loads) {
    const int lane = lane_of_thread() % 4;
#pragma unroll
    for (int i = 0; i < ROWS / 8; ++i) {
        const float2 scale = load_shared_pair(scales + (8 * i + 2 * lane) * 4);
        loads.add(scale.x);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            float& total = sum[4 * i + j];
            total = __fmaf_rn(part[4 * i + j], j % 2 == 0 ? scale.x : scale.y, total);
        }
    }
}

// The products of the pieces that run at once.
template <int N>
using Parts = float[PIECES_AT_ONCE<N>][PIECE<N> / 2];

// Adds the pieces of a block of K from PIECE_INDEX on, of which PIECES_AT_ONCE have been started; starts the others.
template <int N, int PIECE_INDEX = 0>
__device__ __forceinline__ void add_pieces(const u32 (&a)[Config::REGISTERS], u32 rows, u32 row_scales, Parts<N>& part,
                                           float (&sum)[N / 2], StageLoads& loads) {
    constexpr int ROWS = PIECE<N>;
    constexpr int PIECES = N / ROWS;
    constexpr int AT_ONCE = PIECES_AT_ONCE<N>;
    wait_for_products<AT_ONCE == 2 && PIECE_INDEX + 1 < PIECES>();
    fence_accumulators(part[PIECE_INDEX % AT_ONCE]);
    // Earlier pieces' scales have come: with one piece at a time later products need the registers that those were
    // multiplied from; with two the machine code says so, which benches/hopper/loads_at_arrival.py reads.
    if constexpr (PIECE_INDEX + 1 == PIECES) loads = StageLoads();
    add_scaled<ROWS>(row_scales + PIECE_INDEX * ROWS * 4, part[PIECE_INDEX % AT_ONCE], sum + PIECE_INDEX * (ROWS / 2),
                     loads);
    if constexpr (PIECE_INDEX + AT_ONCE < PIECES)
        start_piece<ROWS>(part[PIECE_INDEX % AT_ONCE], a, rows + (PIECE_INDEX + AT_ONCE) * ROWS * ROW_BYTES);
    if constexpr (PIECE_INDEX + 1 < PIECES) add_pieces<N, PIECE_INDEX + 1>(a, rows, row_scales, part, sum, loads);
}

// Waits for a block of K and decodes it; `units` are left of the slab from there on.
template <int N>
__device__ __forceinline__ void decode_next(const Ring& ring, int consumer, const UnitOffsets<N>& mine, int units,
                                            u32 (&a)[Config::REGISTERS]) {
    wait_unless_over(ring.full(), ring.parity(), false);
    decode_block(ring, consumer, mine, units, a);
}

// Adds a block of K of e4m3 rows, whose M operand is `a`, and meanwhile decodes the next one, if there is MORE.
template <int N>
__device__ __forceinline__ void add_block_scaled(Ring& ring, int consumer, const UnitOffsets<N>& mine, int& units,
                                                 bool more, u32 (&a)[Config::REGISTERS], u32 (&next)[Config::REGISTERS],
                                                 float (&sum)[N / 2]) {
    const u32 rows = ring.rows();
    const u32 row_scales = ring.row_scales();
    const u32 current = ring.empty();
    Parts<N> part;
    start_piece<PIECE<N>>(part[0], a, rows);
    if constexpr (PIECES_AT_ONCE<N> > 1) start_piece<PIECE<N>>(part[1], a, rows + PIECE<N> * ROW_BYTES);
    units -= Config::UNITS;
    ring.advance();
    if (DECODES_AHEAD<N> && more) decode_next(ring, consumer, mine, units, next);
    StageLoads loads;
    add_pieces<N>(a, rows, row_scales, part, sum, loads);
    fence_operands(a);
    release_without_branch<Config>(loads.then(current));
    if (!DECODES_AHEAD<N> && more) decode_next(ring, consumer, mine, units, next);
}

// The same of bf16 rows.
template <int N>
__device__ __forceinline__ void add_block_plain(Ring& ring, int consumer, const UnitOffsets<N>& mine, int& units,
                                                bool more, u32 (&a)[Config::REGISTERS], u32 (&next)[Config::REGISTERS],
                                                float (&sum)[N / 2]) {
    constexpr int ROWS = PIECE<N>;
    const u32 current = ring.empty();
    fence_accumulators(sum);
    begin_products();
#pragma unroll
    for (int piece = 0; piece < N / ROWS; ++piece) {
        const u64 b = operand(ring.rows() + piece * ROWS * ROW_BYTES);
#pragma unroll
        for (int i = 0; i < Config::INSTRUCTIONS; ++i)
            multiply_registers<FORMAT, ROWS>(sum + piece * (ROWS / 2), a + 4 * i, b + 2 * i, 1);
    }
    commit_products();
    units -= Config::UNITS;
    ring.advance();
    if (DECODES_AHEAD<N> && more) decode_next(ring, consumer, mine, units, next);
    wait_for_products<0>();
    fence_accumulators(sum);
    fence_operands(a);
    release_without_branch<Config>(current);
    if (!DECODES_AHEAD<N> && more) decode_next(ring, consumer, mine, units, next);
}

template <int N>
__device__ __forceinline__ void add_block(Ring& ring, int consumer, const UnitOffsets<N>& mine, int& units, bool more,
                                          u32 (&a)[Config::REGISTERS], u32 (&next)[Config::REGISTERS],
                                          float (&sum)[N / 2]) {
    if constexpr (Config::SCALED)
        add_block_scaled<N>(ring, consumer, mine, units, more, a, next, sum);
    else
        add_block_plain<N>(ring, consumer, mine, units, more, a, next, sum);
}

// Adds up the blocks of K. e4m3: products of 128 of K are scaled and added outside the matrix unit. bf16: sums stay in
// the matrix unit. Two blocks at a time, which take turns with the registers of the M operand.
template <int N>
__device__ __forceinline__ void multiply(Ring& ring, int k, int consumer, float (&sum)[N / 2]) {
    constexpr int OTHER = DECODES_AHEAD<N> ? 1 : 0;
    const UnitOffsets<N> mine;
    u32 a[1 + OTHER][Config::REGISTERS];
    int blocks = blocks_of(k);
    int units = (k + UNIT_K - 1) / UNIT_K;
    decode_next(ring, consumer, mine, units, a[0]);
    while (true) {
        add_block<N>(ring, consumer, mine, units, blocks > 1, a[0], a[OTHER], sum);
        if (--blocks == 0) break;
        add_block<N>(ring, consumer, mine, units, blocks > 1, a[OTHER], a[0], sum);
        if (--blocks == 0) break;
    }
}

// Multiplies the sums of an output by a power of two.
template <int N>
__device__ __forceinline__ void multiply_by_powers(const int (&exponents)[2], float (&sum)[N / 2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const Power power(exponents[half]);
#pragma unroll
        for (int i = 2 * half; i < N / 2; i += 4) {
            sum[i] = power.times(sum[i]);
            sum[i + 1] = power.times(sum[i + 1]);
        }
    }
}
