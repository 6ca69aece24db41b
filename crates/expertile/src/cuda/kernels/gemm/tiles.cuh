// The grouped GEMM's arguments, its tiles, and the order in which blocks take them.
//
// Templates take the kernel's `Config`; docs/kernels/gemm.md lists its members.
#pragma once
#include "ptx/hopper.cuh"

// The host's `Arguments` in cuda/gemm.rs, member by member.
template <typename Config>
struct GemmArgs {
    TensorMap weights;                 // [experts, n, k]; a box is OUTPUTS / WEIGHT_BOXES rows of a block of K
    TensorMap rows[Config::ROW_MAPS];  // [m_sum, k]; a box of map i is (i + 1) * ROW_STEP / MULTICAST rows
    const float* row_scales;           // [k / 128, m_sum rounded up to 4]
    const float* weight_scales;        // [experts, n / 128, k / 128], rounded up
    void* out;                         // [m_sum, n] bf16; with an activation [m_sum, n / 2] e4m3
    float* out_scales;                 // with an activation [n / 256, m_sum rounded up to 4]
    int* header;                       // word 2: number of row tiles; word 3: 0, and 0 again when the launch is over
    const int2* worklist;              // (expert, first row) of each row tile
    const int* psum;                   // end of each expert's live rows, where an expert has one segment; else null
    const int* rows_left;  // without psum: of each entry of the worklist, rows to its segment's end, or more
                           // than a tile has
    int n;
    int k;
    int m_sum;
    int f16_scales;       // int4: 1 where its scales are f16, 0 where they are bf16
    const float* bias;    // [experts, n], added to the sums, or null
    const u8* packed;     // mxfp4, int4: the weights as groups/mxfp4.cuh and groups/int4.cuh have them; else null
    const u8* exponents;  // mxfp4: of a row's largest scale: [experts, n rounded up to 64]; else null, as the next
    const u8* spread;     // [experts, n / 64, rounded up]: 1 where scales are too far apart; null: nowhere
};

// Flag OR-ed into `Tile::expert`: no other tile reads these weights, so load them evict-first.
constexpr int READ_ONCE = 1 << 30;

struct alignas(16) Tile {
    int expert;  // for the producer, with READ_ONCE
    int first;   // row
    int rows;    // live rows; 0 means that there are no more tiles
    int column;  // first output
};

// All tiles of a launch, numbered in the order in which they are taken. A group of ROW_TILES_PER_GROUP row tiles comes
// with all its outputs before the next group; within it rows vary faster. Blocks that run together then share rows and,
// where row tiles belong to one expert, weights in the L2 cache.
template <typename Config>
struct TileOrder {
    static constexpr int COLUMN_STEP = Config::OUTPUTS * Config::CLUSTER_COLUMNS;

    int row_tiles;
    int columns;

    __device__ __forceinline__ explicit TileOrder(const GemmArgs<Config>& a)
        : row_tiles(a.header[2]), columns((a.n + COLUMN_STEP - 1) / COLUMN_STEP) {}

    // Number of items; an item is one tile for each block of a cluster.
    __device__ __forceinline__ int items() const { return row_tiles * columns; }

    __device__ __forceinline__ Tile tile(const GemmArgs<Config>& a, int item, int rank) const {
        constexpr int GROUP = Config::ROW_TILES_PER_GROUP;
        const int before = item / (GROUP * columns) * GROUP;
        const int in_group = min(GROUP, row_tiles - before);
        const int place = item - before * columns;
        // Rotated by one for each column: else a block could meet the short last tile of an expert every time.
        const int index = before + (place + place / in_group) % in_group;
        const int2 entry = a.worklist[index];
        const int left = a.psum != nullptr ? a.psum[entry.x] - entry.y : a.rows_left[index];
        const bool read_once = left <= Config::ROW_TILE && (index == 0 || a.worklist[index - 1].x != entry.x);
        const int column = place / in_group * Config::CLUSTER_COLUMNS + (Config::CLUSTER_COLUMNS > 1 ? rank : 0);
        return Tile{read_once ? entry.x | READ_ONCE : entry.x, entry.y, min(max(left, 1), Config::ROW_TILE),
                    column * (Config::GATE_AND_UP ? Config::OUTPUTS / Config::WEIGHT_BOXES : Config::OUTPUTS)};
    }
};

// Static persistent scheduler: cluster c takes items c, c + clusters, c + 2 * clusters, ...
template <typename Config>
struct StaticScheduler {
    const GemmArgs<Config>& a;
    const TileOrder<Config> order;
    const int clusters;
    const int rank;
    int item;

    __device__ __forceinline__ StaticScheduler(const GemmArgs<Config>& args, int cluster, int clusters, int rank)
        : a(args), order(args), clusters(clusters), rank(rank), item(cluster) {}

    // The next tile; false after the last one.
    __device__ __forceinline__ bool next(Tile& tile) {
        if (item >= order.items()) return false;
        tile = order.tile(a, item, rank);
        item += clusters;
        return true;
    }
};

// The blocks of K that this thread block multiplies: all, or its part where K is split. At least one: the host refuses
// a K with fewer blocks than parts.
template <typename Config>
struct KRange {
    int begin;
    int end;

    __device__ __forceinline__ KRange(int k, int rank) {
        const int blocks = (k + Config::K_BLOCK - 1) / Config::K_BLOCK;
        begin = Config::K_SPLITS > 1 ? blocks * rank / Config::K_SPLITS : 0;
        end = Config::K_SPLITS > 1 ? blocks * (rank + 1) / Config::K_SPLITS : blocks;
    }
    __device__ __forceinline__ int blocks() const { return end - begin; }
};
