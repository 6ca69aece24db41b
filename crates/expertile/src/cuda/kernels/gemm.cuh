// What both grouped GEMMs share: the tiles of the worklist, the ring of stages in shared memory, and the thread that keeps the
// copy engine ahead.
//
// Set by whoever compiles: BF16 (operands; else e4m3), TOKENS (most rows of a tile), STEP (a divisor of it: copies of rows
// come in its multiples), SHARED (blocks of a cluster that share rows), SPLITS (blocks of a cluster that each take a part of
// K), STAGES. Set by the kernel: OUTPUTS (of a tile), GROUPS (warpgroups that multiply), STAGING_BYTES, SCALING_WARPS (0 where
// the sums take the scales one by one), TOGETHER (row tiles that are worked on side by side), PARTS (of a
// tile's weights, each copied by itself and with a scale of its own), PARTS_APART (whether those stand half an N apart: gate and
// up) and SIDE_BY_SIDE (blocks of a cluster that have the same rows and neighbouring outputs: SHARED, or more that do not share).
#pragma once
#include "quantize.cuh"
#include "wgmma.cuh"

constexpr int CLUSTER = SIDE_BY_SIDE * SPLITS;
constexpr int PATHS = TOKENS / STEP;
constexpr int WARPGROUP = 128;
constexpr int THREADS = (1 + GROUPS) * WARPGROUP;
constexpr int CONSUMER_WARPS = GROUPS * 4;

constexpr int ROW_BYTES = 128;  // of a block of K
constexpr int VALUES = BF16 ? ROW_BYTES / 2 : ROW_BYTES;
constexpr int SCALE_BLOCK = 128;
constexpr int INSTRUCTIONS = ROW_BYTES / 32;

// Shared memory, in bytes from its start; operands stand on 1024. host: shared_bytes in gemm.rs.
constexpr int WEIGHTS_BYTES = OUTPUTS * ROW_BYTES;
constexpr int STAGE_BYTES = WEIGHTS_BYTES + TOKENS * ROW_BYTES;
constexpr int STAGING = STAGES * STAGE_BYTES;
constexpr int ROW_SCALES = STAGING + STAGING_BYTES;
constexpr int WEIGHT_SCALES = ROW_SCALES + STAGES * TOKENS * 4;
constexpr int TILES = (WEIGHT_SCALES + STAGES * PARTS * 4 + 15) / 16 * 16;
// Where there are scaling warps, the products of both, in the order of their readers: a lane's neighbours in the sum have
// theirs TOKENS / 4 apart, and four more, so that they stand on different banks.
constexpr int SCALES_OF_LANE = TOKENS / 4 + 4;
constexpr int SCALES = TILES + STAGES * 16;
constexpr int BARRIERS = SCALES + (SCALING_WARPS > 0 ? STAGES * 4 * SCALES_OF_LANE * 4 : 0);
constexpr int END_OF_BARRIERS = BARRIERS + (3 * STAGES + 2) * 8;

static_assert(TOKENS % STEP == 0 && STEP % 16 == 0, "a path takes whole matrices, and whole patterns of the swizzle from each block that shares");

struct GemmArgs {
    TensorMap weights;      // [experts, n, k], a box is OUTPUTS / PARTS rows of a block of K
    TensorMap rows[PATHS];  // [m_sum, k], a box is a path's rows over SHARED
    const float* row_scales;     // [k / 128, m_sum rounded up to 4]
    const float* weight_scales;  // [experts, n / 128, k / 128], rounded up
    void* out;                   // [m_sum, n] bf16; with an activation [m_sum, n / 2] e4m3
    float* out_scales;           // with an activation [n / 256, m_sum rounded up to 4]
    int* header;                 // its last word is 0, and again when the launch is over
    const int2* worklist;
    const int* psum;
    int n;
    int k;
    int m_sum;
    int reserved;
};

// With a tile's expert, for its producer: no other row tile needs these weights.
constexpr int READ_ONCE = 1 << 30;

struct alignas(16) Tile {
    int expert;  // for the producer, with READ_ONCE
    int first;   // row
    int rows;    // live; 0 after the last tile
    int column;  // first output
};

// Items of work in the order they are taken: a few row tiles at a time, all their outputs, rows first, so that blocks
// that run together share rows and, where they belong to one expert, weights in the cache.
struct Schedule {
    int tiles;
    int columns;

    __device__ __forceinline__ explicit Schedule(const GemmArgs& a)
        : tiles(a.header[2]), columns((a.n + OUTPUTS * SIDE_BY_SIDE - 1) / (OUTPUTS * SIDE_BY_SIDE)) {}

    __device__ __forceinline__ int items() const { return tiles * columns; }

