// The grouped GEMM on Hopper for many rows: out[r, :] = weights[expert of r] * rows[r, :], live rows only, f32 sums,
// bf16 out.
//
// Tokens are the M operand of wgmma: a tile is up to 192 rows of one expert, 64 to a consumer warpgroup, and 128
// outputs, so that a block of K has one scale for all of a tile's weights and two for a thread's rows. A warpgroup
// without rows multiplies nothing. Loading, clusters and the order of tiles are those of sm90_gemm_few_rows.cu.
//
// With an activation, a tile's outputs are 64 of the gate and the 64 of up that belong to them; a cluster of two blocks
// then has the 128 results that share a scale. Consumers leave gate and up in shared memory as bf16, as they would be
// had they been stored; three warps of the producer's warpgroup activate and quantize them while the next tile is
// multiplied. The results are those of activation.cu.
//
// docs/kernels/gemm.md has the maps of threads, shared memory and barriers. Set by the host: see config.cuh;
// HOST_ROW_TILE is 192, HOST_ROW_STEP 64, HOST_K_SPLITS 1; HOST_ACTIVATION (1: HOST_MULTICAST is 1, operands are e4m3,
// and what common/activation.cuh asks for).
#include "gemm/pipeline.cuh"
#include "gemm/staging.cuh"

struct Config : HostConfig {
    static constexpr bool ACTIVATION = HOST_ACTIVATION;
    static constexpr int OUTPUTS = 128;
    static constexpr int ROWS_OF_CONSUMER = 64;
    static constexpr int CONSUMERS = 3;
    static constexpr int THREADS = (1 + CONSUMERS) * WARPGROUP;
    static constexpr int PRODUCER_REGISTERS = 56;
    static constexpr int CONSUMER_REGISTERS = 152;
    static constexpr int WEIGHT_BOXES = ACTIVATION ? 2 : 1;
    static constexpr bool GATE_AND_UP = ACTIVATION;
    static constexpr int CLUSTER_COLUMNS = ACTIVATION ? 2 : MULTICAST;
    static constexpr int CLUSTER = CLUSTER_COLUMNS * K_SPLITS;
    // The more, the less often weights are read, and the more rows have to stay in the cache meanwhile: on an H200 12
    // took 8 % less to 2 % more time than 8.
    static constexpr int ROW_TILES_PER_GROUP = 12;
    static constexpr bool CLAIMS = false;
    static constexpr int SCALING_WARPS = 0;
    static constexpr int LOADING_THREADS = 1;
    static constexpr int LISTED = 1024;

    static constexpr int SUMS = OUTPUTS / 2;  // of a consumer thread: 2 rows in 8 columns each, of 64 x OUTPUTS
    // Bytes from a staged row to the next: 16 more than its results, so that eight rows start on different banks.
    static constexpr int STAGING_ROW = OUTPUTS * 2 + 16;
    static constexpr int ACTIVATING_WARPS = CONSUMERS;  // each has the rows of one consumer
};

// Results before they are stored.
template <bool ACTIVATION>
struct Staging {
    alignas(16) u8 rows[Config::ROW_TILE][Config::STAGING_ROW];
};

// With an activation, also what consumers and activating warps hand to each other.
template <>
struct Staging<true> {
    alignas(16) u8 rows[Config::ROW_TILE][Config::STAGING_ROW];
    // Largest magnitude of each row's results: [0] this block's; [1], [2] the other block's, which it sends, of even
    // and odd tiles.
    float row_magnitudes[3][Config::ROW_TILE];
    Tile tiles[2];  // the tile that is staged: even, odd
    Mbarrier staged;
    Mbarrier activated;
    Mbarrier magnitudes[Config::ACTIVATING_WARPS];
};

// host: Wide in cuda/gemm/shared_memory.rs.
struct SharedStorage {
    Stage<Config> stages[Config::STAGES];
    Staging<Config::ACTIVATION> staging;
    alignas(16) float row_scales[Config::STAGES][Config::ROW_TILE];
    float weight_scales[Config::STAGES][Config::WEIGHT_BOXES];
    Tile tiles[Config::STAGES];
    Mbarrier full[Config::STAGES];
    Mbarrier empty[Config::STAGES];
    TileList<Config::LISTED> list;
};

static_assert(AgreesWithHost<Config, SharedStorage>::value);
static_assert(!Config::ACTIVATION || (Config::MULTICAST == 1 && Config::SCALED), "there is no kernel for this");
static_assert(Config::ROW_TILE == Config::CONSUMERS * Config::ROWS_OF_CONSUMER, "a consumer has 64 rows");
static_assert(Config::ROW_STEP == Config::ROWS_OF_CONSUMER && Config::K_SPLITS == 1, "there is no kernel for this");

using Args = GemmArgs<Config>;
using Ring = StageRing<Config, SharedStorage>;

