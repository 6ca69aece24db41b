// What the kernel over weights with groups is specialised for, what is in its shared memory, and who its warps are.
//
// Set by the host: see config.cuh; HOST_MULTICAST and HOST_K_SPLITS are 1; HOST_OUTPUTS is a multiple of 64;
// HOST_BLOCKS is the number of blocks that a multiprocessor is to hold; HOST_SPREAD says whether slabs may be spread;
// HOST_INT4 whether weights are int4, of which none is; HOST_JOINED whether both GEMMs are one launch.
#pragma once
#include "gemm/weights_on_m.cuh"
#include "groups/int4.cuh"
#if HOST_JOINED
#include "joined/tile_queue.cuh"
#endif

struct Config : HostConfig {
    static constexpr int OUTPUTS = HOST_OUTPUTS;
    static constexpr int OUTPUTS_OF_CONSUMER = UNIT_OUTPUTS;
    static constexpr int CONSUMERS = OUTPUTS / OUTPUTS_OF_CONSUMER;
    static constexpr int THREADS = (1 + CONSUMERS) * WARPGROUP;
    static constexpr int BLOCKS = HOST_BLOCKS;
    static constexpr bool BROAD = CONSUMERS > 2;  // one block fills a multiprocessor with warps
    static constexpr int PRODUCER_REGISTERS = CONSUMERS == 6 ? 24 : BROAD || BLOCKS > 1 ? 32 : 40;
    static constexpr int CONSUMER_REGISTERS = CONSUMERS == 6   ? 80
                                              : CONSUMERS == 4 ? 112
                                              : CONSUMERS == 3 ? 160
                                              : BLOCKS > 1     ? 104
                                                               : 232;
    static constexpr bool GATE_AND_UP = false;
    static constexpr int WEIGHT_BOXES = 1;
    static constexpr int CLUSTER_COLUMNS = 1;
    static constexpr int CLUSTER = 1;
    static constexpr int ROW_TILES_PER_GROUP = 8;
    static constexpr int LISTED = 512;
    static constexpr int SCALING_WARPS = 0;
    static constexpr bool SCALES_APART = PRODUCER_REGISTERS < 32 && SCALED;

    static constexpr int UNITS = K_BLOCK / UNIT_K;  // of a slab in a block of K
    static constexpr int GROUPS = K_BLOCK / 32;
    static constexpr int INSTRUCTIONS = ROW_BYTES / 32;  // for a block of K
    static constexpr int REGISTERS = 4 * INSTRUCTIONS;   // of the M operand of a block of K

    static constexpr int CLAIM_FOLLOWERS = SCALES_APART ? 2 : 1;
    static constexpr int WEIGHT_BYTES = CONSUMERS * UNITS * UNIT_BYTES;

    // Bytes from a staged row to the next: 16 more than its results, so that eight rows start on different banks.
    static constexpr int STAGING_ROW = OUTPUTS_OF_CONSUMER * 2 + 16;
    static constexpr int STAGING_BYTES = ROW_TILE * CONSUMERS * STAGING_ROW;
};

// host: cuda/gemm/shared_memory/groups.rs.
struct SharedStorage {
    u8 rows[Config::STAGES][Config::ROW_TILE][ROW_BYTES];
    alignas(16) u8 weights[Config::STAGES][Config::CONSUMERS][Config::UNITS * UNIT_BYTES];
    // Results, transposed, before they are stored: [CONSUMERS][ROW_TILE][STAGING_ROW].
    alignas(16) u8 staging[Config::STAGING_BYTES];
    alignas(16) float row_scales[Config::STAGES][Config::ROW_TILE];
    Tile tiles[Config::STAGES];
    Mbarrier full[Config::STAGES];
    Mbarrier empty[Config::STAGES];
#if HOST_JOINED
    u32 numbers[Config::STAGES];  // beside `tiles`: JoinedTile's
    TileQueue queue;
#else
    ClaimQueue claims;
#endif
    TileList<Config::LISTED> list;
};

static_assert(AgreesWithHost<Config, SharedStorage>::value);
// A block moves registers among its own threads: it starts with as many as the launch bounds leave to each, in eights.
static_assert(Config::CONSUMERS == 1 ||
                  Config::PRODUCER_REGISTERS + Config::CONSUMERS * Config::CONSUMER_REGISTERS <=
                      (1 + Config::CONSUMERS) * (65536 / (Config::BLOCKS * Config::THREADS) / 8 * 8),
              "consumers would wait for registers that nobody gives back");
static_assert(Config::MULTICAST == 1 && Config::K_SPLITS == 1, "there is no kernel for this");
static_assert(1 << Config::CONSUMERS <= UNIT_OUTPUTS,
              "a tile's first output leaves a bit for each slab that is spread");
