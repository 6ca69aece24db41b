// The matrix unit (wgmma): sum[64 x N] += a[64 x 32 bytes] * b[N x 32 bytes]^T, both operands in shared memory, K along
// the rows of 128 bytes that the copy engine swizzles. Element (r, n) of the sum: lane 4 * (r % 8) + n % 8 / 2 of warp
// r / 16, register 4 * (n / 8) + 2 * (r / 8 % 2) + n % 2.
#pragma once
#include "ptx/hopper.cuh"

// The descriptor of an operand: rows of 128 bytes with the 128-byte swizzle, whose pattern is eight rows. The next 32
// bytes of K are 2 further. PTX: the matrix descriptor of wgmma.mma_async
__device__ __forceinline__ u64 operand(u32 address) {
    constexpr u64 SWIZZLE_128_BYTES = 1ull << 62;
    constexpr u64 NEXT_EIGHT_ROWS = (u64)(1024 >> 4) << 32;
    return SWIZZLE_128_BYTES | NEXT_EIGHT_ROWS | ((1u << 16) + (address >> 4));
}

// An address and so many bytes, added at this point: else the compiler keeps the sums of a whole loop in registers.
// PTX: add
__device__ __forceinline__ u32 further(u32 address, u32 bytes) {
    u32 sum;
    asm volatile("add.u32 %0, %1, %2;" : "=r"(sum) : "r"(address), "r"(bytes));
    return sum;
}

// Orders writes to the sums' registers before the products that follow. PTX: wgmma.fence
__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Closes a group of products. PTX: wgmma.commit_group
__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most LATER committed groups are still running. PTX: wgmma.wait_group
template <int LATER>
__device__ __forceinline__ void wait_for_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LATER) : "memory");
}

// Keeps the compiler from moving its uses of a sum across this point (no instruction; CUTLASS:
// warpgroup_fence_operand).
template <int REGISTERS>
__device__ __forceinline__ void fence_accumulators(float (&sum)[REGISTERS]) {
#pragma unroll
    for (int i = 0; i < REGISTERS; ++i) asm volatile("" : "+f"(sum[i])::"memory");
}

// What both operands are made of.
enum class Format { E4M3, BF16 };

// wgmma.mma_async.sync.aligned.m64nNk32 (e4m3) or .m64nNk16 (bf16): sum = a * b^T where `add` is 0, sum += a * b^T
// where it is 1.
template <Format FORMAT, int N>
__device__ __forceinline__ void multiply(float (&sum)[N / 2], u64 a, u64 b, int add);

// The same with `a` in registers, K along four of them: element (r, k) of 32 (e4m3) or 16 (bf16) values is in lane
// 4 * (r % 8) + k % HALF / PER_REGISTER of warp r / 16, register 2 * (k / HALF) + r / 8 % 2, where a register has
// PER_REGISTER = 4 or 2 values and HALF is 16 or 8. They must not change before the products are done.
template <Format FORMAT, int N>
__device__ __forceinline__ void multiply_registers(float* sum, const u32* a, u64 b, int add);

// Keeps the compiler from taking operands in registers for other things before this point (no instruction).
template <int REGISTERS>
__device__ __forceinline__ void fence_operands(u32 (&a)[REGISTERS]) {
#pragma unroll
    for (int i = 0; i < REGISTERS; ++i) asm volatile("" : "+r"(a[i])::"memory");
}

#define OPERANDS_4(i) "+f"(sum[i]), "+f"(sum[i + 1]), "+f"(sum[i + 2]), "+f"(sum[i + 3])
#define OPERANDS_8(i) OPERANDS_4(i), OPERANDS_4(i + 4)
#define OPERANDS_16(i) OPERANDS_8(i), OPERANDS_8(i + 8)
#define OPERANDS_32(i) OPERANDS_16(i), OPERANDS_16(i + 16)

#define NAMES_0_7 "%0, %1, %2, %3, %4, %5, %6, %7"
#define NAMES_8_15 "%8, %9, %10, %11, %12, %13, %14, %15"
#define NAMES_16_31 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define NAMES_32_47 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define NAMES_48_63 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define NAMES_64_79 "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define NAMES_80_95 "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define NAMES_32_39 "%32, %33, %34, %35, %36, %37, %38, %39"
#define NAMES_0_15 NAMES_0_7 ", " NAMES_8_15
#define NAMES_0_31 NAMES_0_15 ", " NAMES_16_31
#define NAMES_0_47 NAMES_0_31 ", " NAMES_32_47
#define NAMES_0_63 NAMES_0_47 ", " NAMES_48_63

