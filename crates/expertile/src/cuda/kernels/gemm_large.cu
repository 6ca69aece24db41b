// The grouped GEMM on Hopper for the most rows, of e4m3: out[r, :] = weights[expert of r] * rows[r, :], live rows only, f32 sums,
// bf16 out.
//
// Tokens stand on the matrix unit's M side: a tile is up to 128 rows of one expert, 64 to a warpgroup, and 256 outputs. A
// warpgroup multiplies a quarter of the outputs at a time and has two of them on their way, also across blocks of K and tiles: while
// one is made, the one before is scaled and added. A warpgroup without rows multiplies nothing.
//
// One more thread looks for the next tile while this one's is copied: whichever is next for all blocks, so that those that run
// together stay neighbours, read the same weights at the same time, and end together.
//
// With an activation, a tile's outputs are 128 of the gate and the 128 of up that belong to them: the results that share a scale.
// gate and up are rounded to bf16 on the way, as they would be had they been stored: the results are those of activation.cu.
//
// Set by whoever compiles: as gemm.cuh says; TOKENS is 128, STEP 64, SHARED and SPLITS are 1, BF16 is 0; ACTIVATION (1: and
// activation.cuh's).
constexpr int OUTPUTS = 256;
constexpr int GROUPS = 2;
constexpr int ROWS_OF_GROUP = 64;
// A row of results on their way, 128 bytes of it at a time: padded, so that eight of them start on different banks.
constexpr int STAGED_BYTES = 128;
constexpr int STAGING_ROW = STAGED_BYTES + 16;
constexpr int STAGING_BYTES = TOKENS * STAGING_ROW;
constexpr int SCALING_WARPS = 0;
// Tiles that run together then have about as many rows as outputs.
constexpr int TOGETHER = 16;
constexpr int PARTS = 2;
constexpr bool PARTS_APART = ACTIVATION;
constexpr int SIDE_BY_SIDE = 1;
#if ACTIVATION
#include "activation.cuh"
#endif
#include "gemm.cuh"
#include "staging.cuh"

static_assert(TOKENS == GROUPS * ROWS_OF_GROUP && STEP == ROWS_OF_GROUP && SHARED == 1 && SPLITS == 1 && !BF16, "there is no kernel for this");

constexpr int SUMS = OUTPUTS / 2;
constexpr int QUARTER = OUTPUTS / 4;

// Behind the barriers of the ring: the next tile, and barriers that say when it is there and when it has been taken.
constexpr int NEXT_TILE = (END_OF_BARRIERS + 15) / 16 * 16;
__device__ __forceinline__ u32 next_tile_there(u32 memory) { return memory + NEXT_TILE + 16; }
__device__ __forceinline__ u32 next_tile_taken(u32 memory) { return memory + NEXT_TILE + 24; }

// Items of work, in gemm.cuh's order. A block's first is that of its number; then, where there are more than one to each, it claims
// whichever is next.
struct Claims {
    const GemmArgs& a;
    const u32 blocks;
    Schedule schedule;
    u32 whole;  // items from here on are halves of tiles, by rows
    u32 items;
    u32 item;

    __device__ __forceinline__ Claims(const GemmArgs& args, u32 block, u32 blocks) : a(args), blocks(blocks), schedule(args), item(block) {
        // The last round, where it would leave half of the multiprocessors without work.
        const u32 last = schedule.items() % blocks;
        const u32 cut = 2 * last <= blocks ? last : 0;
        whole = schedule.items() - cut;
        items = whole + 2 * cut;
    }

    // Every item is followed by one claim, so that whoever claims last is known, and leaves the count as it was.
    __device__ __forceinline__ void advance() {
        if (items <= blocks) {
            item += blocks;
            return;
        }
        const u32 claim = atomicAdd(reinterpret_cast<u32*>(a.header + 3), 1u);
        if (claim == items - 1) a.header[3] = 0;
        item = blocks + claim;
    }

