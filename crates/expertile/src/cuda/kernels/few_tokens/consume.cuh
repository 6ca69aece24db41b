// The layer in one launch: the warps that multiply, and what they do with a tile's results.
//
// Set by the host: OUTPUT (0 bf16, 1 f16, 2 f32), HOST_WEIGHT_ON_INPUT.
#pragma once
#include "few_tokens/slots.cuh"

// The host's `Arguments` in cuda/few_tokens.rs, member by member.
struct FewTokensArgs {
    TensorMap w13;  // [experts, 2 I, H]; a box is First::ROWS rows of a block of K
    TensorMap w2;   // [experts, H, I]; a box is Second::ROWS rows
    const u16* x;   // [tokens, H]
    i64 x_row_stride;
    const float* router_weights;  // [tokens, TOPK]
    i64 weights_row_stride;
    const float* w13_scales;  // [experts, 2 I / 128, H / 128], rounded up; null for bf16
    const float* w2_scales;   // [experts, H / 128, I / 128], likewise
    const float* biases[2];   // of w13 [experts, 2 I] and of w2 [experts, H]; null for none
    u16* gate_up;             // [tokens * TOPK, 2 I] bf16
    void* out;                // [tokens, H]
    Counters* counters;
};

// Where a consumer is in both rings.
struct Rings {
    Position<STAGES> weights;
    Position<ACTIVATED_STAGES> activated;

    template <bool SECOND>
    __device__ __forceinline__ void advance() {
        weights.advance();
        if (SECOND) activated.advance();
    }

    template <bool SECOND>
    __device__ __forceinline__ void skip_tile() {
        weights.skip<Half<SECOND>::BLOCKS>();
        if (SECOND) activated.skip<Half<SECOND>::BLOCKS>();
    }
};

// A stage's weights, and activated rows where they are used, are needed no more. Every lane of the warp calls.
template <bool SECOND>
__device__ __forceinline__ void release_block(u32 memory, const Rings& rings, const StageLoads& loads) {
    __syncwarp();
    const bool first = lane_of_thread() == 0;
    arrive_if(ELEMENT(memory, empty, rings.weights.place), first);
    if (SECOND) arrive_if(loads.then(ELEMENT(memory, activated_empty, rings.activated.place)), first);
}

// Registers of a tile's sums.
template <bool SECOND>
constexpr int SUMS = Half<SECOND>::COLUMNS / 2;

// Starts the products of a block of K.
template <bool SECOND>
__device__ __forceinline__ void start_block(u32 memory, Rings& rings, int block, float (&part)[SUMS<SECOND>],
                                            bool add) {
    wait_unless_over(ELEMENT(memory, full, rings.weights.place), rings.weights.parity, false);
    if (SECOND) wait_unless_over(ELEMENT(memory, activated_full, rings.activated.place), rings.activated.parity, false);
    const u32 rows = SECOND ? ELEMENT(memory, activated, rings.activated.place) : ELEMENT(memory, rows, block);
    start_products<FORMAT, Half<SECOND>::COLUMNS>(part, operand(ELEMENT(memory, weights, rings.weights.place)),
                                                  operand(rows), add);
    rings.advance<SECOND>();
}

// The scales of a thread's two weight rows: their addresses for the first block of K.
struct RowScales {
    u32 upper;
    u32 lower;
};

// Scales of a tile stand expert by expert, those of the block of its first output before those of the next block.
template <bool SECOND>
__device__ __forceinline__ RowScales row_scales_of(u32 weight_scales, int first_output) {
    const int row = threadIdx.x % WARPGROUP / 32 * 16 + lane_of_thread() / 4;
    const auto of_row = [&](int r) {
        // Rows past the last expert's take any.
        const int expert = min(r / Half<SECOND>::ROWS, Half<SECOND>::GROUP - 1);
        const int is_next = (first_output % SCALE_BLOCK + r % Half<SECOND>::ROWS) / SCALE_BLOCK;
        return weight_scales + (expert * 2 + is_next) * Half<SECOND>::SCALE_COLUMNS * 4;
    };
    return RowScales{of_row(row), of_row(row + 8)};
}

