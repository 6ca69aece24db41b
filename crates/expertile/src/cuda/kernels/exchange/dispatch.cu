// Dispatch: this rank's tokens to the windows of the ranks, quantized once, as rows of
//   HIDDEN values | HIDDEN / 128 scales (e4m3 only) | TOPK numbers of experts' copies | TOPK weights (WEIGHTS_TRAVEL)
// padded to 16 bytes. Few tokens are sent unquantized and without scales. Token t of rank r has row r * capacity + t;
// rows past a rank's tokens have no copies.
//
// Set by the host: HIDDEN (= WIDTH), TOPK, IDS_I64, INPUT (0 bf16, 1 f16), QUANTIZED, WEIGHTED (router weights multiply
// the input), WEIGHTS_TRAVEL, ROUTED (values go only to ranks with one of the token's experts), MAPPED, SCALES_AT
// (bytes into a row), HOST_THREADS (of a block), GROUP, SCALE_LAYOUT, POWER_OF_TWO.
#include "common/quantize.cuh"
#include "exchange/ranks.cuh"

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

// A lane's part of a slab, as it travels: 16 e4m3 values and their scale, or 16 values of 16 bits.
struct Part {
    uint4 values[QUANTIZED ? 1 : 2];
    float scale;
};

__device__ __forceinline__ Part load_part(const DispatchArgs& a, int token, int column) {
    u32 pairs[PER_LANE / 2] = {};
    if (column < HIDDEN) {
        const u16* from = static_cast<const u16*>(a.x) + token * a.x_row_stride + column;
        const uint4 low = load_through_l1(from);
        const uint4 high = load_through_l1(from + 8);
        pairs[0] = low.x, pairs[1] = low.y, pairs[2] = low.z, pairs[3] = low.w;
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
    if (column >= HIDDEN) return;
#if QUANTIZED
    *reinterpret_cast<uint4*>(row + column) = part.values[0];
    if (column % GROUP == 0) *reinterpret_cast<float*>(row + SCALES_AT + column / GROUP * 4) = part.scale;
#else
    *reinterpret_cast<uint4*>(row + 2 * column) = part.values[0];
    *reinterpret_cast<uint4*>(row + 2 * column + 16) = part.values[1];
#endif
}

// A slab of a token to every rank that gets it. Every lane of the warp calls.
__device__ __forceinline__ void send_slab(const DispatchArgs& a, int token, int slab) {
    const int lane = lane_of_thread();
    const int column = slab * SLAB + lane * PER_LANE;
    const bool has_ids = slab == 0 || (ROUTED && MAPPED);
    const int copy = has_ids && lane < TOPK ? copy_of_slot(a, token, lane) : -1;
    const int copy_rank = ROUTED && MAPPED && copy >= 0 ? a.copy_ranks[copy] : -1;
    const Part part = load_part(a, token, column);
    // This rank's own window last: the others' stores take longer.
    for (int k = MAPPED ? 0 : a.ranks.ranks - 1; k < a.ranks.ranks; ++k) {
        const int to = other_rank(a.ranks, k);
        u8* row = row_of(a, to, token);
        if (!ROUTED || !MAPPED || __any_sync(WARP, copy_rank == to)) store_part(row, column, part);
        if (slab != 0 || lane >= TOPK) continue;
        reinterpret_cast<int*>(row + a.ranks.copies_at)[lane] = copy;
        if (WEIGHTS_TRAVEL)
            reinterpret_cast<float*>(row + a.ranks.weights_at)[lane] = a.weights[token * a.weights_row_stride + lane];
    }
}

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
    clear_rest(a);
    return is_last_to_store(a.ranks);
}

// Waits for every rank's tokens, and keeps what is wrong with them. Every thread of a block calls.
__device__ __forceinline__ void receive_tokens(const RankArgs& r) {
    wait_for_ranks(r, 0);
    if (is_broken(r)) return;
    for (int from = threadIdx.x; from < r.ranks; from += THREADS) {
        const Header* h = header(r, r.rank, from);
        Fault* fault = &r.state->faults[from];
        if (h->bad_id != 0) atomicMax(&fault->bad_id, h->bad_id);
        if (h->capacity != (u32)r.capacity) {
            fault->capacity = h->capacity + 1;
            fault->own_capacity = r.capacity;
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 8) dispatch_send(const __grid_constant__ DispatchArgs a) {
    wait_for_previous_launch();
    let_next_launch_start();
    if (is_broken(a.ranks)) return;
    if (send_tokens(a)) tell_ranks(a);
}

extern "C" __global__ void __launch_bounds__(THREADS, 8) dispatch_receive(const __grid_constant__ DispatchArgs a) {
    wait_for_previous_launch();
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
