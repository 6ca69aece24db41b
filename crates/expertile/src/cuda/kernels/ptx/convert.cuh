// Conversions and comparisons that the hardware has an instruction for. Each comment ends with the PTX instruction.
#pragma once
#include "ptx/access.cuh"

// About 1 / d; a subnormal counts as zero. PTX: rcp.approx.ftz
__device__ __forceinline__ float approximate_reciprocal(float d) {
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(d));
    return r;
}

#if __CUDA_ARCH__ >= 890
// Two values to e4m3: nearest, ties to even, saturating at 448; NaN of either sign to 0x7f.
// PTX: cvt.rn.satfinite.e4m3x2
__device__ __forceinline__ u16 convert_to_e4m3(float low, float high) {
    u16 pair;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
    return pair;
}
#endif

// Halves of a packed pair of bf16 (TYPE 0) or f16, exactly, as f32. PTX: cvt.f32.f16
template <int TYPE>
__device__ __forceinline__ float low_half(u32 pair) {
    if (TYPE == 0) return __uint_as_float(pair << 16);
    float x;
    asm("{ .reg .f16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, l; }" : "=f"(x) : "r"(pair));
    return x;
}

template <int TYPE>
__device__ __forceinline__ float high_half(u32 pair) {
    if (TYPE == 0) return __uint_as_float(pair & 0xffff0000u);
    float x;
    asm("{ .reg .f16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, h; }" : "=f"(x) : "r"(pair));
    return x;
}

// Two f32 rounded to nearest even. PTX: cvt.rn.bf16x2, cvt.rn.f16x2
template <int TYPE>
__device__ __forceinline__ u32 pack_halves(float low, float high) {
    u32 pair;
    if (TYPE == 0)
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    else
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

// The larger of each half; a NaN loses to a number. PTX: max.bf16x2, max.f16x2
template <int TYPE>
__device__ __forceinline__ u32 larger_halves(u32 a, u32 b) {
    u32 c;
    if (TYPE == 0)
        asm("max.bf16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
    else
        asm("max.f16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
    return c;
}

// Four of the eight bytes low, high (0 to 7), each chosen by four bits of the selector's lower half: the bits below 8.
// PTX: prmt
__device__ __forceinline__ u32 permute_bytes(u32 low, u32 high, u32 selector) {
    u32 bytes;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(bytes) : "r"(low), "r"(high), "r"(selector));
    return bytes;
}

// Bytes of 0xff where a byte's highest bit is set, else of 0. PTX: prmt
__device__ __forceinline__ u32 spread_signs(u32 bytes) {
    u32 signs;
    asm("prmt.b32 %0, %1, 0, 0xba98;" : "=r"(signs) : "r"(bytes));
    return signs;
}

#if __CUDA_ARCH__ >= 900
// Sums of each half of a packed pair of bf16, rounded to nearest even. PTX: add.rn.bf16x2
__device__ __forceinline__ u32 add_bf16_pairs(u32 a, u32 b) {
    u32 c;
    asm("add.rn.bf16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
    return c;
}

// Products of each half of a packed pair of bf16, rounded to nearest even. PTX: mul.rn.bf16x2
__device__ __forceinline__ u32 multiply_bf16_pairs(u32 a, u32 b) {
    u32 c;
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
    return c;
}
#endif
