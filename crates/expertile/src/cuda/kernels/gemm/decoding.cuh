// MXFP4 weights on their way to a stage where tokens are the M operand of wgmma: the first warpgroup loads packed units,
// decodes them once for all rows of the tile, and stores them where the copy engine would have. docs/kernels/gemm.md has
// the map.
//
// A kernel's `SharedStorage` has, beside what pipeline.cuh asks for:
//
//   u8 packed[PACKED][SLABS][UNITS * UNIT_BYTES];    on 16 bytes: blocks of K as gemm/mxfp4.cuh has them
//   Mbarrier packed_full[PACKED];
//
// and its `Config` PACKED: blocks of K that are loaded ahead of those that are decoded, and one.
#pragma once
#include "gemm/mxfp4.cuh"
#include "gemm/pipeline.cuh"

// Id of bar.sync; 0 is that of __syncthreads.
constexpr int DECODERS_MEET = 1;

template <typename Config>
struct Decoding {
    static constexpr int SLABS = Config::OUTPUTS / UNIT_OUTPUTS;
    static constexpr int UNITS = Config::K_BLOCK / UNIT_K;
    static constexpr int SLAB_BYTES = UNITS * UNIT_BYTES;               // of a block of K
    static constexpr int PIECES = GROUP_REGISTERS<Config::FORMAT> / 2;  // of 16 bytes, of a group of 32 of K
};

// The ring of packed blocks of K: one thread loads them, tile after tile.
template <typename Config, typename SharedStorage>
struct PackedLoads {
    using D = Decoding<Config>;

    const GemmArgs<Config>& a;
    StaticScheduler<Config> scheduler;
    u32 memory;
    int slot;
    int units;  // left of the tile; 0: the next tile is to be asked for
    int present;
    const u8* from;
    u64 keep;

    __device__ __forceinline__ PackedLoads(const GemmArgs<Config>& args, const StaticScheduler<Config>& tiles,
                                           u32 shared)
        : a(args), scheduler(tiles), memory(shared), slot(0), units(0), present(0), from(nullptr), keep(0) {}

    // Loads the next block of K into the next slot, which is free; nothing after the last one.
    __device__ __forceinline__ void load_next() {
        const int all = (a.k + UNIT_K - 1) / UNIT_K;
        if (units <= 0) {
            Tile tile;
            if (!scheduler.next(tile)) return;
            const int slabs = (a.n + UNIT_OUTPUTS - 1) / UNIT_OUTPUTS;
            const int first = tile.column / UNIT_OUTPUTS;
            keep = (tile.expert & READ_ONCE) != 0 ? KEEP_BRIEFLY : KEEP_NORMALLY;
            present = min(D::SLABS, slabs - first);
            from = a.packed + ((i64)(tile.expert & ~READ_ONCE) * slabs + first) * all * UNIT_BYTES;
            units = all;
        }
        const u32 bytes = min(D::UNITS, units) * UNIT_BYTES;
        const u32 to = memory + OFFSET(SharedStorage, packed) + slot * (int)sizeof(SharedStorage::packed[0]);
        const u32 full = memory + OFFSET(SharedStorage, packed_full) + slot * 8;
        arrive_expecting(full, present * bytes);
        for (int slab = 0; slab < present; ++slab)
            copy_bytes(to + slab * D::SLAB_BYTES, from + (i64)slab * all * UNIT_BYTES, bytes, full, keep);
        from += bytes;
        units -= D::UNITS;
        slot = slot + 1 == Config::PACKED ? 0 : slot + 1;
    }
};

