// The activation between the GEMMs, its result quantized (or bf16): the same IEEE f32 operations as activation.rs.
// Only live rows are read. Which they are comes from psum and the alignment alone, so rows that a dispatcher delivered
// expanded and sorted do as well; the work is cut by live row, so a skewed routing is as fast as an even one.
//
// Set by whoever compiles: INTERMEDIATE (= WIDTH), ALPHA, BETA, LIMITED and LIMIT (f32 bit patterns), QUANTIZED; where
// QUANTIZED: GROUP, SCALE_LAYOUT, POWER_OF_TWO.
#include "scales.cuh"

constexpr int MAX_EXPERTS = 1024;
constexpr int THREADS = 256;
constexpr int SLABS = (INTERMEDIATE + SLAB - 1) / SLAB;

struct ActivationArgs {
    const u16* gate_up;  // [m_sum, 2 INTERMEDIATE] bf16
    const int* psum;
    void* out;    // [m_sum, INTERMEDIATE]
    u32* scales;  // of [m_sum, groups]
    int experts;
    int alignment;
    int m_sum;
    int reserved;
};

// exp(x), |x| held within 87: two-part range reduction and a degree-6 polynomial, without contraction.
__device__ __forceinline__ float exp_held(float x) {
    x = x > 87.0f ? 87.0f : x;
    x = x < -87.0f ? -87.0f : x;
    const float shifted = __fadd_rn(__fmul_rn(x, 1.44269504088896340736f), 12582912.0f);
    const float n = __fsub_rn(shifted, 12582912.0f);
    float r = __fsub_rn(x, __fmul_rn(n, 0.693359375f));
    r = __fsub_rn(r, __fmul_rn(n, -2.12194440e-4f));
    float p = 1.0f / 720.0f;
    p = __fadd_rn(__fmul_rn(p, r), 1.0f / 120.0f);
    p = __fadd_rn(__fmul_rn(p, r), 1.0f / 24.0f);
    p = __fadd_rn(__fmul_rn(p, r), 1.0f / 6.0f);
    p = __fadd_rn(__fmul_rn(p, r), 0.5f);
    p = __fadd_rn(__fmul_rn(p, r), 1.0f);
    p = __fadd_rn(__fmul_rn(p, r), 1.0f);
    return __fmul_rn(p, __uint_as_float((__float_as_uint(shifted) << 23) + (127u << 23)));
}

__device__ __forceinline__ float activate(float gate, float up) {
#if LIMITED
    const float limit = __uint_as_float(LIMIT);
    gate = gate > limit ? limit : gate;
    up = up > limit ? limit : up;
    up = up < -limit ? -limit : up;
#endif
    const float x = __fmul_rn(__uint_as_float(ALPHA), gate);
    const float sigmoid = reciprocal(__fadd_rn(1.0f, exp_held(-x)));
    return __fmul_rn(__fadd_rn(up, __uint_as_float(BETA)), __fmul_rn(gate, sigmoid));
}

struct LiveRows {
    int start[MAX_EXPERTS];   // of each expert's segment
    int before[MAX_EXPERTS];  // live rows of the experts before it
    int end[MAX_EXPERTS];
    int warp_sums[THREADS / 32];
    int all;
    int used;  // the end of the last segment
};

// Finds each expert's rows in psum; a psum that runs backwards or past the buffer counts as no rows.
__device__ __forceinline__ void find_live_rows(const ActivationArgs& a, LiveRows& s) {
    constexpr int EACH = MAX_EXPERTS / THREADS;
    const int first = threadIdx.x * EACH;
    const int lane = lane_of_thread();
    const int warp = threadIdx.x >> 5;
    int count[EACH];
    int sum = 0;
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        const int expert = first + i;
        count[i] = 0;
        if (expert >= a.experts) continue;
        const u32 previous = expert > 0 ? a.psum[expert - 1] : 0;
        const u32 start = min((previous + a.alignment - 1) / a.alignment * a.alignment, (u32)a.m_sum);
        const u32 end = min((u32)max(a.psum[expert], 0), (u32)a.m_sum);
        count[i] = end > start ? end - start : 0;
        s.start[expert] = start;
        s.end[expert] = start + count[i];
        if (expert == a.experts - 1)
            s.used = min((start + count[i] + a.alignment - 1) / a.alignment * a.alignment, (u32)a.m_sum);
        sum += count[i];
    }
    int scanned = sum;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
        const int below = __shfl_up_sync(WARP, scanned, distance);
        if (lane >= distance) scanned += below;
    }
    if (lane == 31) s.warp_sums[warp] = scanned;
    __syncthreads();
    int before = scanned - sum;
    int all = 0;
