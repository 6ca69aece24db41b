// Loads and stores of global memory, and the order between launches. Each comment ends with the PTX instruction.
#pragma once
#include "common/words.cuh"

// Waits until the launches before this one in the stream have finished and their writes are seen. Every thread of every
// kernel calls it before touching global memory: a launch that waits for this one has then waited for those before it,
// too. PTX: griddepcontrol.wait
__device__ __forceinline__ void wait_for_previous_launch() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next launch occupy multiprocessors as they become free; it still waits for this one's writes. Without the
// call it may begin when the last block of this one ends, which is better before a grouped GEMM: blocks that come one
// by one crowd on the multiprocessors that are free first, and the first blocks have the most work.
// PTX: griddepcontrol.launch_dependents
__device__ __forceinline__ void let_next_launch_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Loads 16 bytes that this kernel reads once and that nothing writes meanwhile. PTX: ld.global.nc.L1::no_allocate
__device__ __forceinline__ uint4 load_once(const void* address) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(address));
    return v;
}

// The same, kept in the L1 for a while: a neighbouring load that takes the other half of the sectors finds them there.
// Not by the read-only path: a launch that may start before the one that writes has no memory that is read-only
// throughout. PTX: ld.global
__device__ __forceinline__ uint4 load_through_l1(const void* address) {
    uint4 v;
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(address)
                 : "memory");
    return v;
}

// Stores that the cache evicts first: results that it cannot hold until they are read. An H200 copies 4 % faster with
// them. PTX: st.global.cs
__device__ __forceinline__ void store_brief(void* to, uint4 v) {
    asm volatile("st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
}

__device__ __forceinline__ void store_brief(void* to, uint2 v) {
    asm volatile("st.global.cs.v2.u32 [%0], {%1, %2};" ::"l"(to), "r"(v.x), "r"(v.y) : "memory");
}

// Brings a line to the L2. No thread sees its content by that, so the launch that writes it may still be running.
// PTX: prefetch.global.L2
__device__ __forceinline__ void prefetch_line(const void* address) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}

// Loads a word as it is now: for a loop that waits until another block has changed it. PTX: ld.volatile
__device__ __forceinline__ u32 load_now(const u32* address) { return *const_cast<const volatile u32*>(address); }

// What this thread wrote or saw before comes before what it writes afterwards, for the device. PTX: fence.acq_rel.gpu
__device__ __forceinline__ void fence_device() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

// Adds 1 to a counter, and returns what it was: for one thread of a warp that does not need it at once. Of an addition the
// assembler makes one for all threads that may call, and a shuffle that waits for it. PTX: atom.inc
__device__ __forceinline__ u32 draw(u32* counter) {
    u32 before;
    asm volatile("atom.relaxed.gpu.global.inc.u32 %0, [%1], 0xfffffffe;" : "=r"(before) : "l"(counter) : "memory");
    return before;
}

// The lane of the thread, read at this point: the compiler neither moves it nor keeps what follows from it. PTX:
// %laneid
__device__ __forceinline__ int read_lane() {
    int lane;
    asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
    return lane;
}

// The thread's number in its block, read likewise. PTX: %tid.x
__device__ __forceinline__ int read_thread() {
    int thread;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    return thread;
}
