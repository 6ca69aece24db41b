// Arranges MXFP4 weights, blocks [experts, n, k / 2] with scales [experts, n, k / 32], as groups/mxfp4.cuh has them:
// once, before the first GEMM. Says in `report` which outputs' scales are NaN, and whether any slab's are too far apart.
// `unpack` writes the blocks again, where the caller has kept none.
//
// A block takes a slab at a time: first its outputs' largest scales and how far the others are below, then its values.
// A group of zeros counts for none of that: whatever its scale is, its products are zero.
//
// Set by the host: HOST_BF16 (rows are bf16, else e4m3), HOST_THREADS (of a block).
#include "groups/mxfp4.cuh"

constexpr Format FORMAT = HOST_BF16 ? Format::BF16 : Format::E4M3;
constexpr int THREADS = HOST_THREADS;
constexpr int QUAD = THREADS / UNIT_OUTPUTS;
static_assert(QUAD == 4, "four lanes share an output, as in wgmma's operand");

struct ArrangeArgs {
    const u8* blocks;
    const u8* scales;
    u8* packed;
    u8* exponents;
    u8* spread;
    u32* report;  // word 0: 1 if any slab is spread; word 1: the complement of the first row with a scale of 255, or 0
    int experts;
    int n;
    int k;
    int reserved;
};

struct UnpackArgs {
    const u8* packed;
    const u8* exponents;
    const u8* spread;  // absent where no slab is
    u8* blocks;
    u8* scales;  // absent where they are not asked for
    int experts;
    int n;
    int k;
    int reserved;
};

// Four bytes on 4 bytes.
__device__ __forceinline__ u32 load_word(const u8* from) { return *reinterpret_cast<const u32*>(from); }

// Whether all values of a group are zeros of either sign.
__device__ __forceinline__ bool is_zero(const u8* block) {
    u32 any = 0;
#pragma unroll
    for (int i = 0; i < 16; i += 4) any |= load_word(block + i);
    return (any & 0x77777777u) == 0;
}

// The nibble of value k.
__device__ __forceinline__ u32 nibble(const u8* block, int k) { return block[k / 2] >> 4 * (k % 2) & 15u; }

// Which value of its group is value i of lane % 4 = `lane`.
__device__ __forceinline__ int place_in_group(int lane, int i) {
    return FORMAT == Format::E4M3 ? 4 * lane + i % 4 + 16 * (i / 4) : 2 * lane + i % 2 + 8 * (i / 2);
}

// A nibble as value i of a word.
__device__ __forceinline__ u32 bits_of(u32 nibble, int i) {
    const u32 magnitude = nibble & 7u;
    const u32 sign = nibble >> 3;
    if constexpr (FORMAT == Format::E4M3)
        return magnitude << (4 * (i % 4) + 16 * (i / 4)) | sign << (8 * (i % 4) + (i < 4 ? 7 : 3));
    const int from = 16 * (i % 2);
    switch (i / 2) {
        case 0:
            return (magnitude << 6 | sign << 15) << from;
        case 1:
            return (magnitude << 2 | sign << 11) << from;
        case 2:
            return magnitude << (28 - from) | sign << (5 + from);
        default:
            return ((magnitude & 3u) | sign << 9 | (magnitude >> 2) << 10) << from;
    }
}

// Value i of a word as a nibble.
__device__ __forceinline__ u32 nibble_of(u32 word, int i) {
    if constexpr (FORMAT == Format::E4M3)
        return (word >> (4 * (i % 4) + 16 * (i / 4)) & 7u) | (word >> (8 * (i % 4) + (i < 4 ? 7 : 3)) & 1u) << 3;
    const int from = 16 * (i % 2);
    const u32 half = word >> from;
    switch (i / 2) {
        case 0:
            return (half >> 6 & 7u) | (half >> 15 & 1u) << 3;
        case 1:
            return (half >> 2 & 7u) | (half >> 11 & 1u) << 3;
        case 2:
            return (word >> (28 - from) & 7u) | (half >> 5 & 1u) << 3;
        default:
            return (half & 3u) | (half >> 10 & 1u) << 2 | (half >> 9 & 1u) << 3;
    }
}

// The word of lane % 4 = `lane` of a group.
__device__ __forceinline__ u32 word_of(const u8* block, int lane) {
    u32 word = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) word |= bits_of(nibble(block, place_in_group(lane, i)), i);
    return word;
}

// The largest of the lanes of a quad.
__device__ __forceinline__ int largest_of_quad(int value) {
    value = max(value, __shfl_xor_sync(WARP, value, 1));
    return max(value, __shfl_xor_sync(WARP, value, 2));
}