    // The item's tile; without rows for the second half of one that has no more than a half.
    __device__ __forceinline__ Tile tile() const {
        const bool is_half = item >= whole;
        Tile tile = schedule.tile(a, is_half ? whole + (item - whole) / 2 : item, 0);
        if (is_half) tile.expert &= ~READ_ONCE;
        if (is_half && (item - whole) % 2 == 0) {
            tile.rows = min(tile.rows, TOKENS / 2);
        } else if (is_half) {
            tile.first += TOKENS / 2;
            tile.rows = max(tile.rows - TOKENS / 2, 0);
        }
        return tile;
    }
};

// What the planning thread does: has a tile ready when the producer has taken the one before.
__device__ __forceinline__ void plan_tiles(Claims claims, u32 memory) {
    u32 parity = 1;
    for (; claims.item < claims.items; claims.advance()) {
        const Tile tile = claims.tile();
        if (tile.rows == 0) continue;
        wait_for_phase(next_tile_taken(memory), parity);
        store_tile(memory + NEXT_TILE, tile);
        arrive(next_tile_there(memory));
        parity ^= 1;
    }
    wait_for_phase(next_tile_taken(memory), parity);
    store_tile(memory + NEXT_TILE, Tile{0, 0, 0, 0});
    arrive(next_tile_there(memory));
}

// The planned tiles, for the producer.
struct Planned {
    u32 memory;
    u32 parity;

    // False after the last one.
    __device__ __forceinline__ bool next(Tile& tile) {
        wait_for_phase(next_tile_there(memory), parity);
        tile = load_tile(memory + NEXT_TILE);
        arrive(next_tile_taken(memory));
        parity ^= 1;
        return tile.rows > 0;
    }
};

// A quarter of a block's products, into registers of their own.
__device__ __forceinline__ void start_quarter(const Ring& ring, u32 rows, int quarter, float (&part)[QUARTER / 2]) {
    start_products<QUARTER>(part, operand(further(rows, ring.stage * STAGE_BYTES)),
                            operand(ring.weights() + quarter * QUARTER * ROW_BYTES), false);
}

// Scales as they stand in a stage: of a thread's upper and lower row, and of each half of the outputs.
struct RawScales {
    float upper;
    float lower;
    float2 of_weights;
};

__device__ __forceinline__ RawScales load_scales(const Ring& ring, int warp) {
    // The lane is asked for here: there is no register to keep the place in.
    const u32 at = ring.row_scales() + warp * 64 + (u32)read_lane() / 4 * 4;
    RawScales raw;
    raw.upper = load_shared(at);
    raw.lower = load_shared(at + 32);
    raw.of_weights = load_shared_pair(ring.weight_scale());
    return raw;
}

// What a thread's products of a block of K are multiplied by, for each half of the outputs.
struct Scales {
    float upper[PARTS];
    float lower[PARTS];

    __device__ __forceinline__ explicit Scales(const RawScales& raw) {
        upper[0] = __fmul_rn(raw.upper, raw.of_weights.x);
        lower[0] = __fmul_rn(raw.lower, raw.of_weights.x);
        upper[1] = __fmul_rn(raw.upper, raw.of_weights.y);
        lower[1] = __fmul_rn(raw.lower, raw.of_weights.y);
    }
};

// A quarter's products, which have been waited for, to their sums.
template <int INDEX>
__device__ __forceinline__ void add_quarter(float (&sum)[SUMS], float (&part)[QUARTER / 2], const Scales& scales) {
    hold(part);
#pragma unroll
    for (int i = 0; i < QUARTER / 2; ++i) {
        float& s = sum[INDEX * QUARTER / 2 + i];
        s = __fmaf_rn(part[i], i % 4 < 2 ? scales.upper[INDEX / 2] : scales.lower[INDEX / 2], s);
    }
}

// A warpgroup on its way through a tile: the products of quarters 0 and 2 and of 1 and 3, and what those of the block are to be
// multiplied by.
struct Tour {
    int warp;  // of the multiplying ones
    u32 rows;  // where those of the first stage stand
    float even[QUARTER / 2];
    float odd[QUARTER / 2];
};

