// Quantize + permute: every row is loaded once, quantized once, and stored once per live slot.
//
//   permute_rows            any number of tokens, after route_plan
//   route_quantize_permute  up to 8192 slots, routing and plan included, in one launch: every block counts all slots,
//                           which at this size takes less time than an exchange between blocks, and ranks only those
//                           whose rows it stores
//
// Set by the host: HIDDEN (= WIDTH), TOPK, IDS_I64, INPUT (0 bf16, 1 f16), GROUP, SCALE_LAYOUT (0 row-major, 1
// MN-major, 2 packed UE8M0), POWER_OF_TWO, WEIGHTED, ZERO_ROWS, ALIGNED (x and its rows stand on 16 bytes),
// ROWS_THREADS (of a block of permute_rows), OWN_SLOTS (that a block of the single launch has room for),
// HOST_FEW_THREADS (of its blocks), HOST_SLAB.
#include "common/scales.cuh"
#include "ptx/hopper.cuh"
#include "route/route.cuh"
#include "rows/rows.cuh"

static_assert(SLAB == HOST_SLAB, "the host counts slabs, too");

constexpr int SLABS = (HIDDEN + SLAB - 1) / SLAB;

struct Slab {
    u32 pairs[PER_LANE / 2];
};

__device__ __forceinline__ Slab load_slab(const RowsArgs& a, int token, int slab) {
    Slab s;
    const int column = slab * SLAB + lane_of_thread() * PER_LANE;
    const u16* row = static_cast<const u16*>(a.x) + token * a.x_row_stride + column;
    if (column >= HIDDEN) {
#pragma unroll
        for (int i = 0; i < PER_LANE / 2; ++i) s.pairs[i] = 0;
        return s;
    }
#if ALIGNED
    const uint4 low = load_through_l1(row);
    const uint4 high = load_through_l1(row + 8);
    s.pairs[0] = low.x, s.pairs[1] = low.y, s.pairs[2] = low.z, s.pairs[3] = low.w;
    s.pairs[4] = high.x, s.pairs[5] = high.y, s.pairs[6] = high.z, s.pairs[7] = high.w;
#else
#pragma unroll
    for (int i = 0; i < PER_LANE / 2; ++i) s.pairs[i] = row[2 * i] | (u32)row[2 * i + 1] << 16;
#endif
    return s;
}

// What load_slab is going to read.
__device__ __forceinline__ void prefetch_slab(const RowsArgs& a, int token, int slab) {
    constexpr int LANES_TO_A_LINE = 128 / (2 * PER_LANE);
    const int column = slab * SLAB + lane_of_thread() * PER_LANE;
    if (lane_of_thread() % LANES_TO_A_LINE == 0 && column < HIDDEN)
        prefetch_line(static_cast<const u16*>(a.x) + token * a.x_row_stride + column);
}

// The router weight times the row, rounded to the row's own type.
__device__ __forceinline__ void apply_weight(const RowsArgs& a, int token, Slab& s) {
#if WEIGHTED
    const float weight = a.weights[token * a.weights_row_stride];
#pragma unroll
    for (int i = 0; i < PER_LANE / 2; ++i)
        s.pairs[i] = pack_halves<INPUT>(__fmul_rn(weight, low_half<INPUT>(s.pairs[i])),
                                        __fmul_rn(weight, high_half<INPUT>(s.pairs[i])));
#endif
}

