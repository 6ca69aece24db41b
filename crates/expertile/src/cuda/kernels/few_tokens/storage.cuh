// The layer in one launch: sizes, shared memory, and the rings that its warps fill and empty.
//
// Set by the host (cuda/few_tokens/config.rs): HOST_BF16, HOST_TOKENS (most tokens: 1, 2, 4 or 8), HOST_EXPERTS (local
// ones, rounded up to 4), HOST_HIDDEN, HOST_INTERMEDIATE, TOPK, HOST_FIRST_ROWS, HOST_SECOND_ROWS (weight rows of a tile
// of the first GEMM, and of an expert in a tile of the second), HOST_STAGES, HOST_ACTIVATED_STAGES, HOST_THREADS,
// HOST_SHARED_BYTES, HOST_COUNTED_EXPERTS.
#pragma once
#include "common/quantize.cuh"
#include "gemm/products.cuh"
#include "gemm/stage_loads.cuh"

constexpr Format FORMAT = HOST_BF16 ? Format::BF16 : Format::E4M3;  // of weights and rows
constexpr bool SCALED = FORMAT == Format::E4M3;
constexpr int K_BLOCK = SCALED ? ROW_BYTES : ROW_BYTES / 2;  // values of a block of K
constexpr int TOKENS = HOST_TOKENS;
constexpr int SLOTS = TOKENS * TOPK;
constexpr int HIDDEN = HOST_HIDDEN;
constexpr int INTERMEDIATE = HOST_INTERMEDIATE;
constexpr int STAGES = HOST_STAGES;
constexpr int ACTIVATED_STAGES = HOST_ACTIVATED_STAGES;
constexpr int MOST_COLUMNS = 32;
constexpr int STAGE_ROWS = 64;  // weight rows of a stage: what the matrix unit takes at a time
// Tiles that are known at a time, from the one whose weights are loaded to the one that is stored.
constexpr int TILE_SLOTS = 4;

__device__ constexpr int ceil_div(int n, int d) { return (n + d - 1) / d; }

// The two GEMMs. A tile of the first multiplies ROWS outputs of one expert by every token. A tile of the second multiplies
// ROWS outputs of each of GROUP experts by the activated rows of all of them, TOKENS columns to an expert. Only the
// products of an expert's outputs with its own columns are used.
template <bool SECOND>
struct Half {
    static constexpr int N = SECOND ? HIDDEN : 2 * INTERMEDIATE;
    static constexpr int K = SECOND ? INTERMEDIATE : HIDDEN;
    static constexpr int ROWS = SECOND ? HOST_SECOND_ROWS : HOST_FIRST_ROWS;
    // As many as a stage has room for, and the registers for columns.
    static constexpr int FITTING =
        STAGE_ROWS / ROWS < MOST_COLUMNS / TOKENS ? STAGE_ROWS / ROWS : MOST_COLUMNS / TOKENS;
    static constexpr int GROUP = SECOND ? FITTING : 1;
    static constexpr int COLUMNS = ceil_div(GROUP * TOKENS, 8) * 8;  // of the products
    static constexpr int TILES = ceil_div(N, ROWS);                  // of an expert, or a group
    static constexpr int BLOCKS = ceil_div(K, K_BLOCK);
    static constexpr int SCALE_ROWS = ceil_div(N, SCALE_BLOCK);
    static constexpr int SCALE_COLUMNS = ceil_div(K, SCALE_BLOCK);
    // An expert's rows of a tile are of at most two blocks of scales.
    static constexpr int SCALES = GROUP * 2 * SCALE_COLUMNS;
};
using First = Half<false>;
using Second = Half<true>;
static_assert(First::ROWS % 8 == 0 && Second::ROWS % 8 == 0, "rows are whole patterns of the swizzle");

// Warps by number. Consumer warpgroups take turns: one ends a tile while the other multiplies the next.
constexpr int LOADING_WARP = 0;
constexpr int SCALES_WARP = 1;
constexpr int WATCHING_WARP = 2;
constexpr int FIRST_CONSUMER_WARP = 4;
constexpr int CONSUMERS = 2;
constexpr int CONSUMER_WARPS = CONSUMERS * WARPGROUP / 32;
constexpr int FIRST_ACTIVATING_WARP = FIRST_CONSUMER_WARP + CONSUMER_WARPS;
constexpr int ACTIVATING_WARPS = 8;
constexpr int WARPS = FIRST_ACTIVATING_WARP + ACTIVATING_WARPS;
constexpr int QUANTIZING_WARPS = WARPS - FIRST_CONSUMER_WARP;
constexpr int THREADS = WARPS * 32;

// Ids of bar.sync; 0 is that of __syncthreads.
enum class NamedBarrier : int { CONSUMER_0 = 1, CONSUMER_1 = 2, CONSUMERS = 3 };

