// The layer in one launch: which experts have tokens. Every block finds out for itself.
#pragma once
#include "few_tokens/storage.cuh"
#include "route/route.cuh"

// Readies what find_live_experts counts in; before the threads meet. `thread` of `threads`.
__device__ __forceinline__ void clear_slots(SharedStorage& s, int thread, int threads) {
    for (int expert = thread; expert < HOST_EXPERTS; expert += threads) {
        s.first_slot[expert] = SLOTS;
        s.tokens_of[expert] = 0;
    }
}

// Experts that have tokens, in the order of their first slots, and which tokens; all threads of the block call, and may
// read the result afterwards. The first block notes bad ids.
__device__ __forceinline__ void find_live_experts(const RouteArgs& r, const float* router_weights, i64 weights_stride,
                                                  SharedStorage& s) {
    const int slots = r.tokens * TOPK;
    for (int slot = threadIdx.x; slot < slots; slot += THREADS) {
        const int expert = local_expert(r, slot, blockIdx.x == 0 ? r.status : nullptr);
        s.expert_of[slot] = expert;
        s.router_weights[slot] = router_weights[slot / TOPK * weights_stride + slot % TOPK];
        if (expert < 0) continue;
        atomicMin(&s.first_slot[expert], (u32)slot);
        atomicOr(&s.tokens_of[expert], 1u << slot / TOPK);
    }
    __syncthreads();
    if (threadIdx.x < 32) {
        int live = 0;
        for (int base = 0; base < slots; base += 32) {
            const int slot = base + threadIdx.x;
            const int expert = slot < slots ? s.expert_of[slot] : -1;
            const bool is_first = expert >= 0 && s.first_slot[expert] == slot;
            const u32 firsts = __ballot_sync(WARP, is_first);
            if (is_first) s.live_experts[live + __popc(firsts & ((1u << threadIdx.x) - 1u))] = expert;
            live += __popc(firsts);
        }
        if (threadIdx.x == 0) s.live = live;
    } else {
        for (int slot = threadIdx.x - 32; slot < slots; slot += THREADS - 32) {
            const int expert = s.expert_of[slot];
            int first = slot / TOPK * TOPK;
            if (expert < 0)
                first = -1;
            else
                while (s.expert_of[first] != expert) ++first;
            s.row_of[slot] = first;
        }
    }
    __syncthreads();
}

// The row at which results of a token and one of its experts are kept.
__device__ __forceinline__ int row_of_token(const SharedStorage& s, int token, int expert) {
    int slot = token * TOPK;
    while (s.expert_of[slot] != expert) ++slot;
    return slot;
}

// The n-th of the tokens in a mask; -1 if there are not as many.
__device__ __forceinline__ int nth_token(u32 tokens, int n) {
    for (; n > 0; --n) tokens &= tokens - 1;
    return __ffs((int)tokens) - 1;
}