// A row is cut into pieces of at most 16 slabs; a piece is copied as a whole to each of its rows. A team of warps takes
// a piece, two slabs to a warp, whose loads are all in flight at once.
constexpr int PIECES = (SLABS + 15) / 16;
constexpr int SLABS_PER_PIECE = (SLABS + PIECES - 1) / PIECES;
constexpr int TEAM_WARPS = (SLABS_PER_PIECE + 1) / 2;
constexpr int TEAMS = 8 / TEAM_WARPS;
constexpr int MANY_WARPS = TEAM_WARPS * TEAMS;
static_assert(MANY_WARPS * 32 == ROWS_THREADS, "the host cuts rows otherwise");
// Whether every team's every warp has two whole slabs: its loads then stand behind no condition.
constexpr bool NO_REMAINDER = HIDDEN % SLAB == 0 && SLABS % PIECES == 0 && SLABS_PER_PIECE % 2 == 0;
// Blocks to a multiprocessor: what the registers allow, of which conditions and unaligned loads take more.
constexpr int MANY_BLOCKS = NO_REMAINDER && ALIGNED ? 4 : 3;
constexpr int TOKEN_SCALES_STRIDE = (WORDS_PER_ROW + 3) & ~3;

struct Team {
    alignas(128) u8 piece[2][SLABS_PER_PIECE * SLAB];  // while one is filled, the other is being stored
    u32 next[2];
};

__device__ __forceinline__ void meet_team(int team) {
    if (TEAM_WARPS == 1)
        __syncwarp();
    else
        meet_threads<TEAM_WARPS * 32>(team + 1);
}

// The lane's 8 values of each half of a slab: what the lanes load at a time is one run of memory.
__device__ __forceinline__ Slab load_halves(const RowsArgs& a, int token, int slab) {
    Slab s;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int column = slab * SLAB + half * (SLAB / 2) + lane_of_thread() * 8;
        const u16* row = static_cast<const u16*>(a.x) + token * a.x_row_stride + column;
        u32* pairs = s.pairs + 4 * half;
        if (!NO_REMAINDER && column >= HIDDEN) {
            pairs[0] = pairs[1] = pairs[2] = pairs[3] = 0;
            continue;
        }
#if ALIGNED
        // Where rows are read about as often as written, an H200 takes 3 % less time through the L1; where they are
        // mostly written, a little more.
        const uint4 v = TOPK <= 2 ? load_through_l1(row) : load_once(row);
        pairs[0] = v.x, pairs[1] = v.y, pairs[2] = v.z, pairs[3] = v.w;
#else
#pragma unroll
        for (int i = 0; i < 4; ++i) pairs[i] = row[2 * i] | (u32)row[2 * i + 1] << 16;
#endif
    }
    return s;
}

// Lanes that share a word of scales; the first of them keeps it, and where a word is of one half of the slab, the
// middle one keeps that of the second half.
constexpr int WORD_HALVES = WORDS_PER_SLAB > 1 ? 2 : 1;
constexpr int WORD_LANES = 32 * WORD_HALVES / WORDS_PER_SLAB;
constexpr int WORD_STEP = WORD_LANES / WORD_HALVES;

// A slab as load_halves has it, quantized into shared memory; the lane's word of scales. Every lane of the warp calls.
__device__ __forceinline__ u32 quantize_halves(u8* to, int slab, const Slab& s) {
    const int lane = lane_of_thread();
    float scale[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int in_slab = half * (SLAB / 2) + lane * 8;
        *reinterpret_cast<uint2*>(to + in_slab) = quantize_half_slab < INPUT, GROUP,
                                       POWER_OF_TWO != 0 > (s.pairs + 4 * half, scale[half]);
        if (!NO_REMAINDER && slab * SLAB + in_slab >= HIDDEN) scale[half] = 0.0f;
    }
    const u32 first = word_of_half(scale, 0);
    if (WORD_HALVES == 1) return first;
    const u32 second = word_of_half(scale, 1);
    return lane % WORD_LANES < WORD_STEP ? first : second;
}

__device__ __forceinline__ void keep_word(const RowsArgs& a, int token, int slab, u32 word) {
    const int lane = lane_of_thread();
    const int half = lane / WORD_STEP % WORD_HALVES;
    const int column = slab * WORDS_PER_SLAB + half * (WORDS_PER_SLAB / 2) + lane / WORD_LANES;
    if (lane % WORD_STEP == 0 && (NO_REMAINDER || column < WORDS_PER_ROW))
        a.token_scales[(i64)token * TOKEN_SCALES_STRIDE + column] = word;
}

