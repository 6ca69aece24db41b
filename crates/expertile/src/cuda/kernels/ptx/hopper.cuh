// Hopper's own: barriers in shared memory (mbarrier), the tensor copy engine (TMA), clusters, and moving registers
// between warpgroups. sm_90a only. Each comment ends with the PTX instruction.
//
// Addresses of shared memory are 32 bits: `shared_address` makes one of a pointer.
#pragma once
#include "ptx/access.cuh"

// A tensor map, as the driver encodes it (CUtensorMap).
struct alignas(64) TensorMap {
    u64 words[16];
};

// The address of a pointer to shared memory. PTX: cvta.to.shared
__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// The same place in the shared memory of another block of the cluster. PTX: mapa.shared::cluster
__device__ __forceinline__ u32 address_in_block(u32 address, u32 rank) {
    u32 there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
    return there;
}

// This block's number in its cluster. PTX: %cluster_ctarank
__device__ __forceinline__ u32 rank_in_cluster() {
    u32 rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

// All threads of all blocks of the cluster meet; every one calls. PTX: barrier.cluster.arrive.release,
// barrier.cluster.wait.acquire
__device__ __forceinline__ void meet_cluster() {
    asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

// Whether the thread is the one of its warp that acts for all; every lane of the warp calls. Like `lane == 0`, but the
// compiler knows that it is one thread: it then gives the copy engine's instructions their operands without a loop over
// the lanes. PTX: elect.sync
__device__ __forceinline__ bool elect_thread() {
    u32 elected;
    asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.u32 %0, 1, 0, p;\n}" : "=r"(elected));
    return elected != 0;
}

// Loads from and stores to shared memory by address. PTX: ld.shared, st.shared
__device__ __forceinline__ float load_shared(u32 address) {
    float v;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(address) : "memory");
    return v;
}

__device__ __forceinline__ float2 load_shared_pair(u32 address) {
    float2 v;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(address) : "memory");
    return v;
}

__device__ __forceinline__ float4 load_shared_quad(u32 address) {
    float4 v;
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "r"(address)
                 : "memory");
    return v;
}

__device__ __forceinline__ u32 load_shared_byte(u32 address) {
    u32 v;
    asm volatile("ld.shared.u8 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
    return v;
}

__device__ __forceinline__ u32 load_shared_word(u32 address) {
    u32 v;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
    return v;
}

__device__ __forceinline__ uint4 load_shared_words(u32 address) {
    uint4 v;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(address)
                 : "memory");
    return v;
}

__device__ __forceinline__ void store_shared(u32 to, float v) {
    asm volatile("st.shared.f32 [%0], %1;" ::"r"(to), "f"(v) : "memory");
}

__device__ __forceinline__ void store_shared_pair(u32 to, float a, float b) {
    asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(to), "f"(a), "f"(b) : "memory");
}

__device__ __forceinline__ void store_shared_quad(u32 to, float a, float b, float c, float d) {
    asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(to), "f"(a), "f"(b), "f"(c), "f"(d) : "memory");
}

__device__ __forceinline__ void store_shared_words(u32 to, uint4 v) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
}

__device__ __forceinline__ void store_shared_word(u32 to, u32 v) {
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(to), "r"(v) : "memory");
}

__device__ __forceinline__ void store_shared_half_word(u32 to, u16 v) {
    asm volatile("st.shared.u16 [%0], %1;" ::"r"(to), "h"(v) : "memory");
}

