// Where each slot goes: a stable counting sort by expert, done by one block. Set by the host: TOPK, IDS_I64,
// HOST_MAX_EXPERTS.
#pragma once
#include "common/search.cuh"
#include "ptx/access.cuh"
#include "route/scan.cuh"

constexpr int MAX_EXPERTS = HOST_MAX_EXPERTS;

// What was wrong with a call's ids, kept until the host asks; all zero means nothing. Of several offenders the first is
// kept, as the largest complement of its place, so that it does not depend on which block was first.
struct Status {
    u64 id;           // ~(token * TOPK + k) of the first id past the limit, above the id (held within 32 bits)
    u64 map_entry;    // ~(global id) of the first map entry past the local experts, above the entry
    u32 rows_needed;  // rows the routing needs, where they exceed m_sum
    u32 reserved;
};

struct Barrier {
    u32 arrived;
    u32 generation;
};

struct RouteArgs {
    const void* ids;        // [tokens, TOPK] i32 or i64
    const int* expert_map;  // [ids_limit], or null
    i64 ids_row_stride;
    i64 ids_col_stride;
    int* expert_num_tokens;
    int* expert_start;
    int* psum;
    int* m_indices;
    int* row_tokens;  // token of each row, -1 on padding
    int* inv_perm;
    int* header;     // live rows, rows up to the end of the last segment, tiles, 0 (for the GEMMs to count)
    int2* worklist;  // (expert, first row) of every row tile that holds a live row
    Status* status;
    Barrier* barrier;
    u16* chunk_counts;   // [chunks, experts rounded up to 8]
    int* second_header;  // as the header, of which the tiles are written, and 0 after them
    int2* second_worklist;
    int tokens;
    int experts;
    int ids_limit;
    int alignment;
    int m_sum;
    int row_tile;
    int worklist_capacity;
    int second_row_tile;  // 0 without a second worklist
    int second_capacity;
    int counted;    // words of `counters`
    u32* counters;  // zeroed, for a launch after this one
};

// The experts' totals, and where their segments and tiles start; in shared memory.
struct Experts {
    int total[MAX_EXPERTS];
    int start[MAX_EXPERTS];
    int tile[MAX_EXPERTS];
    int second_tile[MAX_EXPERTS];  // of the second worklist, if there is one
    u64 warp_sums[32];
    u32 second_sums[32];
    int live;
    int rows;
    int tiles;
    int second_tiles;
};

// n / d rounded up; by a shift where d is a power of two, as alignments mostly are.
struct CeilDiv {
    int divisor;
    int shift;

    __device__ __forceinline__ explicit CeilDiv(int d) : divisor(d), shift((d & (d - 1)) == 0 ? __ffs(d) - 1 : -1) {}
    __device__ __forceinline__ u32 operator()(u32 n) const {
        return shift >= 0 ? (n + divisor - 1) >> shift : (n + divisor - 1) / divisor;
    }
};

#if IDS_I64
typedef i64 Id;
#else
typedef int Id;
#endif

__device__ __forceinline__ const Id* id_of_slot(const RouteArgs& a, int slot) {
    const i64 at = (i64)(slot / TOPK) * a.ids_row_stride + (i64)(slot % TOPK) * a.ids_col_stride;
    return static_cast<const Id*>(a.ids) + at;
}

// The local expert of a slot's id; -1 for an empty or non-local one, and for one that `status` notes.
__device__ __forceinline__ int expert_of_id(const RouteArgs& a, int slot, i64 id, Status* status) {
    if (id < 0) return -1;
    if (id >= a.ids_limit) {
        if (status != nullptr) atomicMax(&status->id, (u64)(~(u32)slot) << 32 | (u32)min(id, (i64)0xffffffff));
        return -1;
    }
    if (a.expert_map == nullptr) return (int)id;
    const int expert = a.expert_map[id];
    if (expert >= a.experts) {
        if (status != nullptr) atomicMax(&status->map_entry, (u64)(~(u32)id) << 32 | (u32)expert);
        return -1;
    }
    return expert < 0 ? -1 : expert;
}

__device__ __forceinline__ int local_expert(const RouteArgs& a, int slot, Status* status) {
    return expert_of_id(a, slot, *id_of_slot(a, slot), status);
}

// The lanes of the warp that hold the same expert as this one, if it holds one (not -1). match.any takes time for every
// distinct value; where most lanes differ, a vote for each bit is faster.
__device__ __forceinline__ u32 peers_of(int expert, int experts) {
    constexpr int FEW_EXPERTS = 64;
    if (experts <= FEW_EXPERTS) return __match_any_sync(WARP, expert);
    u32 peers = __ballot_sync(WARP, expert >= 0);
    for (int bits = 0; (experts - 1) >> bits != 0; bits += 4) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const bool set = (expert >> (bits + i) & 1) != 0;
            const u32 vote = __ballot_sync(WARP, set);
            peers &= set ? vote : ~vote;
        }
    }
    return peers;
}

