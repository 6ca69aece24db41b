// The grouped GEMM on Hopper for many rows: out[r, :] = weights[expert of r] * rows[r, :], live rows only, f32 sums, bf16 out.
//
// Tokens stand on the matrix unit's M side: a tile is up to 192 rows of one expert, 64 to a warpgroup, and 128 outputs, so
// that a block of K has one scale for all of a tile's weights and two for a thread's rows. A warpgroup without rows
// multiplies nothing. The rest is as in gemm.cu, for few rows.
//
// With an activation, a tile's outputs are 64 of the gate and the 64 of up that belong to them; a cluster of two blocks then has the
// 128 results that share a scale. gate and up are left in shared memory as bf16, as they would be had they been stored, and three
// warps that have nothing else to do activate and quantize them while the next tile is multiplied: the results are those of
// activation.cu.
//
// Set by whoever compiles: as gemm.cuh says; TOKENS is 192, STEP 64, SPLITS 1; ACTIVATION (1: SHARED is 1, operands are e4m3,
// and activation.cuh's).
constexpr int OUTPUTS = 128;
constexpr int GROUPS = 3;
constexpr int ROWS_OF_GROUP = 64;
// A row of results: padded, so that eight of them start on different banks.
constexpr int STAGING_ROW = OUTPUTS * 2 + 16;
// With an activation, also the largest magnitudes of each row: this block's, and those that the other one sends, of two tiles
// in turn; the tiles that these are; and barriers: staged, activated, and one for the magnitudes of each activating warp.
constexpr int STAGING_BYTES = TOKENS * STAGING_ROW + (ACTIVATION ? 3 * TOKENS * 4 + 80 : 0);
constexpr int SCALING_WARPS = 0;
// The more, the less often weights are read, and the more rows have to stay in the cache meanwhile: on an H200 12 took 8 % less to
// 2 % more time than 8.
constexpr int TOGETHER = 12;
constexpr int PARTS = ACTIVATION ? 2 : 1;
constexpr bool PARTS_APART = ACTIVATION;
constexpr int SIDE_BY_SIDE = ACTIVATION ? 2 : SHARED;
#if ACTIVATION
#include "activation.cuh"
#endif
#include "gemm.cuh"
#include "staging.cuh"

static_assert(!ACTIVATION || (SHARED == 1 && !BF16), "there is no kernel for this");

static_assert(TOKENS == GROUPS * ROWS_OF_GROUP && STEP == ROWS_OF_GROUP && SPLITS == 1, "a warpgroup has 64 rows");

constexpr int SUMS = OUTPUTS / 2;

__device__ __forceinline__ void start_block(const Ring& ring, int group, float (&sum)[SUMS], bool add) {
    start_products<OUTPUTS>(sum, operand(ring.rows() + group * ROWS_OF_GROUP * ROW_BYTES), operand(ring.weights()), add);
}

#if BF16
__device__ __forceinline__ Ring stage_before(Ring ring) {
    ring.stage = ring.stage > 0 ? ring.stage - 1 : STAGES - 1;
    return ring;
}

