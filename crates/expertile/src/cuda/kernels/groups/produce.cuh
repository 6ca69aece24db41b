// What threads load of one tile, and the threads that load tile after tile of one GEMM.
#pragma once
#include "groups/storage.cuh"

// Which of a tile's slabs have scales that are not folded in: a bit for each, for the lowest bits of `column`, which is a
// multiple of 64.
__device__ __forceinline__ int spread_slabs(const Args& a, const Tile& tile) {
    int spread = 0;
    if (HOST_SPREAD && a.spread != nullptr) {
        const int first = tile.column / UNIT_OUTPUTS;
        const int slabs = (here(a.n) + UNIT_OUTPUTS - 1) / UNIT_OUTPUTS;
        const u8* of_slab = a.spread + ((i64)(tile.expert & ~READ_ONCE) * slabs + first);
#pragma unroll 1
        for (int i = 0; i < min(Config::CONSUMERS, slabs - first); ++i) spread |= of_slab[i] << i;
    }
    return spread;
}

// Loads a tile's weights; `expert` is without flags.
__device__ __forceinline__ void load_weights(const Args& a, Ring& ring, int expert, int first, u64 keep) {
    const int slabs = (here(a.n) + UNIT_OUTPUTS - 1) / UNIT_OUTPUTS;
    const int present = min(Config::CONSUMERS, slabs - first);
    int units = (here(a.k) + UNIT_K - 1) / UNIT_K;
    const i64 slab_bytes = (i64)units * UNIT_BYTES;
    const u8* from = a.packed + ((i64)expert * slabs + first) * slab_bytes;
    for (; units > 0; units -= Config::UNITS) {
        const u32 bytes = min(Config::UNITS, units) * UNIT_BYTES;
        wait_for_phase(ring.empty(), ring.parity() ^ 1);
        arrive_expecting(ring.full(), present * bytes);
        const u8* next = from;
#pragma unroll 1
        for (int i = 0; i < present; ++i, next += slab_bytes)
            copy_bytes(ring.weights(i), next, bytes, ring.full(), keep);
        from += bytes;
        ring.advance();
    }
}

// A tile without rows comes last: consumers stop there.
__device__ __forceinline__ void end_weights(const Ring& ring) {
    wait_for_phase(ring.empty(), ring.parity() ^ 1);
    store_tile(ring.tile(), Tile{0, 0, 0, 0});
    arrive(ring.full());
}

// The thread that loads weights, and says which tile they are of.
__device__ __forceinline__ void produce_weights(const Args& a, Ring ring, ClaimingScheduler<Config> scheduler) {
    Tile tile;
    while (scheduler.next(tile)) {
        const u64 keep = (tile.expert & READ_ONCE) != 0 ? KEEP_BRIEFLY : KEEP_NORMALLY;
        tile.expert &= ~READ_ONCE;
        const int first = tile.column / UNIT_OUTPUTS;
        tile.column |= spread_slabs(a, tile);
        // Before the loop, where the tile is still in registers.
        wait_for_phase(ring.empty(), ring.parity() ^ 1);
        store_tile(ring.tile(), tile);
        load_weights(a, ring, tile.expert, first, keep);
    }
    end_weights(ring);
}

// Loads a tile's rows; SCALES: and their scales.
template <bool SCALES>
__device__ __forceinline__ void load_rows(const Args& a, Ring& ring, const Tile& tile) {
    const int stride = (a.m_sum + 3) & ~3;
    const int blocks = blocks_of(a.k);
    const int map = (tile.rows - 1) / Config::ROW_STEP;
    const int rows = (map + 1) * Config::ROW_STEP;
    const int scaled = min(rows, stride - tile.first);
    // A bulk copy starts on 16 bytes; else scales are copied one by one.
    const u32 scale_bytes = SCALES && tile.first % 4 == 0 ? scaled * 4 : 0;
    const float* scales = a.row_scales + tile.first;
    for (int block = 0; block < blocks; ++block) {
        wait_for_phase(ring.empty(), ring.parity() ^ 1);
        arrive_expecting(ring.full(), rows * ROW_BYTES + scale_bytes);
        copy_box(ring.rows(), a.rows[map], block * Config::K_BLOCK, tile.first, ring.full());
        if constexpr (SCALES) {
            if (scale_bytes > 0) {
                copy_bytes(ring.row_scales(), scales, scale_bytes, ring.full());
            } else {
#pragma unroll 1
                for (int row = 0; row < scaled; ++row) copy_word(ring.row_scales() + row * 4, scales + row);
            }
            arrive_after_copies(ring.full());
            scales += stride;
        }
        ring.advance();
    }
}

template <bool SCALES>
__device__ __forceinline__ void end_rows(const Ring& ring) {
    wait_for_phase(ring.empty(), ring.parity() ^ 1);
    arrive(ring.full());
    if (SCALES) arrive(ring.full());
}

// The thread that loads rows; SCALES: and their scales.
template <bool SCALES>
__device__ __forceinline__ void produce_rows(const Args& a, Ring ring, FollowingScheduler<Config> scheduler) {
    Tile tile;
    while (scheduler.next(tile)) load_rows<SCALES>(a, ring, tile);
    end_rows<SCALES>(ring);
}

// Loads the scales of a tile's rows: a warp, a lane those of one row.
__device__ __forceinline__ void load_scales(const Args& a, Ring& ring, const Tile& tile) {
    static_assert(!Config::SCALES_APART || Config::ROW_TILE <= 32, "a lane for each row");
    const int lane = lane_of_thread();
    const float* scales = a.row_scales + (tile.first + lane);
    for (int k = 0; k < a.k; k += Config::K_BLOCK) {
        wait_for_phase(ring.empty(), ring.parity() ^ 1);
        if (lane < tile.rows) copy_word(ring.row_scales() + lane * 4, scales);
        arrive_after_copies(ring.full());
        scales += (here(a.m_sum) + 3) & ~3;
        ring.advance();
    }
}

__device__ __forceinline__ void end_scales(const Ring& ring) {
    wait_for_phase(ring.empty(), ring.parity() ^ 1);
    arrive(ring.full());
}

// A warp that loads scales of rows.
__device__ __forceinline__ void produce_scales(const Args& a, Ring ring, FollowingScheduler<Config, true> scheduler) {
    Tile tile;
    while (scheduler.next(tile)) load_scales(a, ring, tile);
    end_scales(ring);
}