// Ends the block that has been in the matrix unit for longest, after which LATER are still there: adds its products,
// scaled, to the sums, and releases what it used.
template <bool SECOND, int LATER>
__device__ __forceinline__ void finish_block(u32 memory, Rings& rings, int block, const RowScales& scales,
                                             float (&part)[SUMS<SECOND>], float (&sum)[SUMS<SECOND>]) {
    const float upper = load_shared(scales.upper + block * 4);
    const float lower = load_shared(scales.lower + block * 4);
    const u32 of_columns =
        SECOND ? ELEMENT(memory, activated_scales, rings.activated.place) : ELEMENT(memory, row_scales, block);
    wait_for_products<LATER>();
    fence_accumulators(part);
    StageLoads loads;
#pragma unroll
    for (int i = 0; i < SUMS<SECOND> / 4; ++i) {
        const float2 column = load_shared_pair(of_columns + (8 * i + lane_of_thread() % 4 * 2) * 4);
        loads.add(column.x);
        sum[4 * i] = __fmaf_rn(part[4 * i], __fmul_rn(column.x, upper), sum[4 * i]);
        sum[4 * i + 1] = __fmaf_rn(part[4 * i + 1], __fmul_rn(column.y, upper), sum[4 * i + 1]);
        sum[4 * i + 2] = __fmaf_rn(part[4 * i + 2], __fmul_rn(column.x, lower), sum[4 * i + 2]);
        sum[4 * i + 3] = __fmaf_rn(part[4 * i + 3], __fmul_rn(column.y, lower), sum[4 * i + 3]);
    }
    release_block<SECOND>(memory, rings, loads);
    rings.advance<SECOND>();
}

// The same for all blocks from the I-th of those in flight on.
template <bool SECOND, int FLIGHT, int I = 0>
__device__ __forceinline__ void finish_blocks(u32 memory, Rings& rings, int block, const RowScales& scales,
                                              float (&part)[FLIGHT][SUMS<SECOND>], float (&sum)[SUMS<SECOND>]) {
    finish_block<SECOND, FLIGHT - 1 - I>(memory, rings, block + I, scales, part[I], sum);
    if constexpr (I + 1 < FLIGHT) finish_blocks<SECOND, FLIGHT, I + 1>(memory, rings, block, scales, part, sum);
}

// Adds up the blocks of K from `first` to `end`, a multiple of FLIGHT, as many of which are in the matrix unit at once:
// see BLOCKS_IN_FLIGHT in gemm/sm90_gemm_few_rows.cu.
template <bool SECOND, int FLIGHT>
__device__ __forceinline__ void multiply_in_flight(u32 memory, Rings& rings, int first, int end,
                                                   const RowScales& scales, float (&sum)[SUMS<SECOND>]) {
    float part[FLIGHT][SUMS<SECOND>];
    Rings started = rings;
#pragma unroll 1
    for (int block = first; block < end; block += FLIGHT) {
#pragma unroll
        for (int i = 0; i < FLIGHT; ++i) start_block<SECOND>(memory, started, block + i, part[i], false);
        finish_blocks<SECOND, FLIGHT>(memory, rings, block, scales, part, sum);
    }
}

// The sums of a tile. The blocks of K are added up one after the other, as in every GEMM kernel, so that the bits are
// the same.
template <bool SECOND>
__device__ __forceinline__ void multiply_tile(u32 memory, Rings& rings, const RowScales& scales,
                                              float (&sum)[SUMS<SECOND>]) {
    constexpr int BLOCKS = Half<SECOND>::BLOCKS;
#pragma unroll
    for (int i = 0; i < SUMS<SECOND>; ++i) sum[i] = 0.0f;
    if constexpr (SCALED) {
        // More of them would hold stages that could be loaded.
        constexpr int FLIGHT = Half<SECOND>::COLUMNS <= 16 ? 4 : 2;
        constexpr int LEFT = BLOCKS % FLIGHT;
        if constexpr ((LEFT & 1) != 0) multiply_in_flight<SECOND, 1>(memory, rings, 0, 1, scales, sum);
        if constexpr ((LEFT & 2) != 0) multiply_in_flight<SECOND, 2>(memory, rings, LEFT & 1, LEFT, scales, sum);
        if constexpr (BLOCKS >= FLIGHT) multiply_in_flight<SECOND, FLIGHT>(memory, rings, LEFT, BLOCKS, scales, sum);
    } else {
        Rings started = rings;
#pragma unroll 1
        for (int block = 0; block < BLOCKS; ++block) {
            start_block<SECOND>(memory, started, block, sum, true);
            // The products before these are done: release their operands.
            wait_for_products<1>();
            if (block == 0) continue;
            release_block<SECOND>(memory, rings, StageLoads());
            rings.advance<SECOND>();
        }
        wait_for_products<0>();
        fence_accumulators(sum);
        release_block<SECOND>(memory, rings, StageLoads());
        rings.advance<SECOND>();
    }
}

