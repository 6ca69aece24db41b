// The products of the kernels for few rows: what scaling warps and consumers do.
#pragma once
#include "few_rows/storage.cuh"

// What scaling warps do: multiply the rows' scales by the weights', once for all warps that use them. `thread` counts
// the threads of the scaling warps; each has two rows. `blocks_of(ring)` is the number of blocks of K of the tile that
// starts there.
template <typename Ring, typename BlocksOf>
__device__ __forceinline__ void multiply_scales(Ring ring, int thread, BlocksOf blocks_of) {
    const u32 mine = (thread % 4 * Config::PRODUCTS_OF_LANE + thread / 4 * 2) * 4;
    while (true) {
        wait_for_phase(ring.full(), ring.parity());
        if (load_tile(ring.tile()).rows == 0) break;
        const int blocks = blocks_of(ring);
        for (int block = 0; block < blocks; ++block) {
            wait_for_phase(ring.full(), ring.parity());
            if (thread < Config::ROW_TILE / 2) {
                const float weight_scale = load_shared(ring.weight_scales());
                const float2 row_scale = load_shared_pair(ring.row_scales() + thread * 8);
                store_shared_pair(ring.products() + mine, __fmul_rn(row_scale.x, weight_scale),
                                  __fmul_rn(row_scale.y, weight_scale));
            }
            __syncwarp();
            if (thread % 32 == 0) arrive(ring.scaled());
            ring.advance();
        }
    }
}

// Blocks of K that a consumer has in the matrix unit at once, each in registers of its own. With one of them the matrix
// unit's latency, the waits for barriers and the scaling come one after the other, some 400 cycles for a block: too long
// where a tile is narrow. Of a wider one memory takes longer, and a stage in the matrix unit is none that is being
// loaded; in the joined launch several took up to 2 % less all the same.
constexpr int BLOCKS_IN_FLIGHT = (Config::OUTPUTS == 64 || Config::JOINED) && Config::SCALING_WARPS == 0 ? 4 : 1;

// Starts the products of the block of K that is next in the ring.
template <int N>
__device__ __forceinline__ void start_block(Ring& ring, int consumer, float (&part)[N / 2], bool add) {
    wait_unless_over(ring.full(), ring.parity(), false);
    const u64 w = operand(ring.weights() + consumer * Config::OUTPUTS_OF_CONSUMER * ROW_BYTES);
    start_products<Config::FORMAT, N>(part, w, operand(ring.rows()), add);
    ring.advance();
}

// Scales of the lane's rows among the I-th 16 of a block: those of rows 2 i and 2 i + 1 for lane i of a quad, then those
// of the rows eight further.
template <int I>
__device__ __forceinline__ float4 scales_of_rows(const Ring& ring, float weight_scale) {
    const int lane = lane_of_thread() % 4;
    if constexpr (Config::SCALING_WARPS > 0) {
        return load_shared_quad(ring.products() + lane * Config::PRODUCTS_OF_LANE * 4 + I * 16);
    } else {
        const float2 low = load_shared_pair(ring.row_scales() + (16 * I + 2 * lane) * 4);
        const float2 high = load_shared_pair(ring.row_scales() + (16 * I + 8 + 2 * lane) * 4);
        return make_float4(__fmul_rn(low.x, weight_scale), __fmul_rn(low.y, weight_scale),
                           __fmul_rn(high.x, weight_scale), __fmul_rn(high.y, weight_scale));
    }
}

// Adds a block's products, scaled, to the sums; from the I-th 16 rows on.
template <int N, int I = 0>
__device__ __forceinline__ void add_scaled(const Ring& ring, float weight_scale, const float (&part)[N / 2],
                                           float (&sum)[N / 2], StageLoads& loads) {
    const float4 scale = scales_of_rows<I>(ring, weight_scale);
    loads.add(scale.x);
    if constexpr (Config::SCALING_WARPS == 0) loads.add(scale.z);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
        const float mine = j % 2 == 0 ? (j < 4 ? scale.x : scale.z) : (j < 4 ? scale.y : scale.w);
        sum[8 * I + j] = __fmaf_rn(part[8 * I + j], mine, sum[8 * I + j]);
    }
    if constexpr (16 * (I + 1) < N) add_scaled<N, I + 1>(ring, weight_scale, part, sum, loads);
}