static_assert(sizeof(SharedStorage::rows[0]) % 1024 == 0, "every stage starts on a pattern of the swizzle");

using Args = GemmArgs<Config>;
constexpr Format FORMAT = Config::FORMAT;

struct Ring : StageRing<Config, SharedStorage> {
    __device__ __forceinline__ explicit Ring(u32 shared) : StageRing<Config, SharedStorage>(shared) {}

    __device__ __forceinline__ u32 rows() const {
        return memory + OFFSET(SharedStorage, rows) + stage * (int)sizeof(SharedStorage::rows[0]);
    }
    __device__ __forceinline__ u32 weights(int consumer) const {
        return memory + OFFSET(SharedStorage, weights) + stage * (int)sizeof(SharedStorage::weights[0]) +
               consumer * (int)sizeof(SharedStorage::weights[0][0]);
    }
};

// Warps of the first warpgroup, by number; the other warpgroups are consumers.
enum class ProducerWarp : int {
    WEIGHTS = 0,  // one thread of it loads weights
    ROWS = 1,     // one thread of it loads rows and, unless SCALES_APART, their scales
    SCALES = 2,   // loads scales, if SCALES_APART: one thread has too few registers for both
    CLAIM = 3,    // one thread of it claims tiles, where both GEMMs are one launch
};
// Threads or warps that load.
constexpr int LOADING = Config::SCALES_APART ? 3 : 2;

// Arrivals at `full`: of both loading threads, and of each thread that loads scales once more when its cp.async is done.
constexpr int FULL_ARRIVALS = Config::SCALES_APART ? 2 + 32 : Config::SCALED ? 3 : 2;

// One thread calls it, before the barriers are published.
__device__ __forceinline__ void init_ring(const Ring& ring) {
    for (int stage = 0; stage < Config::STAGES; ++stage) {
        init_barrier(ring.memory + OFFSET(SharedStorage, full) + stage * 8, FULL_ARRIVALS);
        init_barrier(ring.memory + OFFSET(SharedStorage, empty) + stage * 8, Config::CONSUMERS * (WARPGROUP / 32));
    }
}

// Every thread of the block calls it before the stages are filled. The last block of K may have fewer units than a stage
// has room for: consumers decode what is there, and multiply it by rows that the copy engine has filled up with zeros.
// So it has to be a number, as the units that the stage had before are.
__device__ __forceinline__ void clear_weights(u32 memory) {
    if constexpr (Config::UNITS == 1 || HOST_SPREAD || HOST_INT4) return;
    const u32 weights = memory + OFFSET(SharedStorage, weights);
    for (int i = threadIdx.x * 16; i < (int)sizeof(SharedStorage::weights); i += Config::THREADS * 16)
        store_shared_words(weights + i, make_uint4(0, 0, 0, 0));
    publish_shared_writes();
}

__device__ __forceinline__ int blocks_of(int k) { return (k + Config::K_BLOCK - 1) / Config::K_BLOCK; }

// A value that BROAD loads anew: what follows from it is not kept in registers all the time, of which there are few.
__device__ __forceinline__ int here(int value) { return Config::BROAD ? (int)further(value, 0) : value; }

// Rows of a tile are multiplied in pieces of at most 64: the products of one run while those of another are added, but
// where there are few registers to a thread.
template <int N>
__device__ constexpr int rows_of_piece() {
    if (Config::CONSUMERS == 6 && (Config::SCALED || HOST_INT4)) return 16;
    if (N < 64) return N;
    if (Config::BLOCKS > 1 || Config::CONSUMERS == 4 || (HOST_INT4 && Config::CONSUMERS == 3)) return 32;
    return N % 64 == 0 ? 64 : N / 2;
}
template <int N>
constexpr int PIECE = rows_of_piece<N>();
template <int N>
constexpr int PIECES_AT_ONCE = N > PIECE<N>&& Config::BLOCKS == 1 && !Config::BROAD ? 2 : 1;

// Whether the next block of K (int4: unit) is decoded while the products of this one run: where there are registers for
// it.
template <int N>
__device__ constexpr bool decodes_ahead() {
    if (HOST_SPREAD) return false;
    constexpr bool INT4_OF_BF16 = HOST_INT4 && !Config::SCALED;
    if (Config::CONSUMERS == 6) return N == 16 || !Config::SCALED || HOST_INT4;
    if (Config::CONSUMERS == 4) return !INT4_OF_BF16;
    if (Config::BLOCKS == 1 || Config::ROW_TILE == 16) return true;
    constexpr int MOST = !INT4_OF_BF16 ? 48 : Config::CONSUMERS == 1 || Config::ROW_TILE <= 32 ? 32 : 0;
    return Config::BLOCKS == 2 && N <= MOST;
}
template <int N>
constexpr bool DECODES_AHEAD = decodes_ahead<N>();
