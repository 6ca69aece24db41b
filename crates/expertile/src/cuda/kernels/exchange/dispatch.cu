// Dispatch: this rank's tokens to the windows of the ranks, quantized once, as rows of
//   HIDDEN values | HIDDEN / 128 scales (e4m3 only) | TOPK numbers of experts' copies | TOPK weights (WEIGHTS_TRAVEL)
// padded to 16 bytes. Few tokens are sent unquantized and without scales. Token t of rank r has row r * capacity + t;
// rows past a rank's tokens have no copies. Where rows are packed (COUNTED), t counts the tokens that a rank has sent.
//
// Set by the host: HIDDEN (= WIDTH), TOPK, IDS_I64, INPUT (0 bf16, 1 f16), QUANTIZED, WEIGHTED (router weights multiply
// the input), WEIGHTS_TRAVEL, ROUTED (values go only to ranks with one of the token's experts), MAPPED, COUNTED, SCALES_AT
// (bytes into a row), HOST_THREADS (of a block), GROUP, SCALE_LAYOUT, POWER_OF_TWO.
#include "common/quantize.cuh"
#include "exchange/ranks.cuh"
#include "route/scan.cuh"

#if IDS_I64
typedef i64 Id;
#else
typedef int Id;
#endif

struct DispatchArgs {
    RankArgs ranks;
    const void* x;  // [tokens, HIDDEN]
    i64 x_row_stride;
    const void* ids;  // [tokens, TOPK], global
    i64 ids_row_stride;
    i64 ids_col_stride;
    const float* weights;  // [tokens, TOPK]
    i64 weights_row_stride;
    const int* first_choice;  // [experts + 1]: where an expert's copies start in `choices`
    const int* choices;       // copies' numbers, by expert
    const int* copy_ranks;    // [copies]
    int experts;              // global
    int reserved;
};

constexpr int THREADS = HOST_THREADS;
constexpr int PLAN_THREADS = 1024;
constexpr int SLABS = (HIDDEN + SLAB - 1) / SLAB;

// The number of the copy that a slot goes to; -1 for an empty slot, and for an id past the limit, which is noted.
__device__ __forceinline__ int copy_of_slot(const DispatchArgs& a, int token, int k) {
    const i64 at = token * a.ids_row_stride + k * a.ids_col_stride;
    const i64 id = static_cast<const Id*>(a.ids)[at];
    if (id < 0) return -1;
    if (id >= a.experts) {
        const u32 held = id > 0xffffffffll ? 0xffffffffu : (u32)id;
        atomicMax(&a.ranks.state->bad_id, (u64)(~(u32)(token * TOPK + k)) << 32 | held);
        return -1;
    }
    const int first = a.first_choice[id];
    const int count = a.first_choice[id + 1] - first;
    // Copies take turns by rank, token and slot.
    return a.choices[count == 1 ? first : first + (a.ranks.rank + token + k) % count];
}

// A lane's part of a slab, as it travels: 16 e4m3 values and their scale, or twice 8 values of 16 bits, so that a warp
// stores 512 bytes next to each other: a link takes half of a sector as long as all of it.
constexpr int LANE_STRIDE = QUANTIZED ? PER_LANE : PER_LANE / 2;
constexpr int SECOND_HALF = QUANTIZED ? PER_LANE / 2 : SLAB / 2;

struct Part {
    uint4 values[QUANTIZED ? 1 : 2];
    float scale;
};

__device__ __forceinline__ Part load_part(const DispatchArgs& a, int token, int column) {
    u32 pairs[PER_LANE / 2] = {};
    const u16* from = static_cast<const u16*>(a.x) + token * a.x_row_stride + column;
    if (column < HIDDEN) {
        const uint4 low = load_through_l1(from);
        pairs[0] = low.x, pairs[1] = low.y, pairs[2] = low.z, pairs[3] = low.w;
    }
    if (column + SECOND_HALF < HIDDEN) {
        const uint4 high = load_through_l1(from + SECOND_HALF);
        pairs[4] = high.x, pairs[5] = high.y, pairs[6] = high.z, pairs[7] = high.w;
    }
    if (WEIGHTED) {
        const float weight = a.weights[token * a.weights_row_stride];
#pragma unroll
        for (int i = 0; i < PER_LANE / 2; ++i)
            pairs[i] = pack_halves<INPUT>(__fmul_rn(weight, low_half<INPUT>(pairs[i])),
                                          __fmul_rn(weight, high_half<INPUT>(pairs[i])));
    }
    Part part;
#if QUANTIZED
    part.values[0] = quantize_slab < INPUT, GROUP, POWER_OF_TWO != 0 > (pairs, part.scale);
#else
    part.values[0] = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    part.values[1] = make_uint4(pairs[4], pairs[5], pairs[6], pairs[7]);
#endif
    return part;
}

