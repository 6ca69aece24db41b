// Permute: copies each row, as it is, to the row of every live slot of its token: e4m3 with scales, or any elements
// without. Tokens without a local expert are not read.
//
// Set by the host: TOPK, ROW_BYTES, VECTOR (bytes moved at a time: 16, 8, 4, 2 or 1), ZERO_ROWS, SCALED, HOST_THREADS
// (of a block); and where SCALED: WIDTH, GROUP, SCALE_LAYOUT (0 row-major, 1 MN-major, 2 packed UE8M0 out of bytes).
#include "rows/rows.cuh"
#if SCALED
#include "common/scales.cuh"
#endif

template <int BYTES>
struct VectorOf;
template <>
struct VectorOf<16> {
    typedef uint4 Type;
};
template <>
struct VectorOf<8> {
    typedef uint2 Type;
};
template <>
struct VectorOf<4> {
    typedef u32 Type;
};
template <>
struct VectorOf<2> {
    typedef u16 Type;
};
template <>
struct VectorOf<1> {
    typedef u8 Type;
};
typedef VectorOf<VECTOR>::Type Vector;

constexpr int THREADS = HOST_THREADS;
constexpr int VECTORS = ROW_BYTES / VECTOR;
constexpr int STEPS = (VECTORS + 31) / 32;
// A row is cut into units of at most 8 loads a lane, all in flight at once.
constexpr int UNITS = (STEPS + 7) / 8;
constexpr int STEPS_PER_UNIT = (STEPS + UNITS - 1) / UNITS;

#if SCALED
// A word of a token's scales, four bytes to a word where they are packed.
__device__ __forceinline__ u32 word_of_token(const RowsArgs& a, int token, int word) {
    const i64 row = token * a.x_scales_row_stride;
    if (!IS_PACKED) return static_cast<const u32*>(a.x_scales)[row + word * a.x_scales_col_stride];
    u32 packed = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i)
        if (4 * word + i < GROUPS)
            packed |= (u32) static_cast<const u8*>(a.x_scales)[row + (4 * word + i) * a.x_scales_col_stride] << (8 * i);
    return packed;
}
#endif

extern "C" __global__ void __launch_bounds__(THREADS, 2) permute(const __grid_constant__ RowsArgs a) {
    wait_for_previous_launch();
    const int lane = lane_of_thread();
    const int warp = (threadIdx.x >> 5) * gridDim.x + blockIdx.x;
    const int warps = gridDim.x * (THREADS / 32);
    for (i64 unit = warp; unit < (i64)a.tokens * UNITS; unit += warps) {
        const int token = (int)(unit / UNITS);
        const int rows = lane < TOPK ? a.inv_perm[(i64)token * TOPK + lane] : -1;
        if (!__any_sync(WARP, rows >= 0)) continue;
        const int first = (int)(unit % UNITS) * STEPS_PER_UNIT * 32 + lane;
        const Vector* row = reinterpret_cast<const Vector*>(static_cast<const u8*>(a.x) + token * a.x_row_stride);
        Vector v[STEPS_PER_UNIT];
#pragma unroll
        for (int i = 0; i < STEPS_PER_UNIT; ++i) v[i] = first + 32 * i < VECTORS ? row[first + 32 * i] : Vector();
#pragma unroll
        for (int i = 0; i < STEPS_PER_UNIT; ++i)
            store_copies<Vector>(a.out, v[i], ROW_BYTES, (i64)(first + 32 * i) * VECTOR, first + 32 * i < VECTORS,
                                 rows);
    }
#if SCALED
    const auto token_of = [&](int row) { return row < a.m_sum ? a.row_tokens[row] : -1; };
    zero_padding_groups(a.scales, a.m_sum, warp, warps, token_of);
    spread_scales(a.scales, a.m_sum, warp, warps, token_of, [&](int token, int quad) {
        u32 words[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) words[i] = 4 * quad + i < WORDS_PER_ROW ? word_of_token(a, token, 4 * quad + i) : 0;
        return make_uint4(words[0], words[1], words[2], words[3]);
    });
#endif
    if (ZERO_ROWS)
        zero_padding_rows<Vector>(a.out, ROW_BYTES, a.m_sum, warp, warps,
                                  [&](int row) { return a.row_tokens[row] >= 0; });
}