    __device__ __forceinline__ Tile tile(const GemmArgs& a, int item, int rank) const {
        const int before = item / (TOGETHER * columns) * TOGETHER;
        const int together = min(TOGETHER, tiles - before);
        const int place = item - before * columns;
        // Turned by one for each column: a block that always met the same place would always meet an expert's short last tile.
        const int index = before + (place + place / together) % together;
        const int2 entry = a.worklist[index];
        const int left = a.psum[entry.x] - entry.y;
        const bool read_once = left <= TOKENS && (index == 0 || a.worklist[index - 1].x != entry.x);
        const int column = place / together * SIDE_BY_SIDE + (SIDE_BY_SIDE > 1 ? rank : 0);
        return Tile{read_once ? entry.x | READ_ONCE : entry.x, entry.y, min(max(left, 1), TOKENS),
                    column * (PARTS_APART ? OUTPUTS / PARTS : OUTPUTS)};
    }
};

// Where a cluster's tiles come from: it goes round all items.
struct Rounds {
    const GemmArgs& a;
    const Schedule schedule;
    const int clusters;
    const int rank;
    int item;

    __device__ __forceinline__ Rounds(const GemmArgs& args, int cluster, int clusters, int rank)
        : a(args), schedule(args), clusters(clusters), rank(rank), item(cluster) {}

    // False after the last one.
    __device__ __forceinline__ bool next(Tile& tile) {
        if (item >= schedule.items()) return false;
        tile = schedule.tile(a, item, rank);
        item += clusters;
        return true;
    }
};

// The blocks of K that this block multiplies: at least one, as there are no more parts than blocks.
struct Depth {
    int begin;
    int end;

    __device__ __forceinline__ Depth(int k, int rank) {
        const int blocks = (k + VALUES - 1) / VALUES;
        begin = SPLITS > 1 ? blocks * rank / SPLITS : 0;
        end = SPLITS > 1 ? blocks * (rank + 1) / SPLITS : blocks;
    }
};

// The ring of stages. Producer and consumers each go round it on their own.
struct Ring {
    u32 memory;
    int stage;
    u32 parities;  // a bit for each stage: the phase that is next

    __device__ __forceinline__ explicit Ring(u32 shared) : memory(shared), stage(0), parities(0) {}
    __device__ __forceinline__ u32 parity() const { return parities >> stage & 1; }
    __device__ __forceinline__ u32 full() const { return memory + BARRIERS + stage * 8; }
    __device__ __forceinline__ u32 empty() const { return memory + BARRIERS + (STAGES + stage) * 8; }
    __device__ __forceinline__ u32 scaled() const { return memory + BARRIERS + (2 * STAGES + stage) * 8; }
    __device__ __forceinline__ u32 scales() const { return memory + SCALES + stage * 4 * SCALES_OF_LANE * 4; }
    __device__ __forceinline__ u32 weights() const { return memory + stage * STAGE_BYTES; }
    __device__ __forceinline__ u32 rows() const { return memory + stage * STAGE_BYTES + WEIGHTS_BYTES; }
    __device__ __forceinline__ u32 row_scales() const { return memory + ROW_SCALES + stage * TOKENS * 4; }
    __device__ __forceinline__ u32 weight_scale() const { return memory + WEIGHT_SCALES + stage * PARTS * 4; }
    // With the first block of a tile's K: which tile it is.
    __device__ __forceinline__ u32 tile() const { return memory + TILES + stage * 16; }
    __device__ __forceinline__ void advance() {
        parities ^= 1u << stage;
        stage = stage + 1 == STAGES ? 0 : stage + 1;
    }
};

__device__ __forceinline__ u32 partials_ready(u32 memory) { return memory + BARRIERS + 3 * STAGES * 8; }
__device__ __forceinline__ u32 partials_read(u32 memory) { return memory + BARRIERS + (3 * STAGES + 1) * 8; }

__device__ __forceinline__ void store_tile(u32 to, const Tile& tile) {
    store_shared_words(to, make_uint4(tile.expert, tile.first, tile.rows, tile.column));
}

__device__ __forceinline__ Tile load_tile(u32 from) {
    const uint4 words = load_shared_words(from);
    return Tile{(int)words.x, (int)words.y, (int)words.z, (int)words.w};
}