// The biases of a thread's two weight rows in a tile, the second eight further.
template <bool SECOND>
struct TileBiases {
    float of[2] = {0.0f, 0.0f};
    bool are_there;

    __device__ __forceinline__ TileBiases(const FewTokensArgs& a, const SharedStorage& s, const LayerTile& tile) {
        using H = Half<SECOND>;
        const float* biases = a.biases[SECOND ? 1 : 0];
        are_there = biases != nullptr;
        if (!are_there) return;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int in_tile = threadIdx.x % WARPGROUP / 32 * 16 + lane_of_thread() / 4 + half * 8;
            const int in_group = in_tile / H::ROWS;
            const int output = tile.output + in_tile % H::ROWS;
            if (in_group >= H::GROUP || tile.live + in_group >= s.live || output >= H::N) continue;
            // Volatile: loaded here, long before it is needed.
            of[half] =
                *static_cast<const volatile float*>(biases + (i64)s.live_experts[tile.live + in_group] * H::N + output);
        }
    }

    __device__ __forceinline__ void add_to(float (&sum)[SUMS<SECOND>]) const {
        if (!are_there) return;
#pragma unroll
        for (int i = 0; i < SUMS<SECOND>; ++i) sum[i] = __fadd_rn(sum[i], of[i / 2 % 2]);
    }
};

// The threads of a consumer warpgroup meet.
__device__ __forceinline__ void meet_consumer(int consumer) {
    if (consumer == 0)
        meet_at<(int)NamedBarrier::CONSUMER_0, WARPGROUP>();
    else
        meet_at<(int)NamedBarrier::CONSUMER_1, WARPGROUP>();
}

// A tile of the first GEMM: its results to memory, and word to those that activate them.
__device__ __forceinline__ void finish_first(const FewTokensArgs& a, const SharedStorage& s, const LayerTile& tile,
                                             int expert, int consumer, const float (&sum)[SUMS<false>]) {
    const u32 tokens = s.tokens_of[expert];
    const int lane = lane_of_thread();
    const int row = threadIdx.x % WARPGROUP / 32 * 16 + lane / 4;
#pragma unroll
    for (int i = 0; i < First::COLUMNS / 4; ++i) {
        const int token = i / 2 * 8 + lane % 4 * 2 + i % 2;
        if (token >= TOKENS || (tokens >> token & 1u) == 0) continue;
        u16* to = a.gate_up + (i64)row_of_token(s, token, expert) * First::N + tile.output;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int in_tile = row + half * 8;
            if (in_tile < First::ROWS && tile.output + in_tile < First::N)
                to[in_tile] = (u16)pack_bf16(sum[i / 2 * 4 + half * 2 + i % 2], 0.0f);
        }
    }
    meet_consumer(consumer);
    if (threadIdx.x % WARPGROUP == 0) {
        __threadfence();
        atomicAdd(&a.counters->multiplied[tile.epoch][tile.live], 1u);
    }
}

// A tile of the second GEMM: of each expert's rows the products with its own columns, in shared memory.
__device__ __forceinline__ void finish_second(SharedStorage& s, const LayerTile& tile, const float (&sum)[SUMS<true>]) {
    const int lane = lane_of_thread();
    const int row = threadIdx.x % WARPGROUP / 32 * 16 + lane / 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int in_tile = row + half * 8;
        const int in_group = in_tile / Second::ROWS;
        if (in_group >= Second::GROUP || tile.live + in_group >= s.live) continue;
        const int expert = s.live_experts[tile.live + in_group];
        const u32 tokens = s.tokens_of[expert];
#pragma unroll
        for (int i = 0; i < Second::COLUMNS / 4; ++i) {
            const int column = i / 2 * 8 + lane % 4 * 2 + i % 2;
            const int token = column / TOKENS == in_group ? nth_token(tokens, column % TOKENS) : -1;
            if (token < 0) continue;
            s.results[row_of_token(s, token, expert)][in_tile % Second::ROWS] =
                (u16)pack_bf16(sum[i / 2 * 4 + half * 2 + i % 2], 0.0f);
        }
    }
}

// Stores two neighbouring sums of a token.
__device__ __forceinline__ void store_sums(const FewTokensArgs& a, i64 at, float low, float high) {
    if (OUTPUT == 2)
        *reinterpret_cast<float2*>(static_cast<float*>(a.out) + at) = make_float2(low, high);
    else
        *reinterpret_cast<u32*>(static_cast<u16*>(a.out) + at) = pack_halves<OUTPUT>(low, high);
}

