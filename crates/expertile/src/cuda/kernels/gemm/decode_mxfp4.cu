// Arranged MXFP4 weights as e4m3 with a scale for each block of 128 x 128, exactly: the scale is the power of two of the
// block's largest group, and the others' distance from it is in the values, as Fold folds it in. The products of a block
// of K are then those of the arranged weights times a power of two, and so are the sums: a row has the same bits.
//
// A block takes a block of weights at a time: two slabs by two units, a warpgroup to each unit.
//
// Set by the host: HOST_THREADS (of a block), HOST_LEAST and HOST_MOST (exponents that a block's scale may have).
#include "groups/mxfp4.cuh"

constexpr Format FORMAT = Format::E4M3;
constexpr int THREADS = HOST_THREADS;
constexpr int SIDE = 128;  // of a block of weights
constexpr int UNIT_THREADS = 2 * UNIT_OUTPUTS;
static_assert(THREADS == SIDE / UNIT_OUTPUTS * (SIDE / UNIT_K) * UNIT_THREADS, "a thread for each part of a unit");

struct DecodeArgs {
    const u8* packed;
    const u8* exponents;
    const u8* spread;  // absent where no slab is
    u8* values;
    float* scales;
    u32* report;  // the complement of the first block that is not exact, or 0
    int experts;
    int n;
    int k;
    int reserved;
};

// The largest value of a block of threads, by way of `shared`, which was 0.
__device__ __forceinline__ u32 largest_of_block(u32 value, u32* shared) {
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) value = max(value, __shfl_xor_sync(WARP, value, lanes));
    if (threadIdx.x % 32 == 0) atomicMax(shared, value);
    __syncthreads();
    return *shared;
}

extern "C" __global__ void __launch_bounds__(THREADS) decode(const __grid_constant__ DecodeArgs a) {
    __shared__ u32 shared[2];
    wait_for_previous_launch();
    let_next_launch_start();
    const int slabs = (a.n + UNIT_OUTPUTS - 1) / UNIT_OUTPUTS;
    const int units = (a.k + UNIT_K - 1) / UNIT_K;
    const int rows = (a.n + SIDE - 1) / SIDE;
    const int columns = (a.k + SIDE - 1) / SIDE;
    const int thread = threadIdx.x % UNIT_THREADS;
    const int lane = threadIdx.x % 4;
    for (i64 block = blockIdx.x; block < (i64)a.experts * rows * columns; block += gridDim.x) {
        const i64 expert = block / ((i64)rows * columns);
        const int slab = (int)(block / columns % rows) * 2 + threadIdx.x / (2 * UNIT_THREADS);
        const int unit = (int)(block % columns) * 2 + threadIdx.x / UNIT_THREADS % 2;
        const bool there = slab < slabs && unit < units;
        const i64 of_expert = expert * slabs + slab;
        __syncthreads();
        if (threadIdx.x < 2) shared[threadIdx.x] = 0;
        __syncthreads();
        uint4 words = make_uint4(0, 0, 0, 0);
        u32 steps = 0;
        int exponents[2] = {0, 0};
        bool is_spread = false;
        if (there) {
            const u8* from = a.packed + (of_expert * units + unit) * UNIT_BYTES;
            words = *reinterpret_cast<const uint4*>(from + thread * 16);
            steps = *reinterpret_cast<const u32*>(from + UNIT_VALUE_BYTES + thread / 4 * 4);
            const int output = thread / 32 * 16 + thread % 32 / 4;
            exponents[0] = a.exponents[of_expert * UNIT_OUTPUTS + output];
            exponents[1] = a.exponents[of_expert * UNIT_OUTPUTS + output + 8];
            is_spread = a.spread != nullptr && a.spread[of_expert] != 0;
        }
        // Of groups that are not all zeros: the scale of such a one is of no consequence.
        u32 most = 0;   // largest exponent, plus one
        u32 least = 0;  // smallest exponent, taken from 256
        const u32 parts[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            u32 any = parts[i] & 0x77777777u;
            any |= __shfl_xor_sync(WARP, any, 1);
            any |= __shfl_xor_sync(WARP, any, 2);
            const u32 exponent = (u32)exponents[i % 2] - byte_of(steps, i) / 8;
            most = max(most, any == 0 ? 0 : exponent + 1);
            least = max(least, any == 0 ? 0 : 256 - exponent);
        }
        const int largest = (int)largest_of_block(most, &shared[0]) - 1;
        const int smallest = 256 - (int)largest_of_block(least, &shared[1]);
        const bool empty = largest < 0;
        const bool is_exact =
            empty || (largest - smallest <= Fold<FORMAT>::MOST_STEPS && largest >= HOST_LEAST && largest <= HOST_MOST);
        if (is_spread || !is_exact) atomicMax(a.report, ~(u32)block);
        if (threadIdx.x == 0) a.scales[block] = empty ? 1.0f : power_of_two(exponent_of_sum<FORMAT>(largest));
        if (!there) continue;
        // Steps below the block's largest scale, as a byte of e4m3 says them. Of a group of zeros they may be anything.
        u32 further[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) further[i] = byte_of(steps, i) + 8 * (u32)(largest - exponents[i % 2]) & 255u;
        u32 values[2 * GROUP_REGISTERS<FORMAT>];
        decode_group<FORMAT, 0, true>(words, further, values);
        decode_group<FORMAT, 1, true>(words, further, values + GROUP_REGISTERS<FORMAT>);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            // Register i: the group's lower 16 of K, or its upper; of the upper output, or the lower one.
            const int group = i / 4;
            const int k = unit * UNIT_K + group * 32 + i % 4 / 2 * 16 + lane * 4;
            const int row = slab * UNIT_OUTPUTS + thread / 32 * 16 + thread % 32 / 4 + i % 2 * 8;
            if (row < a.n && k < a.k) *reinterpret_cast<u32*>(a.values + (expert * a.n + row) * a.k + k) = values[i];
        }
    }
}
