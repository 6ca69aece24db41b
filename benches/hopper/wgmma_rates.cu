// What the matrix units of a Hopper give for chains of e4m3 wgmma, by where A comes from, by the width of an
// instruction and by what else goes on. One block per multiprocessor, 1 to 3 warpgroups that multiply, each 64 rows; a
// block of K is 128 bytes of it.
//
//   nvcc -gencode=arch=compute_90a,code=sm_90a -O3 --split-compile=0 -o wgmma_rates wgmma_rates.cu && ./wgmma_rates
//
// A tile has 64 rows to a warpgroup and 256 outputs (192 where n is 96 or 192). Modes, added up: 1 copies: a producer
// fills three stages at the rate the tile needs, from a buffer that stays in the L2, and the warpgroups wait for it; 2
// sums: each chain of four instructions is scaled and added to f32 sums, while the next one runs where there are
// registers for two ("1 part" where not). Rows in registers are loaded by ldmatrix once a block of K, a block ahead.
// Every eight blocks of K all products are waited for (the compiler follows them no further): about 60 cycles of 8192,
// or, with one warpgroup, of 4096.
//
// Columns: cycles for a block of K, of them 100 % busy would be rows * outputs / 32; TFLOP/s and clock by the host's
// clock.
typedef unsigned char u8;
typedef unsigned int u32;
typedef unsigned long long u64;

constexpr int STAGES = 3;
constexpr int COPIES = 1;
constexpr int SUMS = 2;

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

__device__ __forceinline__ u64 operand(u32 address) {
    return (1ull << 62) | ((u64)(1024 >> 4) << 32) | ((1u << 16) + (address >> 4));
}

__device__ __forceinline__ void wait_for_phase(u32 barrier, u32 parity) {
    asm volatile(
        "{\n.reg .pred p;\nWAIT:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@p bra OVER;\nbra WAIT;\nOVER:\n}" ::"r"(barrier),
        "r"(parity)
        : "memory");
}

__device__ __forceinline__ void arrive_if(u32 barrier, u32 does) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.u32 p, %1, 0;\n@p mbarrier.arrive.shared::cta.b64 _, [%0];\n}" ::"r"(barrier),
        "r"(does)
        : "memory");
}

template <int COUNT>
__device__ __forceinline__ void hold(float (&sum)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) asm volatile("" : "+f"(sum[i])::"memory");
}

struct Rows {
    u32 words[4][4];
};

__device__ __forceinline__ void load_rows(Rows& rows, u32 at) {
    u32 lane;
    asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
    const u32 from = at + lane % 16 * 128 + ((lane / 16 ^ lane % 8) << 4);
#pragma unroll
    for (int i = 0; i < 4; ++i)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(rows.words[i][0]), "=r"(rows.words[i][1]), "=r"(rows.words[i][2]), "=r"(rows.words[i][3])
                     : "r"(from ^ (u32)i * 32)
                     : "memory");
}

__device__ __forceinline__ void keep(const Rows& rows) {
#pragma unroll
    for (int i = 0; i < 16; ++i) asm volatile("" ::"r"(rows.words[i / 4][i % 4]) : "memory");
}

template <int N>
struct Multiply;

#define O4(i) "+f"(s[i]), "+f"(s[i + 1]), "+f"(s[i + 2]), "+f"(s[i + 3])
#define O16(i) O4(i), O4(i + 4), O4(i + 8), O4(i + 12)
#define O32(i) O16(i), O16(i + 16)
#define N_16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define N_32 N_16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define N_48 N_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define N_64 N_48 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define N_96                                                                                                           \
    N_64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, " \
         "%85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define N_128                                                                                       \
    N_96 ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, " \
         "%111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

#define MULTIPLY(N, NAMES, A0, A1, A2, A3, A4, A5, ...)                                                          \
    template <>                                                                                                  \
    struct Multiply<N> {                                                                                         \
        static __device__ __forceinline__ void shared(float (&s)[N / 2], u64 a, u64 b, int add) {                \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #A2 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N   \
                         "k32.f32.e4m3.e4m3 {" NAMES "}, %" #A0 ", %" #A1 ", p, 1, 1;\n}"                        \
                         : __VA_ARGS__                                                                           \
                         : "l"(a), "l"(b), "r"(add));                                                            \
        }                                                                                                        \
        static __device__ __forceinline__ void registers(float (&s)[N / 2], const u32 (&a)[4], u64 b, int add) { \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #A5 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N   \
                         "k32.f32.e4m3.e4m3 {" NAMES "}, {%" #A0 ", %" #A1 ", %" #A2 ", %" #A3 "}, %" #A4        \
                         ", p, 1, 1;\n}"                                                                         \
                         : __VA_ARGS__                                                                           \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));                        \
        }                                                                                                        \
    };
