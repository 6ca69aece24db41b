// The grouped GEMM on Hopper over MXFP4 weights: out[r, :] = weights[expert of r] * rows[r, :], live rows only, f32
// sums, bf16 out; rows are e4m3 with scales, or bf16.
//
// As in sm90_gemm_few_rows.cu weights are the M operand of wgmma, a tile is some outputs of up to ROW_TILE rows of one
// expert, and a warpgroup multiplies 64 outputs. Consumers decode weights into registers, from which wgmma takes its M
// operand: gemm/mxfp4.cuh has their layout in memory. Decoding multiplies each value by the power of two that its
// group's scale is below the largest of the output; the consumer multiplies the sum by that largest scale at the end.
// Where the scales of a slab are too far apart for that, products are scaled by group of 32; weights that have such
// slabs are multiplied by a kernel that has both.
//
// Where a tile has few rows several blocks share a multiprocessor, or one has many warps: while one decodes, another's
// products run. All tiles add up the blocks of K in the same order, so a row has the same bits in all of them.
//
// int4 weights, whose scales are no powers of two, are all multiplied group by group: gemm/int4.cuh has their units.
//
// Set by the host: see config.cuh; HOST_MULTICAST and HOST_K_SPLITS are 1; HOST_OUTPUTS is a multiple of 64;
// HOST_BLOCKS is the number of blocks that a multiprocessor is to hold; HOST_SPREAD says whether slabs may be spread;
// HOST_INT4 whether weights are int4, of which none is.
#include "gemm/int4.cuh"
#include "gemm/mxfp4.cuh"
#include "gemm/weights_on_m.cuh"

struct Config : HostConfig {
    static constexpr int OUTPUTS = HOST_OUTPUTS;
    static constexpr int OUTPUTS_OF_CONSUMER = UNIT_OUTPUTS;
    static constexpr int CONSUMERS = OUTPUTS / OUTPUTS_OF_CONSUMER;
    static constexpr int THREADS = (1 + CONSUMERS) * WARPGROUP;
    static constexpr int BLOCKS = HOST_BLOCKS;
    static constexpr bool BROAD = CONSUMERS > 2;  // one block fills a multiprocessor with warps
    static constexpr int PRODUCER_REGISTERS = CONSUMERS == 6 ? 24 : BROAD || BLOCKS > 1 ? 32 : 40;
    static constexpr int CONSUMER_REGISTERS = CONSUMERS == 6   ? 80
                                              : CONSUMERS == 4 ? 112
                                              : CONSUMERS == 3 ? 160
                                              : BLOCKS > 1     ? 104
                                                               : 232;
    static constexpr bool GATE_AND_UP = false;
    static constexpr int WEIGHT_BOXES = 1;
    static constexpr int CLUSTER_COLUMNS = 1;
    static constexpr int CLUSTER = 1;
    static constexpr int ROW_TILES_PER_GROUP = 8;
    static constexpr int SCALING_WARPS = 0;
    static constexpr bool SCALES_APART = PRODUCER_REGISTERS < 32 && SCALED;

    static constexpr int UNITS = K_BLOCK / UNIT_K;  // of a slab in a block of K
    static constexpr int GROUPS = K_BLOCK / 32;
    static constexpr int INSTRUCTIONS = ROW_BYTES / 32;  // for a block of K
    static constexpr int REGISTERS = 4 * INSTRUCTIONS;   // of the M operand of a block of K

    // Bytes from a staged row to the next: 16 more than its results, so that eight rows start on different banks.
    static constexpr int STAGING_ROW = OUTPUTS_OF_CONSUMER * 2 + 16;
    static constexpr int STAGING_BYTES = ROW_TILE * CONSUMERS * STAGING_ROW;
};

// host: Mxfp4 in cuda/gemm/shared_memory.rs.
struct SharedStorage {
    u8 rows[Config::STAGES][Config::ROW_TILE][ROW_BYTES];
    alignas(16) u8 weights[Config::STAGES][Config::CONSUMERS][Config::UNITS * UNIT_BYTES];
    // Results, transposed, before they are stored: [CONSUMERS][ROW_TILE][STAGING_ROW].
    alignas(16) u8 staging[Config::STAGING_BYTES];
    alignas(16) float row_scales[Config::STAGES][Config::ROW_TILE];
    Tile tiles[Config::STAGES];
    Mbarrier full[Config::STAGES];
    Mbarrier empty[Config::STAGES];
};

