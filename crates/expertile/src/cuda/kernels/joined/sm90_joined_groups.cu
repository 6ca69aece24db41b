// Both grouped GEMMs of a layer over weights with groups and the activation between them on Hopper, for few rows, in one
// launch: as sm90_joined_few_rows.cu, with tiles that are multiplied as in sm90_gemm_groups.cu.
//
//   one thread   claims tiles
//   one thread   loads their weights
//   one thread   loads their rows (and scales, where no warp does); of the second GEMM once the row tile is activated
//   a warp       loads scales of rows, where SCALES_APART
//   consumers    multiply, and store gate | up or the results; a warpgroup counts what it has stored, and activates the
//                columns of a row tile of which it has counted the last part
//
// Decoding takes as many warps as there are registers for, so none are left for the activation alone.
//
// docs/kernels/joined.md has the maps. Set by the host: see groups/storage.cuh, and joined/activate.cuh.
#include "groups/multiply.cuh"
#include "groups/produce.cuh"
#include "joined/activate.cuh"

using Joined = JoinedArgs<Config>;

__device__ __forceinline__ const Args& gemm_of(const Joined& joined, u32 number) {
    return joined.gemms[(number & SECOND_GEMM) != 0];
}

__device__ __forceinline__ u32 number_at(const Ring& ring) {
    return ring.memory + OFFSET(SharedStorage, numbers) + ring.stage * 4;
}

__device__ __forceinline__ u32 queue_at(u32 memory) { return memory + OFFSET(SharedStorage, queue); }

// The thread that loads weights, and says which tile they are of.
__device__ __forceinline__ void produce_joined_weights(const Joined& joined, Ring ring) {
    TileSlot at(queue_at(ring.memory));
    while (true) {
        JoinedTile next = at.take<false, true>();
        if (next.tile.rows == 0) break;
        const u64 keep = (next.tile.expert & READ_ONCE) != 0 ? KEEP_BRIEFLY : KEEP_NORMALLY;
        next.tile.expert &= ~READ_ONCE;
        wait_for_phase(ring.empty(), ring.parity() ^ 1);
        store_tile(ring.tile(), next.tile);
        store_shared_word(number_at(ring), next.number);
        load_weights(gemm_of(joined, next.number), ring, next.tile.expert, next.tile.column / UNIT_OUTPUTS, keep);
    }
    end_weights(ring);
}

// Waits until a tile's rows are there.
__device__ __forceinline__ void wait_for_rows(const Joined& joined, u32 memory, u32 number, bool& all_activated) {
    if ((number & SECOND_GEMM) == 0 || all_activated) return;
    const u32 list = memory + OFFSET(SharedStorage, list);
    const int row_tiles = load_shared_word(list + OFFSET(TileList<Config::LISTED>, row_tiles));
    all_activated = wait_until_activated(joined, Progress(joined, number & ~SECOND_GEMM), row_tiles);
}

// Loads something of every tile's rows once they are there. WARP_CALLS: all lanes of a warp call, else one thread.
template <bool WARP_CALLS, typename Load>
__device__ __forceinline__ void load_of_rows(const Joined& joined, const Ring& ring, const Load& load) {
    TileSlot at(queue_at(ring.memory));
    bool all_activated = false;
    while (true) {
        const JoinedTile next = at.take<WARP_CALLS, false>();
        if (next.tile.rows == 0) break;
        wait_for_rows(joined, ring.memory, next.number, all_activated);
        load(gemm_of(joined, next.number), next.tile);
    }
}

// The thread that loads rows; SCALES: and their scales.
template <bool SCALES>
__device__ __forceinline__ void produce_joined_rows(const Joined& joined, Ring ring) {
    load_of_rows<false>(joined, ring, [&](const Args& a, const Tile& tile) { load_rows<SCALES>(a, ring, tile); });
    end_rows<SCALES>(ring);
}

