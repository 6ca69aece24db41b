// ptx/flags.cuh for the CPU.
#pragma once
#include "common/words.cuh"

inline void store_release(u32* address, u32 value) { __atomic_store_n(address, value, __ATOMIC_SEQ_CST); }

// The others go on meanwhile.
inline u32 load_acquire(const u32* address) {
    emulated_machine->yield();
    return __atomic_load_n(address, __ATOMIC_SEQ_CST);
}

inline void fence_all_devices() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

inline u64 nanoseconds_now() {
    emulated_machine->yield();
    return emulated_nanoseconds();
}
