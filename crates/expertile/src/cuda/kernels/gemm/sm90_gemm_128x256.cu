// The grouped GEMM on Hopper for the most rows, of e4m3: out[r, :] = weights[expert of r] * rows[r, :], live rows only,
// f32 sums, bf16 out.
//
// Tokens are the M operand of wgmma: a tile is up to 128 rows of one expert, 64 to a consumer warpgroup, and 256
// outputs. A consumer multiplies a quarter of the outputs at a time and has two quarters in flight, also across blocks
// of K and tiles: while the products of one quarter are computed, those of the quarter before are scaled and added. A
// consumer without rows multiplies nothing.
//
// A planning thread has the next tile ready while this one is loaded. Blocks claim tiles from one counter, in order:
// those that run together stay neighbours, read the same weights at the same time, and end together.
//
// With an activation, a tile's outputs are 128 of the gate and the 128 of up that belong to them: the results that
// share a scale. gate and up are rounded to bf16 first, as they would be had they been stored: the results are those of
// activation.cu.
//
// docs/kernels/gemm.md has the maps of threads, shared memory and barriers. Set by the host: see config.cuh;
// HOST_ROW_TILE is 128, HOST_ROW_STEP 64, HOST_MULTICAST and HOST_K_SPLITS 1, HOST_BF16 0; HOST_ACTIVATION (1: and what
// common/activation.cuh asks for).
#include "gemm/pipeline.cuh"
#include "gemm/staging.cuh"
#if HOST_ACTIVATION
#include "common/activation.cuh"
#endif

struct Config : HostConfig {
    static constexpr bool ACTIVATION = HOST_ACTIVATION;
    static constexpr int OUTPUTS = 256;
    static constexpr int ROWS_OF_CONSUMER = 64;
    static constexpr int CONSUMERS = 2;
    static constexpr int THREADS = (1 + CONSUMERS) * WARPGROUP;
    static constexpr int PRODUCER_REGISTERS = 40;
    static constexpr int CONSUMER_REGISTERS = 232;
    static constexpr int WEIGHT_BOXES = 2;
    static constexpr bool GATE_AND_UP = ACTIVATION;
    static constexpr int CLUSTER_COLUMNS = 1;
    static constexpr int CLUSTER = 1;
    // Tiles that run together then have about as many rows as outputs.
    static constexpr int ROW_TILES_PER_GROUP = 16;
    static constexpr bool CLAIMS = false;
    static constexpr int SCALING_WARPS = 0;
    static constexpr int LOADING_THREADS = 1;
    static constexpr int LISTED = 1024;

    static constexpr int SUMS = OUTPUTS / 2;  // of a consumer thread
    static constexpr int QUARTER = OUTPUTS / 4;
    // Results are staged 128 bytes of a row at a time. 16 bytes more to the next row, so that eight rows start on
    // different banks.
    static constexpr int STAGED_BYTES = 128;
    static constexpr int STAGING_ROW = STAGED_BYTES + 16;
};

// host: Large in cuda/gemm/shared_memory.rs.
struct SharedStorage {
    Stage<Config> stages[Config::STAGES];
    alignas(16) u8 staging[Config::ROW_TILE][Config::STAGING_ROW];
    alignas(16) float row_scales[Config::STAGES][Config::ROW_TILE];
    float weight_scales[Config::STAGES][Config::WEIGHT_BOXES];
    Tile tiles[Config::STAGES];
    Mbarrier full[Config::STAGES];
    Mbarrier empty[Config::STAGES];
    Mbarrier unused[Config::STAGES + 2];  // keeps the addresses below, and so the machine code, as they were measured
    Tile next_tile;                       // from the planning thread to the producer
    Mbarrier next_tile_ready;
    Mbarrier next_tile_taken;
    TileList<Config::LISTED> list;
};

static_assert(AgreesWithHost<Config, SharedStorage>::value);
static_assert(Config::ROW_TILE == Config::CONSUMERS * Config::ROWS_OF_CONSUMER, "a consumer has 64 rows");
static_assert(Config::ROW_STEP == Config::ROWS_OF_CONSUMER && Config::MULTICAST == 1 && Config::K_SPLITS == 1 &&
                  Config::SCALED,
              "there is no kernel for this");