// Makes an mbarrier whose phases each end after so many arrivals (and after the bytes that were expected).
// PTX: mbarrier.init
__device__ __forceinline__ void init_barrier(u32 barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes initialised barriers known to the copy engine and to the cluster; before the threads meet.
// PTX: fence.mbarrier_init.release.cluster, fence.proxy.async
__device__ __forceinline__ void publish_barriers() {
    asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
}

#define TRY_WAIT(SCOPE)                                                         \
    "{\n.reg .pred p;\n"                                                        \
    "mbarrier.try_wait.parity.acquire." SCOPE ".shared::cta.b64 p, [%1], %2;\n" \
    "selp.u32 %0, 1, 0, p;\n}"

// Waits until the phase of that parity is over; what this block (or the copy engine) wrote before it is then seen.
// PTX: mbarrier.try_wait.parity.acquire.cta, in a loop
__device__ __forceinline__ void wait_for_phase(u32 barrier, u32 parity) {
    u32 over;
    do asm volatile(TRY_WAIT("cta") : "=r"(over) : "r"(barrier), "r"(parity) : "memory");
    while (over == 0);
}

// Whether that phase is over; what was written before it is then seen. Like a load, this takes its time only where the
// answer is used. PTX: mbarrier.try_wait.parity.acquire.cta
__device__ __forceinline__ bool is_phase_over(u32 barrier, u32 parity) {
    u32 over;
    asm volatile(TRY_WAIT("cta") : "=r"(over) : "r"(barrier), "r"(parity) : "memory");
    return over != 0;
}

// Waits until it is over, unless it is known to be. A loop of its own, after which the compiler need not bring threads
// together. PTX: mbarrier.try_wait.parity.acquire.cta, in a loop
__device__ __forceinline__ void wait_unless_over(u32 barrier, u32 parity, bool over) {
    asm volatile("{\n.reg .pred p;\n"
                 "setp.ne.u32 p, %2, 0;\n"
                 "@p bra OVER;\n"
                 "WAIT:\n"
                 "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 p, [%0], %1;\n"
                 "@p bra OVER;\n"
                 "bra WAIT;\n"
                 "OVER:\n}" ::"r"(barrier),
                 "r"(parity), "r"((u32)over)
                 : "memory");
}

// As wait_for_phase; what the whole cluster wrote is seen. PTX: mbarrier.try_wait.parity.acquire.cluster, in a loop
__device__ __forceinline__ void wait_for_cluster(u32 barrier, u32 parity) {
    u32 over;
    do asm volatile(TRY_WAIT("cluster") : "=r"(over) : "r"(barrier), "r"(parity) : "memory");
    while (over == 0);
}

// One arrival at a barrier of this block; publishes what this thread wrote to the block. PTX: mbarrier.arrive
__device__ __forceinline__ void arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// The same under a predicate, without a branch. PTX: @p mbarrier.arrive
__device__ __forceinline__ void arrive_if(u32 barrier, bool does) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.u32 p, %1, 0;\n@p mbarrier.arrive.shared::cta.b64 _, [%0];\n}" ::"r"(barrier),
        "r"((u32)does)
        : "memory");
}

// One arrival at a barrier of any block of the cluster (an address from address_in_block). For "reading is done":
// publishes nothing beyond this block. PTX: mbarrier.arrive.shared::cluster
__device__ __forceinline__ void arrive_elsewhere(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// The same under a predicate, without a branch. PTX: @p mbarrier.arrive.shared::cluster
__device__ __forceinline__ void arrive_elsewhere_if(u32 barrier, bool does) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.u32 p, %1, 0;\n@p mbarrier.arrive.shared::cluster.b64 _, [%0];\n}" ::"r"(barrier),
        "r"((u32)does)
        : "memory");
}

// As arrive_elsewhere, and publishes what this thread (and the threads it has met) wrote to the whole cluster.
// PTX: mbarrier.arrive.release.cluster
__device__ __forceinline__ void arrive_in_cluster(u32 barrier) {
    asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// One arrival, and the phase does not end before so many bytes have come. PTX: mbarrier.arrive.expect_tx
__device__ __forceinline__ void arrive_expecting(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// One arrival once this thread's earlier copy_word have landed. PTX: cp.async.mbarrier.arrive.noinc
__device__ __forceinline__ void arrive_after_copies(u32 barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

// Copies 4 bytes to shared memory, through the L1; see arrive_after_copies. PTX: cp.async.ca
__device__ __forceinline__ void copy_word(u32 to, const float* from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from) : "memory");
}

// Copies consecutive bytes to shared memory, a multiple of 16; the barrier counts them. PTX: cp.async.bulk
__device__ __forceinline__ void copy_bytes(u32 to, const void* from, u32 bytes, u32 barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
                 "l"(from), "r"(bytes), "r"(barrier)
                 : "memory");
}

// Cache hints of the loads below: keep what is read as everything else, or evict it first. PTX: the policies that
// createpolicy.fractional makes of L2::evict_normal and L2::evict_first for all of what is read
constexpr u64 KEEP_NORMALLY = 0x1000000000000000ull;
constexpr u64 KEEP_BRIEFLY = 0x12f0000000000000ull;

// copy_bytes with a hint. PTX: cp.async.bulk .L2::cache_hint
__device__ __forceinline__ void copy_bytes(u32 to, const void* from, u32 bytes, u32 barrier, u64 keep) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::
            "r"(to),
        "l"(from), "r"(bytes), "r"(barrier), "l"(keep)
        : "memory");
}

