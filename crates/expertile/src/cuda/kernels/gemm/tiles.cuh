// The grouped GEMM's arguments, its tiles, and the order in which blocks take them.
//
// Templates take the kernel's `Config`; docs/kernels/gemm.md lists its members.
#pragma once
#include "gemm/products.cuh"
#include "ptx/hopper.cuh"

// The host's `Arguments` in cuda/gemm/arguments.rs, member by member.
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

// The row tiles of a launch as every block lists them in its own shared memory before it takes the first one. Behind the
// boxes that the copy engine has been asked for, a load from global memory takes some microseconds; the threads that load
// tiles would spend about half of their time on it.
//
// host: list_bytes in cuda/gemm/shared_memory.rs.
template <int LISTED>
struct alignas(8) TileList {
    u32 row_tiles;
    u32 reserved;
    u32 entries[LISTED][2];  // first row; expert, rows in 8 bits, and whether no other row tile has the expert
};

// A row tile: rows of one expert.
struct RowTile {
    int first;
    u32 rest;

    __device__ __forceinline__ RowTile(u32 first, u32 rest) : first(first), rest(rest) {}

    // The one of that number in the worklist, from there.
    template <typename Config>
    __device__ __forceinline__ RowTile(const GemmArgs<Config>& a, int index) {
        static_assert(Config::ROW_TILE < 256, "rows take 8 bits");
        const int2 entry = a.worklist[index];
        const int left = a.psum != nullptr ? a.psum[entry.x] - entry.y : a.rows_left[index];
        const bool read_once = left <= Config::ROW_TILE && (index == 0 || a.worklist[index - 1].x != entry.x);
        first = entry.y;
        rest = entry.x << 9 | min(max(left, 1), Config::ROW_TILE) << 1 | (read_once ? 1 : 0);
    }
    __device__ __forceinline__ int rows() const { return rest >> 1 & 0xff; }
    // With READ_ONCE.
    __device__ __forceinline__ int expert() const { return rest >> 9 | ((rest & 1) != 0 ? READ_ONCE : 0); }
};

// Lists as many row tiles as there is room for; those past it are read from the worklist. Every thread of the block
// calls, and all may take tiles afterwards.
template <typename Config>
__device__ __forceinline__ void list_row_tiles(const GemmArgs<Config>& a, u32 list) {
    using List = TileList<Config::LISTED>;
    const int row_tiles = a.header[2];
    if (threadIdx.x == 0) store_shared_word(list + OFFSET(List, row_tiles), row_tiles);
#pragma unroll 1
    for (int index = threadIdx.x; index < min(row_tiles, Config::LISTED); index += Config::THREADS) {
        const RowTile tile(a, index);
        const u32 to = list + OFFSET(List, entries) + index * 8;
        store_shared_word(to, tile.first);
        store_shared_word(to + 4, tile.rest);
    }
    __syncthreads();
}

// All tiles of a launch, numbered in the order in which they are taken. A group of ROW_TILES_PER_GROUP row tiles comes
// with all its outputs before the next group; within it rows vary faster. Blocks that run together then share rows and,
// where row tiles belong to one expert, weights in the L2 cache.
template <typename Config>
struct TileOrder {
    using List = TileList<Config::LISTED>;
    static constexpr int COLUMN_STEP = Config::OUTPUTS * Config::CLUSTER_COLUMNS;

    u32 list;  // in shared memory
    int row_tiles;
    int columns;

    __device__ __forceinline__ TileOrder(const GemmArgs<Config>& a, u32 list)
        : list(list),
          row_tiles(load_shared_word(list + OFFSET(List, row_tiles))),
          columns((a.n + COLUMN_STEP - 1) / COLUMN_STEP) {}

    // Number of items; an item is one tile for each block of a cluster.
    __device__ __forceinline__ int items() const { return row_tiles * columns; }

    // The number of an item's row tile in the worklist, and of its columns.
    struct Place {
        int index;
        int column;
    };

    __device__ __forceinline__ Place place(int item) const {
        constexpr int GROUP = Config::ROW_TILES_PER_GROUP;
        const int before = item / (GROUP * columns) * GROUP;
        return place_in(before, item - before * columns);
    }

    // The same without a division: a thread's time for a tile is what bounds small ones.
    __device__ __forceinline__ float reciprocal() const {
        return 1.0f / (float)(Config::ROW_TILES_PER_GROUP * columns);
    }
    __device__ __forceinline__ Place place(int item, float reciprocal) const {
        const int group_items = Config::ROW_TILES_PER_GROUP * columns;
        // The quotient, or one more or less.
        int group = (int)((float)item * reciprocal);
        const int rest = item - group * group_items;
        group += rest < 0 ? -1 : rest >= group_items ? 1 : 0;
        return place_in(group * Config::ROW_TILES_PER_GROUP, item - group * group_items);
    }

    // Of the group that begins with row tile `before`.
    __device__ __forceinline__ Place place_in(int before, int place) const {
        const int in_group = min(Config::ROW_TILES_PER_GROUP, row_tiles - before);
        // Rotated by one for each column: else a block could meet the short last tile of an expert every time.
        return Place{before + (place + place / in_group) % in_group, place / in_group};
    }

    __device__ __forceinline__ Tile tile_at(const GemmArgs<Config>& a, const Place& at, int rank) const {
        RowTile rows(0, 0);
        if (at.index < Config::LISTED) {
            const float2 entry = load_shared_pair(list + OFFSET(List, entries) + at.index * 8);
            rows = RowTile(__float_as_uint(entry.x), __float_as_uint(entry.y));
        } else {
            rows = RowTile(a, at.index);
        }
        const int column = at.column * Config::CLUSTER_COLUMNS + (Config::CLUSTER_COLUMNS > 1 ? rank : 0);
        return Tile{rows.expert(), rows.first, rows.rows(),
                    column * (Config::GATE_AND_UP ? Config::OUTPUTS / Config::WEIGHT_BOXES : Config::OUTPUTS)};
    }

    __device__ __forceinline__ Tile tile(const GemmArgs<Config>& a, int item, int rank) const {
        return tile_at(a, place(item), rank);
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

    __device__ __forceinline__ StaticScheduler(const GemmArgs<Config>& args, u32 list, int cluster, int clusters,
                                               int rank)
        : a(args), order(args, list), clusters(clusters), rank(rank), item(cluster) {}

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
