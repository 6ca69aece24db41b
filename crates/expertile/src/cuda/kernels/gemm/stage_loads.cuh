// Releasing a stage of shared memory to the thread that fills it again, after loads from it.
#pragma once
#include "common/words.cuh"

// Values that a thread has loaded from a stage, of which some may still be on their way.
struct StageLoads {
    u32 bits = 0;

    // One value of each load is enough.
    __device__ __forceinline__ void add(float loaded) { bits |= __float_as_uint(loaded); }
    __device__ __forceinline__ void add(int loaded) { bits |= (u32)loaded; }

    // The barrier's address, which is there once the values are. Without it the arrival may be seen before a load that
    // was issued earlier has read: behind many stores to global memory it was found to read the stage's next content.
    __device__ __forceinline__ u32 then(u32 barrier) const {
        // Shared memory ends below 2^31, of which the compiler knows nothing.
        return barrier + (bits & (barrier >> 31));
    }
};
