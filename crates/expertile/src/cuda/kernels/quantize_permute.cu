// Rows quantized and brought to their places: read once, scaled once, written once per live slot.
//
//   quantize_permute        any number of tokens, after route_plan
//   route_quantize_permute  up to 4096 slots, routing and plan included, in one launch: every block works the routing out
//                           for itself, which at this size takes less time than telling the others would
//
// Set by whoever compiles: HIDDEN (= WIDTH), TOPK, IDS_I64, INPUT (0 bf16, 1 f16), GROUP, SCALE_LAYOUT (0 row-major,
// 1 MN-major, 2 packed UE8M0), POWER_OF_TWO, WEIGHTED, ZERO_ROWS, ALIGNED (x and its rows stand on 16 bytes).
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

// Quantizes a slab of a token and writes it to the rows that the lanes below TOPK hold.
__device__ __forceinline__ void emit_slab(const RowsArgs& a, Slab s, int token, int slab, int rows) {
    apply_weight(a, token, s);
    const int column = slab * SLAB + lane_of_thread() * PER_LANE;
    const bool active = column < HIDDEN;
    float scale;
    const uint4 bytes = quantize_slab<INPUT, GROUP, POWER_OF_TWO != 0>(s.pairs, scale);
    store_copies<uint4>(a.out, bytes, HIDDEN, column, active, rows);
    store_slab_scales<TOPK>(a.scales, active ? scale : 0.0f, slab, rows, a.m_sum);
}

// A row is cut into units of at most 7 slabs, whose loads are all in flight at once.
constexpr int UNITS = (SLABS + 6) / 7;
constexpr int SLABS_PER_UNIT = (SLABS + UNITS - 1) / UNITS;
constexpr int MANY_THREADS = 256;

extern "C" __global__ void __launch_bounds__(MANY_THREADS, 2) quantize_permute(const __grid_constant__ RowsArgs a) {
    wait_for_previous_launch();
    let_next_launch_start();
    const int lane = lane_of_thread();
    // Neighbouring units go to different multiprocessors at about the same time: rows that are neighbours in the output
    // are then written together, and their scales, which share sectors, meet in the cache.
    const int warp = (threadIdx.x >> 5) * gridDim.x + blockIdx.x;
    const int warps = gridDim.x * (MANY_THREADS / 32);
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
#pragma unroll
        for (int i = 0; i < SLABS_PER_UNIT; ++i)
            if (first + i < SLABS) emit_slab(a, s[i], token, first + i, mine);
    }
    const auto is_live = [&](int row) { return a.m_indices[row] >= 0; };
    zero_padding_scales(a.scales, a.m_sum, warp, warps, is_live);
    if (ZERO_ROWS) zero_padding_rows<uint4>(a.out, HIDDEN, a.m_sum, warp, warps, is_live);
}

constexpr int FEW_THREADS = 1024;
constexpr int FEW_WARPS = FEW_THREADS / 32;
constexpr int MAX_ROUNDS = 4;
constexpr int MAX_SLOTS = FEW_THREADS * MAX_ROUNDS;

extern "C" __global__ void __launch_bounds__(FEW_THREADS, 1)
    route_quantize_permute(const __grid_constant__ RouteArgs r, const __grid_constant__ RowsArgs a) {
    __shared__ Experts s;
    __shared__ int row_of_slot[MAX_SLOTS];
    extern __shared__ u16 seen[];  // [warps that have slots, experts]
    const int warp = threadIdx.x >> 5;
    const int lane = lane_of_thread();
    const int slots = r.tokens * TOPK;
    const int rounds = (slots + FEW_THREADS - 1) / FEW_THREADS;
    const int ranking_warps = (slots + rounds * 32 - 1) / max(rounds * 32, 1);
    for (int i = threadIdx.x; i < ranking_warps * r.experts; i += FEW_THREADS) seen[i] = 0;
    if (threadIdx.x == 0) s.live = 0;
    wait_for_previous_launch();
    let_next_launch_start();

    // The warp's first unit: its row is on its way while the routing is worked out.
    const int unit_stride = gridDim.x * FEW_WARPS;
    const int units = r.tokens * SLABS;
    int unit = warp * gridDim.x + blockIdx.x;
    int unit_expert = unit < units && lane < TOPK ? local_expert(r, unit / SLABS * TOPK + lane, nullptr) : -1;

    int expert[MAX_ROUNDS];
    int rank[MAX_ROUNDS];
    const int first = warp * rounds * 32 + lane;
#pragma unroll
    for (int i = 0; i < MAX_ROUNDS; ++i) {
        const int slot = first + i * 32;
        expert[i] = i < rounds && slot < slots ? local_expert(r, slot, blockIdx.x == 0 ? r.status : nullptr) : -1;
    }
    const bool unit_is_live = __any_sync(WARP, unit_expert >= 0);
    Slab slab;
    if (unit_is_live) slab = load_slab(a, unit / SLABS, unit % SLABS);
    __syncthreads();
    if (warp < ranking_warps) {
#pragma unroll
        for (int i = 0; i < MAX_ROUNDS; ++i)
            rank[i] = i < rounds ? rank_in_warp(expert[i], seen + warp * r.experts) : 0;
    }
    __syncthreads();
    for (int e = threadIdx.x; e < r.experts; e += FEW_THREADS) {
        int sum = 0;
#pragma unroll 4
        for (int w = 0; w < ranking_warps; ++w) {
            const int count = seen[w * r.experts + e];
            seen[w * r.experts + e] = (u16)sum;
            sum += count;
        }
        s.total[e] = sum;
    }
    // Thread e wrote what it now reads: no barrier in between.
    plan_experts<FEW_THREADS>(s, r.experts, r.alignment, r.row_tile);
    if (warp < ranking_warps) {
#pragma unroll
        for (int i = 0; i < MAX_ROUNDS; ++i) {
            const int slot = first + i * 32;
            if (i >= rounds || slot >= slots) break;
            int row = -1;
            if (expert[i] >= 0) row = s.start[expert[i]] + seen[warp * r.experts + expert[i]] + rank[i];
            row_of_slot[slot] = row < r.m_sum ? row : -1;
        }
    }
    __syncthreads();

    bool have_slab = unit_is_live;
    for (; unit < units; unit += unit_stride) {
        const int token = unit / SLABS;
        const int rows = lane < TOPK ? row_of_slot[token * TOPK + lane] : -1;
        const bool live = __any_sync(WARP, rows >= 0);
        if (live) {
            if (!have_slab) slab = load_slab(a, token, unit % SLABS);
            emit_slab(a, slab, token, unit % SLABS, rows);
        }
        have_slab = false;
    }
    const auto is_live = [&](int row) {
        const int e = last_not_above(s.start, r.experts, row);
        return row < s.start[e] + s.total[e];
    };
    const int grid_warp = warp * gridDim.x + blockIdx.x;
    zero_padding_scales(a.scales, a.m_sum, grid_warp, unit_stride, is_live);
    if (ZERO_ROWS) zero_padding_rows<uint4>(a.out, HIDDEN, a.m_sum, grid_warp, unit_stride, is_live);
    const int thread = grid_warp * 32 + lane;
    write_rows(r, s, thread, gridDim.x * FEW_THREADS);
    for (int slot = thread; slot < slots; slot += gridDim.x * FEW_THREADS) r.inv_perm[slot] = row_of_slot[slot];
    if (blockIdx.x == 0) write_experts(r, s);
}