template <typename Source>
__device__ __forceinline__ void produce(const GemmArgs& a, Ring ring, Source source, int rank) {
    const Depth depth(a.k, rank);
    const int stride = (a.m_sum + 3) & ~3;
    const int scale_rows = (a.n + SCALE_BLOCK - 1) / SCALE_BLOCK;
    const int scale_columns = (a.k + SCALE_BLOCK - 1) / SCALE_BLOCK;
    Tile tile;
    while (source.next(tile)) {
        const u64 keep_weights = (tile.expert & READ_ONCE) != 0 ? KEEP_BRIEFLY : KEEP_NORMALLY;
        tile.expert &= ~READ_ONCE;
        const int path = (tile.rows - 1) / STEP;
        const int rows = (path + 1) * STEP;
        const int share = rows / SHARED;
        const TensorMap& rows_map = a.rows[path];
        const int scaled_rows = min(rows, stride - tile.first);
        // Scales are fewer than 2^31: the host has checked.
        u32 row_scales = (u32)depth.begin * stride + tile.first;
        u32 weight_scale = (tile.expert * scale_rows + min(tile.column / SCALE_BLOCK, scale_rows - 1)) * scale_columns + depth.begin;
        // From a part's weights to the next one's, and rows of scales. A part past the last output has whatever scale.
        const int next_weights = PARTS_APART ? a.n / 2 : OUTPUTS / PARTS;
        const int next_scales = PARTS_APART ? a.n / 2 / SCALE_BLOCK : tile.column / SCALE_BLOCK + 1 < scale_rows ? 1 : 0;
        for (int block = depth.begin; block < depth.end; ++block) {
            wait_for_phase(ring.empty(), ring.parity() ^ 1);
            if (block == depth.begin) store_tile(ring.tile(), tile);
            arrive_expecting(ring.full(), WEIGHTS_BYTES + rows * ROW_BYTES + (BF16 ? 0 : scaled_rows * 4));
#pragma unroll
            for (int part = 0; part < PARTS; ++part)
                copy_box(ring.weights() + part * (WEIGHTS_BYTES / PARTS), a.weights, block * VALUES, tile.column + part * next_weights,
                         tile.expert, ring.full(), keep_weights);
            if (SHARED > 1)
                share_box(ring.rows() + rank * share * ROW_BYTES, rows_map, block * VALUES, tile.first + rank * share, ring.full(),
                          (1 << SHARED) - 1);
            else
                copy_box(ring.rows(), rows_map, block * VALUES, tile.first, ring.full());
            if (!BF16) {
                copy_bytes(ring.row_scales(), a.row_scales + row_scales, scaled_rows * 4, ring.full());
#pragma unroll
                for (int part = 0; part < PARTS; ++part)
                    copy_word(ring.weight_scale() + part * 4, a.weight_scales + weight_scale + part * next_scales * scale_columns);
                arrive_after_copies(ring.full());
                row_scales += stride;
                ++weight_scale;
            }
            ring.advance();
        }
    }
    // A tile without rows comes last.
    wait_for_phase(ring.empty(), ring.parity() ^ 1);
    store_tile(ring.tile(), Tile{0, 0, 0, 0});
    arrive(ring.full());
    if (!BF16) arrive(ring.full());
}

// Tells the producers, of every block that writes here, that this warp is done with a stage.
__device__ __forceinline__ void release(u32 empty) {
    const int lane = lane_of_thread();
    __syncwarp();
    if (lane == 0) arrive(empty);
    if (SHARED > 1 && lane == 1) arrive_elsewhere(address_in_block(empty, rank_in_cluster() ^ 1));
}

// The same without a branch, for where threads wait for what comes after it.
__device__ __forceinline__ void release_at_once(u32 empty) {
    const int lane = lane_of_thread();
    __syncwarp();
    if constexpr (SHARED > 1)
        arrive_elsewhere_if(address_in_block(empty, lane), lane < SHARED);
    else
        arrive_if(empty, lane == 0);
}

// Goes through a tile's stages without a share in them.
__device__ __forceinline__ void pass_blocks(Ring& ring, int blocks) {
    for (int block = 0; block < blocks; ++block) {
        wait_for_phase(ring.full(), ring.parity());
        release(ring.empty());
        ring.advance();
    }
}

__device__ __forceinline__ u32 pack_bf16(float low, float high) { return pack_halves<0>(low, high); }

// A block of K for a warpgroup: sum = a * b^T where `add` is false, sum += a * b^T where it is true. What the sum holds is
// there once the products have been waited for.
template <int N>
__device__ __forceinline__ void start_products(float (&sum)[N / 2], u64 a, u64 b, bool add) {
    hold(sum);
    begin_products();
#pragma unroll
    for (int i = 0; i < INSTRUCTIONS; ++i) multiply<N>(sum, a + 2 * i, b + 2 * i, add || i > 0);
    commit_products();
    hold(sum);
}

// Barriers of the ring; every thread of the cluster calls.
__device__ __forceinline__ void set_up(const GemmArgs& a, u32 memory) {
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < STAGES; ++stage) {
            // The producer, and for e4m3 its copy of the weights' scale.
            init_barrier(memory + BARRIERS + stage * 8, BF16 ? 1 : 2);
            init_barrier(memory + BARRIERS + (STAGES + stage) * 8, CONSUMER_WARPS * SHARED);
            if (SCALING_WARPS > 0) init_barrier(memory + BARRIERS + (2 * STAGES + stage) * 8, SCALING_WARPS);
        }
        if (SPLITS > 1) {
            init_barrier(partials_ready(memory), CONSUMER_WARPS * SPLITS);
            init_barrier(partials_read(memory), CONSUMER_WARPS * SPLITS);
        }
        publish_barriers();
        prefetch_map(a.weights);
    }
    if (CLUSTER > 1)
        meet_cluster();
    else
        __syncthreads();
}
