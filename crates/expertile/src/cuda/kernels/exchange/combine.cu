// Combine: what the experts here said, back to the tokens' own ranks; and there, the sum over a token's slots.
//
// ROWS: each slot's bf16 row goes home, [capacity, TOPK, HIDDEN] there, and is summed as unpermute sums: in f32, in the
// order of slots, each product and each sum rounded once. Else each rank's f32 sum over its own experts goes home,
// [ranks, capacity, HIDDEN] there, and those of ranks that have one of the token's experts are added in their order.
//
// Where ranks are not mapped, all of it is first stored here, by home rank, and a library moves it; rows then come back
// by the rank that they come from, [ranks, capacity, TOPK, HIDDEN].
//
// Set by the host: HIDDEN, TOPK, ROWS, OUTPUT (0 bf16, 1 f16, 2 f32), WEIGHTED, MAPPED, HOST_THREADS (of a block).
#include "common/quantize.cuh"
#include "exchange/ranks.cuh"

struct CombineArgs {
    RankArgs ranks;
    const u8* rows;         // [m_sum, HIDDEN] bf16: what the experts here say
    const int* inv_perm;    // [ranks * capacity, TOPK]: the row of each slot of every rank, -1 for none here
    const int* copy_ranks;  // [copies]
    u8* outgoing;           // where what goes to other ranks is stored, by home rank; null where they are mapped
    const float* weights;   // [tokens, TOPK]: this rank's tokens'
    i64 weights_row_stride;
    u8* out;  // [tokens, HIDDEN]
    int m_sum;
    int reserved;
};

constexpr int THREADS = HOST_THREADS;
constexpr int VECTOR = 8;            // values that a lane takes at a time
constexpr int STRIDE = 32 * VECTOR;  // and a warp
constexpr int STEPS = (HIDDEN + STRIDE - 1) / STRIDE;
constexpr i64 BYTES_OF_A_ROW = (i64)HIDDEN * 2;
constexpr i64 BYTES_OF_A_SUM = (i64)HIDDEN * 4;
constexpr i64 BYTES_OF_A_TOKEN = ROWS ? TOPK * BYTES_OF_A_ROW : BYTES_OF_A_SUM;

__device__ __forceinline__ const u8* token_row(const CombineArgs& a, i64 token) {
    return window_of(a.ranks, a.ranks.rank) + a.ranks.rows_at + token * a.ranks.row_bytes;
}

__device__ __forceinline__ int row_of_slot(const CombineArgs& a, i64 token, int k) {
    const int row = a.inv_perm[token * TOPK + k];
    return row < a.m_sum ? row : -1;
}

// Where the results of tokens of rank `home` go.
__device__ __forceinline__ u8* home_of(const CombineArgs& a, int home, int token) {
    const RankArgs& r = a.ranks;
    u8* part;
    if (MAPPED)
        part = window_of(r, home) + r.returned_at + (ROWS ? 0 : r.rank * r.capacity * BYTES_OF_A_TOKEN);
    else if (home == r.rank)
        part = window_of(r, home) + r.returned_at + r.rank * r.capacity * BYTES_OF_A_TOKEN;
    else
        part = a.outgoing + home * r.capacity * BYTES_OF_A_TOKEN;
    return part + token * BYTES_OF_A_TOKEN;
}

__device__ __forceinline__ float value_of(const uint4& v, int i) {
    const u32 word = i / 2 == 0 ? v.x : i / 2 == 1 ? v.y : i / 2 == 2 ? v.z : v.w;
    return i % 2 == 0 ? low_half<0>(word) : high_half<0>(word);
}

__device__ __forceinline__ void add_values(float (&sum)[VECTOR], const uint4& v, float weight) {
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) {
        const float x = value_of(v, i);
        sum[i] = __fadd_rn(sum[i], WEIGHTED ? __fmul_rn(weight, x) : x);
    }
}

