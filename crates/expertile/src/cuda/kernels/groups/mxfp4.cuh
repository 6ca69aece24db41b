// MXFP4 weights as the GEMM reads them, and how a thread decodes its part of them. `arrange_mxfp4.cu` writes them once.
//
// A unit is 64 outputs by 64 of K: what one warpgroup multiplies. It has UNIT_BYTES: for each thread of the warpgroup
// the 16 bytes that it decodes, then the scales of two groups of 32. Units of the same 64 outputs (a slab) stand one
// behind the other: [experts, n / 64, k / 64, UNIT_BYTES], both rounded up.
//
//   thread's word 2 * group + half    of output 16 * warp + 8 * half + lane / 4
//   for rows of e4m3                  value i is k = 4 * (lane % 4) + i % 4 + 16 * (i / 4) of the group; where i < 4, its
//                                     magnitude is from bit 4 i, its sign at 8 i + 7; that of value 4 + i from bit
//                                     16 + 4 i, its sign at 8 i + 3
//   for rows of bf16                  value i is k = 2 * (lane % 4) + i % 2 + 8 * (i / 2) of the group; of the half i % 2
//                                     of the word it has the bits, magnitude first:
//                                       i / 2 = 0   6 to 8, 15
//                                       i / 2 = 1   2 to 4, 11
//                                       i / 2 = 2   12 to 14 of the other half, 5
//                                       i / 2 = 3   0, 1, 10, 9
//   scales                            [warp][lane / 4][group][half]
//
// A scale is said by the steps, powers of two, that it is below the largest of its output (`exponents`). Up to
// MOST_STEPS of them are folded into the decoded value, exactly: all groups of an output then have one exponent, which
// the sum gets at the end. Where an output needs more, its slab is marked in `spread`, and products are scaled by group.
//
// Set by the host: HOST_INT4 (units are those of int4: their size is all that is of it here).
#pragma once
#include "ptx/convert.cuh"
#include "ptx/wgmma.cuh"

constexpr int UNIT_OUTPUTS = 64;
constexpr int UNIT_K = 64;
constexpr int UNIT_VALUE_BYTES = UNIT_OUTPUTS * UNIT_K / 2;
// int4's scales, of which groups/int4.cuh speaks, have two bytes.
constexpr int UNIT_BYTES = UNIT_VALUE_BYTES + UNIT_OUTPUTS * UNIT_K / 32 * (HOST_INT4 ? 2 : 1);

// Normal numbers of the format hold e2m1's values so many powers of two apart, TOP above e2m1's own: e4m3 has
// exponents -6 to 8, and values from 0.5 to 6 take up four of them.
template <Format FORMAT>
struct Fold;
template <>
struct Fold<Format::E4M3> {
    static constexpr int TOP = 6;
    static constexpr int MOST_STEPS = 11;
};
template <>
struct Fold<Format::BF16> {
    static constexpr int TOP = 0;
    static constexpr int MOST_STEPS = 125;
    // As the lowest bits of a bf16's exponent and the highest of its mantissa e2m1's are the value itself, subnormal or
    // not, times 2^-126.
    static constexpr u32 PLACE = 0x81c081c0u;
    static constexpr u32 UNPLACED = 0x7e807e80u;  // 2^126, twice
};

// The bytes of 0, 0.5, 1, 1.5, 2, 3, 4 and 6, TOP exponents up as e4m3.
constexpr u32 E4M3_LOW = 0x6c686000u;
constexpr u32 E4M3_HIGH = 0x7c787470u;

// The eight values of a word as bytes of e4m3: four in each result.
__device__ __forceinline__ void decode_word(u32 word, u32 low_table, u32 high_table, u32& first, u32& second) {
    const u32 magnitudes = word & 0x77777777u;
    first = permute_bytes(low_table, high_table, magnitudes) | (word & 0x80808080u);
    second = permute_bytes(low_table, high_table, magnitudes >> 16) | (word << 4 & 0x80808080u);
}

// The same as four pairs of bf16, two registers apart, times 2^-126.
__device__ __forceinline__ void place_word(u32 word, u32* pairs) {
    constexpr u32 PLACE = Fold<Format::BF16>::PLACE;
    pairs[0] = word & PLACE;
    pairs[2] = word << 4 & PLACE;
    pairs[4] = (word << 10 | word >> 22) & PLACE;
    pairs[6] = (word << 6 & 0x80c080c0u) | (word >> 2 & 0x01000100u);
}