// The weighted sums of some outputs of every token, in the order of its slots. Both consumer warpgroups call; `thread` of
// CONSUMERS * WARPGROUP.
__device__ __forceinline__ void reduce(const FewTokensArgs& a, const SharedStorage& s, int tokens, int first_output,
                                       int thread) {
    meet_at<(int)NamedBarrier::CONSUMERS, CONSUMERS * WARPGROUP>();
    constexpr int PAIRS = Second::ROWS / 2;
    for (int item = thread; item < tokens * PAIRS; item += CONSUMERS * WARPGROUP) {
        const int token = item / PAIRS;
        const int in_tile = item % PAIRS * 2;
        if (first_output + in_tile >= HIDDEN) continue;
        float low = 0.0f;
        float high = 0.0f;
#pragma unroll
        for (int k = 0; k < TOPK; ++k) {
            const int slot = token * TOPK + k;
            const int row = s.row_of[slot];
            if (row < 0) continue;
            const float weight = s.router_weights[slot];
            const u32 pair = *reinterpret_cast<const u32*>(&s.results[row][in_tile]);
            const float x = low_half<0>(pair);
            const float y = high_half<0>(pair);
            low = __fadd_rn(low, HOST_WEIGHT_ON_INPUT ? x : __fmul_rn(weight, x));
            high = __fadd_rn(high, HOST_WEIGHT_ON_INPUT ? y : __fmul_rn(weight, y));
        }
        store_sums(a, (i64)token * HIDDEN + first_output + in_tile, low, high);
    }
    // Before results of other outputs take their place.
    meet_at<(int)NamedBarrier::CONSUMERS, CONSUMERS * WARPGROUP>();
}

// The loads of a tile's scales, of which all of its sums come.
template <int N>
__device__ __forceinline__ StageLoads loads_of(const float (&sum)[N]) {
    StageLoads loads;
    loads.add(sum[0]);  // of the thread's upper row
    loads.add(sum[2]);  // of its lower row
    return loads;
}

// What a consumer warpgroup does: every other tile, and its part of the sums.
__device__ __forceinline__ void consume(const FewTokensArgs& a, SharedStorage& s, u32 memory, int tokens,
                                        int consumer) {
    TileReader reader(memory);
    Rings rings;
    int turn = 0;
    u32 others_tiles = consumer ^ 1;  // the parity of the tile before this warpgroup's next
    wait_for_phase(memory + OFFSET(SharedStorage, rows_full), 0);
    while (true) {
        const LayerTile tile = reader.wait();
        if (tile.work == Work::END) break;
        if (tile.work == Work::REDUCE) {
            if (SCALED) wait_for_phase(ELEMENT(memory, scales_full, reader.at.place), reader.at.parity);
            reader.release();
            reduce(a, s, tokens, tile.output, threadIdx.x - FIRST_CONSUMER_WARP * 32);
            continue;
        }
        const bool is_mine = turn == consumer;
        turn ^= 1;
        const u32 weight_scales = ELEMENT(memory, weight_scales, reader.at.place);
        if (is_mine) {
            // The other's tile before this one: only after its blocks of K have come is the parity of the next ones'
            // barriers unambiguous.
            wait_for_phase(ELEMENT(memory, multiplied, consumer ^ 1), others_tiles);
            others_tiles ^= 1;
            if (SCALED) wait_for_phase(ELEMENT(memory, scales_full, reader.at.place), reader.at.parity);
        }
        if (!is_mine) {
            if (tile.work == Work::SECOND)
                rings.skip_tile<true>();
            else
                rings.skip_tile<false>();
            reader.release();
        } else if (tile.work == Work::SECOND) {
            float sum[SUMS<true>];
            const TileBiases<true> biases(a, s, tile);
            multiply_tile<true>(memory, rings, row_scales_of<true>(weight_scales, tile.output), sum);
            arrive_if(ELEMENT(memory, multiplied, consumer), lane_of_thread() == 0);
            reader.release(loads_of(sum));
            biases.add_to(sum);
            finish_second(s, tile, sum);
        } else {
            float sum[SUMS<false>];
            const TileBiases<false> biases(a, s, tile);
            multiply_tile<false>(memory, rings, row_scales_of<false>(weight_scales, tile.output), sum);
            arrive_if(ELEMENT(memory, multiplied, consumer), lane_of_thread() == 0);
            reader.release(loads_of(sum));
            biases.add_to(sum);
            finish_first(a, s, tile, s.live_experts[tile.live], consumer, sum);
        }
    }
}