__device__ __forceinline__ u8* row_of(const DispatchArgs& a, int rank, int token) {
    return window_of(a.ranks, rank) + a.ranks.rows_at +
           ((i64)a.ranks.rank * a.ranks.capacity + token) * a.ranks.row_bytes;
}

__device__ __forceinline__ void store_part(u8* row, int column, const Part& part) {
#if QUANTIZED
    if (column >= HIDDEN) return;
    *reinterpret_cast<uint4*>(row + column) = part.values[0];
    if (column % GROUP == 0) *reinterpret_cast<float*>(row + SCALES_AT + column / GROUP * 4) = part.scale;
#else
    if (column < HIDDEN) *reinterpret_cast<uint4*>(row + 2 * column) = part.values[0];
    const int second = column + SECOND_HALF;
    if (second < HIDDEN) *reinterpret_cast<uint4*>(row + 2 * second) = part.values[1];
#endif
}

// What goes with a token's values.
__device__ __forceinline__ void store_slots(const DispatchArgs& a, u8* row, int token, int copy) {
    const int lane = lane_of_thread();
    if (lane >= TOPK) return;
    reinterpret_cast<int*>(row + a.ranks.copies_at)[lane] = copy;
    if (WEIGHTS_TRAVEL)
        reinterpret_cast<float*>(row + a.ranks.weights_at)[lane] = a.weights[token * a.weights_row_stride + lane];
}

#if COUNTED
// A slab of a token to its place among those that go to each rank. Every lane of the warp calls.
__device__ __forceinline__ void send_slab(const DispatchArgs& a, int token, int slab) {
    const RankArgs& r = a.ranks;
    const int lane = lane_of_thread();
    const int column = slab * SLAB + lane * LANE_STRIDE;
    const int copy = slab == 0 && lane < TOPK ? r.copies[token * TOPK + lane] : -1;
    const Part part = load_part(a, token, column);
    for (int to = 0; to < r.ranks; ++to) {
        const i64 of_rank = (i64)to * r.capacity;
        const int place = r.places[of_rank + token];
        if (place < 0) continue;
        u8* rows = to == r.rank ? window_of(r, to) + r.rows_at : r.outgoing;
        u8* row = rows + (of_rank + place) * r.row_bytes;
        store_part(row, column, part);
        if (slab != 0) continue;
        store_slots(a, row, token, copy);
        if (lane == 0) *reinterpret_cast<int*>(row + r.place_at) = r.slot_places[of_rank + token];
    }
}
#else
// A slab of a token to every rank that gets it. Every lane of the warp calls.
__device__ __forceinline__ void send_slab(const DispatchArgs& a, int token, int slab) {
    const int lane = lane_of_thread();
    const int column = slab * SLAB + lane * LANE_STRIDE;
    const bool has_ids = slab == 0 || (ROUTED && MAPPED);
    const int copy = has_ids && lane < TOPK ? copy_of_slot(a, token, lane) : -1;
    const int copy_rank = ROUTED && MAPPED && copy >= 0 ? a.copy_ranks[copy] : -1;
    const Part part = load_part(a, token, column);
    // This rank's own window last: the others' stores take longer.
    for (int k = MAPPED ? 0 : a.ranks.ranks - 1; k < a.ranks.ranks; ++k) {
        const int to = other_rank(a.ranks, k);
        u8* row = row_of(a, to, token);
        if (!ROUTED || !MAPPED || __any_sync(WARP, copy_rank == to)) store_part(row, column, part);
        if (slab == 0) store_slots(a, row, token, copy);
    }
}
#endif

// Rows past this rank's tokens: no copy in any of their slots.
__device__ __forceinline__ void clear_rest(const DispatchArgs& a) {
    const int rest = (a.ranks.capacity - a.ranks.tokens) * TOPK;
    for (int slot = blockIdx.x * THREADS + threadIdx.x; slot < rest; slot += gridDim.x * THREADS)
        for (int k = MAPPED ? 0 : a.ranks.ranks - 1; k < a.ranks.ranks; ++k) {
            u8* row = row_of(a, other_rank(a.ranks, k), a.ranks.tokens + slot / TOPK);
            reinterpret_cast<int*>(row + a.ranks.copies_at)[slot % TOPK] = -1;
        }
}

// The call's header to every rank, and after it, where windows are mapped, the flag.
__device__ __forceinline__ void tell_ranks(const DispatchArgs& a) {
    const RankArgs& r = a.ranks;
    const u32 epoch = load_now(&r.state->epoch) + 1;
    const u64 bad_id = atomicMax(&r.state->bad_id, (u64)0);
    __syncthreads();
    for (int to = threadIdx.x; to < r.ranks; to += THREADS) {
        if (!MAPPED && to != r.rank) continue;
        Header* h = header(r, to, r.rank);
        h->bad_id = bad_id;
        h->tokens = r.tokens;
        h->capacity = r.capacity;
        h->epoch = epoch;
        if (MAPPED) store_release(flag(r, to, r.rank, 0), epoch);
    }
    if (threadIdx.x == 0) {
        r.state->epoch = epoch;
        r.state->bad_id = 0;
    }
}

