// The whole layer on Hopper for few tokens, in one launch.
//
// Where tokens are few a layer is bound by reading weights, and what a chain of launches adds is that each begins with
// an empty pipeline. Here one persistent block to a multiprocessor reads weights from the first expert's gate to the
// last one's w2 without a pause. Tiles of the first GEMM are shared out among the blocks; of the second GEMM a block has
// some outputs of all experts, so that it can add up the tokens' sums itself. A block claims its next work when it
// begins to load the last: a block that is behind takes less, and what it waits for is always in the hands of a block
// that runs.
//
//   all warps      find out which experts have tokens; most quantize all tokens into shared memory
//   loading warp   claims work, loads weights: STAGES blocks of K ahead, across tiles and GEMMs
//   scales warp    loads the tiles' weight scales
//   watching warp  waits until the `gate | up` of a tile's experts is complete
//   consumers      two warpgroups that take turns; the first GEMM's results go to memory as `gate | up`, the second's
//                  stay in shared memory until they are added up
//   activating     activate and quantize the experts' rows into shared memory, a block of K after the other
//   warps
//
// The bits are those of the layer in several launches. docs/kernels/few_tokens.md has the maps of warps and barriers.
#include "few_tokens/consume.cuh"
#include "few_tokens/rows.cuh"

// Initialises the barriers; every thread of the block calls, and they meet.
__device__ __forceinline__ void set_up(const FewTokensArgs& a, SharedStorage& s, u32 memory) {
    constexpr int CONSUMER = WARPGROUP / 32;
    static_assert(STAGES <= 32 && ACTIVATED_STAGES <= 32 && TILE_SLOTS <= 32, "a lane to each");
    const int lane = lane_of_thread();
    switch (threadIdx.x / 32) {
        case 0:
            if (lane < STAGES) {
                init_barrier(ELEMENT(memory, full, lane), 1);
                init_barrier(ELEMENT(memory, empty, lane), CONSUMER);
            }
            publish_barriers();
            break;
        case 1:
            if (lane < ACTIVATED_STAGES) {
                init_barrier(ELEMENT(memory, activated_full, lane), 1);
                init_barrier(ELEMENT(memory, activated_empty, lane), CONSUMER);
            }
            publish_barriers();
            break;
        case 2:
            if (lane < TILE_SLOTS) {
                init_barrier(ELEMENT(memory, tile_full, lane), 1);
                init_barrier(ELEMENT(memory, tile_empty, lane),
                             CONSUMER_WARPS + ACTIVATING_WARPS + 1 + (SCALED ? 1 : 0));
                init_barrier(ELEMENT(memory, scales_full, lane), 32);
                init_barrier(ELEMENT(memory, first_done, lane), 1);
            }
            if (lane < CONSUMERS) init_barrier(ELEMENT(memory, multiplied, lane), CONSUMER);
            if (lane == 0) init_barrier(memory + OFFSET(SharedStorage, rows_full), QUANTIZING_WARPS);
            publish_barriers();
            break;
        case 3:
            if (lane == 0) prefetch_map(a.w13);
            if (lane == 1) prefetch_map(a.w2);
            break;
        default:
            clear_slots(s, threadIdx.x - FIRST_CONSUMER_WARP * 32, THREADS - FIRST_CONSUMER_WARP * 32);
    }
    __syncthreads();
}

// What the loading thread does.
struct Loader {
    const FewTokensArgs& a;
    const SharedStorage& s;
    const u32 memory;
    Position<STAGES> stage;
    Position<TILE_SLOTS> tile;

    __device__ __forceinline__ Loader(const FewTokensArgs& args, const SharedStorage& storage, u32 shared)
        : a(args), s(storage), memory(shared) {}

    __device__ __forceinline__ void post(Work work, int live, int output, u32 epoch) {
        wait_for_phase(ELEMENT(memory, tile_empty, tile.place), tile.parity ^ 1);
        store_shared_words(ELEMENT(memory, tiles, tile.place), make_uint4((u32)work, live, output, epoch));
        arrive(ELEMENT(memory, tile_full, tile.place));
        tile.advance();
    }