using Args = GemmArgs<Config>;
using Ring = StageRing<Config, SharedStorage>;
constexpr int SUMS = Config::SUMS;
constexpr int QUARTER = Config::QUARTER;

// Warps of the first warpgroup, by number; the other warpgroups are consumers. One thread of each works, the other two
// warps idle.
enum class ProducerWarp : int {
    LOAD = 0,  // the producer
    PLAN = 1,  // has the producer's next tile ready
};

__device__ __forceinline__ u32 next_tile(u32 memory) { return memory + OFFSET(SharedStorage, next_tile); }
__device__ __forceinline__ u32 next_tile_ready(u32 memory) { return memory + OFFSET(SharedStorage, next_tile_ready); }
__device__ __forceinline__ u32 next_tile_taken(u32 memory) { return memory + OFFSET(SharedStorage, next_tile_taken); }

// Dynamic persistent scheduler. Block b starts with item b; where there are more items than blocks, it then claims
// whichever item is next, from a counter in the layout's header. Items are tiles, in TileOrder's order; those of the
// last round may be halves.
struct DynamicScheduler {
    const Args& a;
    const u32 blocks;
    TileOrder<Config> order;
    u32 whole_items;  // items from here on are halves of tiles, by rows
    u32 items;
    u32 item;

    __device__ __forceinline__ DynamicScheduler(const Args& args, u32 list, u32 block, u32 blocks)
        : a(args), blocks(blocks), order(args, list), item(block) {
        // Tiles of the last round are cut in halves where whole ones would leave half of the multiprocessors idle.
        const u32 last_round = order.items() % blocks;
        const u32 cut = 2 * last_round <= blocks ? last_round : 0;
        whole_items = order.items() - cut;
        items = whole_items + 2 * cut;
    }

    // One claim per item: the block that draws claim `items - 1` is the last and resets the counter.
    __device__ __forceinline__ void advance() {
        if (items <= blocks) {
            item += blocks;
            return;
        }
        const u32 claim = draw(reinterpret_cast<u32*>(a.header + 3));
        if (claim == items - 1) a.header[3] = 0;
        item = blocks + claim;
    }

    // The item's tile. The second half of a split tile may be empty (rows == 0).
    __device__ __forceinline__ Tile tile() const {
        const bool is_half = item >= whole_items;
        Tile tile = order.tile(a, is_half ? whole_items + (item - whole_items) / 2 : item, 0);
        if (is_half) tile.expert &= ~READ_ONCE;
        if (is_half && (item - whole_items) % 2 == 0) {
            tile.rows = min(tile.rows, Config::ROW_TILE / 2);
        } else if (is_half) {
            tile.first += Config::ROW_TILE / 2;
            tile.rows = max(tile.rows - Config::ROW_TILE / 2, 0);
        }
        return tile;
    }
};

// What the planning thread does: writes the next tile as soon as the producer has taken the one before.
__device__ __forceinline__ void plan_tiles(DynamicScheduler scheduler, u32 memory) {
    u32 parity = 1;
    for (; scheduler.item < scheduler.items; scheduler.advance()) {
        const Tile tile = scheduler.tile();
        if (tile.rows == 0) continue;
        wait_for_phase(next_tile_taken(memory), parity);
        store_tile(next_tile(memory), tile);
        arrive(next_tile_ready(memory));
        parity ^= 1;
    }
    wait_for_phase(next_tile_taken(memory), parity);
    store_tile(next_tile(memory), Tile{0, 0, 0, 0});
    arrive(next_tile_ready(memory));
}

// The producer's scheduler: takes the tiles that the planning thread has written.
struct PlannedTiles {
    u32 memory;
    u32 parity;

    // The next tile; false after the last one.
    __device__ __forceinline__ bool next(Tile& tile) {
        wait_for_phase(next_tile_ready(memory), parity);
        tile = load_tile(next_tile(memory));
        StageLoads loads;
        loads.add(tile.rows);
        arrive(loads.then(next_tile_taken(memory)));
        parity ^= 1;
        return tile.rows > 0;
    }
};

