// Arranges int4 weights, blocks [experts, n, k / 2] with bf16 or f16 scales [experts, n, k / 32], as groups/int4.cuh
// has them: once, before the first GEMM. Says in `report` which outputs' scales are no numbers. `unpack` writes both
// again, where the caller has kept none.
//
// A thread takes a group of an output at a time.
//
// Set by the host: HOST_BF16 (rows are bf16, else e4m3), HOST_THREADS (of a block), HOST_INT4 (1).
#include "groups/int4.cuh"

constexpr Format FORMAT = HOST_BF16 ? Format::BF16 : Format::E4M3;
constexpr int THREADS = HOST_THREADS;
constexpr u32 ZERO = 8;  // the nibble

struct ArrangeArgs {
    const u8* blocks;
    const u16* scales;
    u8* packed;
    u64* report;  // the complement of the first row with a scale that is not finite, and of that scale; or 0
    int experts;
    int n;
    int k;
    int f16_scales;
};

struct UnpackArgs {
    const u8* packed;
    u8* blocks;
    u16* scales;  // absent where they are not asked for
    int experts;
    int n;
    int k;
    int reserved;
};

// Where a group of an output is in its unit.
struct Place {
    int words;  // bytes to the first lane's word; those of the others are 16 further each
    int scale;  // bytes

    __device__ __forceinline__ Place(int output, int group) {
        const int part = 2 * (group % 2) + output / 8 % 2;
        const int thread = output / 16 * 32 + output % 8 * 4;
        words = thread * 16 + part * 4;
        scale = UNIT_VALUE_BYTES + thread * 2 + part * 2;
    }
};

extern "C" __global__ void __launch_bounds__(THREADS) arrange(const __grid_constant__ ArrangeArgs a) {
    wait_for_previous_launch();
    let_next_launch_start();
    const u16 exponent = a.f16_scales ? 0x7c00 : 0x7f80;
    const int slabs = (a.n + UNIT_OUTPUTS - 1) / UNIT_OUTPUTS;
    const int units = (a.k + UNIT_K - 1) / UNIT_K;
    const int groups = a.k / 32;
    const i64 all = (i64)a.experts * slabs * UNIT_OUTPUTS * units * 2;
    for (i64 index = (i64)blockIdx.x * THREADS + threadIdx.x; index < all; index += (i64)gridDim.x * THREADS) {
        const int group = (int)(index % (2 * units));
        const i64 whole_row = index / (2 * units);  // of whole slabs
        const i64 slab = whole_row / UNIT_OUTPUTS;
        const int output = (int)(whole_row % UNIT_OUTPUTS);
        const int row = (int)(slab % slabs) * UNIT_OUTPUTS + output;
        const bool there = row < a.n && group < groups;
        const i64 matrix_row = slab / slabs * a.n + row;
        const i64 from = matrix_row * groups + group;
        const u16 scale = there ? a.scales[from] : 0;
        if ((scale & exponent) == exponent) atomicMax(a.report, ~((u64)matrix_row << 16 | scale));
        u32 words[4] = {};
#pragma unroll
        for (int lane = 0; lane < 4; ++lane)
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const int k = int4_place<FORMAT>(lane, i);
                const u32 nibble = there ? a.blocks[from * 16 + k / 2] >> 4 * (k % 2) & 15u : ZERO;
                words[lane] |= int4_bits<FORMAT>(nibble, i);
            }
        u8* unit = a.packed + (slab * units + group / 2) * UNIT_BYTES;
        const Place place(output, group);
#pragma unroll
        for (int lane = 0; lane < 4; ++lane) *reinterpret_cast<u32*>(unit + place.words + lane * 16) = words[lane];
        *reinterpret_cast<u16*>(unit + place.scale) = scale;
    }
}

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
        const u8* unit = a.packed + (slab * units + group / 2) * UNIT_BYTES;
        const Place place(row % UNIT_OUTPUTS, group);
        u32 words[4] = {};
#pragma unroll
        for (int lane = 0; lane < 4; ++lane) {
            const u32 word = *reinterpret_cast<const u32*>(unit + place.words + lane * 16);
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const int k = int4_place<FORMAT>(lane, i);
                words[k / 8] |= int4_nibble<FORMAT>(word, i) << 4 * (k % 8);
            }
        }
        u8* block = a.blocks + index * 16;
#pragma unroll
        for (int i = 0; i < 4; ++i) *reinterpret_cast<u32*>(block + 4 * i) = words[i];
        if (a.scales != nullptr) a.scales[index] = *reinterpret_cast<const u16*>(unit + place.scale);
    }
}
