// ptx/access.cuh for the CPU.
#pragma once
#include "common/words.cuh"

inline void wait_for_previous_launch() { emulated_machine->wait_for_previous_launch(); }
inline void let_next_launch_start() { emulated_machine->let_next_launch_start(); }

template <typename Vector>
inline void store_brief(void* to, Vector v) {
    *static_cast<Vector*>(to) = v;
}
inline uint4 load_once(const void* address) { return *static_cast<const uint4*>(address); }
inline uint4 load_through_l1(const void* address) { return *static_cast<const uint4*>(address); }
inline void prefetch_line(const void*) {}

inline void fence_device() { __threadfence(); }

inline u32 draw(u32* counter) { return atomicAdd(counter, 1u); }

// The others go on meanwhile.
inline u32 load_now(const u32* address) {
    emulated_machine->yield();
    return __atomic_load_n(address, __ATOMIC_SEQ_CST);
}

inline int read_lane() { return lane_of_thread(); }
inline int read_thread() { return (int)threadIdx.x; }
