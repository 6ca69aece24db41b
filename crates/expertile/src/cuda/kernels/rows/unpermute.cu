// Rows back to their tokens: out[m, :] = sum over k of weights[m, k] * rows[inv_perm[m, k], :], in f32 and in the order
// of k, each product and each sum rounded once. Empty slots are skipped.
//
// Set by the host: HIDDEN, TOPK, INPUT (0 bf16, 1 f16, 2 f32), OUTPUT (the same), WEIGHTED, VECTOR (elements a lane
// takes at a time: 16 bytes of them, or 1 where H or an address does not allow it), HOST_THREADS (of a block).
#include "common/quantize.cuh"

struct UnpermuteArgs {
    const void* rows;  // [m_sum, HIDDEN]
    const int* inv_perm;
    const float* weights;  // [tokens, TOPK]
    i64 weights_row_stride;
    void* out;  // [tokens, HIDDEN]
    int tokens;
    int m_sum;
};

constexpr int THREADS = HOST_THREADS;
constexpr int STEPS = (HIDDEN + 32 * VECTOR - 1) / (32 * VECTOR);
constexpr int BYTES_IN = INPUT == 2 ? 4 : 2;
constexpr int BYTES_OUT = OUTPUT == 2 ? 4 : 2;
// A lane's VECTOR elements, as they stand in memory.
struct Elements {
    u32 word[4];
};

template <bool THROUGH_L1>
__device__ __forceinline__ Elements load_elements(const u8* from) {
    Elements e;
    if (VECTOR == 1) {
        e.word[0] = BYTES_IN == 4 ? *reinterpret_cast<const u32*>(from) : *reinterpret_cast<const u16*>(from);
    } else {
        const uint4 v = THROUGH_L1 ? load_through_l1(from) : load_once(from);
        e.word[0] = v.x, e.word[1] = v.y, e.word[2] = v.z, e.word[3] = v.w;
    }
    return e;
}

__device__ __forceinline__ float element(const Elements& e, int i) {
    if (INPUT == 2) return __uint_as_float(e.word[i]);
    return i % 2 == 0 ? low_half<INPUT>(e.word[i / 2]) : high_half<INPUT>(e.word[i / 2]);
}

template <bool BRIEF, typename Words>
__device__ __forceinline__ void store_words(u8* to, Words words) {
    if (BRIEF)
        store_brief(to, words);
    else
        *reinterpret_cast<Words*>(to) = words;
}

template <bool BRIEF>
__device__ __forceinline__ void store_sums(u8* to, const float (&sum)[VECTOR]) {
    if (VECTOR == 1) {
        if (OUTPUT == 2)
            *reinterpret_cast<float*>(to) = sum[0];
        else
            *reinterpret_cast<u16*>(to) = (u16)pack_halves<OUTPUT>(sum[0], 0.0f);
        return;
    }
    constexpr int WORDS = VECTOR * BYTES_OUT / 4;
    u32 word[WORDS > 0 ? WORDS : 1];
#pragma unroll
    for (int i = 0; i < WORDS; ++i) {
        if (OUTPUT == 2)
            word[i] = __float_as_uint(sum[i]);
        else
            word[i] = pack_halves<OUTPUT>(sum[2 * i], sum[(2 * i + 1) % VECTOR]);
    }
    if (WORDS == 2) {
        store_words<BRIEF>(to, make_uint2(word[0], word[1 % (WORDS > 0 ? WORDS : 1)]));
    } else {
#pragma unroll
        for (int i = 0; i + 3 < WORDS; i += 4)
            store_words<BRIEF>(to + 4 * i, make_uint4(word[i], word[i + 1], word[i + 2], word[i + 3]));
    }
}

struct Slots {
    int row;  // lane k holds the k-th slot's, -1 for none
    float weight;
};

__device__ __forceinline__ Slots load_slots(const UnpermuteArgs& a, i64 token) {
    Slots s = {-1, 1.0f};
    const int lane = lane_of_thread();
    if (lane < TOPK && token < a.tokens) {
        s.row = a.inv_perm[token * TOPK + lane];
        if (s.row >= a.m_sum) s.row = -1;
        if (WEIGHTED) s.weight = a.weights[token * a.weights_row_stride + lane];
    }
    return s;
}

