// What the host defines for every grouped GEMM, as constants. `HOST_*` macros come from `GemmConfig::source` in
// cuda/gemm/config.rs and are read here (HOST_ACTIVATION and HOST_OUTPUTS: in the kernels that have them).
//
// A kernel's `Config` derives from HostConfig and adds:
//
//   OUTPUTS               weight rows (results' columns) of a tile
//   CONSUMERS             warpgroups that multiply; one more, the first, loads
//   THREADS               (1 + CONSUMERS) * WARPGROUP
//   PRODUCER_REGISTERS    registers of a thread of the first warpgroup after setmaxnreg.dec
//   CONSUMER_REGISTERS    registers of a thread of the others after setmaxnreg.inc
//   WEIGHT_BOXES          boxes in which a stage's weights are loaded; each has one weight scale
//   GATE_AND_UP           whether the second box is n / 2 outputs from the first: gate and up of the same columns
//   CLUSTER_COLUMNS       blocks of a cluster that take neighbouring outputs of the same rows
//   CLUSTER               blocks of a cluster: CLUSTER_COLUMNS * K_SPLITS
//   ROW_TILES_PER_GROUP   see TileOrder
//   LISTED                row tiles that TileList has room for
//   SCALING_WARPS         producer warps that multiply row scales by weight scales; 0 where consumers do it
//   LOADING_THREADS       threads of a block that load stages: the producer, and where it has no time for scales, another
//   CLAIMS                whether blocks claim tiles: claims.cuh; then
//   CLAIM_FOLLOWERS       threads or warps that load something of the tiles that the producer claims
//   WEIGHT_BYTES          bytes of a block of K of a tile's weights
#pragma once
#include "gemm/products.cuh"

struct HostConfig {
    static constexpr Format FORMAT = HOST_BF16 ? Format::BF16 : Format::E4M3;  // of both operands
    static constexpr bool SCALED = FORMAT == Format::E4M3;
    static constexpr int ROW_TILE = HOST_ROW_TILE;        // most rows of a tile
    static constexpr int ROW_STEP = HOST_ROW_STEP;        // rows are loaded in multiples of it
    static constexpr int ROW_MAPS = ROW_TILE / ROW_STEP;  // tensor maps of rows: boxes of 1, 2, ... steps
    static constexpr int MULTICAST = HOST_MULTICAST;  // blocks of a cluster that share rows: each loads a part for all
    static constexpr int K_SPLITS = HOST_K_SPLITS;    // blocks of a cluster that take a part of K of one tile each
    static constexpr int STAGES = HOST_STAGES;        // blocks of K in flight
    static constexpr int K_BLOCK = FORMAT == Format::BF16 ? ROW_BYTES / 2 : ROW_BYTES;  // values of a block of K
};

// The operands of a block of K, swizzled by the tensor copy engine.
template <typename Config>
struct Stage {
    u8 weights[Config::OUTPUTS][ROW_BYTES];
    u8 rows[Config::ROW_TILE][ROW_BYTES];
};

// Fails to compile where a constant of the kernel and the host's copy of it differ, or where a rule of the hardware is
// broken.
template <typename Config, typename SharedStorage>
struct AgreesWithHost {
    static_assert(Config::THREADS == HOST_THREADS, "GemmKernel::threads in cuda/gemm/kernel.rs has another number");
    static_assert(sizeof(SharedStorage) == HOST_SHARED_BYTES, "cuda/gemm/shared_memory.rs has another sum");
    static_assert(sizeof(Stage<Config>) % 1024 == 0, "every stage starts on a pattern of the swizzle");
    static_assert(Config::ROW_TILE % Config::ROW_STEP == 0, "tiles are whole steps of rows");
    static_assert(Config::ROW_STEP / Config::MULTICAST % 8 == 0, "a multicast part is whole patterns of the swizzle");
    static_assert(Config::ROW_STEP % 16 == 0 && Config::OUTPUTS % 64 == 0, "wgmma takes 64 rows of M and 16 of N");
    static_assert(Config::CONSUMERS == 1 ||
                      Config::PRODUCER_REGISTERS + Config::CONSUMERS * Config::CONSUMER_REGISTERS <= 512,
                  "a multiprocessor has 65536 registers: 512 for each thread of a warpgroup");
    static constexpr bool value = true;
};
