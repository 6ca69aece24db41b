// Combine: what the experts here said, back to the tokens' own ranks; and there, the sum over a token's slots.
//
// ROWS: each slot's bf16 row goes home, [capacity, TOPK, HIDDEN] there, and is summed as unpermute sums: in f32, in the
// order of slots, each product and each sum rounded once. Else each rank's f32 sum over its own experts goes home,
// [ranks, capacity, HIDDEN] there, and those of ranks that have one of the token's experts are added in their order.
// Of its own tokens a rank sends nothing.
//
// Where ranks are not mapped, all of it is first stored here, by home rank, and a library moves it; rows then come back
// by the rank that they come from, [ranks, capacity, TOPK, HIDDEN]. Where they are packed (COUNTED), both begin with
// those that there are, in the order of tokens and slots.
//
// Set by the host: HIDDEN, TOPK, ROWS, OUTPUT (0 bf16, 1 f16, 2 f32), WEIGHTED, MAPPED, COUNTED, HOST_THREADS (of a
// block).
#include "common/quantize.cuh"
#include "exchange/ranks.cuh"

struct CombineArgs {
    RankArgs ranks;
    const u8* rows;         // [m_sum, HIDDEN] bf16: what the experts here say
    const int* inv_perm;    // [ranks * capacity, TOPK]: the row of each slot of every rank, -1 for none here
    const int* copy_ranks;  // [copies]
    const float* weights;   // [tokens, TOPK]: this rank's tokens'
    i64 weights_row_stride;
    u8* out;  // [tokens, HIDDEN]
    int m_sum;
    int reserved;
};

constexpr int THREADS = HOST_THREADS;
constexpr int VECTOR = 8;            // values that a lane takes at a time
constexpr int STRIDE = 32 * VECTOR;  // and a warp
constexpr int HALF = VECTOR / 2;     // of sums a lane takes twice so many, so that a warp stores 512 bytes at once
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

// Where the results of tokens of another rank, `home`, go.
__device__ __forceinline__ u8* home_of(const CombineArgs& a, int home) {
    const RankArgs& r = a.ranks;
    if (!MAPPED) return r.outgoing + home * r.capacity * BYTES_OF_A_TOKEN;
    return window_of(r, home) + r.returned_at + (ROWS ? 0 : r.rank * r.capacity * BYTES_OF_A_TOKEN);
}

// Where the results of this rank's tokens come back from rank `from`.
__device__ __forceinline__ const u8* returned_from(const CombineArgs& a, int from) {
    const RankArgs& r = a.ranks;
    return window_of(r, r.rank) + r.returned_at + (ROWS && MAPPED ? 0 : from * r.capacity * BYTES_OF_A_TOKEN);
}

// The place of this rank's token in the batch that the experts here had; -1 where it was not sent here.
__device__ __forceinline__ i64 place_here(const RankArgs& r, int token) {
    const i64 first = (i64)r.rank * r.capacity;
    if (!COUNTED) return first + token;
    const int place = r.places[first + token];
    return place < 0 ? -1 : first + place;
}

// The row of each slot of this rank's token, a lane each, where its expert is here; else -1.
__device__ __forceinline__ int row_here(const CombineArgs& a, int token) {
    const i64 place = place_here(a.ranks, token);
    const int lane = lane_of_thread();
    return place >= 0 && lane < TOPK ? row_of_slot(a, place, lane) : -1;
}

// The rank of each slot's expert, a lane each; -1 for an empty slot.
__device__ __forceinline__ int rank_of_slot(const CombineArgs& a, int token) {
    const RankArgs& r = a.ranks;
    const int lane = lane_of_thread();
    if (lane >= TOPK) return -1;
    const int* copies = COUNTED ? r.copies + (i64)token * TOPK
                                : reinterpret_cast<const int*>(token_row(a, place_here(r, token)) + r.copies_at);
    const int copy = copies[lane];
    return copy >= 0 ? a.copy_ranks[copy] : -1;
}

