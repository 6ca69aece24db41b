// The activation's value: the same IEEE f32 operations as activation.rs.
//
// Set by whoever compiles: ALPHA, BETA, LIMITED and LIMIT (f32 bit patterns).
#pragma once
#include "quantize.cuh"

// exp(x), |x| held within 87: two-part range reduction and a degree-6 polynomial, without contraction.
__device__ __forceinline__ float exp_held(float x) {
    // fminf would turn a NaN into 87. Unless alpha is zero or not finite, only a gate that is NaN makes one, and then the
    // product with the gate is NaN all the same.
    constexpr u32 ALPHA_MAGNITUDE = ALPHA & 0x7fffffffu;
    if (ALPHA_MAGNITUDE > 0 && ALPHA_MAGNITUDE < 0x7f800000u) {
        x = fmaxf(fminf(x, 87.0f), -87.0f);
    } else {
        x = x > 87.0f ? 87.0f : x;
        x = x < -87.0f ? -87.0f : x;
    }
    const float shifted = __fadd_rn(__fmul_rn(x, 1.44269504088896340736f), 12582912.0f);
    const float n = __fsub_rn(shifted, 12582912.0f);
    float r = __fsub_rn(x, __fmul_rn(n, 0.693359375f));
    r = __fsub_rn(r, __fmul_rn(n, -2.12194440e-4f));
    float p = 1.0f / 720.0f;
    p = __fadd_rn(__fmul_rn(p, r), 1.0f / 120.0f);
    p = __fadd_rn(__fmul_rn(p, r), 1.0f / 24.0f);
    p = __fadd_rn(__fmul_rn(p, r), 1.0f / 6.0f);
    p = __fadd_rn(__fmul_rn(p, r), 0.5f);
    p = __fadd_rn(__fmul_rn(p, r), 1.0f);
    p = __fadd_rn(__fmul_rn(p, r), 1.0f);
    return __fmul_rn(p, __uint_as_float((__float_as_uint(shifted) << 23) + (127u << 23)));
}

// gate * sigmoid(alpha * gate), the gate clamped from above.
__device__ __forceinline__ float gated(float gate) {
#if LIMITED
    const float limit = __uint_as_float(LIMIT);
    gate = gate > limit ? limit : gate;
#endif
    const float x = __fmul_rn(__uint_as_float(ALPHA), gate);
    return __fmul_rn(gate, reciprocal(__fadd_rn(1.0f, exp_held(-x))));
}

__device__ __forceinline__ float times_up(float up, float glu) {
#if LIMITED
    const float limit = __uint_as_float(LIMIT);
    up = up > limit ? limit : up;
    up = up < -limit ? -limit : up;
#endif
    return __fmul_rn(__fadd_rn(up, __uint_as_float(BETA)), glu);
}