static_assert(AgreesWithHost<Config, SharedStorage>::value);
// A block moves registers among its own threads: it starts with as many as the launch bounds leave to each, in eights.
static_assert(Config::CONSUMERS == 1 ||
                  Config::PRODUCER_REGISTERS + Config::CONSUMERS * Config::CONSUMER_REGISTERS <=
                      (1 + Config::CONSUMERS) * (65536 / (Config::BLOCKS * Config::THREADS) / 8 * 8),
              "consumers would wait for registers that nobody gives back");
static_assert(Config::MULTICAST == 1 && Config::K_SPLITS == 1, "there is no kernel for this");
static_assert(1 << Config::CONSUMERS <= UNIT_OUTPUTS,
              "a tile's first output leaves a bit for each slab that is spread");
static_assert(sizeof(SharedStorage::rows[0]) % 1024 == 0, "every stage starts on a pattern of the swizzle");

using Args = GemmArgs<Config>;
constexpr Format FORMAT = Config::FORMAT;

struct Ring : StageRing<Config, SharedStorage> {
    __device__ __forceinline__ explicit Ring(u32 shared) : StageRing<Config, SharedStorage>(shared) {}

    __device__ __forceinline__ u32 rows() const {
        return memory + OFFSET(SharedStorage, rows) + stage * (int)sizeof(SharedStorage::rows[0]);
    }
    __device__ __forceinline__ u32 weights(int consumer) const {
        return memory + OFFSET(SharedStorage, weights) + stage * (int)sizeof(SharedStorage::weights[0]) +
               consumer * (int)sizeof(SharedStorage::weights[0][0]);
    }
};

// Warps of the first warpgroup, by number; the other warpgroups are consumers.
enum class ProducerWarp : int {
    WEIGHTS = 0,  // one thread of it loads weights
    ROWS = 1,     // one thread of it loads rows and, unless SCALES_APART, their scales
    SCALES = 2,   // loads scales, if SCALES_APART: one thread has too few registers for both
};

// Arrivals at `full`: of both loading threads, and of each thread that loads scales once more when its cp.async is done.
constexpr int FULL_ARRIVALS = Config::SCALES_APART ? 2 + 32 : Config::SCALED ? 3 : 2;

__device__ __forceinline__ int blocks_of(int k) { return (k + Config::K_BLOCK - 1) / Config::K_BLOCK; }

// A value that BROAD loads anew: what follows from it is not kept in registers all the time, of which there are few.
__device__ __forceinline__ int here(int value) { return Config::BROAD ? (int)further(value, 0) : value; }

// The thread that loads weights, and says which tile they are of: in the lowest bits of `column`, which is a multiple
// of 64, which of the tile's slabs have scales that are not folded in.
__device__ __forceinline__ void produce_weights(const Args& a, Ring ring, StaticScheduler<Config> scheduler) {
    Tile tile;
    while (scheduler.next(tile)) {
        const u64 keep = (tile.expert & READ_ONCE) != 0 ? KEEP_BRIEFLY : KEEP_NORMALLY;
        tile.expert &= ~READ_ONCE;
        const int first = tile.column / UNIT_OUTPUTS;
        if (HOST_SPREAD) {
            const int slabs = (here(a.n) + UNIT_OUTPUTS - 1) / UNIT_OUTPUTS;
            const u8* spread = a.spread + ((i64)tile.expert * slabs + first);
#pragma unroll 1
            for (int i = 0; i < min(Config::CONSUMERS, slabs - first); ++i) tile.column |= spread[i] << i;
        }
        // Before the loop, where the tile is still in registers.
        wait_for_phase(ring.empty(), ring.parity() ^ 1);
        store_tile(ring.tile(), tile);
        const int slabs = (here(a.n) + UNIT_OUTPUTS - 1) / UNIT_OUTPUTS;
        const int present = min(Config::CONSUMERS, slabs - first);
        int units = (here(a.k) + UNIT_K - 1) / UNIT_K;
        const i64 slab_bytes = (i64)units * UNIT_BYTES;
        const u8* from = a.packed + ((i64)tile.expert * slabs + first) * slab_bytes;
        for (; units > 0; units -= Config::UNITS) {
            const u32 bytes = min(Config::UNITS, units) * UNIT_BYTES;
            wait_for_phase(ring.empty(), ring.parity() ^ 1);
            arrive_expecting(ring.full(), present * bytes);
            const u8* next = from;
#pragma unroll 1
            for (int i = 0; i < present; ++i, next += slab_bytes)
                copy_bytes(ring.weights(i), next, bytes, ring.full(), keep);
            from += bytes;
            ring.advance();
        }
    }
    // A tile without rows comes last: consumers stop there.
    wait_for_phase(ring.empty(), ring.parity() ^ 1);
    store_tile(ring.tile(), Tile{0, 0, 0, 0});
    arrive(ring.full());
}