// Which of a token's rows on the way back a slot's is, by the lanes that have one.
__device__ __forceinline__ int row_of_lane(u32 lanes, int slot) {
    return COUNTED ? __popc(lanes & ((1u << slot) - 1u)) : slot;
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
    const u32 all = live;
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
            to[k] = home + row_of_lane(all, slot) * BYTES_OF_A_ROW + column * 2;
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

// The first of a lane's columns of sums in a step, of each half.
__device__ __forceinline__ int column_of_half(int step, int half) {
    return step * STRIDE + half * (STRIDE / 2) + lane_of_thread() * HALF;
}

// A step of the weighted sum over a token's slots here.
__device__ __forceinline__ void sum_here(const CombineArgs& a, float (&sum)[VECTOR], int slot_row, float weight,
                                         int step) {
    const int columns[2] = {column_of_half(step, 0), column_of_half(step, 1)};
    u32 live = __ballot_sync(WARP, slot_row >= 0);
    while (live != 0) {
        const int slot = __ffs(live) - 1;
        live &= live - 1;
        const int row = __shfl_sync(WARP, slot_row, slot);
        const float w = __shfl_sync(WARP, weight, slot);
        const u8* from = a.rows + row * BYTES_OF_A_ROW;
        uint2 v[2] = {make_uint2(0, 0), make_uint2(0, 0)};
#pragma unroll
        for (int half = 0; half < 2; ++half)
            if (columns[half] < HIDDEN) v[half] = *reinterpret_cast<const uint2*>(from + columns[half] * 2);
        add_values(sum, make_uint4(v[0].x, v[0].y, v[1].x, v[1].y), w);
    }
}

__device__ __forceinline__ uint4 floats_of_half(const float (&sum)[VECTOR], int half) {
    return make_uint4(__float_as_uint(sum[half * HALF]), __float_as_uint(sum[half * HALF + 1]),
                      __float_as_uint(sum[half * HALF + 2]), __float_as_uint(sum[half * HALF + 3]));
}

// Results to the tokens' own ranks, in units of STEPS_AT_ONCE steps of a token; then the flag. Those of this rank's own
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
    const i64 units = (i64)(r.ranks - 1) * r.capacity * UNITS;
    for (i64 unit = warp; unit < units; unit += warps) {
        const int at = (int)(unit / UNITS);
        const int home = other_rank(r, at / r.capacity);
        const int token = at % r.capacity;
        const i64 place = (i64)home * r.capacity + token;
        const int row = lane < TOPK ? row_of_slot(a, place, lane) : -1;
        const u32 live = __ballot_sync(WARP, row >= 0);
        if (live == 0) continue;
        const int first = (int)(unit % UNITS) * STEPS_AT_ONCE;
#if ROWS
        const i64 rows_before =
            COUNTED ? *reinterpret_cast<const int*>(token_row(a, place) + r.place_at) : (i64)token * TOPK;
        send_rows<STEPS_AT_ONCE>(a, home_of(a, home) + rows_before * BYTES_OF_A_ROW, row, live, first);
#else
        u8* to = home_of(a, home) + token * BYTES_OF_A_SUM;
        float weight = 1.0f;
        if (WEIGHTED && row >= 0) weight = reinterpret_cast<const float*>(token_row(a, place) + r.weights_at)[lane];
        for (int step = first; step < min(first + STEPS_AT_ONCE, STEPS); ++step) {
            float sum[VECTOR] = {};
            sum_here(a, sum, row, weight, step);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int column = column_of_half(step, half);
                if (column < HIDDEN) *reinterpret_cast<uint4*>(to + column * 4) = floats_of_half(sum, half);
            }
        }
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
    const int row = row_here(a, token);
    const int slot_rank = rank_of_slot(a, token);
    u64 from = 0;
    float weight = 1.0f;
    if (WEIGHTED && lane < TOPK) weight = a.weights[token * a.weights_row_stride + lane];
    u32 peers = 0;  // lanes of the same rank
    for (int slot = 0; COUNTED && slot < TOPK; ++slot)
        if (__shfl_sync(WARP, slot_rank, slot) == slot_rank) peers |= 1u << slot;
    if (row >= 0) {
        from = reinterpret_cast<u64>(a.rows + row * BYTES_OF_A_ROW);
    } else if (slot_rank >= 0 && slot_rank != r.rank) {
        const i64 rows_before = COUNTED ? r.slot_places[(i64)slot_rank * r.capacity + token] : (i64)token * TOPK;
        const i64 its_row = rows_before + row_of_lane(peers, lane);
        from = reinterpret_cast<u64>(returned_from(a, slot_rank) + its_row * BYTES_OF_A_ROW);
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
    u8* out = a.out + token * (i64)HIDDEN * (OUTPUT == 2 ? 4 : 2);
#pragma unroll
    for (int i = 0; i < STEPS_AT_ONCE; ++i)
        if (column + i * STRIDE < HIDDEN) store_output(out, column + i * STRIDE, sum[i]);
}

// A step of the sums of the ranks that have one of a token's experts, in the order of ranks; `own` is this rank's.
__device__ __forceinline__ void sum_parts(const CombineArgs& a, int token, int slot_rank, const float (&own)[VECTOR],
                                          int step) {
    const RankArgs& r = a.ranks;
    const int columns[2] = {column_of_half(step, 0), column_of_half(step, 1)};
    float sum[VECTOR] = {};
    for (int from = 0; from < r.ranks; ++from) {
        if (!__any_sync(WARP, slot_rank == from)) continue;
        if (from == r.rank) {
#pragma unroll
            for (int i = 0; i < VECTOR; ++i) sum[i] = __fadd_rn(sum[i], own[i]);
            continue;
        }
        const i64 place = COUNTED ? r.places[(i64)from * r.capacity + token] : token;
        const u8* part = returned_from(a, from) + place * BYTES_OF_A_SUM;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            if (columns[half] >= HIDDEN) continue;
            const uint4 v = load_through_l1(part + columns[half] * 4);
            float* to = sum + half * HALF;
            to[0] = __fadd_rn(to[0], __uint_as_float(v.x));
            to[1] = __fadd_rn(to[1], __uint_as_float(v.y));
            to[2] = __fadd_rn(to[2], __uint_as_float(v.z));
            to[3] = __fadd_rn(to[3], __uint_as_float(v.w));
        }
    }
    u8* out = a.out + token * (i64)HIDDEN * (OUTPUT == 2 ? 4 : 2);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        if (columns[half] >= HIDDEN) continue;
#if OUTPUT == 2
        *reinterpret_cast<uint4*>(out + columns[half] * 4) = floats_of_half(sum, half);
#else
        const float* from = sum + half * HALF;
        *reinterpret_cast<uint2*>(out + columns[half] * 2) =
            make_uint2(pack_halves<OUTPUT>(from[0], from[1]), pack_halves<OUTPUT>(from[2], from[3]));
#endif
    }
}

