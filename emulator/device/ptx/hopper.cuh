// ptx/hopper.cuh for the CPU. Addresses of shared memory are real: the emulator keeps it below 4 GiB.
#pragma once
#include "ptx/access.cuh"

struct alignas(64) TensorMap {
    u64 words[16];
};

template <typename T>
inline T& emulated_shared(u32 address) {
    return *reinterpret_cast<T*>((u64)address);
}

inline u32 shared_address(const void* p) { return (u32) reinterpret_cast<u64>(p); }
inline u32 address_in_block(u32 address, u32 rank) { return emulated_machine->address_in_block(address, rank); }
inline u32 rank_in_cluster() { return emulated_self->rank; }
inline void meet_cluster() { emulated_machine->meet_cluster(); }

inline bool elect_thread() { return lane_of_thread() == 0; }

inline float load_shared(u32 from) { return emulated_shared<float>(from); }
inline float2 load_shared_pair(u32 from) { return emulated_shared<float2>(from); }
inline float4 load_shared_quad(u32 from) { return emulated_shared<float4>(from); }
inline u32 load_shared_byte(u32 from) { return emulated_shared<u8>(from); }
inline u32 load_shared_word(u32 from) { return emulated_shared<u32>(from); }
inline uint4 load_shared_words(u32 from) { return emulated_shared<uint4>(from); }
inline void store_shared(u32 to, float v) { emulated_shared<float>(to) = v; }
inline void store_shared_pair(u32 to, float a, float b) { emulated_shared<float2>(to) = make_float2(a, b); }
inline void store_shared_quad(u32 to, float a, float b, float c, float d) {
    emulated_shared<float4>(to) = make_float4(a, b, c, d);
}
inline void store_shared_words(u32 to, uint4 v) { emulated_shared<uint4>(to) = v; }
inline void store_shared_word(u32 to, u32 v) { emulated_shared<u32>(to) = v; }
inline void store_shared_half_word(u32 to, u16 v) { emulated_shared<u16>(to) = v; }

inline void init_barrier(u32 barrier, u32 arrivals) { emulated_machine->init_barrier(barrier, arrivals); }
inline void publish_barriers() {}
inline void wait_for_phase(u32 barrier, u32 parity) {
    while (!emulated_machine->is_phase_over(barrier, parity)) emulated_machine->yield();
}
inline bool is_phase_over(u32 barrier, u32 parity) { return emulated_machine->is_phase_over(barrier, parity) != 0; }
inline void wait_unless_over(u32 barrier, u32 parity, bool over) {
    if (!over) wait_for_phase(barrier, parity);
}
inline void wait_for_cluster(u32 barrier, u32 parity) { wait_for_phase(barrier, parity); }
inline void arrive(u32 barrier) { emulated_machine->arrive(barrier, 0); }
inline void arrive_if(u32 barrier, bool does) {
    if (does) arrive(barrier);
}
inline void arrive_elsewhere(u32 barrier) { arrive(barrier); }
inline void arrive_elsewhere_if(u32 barrier, bool does) { arrive_if(barrier, does); }
inline void arrive_in_cluster(u32 barrier) { arrive(barrier); }
inline void arrive_expecting(u32 barrier, u32 bytes) { emulated_machine->arrive(barrier, bytes); }
inline void arrive_after_copies(u32 barrier) { emulated_machine->arrive_after_copies(barrier); }

inline void copy_word(u32 to, const float* from) { emulated_machine->copy_word(to, from); }
inline void copy_bytes(u32 to, const void* from, u32 bytes, u32 barrier) {
    emulated_machine->copy_bytes(to, from, bytes, barrier);
}
inline void prefetch_map(const TensorMap&) {}
inline void emulated_copy_box(u32 to, const TensorMap& map, int column, int row, int matrix, u32 barrier, u32 blocks) {
    const int place[3] = {column, row, matrix};
    emulated_machine->copy_box(to, &map, place, barrier, blocks);
}
constexpr u64 KEEP_NORMALLY = 0;
constexpr u64 KEEP_BRIEFLY = 1;
inline void copy_bytes(u32 to, const void* from, u32 bytes, u32 barrier, u64) { copy_bytes(to, from, bytes, barrier); }
inline void copy_box(u32 to, const TensorMap& map, int column, int row, u32 barrier) {
    emulated_copy_box(to, map, column, row, 0, barrier, 1u << rank_in_cluster());
}
inline void share_box(u32 to, const TensorMap& map, int column, int row, u32 barrier, u16 blocks) {
    emulated_copy_box(to, map, column, row, 0, barrier, blocks);
}
inline void copy_box(u32 to, const TensorMap& map, int column, int row, int matrix, u32 barrier, u64) {
    emulated_copy_box(to, map, column, row, matrix, barrier, 1u << rank_in_cluster());
}

inline void store_bytes(void* to, u32 from, u32 bytes) { emulated_machine->store_bytes(to, from, bytes); }
inline void commit_stores() { emulated_machine->commit_stores(); }
inline void wait_for_stores_to_read() { emulated_machine->wait_for_stores(); }
inline void publish_shared_writes() {}

inline void publish_global_writes() {}

template <int THREADS>
inline void meet_threads(int barrier) {
    emulated_machine->meet_threads(barrier, THREADS);
}
template <int BARRIER, int THREADS>
inline void meet_at() {
    meet_threads<THREADS>(BARRIER);
}

// Four 8 x 8 matrices: lane i has two neighbours of row i / 4, and row i % 8 of matrix i / 8 goes to the lane's
// address.
inline void emulated_store_matrices(u32 to, u32 a, u32 b, u32 c, u32 d, bool transposed) {
    const u32 words[4] = {a, b, c, d};
    for (int matrix = 0; matrix < 4; ++matrix) {
        const EmulatedWarp values(words[matrix]);
        if (emulated_lane() / 8 != matrix) continue;
        const int row = emulated_lane() % 8;
        for (int column = 0; column < 8; ++column) {
            const int from = transposed ? column * 4 + row / 2 : row * 4 + column / 2;
            const int half = transposed ? row % 2 : column % 2;
            emulated_shared<u16>(to + column * 2) = (u16)(values.of<u32>(from) >> 16 * half);
        }
    }
    __syncwarp();
}
inline void store_transposed(u32 to, u32 a, u32 b, u32 c, u32 d) { emulated_store_matrices(to, a, b, c, d, true); }
inline void store_matrices(u32 to, u32 a, u32 b, u32 c, u32 d) { emulated_store_matrices(to, a, b, c, d, false); }

inline float4 load_from_cluster(u32 from) { return emulated_shared<float4>(from); }
inline void send_word(u32 to, float value, u32 barrier) {
    emulated_machine->send_word(to, __float_as_uint(value), barrier);
}

template <int REGISTERS>
inline void give_registers() {}
template <int REGISTERS>
inline void take_registers() {}
