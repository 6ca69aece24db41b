// The grouped GEMM on Hopper over MXFP4 weights: out[r, :] = weights[expert of r] * rows[r, :], live rows only, f32
// sums, bf16 out; rows are e4m3 with scales, or bf16.
//
// As in sm90_gemm_few_rows.cu weights are the M operand of wgmma, a tile is some outputs of up to ROW_TILE rows of one
// expert, and a warpgroup multiplies 64 outputs. Consumers decode weights into registers, from which wgmma takes its M
// operand: groups/mxfp4.cuh has their layout in memory. Decoding multiplies each value by the power of two that its
// group's scale is below the largest of the output; the consumer multiplies the sum by that largest scale at the end.
// Where the scales of a slab are too far apart for that, products are scaled by group of 32; weights that have such
// slabs are multiplied by a kernel that has both.
//
// Where a tile has few rows several blocks share a multiprocessor, or one has many warps: while one decodes, another's
// products run. All tiles add up the blocks of K in the same order, so a row has the same bits in all of them.
//
// int4 weights, whose scales are no powers of two, are all multiplied group by group: groups/int4.cuh has their units.
//
// Set by the host: see config.cuh and groups/storage.cuh.
#include "groups/multiply.cuh"
#include "groups/produce.cuh"

extern "C" __global__ void __launch_bounds__(Config::THREADS, Config::BLOCKS) gemm(const __grid_constant__ Args a) {
    extern __shared__ __align__(1024) u8 shared[];
    const u32 memory = shared_address(shared);
    // A shuffle, for the compiler to see that a warp has one: the ring is then kept in uniform registers.
    const int consumer = __shfl_sync(WARP, (int)threadIdx.x / WARPGROUP, 0) - 1;
    Ring ring(memory);
    clear_weights(memory);
    if (threadIdx.x == 0) {
        init_ring(ring);
        init_claims<Config>(memory + OFFSET(SharedStorage, claims));
        publish_barriers();
    }
    __syncthreads();
    wait_for_previous_launch();
    const u32 list = memory + OFFSET(SharedStorage, list);
    list_row_tiles(a, list);
    // With one consumer warpgroup every thread has as many registers as it may have from the start.
    constexpr bool MOVE_REGISTERS = Config::CONSUMERS > 1;
    if (consumer < 0) {
        if constexpr (MOVE_REGISTERS) give_registers<Config::PRODUCER_REGISTERS>();
        const int warp = threadIdx.x / 32;
        const u32 claims = memory + OFFSET(SharedStorage, claims);
        if (warp == (int)ProducerWarp::WEIGHTS) {
            if (elect_thread()) produce_weights(a, ring, ClaimingScheduler<Config>(a, list, claims));
        } else if (warp == (int)ProducerWarp::ROWS) {
            constexpr bool SCALES = Config::SCALED && !Config::SCALES_APART;
            if (elect_thread()) produce_rows<SCALES>(a, ring, FollowingScheduler<Config>(a, list, claims));
        } else if (Config::SCALES_APART && warp == (int)ProducerWarp::SCALES) {
            produce_scales(a, ring, FollowingScheduler<Config, true>(a, list, claims));
        }
    } else {
        if constexpr (MOVE_REGISTERS) take_registers<Config::CONSUMER_REGISTERS>();
        while (true) {
            wait_for_phase(ring.full(), ring.parity());
            Tile tile = load_tile(ring.tile());
            if (tile.rows == 0) break;
            const bool spread = HOST_SPREAD && (tile.column >> consumer & 1) != 0;
            tile.column &= ~(UNIT_OUTPUTS - 1);
            // Past the last output there is nothing to decode, and the other warpgroups issue instructions instead. A
            // vote, so that the compiler knows the ring to be the same in all of a warp.
            if (Config::BROAD && __any_sync(WARP, tile.column + consumer * UNIT_OUTPUTS >= a.n)) {
                skip_blocks(ring, blocks_of(a.k));
                continue;
            }
            multiply_tile<1>(a, tile, ring, consumer, spread);
        }
    }
}
