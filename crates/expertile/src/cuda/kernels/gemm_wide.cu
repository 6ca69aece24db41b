// The grouped GEMM on Hopper for many rows: out[r, :] = weights[expert of r] * rows[r, :], live rows only, f32 sums, bf16 out.
//
// Tokens stand on the matrix unit's M side: a tile is up to 192 rows of one expert, 64 to a warpgroup, and 128 outputs, so
// that a block of K has one scale for all of a tile's weights and two for a thread's rows. A warpgroup without rows
// multiplies nothing. The rest is as in gemm.cu, for few rows.
//
// Set by whoever compiles: as gemm.cuh says; TOKENS is 192, STEP 64, SPLITS 1.
constexpr int OUTPUTS = 128;
constexpr int GROUPS = 3;
constexpr int ROWS_OF_GROUP = 64;
// A row of results: padded, so that eight of them start on different banks.
constexpr int STAGING_ROW = OUTPUTS * 2 + 16;
constexpr int STAGING_BYTES = TOKENS * STAGING_ROW;
constexpr int SCALING_WARPS = 0;
constexpr bool FIRST_STAGE_FIRST = true;
// The more, the less often weights are read, and the more rows have to stay in the cache meanwhile: on an H200 12 took 8 % less to
// 2 % more time than 8.
constexpr int TOGETHER = 12;
constexpr int PARTS = 1;
constexpr bool PARTS_APART = false;
#include "gemm.cuh"

static_assert(TOKENS == GROUPS * ROWS_OF_GROUP && STEP == ROWS_OF_GROUP && SPLITS == 1, "a warpgroup has 64 rows");

constexpr int SUMS = OUTPUTS / 2;

__device__ __forceinline__ void start_block(const Ring& ring, int group, float (&sum)[SUMS], bool add) {
    start_products<OUTPUTS>(sum, operand(ring.rows() + group * ROWS_OF_GROUP * ROW_BYTES), operand(ring.weights()), add);
}

#if BF16
__device__ __forceinline__ void multiply_block(Ring& ring, int group, bool first, float (&sum)[SUMS]) {
    wait_for_phase(ring.full(), ring.parity());
    start_block(ring, group, sum, true);
    // The products before these are done: their operands may go.
    wait_for_products<1>();
    if (!first) {
        Ring previous = ring;
        previous.stage = ring.stage > 0 ? ring.stage - 1 : STAGES - 1;
        release(previous.empty());
    }
}
#else
// `ready` says whether the block has been seen to be there, and then whether the next one has: that is asked before the sums are
// added, so that the answer is there after them.
__device__ __forceinline__ void multiply_block(Ring& ring, int group, u32 my_scales, bool& ready, float (&part)[SUMS],
                                               float (&sum)[SUMS]) {
    wait_unless_over(ring.full(), ring.parity(), ready);
    const float weight_scale = load_shared(ring.weight_scale());
    const float upper_scale = load_shared(ring.row_scales() + my_scales);
    const float lower_scale = load_shared(ring.row_scales() + my_scales + 32);
    start_block(ring, group, part, false);
    wait_for_products<0>();
    hold(part);
    release_at_once(ring.empty());
    ring.advance();
    ready = is_phase_over(ring.full(), ring.parity());
    const float upper = __fmul_rn(upper_scale, weight_scale);
    const float lower = __fmul_rn(lower_scale, weight_scale);
#pragma unroll
    for (int j = 0; j < SUMS; j += 4) {
        sum[j] = __fmaf_rn(part[j], upper, sum[j]);
        sum[j + 1] = __fmaf_rn(part[j + 1], upper, sum[j + 1]);
        sum[j + 2] = __fmaf_rn(part[j + 2], lower, sum[j + 2]);
        sum[j + 3] = __fmaf_rn(part[j + 3], lower, sum[j + 3]);
    }
}
#endif

// 64 rows by 128 outputs.
__device__ __forceinline__ void multiply_blocks(Ring& ring, int blocks, int group, float (&sum)[SUMS]) {
#pragma unroll
    for (int i = 0; i < SUMS; ++i) sum[i] = 0.0f;
#if !BF16
    const u32 my_scales = (threadIdx.x - WARPGROUP) / 32 * 64 + lane_of_thread() / 4 * 4;
    float part[SUMS];
    bool ready = false;
#endif
    for (int first = 0; first < blocks; first += STAGES) {
#pragma unroll
        for (int stage = 0; stage < STAGES; ++stage) {
            if (first + stage >= blocks) break;
            ring.stage = stage;
#if BF16
            multiply_block(ring, group, first + stage == 0, sum);
            ring.advance();
#else
            multiply_block(ring, group, my_scales, ready, part, sum);
#endif
        }
    }
#if BF16
    wait_for_products<0>();
    hold(sum);
    ring.stage = (blocks - 1) % STAGES;
    release(ring.empty());
#endif
    ring.end_tile();
}

