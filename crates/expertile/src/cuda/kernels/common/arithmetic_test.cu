// Every operand that matters, against the compiler's IEEE division. Set by the host: INPUT (0 bf16, 1 f16).
#include "common/quantize.cuh"

__device__ void disagree(u64* result, u64 operand) {
    atomicAdd(result, 1ull);
    atomicMin(result + 1, operand);
}

__device__ u64 thread_of_grid() { return (u64)blockIdx.x * blockDim.x + threadIdx.x; }
__device__ u64 threads_of_grid() { return (u64)gridDim.x * blockDim.x; }

// 1 / d for d from 2^-43 to below 2^126.
extern "C" __global__ void every_reciprocal(u64* result) {
    const u64 first = (u64)(127 - 43) << 23;
    const u64 last = (u64)(127 + 126) << 23;
    for (u64 bits = first + thread_of_grid(); bits < last; bits += threads_of_grid()) {
        const float d = __uint_as_float((u32)bits);
        if (__float_as_uint(reciprocal(d)) != __float_as_uint(__fdiv_rn(1.0f, d))) disagree(result, bits);
    }
}

// x / s for every mantissa of x and of s, over exponents that take the quotient from under e4m3's smallest value to
// past its largest. Exponents alone change nothing: all quotients and remainders stay normal.
extern "C" __global__ void every_quotient(u64* result) {
    constexpr int BITS = INPUT == 0 ? 7 : 10;
    constexpr u64 PAIRS = (u64)1 << (BITS + 23);
    for (u64 pair = thread_of_grid(); pair < PAIRS; pair += threads_of_grid()) {
        const u32 x_mantissa = (u32)(pair >> 23) << (23 - BITS);
        const u32 s_mantissa = (u32)pair & 0x7fffff;
        const float s = __uint_as_float(127u << 23 | s_mantissa);
        const Divisor<false> divisor(s);
        const int exponents[] = {-11, -10, -9, -8, -7, -6, -5, -1, 0, 3, 8, 9};
        for (int exponent : exponents) {
            const float x = __uint_as_float((u32)(127 + exponent) << 23 | x_mantissa);
            if (e4m3_byte(divisor.quotient(x)) != e4m3_byte(__fdiv_rn(x, s)))
                disagree(result, (u64)x_mantissa << 32 | s_mantissa);
        }
    }
}

// x / s for every mantissa of s, where x is one of the f32 next to s times a number with five significant bits: every
// place where e4m3 rounds one way on one side and another way on the other is s times such a number.
extern "C" __global__ void every_quotient_near_a_boundary(u64* result) {
    for (u64 mantissa = thread_of_grid(); mantissa < (u64)1 << 23; mantissa += threads_of_grid()) {
        const float s = __uint_as_float(127u << 23 | (u32)mantissa);
        const Divisor<false> divisor(s);
        for (int sixteenths = 16; sixteenths < 32; ++sixteenths) {
            const u32 middle = __float_as_uint(__fmul_rn(s, (float)sixteenths / 16.0f));
            for (int distance = -3; distance <= 3; ++distance) {
                const u32 bits = middle + distance;
                // To the binades of e4m3's normal numbers, its subnormal ones, and its end.
                for (int exponent = -11; exponent <= 9; exponent += exponent < -5 ? 1 : 7) {
                    const float x = __uint_as_float(bits + ((u32)exponent << 23));
                    if (e4m3_byte(divisor.quotient(x)) != e4m3_byte(__fdiv_rn(x, s)))
                        disagree(result, (u64)bits << 32 | mantissa);
                }
            }
        }
    }
}

// The hardware's conversion against the definition in integer operations.
extern "C" __global__ void every_conversion(u64* result) {
    for (u64 bits = thread_of_grid(); bits < (u64)1 << 32; bits += threads_of_grid()) {
        const float x = __uint_as_float((u32)bits);
        const u32 both = e4m3_pair(x, 1.0f);
        const u32 other = e4m3_pair(1.0f, x);
        if (both != (e4m3_byte(x) | 0x3800u) || other != (0x38u | e4m3_byte(x) << 8)) disagree(result, bits);
    }
}
