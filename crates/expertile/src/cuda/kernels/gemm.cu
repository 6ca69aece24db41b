// The grouped GEMM on Hopper for few rows: out[r, :] = weights[expert of r] * rows[r, :], live rows only, f32 sums, bf16 out.
//
// Weights stand on the matrix unit's M side and tokens on its N side, which takes any multiple of 8: a tile is 128 outputs
// of up to TOKENS rows of one expert, and an expert's last tile costs what its rows cost, to STEP of them. Tiles come from
// the worklist that the plan left on the device, so padding is never read for its own sake, computed or stored.
//
// A block is persistent: one thread keeps the copy engine STAGES blocks of K ahead, two warpgroups multiply, 64 outputs
// each; or one, where a tile has 64 outputs, so that few tiles keep more multiprocessors reading. With e4m3 the sums of each 128 of K are scaled and added outside the matrix unit, which keeps fewer bits.
// A cluster of SHARED blocks takes neighbouring outputs of the same rows, each copying its share of them to all; a cluster of
// SPLITS blocks takes parts of K of the same tile and adds them up in the order of the parts, for when tiles are few.
//
// Set by whoever compiles: as gemm.cuh says; one of SHARED and SPLITS is 1; OUTPUTS_OF_TILE is 128, or 64 where both are 1.
constexpr int OUTPUTS = OUTPUTS_OF_TILE;
constexpr int OUTPUTS_OF_GROUP = 64;
constexpr int GROUPS = OUTPUTS / OUTPUTS_OF_GROUP;
// A row of results: padded, so that eight of them start on different banks.
constexpr int STAGING_ROW = OUTPUTS_OF_GROUP * 2 + 16;
constexpr int PARTIAL_ROW = 128 * 4 + 16;
constexpr int STAGING_BYTES = SPLITS > 1 ? TOKENS * PARTIAL_ROW : GROUPS * TOKENS * STAGING_ROW;
constexpr int SCALING_WARPS = BF16 ? 0 : (TOKENS / 2 + 31) / 32;
constexpr int TOGETHER = 8;
constexpr int PARTS = 1;
constexpr bool PARTS_APART = false;
constexpr int SIDE_BY_SIDE = SHARED;
#include "gemm.cuh"

static_assert(OUTPUTS == 128 || (OUTPUTS == 64 && SHARED == 1 && SPLITS == 1), "there is no kernel for this");
static_assert(SCALING_WARPS <= 3, "the producer's warpgroup has three warps to spare");

// Multiplies the rows' scales by the weights' once for all warps that use them; `thread` of the scaling warps has two rows.
__device__ __forceinline__ void multiply_scales(Ring ring, int blocks, int thread) {
    const u32 mine = (thread % 4 * SCALES_OF_LANE + thread / 4 * 2) * 4;
    while (true) {
        wait_for_phase(ring.full(), ring.parity());
        if (load_tile(ring.tile()).rows == 0) break;
        for (int block = 0; block < blocks; ++block) {
            wait_for_phase(ring.full(), ring.parity());
            if (thread < TOKENS / 2) {
                const float weight_scale = load_shared(ring.weight_scale());
                const float2 row_scale = load_shared_pair(ring.row_scales() + thread * 8);
                store_shared_pair(ring.scales() + mine, __fmul_rn(row_scale.x, weight_scale), __fmul_rn(row_scale.y, weight_scale));
            }
            __syncwarp();
            if (thread % 32 == 0) arrive(ring.scaled());
            ring.advance();
        }
    }
}

