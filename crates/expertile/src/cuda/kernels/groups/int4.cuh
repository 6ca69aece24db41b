// int4 weights as the GEMM reads them, and how a thread decodes its part of them. `arrange_int4.cu` writes them once.
//
// Units are those of groups/mxfp4.cuh, but that their scales are bf16 or f16, as they came, and that nothing is folded
// into values, which are -8 to 7: those of a group are multiplied apart, and its scale multiplies the sum.
//
//   thread's word 2 * group + half    of output 16 * warp + 8 * half + lane / 4
//   for rows of e4m3                  value i is k = 4 * (lane % 4) + i % 4 + 16 * (i / 4) of the group, in two's
//                                     complement; where i < 4, its lower three bits are from bit 4 i, its sign at
//                                     8 i + 7; those of value 4 + i from bit 16 + 4 i, its sign at 8 i + 3
//   for rows of bf16                  value i is k = 2 * (lane % 4) + i % 2 + 8 * (i / 2) of the group: 8 more than it
//                                     is, from bit 4 * (i / 2) + 16 * (i % 2)
//   scales                            [warp][lane / 4][group][half]
#pragma once
#include "groups/mxfp4.cuh"

// Which value of its group is value i of lane % 4 = `lane`.
template <Format FORMAT>
__device__ __forceinline__ int int4_place(int lane, int i) {
    return FORMAT == Format::E4M3 ? 4 * lane + i % 4 + 16 * (i / 4) : 2 * lane + i % 2 + 8 * (i / 2);
}

// A checkpoint's nibble, 8 more than its value, as value i of a word.
template <Format FORMAT>
__device__ __forceinline__ u32 int4_bits(u32 nibble, int i) {
    if constexpr (FORMAT == Format::BF16) return nibble << (4 * (i / 2) + 16 * (i % 2));
    const u32 complement = nibble ^ 8u;
    const int sign_at = 8 * (i % 4) + (i < 4 ? 7 : 3);
    return (complement & 7u) << (4 * (i % 4) + 16 * (i / 4)) | (complement >> 3) << sign_at;
}

// Value i of a word as a checkpoint's nibble.
template <Format FORMAT>
__device__ __forceinline__ u32 int4_nibble(u32 word, int i) {
    if constexpr (FORMAT == Format::BF16) return word >> (4 * (i / 2) + 16 * (i % 2)) & 15u;
    const int sign_at = 8 * (i % 4) + (i < 4 ? 7 : 3);
    return ((word >> (4 * (i % 4) + 16 * (i / 4)) & 7u) | (word >> sign_at & 1u) << 3) ^ 8u;
}

// The values of the lower halves of four selectors as bytes of e4m3: 0 to 7, or, where a byte of `negative` is 0xff, -8
// to -1.
__device__ __forceinline__ u32 int4_bytes(u32 selectors, u32 negative) {
    const u32 from_0 = permute_bytes(0x44403800u, 0x4e4c4a48u, selectors);
    const u32 from_minus_8 = permute_bytes(0xcaccced0u, 0xb8c0c4c8u, selectors);
    return (from_minus_8 & negative) | (from_0 & ~negative);
}

// A thread's part of a unit: the M operand, and for each of its two groups of 32 the scales of this thread's outputs, as
// they came.
template <Format FORMAT>
struct Int4Unit {
    u32 a[2 * GROUP_REGISTERS<FORMAT>];
    u32 pairs[2];

    __device__ __forceinline__ void decode(u32 from) {
        const int thread = threadIdx.x % (2 * UNIT_OUTPUTS);
        const uint4 words = load_shared_words(from + thread * 16);
        decode_word(words.x, a);
        decode_word(words.y, a + 1);
        decode_word(words.z, a + GROUP_REGISTERS<FORMAT>);
        decode_word(words.w, a + GROUP_REGISTERS<FORMAT> + 1);
#pragma unroll
        for (int group = 0; group < 2; ++group)
            pairs[group] = load_shared_word(from + UNIT_VALUE_BYTES + thread / 4 * 8 + group * 4);
    }

    // Of each group those of the thread's upper and lower output.
    __device__ __forceinline__ void scales(bool f16_scales, float (&to)[2][2]) const {
#pragma unroll
        for (int group = 0; group < 2; ++group) {
            to[group][0] = f16_scales ? low_half<1>(pairs[group]) : low_half<0>(pairs[group]);
            to[group][1] = f16_scales ? high_half<1>(pairs[group]) : high_half<0>(pairs[group]);
        }
    }

    // Eight values: two registers of e4m3, or four of bf16, each two further than the one before.
    static __device__ __forceinline__ void decode_word(u32 word, u32* to) {
        if constexpr (FORMAT == Format::E4M3) {
            const u32 selectors = word & 0x77777777u;
            to[0] = int4_bytes(selectors, spread_signs(word));
            to[2] = int4_bytes(selectors >> 16, spread_signs(word << 4));
        } else {
            // As the lowest bits of 128's mantissa they are 128 more than they were, and so 136 more than the values.
#pragma unroll
            for (int i = 0; i < 4; ++i)
                to[2 * i] = add_bf16_pairs((word >> 4 * i & 0x000f000fu) | 0x43004300u, 0xc308c308u);
        }
    }
};