template <int STEPS_AT_ONCE>
__device__ __forceinline__ void receive_results(const CombineArgs& a) {
    constexpr int UNITS = (STEPS + STEPS_AT_ONCE - 1) / STEPS_AT_ONCE;
    const RankArgs& r = a.ranks;
    wait_for_previous_launch();
    const i64 unit = (i64)blockIdx.x * (THREADS / 32) + (threadIdx.x >> 5);
    const int token = (int)(unit / UNITS);
    const int first = (int)(unit % UNITS) * STEPS_AT_ONCE;
#if !ROWS
    // What is here already is summed while the other ranks' sums are on their way.
    float own[STEPS_AT_ONCE][VECTOR] = {};
    int slot_rank = -1;
    if (token < r.tokens) {
        const int row = row_here(a, token);
        float weight = 1.0f;
        if (WEIGHTED && row >= 0) weight = a.weights[token * a.weights_row_stride + lane_of_thread()];
#pragma unroll
        for (int i = 0; i < STEPS_AT_ONCE; ++i) sum_here(a, own[i], row, weight, first + i);
        slot_rank = rank_of_slot(a, token);
    }
#endif
    if (!is_broken(r)) wait_for_ranks(r, 1);
    let_next_launch_start();
    if (!MAPPED && blockIdx.x == 0) note_faults(r);
    if (token >= r.tokens) return;
#if ROWS
    sum_rows<STEPS_AT_ONCE>(a, token, first);
#else
#pragma unroll
    for (int i = 0; i < STEPS_AT_ONCE; ++i)
        if (first + i < STEPS) sum_parts(a, token, slot_rank, own[i], first + i);
#endif
}

extern "C" __global__ void __launch_bounds__(THREADS, 6) combine_receive(const __grid_constant__ CombineArgs a) {
    receive_results<2>(a);
}

extern "C" __global__ void __launch_bounds__(THREADS, 6) combine_receive_few(const __grid_constant__ CombineArgs a) {
    receive_results<1>(a);
}
