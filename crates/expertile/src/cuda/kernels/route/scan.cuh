// Running sums.
#pragma once
#include "common/words.cuh"

// The sum of the values of all lanes up to and with this one. Every lane of the warp calls.
template <typename T>
__device__ __forceinline__ T scan_warp(T x) {
    const int lane = lane_of_thread();
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
        const T below = __shfl_up_sync(WARP, x, distance);
        if (lane >= distance) x += below;
    }
    return x;
}
