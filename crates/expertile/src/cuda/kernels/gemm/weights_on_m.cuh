// What the kernels share in which weights are the M operand of wgmma: a thread has two outputs, eight apart, of some
// rows. Results are transposed in shared memory and stored row by row.
#pragma once
#include "gemm/pipeline.cuh"

// Ids of bar.sync; 0 is that of __syncthreads. Further consumers' follow.
enum class NamedBarrier : int { CONSUMER_0 = 1, CONSUMER_1 = 2 };

// The threads of a consumer warpgroup meet.
template <int CONSUMERS>
__device__ __forceinline__ void meet_consumer(int consumer) {
    static_assert((int)NamedBarrier::CONSUMER_0 + CONSUMERS <= 16, "a block has 16 barriers");
    if constexpr (CONSUMERS > 2)
        meet_threads<WARPGROUP>((int)NamedBarrier::CONSUMER_0 + consumer);
    else if (consumer == 0)
        meet_at<(int)NamedBarrier::CONSUMER_0, WARPGROUP>();
    else
        meet_at<(int)NamedBarrier::CONSUMER_1, WARPGROUP>();
}

// The first of this thread's two outputs among the 64 of its warpgroup; the second is eight further.
__device__ __forceinline__ int output_of_thread() { return threadIdx.x % WARPGROUP / 32 * 16 + lane_of_thread() / 4; }

// What an expert has for each of this thread's two outputs.
struct OutputPair {
    float upper;
    float lower;

    // `values` are the expert's; past the last output there is any.
    template <typename Args>
    __device__ __forceinline__ OutputPair(const float* values, const Args& a, const Tile& tile, int consumer) {
        const int output = tile.column + consumer * 64 + output_of_thread();
        upper = values[min(output, a.n - 1)];
        lower = values[min(output + 8, a.n - 1)];
    }
};

// Adds to the sums of N rows what each output has.
template <int N>
__device__ __forceinline__ void add_bias(const OutputPair& bias, float (&sum)[N / 2]) {
#pragma unroll
    for (int i = 0; i < N / 2; ++i) sum[i] = __fadd_rn(sum[i], i % 4 < 2 ? bias.upper : bias.lower);
}

// Stores the live rows: transposed in shared memory, then sixteen bytes a thread. (The bulk copy engine takes one row at
// a time from a warp, 70 cycles each.)
template <typename Config, typename SharedStorage, int N>
__device__ __forceinline__ void store_rows(const GemmArgs<Config>& a, const Tile& tile, u32 memory, int consumer,
                                           const float (&sum)[N / 2]) {
    constexpr int STAGING_ROW = Config::STAGING_ROW;
    constexpr int CHUNK = 8;                                     // outputs
    constexpr int CHUNKS = Config::OUTPUTS_OF_CONSUMER / CHUNK;  // of a row
    constexpr int ROWS_AT_ONCE = WARPGROUP / CHUNKS;             // by a warpgroup
    constexpr int LOADS_AT_ONCE = N % (4 * ROWS_AT_ONCE) == 0 ? 4 : N % (2 * ROWS_AT_ONCE) == 0 ? 2 : 1;
    static_assert(N % ROWS_AT_ONCE == 0, "every thread has as many chunks");
    const u32 staging = memory + OFFSET(SharedStorage, staging) + consumer * Config::ROW_TILE * STAGING_ROW;
    // Read here, so that nothing that follows from it takes a register while a tile is multiplied.
    const int thread = read_thread() % WARPGROUP;
    const int lane = thread % 32;
    meet_consumer<Config::CONSUMERS>(consumer);
    const u32 mine = staging + (lane / 16 * 8 + lane % 8) * STAGING_ROW + (thread / 32 * 16 + lane / 8 % 2 * 8) * 2;
#pragma unroll
    for (int i = 0; i < N / 16; ++i)
        store_transposed(mine + i * 16 * STAGING_ROW, pack_bf16(sum[8 * i], sum[8 * i + 1]),
                         pack_bf16(sum[8 * i + 2], sum[8 * i + 3]), pack_bf16(sum[8 * i + 4], sum[8 * i + 5]),
                         pack_bf16(sum[8 * i + 6], sum[8 * i + 7]));
    meet_consumer<Config::CONSUMERS>(consumer);
    const int column = tile.column + consumer * Config::OUTPUTS_OF_CONSUMER + thread % CHUNKS * CHUNK;
    const int first = thread / CHUNKS;
    const u32 from = staging + first * STAGING_ROW + thread % CHUNKS * CHUNK * 2;
    u16* to = static_cast<u16*>(a.out) + (i64)(tile.first + first) * a.n + column;
#pragma unroll
    for (int row = 0; row < N; row += LOADS_AT_ONCE * ROWS_AT_ONCE) {
        uint4 chunks[LOADS_AT_ONCE];
#pragma unroll
        for (int i = 0; i < LOADS_AT_ONCE; ++i)
            chunks[i] = load_shared_words(from + (row + i * ROWS_AT_ONCE) * STAGING_ROW);
#pragma unroll
        for (int i = 0; i < LOADS_AT_ONCE; ++i) {
            const int at = row + i * ROWS_AT_ONCE;
            if (first + at < tile.rows && column < a.n) *reinterpret_cast<uint4*>(to + (i64)at * a.n) = chunks[i];
        }
    }
    // Together again: what is the same in all of a warp stays in uniform registers.
    __syncwarp();
}
