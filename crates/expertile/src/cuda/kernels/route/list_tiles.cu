// The worklist of a GEMM over rows that came in their places: from `psum`, or from the expert of each row. One block
// makes the lists, and the others meanwhile copy the rows' scales to where the GEMM reads them.
//
// Set by the host: FROM_PSUM, else from m_indices; HOST_THREADS (of a block), at least HOST_MAX_EXPERTS.
#include "common/search.cuh"
#include "ptx/access.cuh"
#include "route/scan.cuh"

constexpr int THREADS = HOST_THREADS;
constexpr int WARPS = THREADS / 32;
static_assert(THREADS == 32 * 32 && THREADS >= HOST_MAX_EXPERTS,
              "a warp scans the warps' sums; a thread has an expert");

// What was wrong with the calls' lists, kept until the host asks; all zero means nothing. Each is the first offender of
// its kind, as the largest complement of its place above the value found there.
struct Notes {
    u64 expert;     // ~row above an id past the last expert
    u64 end_early;  // ~expert above an end that lies before the start of the expert's segment
    u64 end_late;   // ~expert above an end past the last row
    u64 reserved;
};

// host: Arguments in cuda/list_tiles.rs.
struct ListTilesArgs {
    const int* list;  // psum [experts], or m_indices [m_sum]
    int* header;      // 4 words, of which the number of entries and a 0 after it are written
    int2* worklist;   // (expert, first row)
    int* rows_left;   // of each entry, rows to its segment's end; one more than row_tile, where there are more
    Notes* notes;
    const float* scales;  // to be copied, or null
    float* mn_major;      // [groups, m_sum rounded up to 4]
    i64 scales_row_stride;
    i64 scales_col_stride;
    int experts;
    int m_sum;
    int alignment;  // of psum's segments
    int row_tile;
    int groups;
    int reserved;
};

__device__ __forceinline__ void note(u64* kind, int place, int value) {
    atomicMax(kind, (u64)(~(u32)place) << 32 | (u32)value);
}

struct Shared {
    u32 sums[WARPS];
    int highest[WARPS];
#if FROM_PSUM
    int first_tile[THREADS];
    int start[THREADS];
    int end[THREADS];
#endif
};

// The largest of the values of all threads up to and with this one. Every thread of the block calls.
__device__ __forceinline__ int scan_block_highest(int x, int* of_warps) {
    const int lane = lane_of_thread();
    const int warp = threadIdx.x >> 5;
    const auto scan = [&](int value) {
#pragma unroll
        for (int distance = 1; distance < 32; distance *= 2) {
            const int below = __shfl_up_sync(WARP, value, distance);
            if (lane >= distance) value = max(value, below);
        }
        return value;
    };
    const int mine = scan(x);
    if (lane == 31) of_warps[warp] = mine;
    __syncthreads();
    const int warps = scan(of_warps[lane]);
    const int before = __shfl_sync(WARP, warps, (warp + 31) & 31);
    __syncthreads();
    return warp > 0 ? max(mine, before) : mine;
}

// The sum of the values of all threads up to and with this one, and of all of them. Every thread of the block calls.
__device__ __forceinline__ u32 scan_block(u32 x, u32* of_warps, u32& all) {
    const int warp = threadIdx.x >> 5;
    const u32 mine = scan_warp(x);
    if (lane_of_thread() == 31) of_warps[warp] = mine;
    __syncthreads();
    const u32 warps = scan_warp(of_warps[lane_of_thread()]);
    const u32 before = __shfl_sync(WARP, warps, (warp + 31) & 31);
    all = __shfl_sync(WARP, warps, WARPS - 1);
    __syncthreads();
    return warp > 0 ? mine + before : mine;
}

#if FROM_PSUM
// A thread has an expert. An end that lies before the start of its segment counts as no rows, and one past the last row
// as that row's: no two segments have a row in common, whatever the list holds.
__device__ __forceinline__ u32 list_tiles(const ListTilesArgs& a, Shared& s) {
    const int expert = threadIdx.x;
    const int end = expert < a.experts ? a.list[expert] : 0;
    const int inside = min(max(end, 0), a.m_sum);
    const int highest = scan_block_highest(inside, s.highest);
    // Of the experts before: the scan again, one thread further.
    int earlier = __shfl_up_sync(WARP, highest, 1);
    if (lane_of_thread() == 31) s.highest[expert >> 5] = highest;
    __syncthreads();
    if (lane_of_thread() == 0) earlier = expert > 0 ? s.highest[(expert >> 5) - 1] : 0;
    const u32 alignment = a.alignment;
    const u32 start = ((u32)earlier + alignment - 1) / alignment * alignment;
    const u32 rows = (u32)inside > start ? inside - start : 0;
    if (expert < a.experts && (end < 0 || (u32)end < start)) note(&a.notes->end_early, expert, end);
    if (expert < a.experts && end > a.m_sum && (u32)end > start) note(&a.notes->end_late, expert, end);
    const u32 tiles = (rows + a.row_tile - 1) / a.row_tile;
    u32 all;
    s.first_tile[expert] = scan_block(tiles, s.sums, all) - tiles;
    s.start[expert] = start;
    s.end[expert] = start + rows;
    __syncthreads();
    for (int tile = threadIdx.x; tile < (int)all; tile += THREADS) {
        const int of = last_not_above(s.first_tile, a.experts, tile);
        const int first = s.start[of] + (tile - s.first_tile[of]) * a.row_tile;
        a.worklist[tile] = make_int2(of, first);
        a.rows_left[tile] = min(s.end[of] - first, a.row_tile + 1);
    }
    return all;
}
#else
constexpr int NOBODY = -1;

