// Ranks that store into each other's memory: what a call leaves there, flags that only grow, and waits that end.
//
// A rank's window is memory that every other rank may store into. It begins with flags, one for each rank and way, a
// line apart; then each rank's header of the call, the tokens that came, and the results that came back. Two rounds of
// flags suffice: a rank whose results are all here has long read its tokens, so the next call may overwrite them, and
// it overwrites results only once this rank has begun that call.
//
// Where windows are not mapped, a library moves what is stored here. It takes the same number of bytes of every rank,
// or, where tokens go only to ranks that have one of their experts (COUNTED), as many rows as there are: they are then
// packed, and ranks tell each other how many.
//
// Set by the host: TOPK, MAPPED (ranks store into each other's windows), COUNTED (not MAPPED, and routed).
#pragma once
#include "ptx/access.cuh"
#include "ptx/flags.cuh"

constexpr int MAX_WINDOWS = 64;
constexpr int FLAG_STRIDE = 32;  // words: a line to a flag

// A call, as its ranks tell each other.
struct Header {
    u64 bad_id;  // ~(token * TOPK + k) of the sender's first id past the limit, above the id; 0 for none
    u32 tokens;
    u32 capacity;
    u32 epoch;
    u32 reserved[3];
};

// What is kept of a rank until the host asks.
struct Fault {
    u64 bad_id;        // as in its header, the largest since the host last asked
    u32 capacity;      // 1 + what it took for the call's capacity, where that is not this rank's; else 0
    u32 own_capacity;  // and then this rank's
};

struct RankState {
    u32 epoch;   // calls that have begun
    u32 stored;  // blocks of the running launch that have stored all they have to
    u32 absent;  // ranks - (the lowest rank that was waited for in vain); 0 for none. Never taken back.
    u32 reserved;
    u64 bad_id;  // of the running call, as in the header
    u64 reserved_too;
    Fault faults[1];  // of every rank
};

// Rows from one rank to another.
struct Counts {
    u32 tokens;  // of dispatch
    u32 slots;   // of combine, the way back
};

struct RankArgs {
    RankState* state;
    u64 limit_ns;  // of a wait
    int ranks;
    int rank;
    int tokens;      // this rank's
    int capacity;    // of every rank
    i64 headers_at;  // bytes into the window, and from one rank's header to the next
    i64 header_bytes;
    i64 rows_at;
    i64 returned_at;
    u8* outgoing;  // where what goes to other ranks is stored, by rank; null where they are mapped
    // COUNTED, of this rank's tokens:
    int* copies;       // [tokens, TOPK]: where their slots go
    int* places;       // [ranks, capacity]: a token's row among those that go to a rank; -1 for none
    int* slot_places;  // [ranks, capacity]: its first slot's row among those that come back
    int row_bytes;     // of a token's row
    int copies_at;     // bytes into it
    int weights_at;
    int place_at;             // COUNTED: where it says which row its first slot takes on the way back
    u64 window[MAX_WINDOWS];  // of every rank; of this rank alone where they are not mapped
};

__device__ __forceinline__ u8* window_of(const RankArgs& a, int rank) { return reinterpret_cast<u8*>(a.window[rank]); }

// What rank `from` sets in the window of rank `of`: 0 when its tokens are there, 1 when its results are.
__device__ __forceinline__ u32* flag(const RankArgs& a, int of, int from, int way) {
    return reinterpret_cast<u32*>(window_of(a, of)) + (way * a.ranks + from) * FLAG_STRIDE;
}

__device__ __forceinline__ Header* header(const RankArgs& a, int of, int from) {
    return reinterpret_cast<Header*>(window_of(a, of) + a.headers_at + from * a.header_bytes);
}

// COUNTED: what goes from a rank to another, behind the header of the one that sends.
__device__ __forceinline__ Counts* counts(const RankArgs& a, int from, int to) {
    return reinterpret_cast<Counts*>(header(a, a.rank, from) + 1) + to;
}

// Whether a rank was absent. From then on this rank sets no flag of another rank and waits for none.
__device__ __forceinline__ bool is_broken(const RankArgs& a) { return MAPPED && load_now(&a.state->absent) != 0; }

// Whether this block is the last of the launch to have stored what it has to. Every thread of the block calls; in the
// last block, what all blocks stored comes before what its threads store from here on, for all devices.
__device__ __forceinline__ bool is_last_to_store(const RankArgs& a) {
    __shared__ u32 last;
    __syncthreads();
    if (threadIdx.x == 0) {
        if (MAPPED)
            fence_all_devices();
        else
            __threadfence();
        last = atomicAdd(&a.state->stored, 1u) == gridDim.x - 1 ? 1u : 0u;
        if (last) {
            if (MAPPED)
                fence_all_devices();
            else
                __threadfence();
            a.state->stored = 0;
        }
    }
    __syncthreads();
    return last != 0;
}

// Waits until a flag has reached the epoch, and notes the rank if that takes too long.
__device__ __forceinline__ void wait_for_rank(const RankArgs& a, int from, int way, u32 epoch) {
    const u32* word = flag(a, a.rank, from, way);
    if ((int)(load_acquire(word) - epoch) >= 0) return;
    const u64 start = nanoseconds_now();
    while ((int)(load_acquire(word) - epoch) < 0) {
        if (load_now(&a.state->absent) != 0) return;
        if (nanoseconds_now() - start > a.limit_ns) {
            atomicMax(&a.state->absent, (u32)(a.ranks - from));
            return;
        }
    }
}

// Waits for all ranks. Every thread of the block calls, and sees what they stored afterwards.
__device__ __forceinline__ void wait_for_ranks(const RankArgs& a, int way) {
    if (!MAPPED) return;
    const u32 epoch = load_now(&a.state->epoch);
    for (int from = threadIdx.x; from < a.ranks; from += blockDim.x) wait_for_rank(a, from, way, epoch);
    __syncthreads();
}

// The k-th other rank after this one, so that not all of them store to the same one first.
__device__ __forceinline__ int other_rank(const RankArgs& a, int k) {
    const int rank = a.rank + 1 + k;
    return rank < a.ranks ? rank : rank - a.ranks;
}

// Keeps what is wrong with the ranks' tokens. Every thread of a block calls.
__device__ __forceinline__ void note_faults(const RankArgs& a) {
    for (int from = threadIdx.x; from < a.ranks; from += blockDim.x) {
        const Header* h = header(a, a.rank, from);
        Fault* fault = &a.state->faults[from];
        if (h->bad_id != 0) atomicMax(&fault->bad_id, h->bad_id);
        if (h->capacity != (u32)a.capacity) {
            fault->capacity = h->capacity + 1;
            fault->own_capacity = a.capacity;
        }
    }
}