// The block of K in a stage, whose first quarter has been started before; true if it is the tile's last, of which the last quarter
// is still to be added.
template <int STAGE>
__device__ __forceinline__ bool multiply_block(Ring& ring, bool is_last, Tour& t, Scales& scales, float (&sum)[SUMS]) {
    ring.stage = STAGE;
    start_quarter(ring, t.rows, 1, t.odd);
    wait_for_products<1>();
    add_quarter<0>(sum, t.even, scales);
    start_quarter(ring, t.rows, 2, t.even);
    wait_for_products<1>();
    add_quarter<1>(sum, t.odd, scales);
    start_quarter(ring, t.rows, 3, t.odd);
    const u32 empty = ring.empty();
    ring.advance();
    if (is_last) {
        wait_for_products<1>();
        add_quarter<2>(sum, t.even, scales);
        wait_for_products<0>();
        hold(t.odd);
        release_at_once(empty);
        return true;
    }
    // Asked before the sums are added, so that the answer is there after them.
    const bool ready = is_phase_over(ring.full(), ring.parity());
    wait_for_products<1>();
    add_quarter<2>(sum, t.even, scales);
    wait_unless_over(ring.full(), ring.parity(), ready);
    start_quarter(ring, t.rows, 0, t.even);
    const RawScales next = load_scales(ring, t.warp);
    wait_for_products<1>();
    release_at_once(empty);
    add_quarter<3>(sum, t.odd, scales);
    scales = Scales(next);
    return false;
}

// The blocks of K in the stages `first` to `end - 1`, as far as there are any from `STAGE` on; true after the tile's last block.
template <int STAGE>
__device__ __forceinline__ bool multiply_round(Ring& ring, int first, int end, Tour& t, Scales& scales, float (&sum)[SUMS]) {
    if (first <= STAGE && multiply_block<STAGE>(ring, end == STAGE + 1, t, scales, sum)) return true;
    if constexpr (STAGE + 1 < STAGES) {
        return multiply_round<STAGE + 1>(ring, first, end, t, scales, sum);
    } else {
        return false;
    }
}

// So that the compiler knows, and keeps it where threads have one register together.
__device__ __forceinline__ Tile same_in_all(const Tile& tile) {
    return Tile{tile.expert, __shfl_sync(WARP, tile.first, 0), __shfl_sync(WARP, tile.rows, 0), __shfl_sync(WARP, tile.column, 0)};
}

// Waits for the first block of the next tile that has rows for the warpgroup, and passes those that have none. False after the
// last one.
__device__ __forceinline__ bool wait_for_tile(Ring& ring, int group, int blocks) {
    while (true) {
        wait_for_phase(ring.full(), ring.parity());
        const int rows = load_tile(ring.tile()).rows;
        if (rows == 0) return false;
        if (rows > group * ROWS_OF_GROUP) return true;
        pass_blocks(ring, blocks);
    }
}

#if ACTIVATION
// A value as it would be read back from memory.
__device__ __forceinline__ float through_bf16(float x) { return low_half<0>(pack_bf16(x, 0.0f)); }

