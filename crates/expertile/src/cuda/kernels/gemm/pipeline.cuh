// What the grouped GEMMs share: the ring of stages in shared memory, the thread that fills it (the producer), and how
// the warps that multiply (the consumers) give stages back.
//
// A kernel's `SharedStorage` has at least these members, `stages` first (docs/kernels/gemm.md has the maps):
//
//   Stage<Config> stages[STAGES];          on 1024 bytes, which the swizzle needs
//   float row_scales[STAGES][ROW_TILE];    on 16 bytes
//   float weight_scales[STAGES][WEIGHT_BOXES];
//   Tile tiles[STAGES];                    written with the first block of K of a tile
//   Mbarrier full[STAGES], empty[STAGES];
#pragma once
#include "common/quantize.cuh"
#include "gemm/claims.cuh"
#include "gemm/config.cuh"
#include "gemm/stage_loads.cuh"
#include "gemm/tiles.cuh"

// A position in the ring of stages. The producer and every consumer warp have one each, and go round on their own.
//
// Parity: an mbarrier's phases alternate between 0 and 1. A wait for `full` passes `parity()`; the producer's wait for
// `empty` passes the opposite, so that its first round finds every stage empty.
template <typename KernelConfig, typename SharedStorage>
struct StageRing {
    using Config = KernelConfig;
    static constexpr int STAGES = Config::STAGES;
    static constexpr int TILE_BIT = 31;
    static_assert(STAGES <= TILE_BIT, "a bit for each stage, and one for the tile");

    u32 memory;  // address of SharedStorage
    int stage;
    u32 parities;  // bit s: parity of stage s; bit TILE_BIT: parity of the number of tiles so far

    __device__ __forceinline__ explicit StageRing(u32 shared) : memory(shared), stage(0), parities(0) {}

    __device__ __forceinline__ u32 parity() const { return parities >> stage & 1; }
    __device__ __forceinline__ u32 tile_parity() const { return parities >> TILE_BIT; }
    __device__ __forceinline__ void flip_tile_parity() { parities ^= 1u << TILE_BIT; }
    __device__ __forceinline__ void advance() {
        parities ^= 1u << stage;
        stage = stage + 1 == STAGES ? 0 : stage + 1;
    }

    // Addresses of the members of the current stage.
    __device__ __forceinline__ u32 full() const { return memory + OFFSET(SharedStorage, full) + stage * 8; }
    __device__ __forceinline__ u32 empty() const { return memory + OFFSET(SharedStorage, empty) + stage * 8; }
    __device__ __forceinline__ u32 weights() const { return memory + stage * (int)sizeof(Stage<Config>); }
    __device__ __forceinline__ u32 rows() const {
        return memory + stage * (int)sizeof(Stage<Config>) + OFFSET(Stage<Config>, rows);
    }
    __device__ __forceinline__ u32 row_scales() const {
        return memory + OFFSET(SharedStorage, row_scales) + stage * Config::ROW_TILE * 4;
    }
    __device__ __forceinline__ u32 weight_scales() const {
        return memory + OFFSET(SharedStorage, weight_scales) + stage * Config::WEIGHT_BOXES * 4;
    }
    // Only in kernels with scaling warps.
    __device__ __forceinline__ u32 scaled() const { return memory + OFFSET(SharedStorage, scaled) + stage * 8; }
    __device__ __forceinline__ u32 products() const {
        return memory + OFFSET(SharedStorage, products) + stage * (int)sizeof(SharedStorage::products[0]);
    }
    // Valid from the first block of K of a tile on.
    __device__ __forceinline__ u32 tile() const { return memory + OFFSET(SharedStorage, tiles) + stage * 16; }
};

__device__ __forceinline__ void store_tile(u32 to, const Tile& tile) {
    store_shared_words(to, make_uint4(tile.expert, tile.first, tile.rows, tile.column));
}

__device__ __forceinline__ Tile load_tile(u32 from) {
    const uint4 words = load_shared_words(from);
    return Tile{(int)words.x, (int)words.y, (int)words.z, (int)words.w};
}

// What is loaded of one tile, block of K by block of K.
template <typename Config>
struct TileLoads {
    static constexpr int BOX_BYTES = Config::OUTPUTS / Config::WEIGHT_BOXES * ROW_BYTES;

    Tile tile;
    u64 keep_weights;
    int map;            // of rows
    u32 operand_bytes;  // of a block of K
    u32 scale_bytes;    // that come by a bulk copy, which starts on 16 bytes; else 0, and scales are copied one by one
    int scaled_rows;
    int next_weights;  // distance from one box of weights to the next
    int next_scales;   // from its scale to the next's
    int row_scales_stride;
    const float* row_scales;     // of the next block of K
    const float* weight_scales;  // likewise

