// The grouped GEMM on Hopper: out[r, :] = weights[expert of r] * rows[r, :], live rows only, f32 sums, bf16 out.
//
// Weights stand on the matrix unit's M side and tokens on its N side, which takes any multiple of 8: a tile is 128 outputs
// of up to TOKENS rows of one expert, and an expert's last tile costs what its rows cost, to STEP of them. Tiles come from
// the worklist that the plan left on the device, so padding is never read for its own sake, computed or stored.
//
// A block is persistent: one thread keeps the copy engine STAGES blocks of K ahead, two warpgroups multiply, 64 outputs
// each. With e4m3 the sums of each 128 of K are scaled and added outside the matrix unit, which keeps fewer bits.
// A cluster of SHARED blocks takes neighbouring outputs of the same rows, each copying its share of them to all; a cluster of
// SPLITS blocks takes parts of K of the same tile and adds them up in the order of the parts, for when tiles are few.
//
// Set by whoever compiles: BF16 (operands; else e4m3), TOKENS, STEP (a divisor of it), SHARED (1 or 2), SPLITS (1, 2, 4 or
// 8; one of the two is 1), STAGES.
#include "wgmma.cuh"

constexpr int OUTPUTS = 128;
constexpr int OUTPUTS_OF_GROUP = 64;
constexpr int CLUSTER = SHARED * SPLITS;
constexpr int PATHS = TOKENS / STEP;
constexpr int WARPGROUP = 128;
constexpr int THREADS = 3 * WARPGROUP;
constexpr int CONSUMER_WARPS = 8;

constexpr int ROW_BYTES = 128;  // of a block of K
constexpr int VALUES = BF16 ? ROW_BYTES / 2 : ROW_BYTES;
constexpr int SCALE_BLOCK = 128;
constexpr int INSTRUCTIONS = ROW_BYTES / 32;
// Where scaling the sums takes about as long as making them, the warpgroups take turns at the matrix unit, so that one
// scales while the other multiplies.
constexpr bool IN_TURNS = false;

// Shared memory, in bytes from its start; operands stand on 1024. host: shared_bytes in gemm.rs.
constexpr int WEIGHTS_BYTES = OUTPUTS * ROW_BYTES;
constexpr int STAGE_BYTES = WEIGHTS_BYTES + TOKENS * ROW_BYTES;
// A row of results: padded, so that eight of them start on different banks.
constexpr int STAGING_ROW = OUTPUTS_OF_GROUP * 2 + 16;
constexpr int PARTIAL_ROW = OUTPUTS * 4 + 16;
constexpr int STAGING_BYTES = SPLITS > 1 ? TOKENS * PARTIAL_ROW : 2 * TOKENS * STAGING_ROW;
constexpr int STAGING = STAGES * STAGE_BYTES;
constexpr int ROW_SCALES = STAGING + STAGING_BYTES;
constexpr int WEIGHT_SCALES = ROW_SCALES + STAGES * TOKENS * 4;
constexpr int TILES = (WEIGHT_SCALES + STAGES * 4 + 15) / 16 * 16;
// The products of both, in the order of their readers: a lane's neighbours in the sum have theirs TOKENS / 4 apart, and four
// more, so that they stand on different banks.
constexpr int SCALES_OF_LANE = TOKENS / 4 + 4;
constexpr int SCALES = TILES + STAGES * 16;
constexpr int BARRIERS = SCALES + STAGES * 4 * SCALES_OF_LANE * 4;
constexpr int SCALING_WARPS = (TOKENS / 2 + 31) / 32;
static_assert(SCALING_WARPS <= 3, "the producer's warpgroup has three warps to spare");

static_assert(TOKENS % STEP == 0 && STEP % 16 == 0, "a path takes whole matrices, and whole patterns of the swizzle from each block that shares");

struct GemmArgs {
    TensorMap weights;      // [experts, n, k], a box is OUTPUTS rows of a block of K
    TensorMap rows[PATHS];  // [m_sum, k], a box is a path's rows over SHARED
    const float* row_scales;     // [k / 128, m_sum rounded up to 4]
    const float* weight_scales;  // [experts, n / 128, k / 128], rounded up
    u16* out;                    // [m_sum, n] bf16
    const int* header;
    const int2* worklist;
    const int* psum;
    int n;
    int k;
    int m_sum;
    int reserved;
};

struct alignas(16) Tile {
    int expert;
    int first;   // row
    int rows;    // live
    int column;  // first output
};