// Ends the block that has been in the matrix unit for longest, after which LATER are still there: adds its products to
// the sums and releases its stage.
template <int N, int LATER>
__device__ __forceinline__ void finish_block(Ring& ring, float (&part)[N / 2], float (&sum)[N / 2]) {
    float weight_scale = 0.0f;
    if constexpr (Config::SCALING_WARPS > 0)
        wait_unless_over(ring.scaled(), ring.parity(), false);
    else
        weight_scale = load_shared(ring.weight_scales());
    wait_for_products<LATER>();
    fence_accumulators(part);
    StageLoads loads;
    add_scaled<N>(ring, weight_scale, part, sum, loads);
    release_without_branch<Config>(loads.then(ring.empty()));
    ring.advance();
}

// The same for all blocks from the I-th of those in flight on.
template <int N, int FLIGHT, int I = 0>
__device__ __forceinline__ void finish_blocks(Ring& ring, float (&part)[FLIGHT][N / 2], float (&sum)[N / 2]) {
    finish_block<N, FLIGHT - 1 - I>(ring, part[I], sum);
    if constexpr (I + 1 < FLIGHT) finish_blocks<N, FLIGHT, I + 1>(ring, part, sum);
}

// Adds up `blocks` blocks of K, a multiple of FLIGHT, as many of which are in the matrix unit at once.
template <int N, int FLIGHT>
__device__ __forceinline__ void multiply_in_flight(Ring& ring, int blocks, int consumer, float (&sum)[N / 2]) {
    float part[FLIGHT][N / 2];
    Ring started = ring;
    for (int block = 0; block < blocks; block += FLIGHT) {
#pragma unroll
        for (int i = 0; i < FLIGHT; ++i) start_block<N>(started, consumer, part[i], false);
        finish_blocks<N, FLIGHT>(ring, part, sum);
    }
}

// The sum over this block's part of K: 64 outputs of N rows.
template <int N>
__device__ __forceinline__ void multiply_blocks(Ring& ring, int blocks, int consumer, float (&sum)[N / 2]) {
#pragma unroll
    for (int i = 0; i < N / 2; ++i) sum[i] = 0.0f;
    if constexpr (Config::SCALED) {
        constexpr int FLIGHT = BLOCKS_IN_FLIGHT;
        const int left = blocks % FLIGHT;
        if constexpr (FLIGHT > 1)
            if (left & 1) multiply_in_flight<N, 1>(ring, 1, consumer, sum);
        if constexpr (FLIGHT > 2)
            if (left & 2) multiply_in_flight<N, 2>(ring, 2, consumer, sum);
        if (blocks >= FLIGHT) multiply_in_flight<N, FLIGHT>(ring, blocks - left, consumer, sum);
    } else {
        u32 previous = 0;
        for (int block = 0; block < blocks; ++block) {
            const u32 current = ring.empty();
            start_block<N>(ring, consumer, sum, true);
            // The products before these are done: release their operands.
            wait_for_products<1>();
            if (block > 0) release<Config>(previous);
            previous = current;
        }
        wait_for_products<0>();
        fence_accumulators(sum);
        if (blocks > 0) release<Config>(previous);
    }
}

// This warp arrives at a barrier in every block of the cluster.
__device__ __forceinline__ void arrive_in_all_blocks(u32 barrier, int rank) {
    const int lane = lane_of_thread();
    if (lane == rank)
        arrive(barrier);
    else if (lane < Config::K_SPLITS)
        arrive_in_cluster(address_in_block(barrier, lane));
}