// Brings a tensor map to the cache. PTX: prefetch.tensormap
__device__ __forceinline__ void prefetch_map(const TensorMap& map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// TMA load of one box of a matrix, its first element at (column, row); the barrier counts its bytes.
// PTX: cp.async.bulk.tensor.2d
__device__ __forceinline__ void copy_box(u32 to, const TensorMap& map, int column, int row, u32 barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
                 " [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(to),
                 "l"(&map), "r"(barrier), "r"(column), "r"(row), "l"(KEEP_NORMALLY)
                 : "memory");
}

// TMA multicast: the same, to the same place of every block of the cluster named in `blocks`; each block's own mbarrier
// counts the bytes. PTX: cp.async.bulk.tensor.2d .multicast::cluster
__device__ __forceinline__ void share_box(u32 to, const TensorMap& map, int column, int row, u32 barrier, u16 blocks) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint"
        " [%0], [%1, {%3, %4}], [%2], %5, %6;" ::"r"(to),
        "l"(&map), "r"(barrier), "r"(column), "r"(row), "h"(blocks), "l"(KEEP_NORMALLY)
        : "memory");
}

// TMA load of one box of a matrix among several. PTX: cp.async.bulk.tensor.3d
__device__ __forceinline__ void copy_box(u32 to, const TensorMap& map, int column, int row, int matrix, u32 barrier,
                                         u64 keep) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
                 " [%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(to),
                 "l"(&map), "r"(barrier), "r"(column), "r"(row), "r"(matrix), "l"(keep)
                 : "memory");
}

// Copies consecutive bytes of shared memory to global memory, a multiple of 16. PTX: cp.async.bulk.global.shared::cta
__device__ __forceinline__ void store_bytes(void* to, u32 from, u32 bytes) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(from), "r"(bytes)
                 : "memory");
}

// Closes a group of this thread's store_bytes. PTX: cp.async.bulk.commit_group
__device__ __forceinline__ void commit_stores() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Waits until shared memory that this thread's groups of store_bytes read may be written again.
// PTX: cp.async.bulk.wait_group.read 0
__device__ __forceinline__ void wait_for_stores_to_read() {
    asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}

// Orders this thread's ordinary writes to shared memory before the copy engine's and the matrix unit's reads of it.
// PTX: fence.proxy.async
__device__ __forceinline__ void publish_shared_writes() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Orders ordinary writes to global memory that this thread has made, or has seen, before the copy engine's reads of it.
// PTX: fence.proxy.async
__device__ __forceinline__ void publish_global_writes() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

// THREADS of a block's threads, whole warps, meet at one of its named barriers (1 to 15). PTX: bar.sync
template <int THREADS>
__device__ __forceinline__ void meet_threads(int barrier) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "n"(THREADS) : "memory");
}

// The same at a barrier that is a constant. PTX: bar.sync
template <int BARRIER, int THREADS>
__device__ __forceinline__ void meet_at() {
    asm volatile("bar.sync %0, %1;" ::"n"(BARRIER), "n"(THREADS) : "memory");
}

// Stores four 8 x 8 matrices of 16-bit values to shared memory, each transposed; lane i has the address of row i % 8 of
// matrix i / 8. PTX: stmatrix.m8n8.x4.trans
__device__ __forceinline__ void store_transposed(u32 to, u32 a, u32 b, u32 c, u32 d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(a), "r"(b),
                 "r"(c), "r"(d)
                 : "memory");
}

// The same as they are. PTX: stmatrix.m8n8.x4
__device__ __forceinline__ void store_matrices(u32 to, u32 a, u32 b, u32 c, u32 d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(a), "r"(b), "r"(c),
                 "r"(d)
                 : "memory");
}

// Loads from the shared memory of a block of the cluster (an address from address_in_block). PTX: ld.shared::cluster
__device__ __forceinline__ float4 load_from_cluster(u32 address) {
    float4 v;
    asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "r"(address)
                 : "memory");
    return v;
}

// Stores a word to another block of the cluster; the barrier there counts its bytes. PTX: st.async
__device__ __forceinline__ void send_word(u32 to, float value, u32 barrier) {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(to),
                 "r"(__float_as_uint(value)), "r"(barrier)
                 : "memory");
}

// This warpgroup gives registers back: every thread has REGISTERS afterwards. All its warps call. PTX: setmaxnreg.dec
template <int REGISTERS>
__device__ __forceinline__ void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// This warpgroup takes registers: waits until every thread has REGISTERS. All its warps call. PTX: setmaxnreg.inc
template <int REGISTERS>
__device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
