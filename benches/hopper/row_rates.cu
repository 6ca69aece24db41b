// How fast a Hopper's memory takes what permute has to move, when nothing else is done: every token's row (bf16) is
// read once, and half its bytes (its e4m3 row) are written to each of its places among the experts' rows. By the bulk
// copy engine, from shared memory, in the order of the tokens; no routing, no quantizing, no scales. What permute takes
// more than this is its own.
//
//   nvcc -gencode=arch=compute_90a,code=sm_90a -O3 -o row_rates row_rates.cu && ./row_rates
//
// The first lines are without the scattering: written only; as much read as written; and four times as much written as
// read, as where a token has eight experts.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

typedef unsigned int u32;
typedef unsigned long long u64;

constexpr int STAGES = 4;

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

__device__ __forceinline__ void load(u32 to, const char* from, u32 bytes, u32 barrier) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
                 "l"(from), "r"(bytes), "r"(barrier)
                 : "memory");
}

__device__ __forceinline__ void wait_for_phase(u32 barrier, u32 parity) {
    asm volatile(
        "{\n.reg .pred p;\nWAIT:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@p bra OVER;\nbra WAIT;\nOVER:\n}" ::"r"(barrier),
        "r"(parity)
        : "memory");
}

// Token `tokens[i]` is read (`read` bytes; none if 0) and written (`written` bytes) to `places` rows: places_of[i][k],
// -1 for none.
__global__ void __launch_bounds__(32) move_rows(const char* x, char* out, const int* tokens, const int* places_of,
                                                int count, u32 read, u32 written, int places) {
    extern __shared__ char stages[];
    __shared__ u64 full[STAGES];
    const int lane = threadIdx.x;
    const u32 stage_bytes = max(read, written);
    if (lane == 0) {
        for (int i = 0; i < STAGES; ++i)
            asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(&full[i])) : "memory");
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    }
    __syncwarp();
    const auto fill = [&](int i, int stage) {
        if (lane == 0 && read > 0 && i < count)
            load(shared_address(stages) + stage * stage_bytes, x + (u64)tokens[i] * read, read,
                 shared_address(&full[stage]));
    };
    int ahead = blockIdx.x;
    for (int i = 0; i < STAGES - 1; ++i, ahead += gridDim.x) fill(ahead, i);
    u32 parity = 0;
    int stage = 0;
    int row = lane < places && blockIdx.x < count ? places_of[(u64)blockIdx.x * places + lane] : -1;
    for (int i = blockIdx.x; i < count; i += gridDim.x) {
        const int next = i + gridDim.x;
        const int next_row = lane < places && next < count ? places_of[(u64)next * places + lane] : -1;
        if (read > 0) wait_for_phase(shared_address(&full[stage]), parity);
        if (row >= 0)
            asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(out + (u64)row * written),
                         "r"(shared_address(stages) + stage * stage_bytes), "r"(written)
                         : "memory");
        // The stage before this one is read out: it may be filled again.
        asm volatile("cp.async.bulk.commit_group;\ncp.async.bulk.wait_group.read 1;" ::: "memory");
        __syncwarp();
        fill(ahead, (stage + STAGES - 1) % STAGES);
        ahead += gridDim.x;
        row = next_row;
        if (++stage == STAGES) stage = 0, parity ^= 1;
    }
    asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}

static void check(cudaError_t error) {
    if (error == cudaSuccess) return;
    fprintf(stderr, "%s\n", cudaGetErrorString(error));
    exit(1);
}

template <typename T>
static T* on_device(const std::vector<T>& values) {
    T* p;
    check(cudaMalloc(&p, values.size() * sizeof(T)));
    check(cudaMemcpy(p, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice));
    return p;
}

struct Moves {
    std::vector<int> tokens;
    std::vector<int> places;
    u64 rows;  // that `out` has
};