// Warps of the first warpgroup, by number; the other warpgroups are consumers.
enum class ProducerWarp : int {
    LOAD = 0,            // one thread of it: the producer
    FIRST_ACTIVATE = 1,  // ACTIVATING_WARPS of them with an activation, else idle
};

__device__ __forceinline__ void start_block(const Ring& ring, int consumer, float (&sum)[Config::SUMS], bool add) {
    start_products<Config::FORMAT, Config::OUTPUTS>(
        sum, operand(ring.rows() + consumer * Config::ROWS_OF_CONSUMER * ROW_BYTES), operand(ring.weights()), add);
}

__device__ __forceinline__ Ring stage_before(Ring ring) {
    ring.stage = ring.stage > 0 ? ring.stage - 1 : Config::STAGES - 1;
    return ring;
}

// bf16: the sum stays in the matrix unit, two blocks of K in flight.
__device__ __forceinline__ void add_block(Ring& ring, int consumer, bool first, float (&sum)[Config::SUMS]) {
    wait_for_phase(ring.full(), ring.parity());
    start_block(ring, consumer, sum, true);
    // The products before these are done: release their operands.
    wait_for_products<1>();
    if (!first) release<Config>(stage_before(ring).empty());
    ring.advance();
}

// e4m3: a block's products, then scaled and added. `ready` says whether the block's stage has been seen to be full, and
// then whether the next one's has: that is asked before the sums are added, so that the answer is there after them.
__device__ __forceinline__ void add_scaled_block(Ring& ring, int consumer, u32 my_scales, bool& ready,
                                                 float (&part)[Config::SUMS], float (&sum)[Config::SUMS]) {
    constexpr int BOXES = Config::WEIGHT_BOXES;
    wait_unless_over(ring.full(), ring.parity(), ready);
    float weight_scale[BOXES];
#pragma unroll
    for (int i = 0; i < BOXES; ++i) weight_scale[i] = load_shared(ring.weight_scales() + i * 4);
    const float upper_scale = load_shared(ring.row_scales() + my_scales);
    const float lower_scale = load_shared(ring.row_scales() + my_scales + 32);
    start_block(ring, consumer, part, false);
    wait_for_products<0>();
    fence_accumulators(part);
    StageLoads loads;
    loads.add(upper_scale);
    loads.add(lower_scale);
#pragma unroll
    for (int i = 0; i < BOXES; ++i) loads.add(weight_scale[i]);
    release_without_branch<Config>(loads.then(ring.empty()));
    ring.advance();
    ready = is_phase_over(ring.full(), ring.parity());
#pragma unroll
    for (int i = 0; i < BOXES; ++i) {
        const float upper = __fmul_rn(upper_scale, weight_scale[i]);
        const float lower = __fmul_rn(lower_scale, weight_scale[i]);
#pragma unroll
        for (int j = i * (Config::SUMS / BOXES); j < (i + 1) * (Config::SUMS / BOXES); j += 4) {
            sum[j] = __fmaf_rn(part[j], upper, sum[j]);
            sum[j + 1] = __fmaf_rn(part[j + 1], upper, sum[j + 1]);
            sum[j + 2] = __fmaf_rn(part[j + 2], lower, sum[j + 2]);
            sum[j + 3] = __fmaf_rn(part[j + 3], lower, sum[j + 3]);
        }
    }
}

// All blocks of K of a tile: 64 rows by 128 outputs.
__device__ __forceinline__ void multiply_blocks(Ring& ring, int blocks, int consumer, float (&sum)[Config::SUMS]) {
#pragma unroll
    for (int i = 0; i < Config::SUMS; ++i) sum[i] = 0.0f;
    const u32 my_scales = (threadIdx.x - WARPGROUP) / 32 * 64 + lane_of_thread() / 4 * 4;
    float part[Config::SUMS];
    bool ready = false;
    // Unrolled by stages, so that a block's addresses are constants. A tile starts at the stage after the last tile's.
    for (int first = -ring.stage; first < blocks; first += Config::STAGES) {
#pragma unroll
        for (int stage = 0; stage < Config::STAGES; ++stage) {
            if (first + stage < 0) continue;
            if (first + stage >= blocks) break;
            ring.stage = stage;
            if constexpr (Config::SCALED)
                add_scaled_block(ring, consumer, my_scales, ready, part, sum);
            else
                add_block(ring, consumer, first + stage == 0, sum);
        }
    }
    if constexpr (!Config::SCALED) {
        wait_for_products<0>();
        fence_accumulators(sum);
        release<Config>(stage_before(ring).empty());
    }
}