// Quantizes the warp's two slabs of a piece into shared memory; their scales are kept by token. Every lane of the warp
// calls.
__device__ __forceinline__ void quantize_part(const RowsArgs& a, u8* piece, int token, int first_of_piece, int warp) {
    const int first = first_of_piece + 2 * warp;
    Slab s[2];
    u32 word[2];
    const auto is_there = [&](int i) { return NO_REMAINDER || (2 * warp + i < SLABS_PER_PIECE && first + i < SLABS); };
#pragma unroll
    for (int i = 0; i < 2; ++i)
        if (is_there(i)) s[i] = load_halves(a, token, first + i);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        if (!is_there(i)) break;
        apply_weight(a, token, s[i]);
        word[i] = quantize_halves(piece + (2 * warp + i) * SLAB, first + i, s[i]);
    }
#if __CUDA_ARCH__ >= 900
    publish_shared_writes();
#endif
    // After the fence, which orders what comes before it: these stores need not be.
#pragma unroll
    for (int i = 0; i < 2; ++i)
        if (is_there(i)) keep_word(a, token, first + i, word[i]);
}

// Sends a piece, `at` bytes into its row, to every row that the lanes below TOPK hold. Every lane of the team calls.
// Where there is a bulk copy engine the first warp hands it the whole piece; elsewhere each warp copies what it wrote
// itself.
__device__ __forceinline__ void send_piece(const RowsArgs& a, const u8* piece, int at, int rows, int warp) {
    const int bytes = min(SLABS_PER_PIECE * SLAB, HIDDEN - at);
#if __CUDA_ARCH__ >= 900
    if (warp != 0) return;
    if (rows >= 0) store_bytes(a.out + (i64)rows * HIDDEN + at, shared_address(piece), bytes);
    commit_stores();
#else
    for (int copy = 0; copy < TOPK; ++copy) {
        const int row = __shfl_sync(WARP, rows, copy);
        if (row < 0) continue;
        for (int byte = 2 * warp * SLAB + lane_of_thread() * 16; byte < min(bytes, 2 * (warp + 1) * SLAB); byte += 512)
            *reinterpret_cast<uint4*>(a.out + (i64)row * HIDDEN + at + byte) =
                *reinterpret_cast<const uint4*>(piece + byte);
    }
#endif
}

// Waits until shared memory that this thread has sent from may be written again.
__device__ __forceinline__ void wait_for_sent() {
#if __CUDA_ARCH__ >= 900
    wait_for_stores_to_read();
#endif
}

// Pieces quantized and sent to their places, in the order of the tokens, so that rows that are neighbours in the output
// are written at about the same time. next[1] has the team's first piece.
__device__ __forceinline__ void permute_pieces(const RowsArgs& a, Team& team, int number) {
    const int lane = lane_of_thread();
    const int warp = (threadIdx.x >> 5) % TEAM_WARPS;
    const u32 units = (u32)a.tokens * PIECES;
    u32 finished = 0;
    u32 unit = team.next[1];
    for (int stage = 0; unit < units; stage ^= 1, ++finished) {
        u32 next = 0;
        if (warp == 0 && lane == 0) next = atomicAdd(&a.queue->claimed, 1u);
        const int token = unit / PIECES;
        const int first = unit % PIECES * SLABS_PER_PIECE;
        const int rows = lane < TOPK ? a.inv_perm[(i64)token * TOPK + lane] : -1;
        const bool live = __any_sync(WARP, rows >= 0);
        if (live) quantize_part(a, team.piece[stage], token, first, warp);
        if (warp == 0) {
            wait_for_sent();
            if (lane == 0) team.next[stage] = next;
        }
        meet_team(number);
        unit = team.next[stage];
        if (live) send_piece(a, team.piece[stage], first * SLAB, rows, warp);
    }
    if (warp == 0 && lane == 0 && finished > 0) {
        __threadfence();
        atomicAdd(&a.queue->done, finished);
    }
}