// `topk` distinct experts of `global` for each token, the first `local` of them here; rows of an expert one behind the
// other, each expert's from a multiple of 128 on.
static Moves routed(int tokens, int topk, int local, int global) {
    std::mt19937 random(7);
    std::vector<int> ids(tokens * topk);
    std::vector<u64> start(local + 1, 0);
    for (int token = 0; token < tokens; ++token)
        for (int k = 0; k < topk;) {
            const int expert = random() % global;
            const auto first = ids.begin() + token * topk;
            if (std::find(first, first + k, expert) == first + k) first[k++] = expert;
        }
    for (int id : ids)
        if (id < local) ++start[id + 1];
    for (int expert = 0; expert < local; ++expert)
        start[expert + 1] = start[expert] + (start[expert + 1] + 127) / 128 * 128;
    Moves moves = {{}, {}, start[local]};
    for (int token = 0; token < tokens; ++token) {
        std::vector<int> rows(topk, -1);
        bool live = false;
        for (int k = 0; k < topk; ++k)
            if (ids[token * topk + k] < local) rows[k] = (int)start[ids[token * topk + k]]++, live = true;
        if (!live) continue;
        moves.tokens.push_back(token);
        moves.places.insert(moves.places.end(), rows.begin(), rows.end());
    }
    return moves;
}

// Microseconds, the best of a few rounds of launches over two sets of buffers, and bytes per microsecond.
static void measure(const char* name, int tokens, const Moves& moves, u32 read, u32 written, int places, int blocks) {
    int multiprocessors;
    check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, 0));
    const u32 shared = STAGES * std::max(read, written);
    check(cudaFuncSetAttribute(move_rows, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared));
    char *x[2], *out[2];
    for (int i = 0; i < 2; ++i) {
        check(cudaMalloc(&x[i], std::max<u64>((u64)tokens * read, 16)));
        check(cudaMalloc(&out[i], moves.rows * written));
        check(cudaMemset(x[i], i + 1, std::max<u64>((u64)tokens * read, 16)));
    }
    int* order = on_device(moves.tokens);
    int* rows = on_device(moves.places);
    cudaEvent_t start, end;
    check(cudaEventCreate(&start));
    check(cudaEventCreate(&end));
    constexpr int LAUNCHES = 8;
    float best = 1e30f;
    for (int round = 0; round < 6; ++round) {
        check(cudaEventRecord(start));
        for (int i = 0; i < LAUNCHES; ++i)
            move_rows<<<blocks * multiprocessors, 32, shared>>>(x[i % 2], out[i % 2], order, rows,
                                                                (int)moves.tokens.size(), read, written, places);
        check(cudaEventRecord(end));
        check(cudaEventSynchronize(end));
        float ms;
        check(cudaEventElapsedTime(&ms, start, end));
        best = std::min(best, ms * 1e3f / LAUNCHES);
    }
    u64 live = 0;
    for (int place : moves.places) live += place >= 0;
    const double bytes = (double)moves.tokens.size() * read + (double)live * written;
    printf("%-22s %6d  %8.1f us  %.2f TB/s\n", name, tokens, best, bytes / best / 1e6);
    for (int i = 0; i < 2; ++i) cudaFree(x[i]), cudaFree(out[i]);
    cudaFree(order), cudaFree(rows);
}

static Moves in_order(int count, int places) {
    Moves moves = {std::vector<int>(count), std::vector<int>(count * places), (u64)count * places};
    for (int i = 0; i < count; ++i) moves.tokens[i] = i;
    for (int i = 0; i < count * places; ++i) moves.places[i] = i;
    return moves;
}

int main() {
    measure("written in order", 1 << 17, in_order(1 << 17, 1), 0, 8192, 1, 4);
    measure("copied in order", 1 << 17, in_order(1 << 17, 1), 8192, 8192, 1, 4);
    measure("1 read, 4 written", 1 << 15, in_order(1 << 15, 4), 8192, 8192, 4, 2);
    const struct {
        const char* name;
        u32 hidden;
        int topk, local, global;
    } shapes[] = {{"dsv3", 7168, 8, 256, 256},
                  {"dsv3_ep8", 7168, 8, 32, 256},
                  {"qwen235", 4096, 8, 128, 128},
                  {"mixtral", 4096, 2, 8, 8}};
    for (const auto& s : shapes)
        for (int tokens : {4096, 16384})
            measure(s.name, tokens, routed(tokens, s.topk, s.local, s.global), 2 * s.hidden, s.hidden, s.topk, 3);
}