// One of a thread's two rows (UPPER 1 or 0), a quad's 128 results of it: activated where the gate stood, then quantized.
template <int UPPER>
__device__ __forceinline__ float activate_row(float (&sum)[SUMS], u32 staging) {
    float largest = 0.0f;
#pragma unroll
    for (int i = UPPER ? 0 : 2; i < SUMS / 2; i += i % 2 == 0 ? 1 : 3) {
        sum[i] = times_up(through_bf16(sum[SUMS / 2 + i]), gated(through_bf16(sum[i])));
        largest = fmaxf(largest, fabsf(sum[i]));
    }
    largest = fmaxf(largest, __shfl_xor_sync(WARP, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(WARP, largest, 2));
    const float scale = scale_of(largest, false);
    const Divisor<false> divisor(scale);
    const u32 lane = read_lane();
    const u32 mine = staging + ((UPPER ? 0 : 8) + lane / 4) * STAGING_ROW + lane % 4 * 2;
#pragma unroll
    for (int i = UPPER ? 0 : 2; i < SUMS / 2; i += 4)
        store_shared_half_word(mine + i / 4 * 8, (u16)e4m3_pair(divisor.quotient(sum[i]), divisor.quotient(sum[i + 1])));
    return scale;
}

__device__ __forceinline__ void store_rows(const GemmArgs& a, const Tile& tile, u32 memory, float (&sum)[SUMS]) {
    const int first = (threadIdx.x - WARPGROUP) / 32 * 16;
    const u32 staging = memory + STAGING + first * STAGING_ROW;
    const int row = first + read_lane() / 4;
    const float upper = activate_row<1>(sum, staging);
    if (read_lane() % 4 == 0) store_scale(a, tile, row, upper);
    const float lower = activate_row<0>(sum, staging);
    if (read_lane() % 4 == 0) store_scale(a, tile, row + 8, lower);
    store_staged<STAGED_BYTES>(a.out, a.n / 2, tile, first, tile.column, staging);
    __syncwarp();
}
#else
__device__ __forceinline__ void store_rows(const GemmArgs& a, const Tile& tile, u32 memory, float (&sum)[SUMS]) {
    const int first = (threadIdx.x - WARPGROUP) / 32 * 16;
    const u32 staging = memory + STAGING + first * STAGING_ROW;
    const u32 lane = read_lane();
#pragma unroll
    for (int quarter = 0; quarter < 4; ++quarter) {
        stage_rows<QUARTER / 2>(staging, lane, sum + quarter * (QUARTER / 2));
        store_staged<STAGED_BYTES>(a.out, (i64)a.n * 2, tile, first, (tile.column + quarter * QUARTER) * 2, staging);
        __syncwarp();
    }
}
#endif

// What a multiplying warpgroup does.
__device__ __forceinline__ void multiply_tiles(const GemmArgs& a, Ring& ring, int group) {
    const int blocks = Depth(a.k, 0).end;
    Tour t;
    t.warp = __shfl_sync(WARP, (int)threadIdx.x / 32, 0) - WARPGROUP / 32;
    t.rows = ring.memory + WEIGHTS_BYTES + group * (ROWS_OF_GROUP * ROW_BYTES);
    if (!wait_for_tile(ring, group, blocks)) return;
    start_quarter(ring, t.rows, 0, t.even);
    wait_for_products<0>();
    while (true) {
        const Tile tile = same_in_all(load_tile(ring.tile()));
        float sum[SUMS];
#pragma unroll
        for (int i = 0; i < SUMS; ++i) sum[i] = 0.0f;
        Scales scales(load_scales(ring, t.warp));
        // A tile starts at the stage after the last tile's.
        int first = ring.stage;
        for (int end = first + blocks; !multiply_round<0>(ring, first, end, t, scales, sum); end -= STAGES) first = 0;
        const bool more = wait_for_tile(ring, group, blocks);
        if (!more) {
            add_quarter<3>(sum, t.odd, scales);
            store_rows(a, tile, ring.memory, sum);
            break;
        }
        // The next tile's first quarter is made while this one's results are stored.
        start_quarter(ring, t.rows, 0, t.even);
        add_quarter<3>(sum, t.odd, scales);
        store_rows(a, tile, ring.memory, sum);
        wait_for_products<0>();
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) gemm(const __grid_constant__ GemmArgs a) {
    extern __shared__ __align__(1024) u8 shared[];
    // From one lane, so that the compiler knows them to be the same in all.
    const u32 memory = __shfl_sync(WARP, shared_address(shared), 0);
    const int group = __shfl_sync(WARP, (int)threadIdx.x / WARPGROUP, 0) - 1;
    Ring ring(memory);
    if (threadIdx.x == 0) {
        init_barrier(next_tile_there(memory), 1);
        init_barrier(next_tile_taken(memory), 1);
    }
    set_up(a, memory);
    wait_for_previous_launch();
    let_next_launch_start();
    if (group < 0) {
        give_registers<40>();
        if (threadIdx.x == 0) produce(a, ring, Planned{memory, 0}, 0);
        if (threadIdx.x == 32) plan_tiles(Claims(a, blockIdx.x, gridDim.x), memory);
    } else {
        take_registers<232>();
        multiply_tiles(a, ring, group);
    }
}
