// The layer in one launch: the operands that are made here, quantized tokens and activated rows, in shared memory as the
// matrix unit reads them.
//
// Set by the host: INPUT (0 bf16, 1 f16), HOST_WEIGHT_ON_INPUT, and ALPHA, BETA, LIMITED, LIMIT of the activation.
#pragma once
#include "common/activation.cuh"
#include "few_tokens/slots.cuh"

// Where 16 bytes of a row of a block of K are: the 128-byte swizzle.
__device__ __forceinline__ u32 swizzled(u32 block, int row, int sixteen) {
    return block + row * ROW_BYTES + ((sixteen ^ (row & 7)) << 4);
}

// 16 values of a lane's slab of a token; zeros past the row.
__device__ __forceinline__ void load_token(const u16* row, int column, u32 (&pairs)[PER_LANE / 2]) {
    uint4 low = make_uint4(0, 0, 0, 0);
    uint4 high = low;
    if (column < HIDDEN) {
        low = load_through_l1(row + column);
        // A row is whole eights.
        if (column + 8 < HIDDEN) high = load_through_l1(row + column + 8);
    }
    pairs[0] = low.x, pairs[1] = low.y, pairs[2] = low.z, pairs[3] = low.w;
    pairs[4] = high.x, pairs[5] = high.y, pairs[6] = high.z, pairs[7] = high.w;
}

// A slab of a token to shared memory. Every lane of the warp calls.
__device__ __forceinline__ void store_token(u32 memory, int token, int column, u32 (&pairs)[PER_LANE / 2],
                                            float weight) {
#if HOST_WEIGHT_ON_INPUT
#pragma unroll
    for (int i = 0; i < PER_LANE / 2; ++i)
        pairs[i] = pack_halves<INPUT>(__fmul_rn(weight, low_half<INPUT>(pairs[i])),
                                      __fmul_rn(weight, high_half<INPUT>(pairs[i])));
#endif
    const int block = column / K_BLOCK;
    const u32 to = ELEMENT(memory, rows, block);
    if constexpr (SCALED) {
        float scale;
        const uint4 bytes = quantize_slab<INPUT, SCALE_BLOCK, false>(pairs, scale);
        if (block >= First::BLOCKS) return;
        store_shared_words(swizzled(to, token, column % K_BLOCK / 16), bytes);
        if (column % K_BLOCK == 0) store_shared(ELEMENT(memory, row_scales, block) + token * 4, scale);
    } else {
        if (block >= First::BLOCKS) return;
        const int sixteen = column % K_BLOCK / 8;
        store_shared_words(swizzled(to, token, sixteen), make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]));
        store_shared_words(swizzled(to, token, sixteen + 1), make_uint4(pairs[4], pairs[5], pairs[6], pairs[7]));
    }
}

// All tokens, a slab to a warp at a time and two in flight; `warp` of QUANTIZING_WARPS.
__device__ __forceinline__ void quantize_tokens(const u16* x, i64 x_row_stride, int tokens, u32 memory,
                                                const SharedStorage& s, int warp) {
    constexpr int SLABS = ceil_div(HIDDEN, SLAB);
    constexpr int IN_FLIGHT = 2;
    const int units = tokens * SLABS;
    for (int first = warp; first < units; first += IN_FLIGHT * QUANTIZING_WARPS) {
        u32 pairs[IN_FLIGHT][PER_LANE / 2];
#pragma unroll
        for (int i = 0; i < IN_FLIGHT; ++i) {
            const int unit = first + i * QUANTIZING_WARPS;
            const int column = unit % SLABS * SLAB + lane_of_thread() * PER_LANE;
            if (unit < units) load_token(x + unit / SLABS * x_row_stride, column, pairs[i]);
        }
#pragma unroll
        for (int i = 0; i < IN_FLIGHT; ++i) {
            const int unit = first + i * QUANTIZING_WARPS;
            if (unit >= units) break;
            const int column = unit % SLABS * SLAB + lane_of_thread() * PER_LANE;
            store_token(memory, unit / SLABS, column, pairs[i],
                        HOST_WEIGHT_ON_INPUT ? s.router_weights[unit / SLABS] : 1.0f);
        }
    }
    publish_shared_writes();
    __syncwarp();
    arrive_if(memory + OFFSET(SharedStorage, rows_full), lane_of_thread() == 0);
}

// Four neighbouring columns of gate and up.
struct GateAndUp {
    uint2 gate;
    uint2 up;
};

// A unit of activation is 128 columns of one row, four to a lane; its last lanes may be past the row.
constexpr int UNIT = 128;
constexpr int UNITS = ceil_div(INTERMEDIATE, UNIT);
constexpr int BLOCKS_OF_UNIT = UNIT / K_BLOCK;

