// The grouped GEMM on Hopper for few rows: out[r, :] = weights[expert of r] * rows[r, :], live rows only, f32 sums,
// bf16 out.
//
// Weights are the M operand of wgmma and tokens its N operand, which takes any multiple of 8: a tile is 128 outputs of
// up to ROW_TILE rows of one expert, and an expert's last tile costs what its rows cost, rounded up to ROW_STEP. Tiles
// come from the worklist that the plan left on the device, so padding is never multiplied or stored.
//
// A block is persistent: one thread loads up to STAGES blocks of K ahead, and two warpgroups multiply, 64 outputs each.
// Where a tile has 64 outputs there is one such warpgroup: few tiles then keep more multiprocessors reading. With e4m3
// the products of each 128 of K are scaled and added outside the matrix unit, which keeps fewer bits.
//
// A cluster of MULTICAST blocks takes neighbouring outputs of the same rows; each block loads a part of the rows for
// all. A cluster of K_SPLITS blocks takes parts of K of the same tile and adds them up in the order of the parts, for
// when tiles are few.
//
// docs/kernels/gemm.md has the maps of threads, shared memory and barriers. Set by the host: see config.cuh; one of
// HOST_MULTICAST and HOST_K_SPLITS is 1; HOST_OUTPUTS is 128, or 64 where both are 1.
#include "few_rows/multiply.cuh"

extern "C" __global__ void __cluster_dims__(Config::CLUSTER, 1, 1) __launch_bounds__(Config::THREADS, 1)
    gemm(const __grid_constant__ Args a) {
    extern __shared__ __align__(1024) u8 shared[];
    const u32 memory = shared_address(shared);
    const int rank = Config::CLUSTER > 1 ? (int)rank_in_cluster() : 0;
    const int cluster = blockIdx.x / Config::CLUSTER;
    const int clusters = gridDim.x / Config::CLUSTER;
    // A shuffle, for the compiler to see that a warp has one: the ring is then kept in uniform registers.
    const int consumer = __shfl_sync(WARP, (int)threadIdx.x / WARPGROUP, 0) - 1;
    Ring ring(memory);
    set_up<Config, SharedStorage>(a, memory);
    wait_for_previous_launch();
    const u32 list = memory + OFFSET(SharedStorage, list);
    list_row_tiles(a, list);
    // With one consumer warpgroup every thread has as many registers as it may have from the start.
    constexpr bool MOVE_REGISTERS = Config::CONSUMERS > 1;
    if (consumer < 0) {
        if constexpr (MOVE_REGISTERS) give_registers<Config::PRODUCER_REGISTERS>();
        const int warp = threadIdx.x / 32;
        const u32 claims = memory + OFFSET(SharedStorage, claims);
        if (warp == (int)ProducerWarp::LOAD) {
            constexpr bool SCALES = Config::SCALED && !Config::SCALES_APART;
            if (elect_thread()) {
                if constexpr (Config::CLAIMS)
                    produce<SCALES>(a, ring, ClaimingScheduler<Config>(a, list, claims), rank);
                else
                    produce<SCALES>(a, ring, StaticScheduler<Config>(a, list, cluster, clusters, rank), rank);
            }
        } else if (Config::SCALES_APART && warp == (int)ProducerWarp::LOAD_SCALES) {
            if (elect_thread()) {
                if constexpr (Config::CLAIMS)
                    produce_scales(a, ring, FollowingScheduler<Config>(a, list, claims), rank);
                else
                    produce_scales(a, ring, StaticScheduler<Config>(a, list, cluster, clusters, rank), rank);
            }
        } else if (warp >= (int)ProducerWarp::FIRST_SCALE) {
            const int blocks = KRange<Config>(a.k, rank).blocks();
            if constexpr (Config::SCALING_WARPS > 0)
                multiply_scales(ring, threadIdx.x - (int)ProducerWarp::FIRST_SCALE * 32,
                                [&](const Ring&) { return blocks; });
        }
    } else {
        if constexpr (MOVE_REGISTERS) take_registers<Config::CONSUMER_REGISTERS>();
        const int blocks = KRange<Config>(a.k, rank).blocks();
        u32 parity = 0;
        while (true) {
            wait_for_phase(ring.full(), ring.parity());
            const Tile tile = load_tile(ring.tile());
            if (tile.rows == 0) break;
            multiply_tile<1>(a, tile, ring, blocks, consumer, rank, parity);
            parity ^= 1;
        }
    }
    // Blocks of a cluster write to each other's memory: none may end before the others are done.
    if constexpr (Config::CLUSTER > 1) meet_cluster();
}