// Starts a quarter of a block's products, in registers of their own. `rows` is the address of the consumer's rows in
// stage 0.
__device__ __forceinline__ void start_quarter(const Ring& ring, u32 rows, int quarter, float (&part)[QUARTER / 2]) {
    start_products<Config::FORMAT, QUARTER>(part, operand(further(rows, ring.stage * (int)sizeof(Stage<Config>))),
                                            operand(ring.weights() + quarter * QUARTER * ROW_BYTES), false);
}

// Scales as a stage has them: of a thread's upper and lower row, and of each box of the weights (half of the outputs).
struct StageScales {
    float upper;
    float lower;
    float2 of_weights;
};

__device__ __forceinline__ StageScales load_scales(const Ring& ring, int warp) {
    // The lane is read here: there is no register to keep the address in.
    const u32 at = ring.row_scales() + warp * 64 + (u32)read_lane() / 4 * 4;
    StageScales scales;
    scales.upper = load_shared(at);
    scales.lower = load_shared(at + 32);
    scales.of_weights = load_shared_pair(ring.weight_scales());
    return scales;
}

// What a thread's products of a block of K are multiplied by, for each half of the outputs.
struct ProductScales {
    float upper[Config::WEIGHT_BOXES];
    float lower[Config::WEIGHT_BOXES];

    __device__ __forceinline__ explicit ProductScales(const StageScales& scales) {
        upper[0] = __fmul_rn(scales.upper, scales.of_weights.x);
        lower[0] = __fmul_rn(scales.lower, scales.of_weights.x);
        upper[1] = __fmul_rn(scales.upper, scales.of_weights.y);
        lower[1] = __fmul_rn(scales.lower, scales.of_weights.y);
    }
};

// Adds a quarter's products, which have been waited for, to their sums.
template <int INDEX>
__device__ __forceinline__ void add_quarter(float (&sum)[SUMS], float (&part)[QUARTER / 2],
                                            const ProductScales& scales) {
    fence_accumulators(part);
#pragma unroll
    for (int i = 0; i < QUARTER / 2; ++i) {
        float& s = sum[INDEX * QUARTER / 2 + i];
        s = __fmaf_rn(part[i], i % 4 < 2 ? scales.upper[INDEX / 2] : scales.lower[INDEX / 2], s);
    }
}

// A consumer's two quarters in flight.
struct QuartersInFlight {
    int warp;                 // of all consumers' warps
    u32 rows;                 // address of the consumer's rows in stage 0
    float even[QUARTER / 2];  // products of quarter 0 or 2
    float odd[QUARTER / 2];   // products of quarter 1 or 3
};

// Multiplies the block of K in a stage, whose quarter 0 has been started before, and starts quarter 0 of the next
// block. True if the block is the tile's last: then quarter 3 is still to be added, and nothing has been started.
template <int STAGE>
__device__ __forceinline__ bool multiply_block(Ring& ring, bool is_last, QuartersInFlight& q, ProductScales& scales,
                                               float (&sum)[SUMS]) {
    ring.stage = STAGE;
    start_quarter(ring, q.rows, 1, q.odd);
    wait_for_products<1>();
    add_quarter<0>(sum, q.even, scales);
    start_quarter(ring, q.rows, 2, q.even);
    wait_for_products<1>();
    add_quarter<1>(sum, q.odd, scales);
    start_quarter(ring, q.rows, 3, q.odd);
    const u32 empty = ring.empty();
    ring.advance();
    if (is_last) {
        wait_for_products<1>();
        add_quarter<2>(sum, q.even, scales);
        wait_for_products<0>();
        fence_accumulators(q.odd);
        release_without_branch<Config>(empty);
        return true;
    }
    // Asked before the sums are added, so that the answer is there after them.
    const bool ready = is_phase_over(ring.full(), ring.parity());
    wait_for_products<1>();
    add_quarter<2>(sum, q.even, scales);
    wait_unless_over(ring.full(), ring.parity(), ready);
    start_quarter(ring, q.rows, 0, q.even);
    const StageScales next = load_scales(ring, q.warp);
    wait_for_products<1>();
    release_without_branch<Config>(empty);
    add_quarter<3>(sum, q.odd, scales);
    scales = ProductScales(next);
    return false;
}

