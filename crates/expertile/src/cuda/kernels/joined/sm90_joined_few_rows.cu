// Both grouped GEMMs of a layer and the activation between them on Hopper, for few rows, in one launch: gate | up of
// every row, activated (and quantized), times the experts' w2.
//
// Three launches after each other would each begin with empty shared memory and end with multiprocessors that wait for
// the slowest one. Here the second GEMM's weights are loaded while the first one's last tiles are multiplied. A tile is
// multiplied as in sm90_gemm_few_rows.cu; results have the same bits as those of three launches.
//
//   one thread     claims tiles and loads their weights: first all of the first GEMM, then those of the second
//   one thread     loads their rows and scales; of the second GEMM once the row tile is activated
//   consumers      multiply, and store gate | up or the results
//   the last       counts what is stored; activates the columns of a row tile of which it has counted the last part
//   warpgroup
//
// Blocks tell each other by counters in memory how far a row tile has come. Tiles are claimed in order, so whatever a
// block waits for is in the hands of one that runs, and no launch has to have all multiprocessors at once.
//
// docs/kernels/joined.md has the maps. Set by the host: see few_rows/storage.cuh, and joined/activate.cuh.
#include "few_rows/multiply.cuh"
#include "joined/activate.cuh"

using Joined = JoinedArgs<Config>;

// Ids of bar.sync past the consumers'.
constexpr int ACTIVATING_BARRIER = (int)NamedBarrier::CONSUMER_1 + 1;

__device__ __forceinline__ u32 number_at(const Ring& ring) {
    return ring.memory + OFFSET(SharedStorage, numbers) + ring.stage * 4;
}

__device__ __forceinline__ int blocks_of(const Args& a) { return (a.k + Config::K_BLOCK - 1) / Config::K_BLOCK; }

// The thread that loads weights.
__device__ __forceinline__ void produce_weights(const Joined& joined, Ring ring, JoinedScheduler<Config> scheduler) {
    JoinedTile next;
    while (scheduler.next(next)) {
        const Args& a = joined.gemms[(next.number & SECOND_GEMM) != 0];
        const TileLoads<Config> loads(a, next.tile, 0);
        const int blocks = blocks_of(a);
        for (int block = 0; block < blocks; ++block) {
            wait_for_phase(ring.empty(), ring.parity() ^ 1);
            if (block == 0) {
                store_tile(ring.tile(), loads.tile);
                store_shared_word(number_at(ring), next.number);
            }
            arrive_expecting(ring.full(), Config::OUTPUTS * ROW_BYTES);
            loads.load_weights(a, ring, block);
            ring.advance();
        }
    }
    // A tile without rows comes last.
    wait_for_phase(ring.empty(), ring.parity() ^ 1);
    store_tile(ring.tile(), Tile{0, 0, 0, 0});
    arrive(ring.full());
}

// The thread that loads rows, and all scales.
__device__ __forceinline__ void produce_rows(const Joined& joined, Ring ring, JoinedFollower<Config> follower) {
    bool all_activated = false;
    JoinedTile next;
    while (follower.next(next)) {
        const bool second = (next.number & SECOND_GEMM) != 0;
        const Args& a = joined.gemms[second];
        TileLoads<Config> loads(a, next.tile, 0);
        const u32 bytes = loads.operand_bytes - Config::OUTPUTS * ROW_BYTES + (Config::SCALED ? loads.scale_bytes : 0);
        const int blocks = blocks_of(a);
        if (second && !all_activated)
            all_activated = wait_until_activated(joined, Progress(joined, next.number & ~SECOND_GEMM),
                                                 follower.order.first.row_tiles);
        for (int block = 0; block < blocks; ++block) {
            wait_for_phase(ring.empty(), ring.parity() ^ 1);
            arrive_expecting(ring.full(), bytes);
            loads.load_rows(a, ring, block, 0);
            if constexpr (Config::SCALED) loads.load_scales(ring);
            ring.advance();
        }
    }
    wait_for_phase(ring.empty(), ring.parity() ^ 1);
    arrive(ring.full());
    if (Config::SCALED) arrive(ring.full());
}