    // Loads a tile's weights: of `experts` experts from the `live`-th on.
    template <bool SECOND>
    __device__ __forceinline__ void load(int live, int experts, int output) {
        constexpr int BYTES = Half<SECOND>::ROWS * ROW_BYTES;
#pragma unroll 1
        for (int block = 0; block < Half<SECOND>::BLOCKS; ++block) {
            const u32 full = ELEMENT(memory, full, stage.place);
            wait_for_phase(ELEMENT(memory, empty, stage.place), stage.parity ^ 1);
            arrive_expecting(full, experts * BYTES);
#pragma unroll
            for (int i = 0; i < Half<SECOND>::GROUP; ++i)
                if (i < experts)
                    copy_box(ELEMENT(memory, weights, stage.place) + i * BYTES, SECOND ? a.w2 : a.w13, block * K_BLOCK,
                             output, s.live_experts[live + i], full, KEEP_BRIEFLY);
            stage.advance();
        }
    }

    // Readies the counters for the next launch. All claims have been made, so no block looks at `claims` again, and the
    // other epoch's counters are of the launch before this one.
    __device__ __forceinline__ void begin_next_epoch(u32 epoch) {
        for (int i = 0; i < SLOTS; ++i) a.counters->multiplied[epoch ^ 1][i] = 0;
        a.counters->claims = epoch != 0 ? 0 : EPOCH_BIT;
    }

    // Claims tiles of the first GEMM, then outputs of the second, and loads their weights.
    __device__ __forceinline__ void run(u32 claim) {
        const int live = s.live;
        const int first_tiles = live * First::TILES;
        const int all = first_tiles + Second::TILES;
        const u32 epoch = claim / EPOCH_BIT;
        int number = claim % EPOCH_BIT;
        while (number < all) {
            u32 next;
            if (number < first_tiles) {
                // Under way while this is loaded.
                next = draw(&a.counters->claims);
                const int output = number % First::TILES * First::ROWS;
                post(Work::FIRST, number / First::TILES, output, epoch);
                load<false>(number / First::TILES, 1, output);
            } else {
                const int output = (number - first_tiles) * Second::ROWS;
                for (int group = 0; group < live; group += Second::GROUP) {
                    post(Work::SECOND, group, output, epoch);
                    load<true>(group, min(Second::GROUP, live - group), output);
                }
                post(Work::REDUCE, 0, output, epoch);
                // Not earlier: there are about as many of these as blocks, and each takes long.
                next = draw(&a.counters->claims);
            }
            number = next % EPOCH_BIT;
        }
        post(Work::END, 0, 0, epoch);
        if (number == all + (int)gridDim.x - 1) begin_next_epoch(epoch);
    }
};

// Loads the scales of an expert's rows of a tile: those of the block of scales of the first row, and of the next block.
// All lanes of the warp share them.
template <bool SECOND>
__device__ __forceinline__ void copy_scales(const float* scales, i64 expert, int output, u32 to) {
    using H = Half<SECOND>;
    const int row = output / SCALE_BLOCK;
    const float* upper = scales + (expert * H::SCALE_ROWS + row) * H::SCALE_COLUMNS;
    const float* lower = row + 1 < H::SCALE_ROWS ? upper + H::SCALE_COLUMNS : upper;
    for (int block = lane_of_thread(); block < H::SCALE_COLUMNS; block += 32) {
        copy_word(to + block * 4, upper + block);
        copy_word(to + (H::SCALE_COLUMNS + block) * 4, lower + block);
    }
}

// The warp that loads the scales of the tiles' weights.
__device__ __forceinline__ void load_scales(const FewTokensArgs& a, const SharedStorage& s, u32 memory) {
    TileReader reader(memory);
    while (true) {
        const LayerTile tile = reader.wait();
        if (tile.work == Work::END) break;
        const u32 to = ELEMENT(memory, weight_scales, reader.at.place);
        if (tile.work == Work::FIRST) {
            copy_scales<false>(a.w13_scales, s.live_experts[tile.live], tile.output, to);
        } else if (tile.work == Work::SECOND) {
            for (int i = 0; i < Second::GROUP && tile.live + i < s.live; ++i)
                copy_scales<true>(a.w2_scales, s.live_experts[tile.live + i], tile.output,
                                  to + i * 2 * Second::SCALE_COLUMNS * 4);
        }
        arrive_after_copies(ELEMENT(memory, scales_full, reader.at.place));
        reader.release();
    }
}