// The thread that loads rows; SCALES: and their scales.
template <bool SCALES>
__device__ __forceinline__ void produce_rows(const Args& a, Ring ring, StaticScheduler<Config> scheduler) {
    const int stride = (a.m_sum + 3) & ~3;
    const int blocks = blocks_of(a.k);
    Tile tile;
    while (scheduler.next(tile)) {
        const int map = (tile.rows - 1) / Config::ROW_STEP;
        const int rows = (map + 1) * Config::ROW_STEP;
        const int scaled = min(rows, stride - tile.first);
        // A bulk copy starts on 16 bytes; else scales are copied one by one.
        const u32 scale_bytes = SCALES && tile.first % 4 == 0 ? scaled * 4 : 0;
        const float* scales = a.row_scales + tile.first;
        for (int block = 0; block < blocks; ++block) {
            wait_for_phase(ring.empty(), ring.parity() ^ 1);
            arrive_expecting(ring.full(), rows * ROW_BYTES + scale_bytes);
            copy_box(ring.rows(), a.rows[map], block * Config::K_BLOCK, tile.first, ring.full());
            if constexpr (SCALES) {
                if (scale_bytes > 0) {
                    copy_bytes(ring.row_scales(), scales, scale_bytes, ring.full());
                } else {
#pragma unroll 1
                    for (int row = 0; row < scaled; ++row) copy_word(ring.row_scales() + row * 4, scales + row);
                }
                arrive_after_copies(ring.full());
                scales += stride;
            }
            ring.advance();
        }
    }
    wait_for_phase(ring.empty(), ring.parity() ^ 1);
    arrive(ring.full());
    if (SCALES) arrive(ring.full());
}

// A warp that loads scales of rows, a lane those of one row.
__device__ __forceinline__ void produce_scales(const Args& a, Ring ring, StaticScheduler<Config> scheduler) {
    static_assert(!Config::SCALES_APART || Config::ROW_TILE <= 32, "a lane for each row");
    const int lane = lane_of_thread();
    Tile tile;
    while (scheduler.next(tile)) {
        const float* scales = a.row_scales + (tile.first + lane);
        for (int k = 0; k < a.k; k += Config::K_BLOCK) {
            wait_for_phase(ring.empty(), ring.parity() ^ 1);
            if (lane < tile.rows) copy_word(ring.row_scales() + lane * 4, scales);
            arrive_after_copies(ring.full());
            scales += (here(a.m_sum) + 3) & ~3;
            ring.advance();
        }
    }
    wait_for_phase(ring.empty(), ring.parity() ^ 1);
    arrive(ring.full());
}

// The M operand of a block of K, of which `units` are there; past the last unit of K it is zero.
__device__ __forceinline__ void decode_block(const Ring& ring, int consumer, int units, u32 (&a)[Config::REGISTERS]) {
    constexpr int EACH = GROUP_REGISTERS<FORMAT>;
#pragma unroll
    for (int unit = 0; unit < Config::UNITS; ++unit) {
        u32* to = a + 2 * EACH * unit;
        if (unit == 0 || unit < units) {
            Unit(ring.weights(consumer) + unit * UNIT_BYTES).decode<FORMAT>(to);
        } else {
#pragma unroll
            for (int i = 0; i < 2 * EACH; ++i) to[i] = 0;
        }
    }
}

// Rows of a tile are multiplied in pieces of at most 64: the products of one run while those of another are added, but
// where there are few registers to a thread.
template <int N>
__device__ constexpr int rows_of_piece() {
    if (Config::CONSUMERS == 6 && (Config::SCALED || HOST_INT4)) return 16;
    if (N < 64) return N;
    if (Config::BLOCKS > 1 || Config::CONSUMERS == 4 || (HOST_INT4 && Config::CONSUMERS == 3)) return 32;
    return N % 64 == 0 ? 64 : N / 2;
}
template <int N>
constexpr int PIECE = rows_of_piece<N>();
template <int N>
constexpr int PIECES_AT_ONCE = N > PIECE<N>&& Config::BLOCKS == 1 && !Config::BROAD ? 2 : 1;

// Starts the products of a piece's rows with a block of K.
template <int ROWS>
__device__ __forceinline__ void start_piece(float (&part)[ROWS / 2], const u32 (&a)[Config::REGISTERS], u32 rows) {
    const u64 b = operand(rows);
    begin_products();
#pragma unroll
    for (int i = 0; i < Config::INSTRUCTIONS; ++i) multiply_registers<FORMAT, ROWS>(part, a + 4 * i, b + 2 * i, i > 0);
    commit_products();
}