// The expert of a row that is in the buffer; NOBODY for padding and what is no expert's.
__device__ __forceinline__ int expert_of_row(const ListTilesArgs& a, int row) {
    if (row < 0 || row >= a.m_sum) return NOBODY;
    const int expert = a.list[row];
    return expert < 0 || expert >= a.experts ? NOBODY : expert;
}

// Rows of one expert that follow each other are a segment; an expert may have any number of them. A thread has EACH
// consecutive rows at a time, and writes the entries of the tiles that end among them.
__device__ __forceinline__ u32 list_tiles(const ListTilesArgs& a, Shared& s) {
    constexpr int EACH = 8;
    u32 listed = 0;
    int segment = 0;  // the first row of the segment that the last row so far belongs to
    for (i64 base = 0; base < a.m_sum; base += THREADS * EACH) {
        const i64 mine = base + threadIdx.x * EACH;
        const int first = (int)min(mine, (i64)a.m_sum);
        int expert[EACH + 2];
#pragma unroll
        for (int i = 0; i < EACH + 2; ++i) expert[i] = expert_of_row(a, first + i - 1);
        // The last start of a segment among these rows, then the one that the first of them belongs to.
        int last_start = 0;
#pragma unroll
        for (int i = 1; i <= EACH; ++i) {
            const int row = first + i - 1;
            if (row < a.m_sum && a.list[row] >= a.experts) note(&a.notes->expert, row, a.list[row]);
            if (expert[i] != expert[i - 1] || row == 0) last_start = row;
        }
        const int highest = max(scan_block_highest(last_start, s.highest), segment);
        int start = __shfl_up_sync(WARP, highest, 1);
        if (lane_of_thread() == 31) s.highest[threadIdx.x >> 5] = highest;
        __syncthreads();
        if (lane_of_thread() == 0) start = threadIdx.x > 0 ? s.highest[(threadIdx.x >> 5) - 1] : segment;
        segment = s.highest[WARPS - 1];
        // Which rows end a tile, as bits; the starts of their segments follow from walking once more.
        const int before = start;
        u32 ends = 0;
#pragma unroll
        for (int i = 1; i <= EACH; ++i) {
            const int row = first + i - 1;
            if (expert[i] != expert[i - 1] || row == 0) start = row;
            const bool last_of_segment = expert[i + 1] != expert[i];
            if (expert[i] != NOBODY && (last_of_segment || (row + 1 - start) % a.row_tile == 0)) ends |= 1u << i;
        }
        u32 all;
        u32 entry = listed + scan_block(__popc(ends), s.sums, all) - __popc(ends);
        start = before;
#pragma unroll
        for (int i = 1; i <= EACH; ++i) {
            const int row = first + i - 1;
            if (expert[i] != expert[i - 1] || row == 0) start = row;
            if ((ends >> i & 1) == 0) continue;
            const int rows = (row - start) % a.row_tile + 1;
            a.worklist[entry] = make_int2(expert[i], row + 1 - rows);
            a.rows_left[entry] = expert[i + 1] == expert[i] ? a.row_tile + 1 : rows;
            ++entry;
        }
        listed += all;
    }
    return listed;
}
#endif

// The rows' scales, MN-major: a thread has some groups of a row at a time, and a warp's rows follow each other.
__device__ __forceinline__ void copy_scales(const ListTilesArgs& a, int thread, int threads) {
    constexpr int AT_ONCE = 8;
    const i64 stride = ((i64)a.m_sum + 3) & ~3;
    const i64 units = (i64)a.m_sum * ((a.groups + AT_ONCE - 1) / AT_ONCE);
    for (i64 unit = thread; unit < units; unit += threads) {
        const int first = (int)(unit / a.m_sum) * AT_ONCE;
        const i64 row = unit % a.m_sum;
        const float* from = a.scales + row * a.scales_row_stride + first * a.scales_col_stride;
        float scales[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) scales[i] = first + i < a.groups ? from[i * a.scales_col_stride] : 0.0f;
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i)
            if (first + i < a.groups) a.mn_major[(first + i) * stride + row] = scales[i];
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) list_tiles(const __grid_constant__ ListTilesArgs a) {
    __shared__ Shared s;
    wait_for_previous_launch();
    if (blockIdx.x > 0) {
        copy_scales(a, (blockIdx.x - 1) * THREADS + threadIdx.x, (gridDim.x - 1) * THREADS);
        return;
    }
    const u32 entries = list_tiles(a, s);
    if (threadIdx.x == 0) {
        a.header[2] = (int)entries;
        a.header[3] = 0;
    }
}