// Items of work in the order they are taken: a few row tiles at a time, all their outputs, rows first, so that blocks
// that run together share rows and, where they belong to one expert, weights in the cache.
struct Schedule {
    int tiles;
    int columns;

    __device__ __forceinline__ explicit Schedule(const GemmArgs& a)
        : tiles(a.header[2]), columns((a.n + OUTPUTS * SHARED - 1) / (OUTPUTS * SHARED)) {}

    __device__ __forceinline__ int items() const { return tiles * columns; }

    __device__ __forceinline__ Tile tile(const GemmArgs& a, int item, int rank) const {
        constexpr int TOGETHER = 8;
        if (item >= items()) return Tile{0, 0, 1, 0};
        const int before = item / (TOGETHER * columns) * TOGETHER;
        const int together = min(TOGETHER, tiles - before);
        const int place = item - before * columns;
        // Turned by one for each column: a block that always met the same place would always meet an expert's short last tile.
        const int2 entry = a.worklist[before + (place + place / together) % together];
        const int rows = min(a.psum[entry.x] - entry.y, TOKENS);
        const int column = place / together * SHARED + (SHARED > 1 ? rank : 0);
        return Tile{entry.x, entry.y, max(rows, 1), column * OUTPUTS};
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
    u32 parity;

    __device__ __forceinline__ explicit Ring(u32 shared) : memory(shared), stage(0), parity(0) {}
    __device__ __forceinline__ u32 full() const { return memory + BARRIERS + stage * 8; }
    __device__ __forceinline__ u32 empty() const { return memory + BARRIERS + (STAGES + stage) * 8; }
    __device__ __forceinline__ u32 scaled() const { return memory + BARRIERS + (2 * STAGES + stage) * 8; }
    __device__ __forceinline__ u32 scales() const { return memory + SCALES + stage * 4 * SCALES_OF_LANE * 4; }
    __device__ __forceinline__ u32 weights() const { return memory + stage * STAGE_BYTES; }
    __device__ __forceinline__ u32 rows() const { return memory + stage * STAGE_BYTES + WEIGHTS_BYTES; }
    __device__ __forceinline__ u32 row_scales() const { return memory + ROW_SCALES + stage * TOKENS * 4; }
    __device__ __forceinline__ u32 weight_scale() const { return memory + WEIGHT_SCALES + stage * 4; }
    // With the first block of a tile's K: which tile it is.
    __device__ __forceinline__ u32 tile() const { return memory + TILES + stage * 16; }
    __device__ __forceinline__ void advance() {
        if (++stage == STAGES) {
            stage = 0;
            parity ^= 1;
        }
    }
};

__device__ __forceinline__ u32 partials_ready(u32 memory) { return memory + BARRIERS + 3 * STAGES * 8; }
__device__ __forceinline__ u32 partials_read(u32 memory) { return memory + BARRIERS + (3 * STAGES + 1) * 8; }

__device__ __forceinline__ void store_tile(u32 to, const Tile& tile) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(tile.expert), "r"(tile.first), "r"(tile.rows), "r"(tile.column)
                 : "memory");
}

__device__ __forceinline__ Tile load_tile(u32 from) {
    Tile tile;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(tile.expert), "=r"(tile.first), "=r"(tile.rows), "=r"(tile.column)
                 : "r"(from)
                 : "memory");
    return tile;
}