// The names of a, b and `add` follow those of the sum's registers. TYPES ends the instruction's name; ORIENTATION says,
// for bf16, that both operands have K along their rows, as those of e4m3 always do.
#define MULTIPLY_OF(FORMAT, TYPES, ORIENTATION, N, NAMES, A, B, ADD, ...)                                           \
    template <>                                                                                                     \
    __device__ __forceinline__ void multiply<FORMAT, N>(float (&sum)[N / 2], u64 a, u64 b, int add) {               \
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " ADD ", 0;\n"                                               \
                     "wgmma.mma_async.sync.aligned.m64n" #N TYPES " {" NAMES "}, " A ", " B ", p, 1, 1" ORIENTATION \
                     ";\n}"                                                                                         \
                     : __VA_ARGS__                                                                                  \
                     : "l"(a), "l"(b), "r"(add));                                                                   \
    }
#define MULTIPLY(N, ...)                                               \
    MULTIPLY_OF(Format::E4M3, "k32.f32.e4m3.e4m3", "", N, __VA_ARGS__) \
    MULTIPLY_OF(Format::BF16, "k16.f32.bf16.bf16", ", 0, 0", N, __VA_ARGS__)

MULTIPLY(8, "%0, %1, %2, %3", "%4", "%5", "%6", OPERANDS_4(0))
MULTIPLY(16, NAMES_0_7, "%8", "%9", "%10", OPERANDS_8(0))
MULTIPLY(32, NAMES_0_15, "%16", "%17", "%18", OPERANDS_16(0))
MULTIPLY(48, NAMES_0_15 ", %16, %17, %18, %19, %20, %21, %22, %23", "%24", "%25", "%26", OPERANDS_16(0), OPERANDS_8(16))
MULTIPLY(64, NAMES_0_31, "%32", "%33", "%34", OPERANDS_32(0))
MULTIPLY(96, NAMES_0_47, "%48", "%49", "%50", OPERANDS_32(0), OPERANDS_16(32))
MULTIPLY(128, NAMES_0_63, "%64", "%65", "%66", OPERANDS_32(0), OPERANDS_32(32))
MULTIPLY(160, NAMES_0_63 ", " NAMES_64_79, "%80", "%81", "%82", OPERANDS_32(0), OPERANDS_32(32), OPERANDS_16(64))
MULTIPLY(192, NAMES_0_63 ", " NAMES_64_79 ", " NAMES_80_95, "%96", "%97", "%98", OPERANDS_32(0), OPERANDS_32(32),
         OPERANDS_32(64))

// The names of a's four registers, b and `add` follow those of the sum's.
#define MULTIPLY_REGISTERS_OF(FORMAT, TYPES, ORIENTATION, N, NAMES, A, B, ADD, ...)                                   \
    template <>                                                                                                       \
    __device__ __forceinline__ void multiply_registers<FORMAT, N>(float* sum, const u32* a, u64 b, int add) {         \
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " ADD ", 0;\n"                                                 \
                     "wgmma.mma_async.sync.aligned.m64n" #N TYPES " {" NAMES "}, {" A "}, " B ", p, 1, 1" ORIENTATION \
                     ";\n}"                                                                                           \
                     : __VA_ARGS__                                                                                    \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));                                 \
    }
#define MULTIPLY_REGISTERS(N, ...)                                               \
    MULTIPLY_REGISTERS_OF(Format::E4M3, "k32.f32.e4m3.e4m3", "", N, __VA_ARGS__) \
    MULTIPLY_REGISTERS_OF(Format::BF16, "k16.f32.bf16.bf16", ", 0", N, __VA_ARGS__)

MULTIPLY_REGISTERS(16, NAMES_0_7, "%8, %9, %10, %11", "%12", "%13", OPERANDS_8(0))
MULTIPLY_REGISTERS(32, NAMES_0_15, "%16, %17, %18, %19", "%20", "%21", OPERANDS_16(0))
MULTIPLY_REGISTERS(48, NAMES_0_15 ", %16, %17, %18, %19, %20, %21, %22, %23", "%24, %25, %26, %27", "%28", "%29",
                   OPERANDS_16(0), OPERANDS_8(16))
MULTIPLY_REGISTERS(64, NAMES_0_31, "%32, %33, %34, %35", "%36", "%37", OPERANDS_32(0))
MULTIPLY_REGISTERS(80, NAMES_0_31 ", " NAMES_32_39, "%40, %41, %42, %43", "%44", "%45", OPERANDS_32(0), OPERANDS_8(32))