MULTIPLY(32, N_16, 16, 17, 18, 19, 20, 21, O16(0))
MULTIPLY(64, N_32, 32, 33, 34, 35, 36, 37, O32(0))
MULTIPLY(96, N_48, 48, 49, 50, 51, 52, 53, O32(0), O16(32))
MULTIPLY(128, N_64, 64, 65, 66, 67, 68, 69, O32(0), O32(32))
MULTIPLY(192, N_96, 96, 97, 98, 99, 100, 101, O32(0), O32(32), O32(64))
MULTIPLY(256, N_128, 128, 129, 130, 131, 132, 133, O32(0), O32(32), O32(64), O32(96))

template <int LATER>
__device__ __forceinline__ void wait_for_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LATER) : "memory");
}

// `most` is the most warpgroups the kernel is launched with, which sets its registers.
template <int N, bool REGISTERS, int MODE, int MOST>
struct Config {
    static constexpr int outputs = N % 96 == 0 ? 192 : 256;
    static constexpr int chains = outputs / N;
    static constexpr int limit = MOST == 3 ? 152 : 240;
    static constexpr int others = (REGISTERS ? 32 : 0) + 24;
    static constexpr bool sums = (MODE & SUMS) != 0;
    static constexpr bool is_double = sums && 3 * N / 2 + others + (MOST == 3 ? 8 : 0) <= limit;
    static constexpr int unroll = sums && !is_double ? 2 : 8;
    static constexpr bool exists = (sums ? N : N / 2) + others + (MOST == 3 ? 8 : 0) <= limit;
};

template <int N, bool REGISTERS>
__device__ __forceinline__ void start(float (&part)[N / 2], const Rows& rows, u32 a, u32 b, bool fresh) {
    hold(part);
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if constexpr (REGISTERS)
            Multiply<N>::registers(part, rows.words[i], operand(b) + 2 * i, !fresh || i > 0);
        else
            Multiply<N>::shared(part, operand(a) + 2 * i, operand(b) + 2 * i, !fresh || i > 0);
    }
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    hold(part);
}

template <int COUNT>
__device__ __forceinline__ void add(float (&sum)[COUNT], float (&part)[COUNT], float upper, float lower) {
    hold(part);
#pragma unroll
    for (int i = 0; i < COUNT; ++i) sum[i] = __fmaf_rn(part[i], i % 4 < 2 ? upper : lower, sum[i]);
}

struct Stage {
    u32 memory;
    int bytes;
    int rows;
    __device__ __forceinline__ u32 weights(int block) const { return memory + block % STAGES * bytes; }
    __device__ __forceinline__ u32 a(int block, int outputs) const { return weights(block) + outputs * 128; }
    __device__ __forceinline__ u32 full(int block) const { return memory + STAGES * bytes + block % STAGES * 8; }
    __device__ __forceinline__ u32 empty(int block) const { return full(block) + STAGES * 8; }
};

// Some blocks of K from `first` on; without products on their way before and after. `rows` has the first block's.
template <int N, bool REGISTERS, int MODE, int MOST, int BLOCK, int CHAIN>
__device__ __forceinline__ void step(const Stage& s, int first, int mine, Rows& rows, Rows& next, float (&part)[N / 2],
                                     float (&other)[N / 2], float (&sum)[N / 2], float upper, float lower) {
    using C = Config<N, REGISTERS, MODE, MOST>;
    if constexpr (BLOCK == C::unroll) {
        // The last chain.
        wait_for_products<0>();
        if constexpr (C::is_double) add(sum, other, upper, lower);
    } else {
        const int block = first + BLOCK;
        if (CHAIN == 0 && (MODE & COPIES) && !REGISTERS) wait_for_phase(s.full(block), block / STAGES & 1);
        const u32 a = s.a(block, C::outputs) + mine * 64 * 128;
        start<N, REGISTERS>(part, rows, a, s.weights(block) + CHAIN * N * 128, C::sums);
        constexpr bool FIRST = BLOCK == 0 && CHAIN == 0;
        constexpr bool LAST = CHAIN + 1 == C::chains;
        const auto load_next = [&] {
            if constexpr (REGISTERS && LAST) {
                if (MODE & COPIES) wait_for_phase(s.full(block + 1), (block + 1) / STAGES & 1);
                load_rows(next, s.a(block + 1, C::outputs) + (mine * 64 + threadIdx.x / 32 % 4 * 16) * 128);
            }
        };
        if constexpr (C::sums && !C::is_double) {
            load_next();
            wait_for_products<0>();
            add(sum, part, upper, lower);
        } else {
            wait_for_products<1>();
            // The rows of the block before, whose last chain has now been waited for.
            if constexpr (REGISTERS && CHAIN == 0 && !FIRST) keep(next);
            load_next();
            if constexpr (C::is_double && !FIRST) add(sum, other, upper, lower);
        }
        // The block before is done with when the first chain of this one is not waited for.
        if (CHAIN == 0 && (MODE & COPIES) && block > 0) arrive_if(s.empty(block - 1), threadIdx.x % 128 == 0);
        if constexpr (C::is_double) {
            if constexpr (LAST) {
                step<N, REGISTERS, MODE, MOST, BLOCK + 1, 0>(s, first, mine, next, rows, other, part, sum, upper,
                                                             lower);
            } else {
                step<N, REGISTERS, MODE, MOST, BLOCK, CHAIN + 1>(s, first, mine, rows, next, other, part, sum, upper,
                                                                 lower);
            }
        } else if constexpr (LAST) {
            step<N, REGISTERS, MODE, MOST, BLOCK + 1, 0>(s, first, mine, next, rows, part, other, sum, upper, lower);
        } else {
            step<N, REGISTERS, MODE, MOST, BLOCK, CHAIN + 1>(s, first, mine, rows, next, part, other, sum, upper,
                                                             lower);
        }
    }
}