// Multiplies the blocks of K in the stages `first` to `end - 1`, as far as there are any from `STAGE` on; true after
// the tile's last block.
template <int STAGE>
__device__ __forceinline__ bool multiply_stages(Ring& ring, int first, int end, QuartersInFlight& q,
                                                ProductScales& scales, float (&sum)[SUMS]) {
    if (first <= STAGE && multiply_block<STAGE>(ring, end == STAGE + 1, q, scales, sum)) return true;
    if constexpr (STAGE + 1 < Config::STAGES) {
        return multiply_stages<STAGE + 1>(ring, first, end, q, scales, sum);
    } else {
        return false;
    }
}

// The same tile, from one lane: the compiler then knows that all lanes have the same, and keeps it in uniform
// registers.
__device__ __forceinline__ Tile same_in_all(const Tile& tile) {
    return Tile{__shfl_sync(WARP, tile.expert, 0), __shfl_sync(WARP, tile.first, 0), __shfl_sync(WARP, tile.rows, 0),
                __shfl_sync(WARP, tile.column, 0)};
}

// Waits for the first block of K of the next tile that has rows for the consumer, and skips tiles that have none. False
// after the last tile.
__device__ __forceinline__ bool wait_for_tile(Ring& ring, int consumer, int blocks) {
    while (true) {
        wait_for_phase(ring.full(), ring.parity());
        const int rows = load_tile(ring.tile()).rows;
        if (rows == 0) return false;
        if (rows > consumer * Config::ROWS_OF_CONSUMER) return true;
        skip_blocks(ring, blocks);
    }
}

#if HOST_ACTIVATION
// A value as it would be read back from memory.
__device__ __forceinline__ float through_bf16(float x) { return low_half<0>(pack_bf16(x, 0.0f)); }

enum class Half { LOWER, UPPER };  // of a thread's two rows

// Sum i of one of a thread's two rows: of every four sums the first two are the upper row's, the others the lower
// row's.
template <Half HALF>
__device__ __forceinline__ constexpr int sum_of_row(int i) {
    return i / 2 * 4 + (HALF == Half::UPPER ? 0 : 2) + i % 2;
}

// One of a thread's two rows; a quad has 128 results of it. Activates them in place of the gate, then quantizes and
// stages them.
template <Half HALF>
__device__ __forceinline__ float activate_row(float (&sum)[SUMS], u32 staging) {
    float largest = 0.0f;
#pragma unroll
    for (int i = 0; i < SUMS / 4; ++i) {
        float& gate = sum[sum_of_row<HALF>(i)];
        const float up = sum[SUMS / 2 + sum_of_row<HALF>(i)];
        gate = times_up(through_bf16(up), gated(through_bf16(gate)));
        largest = fmaxf(largest, fabsf(gate));
    }
    largest = fmaxf(largest, __shfl_xor_sync(WARP, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(WARP, largest, 2));
    const float scale = scale_of(largest, false);
    const Divisor<false> divisor(scale);
    const u32 lane = read_lane();
    const u32 mine = staging + ((HALF == Half::UPPER ? 0 : 8) + lane / 4) * Config::STAGING_ROW + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < SUMS / 4; i += 2)
        store_shared_half_word(mine + i / 2 * 8, (u16)e4m3_pair(divisor.quotient(sum[sum_of_row<HALF>(i)]),
                                                                divisor.quotient(sum[sum_of_row<HALF>(i + 1)])));
    return scale;
}

