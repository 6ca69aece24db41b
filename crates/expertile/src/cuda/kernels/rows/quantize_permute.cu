// Quantize + permute after route_plan, for any number of tokens: every row is loaded once, quantized once, and stored once
// per live slot. Few slots: rows/route_permute.cu.
//
// Set by the host: HIDDEN (= WIDTH), TOPK, INPUT (0 bf16, 1 f16), GROUP, SCALE_LAYOUT (0 row-major, 1 MN-major, 2 packed
// UE8M0), POWER_OF_TWO, WEIGHTED, ZERO_ROWS, ALIGNED (x and its rows stand on 16 bytes), ROWS_THREADS (of a block),
// HOST_SLAB.
#include "common/scales.cuh"
#include "ptx/hopper.cuh"
#include "rows/slabs.cuh"

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
        // A lane past the row may share, and keep, the scale of a last group that is not whole.
        if (!NO_REMAINDER && (slab * SLAB + in_slab) / GROUP * GROUP >= HIDDEN) scale[half] = 0.0f;
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