// The warp that waits until all tiles of the first GEMM of a group's experts are in memory. One for all that activate: if
// each looked for itself, so many loads of the same line would hold up the weights that pass through its part of the L2.
__device__ __forceinline__ void watch(const FewTokensArgs& a, const SharedStorage& s, u32 memory) {
    TileReader reader(memory);
    while (true) {
        const LayerTile tile = reader.wait();
        if (tile.work == Work::END) break;
        const int live = tile.live + lane_of_thread();
        if (tile.work == Work::SECOND && lane_of_thread() < Second::GROUP && live < s.live) {
            while (load_now(&a.counters->multiplied[tile.epoch][live]) < (u32)First::TILES) {
            }
            __threadfence();
        }
        __syncwarp();
        arrive_if(ELEMENT(memory, first_done, reader.at.place), lane_of_thread() == 0);
        reader.release();
    }
}

// A warp that activates: each ACTIVATING_WARPS-th unit, counted through all tiles of the second GEMM. Its places in the
// ring are then at most one round apart, so that it meets every phase of their barriers.
static_assert(ACTIVATING_WARPS * BLOCKS_OF_UNIT <= ACTIVATED_STAGES, "a warp would miss a phase");
__device__ __forceinline__ void activate(const FewTokensArgs& a, const SharedStorage& s, u32 memory, int warp) {
    TileReader reader(memory);
    Position<ACTIVATED_STAGES> start;  // of the tile
    int first_unit = warp;             // this warp's
    while (true) {
        const LayerTile tile = reader.wait();
        if (tile.work == Work::END) break;
        if (tile.work != Work::SECOND) {
            reader.release();
            continue;
        }
        const Sources sources(s, tile.live);
        if (first_unit < UNITS) wait_for_phase(ELEMENT(memory, first_done, reader.at.place), reader.at.parity);
        reader.release();
#pragma unroll 1
        for (; first_unit < UNITS; first_unit += ACTIVATING_WARPS) {
            const int unit = first_unit;
            const int block = unit * BLOCKS_OF_UNIT;
            const int blocks = min(BLOCKS_OF_UNIT, Second::BLOCKS - block);
            const int further = start.place + block;
            const auto place = [&](int i) { return (further + i) % ACTIVATED_STAGES; };
            activate_columns(memory, a.gate_up, sources, unit, place(0), blocks, [&] {
#pragma unroll
                for (int i = 0; i < BLOCKS_OF_UNIT; ++i)
                    if (i < blocks)
                        wait_for_phase(ELEMENT(memory, activated_empty, place(i)),
                                       (start.parity ^ (further + i) / ACTIVATED_STAGES ^ 1) & 1);
            });
            publish_shared_writes();
            __syncwarp();
#pragma unroll
            for (int i = 0; i < BLOCKS_OF_UNIT; ++i)
                if (i < blocks) arrive_if(ELEMENT(memory, activated_full, place(i)), lane_of_thread() == 0);
        }
        first_unit -= UNITS;
        start.skip<Second::BLOCKS>();
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    few_tokens(const __grid_constant__ RouteArgs r, const __grid_constant__ FewTokensArgs a) {
    extern __shared__ __align__(1024) u8 shared[];
    SharedStorage& s = *reinterpret_cast<SharedStorage*>(shared);
    const u32 memory = shared_address(shared);
    const int warp = threadIdx.x / 32;
    set_up(a, s, memory);
    wait_for_previous_launch();
    let_next_launch_start();
    // The first claim, under way while experts are looked for.
    u32 claim = 0;
    if (threadIdx.x == 0) claim = draw(&a.counters->claims);
    find_live_experts(r, a.router_weights, a.weights_row_stride, s);
    if (warp == LOADING_WARP) {
        claim = __shfl_sync(WARP, claim, 0);
        if (elect_thread()) Loader(a, s, memory).run(claim);
    } else if (warp == SCALES_WARP) {
        if (SCALED) load_scales(a, s, memory);
    } else if (warp == WATCHING_WARP) {
        watch(a, s, memory);
    } else if (warp >= FIRST_CONSUMER_WARP) {
        quantize_tokens(a.x, a.x_row_stride, r.tokens, memory, s, warp - FIRST_CONSUMER_WARP);
        if (warp < FIRST_ACTIVATING_WARP)
            consume(a, s, memory, r.tokens, (warp - FIRST_CONSUMER_WARP) / (WARPGROUP / 32));
        else
            activate(a, s, memory, warp - FIRST_ACTIVATING_WARP);
    }
}