// Rows first; then the scales, once every row is done. Pieces are claimed, not given: what a block waits for at the end
// is always in the hands of one that runs, even if this launch has to share the device with one that waits likewise.
extern "C" __global__ void __launch_bounds__(ROWS_THREADS, MANY_BLOCKS)
    permute_rows(const __grid_constant__ RowsArgs a) {
    __shared__ Team teams[TEAMS];
    const int number = (threadIdx.x >> 5) / TEAM_WARPS;
    // Before the wait: the last launch that used the queue is done, for route_plan, which is all that can still run,
    // has waited for it.
    if (threadIdx.x % (TEAM_WARPS * 32) == 0) teams[number].next[1] = atomicAdd(&a.queue->claimed, 1u);
    wait_for_previous_launch();
    let_next_launch_start();
    __syncthreads();
    permute_pieces(a, teams[number], number);
    const int warp = (threadIdx.x >> 5) * gridDim.x + blockIdx.x;
    const int warps = gridDim.x * MANY_WARPS;
    const auto token_of = [&](int row) { return row < a.m_sum ? a.row_tokens[row] : -1; };
    // Some multiprocessors are slower at memory than others: those that are done zero what is all padding meanwhile.
    zero_padding_groups(a.scales, a.m_sum, warp, warps, token_of);
    if (ZERO_ROWS)
        zero_padding_rows<uint4>(a.out, HIDDEN, a.m_sum, warp, warps, [&](int row) { return a.row_tokens[row] >= 0; });
    if (threadIdx.x == 0) {
        while (load_now(&a.queue->done) < (u32)a.tokens * PIECES) {
        }
        __threadfence();
        // The last to get here leaves the queue as it found it.
        if (atomicAdd(&a.queue->left, 1u) == gridDim.x - 1) a.queue->claimed = a.queue->done = a.queue->left = 0;
    }
    __syncthreads();
    spread_scales(a.scales, a.m_sum, warp, warps, token_of, [&](int token, int quad) {
        return __ldcg(reinterpret_cast<const uint4*>(a.token_scales + (i64)token * TOKEN_SCALES_STRIDE) + quad);
    });
    wait_for_sent();
}

constexpr int FEW_THREADS = HOST_FEW_THREADS;
constexpr int FEW_WARPS = FEW_THREADS / 32;
static_assert(MAX_EXPERTS == FEW_THREADS, "a thread to an expert");

// Quotients computed on the host so that the kernel never divides.
struct FewArgs {
    int units;       // (token, slab) pairs of every block,
    int more_units;  // and one more for each of as many blocks, from the first on
    u32 alignment_inverse;
    u32 tile_inverse;
    u32 second_inverse;  // 0 without a second worklist
};

// The block's part of the rows: (token, slab) units, and the slots of the tokens they are of.
struct Share {
    int first_unit;
    int end_unit;
    int first_slot;
    int slots;

    __device__ __forceinline__ explicit Share(const FewArgs& f) {
        const int block = blockIdx.x;
        first_unit = block * f.units + min(block, f.more_units);
        end_unit = first_unit + f.units + (block < f.more_units);
        const int first_token = first_unit / SLABS;
        first_slot = first_token * TOPK;
        slots = end_unit > first_unit ? ((end_unit - 1) / SLABS + 1 - first_token) * TOPK : 0;
    }
};

// What a block has counted and ranked: every slot is counted, only those of the block's own share are ranked.
struct Counted {
    u32 before[MAX_EXPERTS];  // slots ahead of the block's share
    u16 seen[MAX_EXPERTS];    // in the share
    // Of each slot in the share, the expert (0xffff for none) and below it the rank in the share.
    u32 own[OWN_SLOTS];
};

constexpr int COUNTED_AT_ONCE = 4;

