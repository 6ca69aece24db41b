// Rows quantized and brought to their places: read once, scaled once, written once per live slot.
//
//   permute_rows            any number of tokens, after route_plan
//   route_quantize_permute  up to 4096 slots, routing and plan included, in one launch: every block works the routing out
//                           for itself, which at this size takes less time than telling the others would
//
// Set by whoever compiles: HIDDEN (= WIDTH), TOPK, IDS_I64, INPUT (0 bf16, 1 f16), GROUP, SCALE_LAYOUT (0 row-major,
// 1 MN-major, 2 packed UE8M0), POWER_OF_TWO, WEIGHTED, ZERO_ROWS, ALIGNED (x and its rows stand on 16 bytes).
#include "hopper.cuh"
#include "route.cuh"
#include "rows.cuh"
#include "scales.cuh"

constexpr int SLABS = (HIDDEN + SLAB - 1) / SLAB;

struct Slab {
    u32 pairs[PER_LANE / 2];
};

__device__ __forceinline__ Slab load_slab(const RowsArgs& a, int token, int slab) {
    Slab s;
    const int column = slab * SLAB + lane_of_thread() * PER_LANE;
    const u16* row = static_cast<const u16*>(a.x) + token * a.x_row_stride + column;
    if (column >= HIDDEN) {
#pragma unroll
        for (int i = 0; i < PER_LANE / 2; ++i) s.pairs[i] = 0;
        return s;
    }
#if ALIGNED
    const uint4 low = load_once(row);
    const uint4 high = load_once(row + 8);
    s.pairs[0] = low.x, s.pairs[1] = low.y, s.pairs[2] = low.z, s.pairs[3] = low.w;
    s.pairs[4] = high.x, s.pairs[5] = high.y, s.pairs[6] = high.z, s.pairs[7] = high.w;
#else
#pragma unroll
    for (int i = 0; i < PER_LANE / 2; ++i) s.pairs[i] = row[2 * i] | (u32)row[2 * i + 1] << 16;
#endif
    return s;
}

// The router weight times the row, rounded to the row's own type.
__device__ __forceinline__ void apply_weight(const RowsArgs& a, int token, Slab& s) {
#if WEIGHTED
    const float weight = a.weights[token * a.weights_row_stride];
#pragma unroll
    for (int i = 0; i < PER_LANE / 2; ++i)
        s.pairs[i] = pack_halves<INPUT>(__fmul_rn(weight, low_half<INPUT>(s.pairs[i])),
                                        __fmul_rn(weight, high_half<INPUT>(s.pairs[i])));
#endif
}

// A row is cut into units of at most 2 slabs, whose loads are all in flight at once.
constexpr int UNITS = (SLABS + 1) / 2;
constexpr int SLABS_PER_UNIT = (SLABS + UNITS - 1) / UNITS;
constexpr int MANY_THREADS = 256;
constexpr int MANY_WARPS = MANY_THREADS / 32;
constexpr int TOKEN_SCALES_STRIDE = (WORDS_PER_ROW + 3) & ~3;

// Copies `bytes` (a multiple of 16) from a warp's part of shared memory to every row that the lanes below TOPK hold: by the
// bulk copy engine, one instruction to a copy, where there is one.
__device__ __forceinline__ void store_copies_of_unit(const RowsArgs& a, const u8* part, int at, int bytes, int rows) {
    const int lane = lane_of_thread();
#if __CUDA_ARCH__ >= 900
    publish_shared_writes();
    __syncwarp();
    if (lane < TOPK && rows >= 0) store_bytes(a.out + (i64)rows * HIDDEN + at, shared_address(part), bytes);
    commit_stores();
#else
    __syncwarp();
    for (int copy = 0; copy < TOPK; ++copy) {
        const int row = __shfl_sync(WARP, rows, copy);
        if (row < 0) continue;
        for (int byte = lane * 16; byte < bytes; byte += 512)
            *reinterpret_cast<uint4*>(a.out + (i64)row * HIDDEN + at + byte) = *reinterpret_cast<const uint4*>(part + byte);
    }
#endif
}

// Waits until the warp's part of shared memory may be written again.
__device__ __forceinline__ void wait_for_copies() {
#if __CUDA_ARCH__ >= 900
    wait_for_stores_to_read();
#endif
    __syncwarp();
}

