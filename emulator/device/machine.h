// What a kernel compiled for the CPU asks of the emulator, and what the emulator tells each of its threads. In Rust:
// machine.rs.
#pragma once

struct EmulatedPlace {
    unsigned x, y, z;
};

struct EmulatedThread {
    EmulatedPlace thread, block, threads, blocks;
    unsigned rank;                  // of the block in its cluster
    unsigned char* dynamic_shared;  // the block's
    void* products;                 // the matrix unit's, of wgmma.cuh
};

struct EmulatedMachine {
    void (*yield)();
    void (*wait_for_previous_launch)();
    void (*let_next_launch_start)();
    void (*meet_block)();
    void (*meet_threads)(unsigned barrier, unsigned threads);
    void (*meet_cluster)();
    // Every lane's value, once all live lanes of the warp are here.
    void (*exchange)(unsigned long long mine, unsigned long long* all);
    void* (*shared_variable)(const char* name, unsigned long long bytes, unsigned long long alignment);
    unsigned (*address_in_block)(unsigned address, unsigned rank);
    void (*init_barrier)(unsigned barrier, unsigned arrivals);
    void (*arrive)(unsigned barrier, unsigned expected_bytes);
    int (*is_phase_over)(unsigned barrier, unsigned parity);
    void (*copy_bytes)(unsigned to, const void* from, unsigned bytes, unsigned barrier);
    void (*copy_box)(unsigned to, const void* map, const int* place, unsigned barrier, unsigned blocks);
    void (*copy_word)(unsigned to, const void* from);
    void (*arrive_after_copies)(unsigned barrier);
    void (*send_word)(unsigned to, unsigned word, unsigned barrier);
    void (*store_bytes)(void* to, unsigned from, unsigned bytes);
    void (*commit_stores)();
    void (*wait_for_stores)();
};

extern const EmulatedMachine* emulated_machine;
extern thread_local EmulatedThread* emulated_self;