__device__ __forceinline__ GateAndUp load_unit(const u16* gate_up, int row, int unit) {
    const int column = unit * UNIT + lane_of_thread() * 4;
    if (column >= INTERMEDIATE) return GateAndUp{make_uint2(0, 0), make_uint2(0, 0)};
    const u16* from = gate_up + (i64)row * (2 * INTERMEDIATE) + column;
    return GateAndUp{__ldcg(reinterpret_cast<const uint2*>(from)),
                     __ldcg(reinterpret_cast<const uint2*>(from + INTERMEDIATE))};
}

// Activates a unit into row `to` of its blocks of K, `blocks` of them, the first at `place` of the ring. Every lane of
// the warp calls.
__device__ __forceinline__ void activate_unit(u32 memory, const GateAndUp& raw, int to, int place, int blocks) {
    const u32 gates[2] = {raw.gate.x, raw.gate.y};
    const u32 ups[2] = {raw.up.x, raw.up.y};
    float y[4];
    float largest = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float gate = i % 2 == 0 ? low_half<0>(gates[i / 2]) : high_half<0>(gates[i / 2]);
        const float up = i % 2 == 0 ? low_half<0>(ups[i / 2]) : high_half<0>(ups[i / 2]);
        y[i] = times_up(up, gated(gate));
        largest = fmaxf(largest, fabsf(y[i]));
    }
    const int lane = lane_of_thread();
    if constexpr (SCALED) {
        const float scale = scale_of(group_max<SCALE_BLOCK, 4>(largest), false);
        const u32 bytes = quantize_four<false>(Divisor<false>(scale), y);
        store_shared(swizzled(ELEMENT(memory, activated, place), to, lane / 4) + lane % 4 * 4, __uint_as_float(bytes));
        if (lane == 0) store_shared(ELEMENT(memory, activated_scales, place) + to * 4, scale);
    } else {
        // Half of the lanes have the first block of K, half the second.
        const int block = lane / 16;
        const int at_place = place + block < ACTIVATED_STAGES ? place + block : place + block - ACTIVATED_STAGES;
        if (block < blocks)
            store_shared_pair(swizzled(ELEMENT(memory, activated, at_place), to, lane % 16 / 2) + lane % 2 * 8,
                              __uint_as_float(pack_bf16(y[0], y[1])), __uint_as_float(pack_bf16(y[2], y[3])));
    }
}

// The rows of `gate | up` that go to the columns of a group of experts, in the lanes: of column c lane c % 32 has them.
struct Sources {
    static constexpr int COLUMNS = Second::GROUP * TOKENS;
    static constexpr int EACH = ceil_div(COLUMNS, 32);
    int row[EACH];  // -1 for a column without a token

    __device__ __forceinline__ Sources(const SharedStorage& s, int first_live) {
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            const int column = i * 32 + lane_of_thread();
            const int live = first_live + column / TOKENS;
            row[i] = -1;
            if (column >= COLUMNS || live >= s.live) continue;
            const int expert = s.live_experts[live];
            const int token = nth_token(s.tokens_of[expert], column % TOKENS);
            if (token >= 0) row[i] = row_of_token(s, token, expert);
        }
    }

    // Every lane of the warp calls, with the same column.
    __device__ __forceinline__ int of(int column) const {
        if (EACH == 1) return __shfl_sync(WARP, row[0], column);
        return __shfl_sync(WARP, column < 32 ? row[0] : row[EACH - 1], column % 32);
    }
};

// Columns of a unit that are in flight at a time.
constexpr int COLUMNS_AT_ONCE = Sources::COLUMNS < 4 ? Sources::COLUMNS : 4;

// One unit of a group of experts: for all of its columns. `wait` is called after the first loads have been started.
template <typename Wait>
__device__ __forceinline__ void activate_columns(u32 memory, const u16* gate_up, const Sources& sources, int unit,
                                                 int place, int blocks, Wait wait) {
#pragma unroll 1
    for (int first = 0; first < Sources::COLUMNS; first += COLUMNS_AT_ONCE) {
        GateAndUp raw[COLUMNS_AT_ONCE];
        int row[COLUMNS_AT_ONCE];
#pragma unroll
        for (int i = 0; i < COLUMNS_AT_ONCE; ++i) {
            row[i] = sources.of(first + i);
            if (row[i] >= 0) raw[i] = load_unit(gate_up, row[i], unit);
        }
        if (first == 0) wait();
#pragma unroll
        for (int i = 0; i < COLUMNS_AT_ONCE; ++i)
            if (row[i] >= 0) activate_unit(memory, raw[i], first + i, place, blocks);
    }
}