__device__ __forceinline__ void store_floats(u8* to, const float (&sum)[VECTOR]) {
#pragma unroll
    for (int i = 0; i < VECTOR; i += 4)
        *reinterpret_cast<uint4*>(to + 4 * i) = make_uint4(__float_as_uint(sum[i]), __float_as_uint(sum[i + 1]),
                                                           __float_as_uint(sum[i + 2]), __float_as_uint(sum[i + 3]));
}

// STEPS_AT_ONCE steps of each live slot's row, from `step` on, to its place at home; the loads of several slots are in
// flight at once.
template <int STEPS_AT_ONCE>
__device__ __forceinline__ void send_rows(const CombineArgs& a, u8* home, int slot_row, u32 live, int step) {
    constexpr int AT_ONCE = 8 / STEPS_AT_ONCE;
    const int column = step * STRIDE + lane_of_thread() * VECTOR;
    while (live != 0) {
        uint4 v[AT_ONCE][STEPS_AT_ONCE];
        u8* to[AT_ONCE];
        const int count = __popc(live);
#pragma unroll
        for (int k = 0; k < AT_ONCE; ++k) {
            if (k >= count) break;
            const int slot = __ffs(live) - 1;
            live &= live - 1;
            const int row = __shfl_sync(WARP, slot_row, slot);
            to[k] = home + slot * BYTES_OF_A_ROW + column * 2;
            const u8* from = a.rows + row * BYTES_OF_A_ROW + column * 2;
#pragma unroll
            for (int i = 0; i < STEPS_AT_ONCE; ++i)
                if (column + i * STRIDE < HIDDEN) v[k][i] = load_once(from + i * STRIDE * 2);
        }
#pragma unroll
        for (int k = 0; k < AT_ONCE; ++k) {
            if (k >= count) break;
#pragma unroll
            for (int i = 0; i < STEPS_AT_ONCE; ++i)
                if (column + i * STRIDE < HIDDEN) *reinterpret_cast<uint4*>(to[k] + i * STRIDE * 2) = v[k][i];
        }
    }
}

// A step of the weighted sum over a token's slots here.
__device__ __forceinline__ void send_sum(const CombineArgs& a, u8* home, int slot_row, float weight, u32 live,
                                         int step) {
    const int column = step * STRIDE + lane_of_thread() * VECTOR;
    float sum[VECTOR] = {};
    while (live != 0) {
        const int slot = __ffs(live) - 1;
        live &= live - 1;
        const int row = __shfl_sync(WARP, slot_row, slot);
        const float w = __shfl_sync(WARP, weight, slot);
        if (column < HIDDEN) add_values(sum, load_once(a.rows + row * BYTES_OF_A_ROW + column * 2), w);
    }
    if (column < HIDDEN) store_floats(home + column * 4, sum);
}

// Results to the tokens' own ranks, in units of STEPS_AT_ONCE steps of a token; then the flag. Rows of this rank's own
// tokens stay where they are.
template <int STEPS_AT_ONCE>
__device__ __forceinline__ void send_results(const CombineArgs& a) {
    constexpr int UNITS = (STEPS + STEPS_AT_ONCE - 1) / STEPS_AT_ONCE;
    const RankArgs& r = a.ranks;
    wait_for_previous_launch();
    let_next_launch_start();
    if (is_broken(r)) return;
    const int lane = lane_of_thread();
    const int warp = blockIdx.x * (THREADS / 32) + (threadIdx.x >> 5);
    const int warps = gridDim.x * (THREADS / 32);
    const i64 units = (i64)(ROWS ? r.ranks - 1 : r.ranks) * r.capacity * UNITS;
    for (i64 unit = warp; unit < units; unit += warps) {
        const int at = (int)(unit / UNITS);
        const int home = other_rank(r, at / r.capacity);
        const int token = at % r.capacity;
        const i64 global = (i64)home * r.capacity + token;
        const int row = lane < TOPK ? row_of_slot(a, global, lane) : -1;
        const u32 live = __ballot_sync(WARP, row >= 0);
        if (live == 0) continue;
        u8* to = home_of(a, home, token);
        const int first = (int)(unit % UNITS) * STEPS_AT_ONCE;
#if ROWS
        send_rows<STEPS_AT_ONCE>(a, to, row, live, first);
#else
        float weight = 1.0f;
        if (WEIGHTED && row >= 0) weight = reinterpret_cast<const float*>(token_row(a, global) + r.weights_at)[lane];
        for (int step = first; step < min(first + STEPS_AT_ONCE, STEPS); ++step)
            send_sum(a, to, row, weight, live, step);
#endif
    }
    if (!is_last_to_store(r) || !MAPPED) return;
    const u32 epoch = load_now(&r.state->epoch);
    for (int to = threadIdx.x; to < r.ranks; to += THREADS) store_release(flag(r, to, r.rank, 1), epoch);
}