// A share of the units, that of block number `share`: rows quantized and sent to their places, scales kept by token.
__device__ __forceinline__ void permute_share(const RowsArgs& a, u8* part, int share) {
    const int lane = lane_of_thread();
    // Neighbouring units go to different multiprocessors at about the same time: rows that are neighbours in the output are
    // then written together.
    const int warp = (threadIdx.x >> 5) * gridDim.x + share;
    const int warps = gridDim.x * MANY_WARPS;
    const int units = a.tokens * UNITS;
    const int* slots = a.inv_perm + lane;
    int rows = warp < units && lane < TOPK ? slots[(i64)(warp / UNITS) * TOPK] : -1;
    for (int unit = warp; unit < units; unit += warps) {
        const int mine = rows;
        const int next = unit + warps;
        rows = next < units && lane < TOPK ? slots[(i64)(next / UNITS) * TOPK] : -1;
        if (!__any_sync(WARP, mine >= 0)) continue;
        const int token = unit / UNITS;
        const int first = unit % UNITS * SLABS_PER_UNIT;
        Slab s[SLABS_PER_UNIT];
#pragma unroll
        for (int i = 0; i < SLABS_PER_UNIT; ++i) s[i] = load_slab(a, token, first + i);
        wait_for_copies();
#pragma unroll
        for (int i = 0; i < SLABS_PER_UNIT; ++i) {
            if (first + i >= SLABS) break;
            apply_weight(a, token, s[i]);
            const bool active = (first + i) * SLAB + lane * PER_LANE < HIDDEN;
            float scale;
            const uint4 bytes = quantize_slab<INPUT, GROUP, POWER_OF_TWO != 0>(s[i].pairs, scale);
            *reinterpret_cast<uint4*>(part + i * SLAB + lane * PER_LANE) = bytes;
            const u32 word = word_of_scale(active ? scale : 0.0f);
            const int column = (first + i) * WORDS_PER_SLAB + lane / LANES_PER_WORD;
            if (lane % LANES_PER_WORD == 0 && column < WORDS_PER_ROW)
                a.token_scales[(i64)token * TOKEN_SCALES_STRIDE + column] = word;
        }
        store_copies_of_unit(a, part, first * SLAB, min(SLABS_PER_UNIT * SLAB, HIDDEN - first * SLAB), mine);
    }
}

// Rows first; then the scales, once every block's rows are done. Shares are claimed, not given: what a block waits for at the
// end is always in the hands of one that runs, even if this launch has to share the device with one that waits likewise.
extern "C" __global__ void __launch_bounds__(MANY_THREADS, 4) permute_rows(const __grid_constant__ RowsArgs a) {
    __shared__ alignas(128) u8 parts[MANY_WARPS][SLABS_PER_UNIT * SLAB];
    __shared__ u32 share;
    wait_for_previous_launch();
    let_next_launch_start();
    if (threadIdx.x == 0) share = atomicAdd(&a.queue->claimed, 1u);
    __syncthreads();
    while (share < gridDim.x) {
        permute_share(a, parts[threadIdx.x >> 5], (int)share);
        __syncthreads();
        if (threadIdx.x == 0) {
            __threadfence();
            atomicAdd(&a.queue->done, 1u);
            share = atomicAdd(&a.queue->claimed, 1u);
        }
        __syncthreads();
    }
    const int warp = (threadIdx.x >> 5) * gridDim.x + blockIdx.x;
    const int warps = gridDim.x * MANY_WARPS;
    const auto token_of = [&](int row) { return row < a.m_sum ? a.row_tokens[row] : -1; };
    // Some multiprocessors are slower at memory than others: those that are done zero what is all padding meanwhile.
    zero_padding_groups(a.scales, a.m_sum, warp, warps, token_of);
    if (ZERO_ROWS) zero_padding_rows<uint4>(a.out, HIDDEN, a.m_sum, warp, warps, [&](int row) { return a.row_tokens[row] >= 0; });
    if (threadIdx.x == 0) {
        while (load_now(&a.queue->done) < gridDim.x) {
        }
        __threadfence();
        // The last to get here leaves the queue as it found it.
        if (atomicAdd(&a.queue->left, 1u) == gridDim.x - 1) a.queue->claimed = a.queue->done = a.queue->left = 0;
    }
    __syncthreads();
    spread_scales(a.scales, a.m_sum, warp, warps, token_of, [&](int token, int quad) {
        return __ldcg(reinterpret_cast<const uint4*>(a.token_scales + (i64)token * TOKEN_SCALES_STRIDE) + quad);
    });
    wait_for_copies();
}

constexpr int FEW_THREADS = 1024;
constexpr int FEW_WARPS = FEW_THREADS / 32;
constexpr int MAX_SLOTS = 4096;
constexpr int MAX_ROUNDS = MAX_SLOTS / FEW_THREADS;