__device__ __forceinline__ void produce(const GemmArgs& a, Ring ring, int cluster, int clusters, int rank) {
    const Schedule schedule(a);
    const Depth depth(a.k, rank);
    const int stride = (a.m_sum + 3) & ~3;
    const int scale_rows = (a.n + SCALE_BLOCK - 1) / SCALE_BLOCK;
    const int scale_columns = (a.k + SCALE_BLOCK - 1) / SCALE_BLOCK;
    Tile tile = schedule.tile(a, cluster, rank);
    for (int item = cluster; item < schedule.items(); item += clusters) {
        const Tile next = schedule.tile(a, item + clusters, rank);
        const int path = (tile.rows - 1) / STEP;
        const int rows = (path + 1) * STEP;
        const int share = rows / SHARED;
        const TensorMap& rows_map = a.rows[path];
        const int scaled_rows = min(rows, stride - tile.first);
        // Scales are fewer than 2^31: the host has checked.
        u32 row_scales = (u32)depth.begin * stride + tile.first;
        u32 weight_scale = (tile.expert * scale_rows + min(tile.column / SCALE_BLOCK, scale_rows - 1)) * scale_columns + depth.begin;
        for (int block = depth.begin; block < depth.end; ++block) {
            wait_for_phase(ring.empty(), ring.parity ^ 1);
            if (block == depth.begin) store_tile(ring.tile(), tile);
            arrive_expecting(ring.full(), WEIGHTS_BYTES + rows * ROW_BYTES + (BF16 ? 0 : scaled_rows * 4));
            copy_box(ring.weights(), a.weights, block * VALUES, tile.column, tile.expert, ring.full(), Keep::NORMALLY);
            if (SHARED > 1)
                share_box(ring.rows() + rank * share * ROW_BYTES, rows_map, block * VALUES, tile.first + rank * share, ring.full(),
                          (1 << SHARED) - 1, Keep::NORMALLY);
            else
                copy_box(ring.rows(), rows_map, block * VALUES, tile.first, ring.full(), Keep::NORMALLY);
            if (!BF16) {
                copy_bytes(ring.row_scales(), a.row_scales + row_scales, scaled_rows * 4, ring.full());
                copy_word(ring.weight_scale(), a.weight_scales + weight_scale);
                arrive_after_copies(ring.full());
                row_scales += stride;
                ++weight_scale;
            }
            ring.advance();
        }
        tile = next;
    }
    // A tile without rows: the last.
    wait_for_phase(ring.empty(), ring.parity ^ 1);
    store_tile(ring.tile(), Tile{0, 0, 0, 0});
    arrive(ring.full());
    if (!BF16) arrive(ring.full());
}

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
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(address) : "memory");
    return v;
}

// Multiplies the rows' scales by the weights' once for all warps that use them; `thread` of the scaling warps has two rows.
__device__ __forceinline__ void multiply_scales(Ring ring, int blocks, int thread) {
    const u32 mine = (thread % 4 * SCALES_OF_LANE + thread / 4 * 2) * 4;
    while (true) {
        wait_for_phase(ring.full(), ring.parity);
        if (load_tile(ring.tile()).rows == 0) break;
        for (int block = 0; block < blocks; ++block) {
            wait_for_phase(ring.full(), ring.parity);
            if (thread < TOKENS / 2) {
                const float weight_scale = load_shared(ring.weight_scale());
                const float2 row_scale = load_shared_pair(ring.row_scales() + thread * 8);
                asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(ring.scales() + mine), "f"(__fmul_rn(row_scale.x, weight_scale)),
                             "f"(__fmul_rn(row_scale.y, weight_scale))
                             : "memory");
            }
            __syncwarp();
            if (thread % 32 == 0) arrive(ring.scaled());
            ring.advance();
        }
    }
}

__device__ __forceinline__ void wait_for_turn(int group) {
    if (group == 0)
        asm volatile("bar.sync 3, 256;" ::: "memory");
    else
        asm volatile("bar.sync 4, 256;" ::: "memory");
}

__device__ __forceinline__ void pass_turn(int group) {
    if (group == 0)
        asm volatile("bar.arrive 4, 256;" ::: "memory");
    else
        asm volatile("bar.arrive 3, 256;" ::: "memory");
}

// Tells the producers, of every block that writes here, that this warp is done with a stage.
__device__ __forceinline__ void release(u32 empty) {
    const int lane = lane_of_thread();
    if (SHARED > 1) {
        if (lane < SHARED) arrive_elsewhere(address_in_block(empty, lane));
    } else if (lane == 0) {
        arrive(empty);
    }
}

