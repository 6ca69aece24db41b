// The activation's value: the same IEEE f32 operations as activation.rs.
//
// Set by the host: ALPHA, BETA, LIMITED and LIMIT (f32 bit patterns).
#pragma once
#include "common/quantize.cuh"

// 1 + exp(x), |x| held within 87: one step of range reduction and a degree-5 polynomial, all fused.
__device__ __forceinline__ float one_plus_exp(float x) {
    // fminf would turn a NaN into 87. Unless alpha is zero or not finite, only a gate that is NaN makes one, and then
    // the product with the gate is NaN all the same.
    constexpr u32 ALPHA_MAGNITUDE = ALPHA & 0x7fffffffu;
    if (ALPHA_MAGNITUDE > 0 && ALPHA_MAGNITUDE < 0x7f800000u) {
        x = fmaxf(fminf(x, 87.0f), -87.0f);
    } else {
        x = x > 87.0f ? 87.0f : x;
        x = x < -87.0f ? -87.0f : x;
    }
    const float shifted = __fmaf_rn(x, 1.44269504088896340736f, 12582912.0f);
    const float n = __fsub_rn(shifted, 12582912.0f);
    const float r = __fmaf_rn(n, -0.693147180559945309f, x);
    float p = 0.0083125f;
    p = __fmaf_rn(p, r, 0.04189033f);
    p = __fmaf_rn(p, r, 0.16667115f);
    p = __fmaf_rn(p, r, 0.4999923f);
    p = __fmaf_rn(p, r, 1.0f);
    p = __fmaf_rn(p, r, 1.0f);
    // The low bits of `shifted` are the integer n. Scaling by 2^n is exact, so fusing it changes nothing.
    return __fmaf_rn(p, __uint_as_float((__float_as_uint(shifted) << 23) + (127u << 23)), 1.0f);
}

// gate * sigmoid(alpha * gate), the gate clamped from above.
__device__ __forceinline__ float gated(float gate) {
#if LIMITED
    const float limit = __uint_as_float(LIMIT);
    gate = gate > limit ? limit : gate;
#endif
    // One times a gate is the gate, but for the bits of a NaN, of which the product below leaves no trace.
    const float x = ALPHA == 0x3f800000u ? gate : __fmul_rn(__uint_as_float(ALPHA), gate);
    return __fmul_rn(gate, reciprocal(one_plus_exp(-x)));
}

__device__ __forceinline__ float times_up(float up, float glu) {
#if LIMITED
    const float limit = __uint_as_float(LIMIT);
    up = up > limit ? limit : up;
    up = up < -limit ? -limit : up;
#endif
    // Adding zero would change the sign of a zero only; it is not added.
    return __fmul_rn((BETA & 0x7fffffffu) == 0 ? up : __fadd_rn(up, __uint_as_float(BETA)), glu);
}