// Stores the live rows by way of shared memory: a warp has 16 of its own.
__device__ __forceinline__ void store_rows(const Args& a, const Tile& tile, u32 memory, float (&sum)[Config::SUMS]) {
    const int first = (threadIdx.x - WARPGROUP) / 32 * 16;
    add_bias<Config, Config::SUMS>(a, tile, tile.column, sum);
    const u32 staging = memory + OFFSET(SharedStorage, staging.rows) + first * Config::STAGING_ROW;
    __syncwarp();
    stage_rows<Config, Config::SUMS>(staging, lane_of_thread(), sum);
    store_staged<Config, Config::OUTPUTS * 2>(a.out, (i64)a.n * 2, tile, first, tile.column * 2, staging);
}

#if HOST_ACTIVATION
#include "common/activation.cuh"

// Addresses of what consumers and activating warps share. `parity` is that of the tiles so far.
struct Handover {
    u32 memory;

    __device__ __forceinline__ u32 staging(int row) const {
        return memory + OFFSET(SharedStorage, staging.rows) + row * Config::STAGING_ROW;
    }
    __device__ __forceinline__ u32 own_magnitude(int row) const {
        return memory + OFFSET(SharedStorage, staging.row_magnitudes) + row * 4;
    }
    __device__ __forceinline__ u32 other_magnitude(u32 parity, int row) const {
        return memory + OFFSET(SharedStorage, staging.row_magnitudes) + ((1 + parity) * Config::ROW_TILE + row) * 4;
    }
    __device__ __forceinline__ u32 tile(u32 parity) const {
        return memory + OFFSET(SharedStorage, staging.tiles) + parity * 16;
    }
    __device__ __forceinline__ u32 staged() const { return memory + OFFSET(SharedStorage, staging.staged); }
    __device__ __forceinline__ u32 activated() const { return memory + OFFSET(SharedStorage, staging.activated); }
    __device__ __forceinline__ u32 magnitudes(int warp) const {
        return memory + OFFSET(SharedStorage, staging.magnitudes) + warp * 8;
    }

    // Before set_up, which publishes the barriers.
    __device__ __forceinline__ void init() const {
        if (threadIdx.x != 0) return;
        init_barrier(staged(), Config::CONSUMERS * (WARPGROUP / 32));
        init_barrier(activated(), Config::ACTIVATING_WARPS);
        for (int warp = 0; warp < Config::ACTIVATING_WARPS; ++warp) init_barrier(magnitudes(warp), 1);
    }
};

// Consumers: hand a tile's results to the activating warps, which have been given the tile. Every consumer warp calls,
// with rows or without.
__device__ __forceinline__ void hand_over(const Handover& s, bool has_rows, u32 parity,
                                          const float (&sum)[Config::SUMS]) {
    const int warp = (threadIdx.x - WARPGROUP) / 32;
    wait_for_phase(s.activated(), parity ^ 1);
    if (has_rows) stage_rows<Config, Config::SUMS>(s.staging(warp * 16), lane_of_thread(), sum);
    __syncwarp();
    if (lane_of_thread() == 0) arrive(s.staged());
}

// Eight lanes have a row, eight results each. The results replace gate and up until the row's scale is known.
constexpr int LANES_OF_ROW = 8;
constexpr int ROWS_AT_ONCE = 32 / LANES_OF_ROW;

__device__ __forceinline__ void activate_row(const Handover& s, int row, int rank, u32 parity, int warp) {
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
    // The exchange above came after every lane's loads.
    store_shared_quad(at + part * 32, y[0], y[1], y[2], y[3]);
    store_shared_quad(at + part * 32 + 16, y[4], y[5], y[6], y[7]);
    if (part == 0) {
        store_shared(s.own_magnitude(row), largest);
        send_word(address_in_block(s.other_magnitude(parity, row), rank ^ 1), largest,
                  address_in_block(s.magnitudes(warp), rank ^ 1));
    }
}