// The sum over this block's part of K: 64 outputs of N rows.
template <int N>
__device__ __forceinline__ void multiply_blocks(Ring& ring, int blocks, int group, float (&sum)[N / 2]) {
#pragma unroll
    for (int i = 0; i < N / 2; ++i) sum[i] = 0.0f;
#if BF16
    u32 previous = 0;
    for (int block = 0; block < blocks; ++block) {
        wait_for_phase(ring.full(), ring.parity);
        const u64 w = operand(ring.weights() + group * OUTPUTS_OF_GROUP * ROW_BYTES);
        const u64 x = operand(ring.rows());
        hold(sum);
        begin_products();
#pragma unroll
        for (int i = 0; i < INSTRUCTIONS; ++i) multiply<N>(sum, w + 2 * i, x + 2 * i, 1);
        commit_products();
        hold(sum);
        // The products before these are done: their operands may go.
        wait_for_products<1>();
        if (block > 0) release(previous);
        previous = ring.empty();
        ring.advance();
    }
    wait_for_products<0>();
    hold(sum);
    if (blocks > 0) release(previous);
#else
    const u32 my_scales = lane_of_thread() % 4 * SCALES_OF_LANE * 4;
    float part[N / 2];
    for (int block = 0; block < blocks; ++block) {
        wait_for_phase(ring.full(), ring.parity);
        const u64 w = operand(ring.weights() + group * OUTPUTS_OF_GROUP * ROW_BYTES);
        const u64 x = operand(ring.rows());
        hold(part);
        if (IN_TURNS) wait_for_turn(group);
        begin_products();
#pragma unroll
        for (int i = 0; i < INSTRUCTIONS; ++i) {
            multiply<N>(part, w + 2 * i, x + 2 * i, i > 0);
            if (IN_TURNS && i == INSTRUCTIONS - 2) commit_products();
        }
        commit_products();
        hold(part);
        if (IN_TURNS) {
            // The last instruction still runs while the other group's first ones queue up behind it.
            wait_for_products<1>();
            pass_turn(group);
        }
        wait_for_phase(ring.scaled(), ring.parity);
        wait_for_products<0>();
        hold(part);
#pragma unroll
        for (int i = 0; i < N / 16; ++i) {
            const float4 scale = load_shared_quad(ring.scales() + my_scales + i * 16);
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                const float mine = j % 2 == 0 ? (j < 4 ? scale.x : scale.z) : (j < 4 ? scale.y : scale.w);
                sum[8 * i + j] = __fmaf_rn(part[8 * i + j], mine, sum[8 * i + j]);
            }
        }
        __syncwarp();
        release(ring.empty());
        ring.advance();
    }
#endif
}

__device__ __forceinline__ u32 pack_bf16(float low, float high) {
    u32 pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

// Live rows to their places: turned by way of shared memory, then one copy of 64 outputs for each.
template <int N>
__device__ __forceinline__ void store_rows(const GemmArgs& a, const Tile& tile, u32 memory, int group, const float (&sum)[N / 2]) {
    const u32 staging = memory + STAGING + group * TOKENS * STAGING_ROW;
    const int lane = lane_of_thread();
    const int thread = threadIdx.x % WARPGROUP;
    wait_for_stores_to_read();
    meet(group);
    const u32 mine = staging + (lane / 16 * 8 + lane % 8) * STAGING_ROW + (thread / 32 * 16 + lane / 8 % 2 * 8) * 2;
#pragma unroll
    for (int i = 0; i < N / 16; ++i)
        store_transposed(mine + i * 16 * STAGING_ROW, pack_bf16(sum[8 * i], sum[8 * i + 1]), pack_bf16(sum[8 * i + 2], sum[8 * i + 3]),
                         pack_bf16(sum[8 * i + 4], sum[8 * i + 5]), pack_bf16(sum[8 * i + 6], sum[8 * i + 7]));
    publish_shared_writes();
    meet(group);
    const int column = tile.column + group * OUTPUTS_OF_GROUP;
    const int outputs = min(a.n - column, OUTPUTS_OF_GROUP);
    if (outputs > 0)
        for (int row = thread; row < tile.rows; row += WARPGROUP)
            store_bytes(a.out + (i64)(tile.first + row) * a.n + column, staging + row * STAGING_ROW, outputs * 2);
    commit_stores();
}

// The parts of K meet: every block leaves its part where all can read it, and adds up a share of the rows.
template <int N>
__device__ __forceinline__ void add_and_store_rows(const GemmArgs& a, const Tile& tile, u32 memory, int group, int rank, u32 parity,
                                                   const float (&sum)[N / 2]) {
    const u32 staging = memory + STAGING;
    const int lane = lane_of_thread();
    const int thread = threadIdx.x - WARPGROUP;
    wait_for_cluster(partials_read(memory), parity ^ 1);
    const int output = group * OUTPUTS_OF_GROUP + threadIdx.x % WARPGROUP / 32 * 16 + lane / 4;
    const u32 mine = staging + lane % 4 * 2 * PARTIAL_ROW + output * 4;
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
        const u32 at = mine + (i / 4 * 8 + i % 2) * PARTIAL_ROW + i / 2 % 2 * 32;
        asm volatile("st.shared.f32 [%0], %1;" ::"r"(at), "f"(sum[i]) : "memory");
    }
    __syncwarp();
    if (lane < SPLITS) arrive_in_cluster(address_in_block(partials_ready(memory), lane));
    wait_for_cluster(partials_ready(memory), parity);
    constexpr int QUADS = OUTPUTS / 4;
    constexpr int SHARE = N * QUADS / SPLITS;
    for (int i = thread; i < SHARE; i += 2 * WARPGROUP) {
        const int row = (rank * SHARE + i) / QUADS;
        const int quad = i % QUADS;
        float4 total = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
        for (int part = 0; part < SPLITS; ++part) {
            const float4 v = load_from_cluster(address_in_block(staging + row * PARTIAL_ROW + quad * 16, part));
            total = make_float4(__fadd_rn(total.x, v.x), __fadd_rn(total.y, v.y), __fadd_rn(total.z, v.z), __fadd_rn(total.w, v.w));
        }
        const int column = tile.column + quad * 4;
        if (row < tile.rows && column < a.n)
            *reinterpret_cast<uint2*>(a.out + (i64)(tile.first + row) * a.n + column) =
                make_uint2(pack_bf16(total.x, total.y), pack_bf16(total.z, total.w));
    }
    __syncwarp();
    if (lane < SPLITS) arrive_in_cluster(address_in_block(partials_read(memory), lane));
}

