// How fast a Hopper's memory gives weights in the order in which a grouped GEMM of few rows reads them, when nothing is
// multiplied: a block to each multiprocessor, boxes of rows by 128 bytes, one block of K after the other, as many in
// flight as stages. Tiles are shared out evenly (static), or taken by whichever block is free (claimed); blocks of K are
// asked for one at a time or two together.
//
//   nvcc -gencode=arch=compute_90a,code=sm_90a -O3 -std=c++17 -o read_rates read_rates.cu && ./read_rates
//
// Beside the rate, which has the launch in it, it prints when the first, the middle and the last block end.
#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

typedef unsigned int u32;
typedef unsigned long long u64;

constexpr int MULTIPROCESSORS = 132;
constexpr int LOADS = 0, RELEASES = 64;  // threads of a block, of different warps
constexpr u64 KEEP_BRIEFLY = 0x12f0000000000000ull;

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

__device__ __forceinline__ void init_barrier(u32 barrier) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ bool is_phase_over(u32 barrier, u32 parity) {
    u32 over;
    asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                 : "=r"(over)
                 : "r"(barrier), "r"(parity)
                 : "memory");
    return over != 0;
}

__device__ __forceinline__ u64 nanoseconds() {
    u64 now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now)::"memory");
    return now;
}

struct Work {
    u32 tiles;
    int blocks;  // of K
    int rows;    // of a tile
    u32* claims;
    u64* times;  // of each block: begin, end
};

template <int STAGES, int TOGETHER, bool CLAIMED>
__global__ void __launch_bounds__(128) read(const __grid_constant__ CUtensorMap map, Work work) {
    extern __shared__ __align__(1024) char stages[];
    __shared__ u64 full[STAGES], empty[STAGES];
    __shared__ volatile int all;  // blocks of K that this block loads, once that is known
    if (threadIdx.x == LOADS) {
        for (int i = 0; i < STAGES; ++i)
            init_barrier(shared_address(&full[i])), init_barrier(shared_address(&empty[i]));
        asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
        all = -1;
    }
    __syncthreads();
    const u64 begin = nanoseconds();
    const u32 bytes = work.rows * 128;
    int stage = 0, loaded = 0;
    u32 parity = 0;
    const auto advance = [](int& stage, u32& parity) {
        if (++stage == STAGES) stage = 0, parity ^= 1;
    };
    if (threadIdx.x == LOADS) {
        u32 next = CLAIMED ? atomicAdd(work.claims, 1u) : blockIdx.x;
        while (next < work.tiles) {
            const u32 tile = next;
            next = CLAIMED ? atomicAdd(work.claims, 1u) : tile + gridDim.x;
            for (int block = 0; block < work.blocks; block += TOGETHER) {
                int ahead = stage;
                u32 ahead_parity = parity;
                for (int i = 0; i < TOGETHER; ++i) {
                    while (!is_phase_over(shared_address(&empty[ahead]), ahead_parity ^ 1)) {
                    }
                    asm volatile(
                        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&full[ahead])),
                        "r"(bytes)
                        : "memory");
                    advance(ahead, ahead_parity);
                }
                for (int i = 0; i < TOGETHER; ++i) {
                    asm volatile(
                        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
                        "[%0], [%1, {%3, %4}], [%2], %5;" ::"r"(shared_address(stages) + stage * bytes),
                        "l"(&map), "r"(shared_address(&full[stage])), "r"((block + i) * 128), "r"(tile * work.rows),
                        "l"(KEEP_BRIEFLY)
                        : "memory");
                    advance(stage, parity);
                }
            }
            loaded += work.blocks;
        }
        all = loaded;
    } else if (threadIdx.x == RELEASES) {
        for (int released = 0;; ++released, advance(stage, parity)) {
            int known = all;
            while ((known < 0 || released < known) && !is_phase_over(shared_address(&full[stage]), parity)) known = all;
            if (known >= 0 && released >= known) break;
            asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&empty[stage])) : "memory");
        }
        work.times[2 * blockIdx.x] = begin, work.times[2 * blockIdx.x + 1] = nanoseconds();
    }
}