// What a block does next.
enum class Work : int {
    FIRST,   // a tile of the first GEMM
    SECOND,  // a tile of the second
    REDUCE,  // the weighted sums, after all tiles of some outputs
    END,
};

struct alignas(16) LayerTile {
    Work work;
    int live;    // the expert's number among those that have tokens, or that of the group's first
    int output;  // the first
    u32 epoch;   // which half of the counters this launch uses
};

constexpr int SCALES_OF_TILE = SCALED ? (First::SCALES > Second::SCALES ? First::SCALES : Second::SCALES) : 1;

// host: cuda/few_tokens/config.rs
struct SharedStorage {
    u8 weights[STAGES][STAGE_ROWS][ROW_BYTES];
    u8 rows[First::BLOCKS][First::COLUMNS][ROW_BYTES];           // a token to a row
    u8 activated[ACTIVATED_STAGES][Second::COLUMNS][ROW_BYTES];  // TOKENS rows to an expert of the group
    float row_scales[SCALED ? First::BLOCKS : 1][First::COLUMNS];
    float activated_scales[SCALED ? ACTIVATED_STAGES : 1][Second::COLUMNS];
    LayerTile tiles[TILE_SLOTS];
    u32 first_slot[HOST_EXPERTS];  // of each expert
    u32 tokens_of[HOST_EXPERTS];   // a bit for each token
    float weight_scales[TILE_SLOTS][SCALES_OF_TILE];
    float router_weights[SLOTS];
    int expert_of[SLOTS];     // -1 for an empty slot
    int row_of[SLOTS];        // the slot at which the same token has the same expert first; -1 for an empty one
    int live_experts[SLOTS];  // by their first slots
    int live;                 // how many
    int reserved[3];
    u16 results[SLOTS][Second::ROWS];  // bf16, of the second GEMM
    Mbarrier full[STAGES];
    Mbarrier empty[STAGES];
    Mbarrier activated_full[ACTIVATED_STAGES];
    Mbarrier activated_empty[ACTIVATED_STAGES];
    Mbarrier tile_full[TILE_SLOTS];
    Mbarrier tile_empty[TILE_SLOTS];
    Mbarrier scales_full[TILE_SLOTS];
    Mbarrier first_done[TILE_SLOTS];
    Mbarrier multiplied[CONSUMERS];
    Mbarrier rows_full;
};

static_assert(THREADS == HOST_THREADS, "cuda/few_tokens/config.rs has another number");
static_assert(sizeof(SharedStorage) == HOST_SHARED_BYTES, "cuda/few_tokens/config.rs has another sum");

// What blocks tell each other. It survives the launch: `claims` counts up from an epoch's bit alone, and the counters of
// the other epoch are zero. The last claim of a launch begins the next epoch.
constexpr u32 EPOCH_BIT = 1u << 31;
struct Counters {
    u32 claims;
    u32 reserved[15];
    u32 multiplied[2][HOST_COUNTED_EXPERTS];  // tiles of the first GEMM that are stored, of each live expert
};
static_assert(SLOTS <= HOST_COUNTED_EXPERTS, "the host has checked");

// Where a warp is in a ring of N places; see StageRing in gemm/pipeline.cuh for parities.
template <int N>
struct Position {
    int place = 0;
    u32 parity = 0;

    __device__ __forceinline__ void advance() {
        if (++place == N) {
            place = 0;
            parity ^= 1;
        }
    }

    template <int COUNT>
    __device__ __forceinline__ void skip() {
        place += COUNT % N;
        parity ^= COUNT / N & 1;
        if (place >= N) {
            place -= N;
            parity ^= 1;
        }
    }
};

// Address of an element of an array of SharedStorage.
#define ELEMENT(memory, member, index) \
    ((memory) + OFFSET(SharedStorage, member) + (index) * (int)sizeof(SharedStorage::member[0]))

// Reads the tiles in order.
struct TileReader {
    u32 memory;
    Position<TILE_SLOTS> at;

    __device__ __forceinline__ explicit TileReader(u32 shared) : memory(shared) {}

    __device__ __forceinline__ LayerTile wait() const {
        wait_for_phase(ELEMENT(memory, tile_full, at.place), at.parity);
        const uint4 words = load_shared_words(ELEMENT(memory, tiles, at.place));
        return LayerTile{(Work)words.x, (int)words.y, (int)words.z, words.w};
    }

    // Every lane of the warp calls, once it needs the tile no more.
    __device__ __forceinline__ void release(const StageLoads& loads = StageLoads()) {
        __syncwarp();
        arrive_if(loads.then(ELEMENT(memory, tile_empty, at.place)), lane_of_thread() == 0);
        at.advance();
    }
};