#pragma unroll
    for (int w = 0; w < THREADS / 32; ++w) {
        if (w < warp) before += s.warp_sums[w];
        all += s.warp_sums[w];
    }
    if (threadIdx.x == 0) s.all = all;
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        if (first + i >= a.experts) break;
        s.before[first + i] = before;
        before += count[i];
    }
    __syncthreads();
}

__device__ __forceinline__ void load_values(const u16* from, u32 (&pairs)[PER_LANE / 2]) {
#if ALIGNED
    const uint4 low = load_once(from);
    const uint4 high = load_once(from + 8);
    pairs[0] = low.x, pairs[1] = low.y, pairs[2] = low.z, pairs[3] = low.w;
    pairs[4] = high.x, pairs[5] = high.y, pairs[6] = high.z, pairs[7] = high.w;
#else
#pragma unroll
    for (int i = 0; i < PER_LANE / 2; ++i) pairs[i] = from[2 * i] | (u32)from[2 * i + 1] << 16;
#endif
}

// One slab of one row. Every lane of the warp calls.
__device__ __forceinline__ void activate_slab(const ActivationArgs& a, int row, int slab) {
    const int lane = lane_of_thread();
    const int column = slab * SLAB + lane * PER_LANE;
    const bool active = column < INTERMEDIATE;
    float y[PER_LANE];
    float largest = 0.0f;
    if (active) {
        u32 gate[PER_LANE / 2];
        u32 up[PER_LANE / 2];
        const u16* from = a.gate_up + (i64)row * (2 * INTERMEDIATE) + column;
        load_values(from, gate);
        load_values(from + INTERMEDIATE, up);
#pragma unroll
        for (int i = 0; i < PER_LANE / 2; ++i) {
            y[2 * i] = activate(low_half<0>(gate[i]), low_half<0>(up[i]));
            y[2 * i + 1] = activate(high_half<0>(gate[i]), high_half<0>(up[i]));
            largest = fmaxf(largest, fmaxf(fabsf(y[2 * i]), fabsf(y[2 * i + 1])));
        }
    } else {
#pragma unroll
        for (int i = 0; i < PER_LANE; ++i) y[i] = 0.0f;
    }
#if QUANTIZED
    const float scale = scale_of(group_max<GROUP>(largest), POWER_OF_TWO != 0);
    const uint4 bytes = quantize_values<POWER_OF_TWO != 0, 2>(y, scale);
    if (active) *reinterpret_cast<uint4*>(static_cast<u8*>(a.out) + (i64)row * INTERMEDIATE + column) = bytes;
    store_slab_scales<1>(a.scales, active ? scale : 0.0f, slab, lane == 0 ? row : -1, a.m_sum);
#else
    if (!active) return;
    uint4* out = reinterpret_cast<uint4*>(static_cast<u16*>(a.out) + (i64)row * INTERMEDIATE + column);
    u32 pairs[PER_LANE / 2];
#pragma unroll
    for (int i = 0; i < PER_LANE / 2; ++i) pairs[i] = pack_halves<0>(y[2 * i], y[2 * i + 1]);
    out[0] = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    out[1] = make_uint4(pairs[4], pairs[5], pairs[6], pairs[7]);
#endif
}

extern "C" __global__ void __launch_bounds__(THREADS, 3) activation(const __grid_constant__ ActivationArgs a) {
    __shared__ LiveRows s;
    wait_for_previous_launch();
    let_next_launch_start();
    find_live_rows(a, s);
    const int warp = (threadIdx.x >> 5) * gridDim.x + blockIdx.x;
    const int warps = gridDim.x * (THREADS / 32);
    for (i64 unit = warp; unit < (i64)s.all * SLABS; unit += warps) {
        const int live = (int)(unit / SLABS);
        const int expert = last_not_above(s.before, a.experts, live);
        activate_slab(a, s.start[expert] + live - s.before[expert], (int)(unit % SLABS));
    }
#if QUANTIZED
    zero_padding_scales(
        a.scales, a.m_sum, a.experts, s.used, warp, warps, [&](int e) { return s.start[e]; }, [&](int e) { return s.end[e]; });
#endif
}