extern "C" __global__ void __launch_bounds__(THREADS, 6) combine_send(const __grid_constant__ CombineArgs a) {
    send_results<2>(a);
}

// Few tokens: as many warps as there are steps.
extern "C" __global__ void __launch_bounds__(THREADS, 6) combine_send_few(const __grid_constant__ CombineArgs a) {
    send_results<1>(a);
}

__device__ __forceinline__ void store_output(u8* row, int column, const float (&sum)[VECTOR]) {
#if OUTPUT == 2
    store_floats(row + column * 4, sum);
#else
    u32 word[VECTOR / 2];
#pragma unroll
    for (int i = 0; i < VECTOR / 2; ++i) word[i] = pack_halves<OUTPUT>(sum[2 * i], sum[2 * i + 1]);
    *reinterpret_cast<uint4*>(row + column * 2) = make_uint4(word[0], word[1], word[2], word[3]);
#endif
}

// The rows of a token's live slots in their order, wherever they are: a lane's vector of STEPS_AT_ONCE steps.
template <int STEPS_AT_ONCE>
__device__ __forceinline__ void sum_rows(const CombineArgs& a, int token, int step) {
    constexpr int AT_ONCE = 8 / STEPS_AT_ONCE;
    const RankArgs& r = a.ranks;
    const int lane = lane_of_thread();
    const i64 global = (i64)r.rank * r.capacity + token;
    u64 from = 0;
    float weight = 1.0f;
    if (lane < TOPK) {
        const int row = row_of_slot(a, global, lane);
        const int copy = reinterpret_cast<const int*>(token_row(a, global) + r.copies_at)[lane];
        if (row >= 0) {
            from = reinterpret_cast<u64>(a.rows + row * BYTES_OF_A_ROW);
        } else if (copy >= 0) {
            const u8* returned = window_of(r, r.rank) + r.returned_at;
            if (!MAPPED) returned += a.copy_ranks[copy] * (r.capacity * BYTES_OF_A_TOKEN);
            from = reinterpret_cast<u64>(returned + token * BYTES_OF_A_TOKEN + lane * BYTES_OF_A_ROW);
        }
        if (WEIGHTED) weight = a.weights[token * a.weights_row_stride + lane];
    }
    u32 live = __ballot_sync(WARP, from != 0);
    const int column = step * STRIDE + lane * VECTOR;
    float sum[STEPS_AT_ONCE][VECTOR] = {};
    while (live != 0) {
        uint4 v[AT_ONCE][STEPS_AT_ONCE];
        float w[AT_ONCE];
        const int count = __popc(live);
#pragma unroll
        for (int k = 0; k < AT_ONCE; ++k) {
            if (k >= count) break;
            const int slot = __ffs(live) - 1;
            live &= live - 1;
            const u8* row = reinterpret_cast<const u8*>(__shfl_sync(WARP, from, slot)) + column * 2;
            w[k] = __shfl_sync(WARP, weight, slot);
            // Through the L1, which the wait has emptied: other devices have stored some of these rows.
#pragma unroll
            for (int i = 0; i < STEPS_AT_ONCE; ++i)
                if (column + i * STRIDE < HIDDEN) v[k][i] = load_through_l1(row + i * STRIDE * 2);
        }
#pragma unroll
        for (int k = 0; k < AT_ONCE; ++k) {
            if (k >= count) break;
#pragma unroll
            for (int i = 0; i < STEPS_AT_ONCE; ++i)
                if (column + i * STRIDE < HIDDEN) add_values(sum[i], v[k][i], w[k]);
        }
    }
    u8* row = a.out + token * (i64)HIDDEN * (OUTPUT == 2 ? 4 : 2);
#pragma unroll
    for (int i = 0; i < STEPS_AT_ONCE; ++i)
        if (column + i * STRIDE < HIDDEN) store_output(row, column + i * STRIDE, sum[i]);
}