// Adds a piece's products, times the rows' scales, to its sums. `scales` are those of its first row on.
template <int ROWS>
__device__ __forceinline__ void add_scaled(u32 scales, const float (&part)[ROWS / 2], float* sum) {
    const int lane = lane_of_thread() % 4;
#pragma unroll
    for (int i = 0; i < ROWS / 8; ++i) {
        const float2 scale = load_shared_pair(scales + (8 * i + 2 * lane) * 4);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            float& total = sum[4 * i + j];
            total = __fmaf_rn(part[4 * i + j], j % 2 == 0 ? scale.x : scale.y, total);
        }
    }
}

// The products of the pieces that run at once.
template <int N>
using Parts = float[PIECES_AT_ONCE<N>][PIECE<N> / 2];

// Adds the pieces of a block of K from PIECE_INDEX on, of which PIECES_AT_ONCE have been started; starts the others.
template <int N, int PIECE_INDEX = 0>
__device__ __forceinline__ void add_pieces(const u32 (&a)[Config::REGISTERS], u32 rows, u32 row_scales, Parts<N>& part,
                                           float (&sum)[N / 2]) {
    constexpr int ROWS = PIECE<N>;
    constexpr int PIECES = N / ROWS;
    constexpr int AT_ONCE = PIECES_AT_ONCE<N>;
    wait_for_products<AT_ONCE == 2 && PIECE_INDEX + 1 < PIECES>();
    fence_accumulators(part[PIECE_INDEX % AT_ONCE]);
    add_scaled<ROWS>(row_scales + PIECE_INDEX * ROWS * 4, part[PIECE_INDEX % AT_ONCE], sum + PIECE_INDEX * (ROWS / 2));
    if constexpr (PIECE_INDEX + AT_ONCE < PIECES)
        start_piece<ROWS>(part[PIECE_INDEX % AT_ONCE], a, rows + (PIECE_INDEX + AT_ONCE) * ROWS * ROW_BYTES);
    if constexpr (PIECE_INDEX + 1 < PIECES) add_pieces<N, PIECE_INDEX + 1>(a, rows, row_scales, part, sum);
}

// Whether the next block of K (int4: unit) is decoded while the products of this one run: where there are registers for
// it.
template <int N>
__device__ constexpr bool decodes_ahead() {
    if (HOST_SPREAD) return false;
    constexpr bool INT4_OF_BF16 = HOST_INT4 && !Config::SCALED;
    if (Config::CONSUMERS == 6) return N == 16 || !Config::SCALED || HOST_INT4;
    if (Config::CONSUMERS == 4) return !INT4_OF_BF16;
    if (Config::BLOCKS == 1 || Config::ROW_TILE == 16) return true;
    constexpr int MOST = !INT4_OF_BF16 ? 48 : Config::CONSUMERS == 1 || Config::ROW_TILE <= 32 ? 32 : 0;
    return Config::BLOCKS == 2 && N <= MOST;
}
template <int N>
constexpr bool DECODES_AHEAD = decodes_ahead<N>();

// Waits for a block of K and decodes it; `units` are left of the slab from there on.
__device__ __forceinline__ void decode_next(const Ring& ring, int consumer, int units, u32 (&a)[Config::REGISTERS]) {
    wait_unless_over(ring.full(), ring.parity(), false);
    decode_block(ring, consumer, units, a);
}

// Adds a block of K of e4m3 rows, whose M operand is `a`, and meanwhile decodes the next one, if there is MORE.
template <int N>
__device__ __forceinline__ void add_block_scaled(Ring& ring, int consumer, int& units, bool more,
                                                 u32 (&a)[Config::REGISTERS], u32 (&next)[Config::REGISTERS],
                                                 float (&sum)[N / 2]) {
    const u32 rows = ring.rows();
    const u32 row_scales = ring.row_scales();
    const u32 current = ring.empty();
    Parts<N> part;
    start_piece<PIECE<N>>(part[0], a, rows);
    if constexpr (PIECES_AT_ONCE<N> > 1) start_piece<PIECE<N>>(part[1], a, rows + PIECE<N> * ROW_BYTES);
    units -= Config::UNITS;
    ring.advance();
    if (DECODES_AHEAD<N> && more) decode_next(ring, consumer, units, next);
    add_pieces<N>(a, rows, row_scales, part, sum);
    fence_operands(a);
    release_without_branch<Config>(current);
    if (!DECODES_AHEAD<N> && more) decode_next(ring, consumer, units, next);
}

