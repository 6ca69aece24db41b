// Products of a block of K, for every kernel that multiplies.
#pragma once
#include "ptx/convert.cuh"
#include "ptx/wgmma.cuh"

constexpr int WARPGROUP = 128;
constexpr int SCALE_BLOCK = 128;  // values of a row that share a scale; of weights, also outputs
constexpr int ROW_BYTES = 128;    // of a block of K: the width of the 128-byte swizzle

// An mbarrier object. Addressed, never read or written as a value.
typedef u64 Mbarrier;

// offsetof, which NVRTC lacks: bytes from the start of shared memory to a member of the kernel's SharedStorage.
#define OFFSET(Storage, member) ((int)reinterpret_cast<u64>(&((Storage*)0)->member))

__device__ __forceinline__ u32 pack_bf16(float low, float high) { return pack_halves<0>(low, high); }

// Starts the products of a block of K for a warpgroup: sum = a * b^T where `add` is false, sum += a * b^T where it is
// true. `sum` may be read after wait_for_products.
template <Format FORMAT, int N>
__device__ __forceinline__ void start_products(float (&sum)[N / 2], u64 a, u64 b, bool add) {
    constexpr int INSTRUCTIONS = ROW_BYTES / 32;
    fence_accumulators(sum);
    begin_products();
#pragma unroll
    for (int i = 0; i < INSTRUCTIONS; ++i) multiply<FORMAT, N>(sum, a + 2 * i, b + 2 * i, add || i > 0);
    commit_products();
    fence_accumulators(sum);
}
