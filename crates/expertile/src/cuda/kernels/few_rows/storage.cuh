// What the kernels for few rows are specialised for, what is in their shared memory, and who the producer's warps are.
//
// Set by the host: see config.cuh; one of HOST_MULTICAST and HOST_K_SPLITS is 1; HOST_OUTPUTS is 128, or 64 where both
// are 1; HOST_JOINED says whether both GEMMs are one launch, for which both are 1.
#pragma once
#include "gemm/weights_on_m.cuh"
#if HOST_JOINED
#include "joined/tiles.cuh"
#endif

struct Config : HostConfig {
    static constexpr int OUTPUTS = HOST_OUTPUTS;
    static constexpr int OUTPUTS_OF_CONSUMER = 64;
    static constexpr int CONSUMERS = OUTPUTS / OUTPUTS_OF_CONSUMER;
    static constexpr bool JOINED = HOST_JOINED;
    // Where both GEMMs are one launch, the last warpgroup activates.
    static constexpr int THREADS = (1 + CONSUMERS + JOINED) * WARPGROUP;
    static constexpr int PRODUCER_REGISTERS = JOINED ? 56 : 40;
    static constexpr int CONSUMER_REGISTERS = JOINED ? 192 : 232;
    static constexpr int ACTIVATING_REGISTERS = 72;
    static constexpr int WEIGHT_BOXES = 1;
    static constexpr bool GATE_AND_UP = false;
    static constexpr int CLUSTER_COLUMNS = MULTICAST;
    static constexpr int CLUSTER = CLUSTER_COLUMNS * K_SPLITS;
    static constexpr int ROW_TILES_PER_GROUP = 8;

    static constexpr int LISTED = 512;
    // A thread of these scales two rows. Up to 32 rows consumers multiply the few scales themselves: that takes less
    // time than to wait for another warp.
    static constexpr int SCALING_WARPS = SCALED && ROW_TILE > 32 ? (ROW_TILE / 2 + 31) / 32 : 0;

    // Whether a thread of its own loads the scales: the producer's time for a block is what bounds small tiles.
    static constexpr bool SCALES_APART = SCALED && SCALING_WARPS < 3;
    static constexpr int LOADING_THREADS = SCALES_APART || JOINED ? 2 : 1;

    static constexpr bool CLAIMS = CLUSTER == 1;
    static constexpr int CLAIM_FOLLOWERS = LOADING_THREADS - 1;
    static constexpr int WEIGHT_BYTES = OUTPUTS * ROW_BYTES;

    // Bytes from a staged row to the next: 16 more than its results, so that eight rows start on different banks.
    static constexpr int STAGING_ROW = OUTPUTS_OF_CONSUMER * 2 + 16;
    static constexpr int PARTIAL_ROW = OUTPUTS * 4 + 16;
    static constexpr int STAGING_BYTES = ROW_TILE * (K_SPLITS > 1 ? PARTIAL_ROW : CONSUMERS * STAGING_ROW);
    // Words of `products` for a lane of a quad: a quarter of the rows, and 4 so that the quarters start on different
    // banks.
    static constexpr int PRODUCTS_OF_LANE = ROW_TILE / 4 + 4;
};

// host: FewRows in cuda/gemm/shared_memory.rs.
struct SharedStorage {
    Stage<Config> stages[Config::STAGES];
    // Results, transposed, before they are stored: [CONSUMERS][ROW_TILE][STAGING_ROW]; with a split K the sums of this
    // part, [ROW_TILE][PARTIAL_ROW].
    alignas(16) u8 staging[Config::STAGING_BYTES];
    alignas(16) float row_scales[Config::STAGES][Config::ROW_TILE];
    float weight_scales[Config::STAGES][Config::WEIGHT_BOXES];
    Tile tiles[Config::STAGES];
#if !HOST_BF16 && HOST_ROW_TILE > 32
    // Row scale times weight scale, in the order of their readers: lane i of a quad reads those of the rows
    // 8 j + 2 i and 8 j + 2 i + 1.
    float products[Config::STAGES][4][Config::PRODUCTS_OF_LANE];
    Mbarrier scaled[Config::STAGES];
#endif
    Mbarrier full[Config::STAGES];
    Mbarrier empty[Config::STAGES];
    Mbarrier partials_ready;
    Mbarrier partials_read;
    ClaimQueue claims;
    TileList<Config::LISTED> list;
#if HOST_JOINED
    u32 numbers[Config::STAGES];  // beside `tiles`: JoinedTile's
    StoredTiles stored;
#endif
};

static_assert(AgreesWithHost<Config, SharedStorage>::value);
static_assert(Config::OUTPUTS == 128 || (Config::OUTPUTS == 64 && Config::CLUSTER == 1), "there is no kernel for this");
static_assert(Config::SCALING_WARPS <= (Config::JOINED ? 2 : 3), "the producer's warpgroup has as many to spare");
static_assert(!Config::JOINED || Config::CLUSTER == 1, "there is no kernel for this");
static_assert(!Config::JOINED || Config::CONSUMERS == 1 ||
                  Config::PRODUCER_REGISTERS + Config::CONSUMERS * Config::CONSUMER_REGISTERS +
                          Config::ACTIVATING_REGISTERS <=
                      512,
              "a multiprocessor has 65536 registers: 512 for each thread of a warpgroup");

using Args = GemmArgs<Config>;
using Ring = StageRing<Config, SharedStorage>;

// Warps of the first warpgroup, by number; the other warpgroups are consumers.
enum class ProducerWarp : int {
    LOAD = 0,                                 // one thread of it: the producer
    LOAD_SCALES = 1,                          // one thread, where SCALES_APART; where JOINED it loads rows, too
    FIRST_SCALE = 4 - Config::SCALING_WARPS,  // the last of the warpgroup; those between are idle
};