// Adds STEPS_AT_ONCE steps of a token's row, from `column` on, of all live slots, lowest first; the rows of AT_ONCE
// slots are in flight before the first is added.
template <int STEPS_AT_ONCE, int AT_ONCE, bool THROUGH_L1, bool BRIEF>
__device__ __forceinline__ void sum_steps(const UnpermuteArgs& a, const Slots& slots, u32 live, i64 token, int column) {
    constexpr int STRIDE = 32 * VECTOR;
    float sum[STEPS_AT_ONCE][VECTOR];
#pragma unroll
    for (int step = 0; step < STEPS_AT_ONCE; ++step)
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) sum[step][i] = 0.0f;
    while (live != 0) {
        Elements e[AT_ONCE][STEPS_AT_ONCE];
        float weight[AT_ONCE];
        const int count = __popc(live);
#pragma unroll
        for (int k = 0; k < AT_ONCE; ++k) {
            if (k >= count) break;
            const int slot = __ffs(live) - 1;
            live &= live - 1;
            const int row = __shfl_sync(WARP, slots.row, slot);
            weight[k] = __shfl_sync(WARP, slots.weight, slot);
            const u8* from = static_cast<const u8*>(a.rows) + ((i64)row * HIDDEN + column) * BYTES_IN;
#pragma unroll
            for (int step = 0; step < STEPS_AT_ONCE; ++step)
                if (column + step * STRIDE < HIDDEN)
                    e[k][step] = load_elements<THROUGH_L1>(from + step * STRIDE * BYTES_IN);
        }
#pragma unroll
        for (int k = 0; k < AT_ONCE; ++k) {
            if (k >= count) break;
#pragma unroll
            for (int step = 0; step < STEPS_AT_ONCE; ++step) {
#pragma unroll
                for (int i = 0; i < VECTOR; ++i) {
                    const float v = element(e[k][step], i);
                    sum[step][i] = __fadd_rn(sum[step][i], WEIGHTED ? __fmul_rn(weight[k], v) : v);
                }
            }
        }
    }
    u8* to = static_cast<u8*>(a.out) + (token * HIDDEN + column) * BYTES_OUT;
#pragma unroll
    for (int step = 0; step < STEPS_AT_ONCE; ++step)
        if (column + step * STRIDE < HIDDEN) store_sums<BRIEF>(to + step * STRIDE * BYTES_OUT, sum[step]);
}

// A warp takes UNIT steps of one token's row, and leaves: what comes next is up to the hardware, which evens out that
// some multiprocessors are slower at memory than others. Where few of the slots are live, more steps are in flight at
// once.
//
// LARGE: more than the L2 holds. Sums that it lets go first then save an H200 4 to 8 % of the time. Rows are read
// through the L1, which takes up to a third less time where they are in the L2, and 5 % less elsewhere, but where there
// is much to read and little of a token.
template <int UNIT, bool LARGE>
__device__ __forceinline__ void unpermute_unit(const UnpermuteArgs& a) {
    constexpr int UNITS = (STEPS + UNIT - 1) / UNIT;
    constexpr int STRIDE = 32 * VECTOR;
    const i64 unit = (i64)blockIdx.x * (THREADS / 32) + (threadIdx.x >> 5);
    const i64 token = unit / UNITS;
    if (token >= a.tokens) return;
    const Slots slots = load_slots(a, token);
    const u32 live = __ballot_sync(WARP, slots.row >= 0);
    const int column = (int)(unit % UNITS) * UNIT * STRIDE + lane_of_thread() * VECTOR;
    if (UNIT == 2 && (TOPK <= 4 || __popc(live) <= 4)) {
        sum_steps < 2, TOPK<4 ? TOPK : 4, !LARGE, LARGE>(a, slots, live, token, column);
    } else {
#pragma unroll 1
        for (int step = 0; step < UNIT; ++step)
            sum_steps < 1, TOPK<8 ? TOPK : 8, true, LARGE>(a, slots, live, token, column + step * STRIDE);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 8) unpermute(const __grid_constant__ UnpermuteArgs a) {
    wait_for_previous_launch();
    let_next_launch_start();
    unpermute_unit<2, false>(a);
}

// Few tokens of many slots: as many warps as there are steps.
extern "C" __global__ void __launch_bounds__(THREADS, 8) unpermute_few(const __grid_constant__ UnpermuteArgs a) {
    wait_for_previous_launch();
    let_next_launch_start();
    unpermute_unit<1, false>(a);
}

extern "C" __global__ void __launch_bounds__(THREADS, 8) unpermute_large(const __grid_constant__ UnpermuteArgs a) {
    wait_for_previous_launch();
    let_next_launch_start();
    unpermute_unit<2, true>(a);
}