// The sums of the ranks that have one of a token's experts, in the order of ranks.
__device__ __forceinline__ void sum_parts(const CombineArgs& a, int token, int step) {
    const RankArgs& r = a.ranks;
    const int lane = lane_of_thread();
    const i64 global = (i64)r.rank * r.capacity + token;
    const int copy = lane < TOPK ? reinterpret_cast<const int*>(token_row(a, global) + r.copies_at)[lane] : -1;
    const int copy_rank = copy >= 0 ? a.copy_ranks[copy] : -1;
    const int column = step * STRIDE + lane * VECTOR;
    float sum[VECTOR] = {};
    for (int from = 0; from < r.ranks; ++from) {
        if (!__any_sync(WARP, copy_rank == from) || column >= HIDDEN) continue;
        const u8* part =
            window_of(r, r.rank) + r.returned_at + ((i64)from * r.capacity + token) * BYTES_OF_A_SUM + column * 4;
#pragma unroll
        for (int i = 0; i < VECTOR; i += 4) {
            const uint4 v = load_through_l1(part + 4 * i);
            sum[i] = __fadd_rn(sum[i], __uint_as_float(v.x));
            sum[i + 1] = __fadd_rn(sum[i + 1], __uint_as_float(v.y));
            sum[i + 2] = __fadd_rn(sum[i + 2], __uint_as_float(v.z));
            sum[i + 3] = __fadd_rn(sum[i + 3], __uint_as_float(v.w));
        }
    }
    if (column < HIDDEN) store_output(a.out + token * (i64)HIDDEN * (OUTPUT == 2 ? 4 : 2), column, sum);
}

template <int STEPS_AT_ONCE>
__device__ __forceinline__ void receive_results(const CombineArgs& a) {
    constexpr int UNITS = (STEPS + STEPS_AT_ONCE - 1) / STEPS_AT_ONCE;
    wait_for_previous_launch();
    if (!is_broken(a.ranks)) wait_for_ranks(a.ranks, 1);
    let_next_launch_start();
    const i64 unit = (i64)blockIdx.x * (THREADS / 32) + (threadIdx.x >> 5);
    const int token = (int)(unit / UNITS);
    if (token >= a.ranks.tokens) return;
    const int first = (int)(unit % UNITS) * STEPS_AT_ONCE;
#if ROWS
    sum_rows<STEPS_AT_ONCE>(a, token, first);
#else
    for (int step = first; step < min(first + STEPS_AT_ONCE, STEPS); ++step) sum_parts(a, token, step);
#endif
}

extern "C" __global__ void __launch_bounds__(THREADS, 6) combine_receive(const __grid_constant__ CombineArgs a) {
    receive_results<2>(a);
}

extern "C" __global__ void __launch_bounds__(THREADS, 6) combine_receive_few(const __grid_constant__ CombineArgs a) {
    receive_results<1>(a);
}