// The sum over this block's part of K: 64 outputs of N rows.
template <int N>
__device__ __forceinline__ void multiply_blocks(Ring& ring, int blocks, int group, float (&sum)[N / 2]) {
#pragma unroll
    for (int i = 0; i < N / 2; ++i) sum[i] = 0.0f;
#if BF16
    u32 previous = 0;
    for (int block = 0; block < blocks; ++block) {
        wait_for_phase(ring.full(), ring.parity());
        const u64 w = operand(ring.weights() + group * OUTPUTS_OF_GROUP * ROW_BYTES);
        const u64 x = operand(ring.rows());
        start_products<N>(sum, w, x, true);
        // The products before these are done: their operands may go.
        wait_for_products<1>();
        if (block > 0) release(previous);
        previous = ring.empty();
        ring.advance();
    }
    wait_for_products<0>();
    hold(sum);
    if (blocks > 0) release(previous);
#else
    const u32 my_scales = lane_of_thread() % 4 * SCALES_OF_LANE * 4;
    float part[N / 2];
    for (int block = 0; block < blocks; ++block) {
        wait_for_phase(ring.full(), ring.parity());
        const u64 w = operand(ring.weights() + group * OUTPUTS_OF_GROUP * ROW_BYTES);
        const u64 x = operand(ring.rows());
        start_products<N>(part, w, x, false);
        wait_for_phase(ring.scaled(), ring.parity());
        wait_for_products<0>();
        hold(part);
#pragma unroll
        for (int i = 0; i < N / 16; ++i) {
            const float4 scale = load_shared_quad(ring.scales() + my_scales + i * 16);
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                const float mine = j % 2 == 0 ? (j < 4 ? scale.x : scale.z) : (j < 4 ? scale.y : scale.w);
                sum[8 * i + j] = __fmaf_rn(part[8 * i + j], mine, sum[8 * i + j]);
            }
        }
        release(ring.empty());
        ring.advance();
    }
#endif
}

// Live rows to their places: turned by way of shared memory, then one copy of 64 outputs for each.
template <int N>
__device__ __forceinline__ void store_rows(const GemmArgs& a, const Tile& tile, u32 memory, int group, const float (&sum)[N / 2]) {
    const u32 staging = memory + STAGING + group * TOKENS * STAGING_ROW;
    const int lane = lane_of_thread();
    const int thread = threadIdx.x % WARPGROUP;
    wait_for_stores_to_read();
    meet(group);
    const u32 mine = staging + (lane / 16 * 8 + lane % 8) * STAGING_ROW + (thread / 32 * 16 + lane / 8 % 2 * 8) * 2;
#pragma unroll
    for (int i = 0; i < N / 16; ++i)
        store_transposed(mine + i * 16 * STAGING_ROW, pack_bf16(sum[8 * i], sum[8 * i + 1]), pack_bf16(sum[8 * i + 2], sum[8 * i + 3]),
                         pack_bf16(sum[8 * i + 4], sum[8 * i + 5]), pack_bf16(sum[8 * i + 6], sum[8 * i + 7]));
    publish_shared_writes();
    meet(group);
    const int column = tile.column + group * OUTPUTS_OF_GROUP;
    const int outputs = min(a.n - column, OUTPUTS_OF_GROUP);
    if (outputs > 0)
        for (int row = thread; row < tile.rows; row += WARPGROUP)
            store_bytes(static_cast<u16*>(a.out) + (i64)(tile.first + row) * a.n + column, staging + row * STAGING_ROW, outputs * 2);
    commit_stores();
}

// A barrier of every block that has a part hears of this warp.
__device__ __forceinline__ void tell_all_parts(u32 barrier, int rank) {
    const int lane = lane_of_thread();
    if (lane == rank)
        arrive(barrier);
    else if (lane < SPLITS)
        arrive_in_cluster(address_in_block(barrier, lane));
}

