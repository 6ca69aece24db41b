// CUDA C++'s own words, as far as the kernels use them, in C++ for the CPU. Included before every kernel.
#pragma once
#include <cmath>
#include <cstring>
#include <ctime>

#include "machine.h"

#define __global__
#define __device__
#define __forceinline__ inline
#define __grid_constant__
#define __align__(bytes) alignas(bytes)
#define __launch_bounds__(...)
#define __cluster_dims__(...)

const EmulatedMachine* emulated_machine;
thread_local EmulatedThread* emulated_self;

extern "C" void emulated_connect(const EmulatedMachine* machine) { emulated_machine = machine; }
extern "C" void emulated_resume(EmulatedThread* thread) { emulated_self = thread; }

#define threadIdx (emulated_self->thread)
#define blockIdx (emulated_self->block)
#define blockDim (emulated_self->threads)
#define gridDim (emulated_self->blocks)

struct alignas(8) int2 {
    int x, y;
};
struct alignas(16) int4 {
    int x, y, z, w;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
inline unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }
inline long long min(long long a, long long b) { return a < b ? a : b; }
inline long long max(long long a, long long b) { return a > b ? a : b; }

// The bits of one value as another's.
template <typename To, typename From>
inline To emulated_bits(From from) {
    static_assert(sizeof(To) >= sizeof(From), "no bits are lost");
    To to{};
    memcpy(&to, &from, sizeof(From));
    return to;
}

inline float __uint_as_float(unsigned bits) { return emulated_bits<float>(bits); }
inline unsigned __float_as_uint(float x) { return emulated_bits<unsigned>(x); }

// Compiled without contraction: each rounds once.
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
// What it returns is hidden from GCC, which takes -(a * b - c) for -(a * b) + c though zeros differ in their sign.
inline float __fmaf_rn(float a, float b, float c) {
    float sum = fmaf(a, b, c);
    asm("" : "+m"(sum));
    return sum;
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }

inline unsigned long long emulated_nanoseconds() {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000ull + now.tv_nsec;
}

inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __syncthreads() { emulated_machine->meet_block(); }

template <typename T>
inline T __ldcg(const T* address) {
    return *address;
}

template <typename T>
inline T atomicAdd(T* address, T value) {
    return __atomic_fetch_add(address, value, __ATOMIC_SEQ_CST);
}

template <typename T>
inline T atomicOr(T* address, T value) {
    return __atomic_fetch_or(address, value, __ATOMIC_SEQ_CST);
}

template <typename T>
inline T atomicMin(T* address, T value) {
    T old = __atomic_load_n(address, __ATOMIC_SEQ_CST);
    while (value < old &&
           !__atomic_compare_exchange_n(address, &old, value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {
    }
    return old;
}

template <typename T>
inline T atomicMax(T* address, T value) {
    T old = __atomic_load_n(address, __ATOMIC_SEQ_CST);
    while (old < value &&
           !__atomic_compare_exchange_n(address, &old, value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {
    }
    return old;
}

// What the lanes of a warp tell each other. Masks are always the whole warp.
struct EmulatedWarp {
    unsigned long long lanes[32];

    template <typename T>
    explicit EmulatedWarp(T mine) {
        emulated_machine->exchange(emulated_bits<unsigned long long>(mine), lanes);
    }

    template <typename T>
    T of(int lane) const {
        T value;
        memcpy(&value, &lanes[lane & 31], sizeof(T));
        return value;
    }
};

inline int emulated_lane() { return threadIdx.x & 31; }

inline void __syncwarp() { EmulatedWarp everyone(0u); }

template <typename T>
inline T __shfl_sync(unsigned, T value, int lane) {
    return EmulatedWarp(value).of<T>(lane);
}

template <typename T>
inline T __shfl_xor_sync(unsigned, T value, int mask) {
    return EmulatedWarp(value).of<T>(emulated_lane() ^ mask);
}

template <typename T>
inline T __shfl_up_sync(unsigned, T value, int distance) {
    const EmulatedWarp warp(value);
    return emulated_lane() >= distance ? warp.of<T>(emulated_lane() - distance) : value;
}

inline unsigned __ballot_sync(unsigned, int predicate) {
    const EmulatedWarp warp((unsigned)(predicate != 0));
    unsigned votes = 0;
    for (int lane = 0; lane < 32; ++lane) votes |= warp.of<unsigned>(lane) << lane;
    return votes;
}

inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }

template <typename T>
inline unsigned __match_any_sync(unsigned, T value) {
    const EmulatedWarp warp(value);
    unsigned peers = 0;
    for (int lane = 0; lane < 32; ++lane) peers |= (unsigned)(warp.of<T>(lane) == value) << lane;
    return peers;
}

inline unsigned __reduce_add_sync(unsigned, unsigned value) {
    const EmulatedWarp warp(value);
    unsigned sum = 0;
    for (int lane = 0; lane < 32; ++lane) sum += warp.of<unsigned>(lane);
    return sum;
}