// Tells the warps that activate of a tile whose results this warp has stored; one without rows comes last. Every lane of
// the consumers calls.
__device__ __forceinline__ void post_stored(StoredSlot& at, const Tile& tile, u32 number, int consumer) {
    wait_for_phase(at.empty(), at.parity() ^ 1);
    __syncwarp();
    if (lane_of_thread() == 0) {
        if (consumer == 0 && threadIdx.x % WARPGROUP == 0) {
            store_tile(at.tile(), tile);
            store_shared_word(at.tile_number(), number);
        }
        arrive(at.full());
    }
    ++at.number;
}

__device__ __forceinline__ void consume(const Joined& joined, Ring ring, u32 stored, int consumer) {
    StoredSlot at(stored);
    while (true) {
        wait_for_phase(ring.full(), ring.parity());
        const Tile tile = load_tile(ring.tile());
        if (tile.rows == 0) break;
        const u32 number = load_shared_word(number_at(ring));
        const bool second = (number & SECOND_GEMM) != 0;
        const Args& a = joined.gemms[second];
        multiply_tile<1>(a, tile, ring, blocks_of(a), consumer, 0, 0);
        if (!second) post_stored(at, tile, number, consumer);
    }
    post_stored(at, Tile{0, 0, 0, 0}, 0, consumer);
}

extern "C" __global__ void __launch_bounds__(Config::THREADS, 1) joined_gemms(const __grid_constant__ Joined a) {
    extern __shared__ __align__(1024) u8 shared[];
    const u32 memory = shared_address(shared);
    // A shuffle, for the compiler to see that a warp has one: the ring is then kept in uniform registers.
    const int warpgroup = __shfl_sync(WARP, (int)threadIdx.x / WARPGROUP, 0);
    const u32 claims = memory + OFFSET(SharedStorage, claims);
    const u32 stored = memory + OFFSET(SharedStorage, stored);
    Ring ring(memory);
    if (threadIdx.x == 0) {
        for (StoredSlot at(stored); at.number < STORED_SLOTS; ++at.number) {
            init_barrier(at.full(), Config::CONSUMERS * (WARPGROUP / 32));
            init_barrier(at.empty(), WARPGROUP / 32);
        }
        prefetch_map(a.gemms[1].weights);
    }
    set_up<Config, SharedStorage>(a.gemms[0], memory);
    wait_for_previous_launch();
    const u32 list = memory + OFFSET(SharedStorage, list);
    const bool claims_tiles = threadIdx.x / 32 == (int)ProducerWarp::LOAD && elect_thread();
    // Under way while row tiles are listed.
    u32 first_claim = 0;
    if (claims_tiles) first_claim = draw(JoinedOrder<Config>::counter(a));
    list_row_tiles(a.gemms[0], list);
    // With one consumer warpgroup every thread has as many registers as it may have from the start.
    constexpr bool MOVE_REGISTERS = Config::CONSUMERS > 1;
    if (warpgroup == 0) {
        if constexpr (MOVE_REGISTERS) give_registers<Config::PRODUCER_REGISTERS>();
        const int warp = threadIdx.x / 32;
        if (warp == (int)ProducerWarp::LOAD) {
            if (claims_tiles) produce_weights(a, ring, JoinedScheduler<Config>(a, list, claims, first_claim));
        } else if (warp == (int)ProducerWarp::LOAD_SCALES) {
            if (elect_thread()) produce_rows(a, ring, JoinedFollower<Config>(a, list, claims));
        } else if (warp >= (int)ProducerWarp::FIRST_SCALE) {
            if constexpr (Config::SCALING_WARPS > 0)
                multiply_scales(ring, threadIdx.x - (int)ProducerWarp::FIRST_SCALE * 32, [&](const Ring& at) {
                    return blocks_of(a.gemms[(load_shared_word(number_at(at)) & SECOND_GEMM) != 0]);
                });
        }
    } else if (warpgroup <= Config::CONSUMERS) {
        if constexpr (MOVE_REGISTERS) take_registers<Config::CONSUMER_REGISTERS>();
        consume(a, ring, stored, warpgroup - 1);
    } else {
        if constexpr (MOVE_REGISTERS) give_registers<Config::ACTIVATING_REGISTERS>();
        activate_tiles<Config, ACTIVATING_BARRIER>(a, stored);
    }
}