__device__ __forceinline__ void quantize_row(const Args& a, const Handover& s, const Tile& tile, int row, int rank,
                                             u32 parity) {
    const int part = lane_of_thread() % LANES_OF_ROW;
    const u32 at = s.staging(row);
    const float scale =
        scale_of(fmaxf(load_shared(s.own_magnitude(row)), load_shared(s.other_magnitude(parity, row))), false);
    const float4 low = load_shared_quad(at + part * 32);
    const float4 high = load_shared_quad(at + part * 32 + 16);
    const float y[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
    const Divisor<false> divisor(scale);
    if (row < tile.rows)
        *reinterpret_cast<uint2*>(static_cast<u8*>(a.out) + (i64)(tile.first + row) * (a.n / 2) + tile.column +
                                  part * 8) = make_uint2(quantize_four(divisor, y), quantize_four(divisor, y + 4));
    if (rank == 0 && part == 0) store_scale(a, tile, row, scale);
}

// What an activating warp does: the rows of one consumer, tile by tile.
__device__ __forceinline__ void activate_tiles(const Args& a, const Handover& s, int rank, int warp) {
    const int begin = warp * Config::ROWS_OF_CONSUMER;
    const int lane = lane_of_thread();
    for (u32 parity = 0;; parity ^= 1) {
        wait_for_phase(s.staged(), parity);
        const Tile tile = load_tile(s.tile(parity));
        if (tile.rows == 0) break;
        // Both blocks of the cluster have the same rows. A row past the last one is computed, too, and not stored.
        const int end =
            min(begin + Config::ROWS_OF_CONSUMER, (tile.rows + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE * ROWS_AT_ONCE);
        // Expected before the other block can know that it may send for the next tile. Also zero bytes, so that phases
        // keep step.
        if (lane == 0) arrive_expecting(s.magnitudes(warp), max(end - begin, 0) * 4);
        __syncwarp();
        for (int row = begin + lane / LANES_OF_ROW; row < end; row += ROWS_AT_ONCE)
            activate_row(s, row, rank, parity, warp);
        wait_for_cluster(s.magnitudes(warp), parity);
        __syncwarp();
        for (int row = begin + lane / LANES_OF_ROW; row < end; row += ROWS_AT_ONCE)
            quantize_row(a, s, tile, row, rank, parity);
        __syncwarp();
        if (lane == 0) arrive(s.activated());
    }
}
#else
// Named below, never called.
struct Handover {
    u32 memory;
    __device__ __forceinline__ u32 tile(u32) const { return 0; }
    __device__ __forceinline__ void init() const {}
};
__device__ __forceinline__ void hand_over(const Handover&, bool, u32, const float (&)[Config::SUMS]) {}
__device__ __forceinline__ void activate_tiles(const Args&, const Handover&, int, int) {}
#endif

extern "C" __global__ void __cluster_dims__(Config::CLUSTER, 1, 1) __launch_bounds__(Config::THREADS, 1)
    gemm(const __grid_constant__ Args a) {
    extern __shared__ __align__(1024) u8 shared[];
    const int rank = Config::CLUSTER > 1 ? (int)rank_in_cluster() : 0;
    // From one lane, so that the compiler knows them to be the same in all.
    const u32 memory = __shfl_sync(WARP, shared_address(shared), 0);
    const int consumer = __shfl_sync(WARP, (int)threadIdx.x / WARPGROUP, 0) - 1;
    Ring ring(memory);
    const Handover handover{memory};
    handover.init();
    set_up<Config, SharedStorage>(a, memory);
    wait_for_previous_launch();
    list_row_tiles(a, memory + OFFSET(SharedStorage, list));
    if (consumer < 0) {
        give_registers<Config::PRODUCER_REGISTERS>();
        if (threadIdx.x < 32 && elect_thread())
            produce<Config::SCALED>(
                a, ring,
                StaticScheduler<Config>(a, memory + OFFSET(SharedStorage, list), blockIdx.x / Config::CLUSTER,
                                        gridDim.x / Config::CLUSTER, rank),
                rank);
        if constexpr (Config::ACTIVATION) {
            const int warp = __shfl_sync(WARP, (int)threadIdx.x / 32, 0);
            if (warp >= (int)ProducerWarp::FIRST_ACTIVATE)
                activate_tiles(a, handover, rank, warp - (int)ProducerWarp::FIRST_ACTIVATE);
        }
    } else {
        take_registers<Config::CONSUMER_REGISTERS>();
        const int blocks = KRange<Config>(a.k, rank).blocks();
        // Here rather than in a function of its own, which gives the compiler another order of instructions.
        while (true) {
            wait_for_phase(ring.full(), ring.parity());
            const Tile tile = load_tile(ring.tile());
            if constexpr (Config::ACTIVATION) {
                // Overwrites the tile before the last one, which has been activated: every hand_over waits for that.
                if (threadIdx.x == WARPGROUP) store_tile(handover.tile(ring.tile_parity()), tile);
                const bool has_rows = tile.rows > consumer * Config::ROWS_OF_CONSUMER;
                const bool is_last = tile.rows == 0;
                float sum[Config::SUMS];
                if (has_rows)
                    multiply_blocks(ring, blocks, consumer, sum);
                else if (!is_last)
                    skip_blocks(ring, blocks);
                hand_over(handover, has_rows, ring.tile_parity(), sum);
                ring.flip_tile_parity();
                if (is_last) break;
            } else {
                if (tile.rows == 0) break;
                if (tile.rows <= consumer * Config::ROWS_OF_CONSUMER) {
                    skip_blocks(ring, blocks);
                    continue;
                }
                float sum[Config::SUMS];
                multiply_blocks(ring, blocks, consumer, sum);
                store_rows(a, tile, memory, sum);
            }
        }
    }
    // Blocks of a cluster write to each other's memory: none may end before the others are done.
    if constexpr (Config::CLUSTER > 1) meet_cluster();
}
