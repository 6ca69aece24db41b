// The order in which blocks take large tiles of few rows: a block that is free takes the next one. Some multiprocessors
// read up to 1.4 times as fast as others; with an even share they would be idle at the end of a launch.
//
// The thread that loads weights claims; other threads of the block that load something of the same tiles follow it by a
// queue in shared memory, `claims` in `SharedStorage`.
#pragma once
#include "gemm/products.cuh"
#include "gemm/stage_loads.cuh"
#include "gemm/tiles.cuh"

constexpr int CLAIM_SLOTS = 4;
// Weights of a tile from which on tiles are claimed. Smaller tiles are shared out evenly: loading one takes less time than
// a claim.
constexpr int CLAIMED_BYTES = 48 * 1024;

// host: CLAIM_QUEUE in cuda/gemm/shared_memory.rs.
struct ClaimQueue {
    Mbarrier posted[CLAIM_SLOTS];  // the claim is in `items`
    Mbarrier taken[CLAIM_SLOTS];   // CLAIM_FOLLOWERS have read it
    u32 items[CLAIM_SLOTS];
};

// A position in the queue of SLOTS at `memory`.
template <int SLOTS>
struct QueueSlot {
    u32 memory;
    u32 number = 0;  // of entries before this one

    __device__ __forceinline__ explicit QueueSlot(u32 memory) : memory(memory) {}
    __device__ __forceinline__ u32 slot() const { return number % SLOTS; }
    __device__ __forceinline__ u32 parity() const { return number / SLOTS % 2; }
};

struct ClaimSlot : QueueSlot<CLAIM_SLOTS> {
    using QueueSlot::QueueSlot;

    __device__ __forceinline__ u32 posted() const { return memory + OFFSET(ClaimQueue, posted) + slot() * 8; }
    __device__ __forceinline__ u32 taken() const { return memory + OFFSET(ClaimQueue, taken) + slot() * 8; }
    __device__ __forceinline__ u32 item() const { return memory + OFFSET(ClaimQueue, items) + slot() * 4; }

    // The thread that claims: says which item it has.
    __device__ __forceinline__ void post(u32 claimed) {
        wait_for_phase(taken(), parity() ^ 1);
        store_shared_word(item(), claimed);
        arrive(posted());
        ++number;
    }

    // A follower: the item. WARP_CALLS: all lanes of a warp call, else one thread.
    template <bool WARP_CALLS>
    __device__ __forceinline__ u32 take() {
        wait_for_phase(posted(), parity());
        u32 claimed = load_shared_word(item());
        // All lanes take the value that the first lane has loaded, so its arrival waits for the load that counts.
        if constexpr (WARP_CALLS) claimed = __shfl_sync(WARP, claimed, 0);
        StageLoads loads;
        loads.add((int)claimed);
        if (!WARP_CALLS || lane_of_thread() == 0) arrive(loads.then(taken()));
        ++number;
        return claimed;
    }
};

// One thread calls it, before the barriers are published.
template <typename Config>
__device__ __forceinline__ void init_claims(u32 memory) {
    if constexpr (Config::CLAIM_FOLLOWERS > 0) {
        for (ClaimSlot at(memory); at.number < CLAIM_SLOTS; ++at.number) {
            init_barrier(at.posted(), 1);
            init_barrier(at.taken(), Config::CLAIM_FOLLOWERS);
        }
    }
}

// Block b starts with item b. The first two rounds are given, and all where tiles are small; then a block claims whichever
// item is next, from a counter in the layout's header. A claim is under way while the tile before it is loaded.
template <typename Config>
struct Claims {
    u32 items;
    u32 given;  // from here on items are claimed

    __device__ __forceinline__ Claims(const GemmArgs<Config>& a, const TileOrder<Config>& order)
        : items(order.items()) {
        const int bytes = (a.k + Config::K_BLOCK - 1) / Config::K_BLOCK * Config::WEIGHT_BYTES;
        given = bytes < CLAIMED_BYTES ? items : min(2 * gridDim.x, items);
    }
    __device__ __forceinline__ bool any() const { return given < items; }
};

// The thread that claims.
template <typename Config>
struct ClaimingScheduler {
    const GemmArgs<Config>& a;
    u32 list;
    ClaimSlot at;
    u32 following;  // the item after this one

    __device__ __forceinline__ ClaimingScheduler(const GemmArgs<Config>& args, u32 list, u32 queue)
        : a(args), list(list), at(queue), following(blockIdx.x) {}

    // The next tile; false after the last one.
    __device__ __forceinline__ bool next(Tile& tile) {
        const TileOrder<Config> order(a, list);
        const Claims<Config> claims(a, order);
        const u32 item = following;
        if (claims.any()) {
            u32* counter = reinterpret_cast<u32*>(a.header + 3);
            // Blocks draw items - given + gridDim.x claims in all. The block that has the last one sets the counter to
            // 0 for the next launch.
            if (item == claims.items + gridDim.x - 1) *counter = 0;
            if constexpr (Config::CLAIM_FOLLOWERS > 0) {
                if (item >= claims.given) at.post(item);
            }
            if (item >= claims.items) return false;
            following = item + gridDim.x;
            if (following >= claims.given) following = claims.given + draw(counter);
        } else {
            if (item >= claims.items) return false;
            following = item + gridDim.x;
        }
        tile = order.tile(a, item, 0);
        return true;
    }
};

// Takes the same tiles. WARP_CALLS: all lanes of a warp call, else one thread.
template <typename Config, bool WARP_CALLS = false>
struct FollowingScheduler {
    const GemmArgs<Config>& a;
    u32 list;
    ClaimSlot at;
    u32 following;

    __device__ __forceinline__ FollowingScheduler(const GemmArgs<Config>& args, u32 list, u32 queue)
        : a(args), list(list), at(queue), following(blockIdx.x) {}

    // The next tile; false after the last one.
    __device__ __forceinline__ bool next(Tile& tile) {
        const TileOrder<Config> order(a, list);
        const Claims<Config> claims(a, order);
        u32 item = following;
        if (claims.any() && item >= claims.given) item = at.take<WARP_CALLS>();
        if (item >= claims.items) return false;
        following = item + gridDim.x;
        tile = order.tile(a, item, 0);
        return true;
    }
};