// Decodes this thread's part of a block of K, of which `units` are there, from `packed` to a stage's weights.
template <typename Config>
__device__ __forceinline__ void decode_to_stage(u32 packed, u32 weights, int units) {
    using D = Decoding<Config>;
    constexpr Format FORMAT = Config::FORMAT;
    const int thread = threadIdx.x % WARPGROUP;
    const int lane = thread % 32;
    // Eight rows of 128 bytes have the swizzle's pattern: chunk c of 16 bytes of row r is where c ^ r would be.
    const u32 mine = weights + (thread / 32 * 16 + lane / 4) * ROW_BYTES + lane % 4 * 4;
    const u32 turn = lane / 4 * 16;
#pragma unroll
    for (int slab = 0; slab < D::SLABS; ++slab) {
#pragma unroll
        for (int unit = 0; unit < D::UNITS; ++unit) {
            u32 values[2 * GROUP_REGISTERS<FORMAT>];
            if (unit == 0 || unit < units) {
                const u32 from = packed + slab * D::SLAB_BYTES + unit * UNIT_BYTES;
                Unit(from).decode<FORMAT>(values);
            } else {
#pragma unroll
                for (int i = 0; i < 2 * GROUP_REGISTERS<FORMAT>; ++i) values[i] = 0;
            }
#pragma unroll
            for (int i = 0; i < 2 * GROUP_REGISTERS<FORMAT>; ++i) {
                const u32 chunk = 2 * D::PIECES * unit + i / 2;
                store_shared_word(mine + (slab * UNIT_OUTPUTS + i % 2 * 8) * ROW_BYTES + (chunk * 16 ^ turn),
                                  values[i]);
            }
        }
    }
}

// What the first warpgroup does in place of `produce`: all of it decodes; one thread also loads, packed blocks of K
// ahead, rows and scales with the block that is decoded.
template <typename Config, typename SharedStorage, typename Ring>
__device__ __forceinline__ void produce_decoded(const GemmArgs<Config>& a, Ring ring,
                                                StaticScheduler<Config> scheduler) {
    const bool loads = threadIdx.x < 32 && elect_thread();
    PackedLoads<Config, SharedStorage> packed(a, scheduler, ring.memory);
    if (loads)
        for (int i = 0; i < Config::PACKED - 1; ++i) packed.load_next();
    const int blocks = (a.k + Config::K_BLOCK - 1) / Config::K_BLOCK;
    int slot = 0;
    u32 parity = 0;
    Tile tile;
    while (scheduler.next(tile)) {
        TileLoads<Config> rows(a, tile, 0);
        int units = (a.k + UNIT_K - 1) / UNIT_K;
        for (int block = 0; block < blocks; ++block) {
            wait_for_phase(ring.empty(), ring.parity() ^ 1);
            if (loads) {
                if (block == 0) store_tile(ring.tile(), rows.tile);
                arrive_expecting(ring.full(), rows.operand_bytes + (Config::SCALED ? rows.scale_bytes : 0));
                rows.load_rows(a, ring, block, 0);
                if constexpr (Config::SCALED) rows.load_scales(ring);
                packed.load_next();
            }
            __syncwarp();
            wait_for_phase(ring.memory + OFFSET(SharedStorage, packed_full) + slot * 8, parity);
            decode_to_stage<Config>(
                ring.memory + OFFSET(SharedStorage, packed) + slot * (int)sizeof(SharedStorage::packed[0]),
                ring.weights(), units);
            publish_shared_writes();
            __syncwarp();
            if (lane_of_thread() == 0) arrive(ring.full());
            // The slot is free for the next load once all have decoded it.
            meet_at<DECODERS_MEET, WARPGROUP>();
            units -= Decoding<Config>::UNITS;
            slot = slot + 1 == Config::PACKED ? 0 : slot + 1;
            parity ^= slot == 0;
            ring.advance();
        }
    }
    // A tile without rows comes last: consumers stop there.
    wait_for_phase(ring.empty(), ring.parity() ^ 1);
    if (loads) {
        store_tile(ring.tile(), Tile{0, 0, 0, 0});
        arrive(ring.full());
        if (Config::SCALED) arrive(ring.full());
    }
    __syncwarp();
    if (lane_of_thread() == 0) arrive(ring.full());
}
