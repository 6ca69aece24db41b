// The activation between the GEMMs, its result quantized (or bf16): the same IEEE f32 operations as activation.rs. Where
// not GATED, rows in their places are quantized as they are. Only live rows are read. Which they are comes from psum and
// the alignment alone, so rows that a dispatcher delivered expanded and sorted do as well; the work is cut by live row,
// so a skewed routing is as fast as an even one.
//
// Set by the host: INTERMEDIATE (= WIDTH), GATED, QUANTIZED, INPUT_F16 (or bf16), HOST_THREADS (of a block),
// HOST_MAX_EXPERTS; where GATED: ALPHA, BETA, LIMITED and LIMIT (f32 bit patterns); where QUANTIZED: GROUP,
// SCALE_LAYOUT, POWER_OF_TWO.
#if GATED
#include "common/activation.cuh"
#endif
#include "common/scales.cuh"
#include "common/search.cuh"

constexpr int MAX_EXPERTS = HOST_MAX_EXPERTS;
constexpr int THREADS = HOST_THREADS;
constexpr int WARPS = THREADS / 32;
constexpr int SLABS = (INTERMEDIATE + SLAB - 1) / SLAB;
constexpr int HALVES = GATED ? 2 : 1;

struct ActivationArgs {
    const u16* gate_up;  // [m_sum, HALVES * INTERMEDIATE]
    const int* psum;
    void* out;    // [m_sum, INTERMEDIATE]
    u32* scales;  // of [m_sum, groups]
    int experts;
    int alignment;
    int m_sum;
    int reserved;
};

struct LiveRows {
    int start[MAX_EXPERTS];   // of each expert's segment
    int before[MAX_EXPERTS];  // live rows of the experts before it
    int end[MAX_EXPERTS];
    int warp_sums[WARPS];
    int all;
    int used;  // the end of the last segment
};

// Finds each expert's rows in psum; a psum that runs backwards or past the buffer counts as no rows.
__device__ __forceinline__ void find_live_rows(const ActivationArgs& a, LiveRows& s) {
    constexpr int EACH = (MAX_EXPERTS + THREADS - 1) / THREADS;
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
    for (int w = 0; w < WARPS; ++w) {
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
    const uint4 low = load_through_l1(from);
    const uint4 high = load_through_l1(from + 8);
    pairs[0] = low.x, pairs[1] = low.y, pairs[2] = low.z, pairs[3] = low.w;
    pairs[4] = high.x, pairs[5] = high.y, pairs[6] = high.z, pairs[7] = high.w;
#else
#pragma unroll
    for (int i = 0; i < PER_LANE / 2; ++i) pairs[i] = from[2 * i] | (u32)from[2 * i + 1] << 16;
#endif
}

// A lane's values of one slab of one row, as they stand in memory.
struct Raw {
    u32 gate[PER_LANE / 2];
#if GATED
    u32 up[PER_LANE / 2];
#endif
};

__device__ __forceinline__ void load_slab(const ActivationArgs& a, int row, int slab, Raw& raw) {
    const int column = slab * SLAB + lane_of_thread() * PER_LANE;
    if (column >= INTERMEDIATE) {
#pragma unroll
        for (int i = 0; i < PER_LANE / 2; ++i) {
            raw.gate[i] = 0;
#if GATED
            raw.up[i] = 0;
#endif
        }
        return;
    }
    const u16* from = a.gate_up + (i64)row * (HALVES * INTERMEDIATE) + column;
    load_values(from, raw.gate);
#if GATED
    load_values(from + INTERMEDIATE, raw.up);
#endif
}

// One slab of one row, and the word of its scales that the lane shares. Every lane of the warp calls.
__device__ __forceinline__ u32 activate_slab(const ActivationArgs& a, const Raw& raw, int row, int slab) {
    const int column = slab * SLAB + lane_of_thread() * PER_LANE;
    const bool active = column < INTERMEDIATE;
    float y[PER_LANE];
    float largest = 0.0f;
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i) {
        const u32 pair = raw.gate[i / 2];
        y[i] = i % 2 == 0 ? low_half<INPUT_F16>(pair) : high_half<INPUT_F16>(pair);
#if GATED
        const float up = i % 2 == 0 ? low_half<0>(raw.up[i / 2]) : high_half<0>(raw.up[i / 2]);
        y[i] = times_up(up, gated(y[i]));
#endif
        largest = fmaxf(largest, fabsf(y[i]));
    }
#if QUANTIZED
    const float scale = scale_of(group_max<GROUP>(largest), POWER_OF_TWO != 0);
    const uint4 bytes = quantize_values < POWER_OF_TWO != 0 > (y, scale);
    if (active) *reinterpret_cast<uint4*>(static_cast<u8*>(a.out) + (i64)row * INTERMEDIATE + column) = bytes;
    // A lane past the row may share the scale of a last group that is not whole.
    return word_of_scale(column / GROUP * GROUP < INTERMEDIATE ? scale : 0.0f);
#else
    if (!active) return 0;
    uint4* out = reinterpret_cast<uint4*>(static_cast<u16*>(a.out) + (i64)row * INTERMEDIATE + column);
    u32 pairs[PER_LANE / 2];
#pragma unroll
    for (int i = 0; i < PER_LANE / 2; ++i) pairs[i] = pack_halves<0>(y[2 * i], y[2 * i + 1]);
    out[0] = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    out[1] = make_uint4(pairs[4], pairs[5], pairs[6], pairs[7]);
    return 0;
#endif
}