template <int N, bool REGISTERS, int MODE, int MOST>
__global__ void __launch_bounds__((MOST + 1) * 128, 1)
    rates(const u8* from, u32 buffer_bytes, int blocks, int groups, u64* cycles, float* out) {
    using C = Config<N, REGISTERS, MODE, MOST>;
    extern __shared__ __align__(1024) u8 shared[];
    const Stage s{__shfl_sync(0xffffffffu, shared_address(shared), 0), (C::outputs + groups * 64) * 128, 0};
    for (int i = threadIdx.x; i < STAGES * s.bytes / 16; i += blockDim.x)
        reinterpret_cast<uint4*>(shared)[i] =
            reinterpret_cast<const uint4*>(from)[(blockIdx.x * 4096 + i) % (buffer_bytes / 16)];
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; ++i) {
            asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(s.full(i)) : "memory");
            asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(s.empty(i)), "r"(groups) : "memory");
        }
        asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
    }
    __syncthreads();
    const int group = __shfl_sync(0xffffffffu, (int)threadIdx.x / 128, 0);
    if (group == groups) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(MOST == 3 ? 56 : 24));
        // One block more than is multiplied: rows are loaded a block ahead.
        if ((MODE & COPIES) && threadIdx.x == groups * 128) {
            u32 at = blockIdx.x * 65536 % (buffer_bytes - s.bytes);
            for (int block = 0; block <= blocks; ++block) {
                if (block >= STAGES) wait_for_phase(s.empty(block), (block / STAGES - 1) & 1);
                asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(s.full(block)), "r"(s.bytes)
                             : "memory");
                const int half = s.bytes / 2;
                for (int part = 0; part < 2; ++part)
                    asm volatile(
                        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                            s.weights(block) + part * half),
                        "l"(from + at + part * half), "r"(half), "r"(s.full(block))
                        : "memory");
                at = (at + 8192) % (buffer_bytes - s.bytes);
            }
            wait_for_phase(s.full(blocks), blocks / STAGES & 1);
        }
        return;
    }
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(C::limit));
    float part[N / 2], other[N / 2], sum[N / 2];
#pragma unroll
    for (int i = 0; i < N / 2; ++i) part[i] = other[i] = sum[i] = 0.0f;
    Rows rows, next;
    // As the compiler cannot know them.
    const float upper = 1.0f / 65536.0f + (float)blocks * 1e-9f, lower = upper + 1e-7f;
    const long long begin = clock64();
    if constexpr (REGISTERS) {
        if (MODE & COPIES) wait_for_phase(s.full(0), 0);
        load_rows(rows, s.a(0, C::outputs) + (group * 64 + threadIdx.x / 32 % 4 * 16) * 128);
    }
    for (int first = 0; first < blocks; first += C::unroll)
        step<N, REGISTERS, MODE, MOST, 0, 0>(s, first, group, rows, next, part, other, sum, upper, lower);
    const long long end = clock64();
    if (threadIdx.x == 0) cycles[blockIdx.x] = end - begin;
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < N / 2; ++i) total += sum[i] + part[i];
    // Never so, but the compiler cannot know.
    if (total == 1.2345678f) out[threadIdx.x] = total;
}

#define MODES(X, N, REGISTERS, MOST) \
    X(N, REGISTERS, 0, MOST) X(N, REGISTERS, 1, MOST) X(N, REGISTERS, 2, MOST) X(N, REGISTERS, 3, MOST)