__global__ void fill(u32* x, u64 count) {
    for (u64 i = blockIdx.x * 256ull + threadIdx.x; i < count; i += 256ull * gridDim.x) {
        const u32 v = (u32)i * 2654435761u;
        x[i] = v ^ v >> 15;
    }
}

void check(int error, const char* what) {
    if (error != 0) {
        std::fprintf(stderr, "%s: error %d\n", what, error);
        std::exit(1);
    }
}

int main() {
    void* found;
    cudaDriverEntryPointQueryResult status;
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &status),
          "driver");
    const auto encode = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
    const u64 size = 1200ull << 20;
    char* weights;
    u32* claims;
    u64* times;
    check(cudaMalloc(&weights, size) | cudaMalloc(&claims, 4) | cudaMalloc(&times, MULTIPROCESSORS * 16), "memory");
    fill<<<4096, 256>>>(reinterpret_cast<u32*>(weights), size / 4);
    cudaEvent_t before, after;
    cudaEventCreate(&before), cudaEventCreate(&after);

    const auto run = [&](const char* how, auto kernel, int stages, int k, int rows, u64 part) {
        const Work work{u32(part / k / rows), k / 128, rows, claims, times};
        CUtensorMap map;
        const cuuint64_t sizes[] = {cuuint64_t(k), cuuint64_t(work.tiles) * rows}, stride[] = {cuuint64_t(k)};
        const cuuint32_t box[] = {128, cuuint32_t(rows)}, steps[] = {1, 1};
        check(encode(&map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 2, weights, sizes, stride, box, steps,
                     CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                     CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE),
              "map");
        const int shared = stages * rows * 128 + 1024;
        check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared), "shared memory");
        std::vector<float> all;
        double first = 0, middle = 0, last = 0;
        constexpr int WARM = 30, TIMED = 30;
        for (int i = 0; i < WARM + TIMED; ++i) {
            cudaMemsetAsync(claims, 0, 4);
            cudaEventRecord(before);
            kernel<<<MULTIPROCESSORS, 128, shared>>>(map, work);
            cudaEventRecord(after);
            check(cudaEventSynchronize(after), how);
            if (i < WARM) continue;
            float milliseconds;
            cudaEventElapsedTime(&milliseconds, before, after);
            all.push_back(milliseconds);
            u64 of_block[MULTIPROCESSORS][2], begin = ~0ull;
            cudaMemcpy(of_block, times, sizeof(of_block), cudaMemcpyDeviceToHost);
            std::vector<u64> ends;
            for (const auto& [start, end] : of_block) begin = std::min(begin, start), ends.push_back(end);
            std::sort(ends.begin(), ends.end());
            const auto us = [&](int block) { return (ends[block] - begin) / 1e3 / TIMED; };
            first += us(0), middle += us(MULTIPROCESSORS / 2), last += us(MULTIPROCESSORS - 1);
        }
        std::sort(all.begin(), all.end());
        const float median = all[all.size() / 2];
        std::printf("%4d MB, K %4d, %3d rows, %-22s %.2f TB/s, %5.1f us; blocks end at %5.1f, %5.1f, %5.1f us\n",
                    int(part >> 20), k, rows, how, double(work.tiles) * rows * k / median / 1e9, median * 1e3, first,
                    middle, last);
    };
    for (u64 part : {size, 200ull << 20})
        for (int k : {7168, 4096, 2048, 768}) {
            run("static", read<12, 1, false>, 12, k, 128, part);
            run("claimed", read<12, 1, true>, 12, k, 128, part);
            run("static, two together", read<12, 2, false>, 12, k, 128, part);
            run("claimed, two together", read<12, 2, true>, 12, k, 128, part);
            run("static", read<16, 1, false>, 16, k, 64, part);
            run("claimed", read<16, 1, true>, 16, k, 64, part);
        }
}