template <int N>
__device__ __forceinline__ void finish_tile(const GemmArgs& a, const Tile& tile, Ring& ring, int blocks, int group, int rank, u32 parity) {
    float sum[N / 2];
    multiply_blocks<N>(ring, blocks, group, sum);
    if (SPLITS > 1)
        add_and_store_rows<N>(a, tile, ring.memory, group, rank, parity, sum);
    else
        store_rows<N>(a, tile, ring.memory, group, sum);
}

template <int PATH>
__device__ __forceinline__ void take_path(const GemmArgs& a, const Tile& tile, Ring& ring, int blocks, int group, int rank, u32 parity) {
    if (PATH == PATHS - 1 || tile.rows <= (PATH + 1) * STEP)
        finish_tile<(PATH + 1) * STEP>(a, tile, ring, blocks, group, rank, parity);
    else if constexpr (PATH + 1 < PATHS)
        take_path<PATH + 1>(a, tile, ring, blocks, group, rank, parity);
}

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, 1) gemm(const __grid_constant__ GemmArgs a) {
    extern __shared__ __align__(1024) u8 shared[];
    const u32 memory = shared_address(shared);
    const int rank = CLUSTER > 1 ? (int)rank_in_cluster() : 0;
    const int cluster = blockIdx.x / CLUSTER;
    const int clusters = gridDim.x / CLUSTER;
    const int group = (int)threadIdx.x / WARPGROUP - 1;
    Ring ring(memory);
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < STAGES; ++stage) {
            // The producer, and for e4m3 its copy of the weights' scale.
            init_barrier(memory + BARRIERS + stage * 8, BF16 ? 1 : 2);
            init_barrier(memory + BARRIERS + (STAGES + stage) * 8, CONSUMER_WARPS * SHARED);
            init_barrier(memory + BARRIERS + (2 * STAGES + stage) * 8, SCALING_WARPS);
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
    wait_for_previous_launch();
    let_next_launch_start();
    if (group < 0) {
        give_registers<56>();
        const int warp = threadIdx.x / 32;
        if (warp == 0) {
            if (threadIdx.x == 0) produce(a, ring, cluster, clusters, rank);
        } else if (!BF16 && warp <= SCALING_WARPS) {
            const Depth depth(a.k, rank);
            multiply_scales(ring, depth.end - depth.begin, threadIdx.x - 32);
        }
    } else {
        take_registers<224>();
        const Depth depth(a.k, rank);
        u32 parity = 0;
        if (IN_TURNS && group == 1) pass_turn(group);
        while (true) {
            wait_for_phase(ring.full(), ring.parity);
            const Tile tile = load_tile(ring.tile());
            if (tile.rows == 0) break;
            take_path<0>(a, tile, ring, depth.end - depth.begin, group, rank, parity);
            parity ^= 1;
        }
        // Takes the last turn, which nobody needs.
        if (IN_TURNS && group == 0) wait_for_turn(group);
        wait_for_stores_to_read();
    }
    // Blocks of a cluster write to each other's memory: none goes before the others are done.
    if (CLUSTER > 1) meet_cluster();
}