// The same of bf16 rows.
template <int N>
__device__ __forceinline__ void add_block_plain(Ring& ring, int consumer, int& units, bool more,
                                                u32 (&a)[Config::REGISTERS], u32 (&next)[Config::REGISTERS],
                                                float (&sum)[N / 2]) {
    constexpr int ROWS = PIECE<N>;
    const u32 current = ring.empty();
    fence_accumulators(sum);
    begin_products();
#pragma unroll
    for (int piece = 0; piece < N / ROWS; ++piece) {
        const u64 b = operand(ring.rows() + piece * ROWS * ROW_BYTES);
#pragma unroll
        for (int i = 0; i < Config::INSTRUCTIONS; ++i)
            multiply_registers<FORMAT, ROWS>(sum + piece * (ROWS / 2), a + 4 * i, b + 2 * i, 1);
    }
    commit_products();
    units -= Config::UNITS;
    ring.advance();
    if (DECODES_AHEAD<N> && more) decode_next(ring, consumer, units, next);
    wait_for_products<0>();
    fence_accumulators(sum);
    fence_operands(a);
    release_without_branch<Config>(current);
    if (!DECODES_AHEAD<N> && more) decode_next(ring, consumer, units, next);
}

template <int N>
__device__ __forceinline__ void add_block(Ring& ring, int consumer, int& units, bool more, u32 (&a)[Config::REGISTERS],
                                          u32 (&next)[Config::REGISTERS], float (&sum)[N / 2]) {
    if constexpr (Config::SCALED)
        add_block_scaled<N>(ring, consumer, units, more, a, next, sum);
    else
        add_block_plain<N>(ring, consumer, units, more, a, next, sum);
}

// Adds up the blocks of K. e4m3: products of 128 of K are scaled and added outside the matrix unit. bf16: sums stay in
// the matrix unit. Two blocks at a time, which take turns with the registers of the M operand.
template <int N>
__device__ __forceinline__ void multiply(Ring& ring, int k, int consumer, float (&sum)[N / 2]) {
    constexpr int OTHER = DECODES_AHEAD<N> ? 1 : 0;
    u32 a[1 + OTHER][Config::REGISTERS];
    int blocks = blocks_of(k);
    int units = (k + UNIT_K - 1) / UNIT_K;
    decode_next(ring, consumer, units, a[0]);
    while (true) {
        add_block<N>(ring, consumer, units, blocks > 1, a[0], a[OTHER], sum);
        if (--blocks == 0) break;
        add_block<N>(ring, consumer, units, blocks > 1, a[OTHER], a[0], sum);
        if (--blocks == 0) break;
    }
}

// A unit whose scales are not folded in: the M operand, and for each of its two groups of 32 the powers of two of this
// thread's outputs, whose largest scales are `largest`.
struct SpreadUnit {
    static constexpr int GROUP_INSTRUCTIONS = GROUP_REGISTERS<FORMAT> / 4;

    u32 a[2 * GROUP_REGISTERS<FORMAT>];
    float powers[2][2];

    __device__ __forceinline__ SpreadUnit(const Unit& mine, const int (&largest)[2]) {
        decode_group<FORMAT, 0, false>(mine.words, 0, a);
        decode_group<FORMAT, 1, false>(mine.words, 0, a + GROUP_REGISTERS<FORMAT>);
#pragma unroll
        for (int i = 0; i < 4; ++i)
            powers[i / 2][i % 2] = power_of_two(exponent_of_sum<FORMAT>(largest[i % 2] - (int)byte_of(mine.steps, i)));
    }
};

// Adds the products of a few rows with a unit, group by group: times the rows' scales, times the powers.
template <int ROWS, int GROUP = 0>
__device__ __forceinline__ void add_groups(const SpreadUnit& unit, u64 rows, u32 row_scales, float* sum) {
    constexpr int INSTRUCTIONS = SpreadUnit::GROUP_INSTRUCTIONS;
    float part[ROWS / 2];
    begin_products();
#pragma unroll
    for (int i = 0; i < INSTRUCTIONS; ++i)
        multiply_registers<FORMAT, ROWS>(part, unit.a + 4 * (GROUP * INSTRUCTIONS + i),
                                         rows + 2 * (GROUP * INSTRUCTIONS + i), i > 0);
    commit_products();
    wait_for_products<0>();
    fence_accumulators(part);
#pragma unroll
    for (int i = 0; i < ROWS / 2; i += 4) {
        float2 scale = make_float2(1.0f, 1.0f);
        if constexpr (Config::SCALED) scale = load_shared_pair(row_scales + (2 * i + lane_of_thread() % 4 * 2) * 4);
#pragma unroll
        for (int j = i; j < i + 4; ++j)
            sum[j] =
                __fmaf_rn(__fmul_rn(part[j], j % 2 == 0 ? scale.x : scale.y), unit.powers[GROUP][j / 2 % 2], sum[j]);
    }
    if constexpr (GROUP == 0) add_groups<ROWS, 1>(unit, rows, row_scales, sum);
}

