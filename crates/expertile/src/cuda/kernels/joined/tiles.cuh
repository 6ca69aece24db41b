// Both GEMMs and the activation between them in one launch: arguments, the order in which blocks take tiles, and what
// blocks tell each other of a row tile.
#pragma once
#include "gemm/claims.cuh"

// host: Arguments in cuda/gemm/joined.rs.
template <typename Config>
struct JoinedArgs {
    GemmArgs<Config> gemms[2];  // results of the first are gate | up, rows of the second are activated
    void* activated;            // [m_sum, I] e4m3 or bf16
    float* activated_scales;    // [I / 128, rounded up; m_sum rounded up to 4], of e4m3
    u32* counters;              // groups of columns that are activated, of all rows; then Progress of each row tile
};

constexpr int ACTIVATED_GROUP = SCALE_BLOCK;  // columns that are activated together
constexpr int PIECE_OUTPUTS = 64;             // of gate or up, which come of one consumer

// How far a row tile has come. Groups of columns are activated one by one, each when the last of its pieces of gate and
// up has been stored.
struct Progress {
    u32* activated;  // groups that are; then, of each group, its pieces that are stored
    int intermediate;

    template <typename Config>
    __device__ __forceinline__ Progress(const JoinedArgs<Config>& a, u32 index) : intermediate(a.gemms[1].k) {
        activated = a.counters + 1 + (i64)index * (groups() + 1);
    }
    __device__ __forceinline__ int groups() const { return (intermediate + ACTIVATED_GROUP - 1) / ACTIVATED_GROUP; }
    // The group of an output of the first GEMM, of gate or up.
    __device__ __forceinline__ int group_of(int output) const {
        return (output < intermediate ? output : output - intermediate) / ACTIVATED_GROUP;
    }
    __device__ __forceinline__ int pieces(int group) const {
        return 2 * (min(ACTIVATED_GROUP, intermediate - group * ACTIVATED_GROUP) / PIECE_OUTPUTS);
    }
};

// A tile, and which row tile of which GEMM it is of: the number in the worklist, and SECOND_GEMM.
constexpr u32 SECOND_GEMM = 1u << 31;
struct JoinedTile {
    Tile tile;
    u32 number;
};

// The order of both GEMMs' tiles. All of the first are claimed before the first one of the second, so that whatever a block
// waits for is in the hands of one that runs.
template <typename Config>
struct JoinedOrder {
    const JoinedArgs<Config>& a;
    TileOrder<Config> first;
    TileOrder<Config> second;
    float first_reciprocal;
    float second_reciprocal;

    __device__ __forceinline__ JoinedOrder(const JoinedArgs<Config>& args, u32 list)
        : a(args),
          first(args.gemms[0], list),
          second(args.gemms[1], list),
          first_reciprocal(first.reciprocal()),
          second_reciprocal(second.reciprocal()) {}

    __device__ __forceinline__ u32 items() const { return first.items() + second.items(); }

    // From where items are drawn.
    static __device__ __forceinline__ u32* counter(const JoinedArgs<Config>& a) {
        return reinterpret_cast<u32*>(a.gemms[0].header + 3);
    }

    // Whether what has been drawn is past the last item. Every block draws one such; the block that has the last one of all
    // sets the counter to 0 for the next launch.
    __device__ __forceinline__ bool is_over(u32 item) const {
        if (item < items()) return false;
        if (item == items() + gridDim.x - 1) *counter(a) = 0;
        return true;
    }

    __device__ __forceinline__ JoinedTile tile(u32 item) const {
        const bool is_second = item >= (u32)first.items();
        TileOrder<Config> order = first;
        if (is_second) order.columns = second.columns;
        const auto place =
            order.place(item - (is_second ? first.items() : 0), is_second ? second_reciprocal : first_reciprocal);
        return JoinedTile{order.tile_at(a.gemms[is_second ? 1 : 0], place, 0),
                          place.index | (is_second ? SECOND_GEMM : 0)};
    }
};

// Of the thread that claims. A claim is under way while the tile before it is loaded.
template <typename Config>
struct JoinedScheduler {
    const JoinedOrder<Config> order;
    ClaimSlot at;
    u32 claim;  // the next one

    // `first` has been drawn from the counter.
    __device__ __forceinline__ JoinedScheduler(const JoinedArgs<Config>& a, u32 list, u32 queue, u32 first)
        : order(a, list), at(queue), claim(first) {}

    // The next tile; false after the last one.
    __device__ __forceinline__ bool next(JoinedTile& tile) {
        const u32 item = claim;
        at.post(item);
        if (order.is_over(item)) return false;
        claim = draw(order.counter(order.a));
        tile = order.tile(item);
        return true;
    }
};

// Takes the same tiles.
template <typename Config>
struct JoinedFollower {
    const JoinedOrder<Config> order;
    ClaimSlot at;

    __device__ __forceinline__ JoinedFollower(const JoinedArgs<Config>& a, u32 list, u32 queue)
        : order(a, list), at(queue) {}

    __device__ __forceinline__ bool next(JoinedTile& tile) {
        const u32 item = at.take<false>();
        if (item >= order.items()) return false;
        tile = order.tile(item);
        return true;
    }
};

// Tiles of the first GEMM on their way from the consumers, which have stored their results, to the warps that activate;
// one without rows comes last. host: STORED_TILES in cuda/gemm/shared_memory.rs.
constexpr int STORED_SLOTS = 2;
struct StoredTiles {
    alignas(16) Tile tiles[STORED_SLOTS];
    u32 numbers[STORED_SLOTS];
    u32 complete[STORED_SLOTS];  // a bit for each piece of the tile that was its group's last
    Mbarrier full[STORED_SLOTS];
    Mbarrier empty[STORED_SLOTS];
};

// A position among them, of the queue at `memory`.
struct StoredSlot : QueueSlot<STORED_SLOTS> {
    using QueueSlot::QueueSlot;

    __device__ __forceinline__ u32 tile() const { return memory + OFFSET(StoredTiles, tiles) + slot() * 16; }
    __device__ __forceinline__ u32 tile_number() const { return memory + OFFSET(StoredTiles, numbers) + slot() * 4; }
    __device__ __forceinline__ u32 complete() const { return memory + OFFSET(StoredTiles, complete) + slot() * 4; }
    __device__ __forceinline__ u32 full() const { return memory + OFFSET(StoredTiles, full) + slot() * 8; }
    __device__ __forceinline__ u32 empty() const { return memory + OFFSET(StoredTiles, empty) + slot() * 8; }
};
