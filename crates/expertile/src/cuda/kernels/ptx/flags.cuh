// Words that one device sets and another waits for, and the order that they bring. Each comment ends with the PTX
// instruction.
#pragma once
#include "common/words.cuh"

// Sets a word, perhaps of another device, that a waiting thread sees only after everything that this thread has
// written or seen before. PTX: st.release.sys
__device__ __forceinline__ void store_release(u32* address, u32 value) {
    asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}

// A word as it is now; what the thread that has set it wrote before is seen from here on. PTX: ld.acquire.sys
__device__ __forceinline__ u32 load_acquire(const u32* address) {
    u32 value;
    asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
    return value;
}

// What this thread wrote or saw before comes before what it writes afterwards, for all devices.
// PTX: fence.acq_rel.sys
__device__ __forceinline__ void fence_all_devices() { asm volatile("fence.acq_rel.sys;" ::: "memory"); }

// A clock of the device. PTX: %globaltimer
__device__ __forceinline__ u64 nanoseconds_now() {
    u64 now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    return now;
}
