// Routing, plan and permute of up to 8192 slots in one launch: every block counts all slots, which at this size takes less
// time than an exchange between blocks, and ranks only those whose rows it stores. Rows are quantized on the way, or
// copied as they are.
//
// Set by the host: HIDDEN (where QUANTIZED also WIDTH), TOPK, IDS_I64, INPUT (0 bf16, 1 f16), QUANTIZED and with it GROUP,
// SCALE_LAYOUT (0 row-major, 1 MN-major, 2 packed UE8M0) and POWER_OF_TWO, WEIGHTED, ZERO_ROWS, ALIGNED (x and its rows
// stand on 16 bytes), OWN_SLOTS (that a block has room for), HOST_THREADS, HOST_MAX_EXPERTS, HOST_SLAB.
#if QUANTIZED
#include "common/scales.cuh"
#endif
#include "route/route.cuh"
#include "rows/slabs.cuh"

constexpr int THREADS = HOST_THREADS;
constexpr int WARPS = THREADS / 32;
static_assert(MAX_EXPERTS == THREADS, "a thread to an expert");

// Quotients computed on the host so that the kernel never divides.
struct FewArgs {
    int units;       // (token, slab) pairs of every block,
    int more_units;  // and one more for each of as many blocks, from the first on
    u32 alignment_inverse;
    u32 tile_inverse;
    u32 second_inverse;  // 0 without a second worklist
};

// The block's part of the rows: (token, slab) units, and the slots of the tokens they are of.
struct Share {
    int first_unit;
    int end_unit;
    int first_slot;
    int slots;

    __device__ __forceinline__ explicit Share(const FewArgs& f) {
        const int block = blockIdx.x;
        first_unit = block * f.units + min(block, f.more_units);
        end_unit = first_unit + f.units + (block < f.more_units);
        const int first_token = first_unit / SLABS;
        first_slot = first_token * TOPK;
        slots = end_unit > first_unit ? ((end_unit - 1) / SLABS + 1 - first_token) * TOPK : 0;
    }
};

// What a block has counted and ranked: every slot is counted, only those of the block's own share are ranked.
struct Counted {
    u32 before[MAX_EXPERTS];  // slots ahead of the block's share
    u16 seen[MAX_EXPERTS];    // in the share
    // Of each slot in the share, the expert (0xffff for none) and below it the rank in the share.
    u32 own[OWN_SLOTS];
};

constexpr int COUNTED_AT_ONCE = 4;

// Counts a thread's slots from `first` on, as many as it counts at once.
__device__ __forceinline__ void count_some(const RouteArgs& r, const Share& share, int slots, int first, Experts& s,
                                           Counted& c) {
    Id id[COUNTED_AT_ONCE];
#pragma unroll
    for (int i = 0; i < COUNTED_AT_ONCE; ++i) {
        const int slot = first + i * THREADS;
        if (slot < slots) id[i] = *id_of_slot(r, slot);
    }
#pragma unroll
    for (int i = 0; i < COUNTED_AT_ONCE; ++i) {
        const int slot = first + i * THREADS;
        if (slot >= slots) break;
        const int expert = expert_of_id(r, slot, id[i], blockIdx.x == 0 ? r.status : nullptr);
        const int in_share = slot - share.first_slot;
        if (in_share >= 0 && in_share < share.slots) c.own[in_share] = expert;
        if (expert < 0) continue;
        atomicAdd(&s.total[expert], 1);
        if (in_share < 0) atomicAdd(&c.before[expert], 1u);
    }
}

// Counts every slot: into the totals, and those ahead of the share once more. Leaves the experts of the share's in
// c.own.
__device__ __forceinline__ void count_slots(const RouteArgs& r, const Share& share, int slots, int thread, Experts& s,
                                            Counted& c) {
    count_some(r, share, slots, thread, s, c);
    constexpr int STEP = COUNTED_AT_ONCE * THREADS;
    if (slots <= STEP) return;
    for (int first = thread + STEP; first < slots; first += STEP) count_some(r, share, slots, first, s, c);
}

// Ranks the share's slots; one warp, all of its lanes.
__device__ __forceinline__ void rank_share(const Share& share, Counted& c, int experts) {
    for (int base = 0; base < share.slots; base += 32) {
        const int slot = base + lane_of_thread();
        const int expert = slot < share.slots ? (int)c.own[slot] : -1;
        const u32 rank = rank_in_warp(expert, experts, c.seen);
        if (slot < share.slots) c.own[slot] = (u32)expert << 16 | rank;
    }
}

// A lane's values of a slab, as they are stored.
struct Values {
#if QUANTIZED
    uint4 bytes;
    float scale;
#else
    uint4 low;
    uint4 high;
#endif
};
constexpr int ROW_BYTES = HIDDEN * (QUANTIZED ? 1 : 2);

// Every lane of the warp calls.
__device__ __forceinline__ Values values_of(const Slab& slab) {
    Values v;
#if QUANTIZED
    v.bytes = quantize_slab < INPUT, GROUP, POWER_OF_TWO != 0 > (slab.pairs, v.scale);
#else
    v.low = make_uint4(slab.pairs[0], slab.pairs[1], slab.pairs[2], slab.pairs[3]);
    v.high = make_uint4(slab.pairs[4], slab.pairs[5], slab.pairs[6], slab.pairs[7]);
#endif
    return v;
}