#define WIDTHS(X, MOST)        \
    MODES(X, 64, false, MOST)  \
    MODES(X, 96, false, MOST)  \
    MODES(X, 128, false, MOST) \
    MODES(X, 192, false, MOST) \
    MODES(X, 256, false, MOST) \
    MODES(X, 32, true, MOST)   \
    MODES(X, 64, true, MOST)   \
    MODES(X, 96, true, MOST)   \
    MODES(X, 128, true, MOST)  \
    MODES(X, 192, true, MOST)

#include <cstdio>
#include <cstdlib>
#include <vector>

#define CHECK(call)                                                    \
    do {                                                               \
        const cudaError_t error = call;                                \
        if (error != cudaSuccess) {                                    \
            std::printf("%s: %s\n", #call, cudaGetErrorString(error)); \
            std::exit(1);                                              \
        }                                                              \
    } while (false)

static u8* buffer;
static u64* cycles;
static float* out;
static int multiprocessors;
constexpr u32 BUFFER_BYTES = 16u << 20;
constexpr int BLOCKS = 1600;

template <int N, bool REGISTERS, int MODE, int MOST>
void measure(int groups) {
    using C = Config<N, REGISTERS, MODE, MOST>;
    if constexpr (C::exists) {
        auto kernel = rates<N, REGISTERS, MODE, MOST>;
        const int bytes = STAGES * (C::outputs + groups * 64) * 128 + 2 * STAGES * 8;
        CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
        cudaFuncAttributes attributes;
        CHECK(cudaFuncGetAttributes(&attributes, kernel));
        cudaEvent_t begin, end;
        CHECK(cudaEventCreate(&begin));
        CHECK(cudaEventCreate(&end));
        const int launches = 20;
        for (int i = -launches; i < launches; ++i) {
            if (i == 0) CHECK(cudaEventRecord(begin));
            kernel<<<multiprocessors, groups * 128 + 128, bytes>>>(buffer, BUFFER_BYTES, BLOCKS, groups, cycles, out);
        }
        CHECK(cudaEventRecord(end));
        CHECK(cudaDeviceSynchronize());
        float milliseconds = 0.0f;
        CHECK(cudaEventElapsedTime(&milliseconds, begin, end));
        milliseconds /= launches;
        std::vector<u64> counted(multiprocessors);
        CHECK(cudaMemcpy(counted.data(), cycles, multiprocessors * sizeof(u64), cudaMemcpyDeviceToHost));
        double mean = 0.0;
        for (u64 c : counted) mean += (double)c / multiprocessors / BLOCKS;
        const double ideal = groups * 64.0 * C::outputs / 32.0;
        const double flops = 2.0 * groups * 64.0 * C::outputs * 128.0 * BLOCKS * multiprocessors;
        std::printf("%-9s n%-4d %d  %-7s %-5s %-7s %8.0f %6.1f%% %8.0f %6.0f %4d%s\n",
                    REGISTERS ? "registers" : "shared", N, groups, MODE & COPIES ? "copies" : "",
                    MODE & SUMS ? "sums" : "", MODE & SUMS ? C::is_double ? "2 parts" : "1 part" : "", mean,
                    100.0 * ideal / mean, flops / milliseconds * 1e-9, mean * BLOCKS / milliseconds * 1e-3,
                    attributes.numRegs, attributes.localSizeBytes > 0 ? " SPILLS" : "");
    }
}

int main() {
    cudaDeviceProp properties;
    CHECK(cudaGetDeviceProperties(&properties, 0));
    multiprocessors = properties.multiProcessorCount;
    // About +-0.03 to +-4: no zeros, no NaN.
    std::vector<u8> bytes(BUFFER_BYTES);
    u64 state = 88172645463325252ull;
    for (u8& byte : bytes) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        byte = (u8)((state & 0x87) | ((2 + (state >> 8 & 7)) << 3));
    }
    CHECK(cudaMalloc(&buffer, BUFFER_BYTES));
    CHECK(cudaMalloc(&cycles, multiprocessors * sizeof(u64)));
    CHECK(cudaMalloc(&out, 4096));
    CHECK(cudaMemcpy(buffer, bytes.data(), BUFFER_BYTES, cudaMemcpyHostToDevice));
    std::printf("%s\nA from    width groups (64 rows each)      cycles   busy  TFLOP/s   MHz regs\n", properties.name);
#define MEASURE(N, REGISTERS, MODE, MOST)     \
    if (MOST == 3) {                          \
        measure<N, REGISTERS, MODE, MOST>(3); \
    } else {                                  \
        measure<N, REGISTERS, MODE, MOST>(1); \
        measure<N, REGISTERS, MODE, MOST>(2); \
    }
    WIDTHS(MEASURE, 2)
    WIDTHS(MEASURE, 3)
    return 0;
}