// Counts a thread's slots from `first` on, as many as it counts at once.
__device__ __forceinline__ void count_some(const RouteArgs& r, const Share& share, int slots, int first, Experts& s,
                                           Counted& c) {
    Id id[COUNTED_AT_ONCE];
#pragma unroll
    for (int i = 0; i < COUNTED_AT_ONCE; ++i) {
        const int slot = first + i * FEW_THREADS;
        if (slot < slots) id[i] = *id_of_slot(r, slot);
    }
#pragma unroll
    for (int i = 0; i < COUNTED_AT_ONCE; ++i) {
        const int slot = first + i * FEW_THREADS;
        if (slot >= slots) break;
        const int expert = expert_of_id(r, slot, id[i], blockIdx.x == 0 ? r.status : nullptr);
        const int in_share = slot - share.first_slot;
        if (in_share >= 0 && in_share < share.slots) c.own[in_share] = expert;
        if (expert < 0) continue;
        atomicAdd(&s.total[expert], 1);
        if (in_share < 0) atomicAdd(&c.before[expert], 1u);
    }
}

// Counts every slot: into the totals, and those ahead of the share once more. Leaves the experts of the share's in
// c.own.
__device__ __forceinline__ void count_slots(const RouteArgs& r, const Share& share, int slots, int thread, Experts& s,
                                            Counted& c) {
    count_some(r, share, slots, thread, s, c);
    constexpr int STEP = COUNTED_AT_ONCE * FEW_THREADS;
    if (slots <= STEP) return;
    for (int first = thread + STEP; first < slots; first += STEP) count_some(r, share, slots, first, s, c);
}

// Ranks the share's slots; one warp, all of its lanes.
__device__ __forceinline__ void rank_share(const Share& share, Counted& c, int experts) {
    for (int base = 0; base < share.slots; base += 32) {
        const int slot = base + lane_of_thread();
        const int expert = slot < share.slots ? (int)c.own[slot] : -1;
        const u32 rank = rank_in_warp(expert, experts, c.seen);
        if (slot < share.slots) c.own[slot] = (u32)expert << 16 | rank;
    }
}