// Adds up the blocks of K of a slab whose scales are too far apart. `largest`: the outputs' largest scales.
template <int N>
__device__ __forceinline__ void multiply_spread(Ring& ring, int k, int consumer, const int (&largest)[2],
                                                float (&sum)[N / 2]) {
    constexpr int ROWS = FORMAT == Format::BF16 && N % 32 == 0 ? 32 : 16;
    static_assert(N % ROWS == 0, "every row is in a piece");
    const int blocks = blocks_of(k);
    int units = (k + UNIT_K - 1) / UNIT_K;
    for (int block = 0; block < blocks; ++block) {
        wait_for_phase(ring.full(), ring.parity());
#pragma unroll 1
        for (int i = 0; i < min(units, Config::UNITS); ++i) {
            SpreadUnit unit(Unit(ring.weights(consumer) + i * UNIT_BYTES), largest);
#pragma unroll
            for (int piece = 0; piece < N / ROWS; ++piece) {
                // A unit of e4m3 is 64 of the row's 128 bytes.
                const u64 rows = operand(ring.rows() + piece * ROWS * ROW_BYTES) + i * 4;
                add_groups<ROWS>(unit, rows, ring.row_scales() + piece * ROWS * 4, sum + piece * (ROWS / 2));
            }
            fence_operands(unit.a);
        }
        units -= Config::UNITS;
        release<Config>(ring.empty());
        ring.advance();
    }
}

// Starts the products of a piece's rows with a unit of int4: each group's apart.
template <int ROWS>
__device__ __forceinline__ void start_int4_piece(float (&parts)[2][ROWS / 2], const Int4Unit<FORMAT>& unit, u64 rows) {
    constexpr int INSTRUCTIONS = GROUP_REGISTERS<FORMAT> / 4;  // for a group
    begin_products();
#pragma unroll
    for (int i = 0; i < 2 * INSTRUCTIONS; ++i)
        multiply_registers<FORMAT, ROWS>(parts[i / INSTRUCTIONS], unit.a + 4 * i, rows + 2 * i, i % INSTRUCTIONS > 0);
    commit_products();
}

// Adds a piece's products to its sums: each group's times its scales, both groups' times the rows'.
template <int ROWS>
__device__ __forceinline__ void add_int4_piece(const float (&parts)[2][ROWS / 2], const float (&scales)[2][2],
                                               u32 row_scales, float* sum) {
#pragma unroll
    for (int i = 0; i < ROWS / 2; i += 4) {
        float2 scale = make_float2(1.0f, 1.0f);
        if constexpr (Config::SCALED) scale = load_shared_pair(row_scales + (2 * i + lane_of_thread() % 4 * 2) * 4);
#pragma unroll
        for (int j = i; j < i + 4; ++j) {
            const float first = scales[0][j / 2 % 2];
            const float second = scales[1][j / 2 % 2];
            if constexpr (Config::SCALED)
                sum[j] = __fmaf_rn(__fmaf_rn(parts[1][j], second, __fmul_rn(parts[0][j], first)),
                                   j % 2 == 0 ? scale.x : scale.y, sum[j]);
            else
                sum[j] = __fmaf_rn(parts[1][j], second, __fmaf_rn(parts[0][j], first, sum[j]));
        }
    }
}

// The N operand of unit `index` of a block of K: a unit of e4m3 is 64 of the row's 128 bytes.
__device__ __forceinline__ u64 int4_rows(u32 rows, int index) { return operand(rows) + index * 4; }

// Adds the products of unit `index`, of which those of the first piece have been started.
template <int N>
__device__ __forceinline__ void add_int4_pieces(float (&parts)[2][PIECE<N> / 2], const Int4Unit<FORMAT>& unit, u32 rows,
                                                int index, const float (&scales)[2][2], u32 row_scales,
                                                float (&sum)[N / 2]) {
    constexpr int ROWS = PIECE<N>;
#pragma unroll
    for (int piece = 0; piece < N / ROWS; ++piece) {
        if (piece > 0) start_int4_piece<ROWS>(parts, unit, int4_rows(rows + piece * ROWS * ROW_BYTES, index));
        wait_for_products<0>();
        fence_accumulators(parts[0]);
        fence_accumulators(parts[1]);
        add_int4_piece<ROWS>(parts, scales, row_scales + piece * ROWS * 4, sum + piece * (ROWS / 2));
    }
}