// Byte i of a word.
__device__ __forceinline__ u32 byte_of(u32 word, int i) { return permute_bytes(word, 0, 0x4440 + i); }

// The operand registers of GROUP of a unit, four for each instruction, from the thread's words and its outputs' steps.
// FOLDS: whether the steps are folded in.
template <Format FORMAT, int GROUP, bool FOLDS>
__device__ __forceinline__ void decode_group(const uint4& words, const u32 (&steps)[4], u32* a) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const u32 word = GROUP == 0 ? (half == 0 ? words.x : words.y) : (half == 0 ? words.z : words.w);
        const u32 i = 2 * GROUP + half;
        if constexpr (FORMAT == Format::E4M3) {
            // A folded scale is eight times its steps: one step is 8 in a byte of e4m3, but for zero. Multiplied, as
            // integer products run beside everything else here.
            const u32 low = FOLDS ? E4M3_LOW - steps[i] * 0x01010100u : E4M3_LOW;
            const u32 high = FOLDS ? E4M3_HIGH - steps[i] * 0x01010101u : E4M3_HIGH;
            decode_word(word, low, high, a[half], a[2 + half]);
        } else {
            place_word(word, a + half);
            // 2^126, and 2^-steps.
            const u32 power = Fold<FORMAT>::UNPLACED - (FOLDS ? steps[i] * 0x00800080u : 0);
#pragma unroll
            for (int j = 0; j < 8; j += 2) a[j + half] = multiply_bf16_pairs(a[j + half], power);
        }
    }
}

// Operand registers that a group takes.
template <Format FORMAT>
constexpr int GROUP_REGISTERS = FORMAT == Format::E4M3 ? 4 : 8;

// Where in a unit this thread's words are, and its outputs' steps. Computed once for a tile of N rows, of which the
// compiler knows nothing: it would do it for each unit. What there are registers for depends on the rows.
template <int N>
struct UnitOffsets {
    static constexpr bool KEPT = N <= 64;
    static constexpr bool STEPS_APART = N <= 16;

    u32 words;
    u32 steps_apart;

    __device__ __forceinline__ UnitOffsets() {
        words = threadIdx.x % (2 * UNIT_OUTPUTS) * 16;
        if constexpr (KEPT) words = further(words, 0);
        steps_apart = STEPS_APART ? further(steps_at(words), 0) : 0;
    }
    static __device__ __forceinline__ u32 steps_at(u32 words) { return UNIT_VALUE_BYTES + words / 64 * 4; }
    __device__ __forceinline__ u32 steps() const { return STEPS_APART ? steps_apart : steps_at(words); }
};

// This thread's words of a unit in shared memory, and its outputs' steps.
struct Unit {
    uint4 words;
    u32 steps[4];

    // Loads of bytes take less of the pipe that decodes than one load whose bytes are taken apart.
    template <int N>
    __device__ __forceinline__ Unit(u32 from, const UnitOffsets<N>& mine) {
        words = load_shared_words(from + mine.words);
        if constexpr (UnitOffsets<N>::KEPT) {
#pragma unroll
            for (int i = 0; i < 4; ++i) steps[i] = load_shared_byte(from + mine.steps() + i);
        } else {
            const u32 word = load_shared_word(from + mine.steps());
#pragma unroll
            for (int i = 0; i < 4; ++i) steps[i] = byte_of(word, i);
        }
    }

    // Both groups, steps folded in.
    template <Format FORMAT>
    __device__ __forceinline__ void decode(u32* values) const {
        decode_group<FORMAT, 0, true>(words, steps, values);
        decode_group<FORMAT, 1, true>(words, steps, values + GROUP_REGISTERS<FORMAT>);
    }
};

// 2^exponent, for what f32 has: -149 to 127.
__device__ __forceinline__ float power_of_two(int exponent) {
    return __uint_as_float(exponent >= -126 ? (u32)(exponent + 127) << 23 : 1u << (exponent + 149));
}

// 2^exponent in two steps, because one power may be too small for what f32 has of a product.
struct Power {
    float one;
    float other;

    __device__ __forceinline__ explicit Power(int exponent)
        : one(power_of_two(exponent / 2)), other(power_of_two(exponent - exponent / 2)) {}

    __device__ __forceinline__ float times(float sum) const { return __fmul_rn(__fmul_rn(sum, one), other); }
};

// What an output's largest scale, folded in so far, leaves for the end.
template <Format FORMAT>
__device__ __forceinline__ int exponent_of_sum(int largest) {
    return largest - 127 - Fold<FORMAT>::TOP;
}