// How many slots this warp has seen of the lane's expert before it: in earlier calls (`seen`, the warp's own counters,
// which it brings up to date) and in lower lanes. Every lane of the warp calls.
__device__ __forceinline__ int rank_in_warp(int expert, int experts, u16* seen) {
    const u32 peers = peers_of(expert, experts);
    const int before = expert >= 0 ? seen[expert] : 0;
    __syncwarp();
    const int lane = lane_of_thread();
    if (expert >= 0 && (peers >> lane) == 1u) seen[expert] = (u16)(before + __popc(peers));
    __syncwarp();
    return before + __popc(peers & ((1u << lane) - 1u));
}

// From the experts' totals to the starts of their segments (multiples of `alignment`) and tiles, by a scan over all of
// them: alignments in the low half of a word and tiles in its high one, and the second worklist's tiles by themselves.
// The block's threads take EACH consecutive experts; all of them call, and all may read the result afterwards.
template <int THREADS>
__device__ __forceinline__ void plan_experts(Experts& s, int experts, int alignment, int row_tile,
                                             int second_row_tile) {
    constexpr int EACH = (MAX_EXPERTS + THREADS - 1) / THREADS;
    constexpr int HALF = 32;
    const int thread = threadIdx.x;
    const CeilDiv segments(alignment);
    const CeilDiv tiles(row_tile);
    const bool has_second = second_row_tile > 0;
    const CeilDiv second_tiles(has_second ? second_row_tile : row_tile);
    const int first = thread * EACH;
    const int lane = lane_of_thread();
    const int warp = thread >> 5;
    u64 pair[EACH];
    u32 second[EACH];
    u64 sum = 0;
    u32 second_sum = 0;
    u32 live = 0;
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        const u32 total = first + i < experts ? s.total[first + i] : 0;
        pair[i] = (u64)tiles(total) << HALF | segments(total);
        second[i] = has_second ? second_tiles(total) : 0;
        sum += pair[i];
        second_sum += second[i];
        live += total;
    }
    // Warps without experts take part in the barriers only.
    const bool has_experts = warp * 32 * EACH < experts;
    u64 scanned = 0;
    u32 second_scanned = 0;
    if (has_experts) {
        scanned = scan_warp(sum);
        if (has_second) second_scanned = scan_warp(second_sum);
        live = __reduce_add_sync(WARP, live);
        if (lane == 0) atomicAdd(&s.live, (int)live);
        if (lane == 31) {
            s.warp_sums[warp] = scanned;
            s.second_sums[warp] = second_scanned;
        }
    }
    __syncthreads();
    if (has_experts) {
        const int warps = (experts + 32 * EACH - 1) / (32 * EACH);
        const u64 sums = scan_warp(lane < warps ? s.warp_sums[lane] : 0);
        const u64 earlier = __shfl_sync(WARP, sums, (warp + 31) & 31);
        u64 before = scanned - sum + (warp > 0 ? earlier : 0);
        u32 second_before = 0;
        if (has_second) {
            const u32 second_earlier =
                __shfl_sync(WARP, scan_warp(lane < warps ? s.second_sums[lane] : 0), (warp + 31) & 31);
            second_before = second_scanned - second_sum + (warp > 0 ? second_earlier : 0);
        }
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            if (first + i < experts) {
                s.start[first + i] = (int)(u32)before * alignment;
                s.tile[first + i] = (int)(before >> HALF);
                if (has_second) s.second_tile[first + i] = (int)second_before;
            }
            before += pair[i];
            second_before += second[i];
        }
        if (first < experts && first + EACH >= experts) {
            s.rows = (int)(u32)before * alignment;
            s.tiles = (int)(before >> HALF);
            s.second_tiles = (int)second_before;
        }
    }
    __syncthreads();
}

// n / d rounded up, for n of at most 8192, given floor(2^31 / d). Exact: over the multiple of d that is in n, what the
// inverse is too small by adds up to less than 8192; where n reaches d the inverse is more, and what is left of n
// counts it at least once.
__device__ __forceinline__ u32 few_ceil_div(u32 n, u32 inverse) {
    return (u32)(((u64)n * inverse + 0x7fffffffu) >> 31);
}