// Adds unit INDEX of a block of K, and meanwhile decodes the next one, if there is MORE.
template <int N, int INDEX>
__device__ __forceinline__ void add_int4_unit(Ring& ring, int consumer, bool more, bool f16_scales,
                                              Int4Unit<FORMAT>& unit, Int4Unit<FORMAT>& next, float (&sum)[N / 2]) {
    constexpr bool LAST = INDEX + 1 == Config::UNITS;
    const u32 rows = ring.rows();
    const u32 row_scales = ring.row_scales();
    const u32 current = ring.empty();
    float parts[2][PIECE<N> / 2];
    start_int4_piece<PIECE<N>>(parts, unit, int4_rows(rows, INDEX));
    if (LAST || !more) ring.advance();
    if (more) {
        if (LAST) wait_unless_over(ring.full(), ring.parity(), false);
        next.decode(ring.weights(consumer) + (LAST ? 0 : INDEX + 1) * UNIT_BYTES);
    }
    float scales[2][2];
    unit.scales(f16_scales, scales);
    add_int4_pieces<N>(parts, unit, rows, INDEX, scales, row_scales, sum);
    fence_operands(unit.a);
    if (LAST || !more) release_without_branch<Config>(current);
}

// Adds up the units of K of int4 weights: two at a time, which take turns with the registers of the M operand.
template <int N>
__device__ __forceinline__ void multiply_int4_ahead(Ring& ring, int k, int consumer, bool f16_scales,
                                                    float (&sum)[N / 2]) {
    Int4Unit<FORMAT> unit[2];
    int units = (k + UNIT_K - 1) / UNIT_K;
    wait_unless_over(ring.full(), ring.parity(), false);
    unit[0].decode(ring.weights(consumer));
    while (true) {
        add_int4_unit<N, 0>(ring, consumer, units > 1, f16_scales, unit[0], unit[1], sum);
        if (--units == 0) break;
        add_int4_unit<N, Config::UNITS - 1>(ring, consumer, units > 1, f16_scales, unit[1], unit[0], sum);
        if (--units == 0) break;
    }
}

// The same where there are registers for one unit.
template <int N>
__device__ __forceinline__ void multiply_int4(Ring& ring, int k, int consumer, bool f16_scales, float (&sum)[N / 2]) {
    const int blocks = blocks_of(k);
    int units = (k + UNIT_K - 1) / UNIT_K;
    for (int block = 0; block < blocks; ++block) {
        wait_for_phase(ring.full(), ring.parity());
#pragma unroll 1
        for (int i = 0; i < min(units, Config::UNITS); ++i) {
            Int4Unit<FORMAT> unit;
            unit.decode(ring.weights(consumer) + i * UNIT_BYTES);
            float scales[2][2];
            unit.scales(f16_scales, scales);
            float parts[2][PIECE<N> / 2];
            start_int4_piece<PIECE<N>>(parts, unit, int4_rows(ring.rows(), i));
            add_int4_pieces<N>(parts, unit, ring.rows(), i, scales, ring.row_scales(), sum);
            fence_operands(unit.a);
        }
        units -= Config::UNITS;
        release<Config>(ring.empty());
        ring.advance();
    }
}

// Multiplies the sums of an output by a power of two.
template <int N>
__device__ __forceinline__ void multiply_by_powers(const int (&exponents)[2], float (&sum)[N / 2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const Power power(exponents[half]);
#pragma unroll
        for (int i = 2 * half; i < N / 2; i += 4) {
            sum[i] = power.times(sum[i]);
            sum[i + 1] = power.times(sum[i + 1]);
        }
    }
}

// The exponents of the largest scales of this thread's outputs.
__device__ __forceinline__ int largest_scale(const Args& a, const Tile& tile, int consumer, int half) {
    const int outputs = (a.n + UNIT_OUTPUTS - 1) / UNIT_OUTPUTS * UNIT_OUTPUTS;
    const int output = min(tile.column + consumer * UNIT_OUTPUTS + output_of_thread() + 8 * half, outputs - 1);
    // Volatile: loaded here, long before it is needed.
    return *static_cast<const volatile u8*>(a.exponents + (i64)tile.expert * outputs + output);
}

