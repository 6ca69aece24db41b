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
#include "groups/multiply_folded.cuh"
#include "groups/multiply_int4.cuh"
#include "groups/multiply_spread.cuh"
#include "groups/produce.cuh"

// The exponents of the largest scales of this thread's outputs.
__device__ __forceinline__ int largest_scale(const Args& a, const Tile& tile, int consumer, int half) {
    const int outputs = (a.n + UNIT_OUTPUTS - 1) / UNIT_OUTPUTS * UNIT_OUTPUTS;
    const int output = min(tile.column + consumer * UNIT_OUTPUTS + output_of_thread() + 8 * half, outputs - 1);
    // Volatile: loaded here, long before it is needed.
    return *static_cast<const volatile u8*>(a.exponents + (i64)tile.expert * outputs + output);
}

// A tile of up to N rows. SPREAD: this warpgroup's scales are too far apart.
template <int N, bool SPREAD>
__device__ __forceinline__ void finish_tile(const Args& a, const Tile& tile, Ring& ring, int consumer) {
    float sum[N / 2];
#pragma unroll
    for (int i = 0; i < N / 2; ++i) sum[i] = 0.0f;
    if constexpr (HOST_INT4) {
        if constexpr (DECODES_AHEAD<N>)
            multiply_int4_ahead<N>(ring, a.k, consumer, a.f16_scales != 0, sum);
        else
            multiply_int4<N>(ring, a.k, consumer, a.f16_scales != 0, sum);
    } else {
        int exponents[2] = {largest_scale(a, tile, consumer, 0), largest_scale(a, tile, consumer, 1)};
        if constexpr (SPREAD) {
            multiply_spread<N>(ring, a.k, consumer, exponents, sum);
        } else {
            multiply<N>(ring, a.k, consumer, sum);
            exponents[0] = exponent_of_sum<FORMAT>(exponents[0]);
            exponents[1] = exponent_of_sum<FORMAT>(exponents[1]);
            multiply_by_powers<N>(exponents, sum);
        }
    }
    if (a.bias != nullptr) add_bias<N>(OutputPair(a.bias + (i64)tile.expert * a.n, a, tile, consumer), sum);
    store_rows<Config, SharedStorage, N>(a, tile, ring.memory, consumer, sum);
}

// Takes the code for the fewest steps that the tile's rows fit: N of wgmma is a constant of the instruction. Where
// scales are spread, that for the most: sums of rows that are not there are not stored.
template <int STEPS>
__device__ __forceinline__ void multiply_tile(const Args& a, const Tile& tile, Ring& ring, int consumer, bool spread) {
    if constexpr (HOST_SPREAD && STEPS == 1) {
        if (spread) {
            finish_tile<Config::ROW_TILE, true>(a, tile, ring, consumer);
            return;
        }
    }
    if (STEPS == Config::ROW_MAPS || tile.rows <= STEPS * Config::ROW_STEP)
        finish_tile<STEPS * Config::ROW_STEP, false>(a, tile, ring, consumer);
    else if constexpr (STEPS < Config::ROW_MAPS)
        multiply_tile<STEPS + 1>(a, tile, ring, consumer, spread);
}

extern "C" __global__ void __launch_bounds__(Config::THREADS, Config::BLOCKS) gemm(const __grid_constant__ Args a) {
    extern __shared__ __align__(1024) u8 shared[];
    const u32 memory = shared_address(shared);
    // A shuffle, for the compiler to see that a warp has one: the ring is then kept in uniform registers.
    const int consumer = __shfl_sync(WARP, (int)threadIdx.x / WARPGROUP, 0) - 1;
    Ring ring(memory);
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < Config::STAGES; ++stage) {
            init_barrier(memory + OFFSET(SharedStorage, full) + stage * 8, FULL_ARRIVALS);
            init_barrier(memory + OFFSET(SharedStorage, empty) + stage * 8, Config::CONSUMERS * (WARPGROUP / 32));
        }
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