// Adds up the parts of K: every block leaves its sums in its own shared memory; each then reads a share of the rows
// from all.
template <int N>
__device__ __forceinline__ void add_and_store_rows(const Args& a, const Tile& tile, u32 memory, int consumer, int rank,
                                                   u32 parity, const float (&sum)[N / 2]) {
    constexpr int PARTIAL_ROW = Config::PARTIAL_ROW;
    const u32 ready = memory + OFFSET(SharedStorage, partials_ready);
    const u32 read = memory + OFFSET(SharedStorage, partials_read);
    const u32 staging = memory + OFFSET(SharedStorage, staging);
    const int lane = lane_of_thread();
    const int thread = threadIdx.x - WARPGROUP;
    wait_for_cluster(read, parity ^ 1);
    const int output = consumer * Config::OUTPUTS_OF_CONSUMER + threadIdx.x % WARPGROUP / 32 * 16 + lane / 4;
    const u32 mine = staging + lane % 4 * 2 * PARTIAL_ROW + output * 4;
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
        const u32 at = mine + (i / 4 * 8 + i % 2) * PARTIAL_ROW + i / 2 % 2 * 32;
        store_shared(at, sum[i]);
    }
    __syncwarp();
    arrive_in_all_blocks(ready, rank);
    wait_for_cluster(ready, parity);
    constexpr int QUADS = Config::OUTPUTS / 4;
    constexpr int SHARE = N * QUADS / Config::K_SPLITS;
    for (int i = thread; i < SHARE; i += Config::CONSUMERS * WARPGROUP) {
        const int row = (rank * SHARE + i) / QUADS;
        const int quad = i % QUADS;
        float4 total = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
        for (int part = 0; part < Config::K_SPLITS; ++part) {
            const float4 v = load_from_cluster(address_in_block(staging + row * PARTIAL_ROW + quad * 16, part));
            total = make_float4(__fadd_rn(total.x, v.x), __fadd_rn(total.y, v.y), __fadd_rn(total.z, v.z),
                                __fadd_rn(total.w, v.w));
        }
        const int column = tile.column + quad * 4;
        if (row < tile.rows && column < a.n && a.bias != nullptr) {
            const float* bias = a.bias + (i64)tile.expert * a.n + column;
            total = make_float4(__fadd_rn(total.x, bias[0]), __fadd_rn(total.y, bias[1]), __fadd_rn(total.z, bias[2]),
                                __fadd_rn(total.w, bias[3]));
        }
        if (row < tile.rows && column < a.n)
            *reinterpret_cast<uint2*>(static_cast<u16*>(a.out) + (i64)(tile.first + row) * a.n + column) =
                make_uint2(pack_bf16(total.x, total.y), pack_bf16(total.z, total.w));
    }
    __syncwarp();
    arrive_in_all_blocks(read, rank);
}

// A tile of up to N rows.
template <int N>
__device__ __forceinline__ void finish_tile(const Args& a, const Tile& tile, Ring& ring, int blocks, int consumer,
                                            int rank, u32 parity) {
    float sum[N / 2];
    multiply_blocks<N>(ring, blocks, consumer, sum);
    if constexpr (Config::K_SPLITS > 1) {
        add_and_store_rows<N>(a, tile, ring.memory, consumer, rank, parity, sum);
    } else {
        if (a.bias != nullptr) add_bias<N>(OutputPair(a.bias + (i64)tile.expert * a.n, a, tile, consumer), sum);
        store_rows<Config, SharedStorage, N>(a, tile, ring.memory, consumer, sum);
    }
}

// Takes the code for the fewest steps that the tile's rows fit: N of wgmma is a constant of the instruction.
template <int STEPS>
__device__ __forceinline__ void multiply_tile(const Args& a, const Tile& tile, Ring& ring, int blocks, int consumer,
                                              int rank, u32 parity) {
    if (STEPS == Config::ROW_MAPS || tile.rows <= STEPS * Config::ROW_STEP)
        finish_tile<STEPS * Config::ROW_STEP>(a, tile, ring, blocks, consumer, rank, parity);
    else if constexpr (STEPS < Config::ROW_MAPS)
        multiply_tile<STEPS + 1>(a, tile, ring, blocks, consumer, rank, parity);
}