// A tile of up to N rows. SPREAD: this warpgroup's scales are too far apart.
template <int N, bool SPREAD>
__device__ __forceinline__ void finish_tile(const Args& a, const Tile& tile, Ring& ring, int consumer) {
    float sum[N / 2];
#pragma unroll
    for (int i = 0; i < N / 2; ++i) sum[i] = 0.0f;
    if constexpr (HOST_INT4) {
        if constexpr (DECODES_AHEAD<N>)
            multiply_int4_ahead<N>(ring, a.k, consumer, a.f16_scales != 0, sum);
        else
            multiply_int4<N>(ring, a.k, consumer, a.f16_scales != 0, sum);
    } else {
        int exponents[2] = {largest_scale(a, tile, consumer, 0), largest_scale(a, tile, consumer, 1)};
        if constexpr (SPREAD) {
            multiply_spread<N>(ring, a.k, consumer, exponents, sum);
        } else {
            multiply<N>(ring, a.k, consumer, sum);
            exponents[0] = exponent_of_sum<FORMAT>(exponents[0]);
            exponents[1] = exponent_of_sum<FORMAT>(exponents[1]);
            multiply_by_powers<N>(exponents, sum);
        }
    }
    if (a.bias != nullptr) add_bias<N>(OutputPair(a.bias + (i64)tile.expert * a.n, a, tile, consumer), sum);
    store_rows<Config, SharedStorage, N>(a, tile, ring.memory, consumer, sum);
}

// Takes the code for the fewest steps that the tile's rows fit: N of wgmma is a constant of the instruction. Where
// scales are spread, that for the most: sums of rows that are not there are not stored.
template <int STEPS>
__device__ __forceinline__ void multiply_tile(const Args& a, const Tile& tile, Ring& ring, int consumer, bool spread) {
    if constexpr (HOST_SPREAD && STEPS == 1) {
        if (spread) {
            finish_tile<Config::ROW_TILE, true>(a, tile, ring, consumer);
            return;
        }
    }
    if (STEPS == Config::ROW_MAPS || tile.rows <= STEPS * Config::ROW_STEP)
        finish_tile<STEPS * Config::ROW_STEP, false>(a, tile, ring, consumer);
    else if constexpr (STEPS < Config::ROW_MAPS)
        multiply_tile<STEPS + 1>(a, tile, ring, consumer, spread);
}

extern "C" __global__ void __launch_bounds__(Config::THREADS, Config::BLOCKS) gemm(const __grid_constant__ Args a) {
    extern __shared__ __align__(1024) u8 shared[];
    const u32 memory = shared_address(shared);
    // A shuffle, for the compiler to see that a warp has one: the ring is then kept in uniform registers.
    const int consumer = __shfl_sync(WARP, (int)threadIdx.x / WARPGROUP, 0) - 1;
    Ring ring(memory);
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < Config::STAGES; ++stage) {
            init_barrier(memory + OFFSET(SharedStorage, full) + stage * 8, FULL_ARRIVALS);
            init_barrier(memory + OFFSET(SharedStorage, empty) + stage * 8, Config::CONSUMERS * (WARPGROUP / 32));
        }
        publish_barriers();
    }
    __syncthreads();
    wait_for_previous_launch();
    // With one consumer warpgroup every thread has as many registers as it may have from the start.
    constexpr bool MOVE_REGISTERS = Config::CONSUMERS > 1;
    if (consumer < 0) {
        if constexpr (MOVE_REGISTERS) give_registers<Config::PRODUCER_REGISTERS>();
        const int warp = threadIdx.x / 32;
        if (warp == (int)ProducerWarp::WEIGHTS) {
            if (elect_thread()) produce_weights(a, ring, StaticScheduler<Config>(a, blockIdx.x, gridDim.x, 0));
        } else if (warp == (int)ProducerWarp::ROWS) {
            constexpr bool SCALES = Config::SCALED && !Config::SCALES_APART;
            if (elect_thread()) produce_rows<SCALES>(a, ring, StaticScheduler<Config>(a, blockIdx.x, gridDim.x, 0));
        } else if (Config::SCALES_APART && warp == (int)ProducerWarp::SCALES) {
            produce_scales(a, ring, StaticScheduler<Config>(a, blockIdx.x, gridDim.x, 0));
        }
    } else {
        if constexpr (MOVE_REGISTERS) take_registers<Config::CONSUMER_REGISTERS>();
        while (true) {
            wait_for_phase(ring.full(), ring.parity());
            Tile tile = load_tile(ring.tile());
            if (tile.rows == 0) break;
            const bool spread = HOST_SPREAD && (tile.column >> consumer & 1) != 0;
            tile.column &= ~(UNIT_OUTPUTS - 1);
            // Past the last output there is nothing to decode, and the other warpgroups issue instructions instead. A
            // vote, so that the compiler knows the ring to be the same in all of a warp.
            if (Config::BROAD && __any_sync(WARP, tile.column + consumer * UNIT_OUTPUTS >= a.n)) {
                skip_blocks(ring, blocks_of(a.k));
                continue;
            }
            multiply_tile<1>(a, tile, ring, consumer, spread);
        }
        wait_for_stores_to_read();
    }
}
