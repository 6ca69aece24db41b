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

// Stores the live rows: transposed in shared memory, then one bulk copy of 64 outputs for each row.
template <typename Config, typename SharedStorage, int N>
__device__ __forceinline__ void store_rows(const GemmArgs<Config>& a, const Tile& tile, u32 memory, int consumer,
                                           const float (&sum)[N / 2]) {
    constexpr int STAGING_ROW = Config::STAGING_ROW;
    const u32 staging = memory + OFFSET(SharedStorage, staging) + consumer * Config::ROW_TILE * STAGING_ROW;
    const int lane = lane_of_thread();
    const int thread = threadIdx.x % WARPGROUP;
    wait_for_stores_to_read();
    meet_consumer<Config::CONSUMERS>(consumer);
    const u32 mine = staging + (lane / 16 * 8 + lane % 8) * STAGING_ROW + (thread / 32 * 16 + lane / 8 % 2 * 8) * 2;
#pragma unroll
    for (int i = 0; i < N / 16; ++i)
        store_transposed(mine + i * 16 * STAGING_ROW, pack_bf16(sum[8 * i], sum[8 * i + 1]),
                         pack_bf16(sum[8 * i + 2], sum[8 * i + 3]), pack_bf16(sum[8 * i + 4], sum[8 * i + 5]),
                         pack_bf16(sum[8 * i + 6], sum[8 * i + 7]));
    publish_shared_writes();
    meet_consumer<Config::CONSUMERS>(consumer);
    const int column = tile.column + consumer * Config::OUTPUTS_OF_CONSUMER;
    const int outputs = min(a.n - column, Config::OUTPUTS_OF_CONSUMER);
    if (outputs > 0)
        for (int row = thread; row < tile.rows; row += WARPGROUP)
            store_bytes(static_cast<u16*>(a.out) + (i64)(tile.first + row) * a.n + column, staging + row * STAGING_ROW,
                        outputs * 2);
    commit_stores();
}