extern "C" __global__ void __launch_bounds__(FEW_THREADS, 1)
    route_quantize_permute(const __grid_constant__ RouteArgs r, const __grid_constant__ RowsArgs a) {
    __shared__ Experts s;
    __shared__ u32 expert_and_rank[MAX_SLOTS];  // 0xffff for no expert, below the rank among the warp's slots
    extern __shared__ u16 seen[];               // [warps that have slots, experts]
    const int warp = threadIdx.x >> 5;
    const int lane = lane_of_thread();
    // Rows are taken by warps from the first on, routing and plan by warps from the last on: where there are few of either,
    // they go on side by side.
    const int planner = FEW_WARPS - 1 - warp;
    const int planner_thread = planner * 32 + lane;
    const int slots = r.tokens * TOPK;
    const int rounds = (slots + FEW_THREADS - 1) / FEW_THREADS;
    const int per_warp = max(rounds * 32, 1);
    const int ranking_warps = (slots + per_warp - 1) / per_warp;
    for (int i = threadIdx.x; i < ranking_warps * r.experts; i += FEW_THREADS) seen[i] = 0;
    if (threadIdx.x == 0) s.live = 0;
    wait_for_previous_launch();
    let_next_launch_start();

    // The warp's first unit: its row is on its way while the routing is worked out.
    const int unit_stride = gridDim.x * FEW_WARPS;
    const int grid_warp = warp * gridDim.x + blockIdx.x;
    const int units = r.tokens * SLABS;
    const int unit_expert = grid_warp < units && lane < TOPK ? local_expert(r, grid_warp / SLABS * TOPK + lane, nullptr) : -1;
    int expert[MAX_ROUNDS];
    const int first = planner * per_warp + lane;
#pragma unroll
    for (int i = 0; i < MAX_ROUNDS; ++i) {
        if (i >= rounds) break;
        const int slot = first + i * 32;
        expert[i] = slot < slots ? local_expert(r, slot, blockIdx.x == 0 ? r.status : nullptr) : -1;
    }
    const bool have_unit = __any_sync(WARP, unit_expert >= 0);
    Slab slab;
    if (have_unit) slab = load_slab(a, grid_warp / SLABS, grid_warp % SLABS);
    __syncthreads();
    if (planner < ranking_warps) {
#pragma unroll
        for (int i = 0; i < MAX_ROUNDS; ++i) {
            if (i >= rounds) break;
            const int rank = rank_in_warp(expert[i], r.experts, seen + planner * r.experts);
            if (first + i * 32 < slots) expert_and_rank[first + i * 32] = (u32)expert[i] << 16 | rank;
        }
    }
    __syncthreads();
    for (int e = planner_thread; e < r.experts; e += FEW_THREADS) {
        int sum = 0;
#pragma unroll 4
        for (int w = 0; w < ranking_warps; ++w) {
            const int count = seen[w * r.experts + e];
            seen[w * r.experts + e] = (u16)sum;
            sum += count;
        }
        s.total[e] = sum;
    }
    uint4 bytes;
    float scale;
    if (have_unit) {
        apply_weight(a, grid_warp / SLABS, slab);
        bytes = quantize_slab<INPUT, GROUP, POWER_OF_TWO != 0>(slab.pairs, scale);
    }
    // Each thread reads the totals that it has written: no barrier before the one inside.
    plan_experts<FEW_THREADS, u32>(s, planner_thread, r.experts, r.alignment, r.row_tile);
    const auto row_of_slot = [&](int slot) {
        const u32 packed = expert_and_rank[slot];
        const u32 e = packed >> 16;
        if (e == 0xffffu) return -1;
        const int row = s.start[e] + seen[slot / per_warp * r.experts + e] + (int)(packed & 0xffffu);
        return row < r.m_sum ? row : -1;
    };

    for (int unit = grid_warp; unit < units; unit += unit_stride) {
        const int token = unit / SLABS;
        const int index = unit % SLABS;
        const int rows = lane < TOPK ? row_of_slot(token * TOPK + lane) : -1;
        if (!__any_sync(WARP, rows >= 0)) continue;
        if (unit != grid_warp) {
            slab = load_slab(a, token, index);
            apply_weight(a, token, slab);
            bytes = quantize_slab<INPUT, GROUP, POWER_OF_TWO != 0>(slab.pairs, scale);
        }
        const int column = index * SLAB + lane * PER_LANE;
        store_copies<uint4>(a.out, bytes, HIDDEN, column, column < HIDDEN, rows);
        store_slab_scales<TOPK>(a.scales, column < HIDDEN ? scale : 0.0f, index, rows, a.m_sum);
    }
    // What is left is shared out by kind, so that no warp goes through all of it.
    constexpr int LISTING_WARPS = FEW_WARPS / 4;
    if (planner < LISTING_WARPS / 2) {
        const int thread = (planner * gridDim.x + blockIdx.x) * 32 + lane;
        const int threads = LISTING_WARPS / 2 * 32 * gridDim.x;
        for (int slot = thread; slot < slots; slot += threads) write_slot(r, slot, row_of_slot(slot));
        write_experts(r, s, thread, threads);
        write_worklist(r, s, thread, threads);
    } else if (planner < LISTING_WARPS) {
        const int thread = ((planner - LISTING_WARPS / 2) * gridDim.x + blockIdx.x) * 32 + lane;
        write_m_indices(r, s, thread, LISTING_WARPS / 2 * 32 * gridDim.x);
    } else {
        zero_padding_scales(
            a.scales, a.m_sum, r.experts, min(s.rows, r.m_sum), grid_warp, (FEW_WARPS - LISTING_WARPS) * gridDim.x,
            [&](int e) { return min(s.start[e], r.m_sum); }, [&](int e) { return min(s.start[e] + s.total[e], r.m_sum); });
    }
    if (ZERO_ROWS)
        zero_padding_rows<uint4>(a.out, HIDDEN, a.m_sum, grid_warp, unit_stride, [&](int row) {
            const int e = last_not_above(s.start, r.experts, row);
            return row < s.start[e] + s.total[e];
        });
}