__device__ __forceinline__ void multiply_block(Ring& ring, int group, bool first, float (&sum)[SUMS]) {
    wait_for_phase(ring.full(), ring.parity());
    start_block(ring, group, sum, true);
    // The products before these are done: their operands may go.
    wait_for_products<1>();
    if (!first) release(stage_before(ring).empty());
}
#else
// `ready` says whether the block has been seen to be there, and then whether the next one has: that is asked before the sums are
// added, so that the answer is there after them.
__device__ __forceinline__ void multiply_block(Ring& ring, int group, u32 my_scales, bool& ready, float (&part)[SUMS],
                                               float (&sum)[SUMS]) {
    wait_unless_over(ring.full(), ring.parity(), ready);
    float weight_scale[PARTS];
#pragma unroll
    for (int i = 0; i < PARTS; ++i) weight_scale[i] = load_shared(ring.weight_scale() + i * 4);
    const float upper_scale = load_shared(ring.row_scales() + my_scales);
    const float lower_scale = load_shared(ring.row_scales() + my_scales + 32);
    start_block(ring, group, part, false);
    wait_for_products<0>();
    hold(part);
    release_at_once(ring.empty());
    ring.advance();
    ready = is_phase_over(ring.full(), ring.parity());
#pragma unroll
    for (int i = 0; i < PARTS; ++i) {
        const float upper = __fmul_rn(upper_scale, weight_scale[i]);
        const float lower = __fmul_rn(lower_scale, weight_scale[i]);
#pragma unroll
        for (int j = i * (SUMS / PARTS); j < (i + 1) * (SUMS / PARTS); j += 4) {
            sum[j] = __fmaf_rn(part[j], upper, sum[j]);
            sum[j + 1] = __fmaf_rn(part[j + 1], upper, sum[j + 1]);
            sum[j + 2] = __fmaf_rn(part[j + 2], lower, sum[j + 2]);
            sum[j + 3] = __fmaf_rn(part[j + 3], lower, sum[j + 3]);
        }
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
    // A block's stage is known when this is compiled; a tile starts at the one after the last tile's.
    for (int first = -ring.stage; first < blocks; first += STAGES) {
#pragma unroll
        for (int stage = 0; stage < STAGES; ++stage) {
            if (first + stage < 0) continue;
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
    release(stage_before(ring).empty());
#endif
}

#if ACTIVATION
constexpr int ACTIVATING_WARPS = 3;
constexpr int ACTIVATED_STAGING = STAGING + TOKENS * STAGING_ROW;

struct Activation {
    u32 memory;
    __device__ __forceinline__ u32 staging(int row) const { return memory + STAGING + row * STAGING_ROW; }
    __device__ __forceinline__ u32 own_magnitude(int row) const { return memory + ACTIVATED_STAGING + row * 4; }
    __device__ __forceinline__ u32 other_magnitude(u32 parity, int row) const {
        return memory + ACTIVATED_STAGING + ((1 + parity) * TOKENS + row) * 4;
    }
    __device__ __forceinline__ u32 tile(u32 parity) const { return memory + ACTIVATED_STAGING + 3 * TOKENS * 4 + parity * 16; }
    __device__ __forceinline__ u32 staged() const { return tile(2); }
    __device__ __forceinline__ u32 activated() const { return tile(2) + 8; }
    __device__ __forceinline__ u32 magnitudes(int warp) const { return tile(3) + warp * 8; }
};

__device__ __forceinline__ void set_up_activation(const Activation& s) {
    if (threadIdx.x == 0) {
        init_barrier(s.staged(), CONSUMER_WARPS);
        init_barrier(s.activated(), ACTIVATING_WARPS);
        for (int warp = 0; warp < ACTIVATING_WARPS; ++warp) init_barrier(s.magnitudes(warp), 1);
    }
}

// A tile's results to the activating warps, which know of the tile; `parity` is that of the tiles so far. Every multiplying warp
// calls, with rows or without.
__device__ __forceinline__ void hand_over(const Activation& s, bool has_rows, u32 parity, const float (&sum)[SUMS]) {
    const int warp = (threadIdx.x - WARPGROUP) / 32;
    wait_for_phase(s.activated(), parity ^ 1);
    if (has_rows) stage_rows<SUMS>(s.staging(warp * 16), lane_of_thread(), sum);
    __syncwarp();
    if (lane_of_thread() == 0) arrive(s.staged());
}

// Eight lanes have a row, eight results each. Where gate and up stood, the results stand until the row's scale is known.
constexpr int LANES_OF_ROW = 8;
constexpr int ROWS_AT_ONCE = 32 / LANES_OF_ROW;

__device__ __forceinline__ void activate_row(const Activation& s, int row, int rank, u32 parity, int warp) {
    const int part = lane_of_thread() % LANES_OF_ROW;
    const u32 at = s.staging(row);
    const uint4 gate = load_shared_words(at + part * 16);
    const uint4 up = load_shared_words(at + 128 + part * 16);
    const u32 gates[4] = {gate.x, gate.y, gate.z, gate.w};
    const u32 ups[4] = {up.x, up.y, up.z, up.w};
    float y[8];
    float largest = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        y[i] = times_up(i % 2 == 0 ? low_half<0>(ups[i / 2]) : high_half<0>(ups[i / 2]),
                        gated(i % 2 == 0 ? low_half<0>(gates[i / 2]) : high_half<0>(gates[i / 2])));
        largest = fmaxf(largest, fabsf(y[i]));
    }
#pragma unroll
    for (int distance = LANES_OF_ROW / 2; distance > 0; distance /= 2)
        largest = fmaxf(largest, __shfl_xor_sync(WARP, largest, distance));
    // The exchange above has come after every lane's loads.
    store_shared_quad(at + part * 32, y[0], y[1], y[2], y[3]);
    store_shared_quad(at + part * 32 + 16, y[4], y[5], y[6], y[7]);
    if (part == 0) {
        store_shared(s.own_magnitude(row), largest);
        send_word(address_in_block(s.other_magnitude(parity, row), rank ^ 1), largest, address_in_block(s.magnitudes(warp), rank ^ 1));
    }
}

__device__ __forceinline__ void quantize_row(const GemmArgs& a, const Activation& s, const Tile& tile, int row, int rank, u32 parity) {
    const int part = lane_of_thread() % LANES_OF_ROW;
    const u32 at = s.staging(row);
    const float scale = scale_of(fmaxf(load_shared(s.own_magnitude(row)), load_shared(s.other_magnitude(parity, row))), false);
    const float4 low = load_shared_quad(at + part * 32);
    const float4 high = load_shared_quad(at + part * 32 + 16);
    const float y[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
    const Divisor<false> divisor(scale);
    if (row < tile.rows)
        *reinterpret_cast<uint2*>(static_cast<u8*>(a.out) + (i64)(tile.first + row) * (a.n / 2) + tile.column + part * 8) =
            make_uint2(quantize_four(divisor, y), quantize_four(divisor, y + 4));
    if (rank == 0 && part == 0) store_scale(a, tile, row, scale);
}

// What an activating warp does: the rows of one multiplying warpgroup, tile by tile.
__device__ __forceinline__ void activate_tiles(const GemmArgs& a, const Activation& s, int rank, int warp) {
    const int begin = warp * ROWS_OF_GROUP;
    const int lane = lane_of_thread();
    for (u32 parity = 0;; parity ^= 1) {
        wait_for_phase(s.staged(), parity);
        const Tile tile = load_tile(s.tile(parity));
        if (tile.rows == 0) break;
        // Both blocks of the cluster have the same rows. A row past the last is worked on like one, and goes nowhere.
        const int end = min(begin + ROWS_OF_GROUP, (tile.rows + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE * ROWS_AT_ONCE);
        // Told before the other block can know that it may send for the next tile; also of nothing, so that phases keep step.
        if (lane == 0) arrive_expecting(s.magnitudes(warp), max(end - begin, 0) * 4);
        __syncwarp();
        for (int row = begin + lane / LANES_OF_ROW; row < end; row += ROWS_AT_ONCE) activate_row(s, row, rank, parity, warp);
        wait_for_cluster(s.magnitudes(warp), parity);
        __syncwarp();
        for (int row = begin + lane / LANES_OF_ROW; row < end; row += ROWS_AT_ONCE) quantize_row(a, s, tile, row, rank, parity);
        __syncwarp();
        if (lane == 0) arrive(s.activated());
    }
}
#else
// Live rows to their places, by way of shared memory: a warp has 16 of its own.
__device__ __forceinline__ void store_rows(const GemmArgs& a, const Tile& tile, u32 memory, const float (&sum)[SUMS]) {
    const int first = (threadIdx.x - WARPGROUP) / 32 * 16;
    const u32 staging = memory + STAGING + first * STAGING_ROW;
    __syncwarp();
    stage_rows<SUMS>(staging, lane_of_thread(), sum);
    store_staged<OUTPUTS * 2>(a.out, (i64)a.n * 2, tile, first, tile.column * 2, staging);
}
#endif

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, 1) gemm(const __grid_constant__ GemmArgs a) {
    extern __shared__ __align__(1024) u8 shared[];
    const int rank = CLUSTER > 1 ? (int)rank_in_cluster() : 0;
    // From one lane, so that the compiler knows them to be the same in all.
    const u32 memory = __shfl_sync(WARP, shared_address(shared), 0);
    const int group = __shfl_sync(WARP, (int)threadIdx.x / WARPGROUP, 0) - 1;
    Ring ring(memory);
#if ACTIVATION
    const Activation activation{memory};
    set_up_activation(activation);
#endif
    set_up(a, memory);
    wait_for_previous_launch();
    let_next_launch_start();
    if (group < 0) {
        give_registers<56>();
        if (threadIdx.x == 0) produce(a, ring, Rounds(a, blockIdx.x / CLUSTER, gridDim.x / CLUSTER, rank), rank);
#if ACTIVATION
        const int warp = __shfl_sync(WARP, (int)threadIdx.x / 32, 0);
        if (warp > 0) activate_tiles(a, activation, rank, warp - 1);
#endif
    } else {
        take_registers<152>();
        const Depth depth(a.k, rank);
        while (true) {
            wait_for_phase(ring.full(), ring.parity());
            const Tile tile = load_tile(ring.tile());
#if ACTIVATION
            // The tile before the last one has been activated: whoever hands over waits for that.
            if (threadIdx.x == WARPGROUP) store_tile(activation.tile(ring.parities >> 31), tile);
            const bool has_rows = tile.rows > group * ROWS_OF_GROUP;
            const bool is_last = tile.rows == 0;
            float sum[SUMS];
            if (has_rows)
                multiply_blocks(ring, depth.end, group, sum);
            else if (!is_last)
                pass_blocks(ring, depth.end);
            hand_over(activation, has_rows, ring.parities >> 31, sum);
            // The bit above the stages' is the tiles'.
            ring.parities ^= 1u << 31;
            if (is_last) break;
#else
            if (tile.rows == 0) break;
            if (tile.rows <= group * ROWS_OF_GROUP) {
                pass_blocks(ring, depth.end);
                continue;
            }
            float sum[SUMS];
            multiply_blocks(ring, depth.end, group, sum);
            store_rows(a, tile, memory, sum);
#endif
        }
    }
    // Blocks of a cluster write to each other's memory: none goes before the others are done.
    if (CLUSTER > 1) meet_cluster();
}