extern "C" __global__ void __launch_bounds__(FEW_THREADS, 1)
    route_quantize_permute(const __grid_constant__ RouteArgs r, const __grid_constant__ RowsArgs a,
                           const __grid_constant__ FewArgs f) {
    __shared__ Experts s;
    __shared__ Counted c;
    const int warp = threadIdx.x >> 5;
    const int lane = lane_of_thread();
    // Rows are taken by warps from the first on, routing and plan by warps from the last on: where there are few of
    // either, they go on side by side.
    const int planner = FEW_WARPS - 1 - warp;
    const int planner_thread = planner * 32 + lane;
    const int slots = r.tokens * TOPK;
    s.total[threadIdx.x] = 0;
    c.before[threadIdx.x] = 0;
    c.seen[threadIdx.x] = 0;
    const Share share(f);
    const int first_unit = share.first_unit + warp;
    const bool have_unit = first_unit < share.end_unit;
    // Rows and ids may have left the L2 by now: they come back while the launch before ends.
    if (have_unit) prefetch_slab(a, first_unit / SLABS, first_unit % SLABS);
    constexpr int IDS_TO_A_LINE = 128 / sizeof(Id);
    if (threadIdx.x * IDS_TO_A_LINE < slots) prefetch_line(id_of_slot(r, threadIdx.x * IDS_TO_A_LINE));
    __syncthreads();
    wait_for_previous_launch();
    let_next_launch_start();

    count_slots(r, share, slots, planner_thread, s, c);
    // The warp's first unit: its row is in flight while the plan is computed. Not before, where ids would queue behind
    // it.
    Slab slab;
    if (have_unit) slab = load_slab(a, first_unit / SLABS, first_unit % SLABS);
    __syncthreads();
    // The warp after those that plan, if there is one.
    if (planner == min((r.experts + 31) / 32, FEW_WARPS - 1)) rank_share(share, c, r.experts);
    plan_few_slots(s, planner_thread, r.experts, r.alignment, f.alignment_inverse, f.tile_inverse, f.second_inverse);
    uint4 bytes;
    float scale;
    if (have_unit) {
        apply_weight(a, first_unit / SLABS, slab);
        bytes = quantize_slab < INPUT, GROUP, POWER_OF_TWO != 0 > (slab.pairs, scale);
    }
    __syncthreads();
    const auto row_of_slot = [&](int slot) {
        const u32 packed = c.own[slot - share.first_slot];
        const u32 e = packed >> 16;
        if (e == 0xffffu) return -1;
        const int row = s.start[e] + (int)(c.before[e] + (packed & 0xffffu));
        return row < r.m_sum ? row : -1;
    };

    for (int unit = first_unit; unit < share.end_unit; unit += FEW_WARPS) {
        const int token = unit / SLABS;
        const int index = unit % SLABS;
        const int rows = lane < TOPK ? row_of_slot(token * TOPK + lane) : -1;
        if (!__any_sync(WARP, rows >= 0)) continue;
        // The row of the warp's next unit comes to the L2 meanwhile.
        if (unit + FEW_WARPS < share.end_unit) prefetch_slab(a, (unit + FEW_WARPS) / SLABS, (unit + FEW_WARPS) % SLABS);
        if (unit != first_unit) {
            slab = load_slab(a, token, index);
            apply_weight(a, token, slab);
            bytes = quantize_slab < INPUT, GROUP, POWER_OF_TWO != 0 > (slab.pairs, scale);
        }
        const int column = index * SLAB + lane * PER_LANE;
        store_copies<uint4>(a.out, bytes, HIDDEN, column, column < HIDDEN, rows);
        store_slab_scales<TOPK>(a.scales, column < HIDDEN ? scale : 0.0f, index, rows, a.m_sum);
    }
    // What is left is shared out by kind, so that no warp goes through all of it.
    constexpr int LISTING_WARPS = FEW_WARPS / 4;
    if (planner < LISTING_WARPS / 2) {
        const int thread = (planner * gridDim.x + blockIdx.x) * 32 + lane;
        const int threads = LISTING_WARPS / 2 * 32 * gridDim.x;
        // Of a token whose slabs several blocks share, the block that has the first lists the slots.
        const int after = (share.first_unit + SLABS - 1) / SLABS * TOPK;
        for (int slot = after + planner_thread; slot < share.first_slot + share.slots; slot += LISTING_WARPS / 2 * 32)
            write_slot(r, slot, row_of_slot(slot));
        write_experts(r, s, thread, threads);
        write_worklists(r, s, thread, threads);
    } else if (planner < LISTING_WARPS) {
        const int thread = ((planner - LISTING_WARPS / 2) * gridDim.x + blockIdx.x) * 32 + lane;
        write_m_indices(r, s, thread, LISTING_WARPS / 2 * 32 * gridDim.x);
    } else {
        // Left to the warps that have had no rows, if those are enough.
        const int first = f.units < FEW_WARPS / 2 ? f.units + 1 : 0;
        if (warp >= first)
            zero_padding_scales(
                a.scales, a.m_sum, r.experts, min(s.rows, r.m_sum), (warp - first) * gridDim.x + blockIdx.x,
                (FEW_WARPS - LISTING_WARPS - first) * gridDim.x, [&](int e) { return min(s.start[e], r.m_sum); },
                [&](int e) { return min(s.start[e] + s.total[e], r.m_sum); });
    }
    if (ZERO_ROWS)
        zero_padding_rows<uint4>(a.out, HIDDEN, a.m_sum, warp * gridDim.x + blockIdx.x, FEW_WARPS * gridDim.x,
                                 [&](int row) {
                                     const int e = last_not_above(s.start, r.experts, row);
                                     return row < s.start[e] + s.total[e];
                                 });
}