    // A tile as a scheduler has it, with READ_ONCE; `first_block` is the first block of K.
    __device__ __forceinline__ TileLoads(const GemmArgs<Config>& a, const Tile& from, int first_block) : tile(from) {
        const int scale_rows = (a.n + SCALE_BLOCK - 1) / SCALE_BLOCK;
        const int scale_columns = (a.k + SCALE_BLOCK - 1) / SCALE_BLOCK;
        keep_weights = (tile.expert & READ_ONCE) != 0 ? KEEP_BRIEFLY : KEEP_NORMALLY;
        tile.expert &= ~READ_ONCE;
        map = (tile.rows - 1) / Config::ROW_STEP;
        const int rows = (map + 1) * Config::ROW_STEP;
        row_scales_stride = (a.m_sum + 3) & ~3;
        operand_bytes = Config::OUTPUTS * ROW_BYTES + rows * ROW_BYTES;
        scaled_rows = min(rows, row_scales_stride - tile.first);
        scale_bytes = tile.first % 4 == 0 ? scaled_rows * 4 : 0;
        // There are fewer than 2^31 scales: the host has checked.
        row_scales = a.row_scales + ((u32)first_block * row_scales_stride + tile.first);
        weight_scales =
            a.weight_scales +
            ((tile.expert * scale_rows + min(tile.column / SCALE_BLOCK, scale_rows - 1)) * scale_columns + first_block);
        // A box past the last output takes any scale.
        const int box_scales = Config::GATE_AND_UP                          ? a.n / 2 / SCALE_BLOCK
                               : tile.column / SCALE_BLOCK + 1 < scale_rows ? 1
                                                                            : 0;
        next_weights = Config::GATE_AND_UP ? a.n / 2 : Config::OUTPUTS / Config::WEIGHT_BOXES;
        next_scales = box_scales * scale_columns;
    }

    // Loads a block's weights into the stage.
    template <typename Ring>
    __device__ __forceinline__ void load_weights(const GemmArgs<Config>& a, const Ring& ring, int block) const {
#pragma unroll
        for (int box = 0; box < Config::WEIGHT_BOXES; ++box)
            copy_box(ring.weights() + box * BOX_BYTES, a.weights, block * Config::K_BLOCK,
                     tile.column + box * next_weights, tile.expert, ring.full(), keep_weights);
    }

    // Loads a block's rows; `rank` is this thread block's among those that share them.
    template <typename Ring>
    __device__ __forceinline__ void load_rows(const GemmArgs<Config>& a, const Ring& ring, int block, int rank) const {
        if constexpr (Config::MULTICAST > 1) {
            const int share = (map + 1) * Config::ROW_STEP / Config::MULTICAST;
            share_box(ring.rows() + rank * share * ROW_BYTES, a.rows[map], block * Config::K_BLOCK,
                      tile.first + rank * share, ring.full(), (1 << Config::MULTICAST) - 1);
        } else {
            copy_box(ring.rows(), a.rows[map], block * Config::K_BLOCK, tile.first, ring.full());
        }
    }

    // Loads the next block's scales, and arrives once those of the weights have landed.
    template <typename Ring>
    __device__ __forceinline__ void load_scales(const Ring& ring) {
        if (scale_bytes > 0) {
            copy_bytes(ring.row_scales(), row_scales, scale_bytes, ring.full());
        } else {
#pragma unroll 1
            for (int row = 0; row < scaled_rows; ++row) copy_word(ring.row_scales() + row * 4, row_scales + row);
        }
#pragma unroll
        for (int box = 0; box < Config::WEIGHT_BOXES; ++box)
            copy_word(ring.weight_scales() + box * 4, weight_scales + box * next_scales);
        arrive_after_copies(ring.full());
        row_scales += row_scales_stride;
        ++weight_scales;
    }
};

