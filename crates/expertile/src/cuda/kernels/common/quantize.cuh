// What an e4m3 value and its scale are: the same IEEE f32 operations, one rounding each, as quantize.rs.
// A warp takes a slab of 512 consecutive values of a row, 16 to a lane; a group's lanes are neighbours.
#pragma once
#include "ptx/convert.cuh"

constexpr int SLAB = 512;
constexpr int PER_LANE = 16;

// 1 / d, correctly rounded, for d in [2^-43, 2^126): one Newton step on the hardware's approximation.
// cuda/arithmetic.rs compares it with the IEEE division for every such d.
__device__ __forceinline__ float reciprocal(float d) {
    const float r = approximate_reciprocal(d);
    return __fmaf_rn(r, __fmaf_rn(-d, r, 1.0f), r);
}

// One value to e4m3: nearest, ties to even, saturating at 448; NaN of either sign to 0x7f.
__device__ __forceinline__ u32 e4m3_byte(float x) {
    const u32 bits = __float_as_uint(x);
    const u32 magnitude = bits & 0x7fffffffu;
    const u32 clamped = magnitude > 0x43e00000u ? 0x43e00000u : magnitude;
    const u32 normal = (clamped - (120u << 23) + 0x7ffffu + ((clamped >> 20) & 1u)) >> 20;
    const u32 subnormal = __float_as_uint(__fadd_rn(__uint_as_float(clamped), 16384.0f)) & 0xfu;
    const u32 finite = (clamped < 0x3c800000u ? subnormal : normal) | ((bits >> 24) & 0x80u);
    return magnitude > 0x7f800000u ? 0x7fu : finite;
}

// Two values to e4m3, in the same way.
__device__ __forceinline__ u32 e4m3_pair(float low, float high) {
#if __CUDA_ARCH__ >= 890
    return convert_to_e4m3(low, high);
#else
    return e4m3_byte(low) | e4m3_byte(high) << 8;
#endif
}

// The scale of a group whose largest magnitude is amax; NaN (a group of nothing but NaN) counts as zero.
__device__ __forceinline__ float scale_of(float amax, bool power_of_two) {
    const float floored = amax > 1e-10f ? amax : 1e-10f;
    const float scale = __fmul_rn(floored, 1.0f / 448.0f);
    const u32 mantissa = (1u << 23) - 1u;
    return power_of_two ? __uint_as_float((__float_as_uint(scale) + mantissa) & ~mantissa) : scale;
}

// Division by one scale: multiply by the rounded inverse, then add back the remainder. The result is the rounding of a
// number within 2^-47 of the quotient, and so, but for quotients that near the middle between two f32, the IEEE one.
// Rounded to e4m3 it is the same without exception: cuda/arithmetic.rs tries every scale with the dividends on both
// sides of every place where e4m3 rounds up rather than down, and away from there one unit of f32 makes no difference.
template <bool POWER>
struct Divisor {
    float inverse;
    float scale;  // zero where the remainder would be meaningless: see below

    __device__ __forceinline__ explicit Divisor(float s) {
        const bool finite = s < __uint_as_float(0x7f800000u);
        // A power of two has an exact inverse, and multiplying by it rounds once, like the division.
        const float inexact = reciprocal(s);
        const float exact = __uint_as_float((254u << 23) - (__float_as_uint(s) & 0x7f800000u));
        // An infinite scale takes finite values to zero and infinities to NaN: x * 0 does, and adds x * 0 once more.
        inverse = finite ? (POWER ? exact : inexact) : 0.0f;
        scale = finite ? s : 0.0f;
    }

    __device__ __forceinline__ float quotient(float x) const {
        const float q = __fmul_rn(x, inverse);
        if constexpr (POWER) return q;
        // The negated remainder: a remainder of zero is then +0, and adding -(+0) leaves the sign of a zero alone.
        const float excess = __fmaf_rn(q, scale, -x);
        return __fmaf_rn(-excess, inverse, q);
    }
};

// The largest magnitude over the lanes of a group, EACH of its values to a lane; every lane of the warp calls.
template <int GROUP_SIZE, int EACH = PER_LANE>
__device__ __forceinline__ float group_max(float x) {
#pragma unroll
    for (int distance = GROUP_SIZE / EACH / 2; distance > 0; distance /= 2)
        x = fmaxf(x, __shfl_xor_sync(WARP, x, distance));
    return x;
}

// Four f32 in units of their scale, as e4m3.
template <bool POWER>
__device__ __forceinline__ u32 quantize_four(const Divisor<POWER>& divisor, const float* x) {
    const u32 low = e4m3_pair(divisor.quotient(x[0]), divisor.quotient(x[1]));
    const u32 high = e4m3_pair(divisor.quotient(x[2]), divisor.quotient(x[3]));
    return low | high << 16;
}

// 16 f32 in units of their scale, as e4m3.
template <bool POWER>
__device__ __forceinline__ uint4 quantize_values(const float (&x)[PER_LANE], float scale) {
    const Divisor<POWER> divisor(scale);
    return make_uint4(quantize_four(divisor, x), quantize_four(divisor, x + 4), quantize_four(divisor, x + 8),
                      quantize_four(divisor, x + 12));
}

// COUNT bf16 or f16, unpacked, and their largest magnitude.
template <int TYPE, int COUNT>
__device__ __forceinline__ float unpack(const u32* pairs, float (&x)[COUNT]) {
    u32 largest = 0;
#pragma unroll
    for (int i = 0; i < COUNT / 2; ++i) {
        largest = larger_halves<TYPE>(largest, pairs[i] & 0x7fff7fffu);
        x[2 * i] = low_half<TYPE>(pairs[i]);
        x[2 * i + 1] = high_half<TYPE>(pairs[i]);
    }
    return fmaxf(low_half<TYPE>(largest), high_half<TYPE>(largest));
}

// 16 bf16 or f16 of each lane to e4m3, and the scale of the lane's group. Every lane of the warp calls.
template <int TYPE, int GROUP_SIZE, bool POWER>
__device__ __forceinline__ uint4 quantize_slab(const u32 (&pairs)[PER_LANE / 2], float& scale) {
    float x[PER_LANE];
    scale = scale_of(group_max<GROUP_SIZE>(unpack<TYPE>(pairs, x)), POWER);
    return quantize_values<POWER>(x, scale);
}

// The same for 8 values of each lane.
template <int TYPE, int GROUP_SIZE, bool POWER>
__device__ __forceinline__ uint2 quantize_half_slab(const u32* pairs, float& scale) {
    float x[8];
    scale = scale_of(group_max<GROUP_SIZE, 8>(unpack<TYPE>(pairs, x)), POWER);
    const Divisor<POWER> divisor(scale);
    return make_uint2(quantize_four(divisor, x), quantize_four(divisor, x + 4));
}
