// Tiles of both GEMMs on their way from the thread that claims them to those that load: where a thread has too few
// registers to do both.
#pragma once
#include "joined/tiles.cuh"

// host: TILE_QUEUE in cuda/gemm/shared_memory.rs.
constexpr int QUEUED_TILES = 4;
struct TileQueue {
    alignas(16) Tile tiles[QUEUED_TILES];  // with READ_ONCE; one without rows comes last
    u32 numbers[QUEUED_TILES];             // JoinedTile's
    Mbarrier posted[QUEUED_TILES];
    Mbarrier taken[QUEUED_TILES];    // by all that load
    Mbarrier started[QUEUED_TILES];  // by the thread that loads weights
};

struct TileSlot : QueueSlot<QUEUED_TILES> {
    using QueueSlot::QueueSlot;

    __device__ __forceinline__ u32 tile() const { return memory + OFFSET(TileQueue, tiles) + slot() * 16; }
    __device__ __forceinline__ u32 tile_number() const { return memory + OFFSET(TileQueue, numbers) + slot() * 4; }
    __device__ __forceinline__ u32 posted() const { return memory + OFFSET(TileQueue, posted) + slot() * 8; }
    __device__ __forceinline__ u32 taken() const { return memory + OFFSET(TileQueue, taken) + slot() * 8; }
    __device__ __forceinline__ u32 started() const { return memory + OFFSET(TileQueue, started) + slot() * 8; }

    // The next tile. WARP_CALLS: all lanes of a warp call, which have its rows only; else one thread. WEIGHTS: the thread
    // that loads those.
    template <bool WARP_CALLS, bool WEIGHTS>
    __device__ __forceinline__ JoinedTile take() {
        wait_for_phase(posted(), parity());
        JoinedTile next = {load_tile(tile()), load_shared_word(tile_number())};
        if constexpr (WARP_CALLS) {
            // As in ClaimSlot::take.
            next.tile.first = __shfl_sync(WARP, next.tile.first, 0);
            next.tile.rows = __shfl_sync(WARP, next.tile.rows, 0);
            next.number = __shfl_sync(WARP, next.number, 0);
        }
        StageLoads loads;
        loads.add(next.tile.rows);
        loads.add((int)next.number);
        if (!WARP_CALLS || lane_of_thread() == 0) {
            if constexpr (WEIGHTS) arrive(started());
            arrive(loads.then(taken()));
        }
        ++number;
        return next;
    }
};

// One thread calls it, before the barriers are published; so many threads or warps load.
__device__ __forceinline__ void init_tile_queue(u32 memory, int loading) {
    for (TileSlot at(memory); at.number < QUEUED_TILES; ++at.number) {
        init_barrier(at.posted(), 1);
        init_barrier(at.taken(), loading);
        init_barrier(at.started(), 1);
    }
}

// The thread that claims tiles: the next one when the weights of the one before are being loaded. `first` has been drawn
// from the counter; `complete` adds to a tile what else is to be known of it.
template <typename Config, typename Complete>
__device__ __forceinline__ void claim_tiles(const JoinedArgs<Config>& a, u32 list, u32 queue, u32 first,
                                            const Complete& complete) {
    u32 item = first;
    for (TileSlot at(queue);; ++at.number) {
        const JoinedOrder<Config> order(a, list);
        const bool over = order.is_over(item);
        JoinedTile next = {Tile{0, 0, 0, 0}, 0};
        if (!over) {
            next = order.tile(item);
            complete(next);
        }
        wait_for_phase(at.taken(), at.parity() ^ 1);
        store_tile(at.tile(), next.tile);
        store_shared_word(at.tile_number(), next.number);
        arrive(at.posted());
        if (over) return;
        wait_for_phase(at.started(), at.parity());
        item = draw(order.counter(a));
    }
}