__device__ __forceinline__ void store_rows(const Args& a, const Tile& tile, u32 memory, float (&sum)[SUMS]) {
    const int first = (threadIdx.x - WARPGROUP) / 32 * 16;
    const u32 staging = memory + OFFSET(SharedStorage, staging) + first * Config::STAGING_ROW;
    const int row = first + read_lane() / 4;
    const float upper = activate_row<Half::UPPER>(sum, staging);
    if (read_lane() % 4 == 0) store_scale(a, tile, row, upper);
    const float lower = activate_row<Half::LOWER>(sum, staging);
    if (read_lane() % 4 == 0) store_scale(a, tile, row + 8, lower);
    store_staged<Config, Config::STAGED_BYTES>(a.out, a.n / 2, tile, first, tile.column, staging);
    __syncwarp();
}
#else
__device__ __forceinline__ void store_rows(const Args& a, const Tile& tile, u32 memory, float (&sum)[SUMS]) {
    const int first = (threadIdx.x - WARPGROUP) / 32 * 16;
    const u32 staging = memory + OFFSET(SharedStorage, staging) + first * Config::STAGING_ROW;
    const u32 lane = read_lane();
#pragma unroll
    for (int quarter = 0; quarter < 4; ++quarter) {
        add_bias<Config, QUARTER / 2>(a, tile, tile.column + quarter * QUARTER, sum + quarter * (QUARTER / 2));
        stage_rows<Config, QUARTER / 2>(staging, lane, sum + quarter * (QUARTER / 2));
        store_staged<Config, Config::STAGED_BYTES>(a.out, (i64)a.n * 2, tile, first,
                                                   (tile.column + quarter * QUARTER) * 2, staging);
        __syncwarp();
    }
}
#endif

// What a consumer does.
__device__ __forceinline__ void multiply_tiles(const Args& a, Ring& ring, int consumer) {
    const int blocks = KRange<Config>(a.k, 0).end;
    QuartersInFlight q;
    q.warp = __shfl_sync(WARP, (int)threadIdx.x / 32, 0) - WARPGROUP / 32;
    q.rows = ring.memory + OFFSET(Stage<Config>, rows) + consumer * (Config::ROWS_OF_CONSUMER * ROW_BYTES);
    if (!wait_for_tile(ring, consumer, blocks)) return;
    start_quarter(ring, q.rows, 0, q.even);
    wait_for_products<0>();
    while (true) {
        const Tile tile = same_in_all(load_tile(ring.tile()));
        float sum[SUMS];
#pragma unroll
        for (int i = 0; i < SUMS; ++i) sum[i] = 0.0f;
        ProductScales scales(load_scales(ring, q.warp));
        // A tile starts at the stage after the last tile's.
        int first = ring.stage;
        for (int end = first + blocks; !multiply_stages<0>(ring, first, end, q, scales, sum); end -= Config::STAGES)
            first = 0;
        const bool more = wait_for_tile(ring, consumer, blocks);
        if (!more) {
            add_quarter<3>(sum, q.odd, scales);
            store_rows(a, tile, ring.memory, sum);
            break;
        }
        // The next tile's quarter 0 is computed while this tile's results are stored.
        start_quarter(ring, q.rows, 0, q.even);
        add_quarter<3>(sum, q.odd, scales);
        store_rows(a, tile, ring.memory, sum);
        wait_for_products<0>();
    }
}

extern "C" __global__ void __launch_bounds__(Config::THREADS, 1) gemm(const __grid_constant__ Args a) {
    extern __shared__ __align__(1024) u8 shared[];
    // From one lane, so that the compiler knows them to be the same in all.
    const u32 memory = __shfl_sync(WARP, shared_address(shared), 0);
    const int consumer = __shfl_sync(WARP, (int)threadIdx.x / WARPGROUP, 0) - 1;
    Ring ring(memory);
    if (threadIdx.x == 0) {
        init_barrier(next_tile_ready(memory), 1);
        init_barrier(next_tile_taken(memory), 1);
    }
    set_up<Config, SharedStorage>(a, memory);
    wait_for_previous_launch();
    list_row_tiles(a, memory + OFFSET(SharedStorage, list));
    if (consumer < 0) {
        give_registers<Config::PRODUCER_REGISTERS>();
        const int warp = threadIdx.x / 32;
        if (warp == (int)ProducerWarp::LOAD && elect_thread()) produce<true>(a, ring, PlannedTiles{memory, 0}, 0);
        if (warp == (int)ProducerWarp::PLAN && elect_thread())
            plan_tiles(DynamicScheduler(a, memory + OFFSET(SharedStorage, list), blockIdx.x, gridDim.x), memory);
    } else {
        take_registers<Config::CONSUMER_REGISTERS>();
        multiply_tiles(a, ring, consumer);
    }
}