// All live rows, a slab of ROWS of them at a time; the next slab is in flight while one is computed. Of the lanes that
// share a word of scales, the j-th keeps the j-th row's, so that the words of neighbouring rows, which are neighbours
// in memory, are stored together. Warps of the whole grid share the work; `warp` of `warps`.
template <int ROWS>
__device__ __forceinline__ void activate_rows(const ActivationArgs& a, const LiveRows& s, int warp, int warps) {
    const int mine = lane_of_thread() % LANES_PER_WORD;
    const i64 units = (i64)((s.all + ROWS - 1) / ROWS) * SLABS;
    i64 unit = warp;
    if (unit >= units) return;
    int live = (int)(unit / SLABS) * ROWS;
    int expert = last_not_above(s.before, a.experts, live);
    int row = s.start[expert] + live - s.before[expert];
    Raw next;
    load_slab(a, row, (int)(unit % SLABS), next);
    int kept_row = -1;
    u32 kept_word = 0;
    while (true) {
        const Raw raw = next;
        const int this_row = row;
        const int this_slab = (int)(unit % SLABS);
        const int j = live % ROWS;
        ++live;
        const bool unit_ends = j + 1 == ROWS || live == s.all;
        if (unit_ends) {
            unit += warps;
            live = (int)(unit / SLABS) * ROWS;
        }
        if (unit < units) {
            if (unit_ends) expert = last_not_above(s.before, a.experts, live);
            while (expert + 1 < a.experts && s.before[expert + 1] <= live) ++expert;
            row = s.start[expert] + live - s.before[expert];
            load_slab(a, row, (int)(unit % SLABS), next);
        }
        const u32 word = activate_slab(a, raw, this_row, this_slab);
        if (mine == j) {
            kept_row = this_row;
            kept_word = word;
        }
        if (!unit_ends) continue;
#if QUANTIZED
        const int column = this_slab * WORDS_PER_SLAB + lane_of_thread() / LANES_PER_WORD;
        if (kept_row >= 0 && column < WORDS_PER_ROW) a.scales[scale_word(kept_row, column, a.m_sum)] = kept_word;
#endif
        kept_row = -1;
        if (unit >= units) break;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) activation(const __grid_constant__ ActivationArgs a) {
    __shared__ LiveRows s;
    wait_for_previous_launch();
    find_live_rows(a, s);
    const int warp = (threadIdx.x >> 5) * gridDim.x + blockIdx.x;
    const int warps = gridDim.x * WARPS;
    constexpr int ROWS = LANES_PER_WORD < 8 ? LANES_PER_WORD : 8;
    if ((i64)s.all * SLABS > (i64)ROWS * warps)
        activate_rows<ROWS>(a, s, warp, warps);
    else
        activate_rows<1>(a, s, warp, warps);
#if QUANTIZED
    zero_padding_scales(
        a.scales, a.m_sum, a.experts, s.used, warp, warps, [&](int e) { return s.start[e]; },
        [&](int e) { return s.end[e]; });
#endif
}
