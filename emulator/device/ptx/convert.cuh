// ptx/convert.cuh for the CPU.
#pragma once
#include "ptx/access.cuh"

inline float approximate_reciprocal(float d) { return 1.0f / d; }

// By the definition: nearest, ties to even, saturating at 448; NaN of either sign to 0x7f.
inline u32 emulated_e4m3(float x) {
    const u32 sign = __float_as_uint(x) >> 24 & 0x80u;
    const float magnitude = fabsf(x);
    if (std::isnan(x)) return 0x7fu;
    if (magnitude >= 448.0f) return sign | 0x7eu;
    if (magnitude == 0.0f) return sign;
    // Steps are 2^-9 below 2^-6 and an eighth of the power of two above.
    int exponent;
    frexpf(magnitude, &exponent);
    exponent = max(exponent - 1, -6);
    const int steps = (int)nearbyintf(ldexpf(magnitude, 3 - exponent));
    // Eight steps more are the next exponent.
    return sign | (u32)((exponent + 6) * 8 + steps);
}

inline u16 convert_to_e4m3(float low, float high) { return (u16)(emulated_e4m3(low) | emulated_e4m3(high) << 8); }

inline float emulated_half(u32 bits) {
    const u32 sign = (bits & 0x8000u) << 16;
    const u32 exponent = bits >> 10 & 0x1fu;
    const u32 mantissa = bits & 0x3ffu;
    if (exponent == 0x1fu) return __uint_as_float(sign | 0x7f800000u | mantissa << 13);
    const float magnitude =
        exponent == 0 ? ldexpf((float)mantissa, -24) : ldexpf((float)(mantissa | 0x400u), (int)exponent - 25);
    return copysignf(magnitude, __uint_as_float(sign | 0x3f800000u));
}

inline u32 emulated_to_half(float x) {
    const u32 sign = __float_as_uint(x) >> 16 & 0x8000u;
    if (std::isnan(x)) return 0x7fffu;
    const float magnitude = fabsf(x);
    if (magnitude >= 65520.0f) return sign | 0x7c00u;
    if (magnitude == 0.0f) return sign;
    int exponent;
    frexpf(magnitude, &exponent);
    exponent = max(exponent - 1, -14);
    return sign | (u32)((exponent + 14) * 1024 + (int)nearbyintf(ldexpf(magnitude, 10 - exponent)));
}

inline u32 emulated_to_bf16(float x) {
    const u32 bits = __float_as_uint(x);
    if (std::isnan(x)) return 0x7fffu;
    return (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
}

template <int TYPE>
inline float low_half(u32 pair) {
    return TYPE == 0 ? __uint_as_float(pair << 16) : emulated_half(pair & 0xffffu);
}

template <int TYPE>
inline float high_half(u32 pair) {
    return TYPE == 0 ? __uint_as_float(pair & 0xffff0000u) : emulated_half(pair >> 16);
}

template <int TYPE>
inline u32 pack_halves(float low, float high) {
    return TYPE == 0 ? emulated_to_bf16(low) | emulated_to_bf16(high) << 16
                     : emulated_to_half(low) | emulated_to_half(high) << 16;
}

template <int TYPE>
inline u32 emulated_larger(u32 a, u32 b) {
    const float x = low_half<TYPE>(a);
    const float y = low_half<TYPE>(b);
    if (std::isnan(x) && std::isnan(y)) return 0x7fffu;
    if (std::isnan(x) || std::isnan(y)) return std::isnan(x) ? b : a;
    return x > y || (x == y && (a & 0x8000u) == 0) ? a : b;
}

template <int TYPE>
inline u32 larger_halves(u32 a, u32 b) {
    return emulated_larger<TYPE>(a & 0xffffu, b & 0xffffu) | emulated_larger<TYPE>(a >> 16, b >> 16) << 16;
}

inline u32 permute_bytes(u32 low, u32 high, u32 selector) {
    const u64 bytes = low | (u64)high << 32;
    u32 chosen = 0;
    for (int i = 0; i < 4; ++i) chosen |= (u32)(bytes >> 8 * (selector >> 4 * i & 7u) & 0xffu) << 8 * i;
    return chosen;
}

inline u32 spread_signs(u32 bytes) { return (bytes >> 7 & 0x01010101u) * 0xffu; }

inline u32 add_bf16_pairs(u32 a, u32 b) {
    return emulated_to_bf16(low_half<0>(a) + low_half<0>(b)) | emulated_to_bf16(high_half<0>(a) + high_half<0>(b))
                                                                   << 16;
}

inline u32 multiply_bf16_pairs(u32 a, u32 b) {
    return emulated_to_bf16(low_half<0>(a) * low_half<0>(b)) | emulated_to_bf16(high_half<0>(a) * high_half<0>(b))
                                                                   << 16;
}