// As plan_experts, for at most 8192 slots and as many experts as there are threads, in the order of `thread`: the
// threads of a warp add up for themselves what the warps before theirs have, and nobody waits. The block's threads have
// to meet before they read the result. The inverses are few_ceil_div's; the second tile's is 0 without a second
// worklist.
__device__ __forceinline__ void plan_few_slots(Experts& s, int thread, int experts, int alignment,
                                               u32 alignment_inverse, u32 tile_inverse, u32 second_inverse) {
    const int warp_first = thread & ~31;
    if (warp_first >= experts) return;
    const auto pair_of = [&](u32 total) {
        return few_ceil_div(total, tile_inverse) << 16 | few_ceil_div(total, alignment_inverse);
    };
    const u32 total = thread < experts ? s.total[thread] : 0;
    const u32 pair = pair_of(total);
    u32 before = 0;
    u32 second_before = 0;
    u32 live = total;
    for (int base = lane_of_thread(); base < warp_first; base += 8 * 32) {
        u32 earlier[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) earlier[i] = base + i * 32 < warp_first ? s.total[base + i * 32] : 0;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            before += pair_of(earlier[i]);
            if (second_inverse != 0) second_before += few_ceil_div(earlier[i], second_inverse);
            live += earlier[i];
        }
    }
    if (second_inverse != 0) {
        const u32 own = few_ceil_div(total, second_inverse);
        const u32 second_end = scan_warp(own) + __reduce_add_sync(WARP, second_before);
        if (thread < experts) s.second_tile[thread] = (int)(second_end - own);
        if (thread == experts - 1) s.second_tiles = (int)second_end;
    }
    const u32 end = scan_warp(pair) + __reduce_add_sync(WARP, before);
    if (thread < experts) {
        s.start[thread] = (int)((end - pair) & 0xffffu) * alignment;
        s.tile[thread] = (int)((end - pair) >> 16);
    }
    if (warp_first + 32 < experts) return;
    live = __reduce_add_sync(WARP, live);
    if (thread == experts - 1) {
        s.live = live;
        s.rows = (int)(end & 0xffffu) * alignment;
        s.tiles = (int)(end >> 16);
    }
}

// The lists of experts, the header, and zeros in the counters; `thread` of `threads`. Ends are held within m_sum, so that
// a kernel that walks the lists after a routing that does not fit stays inside the buffer.
__device__ __forceinline__ void write_experts(const RouteArgs& a, const Experts& s, int thread, int threads) {
    for (int expert = thread; expert < a.experts; expert += threads) {
        const int start = min(s.start[expert], a.m_sum);
        const int end = min(s.start[expert] + s.total[expert], a.m_sum);
        a.expert_num_tokens[expert] = end - start;
        a.expert_start[expert] = start;
        a.psum[expert] = end;
    }
    for (int i = thread; i < a.counted; i += threads) a.counters[i] = 0;
    if (thread == 0) {
        a.header[0] = s.live;
        a.header[1] = min(s.rows, a.m_sum);
        a.header[2] = min(s.tiles, a.worklist_capacity);
        a.header[3] = 0;
        if (a.second_row_tile > 0) {
            a.second_header[2] = min(s.second_tiles, a.second_capacity);
            a.second_header[3] = 0;
        }
        if (s.rows > a.m_sum) atomicMax(&a.status->rows_needed, (u32)s.rows);
    }
}

// A list by tile: threads of the whole grid share it; `thread` of `threads`.
__device__ __forceinline__ void write_tiles(int2* list, int tiles, int row_tile, const int* first_tile,
                                            const Experts& s, int experts, int thread, int threads) {
    for (int tile = thread; tile < tiles; tile += threads) {
        const int expert = last_not_above(first_tile, experts, tile);
        list[tile] = make_int2(expert, s.start[expert] + (tile - first_tile[expert]) * row_tile);
    }
}

__device__ __forceinline__ void write_worklists(const RouteArgs& a, const Experts& s, int thread, int threads) {
    write_tiles(a.worklist, min(s.tiles, a.worklist_capacity), a.row_tile, s.tile, s, a.experts, thread, threads);
    if (a.second_row_tile > 0)
        write_tiles(a.second_worklist, min(s.second_tiles, a.second_capacity), a.second_row_tile, s.second_tile, s,
                    a.experts, thread, threads);
}

// The row of a slot, and the slot's token at that row.
__device__ __forceinline__ void write_slot(const RouteArgs& a, int slot, int row) {
    a.inv_perm[slot] = row;
    if (row >= 0) a.row_tokens[row] = slot / TOPK;
}

// The lists by row, found row by row: as fast for one long segment as for many short ones. Tokens of live rows are
// write_slot's.
__device__ __forceinline__ void write_m_indices(const RouteArgs& a, const Experts& s, int thread, int threads) {
    for (int row = thread; row < a.m_sum; row += threads) {
        int value = -1;
        if (row < s.rows) {
            const int expert = last_not_above(s.start, a.experts, row);
            if (row < s.start[expert] + s.total[expert]) value = expert;
        }
        a.m_indices[row] = value;
        if (value < 0) a.row_tokens[row] = -1;
    }
}
