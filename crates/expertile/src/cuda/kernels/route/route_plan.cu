// Routing and plan in one launch, for any number of tokens: each block counts and ranks one chunk of the slots, the
// blocks meet once, and each then knows where its chunk's rows go. All blocks must be resident: launch it
// cooperatively.
//
// Set by the host: what route.cuh says; HOST_THREADS (of a block).
#include "route/route.cuh"

constexpr int THREADS = HOST_THREADS;
constexpr int WARPS = THREADS / 32;

// All blocks of the grid meet. The last to arrive resets the barrier, so that any number of blocks may meet at it next
// time.
__device__ __forceinline__ void meet(Barrier* barrier) {
    __syncthreads();
    if (threadIdx.x == 0 && gridDim.x > 1) {
        const u32 mine = load_now(&barrier->generation);
        __threadfence();
        if (atomicAdd(&barrier->arrived, 1u) == gridDim.x - 1) {
            barrier->arrived = 0;
            __threadfence();
            *const_cast<volatile u32*>(&barrier->generation) = mine + 1;
        } else {
            while (load_now(&barrier->generation) == mine) {
            }
        }
        __threadfence();
    }
    __syncthreads();
}

// Adds up the chunks' counts: all of them into s.total, those before this block's into `before`.
__device__ __forceinline__ void sum_chunks(const RouteArgs& a, int padded, Experts& s, int* before) {
    const int octets = padded / 8;
    const int rows_at_once = THREADS / octets;
    const int octet = threadIdx.x % octets;
    if (threadIdx.x / octets >= rows_at_once) return;
    int all[8] = {};
    int earlier[8] = {};
#pragma unroll 8
    for (int chunk = threadIdx.x / octets; chunk < gridDim.x; chunk += rows_at_once) {
        const uint4 c = __ldcg(reinterpret_cast<const uint4*>(a.chunk_counts + (i64)chunk * padded) + octet);
        const u32 pairs[4] = {c.x, c.y, c.z, c.w};
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const int count = (int)(pairs[i / 2] >> (16 * (i % 2)) & 0xffffu);
            all[i] += count;
            if (chunk < blockIdx.x) earlier[i] += count;
        }
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        if (8 * octet + i >= a.experts) break;
        if (all[i] != 0) atomicAdd(&s.total[8 * octet + i], all[i]);
        if (earlier[i] != 0) atomicAdd(&before[8 * octet + i], earlier[i]);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) route_plan(const __grid_constant__ RouteArgs a) {
    __shared__ Experts s;
    __shared__ int before[MAX_EXPERTS];
    extern __shared__ u16 seen[];  // [WARPS, experts]
    wait_for_previous_launch();

    const int warp = threadIdx.x >> 5;
    const int lane = lane_of_thread();
    const int slots = a.tokens * TOPK;
    const int rounds = (slots + gridDim.x * THREADS - 1) / (gridDim.x * THREADS);
    const int first = (blockIdx.x * WARPS + warp) * rounds * 32 + lane;
    for (int i = threadIdx.x; i < WARPS * a.experts; i += THREADS) seen[i] = 0;
    for (int i = threadIdx.x; i < MAX_EXPERTS; i += THREADS) s.total[i] = before[i] = 0;
    if (threadIdx.x == 0) s.live = 0;
    __syncthreads();

    // Few rounds stay in registers. Where there are more, ranks within the warp's part of the chunk wait in inv_perm,
    // written and read by the same thread.
    constexpr int AT_ONCE = 4;
    int expert[AT_ONCE];
    int rank[AT_ONCE];
    for (int round = 0; round < rounds; round += AT_ONCE) {
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) {
            const int slot = first + (round + i) * 32;
            expert[i] = round + i < rounds && slot < slots ? local_expert(a, slot, a.status) : -1;
        }
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) {
            if (round + i >= rounds) break;
            const int slot = first + (round + i) * 32;
            rank[i] = rank_in_warp(expert[i], a.experts, seen + warp * a.experts);
            if (rounds > AT_ONCE && slot < slots) a.inv_perm[slot] = rank[i];
        }
    }
    __syncthreads();

    const int padded = (a.experts + 7) & ~7;
    for (int expert = threadIdx.x; expert < padded; expert += THREADS) {
        int sum = 0;
        if (expert < a.experts) {
#pragma unroll
            for (int w = 0; w < WARPS; ++w) {
                const int count = seen[w * a.experts + expert];
                seen[w * a.experts + expert] = (u16)sum;
                sum += count;
            }
        }
        a.chunk_counts[(i64)blockIdx.x * padded + expert] = (u16)sum;
    }
    meet(a.barrier);
    let_next_launch_start();
    sum_chunks(a, padded, s, before);
    __syncthreads();
    plan_experts<THREADS>(s, a.experts, a.alignment, a.row_tile, a.second_row_tile);

    const auto row_of = [&](int e, int r) {
        const int row = e < 0 ? -1 : s.start[e] + before[e] + seen[warp * a.experts + e] + r;
        return row < a.m_sum ? row : -1;
    };
    if (rounds <= AT_ONCE) {
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) {
            const int slot = first + i * 32;
            if (i < rounds && slot < slots) write_slot(a, slot, row_of(expert[i], rank[i]));
        }
    } else {
        for (int round = 0; round < rounds; ++round) {
            const int slot = first + round * 32;
            if (slot < slots) write_slot(a, slot, row_of(local_expert(a, slot, nullptr), a.inv_perm[slot]));
        }
    }
    if (blockIdx.x == 0) write_experts(a, s, threadIdx.x, THREADS);
    const int thread = blockIdx.x * THREADS + threadIdx.x;
    write_worklists(a, s, thread, gridDim.x * THREADS);
    write_m_indices(a, s, thread, gridDim.x * THREADS);
}