// The parts of K meet: every block leaves its part where all can read it, and adds up a share of the rows.
template <int N>
__device__ __forceinline__ void add_and_store_rows(const GemmArgs& a, const Tile& tile, u32 memory, int group, int rank, u32 parity,
                                                   const float (&sum)[N / 2]) {
    const u32 staging = memory + STAGING;
    const int lane = lane_of_thread();
    const int thread = threadIdx.x - WARPGROUP;
    wait_for_cluster(partials_read(memory), parity ^ 1);
    const int output = group * OUTPUTS_OF_GROUP + threadIdx.x % WARPGROUP / 32 * 16 + lane / 4;
    const u32 mine = staging + lane % 4 * 2 * PARTIAL_ROW + output * 4;
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
        const u32 at = mine + (i / 4 * 8 + i % 2) * PARTIAL_ROW + i / 2 % 2 * 32;
        store_shared(at, sum[i]);
    }
    __syncwarp();
    tell_all_parts(partials_ready(memory), rank);
    wait_for_cluster(partials_ready(memory), parity);
    constexpr int QUADS = OUTPUTS / 4;
    constexpr int SHARE = N * QUADS / SPLITS;
    for (int i = thread; i < SHARE; i += GROUPS * WARPGROUP) {
        const int row = (rank * SHARE + i) / QUADS;
        const int quad = i % QUADS;
        float4 total = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
        for (int part = 0; part < SPLITS; ++part) {
            const float4 v = load_from_cluster(address_in_block(staging + row * PARTIAL_ROW + quad * 16, part));
            total = make_float4(__fadd_rn(total.x, v.x), __fadd_rn(total.y, v.y), __fadd_rn(total.z, v.z), __fadd_rn(total.w, v.w));
        }
        const int column = tile.column + quad * 4;
        if (row < tile.rows && column < a.n)
            *reinterpret_cast<uint2*>(static_cast<u16*>(a.out) + (i64)(tile.first + row) * a.n + column) =
                make_uint2(pack_bf16(total.x, total.y), pack_bf16(total.z, total.w));
    }
    __syncwarp();
    tell_all_parts(partials_read(memory), rank);
}

template <int N>
__device__ __forceinline__ void finish_tile(const GemmArgs& a, const Tile& tile, Ring& ring, int blocks, int group, int rank, u32 parity) {
    float sum[N / 2];
    multiply_blocks<N>(ring, blocks, group, sum);
    if (SPLITS > 1)
        add_and_store_rows<N>(a, tile, ring.memory, group, rank, parity, sum);
    else
        store_rows<N>(a, tile, ring.memory, group, sum);
}

template <int PATH>
__device__ __forceinline__ void take_path(const GemmArgs& a, const Tile& tile, Ring& ring, int blocks, int group, int rank, u32 parity) {
    if (PATH == PATHS - 1 || tile.rows <= (PATH + 1) * STEP)
        finish_tile<(PATH + 1) * STEP>(a, tile, ring, blocks, group, rank, parity);
    else if constexpr (PATH + 1 < PATHS)
        take_path<PATH + 1>(a, tile, ring, blocks, group, rank, parity);
}

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, 1) gemm(const __grid_constant__ GemmArgs a) {
    extern __shared__ __align__(1024) u8 shared[];
    const u32 memory = shared_address(shared);
    const int rank = CLUSTER > 1 ? (int)rank_in_cluster() : 0;
    const int cluster = blockIdx.x / CLUSTER;
    const int clusters = gridDim.x / CLUSTER;
    const int group = (int)threadIdx.x / WARPGROUP - 1;
    Ring ring(memory);
    set_up(a, memory);
    wait_for_previous_launch();
    let_next_launch_start();
    if (group < 0) {
        // One warpgroup that multiplies has as many as it may from the start.
        if (GROUPS > 1) give_registers<40>();
        const int warp = threadIdx.x / 32;
        if (warp == 0) {
            if (threadIdx.x == 0) produce(a, ring, Rounds(a, cluster, clusters, rank), rank);
        } else if (warp <= SCALING_WARPS) {
            const Depth depth(a.k, rank);
            multiply_scales(ring, depth.end - depth.begin, threadIdx.x - 32);
        }
    } else {
        if (GROUPS > 1) take_registers<232>();
        const Depth depth(a.k, rank);
        u32 parity = 0;
        while (true) {
            wait_for_phase(ring.full(), ring.parity());
            const Tile tile = load_tile(ring.tile());
            if (tile.rows == 0) break;
            take_path<0>(a, tile, ring, depth.end - depth.begin, group, rank, parity);
            parity ^= 1;
        }
        wait_for_stores_to_read();
    }
    // Blocks of a cluster write to each other's memory: none goes before the others are done.
    if (CLUSTER > 1) meet_cluster();
}