// The producer: one thread, which fills stages with the blocks of K of one tile after the other, as far ahead as there
// are empty stages. `scheduler.next(tile)` gives the tiles. SCALES: whether it loads those, too.
template <bool SCALES, typename Config, typename Ring, typename Scheduler>
__device__ __forceinline__ void produce(const GemmArgs<Config>& a, Ring ring, Scheduler scheduler, int rank) {
    const KRange<Config> range(a.k, rank);
    Tile tile;
    while (scheduler.next(tile)) {
        TileLoads<Config> loads(a, tile, range.begin);
        for (int block = range.begin; block < range.end; ++block) {
            wait_for_phase(ring.empty(), ring.parity() ^ 1);
            if (block == range.begin) store_tile(ring.tile(), loads.tile);
            arrive_expecting(ring.full(), loads.operand_bytes + (SCALES ? loads.scale_bytes : 0));
            loads.load_weights(a, ring, block);
            loads.load_rows(a, ring, block, rank);
            if constexpr (SCALES) loads.load_scales(ring);
            ring.advance();
        }
    }
    // A tile without rows comes last: consumers stop there.
    wait_for_phase(ring.empty(), ring.parity() ^ 1);
    store_tile(ring.tile(), Tile{0, 0, 0, 0});
    arrive(ring.full());
    if (SCALES) arrive(ring.full());
}

// What another thread does beside a producer that loads no scales.
template <typename Config, typename Ring, typename Scheduler>
__device__ __forceinline__ void produce_scales(const GemmArgs<Config>& a, Ring ring, Scheduler scheduler, int rank) {
    const KRange<Config> range(a.k, rank);
    Tile tile;
    while (scheduler.next(tile)) {
        TileLoads<Config> loads(a, tile, range.begin);
        for (int block = range.begin; block < range.end; ++block) {
            wait_for_phase(ring.empty(), ring.parity() ^ 1);
            arrive_expecting(ring.full(), loads.scale_bytes);
            loads.load_scales(ring);
            ring.advance();
        }
    }
    wait_for_phase(ring.empty(), ring.parity() ^ 1);
    arrive(ring.full());
    arrive(ring.full());
}

// This warp is done with a stage: arrives at `empty`, in every block that writes to this block's stages.
template <typename Config>
__device__ __forceinline__ void release(u32 empty) {
    const int lane = lane_of_thread();
    __syncwarp();
    if (lane == 0) arrive(empty);
    if (Config::MULTICAST > 1 && lane == 1) arrive_elsewhere(address_in_block(empty, rank_in_cluster() ^ 1));
}

// The same without a branch: for a place where a branch would make the compiler bring threads together again.
template <typename Config>
__device__ __forceinline__ void release_without_branch(u32 empty) {
    const int lane = lane_of_thread();
    __syncwarp();
    if constexpr (Config::MULTICAST > 1)
        arrive_elsewhere_if(address_in_block(empty, lane), lane < Config::MULTICAST);
    else
        arrive_if(empty, lane == 0);
}

// Releases a tile's stages without multiplying: this warpgroup has no rows of the tile.
template <typename Ring>
__device__ __forceinline__ void skip_blocks(Ring& ring, int blocks) {
    for (int block = 0; block < blocks; ++block) {
        wait_for_phase(ring.full(), ring.parity());
        release<typename Ring::Config>(ring.empty());
        ring.advance();
    }
}

// Initialises the barriers of the ring, and those of scaling warps and of a split K. Every thread of the cluster calls
// it once, before anything else.
template <typename Config, typename SharedStorage>
__device__ __forceinline__ void set_up(const GemmArgs<Config>& a, u32 memory) {
    // Every thread that loads arrives at `full` with the bytes it expects; for e4m3 one of them once more when its
    // cp.async of the scales is done.
    constexpr int FULL_ARRIVALS = Config::LOADING_THREADS + (Config::SCALED ? 1 : 0);
    constexpr int CONSUMER_WARPS = Config::CONSUMERS * (WARPGROUP / 32);
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < Config::STAGES; ++stage) {
            init_barrier(memory + OFFSET(SharedStorage, full) + stage * 8, FULL_ARRIVALS);
            init_barrier(memory + OFFSET(SharedStorage, empty) + stage * 8, CONSUMER_WARPS * Config::MULTICAST);
            if constexpr (Config::SCALING_WARPS > 0)
                init_barrier(memory + OFFSET(SharedStorage, scaled) + stage * 8, Config::SCALING_WARPS);
        }
        if constexpr (Config::K_SPLITS > 1) {
            init_barrier(memory + OFFSET(SharedStorage, partials_ready), CONSUMER_WARPS * Config::K_SPLITS);
            init_barrier(memory + OFFSET(SharedStorage, partials_read), CONSUMER_WARPS * Config::K_SPLITS);
        }
        if constexpr (Config::CLAIMS) init_claims<Config>(memory + OFFSET(SharedStorage, claims));
        publish_barriers();
        prefetch_map(a.weights);
    }
    if constexpr (Config::CLUSTER > 1)
        meet_cluster();
    else
        __syncthreads();
}