// Stores a slab to every row that the lanes below TOPK hold. Every lane of the warp calls.
__device__ __forceinline__ void store_values(const RowsArgs& a, const Values& v, int slab, int rows) {
    const int column = slab * SLAB + lane_of_thread() * PER_LANE;
    const bool active = column < HIDDEN;
#if QUANTIZED
    store_copies<uint4>(a.out, v.bytes, ROW_BYTES, column, active, rows);
    store_slab_scales<TOPK>(a.scales, active ? v.scale : 0.0f, slab, rows, a.m_sum);
#else
    store_copies<uint4>(a.out, v.low, ROW_BYTES, 2 * column, active, rows);
    store_copies<uint4>(a.out, v.high, ROW_BYTES, 2 * column + 16, active, rows);
#endif
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    route_permute(const __grid_constant__ RouteArgs r, const __grid_constant__ RowsArgs a,
                  const __grid_constant__ FewArgs f) {
    __shared__ Experts s;
    __shared__ Counted c;
    const int warp = threadIdx.x >> 5;
    const int lane = lane_of_thread();
    // Rows are taken by warps from the first on, routing and plan by warps from the last on: where there are few of
    // either, they go on side by side.
    const int planner = WARPS - 1 - warp;
    const int planner_thread = planner * 32 + lane;
    const int slots = r.tokens * TOPK;
    s.total[threadIdx.x] = 0;
    c.before[threadIdx.x] = 0;
    c.seen[threadIdx.x] = 0;
    const Share share(f);
    const int first_unit = share.first_unit + warp;
    const bool have_unit = first_unit < share.end_unit;
    // Rows and ids may have left the L2 by now: they come back while the launch before ends.
    if (have_unit) prefetch_slab(a, first_unit / SLABS, first_unit % SLABS);
    constexpr int IDS_TO_A_LINE = 128 / sizeof(Id);
    if (threadIdx.x * IDS_TO_A_LINE < slots) prefetch_line(id_of_slot(r, threadIdx.x * IDS_TO_A_LINE));
    __syncthreads();
    wait_for_previous_launch();

    count_slots(r, share, slots, planner_thread, s, c);
    // The warp's first unit: its row is in flight while the plan is computed. Not before, where ids would queue behind
    // it.
    Slab slab;
    if (have_unit) slab = load_slab(a, first_unit / SLABS, first_unit % SLABS);
    __syncthreads();
    // The warp after those that plan, if there is one.
    if (planner == min((r.experts + 31) / 32, WARPS - 1)) rank_share(share, c, r.experts);
    plan_few_slots(s, planner_thread, r.experts, r.alignment, f.alignment_inverse, f.tile_inverse, f.second_inverse);
    Values values;
    if (have_unit) {
        apply_weight(a, first_unit / SLABS, slab);
        values = values_of(slab);
    }
    __syncthreads();
    const auto row_of_slot = [&](int slot) {
        const u32 packed = c.own[slot - share.first_slot];
        const u32 e = packed >> 16;
        if (e == 0xffffu) return -1;
        const int row = s.start[e] + (int)(c.before[e] + (packed & 0xffffu));
        return row < r.m_sum ? row : -1;
    };

    for (int unit = first_unit; unit < share.end_unit; unit += WARPS) {
        const int token = unit / SLABS;
        const int index = unit % SLABS;
        const int rows = lane < TOPK ? row_of_slot(token * TOPK + lane) : -1;
        if (!__any_sync(WARP, rows >= 0)) continue;
        // The row of the warp's next unit comes to the L2 meanwhile.
        if (unit + WARPS < share.end_unit) prefetch_slab(a, (unit + WARPS) / SLABS, (unit + WARPS) % SLABS);
        if (unit != first_unit) {
            slab = load_slab(a, token, index);
            apply_weight(a, token, slab);
            values = values_of(slab);
        }
        store_values(a, values, index, rows);
    }
    // What is left is shared out by kind, so that no warp goes through all of it.
    constexpr int LISTING_WARPS = WARPS / 4;
    if (planner < LISTING_WARPS / 2) {
        const int thread = (planner * gridDim.x + blockIdx.x) * 32 + lane;
        const int threads = LISTING_WARPS / 2 * 32 * gridDim.x;
        // Of a token whose slabs several blocks share, the block that has the first lists the slots.
        const int after = (share.first_unit + SLABS - 1) / SLABS * TOPK;
        for (int slot = after + planner_thread; slot < share.first_slot + share.slots; slot += LISTING_WARPS / 2 * 32)
            write_slot(r, slot, row_of_slot(slot));
        write_experts(r, s, thread, threads);
        write_worklists(r, s, thread, threads);
    } else if (planner < LISTING_WARPS) {
        const int thread = ((planner - LISTING_WARPS / 2) * gridDim.x + blockIdx.x) * 32 + lane;
        write_m_indices(r, s, thread, LISTING_WARPS / 2 * 32 * gridDim.x);
    }
#if QUANTIZED
    else {
        // Left to the warps that have had no rows, if those are enough.
        const int first = f.units < WARPS / 2 ? f.units + 1 : 0;
        if (warp >= first)
            zero_padding_scales(
                a.scales, a.m_sum, r.experts, min(s.rows, r.m_sum), (warp - first) * gridDim.x + blockIdx.x,
                (WARPS - LISTING_WARPS - first) * gridDim.x, [&](int e) { return min(s.start[e], r.m_sum); },
                [&](int e) { return min(s.start[e] + s.total[e], r.m_sum); });
    }
#endif
    if (ZERO_ROWS)
        zero_padding_rows<uint4>(a.out, ROW_BYTES, a.m_sum, warp * gridDim.x + blockIdx.x, WARPS * gridDim.x,
                                 [&](int row) {
                                     const int e = last_not_above(s.start, r.experts, row);
                                     return row < s.start[e] + s.total[e];
                                 });
}