// A warp's 16 staged rows of BYTES to the places of those that are live, in rows of `width` bytes from byte `column` on. (The bulk
// copy engine takes one row at a time from a warp.)
template <int BYTES>
__device__ __forceinline__ void store_staged(void* out, i64 width, const Tile& tile, int first, int column, u32 staging) {
    constexpr int CHUNKS = BYTES / 16;
    constexpr int EACH = CHUNKS / 2;
    constexpr int AT_ONCE = EACH < 4 ? EACH : 4;
    static_assert(EACH % AT_ONCE == 0 && BYTES + 16 == STAGING_ROW, "lanes have as many chunks of 16 bytes, some at a time");
    // Read here, so that nothing that follows from it takes a register while a tile is multiplied.
    const int lane = read_lane();
    __syncwarp();
#pragma unroll
    for (int begin = 0; begin < EACH; begin += AT_ONCE) {
        uint4 chunks[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) {
            const int chunk = (begin + i) * 32 + lane;
            chunks[i] = load_shared_words(staging + chunk / CHUNKS * STAGING_ROW + chunk % CHUNKS * 16);
        }
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) {
            const int chunk = (begin + i) * 32 + lane;
            const int row = first + chunk / CHUNKS;
            const int at = column + chunk % CHUNKS * 16;
            if (row < tile.rows && at < width)
                *reinterpret_cast<uint4*>(static_cast<u8*>(out) + (tile.first + row) * width + at) = chunks[i];
        }
    }
}

// Live rows to their places, by way of shared memory: a warp has 16 of its own.
__device__ __forceinline__ void store_rows(const GemmArgs& a, const Tile& tile, u32 memory, const float (&sum)[SUMS]) {
    const int lane = lane_of_thread();
    const int first = (threadIdx.x - WARPGROUP) / 32 * 16;
    const u32 staging = memory + STAGING + first * STAGING_ROW;
    __syncwarp();
    const u32 mine = staging + lane % 16 * STAGING_ROW + lane / 16 * 16;
#pragma unroll
    for (int i = 0; i < SUMS; i += 8)
        store_matrices(mine + i * 4, pack_bf16(sum[i], sum[i + 1]), pack_bf16(sum[i + 2], sum[i + 3]), pack_bf16(sum[i + 4], sum[i + 5]),
                       pack_bf16(sum[i + 6], sum[i + 7]));
    store_staged<OUTPUTS * 2>(a.out, (i64)a.n * 2, tile, first, tile.column * 2, staging);
}

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, 1) gemm(const __grid_constant__ GemmArgs a) {
    extern __shared__ __align__(1024) u8 shared[];
    const u32 memory = shared_address(shared);
    const int rank = CLUSTER > 1 ? (int)rank_in_cluster() : 0;
    // From one lane, so that the compiler knows it to be the same in all.
    const int group = __shfl_sync(WARP, (int)threadIdx.x / WARPGROUP, 0) - 1;
    Ring ring(memory);
    set_up(a, memory);
    wait_for_previous_launch();
    let_next_launch_start();
    if (group < 0) {
        give_registers<56>();
        if (threadIdx.x == 0) produce(a, ring, Rounds(a, blockIdx.x / CLUSTER, gridDim.x / CLUSTER, rank), rank);
    } else {
        take_registers<152>();
        const Depth depth(a.k, rank);
        while (true) {
            wait_for_phase(ring.full(), ring.parity());
            const Tile tile = load_tile(ring.tile());
            if (tile.rows == 0) break;
            if (tile.rows <= group * ROWS_OF_GROUP) {
                pass_blocks(ring, depth.end);
                continue;
            }
            float sum[SUMS];
            multiply_blocks(ring, depth.end, group, sum);
            store_rows(a, tile, memory, sum);
        }
    }
    // Blocks of a cluster write to each other's memory: none goes before the others are done.
    if (CLUSTER > 1) meet_cluster();
}