extern "C" __global__ void __launch_bounds__(THREADS) arrange(const __grid_constant__ ArrangeArgs a) {
    __shared__ u32 slab_spread;
    wait_for_previous_launch();
    let_next_launch_start();
    const int slabs = (a.n + UNIT_OUTPUTS - 1) / UNIT_OUTPUTS;
    const int units = (a.k + UNIT_K - 1) / UNIT_K;
    const int groups = a.k / 32;
    const int output = threadIdx.x / QUAD;  // of the slab
    const int lane = threadIdx.x % QUAD;
    const int half = output / 8 % 2;
    for (i64 slab = blockIdx.x; slab < (i64)a.experts * slabs; slab += gridDim.x) {
        const i64 expert = slab / slabs;
        const int row = (int)(slab % slabs) * UNIT_OUTPUTS + output;
        const bool there = row < a.n;
        const i64 matrix_row = expert * a.n + row;
        const u8* blocks = a.blocks + matrix_row * (a.k / 2);
        const u8* scales = a.scales + matrix_row * groups;
        __syncthreads();
        if (threadIdx.x == 0) slab_spread = 0;
        __syncthreads();
        int largest = 0;
        int smallest = -255;  // negated
        for (int group = lane; there && group < groups; group += QUAD) {
            const int scale = scales[group];
            if (scale == 255) atomicMax(a.report + 1, ~(u32)matrix_row);
            if (is_zero(blocks + group * 16)) continue;
            largest = max(largest, scale);
            smallest = max(smallest, -scale);
        }
        largest = largest_of_quad(largest);
        smallest = -largest_of_quad(smallest);
        if (largest - smallest > Fold<FORMAT>::MOST_STEPS) atomicMax(&slab_spread, 1u);
        __syncthreads();
        const bool is_spread = slab_spread != 0;
        if (lane == 0) a.exponents[slab * UNIT_OUTPUTS + output] = (u8)largest;
        if (threadIdx.x == 0) {
            a.spread[slab] = is_spread ? 1 : 0;
            if (is_spread) atomicMax(a.report, 1u);
        }
        // What is folded into e4m3 is said by what it changes in a byte.
        const int step = FORMAT == Format::E4M3 && !is_spread ? 8 : 1;
        for (int unit = 0; unit < units; ++unit) {
            u8* to = a.packed + (slab * units + unit) * UNIT_BYTES;
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int group = 2 * unit + i;
                const bool present = there && group < groups;
                const u8* block = blocks + group * 16;
                const int thread = output / 16 * 32 + output % 8 * 4 + lane;
                *reinterpret_cast<u32*>(to + thread * 16 + (2 * i + half) * 4) = present ? word_of(block, lane) : 0;
                if (lane != 0) continue;
                const bool counts = present && !is_zero(block);
                const u8 steps = counts ? (u8)((largest - scales[group]) * step) : 0;
                to[UNIT_VALUE_BYTES + (output / 16 * 8 + output % 8) * 4 + 2 * i + half] = steps;
            }
        }
    }
}

// A thread takes a group of an output at a time.
extern "C" __global__ void __launch_bounds__(THREADS) unpack(const __grid_constant__ UnpackArgs a) {
    wait_for_previous_launch();
    let_next_launch_start();
    const int slabs = (a.n + UNIT_OUTPUTS - 1) / UNIT_OUTPUTS;
    const int units = (a.k + UNIT_K - 1) / UNIT_K;
    const int groups = a.k / 32;
    const i64 all = (i64)a.experts * a.n * groups;
    for (i64 index = (i64)blockIdx.x * THREADS + threadIdx.x; index < all; index += (i64)gridDim.x * THREADS) {
        const int group = (int)(index % groups);
        const i64 matrix_row = index / groups;
        const int row = (int)(matrix_row % a.n);
        const i64 slab = matrix_row / a.n * slabs + row / UNIT_OUTPUTS;
        const int output = row % UNIT_OUTPUTS;
        const int part = 2 * (group % 2) + output / 8 % 2;
        const u8* unit = a.packed + (slab * units + group / 2) * UNIT_BYTES;
        const int thread = output / 16 * 32 + output % 8 * 4;
        u32 words[4] = {};
#pragma unroll
        for (int lane = 0; lane < 4; ++lane) {
            const u32 word = load_word(unit + (thread + lane) * 16 + part * 4);
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const int k = place_in_group(lane, i);
                words[k / 8] |= nibble_of(word, i) << 4 * (k % 8);
            }
        }
        u8* block = a.blocks + index * 16;
#pragma unroll
        for (int i = 0; i < 4; ++i) *reinterpret_cast<u32*>(block + 4 * i) = words[i];
        if (a.scales == nullptr) continue;
        const bool is_spread = a.spread != nullptr && a.spread[slab] != 0;
        const int step = FORMAT == Format::E4M3 && !is_spread ? 8 : 1;
        const int steps = unit[UNIT_VALUE_BYTES + (output / 16 * 8 + output % 8) * 4 + part] / step;
        a.scales[index] = (u8)(a.exponents[slab * UNIT_OUTPUTS + output] - steps);
    }
}