// Whether this block is the last one of a launch that sends all tokens.
__device__ __forceinline__ bool send_tokens(const DispatchArgs& a) {
    const int warp = blockIdx.x * (THREADS / 32) + (threadIdx.x >> 5);
    const int warps = gridDim.x * (THREADS / 32);
    for (i64 unit = warp; unit < (i64)a.ranks.tokens * SLABS; unit += warps)
        send_slab(a, (int)(unit / SLABS), (int)(unit % SLABS));
    if (COUNTED) return false;
    clear_rest(a);
    return is_last_to_store(a.ranks);
}

// Waits for every rank's tokens, and keeps what is wrong with them. Every thread of a block calls.
__device__ __forceinline__ void receive_tokens(const RankArgs& r) {
    wait_for_ranks(r, 0);
    if (!is_broken(r)) note_faults(r);
}

// COUNTED, before tokens are sent: where each of them has its row among those that go to rank `blockIdx.x`, and its slots theirs
// among those that come back; and how many there are.
extern "C" __global__ void __launch_bounds__(PLAN_THREADS) dispatch_plan(const __grid_constant__ DispatchArgs a) {
    constexpr int PLAN_WARPS = PLAN_THREADS / 32;
    constexpr int HALF = 32;
    __shared__ u64 of_warps[PLAN_WARPS];
    wait_for_previous_launch();
    let_next_launch_start();
    const RankArgs& r = a.ranks;
    const int to = blockIdx.x;
    const int warp = threadIdx.x >> 5;
    u64 all = 0;  // tokens in the high half, slots in the low one
    for (int first = 0; first < r.tokens; first += PLAN_THREADS) {
        const int token = first + threadIdx.x;
        u32 slots = 0;
        for (int k = 0; token < r.tokens && k < TOPK; ++k) {
            const int copy = copy_of_slot(a, token, k);
            if (to == r.rank) r.copies[token * TOPK + k] = copy;
            if (copy >= 0 && a.copy_ranks[copy] == to) ++slots;
        }
        const u64 own = (u64)(slots != 0 ? 1 : 0) << HALF | slots;
        const u64 scanned = scan_warp(own);
        if (lane_of_thread() == 31) of_warps[warp] = scanned;
        __syncthreads();
        u64 before = all + scanned - own;
        for (int w = 0; w < PLAN_WARPS; ++w) {
            if (w < warp) before += of_warps[w];
            all += of_warps[w];
        }
        if (token < r.tokens) {
            const i64 at = (i64)to * r.capacity + token;
            r.places[at] = slots != 0 ? (int)(before >> HALF) : -1;
            r.slot_places[at] = (int)(u32)before;
        }
        __syncthreads();
    }
    if (threadIdx.x == 0) {
        Counts* to_rank = counts(r, r.rank, to);
        to_rank->tokens = (u32)(all >> HALF);
        to_rank->slots = (u32)all;
    }
    if (is_last_to_store(r)) tell_ranks(a);
}

extern "C" __global__ void __launch_bounds__(THREADS, 8) dispatch_send(const __grid_constant__ DispatchArgs a) {
    wait_for_previous_launch();
    let_next_launch_start();
    if (is_broken(a.ranks)) return;
    if (send_tokens(a)) tell_ranks(a);
}

// COUNTED: rows past those that came have no copies.
__device__ __forceinline__ void clear_received(const RankArgs& r) {
    const i64 slots = (i64)r.ranks * r.capacity * TOPK;
    for (i64 slot = (i64)blockIdx.x * THREADS + threadIdx.x; slot < slots; slot += (i64)gridDim.x * THREADS) {
        const i64 token = slot / TOPK;
        const int from = (int)(token / r.capacity);
        if ((u32)(token % r.capacity) < counts(r, from, r.rank)->tokens) continue;
        u8* row = window_of(r, r.rank) + r.rows_at + token * r.row_bytes;
        reinterpret_cast<int*>(row + r.copies_at)[slot % TOPK] = -1;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 8) dispatch_receive(const __grid_constant__ DispatchArgs a) {
    wait_for_previous_launch();
    if (COUNTED)
        clear_received(a.ranks);
    else
        receive_tokens(a.ranks);
    let_next_launch_start();
}

// Both: the last block to send waits, when all others have left.
extern "C" __global__ void __launch_bounds__(THREADS, 8) dispatch(const __grid_constant__ DispatchArgs a) {
    wait_for_previous_launch();
    let_next_launch_start();
    if (is_broken(a.ranks)) return;
    if (!send_tokens(a)) return;
    tell_ranks(a);
    __syncthreads();
    receive_tokens(a.ranks);
}