// A warp that loads scales of rows.
__device__ __forceinline__ void produce_joined_scales(const Joined& joined, Ring ring) {
    load_of_rows<true>(joined, ring, [&](const Args& a, const Tile& tile) { load_scales(a, ring, tile); });
    end_scales(ring);
}

__device__ __forceinline__ void consume(const Joined& joined, Ring ring, int consumer) {
    while (true) {
        wait_for_phase(ring.full(), ring.parity());
        Tile tile = load_tile(ring.tile());
        if (tile.rows == 0) break;
        const u32 number = load_shared_word(number_at(ring));
        const Args& a = gemm_of(joined, number);
        const bool spread = HOST_SPREAD && (tile.column >> consumer & 1) != 0;
        tile.column &= ~(UNIT_OUTPUTS - 1);
        const bool present = tile.column + consumer * UNIT_OUTPUTS < a.n;
        // As in sm90_gemm_groups.cu.
        if (Config::BROAD && __any_sync(WARP, !present)) {
            skip_blocks(ring, blocks_of(a.k));
            continue;
        }
        multiply_tile<1>(a, tile, ring, consumer, spread);
        if (__any_sync(WARP, (number & SECOND_GEMM) == 0 && present)) {
            // What this warpgroup has staged is stored by now.
            const u32 staged =
                ring.memory + OFFSET(SharedStorage, staging) + consumer * Config::ROW_TILE * Config::STAGING_ROW;
            // The barrier's number is in a register: with a branch for each the ring would leave uniform registers.
            finish_piece(joined, tile, number, tile.column + consumer * UNIT_OUTPUTS, staged,
                         (int)NamedBarrier::CONSUMER_0 + consumer);
        }
    }
}

extern "C" __global__ void __launch_bounds__(Config::THREADS, Config::BLOCKS)
    joined_gemms(const __grid_constant__ Joined a) {
    extern __shared__ __align__(1024) u8 shared[];
    const u32 memory = shared_address(shared);
    // A shuffle, for the compiler to see that a warp has one: the ring is then kept in uniform registers.
    const int consumer = __shfl_sync(WARP, (int)threadIdx.x / WARPGROUP, 0) - 1;
    Ring ring(memory);
    clear_weights(memory);
    if (threadIdx.x == 0) {
        init_ring(ring);
        init_tile_queue(queue_at(memory), LOADING);
        publish_barriers();
        prefetch_map(a.gemms[0].rows[0]);
        prefetch_map(a.gemms[1].rows[0]);
    }
    __syncthreads();
    wait_for_previous_launch();
    const u32 list = memory + OFFSET(SharedStorage, list);
    const int warp = threadIdx.x / 32;
    const bool claims = warp == (int)ProducerWarp::CLAIM && elect_thread();
    // Under way while row tiles are listed.
    u32 first_claim = 0;
    if (claims) first_claim = draw(JoinedOrder<Config>::counter(a));
    list_row_tiles(a.gemms[0], list);
    // With one consumer warpgroup every thread has as many registers as it may have from the start.
    constexpr bool MOVE_REGISTERS = Config::CONSUMERS > 1;
    if (consumer < 0) {
        if constexpr (MOVE_REGISTERS) give_registers<Config::PRODUCER_REGISTERS>();
        if (warp == (int)ProducerWarp::WEIGHTS) {
            if (elect_thread()) produce_joined_weights(a, ring);
        } else if (warp == (int)ProducerWarp::ROWS) {
            if (elect_thread()) produce_joined_rows<Config::SCALED && !Config::SCALES_APART>(a, ring);
        } else if (Config::SCALES_APART && warp == (int)ProducerWarp::SCALES) {
            produce_joined_scales(a, ring);
        } else if (claims) {
            claim_tiles(a, list, queue_at(memory), first_claim, [&](JoinedTile& next) {
                next.tile.column |= spread_slabs(gemm_of(a, next.number), next.tile);
            });
        }
    } else {
        if constexpr (MOVE_REGISTERS) take_registers<Config::CONSUMER_REGISTERS>();
        consume(a, ring, consumer);
    }
}
