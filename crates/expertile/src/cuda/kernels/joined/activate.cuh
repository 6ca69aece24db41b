// Both GEMMs in one launch: the activation between them, by warps of its own or by the consumers.
//
// Set by the host: ALPHA, BETA, LIMITED, LIMIT of the activation.
#pragma once
#include "common/activation.cuh"
#include "gemm/pipeline.cuh"
#include "joined/tiles.cuh"

// Columns of a lane: half a warp has a group of a row.
constexpr int COLUMNS_OF_LANE = ACTIVATED_GROUP / 16;

struct GateAndUp {
    uint4 gate;
    uint4 up;
};

// A lane's part of a group of columns of a row: `at` is its first column, of `intermediate`.
__device__ __forceinline__ GateAndUp load_gate_and_up(const u16* gate_up, i64 row, int at, int intermediate,
                                                      bool live) {
    GateAndUp raw = {make_uint4(0, 0, 0, 0), make_uint4(0, 0, 0, 0)};
    if (!live) return raw;
    const u16* from = gate_up + row * (2 * intermediate) + at;
    raw.gate = __ldcg(reinterpret_cast<const uint4*>(from));
    raw.up = __ldcg(reinterpret_cast<const uint4*>(from + intermediate));
    return raw;
}

// Activates, and quantizes where SCALED, a lane's part: as rows/activation.cu. Every lane of the warp calls.
template <typename Config>
__device__ __forceinline__ void activate_part(const JoinedArgs<Config>& a, const GateAndUp& raw, i64 row, int at,
                                              int intermediate, bool live) {
    const u32 gates[4] = {raw.gate.x, raw.gate.y, raw.gate.z, raw.gate.w};
    const u32 ups[4] = {raw.up.x, raw.up.y, raw.up.z, raw.up.w};
    float y[COLUMNS_OF_LANE];
    float largest = 0.0f;
#pragma unroll
    for (int i = 0; i < COLUMNS_OF_LANE; ++i) {
        const float gate = i % 2 == 0 ? low_half<0>(gates[i / 2]) : high_half<0>(gates[i / 2]);
        const float up = i % 2 == 0 ? low_half<0>(ups[i / 2]) : high_half<0>(ups[i / 2]);
        y[i] = times_up(up, gated(gate));
        largest = fmaxf(largest, fabsf(y[i]));
    }
    if constexpr (Config::SCALED) {
        const float scale = scale_of(group_max<ACTIVATED_GROUP, COLUMNS_OF_LANE>(largest), false);
        if (!live) return;
        const Divisor<false> divisor(scale);
        const uint2 bytes = make_uint2(quantize_four(divisor, y), quantize_four(divisor, y + 4));
        *reinterpret_cast<uint2*>(static_cast<u8*>(a.activated) + row * intermediate + at) = bytes;
        if (at % ACTIVATED_GROUP == 0)
            a.activated_scales[(i64)(at / ACTIVATED_GROUP) * ((a.gemms[0].m_sum + 3) & ~3) + row] = scale;
    } else {
        if (!live) return;
        *reinterpret_cast<uint4*>(static_cast<u16*>(a.activated) + row * intermediate + at) =
            make_uint4(pack_bf16(y[0], y[1]), pack_bf16(y[2], y[3]), pack_bf16(y[4], y[5]), pack_bf16(y[6], y[7]));
    }
}

// A group of columns of a tile's rows; `warp` of WARPS. Every lane of the warps calls.
template <typename Config, int WARPS>
__device__ __forceinline__ void activate_group(const JoinedArgs<Config>& a, const Tile& tile, int group, int warp) {
    constexpr int AT_ONCE = 2;  // rows of a lane
    const int intermediate = a.gemms[1].k;
    const u16* gate_up = static_cast<const u16*>(a.gemms[0].out);
    const int at = group * ACTIVATED_GROUP + lane_of_thread() % 16 * COLUMNS_OF_LANE;
#pragma unroll 1
    for (int first = 2 * warp; first < tile.rows; first += AT_ONCE * 2 * WARPS) {
        GateAndUp raw[AT_ONCE];
        const auto row = [&](int i) { return first + i * 2 * WARPS + lane_of_thread() / 16; };
        const auto live = [&](int i) { return row(i) < tile.rows && at < intermediate; };
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i)
            raw[i] = load_gate_and_up(gate_up, tile.first + row(i), at, intermediate, live(i));
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) activate_part(a, raw[i], tile.first + row(i), at, intermediate, live(i));
    }
}

// Counts the tile's pieces of gate and up, a lane each. Bits of the lanes whose group is complete; every lane of a warp
// calls, after the consumers have stored the pieces.
template <typename Config>
__device__ __forceinline__ u32 count_pieces(const Progress& progress, const Tile& tile) {
    const int output = tile.column + lane_of_thread() * PIECE_OUTPUTS;
    const int group = progress.group_of(output);
    bool complete = false;
    if (lane_of_thread() < Config::OUTPUTS / PIECE_OUTPUTS && output < 2 * progress.intermediate) {
        fence_device();
        const u32 before = atomicAdd(progress.activated + 1 + group, 1u);
        complete = (int)before + 1 == progress.pieces(group);
        // What other blocks have stored of the group may be read from here on.
        fence_device();
    }
    return __ballot_sync(WARP, complete);
}

// What a warpgroup does beside the consumers: activates a group of columns of a row tile when the last of its pieces is
// stored, by whichever block. `barrier` is its own.
template <typename Config, int BARRIER>
__device__ __forceinline__ void activate_tiles(const JoinedArgs<Config>& a, u32 queue) {
    constexpr int WARPS = WARPGROUP / 32;
    const int warp = threadIdx.x % WARPGROUP / 32;
    for (StoredSlot at(queue);; ++at.number) {
        wait_for_phase(at.full(), at.parity());
        const Tile tile = load_tile(at.tile());
        if (tile.rows == 0) break;
        const Progress progress(a, load_shared_word(at.tile_number()));
        if (warp == 0) {
            const u32 counted = count_pieces<Config>(progress, tile);
            if (lane_of_thread() == 0) store_shared_word(at.complete(), counted);
        }
        meet_at<BARRIER, WARPGROUP>();
        const u32 complete = load_shared_word(at.complete());
        StageLoads loads;
        loads.add(tile.rows);
        loads.add((int)complete);
        arrive_if(loads.then(at.empty()), lane_of_thread() == 0);
        if (complete == 0) continue;
        for (u32 left = complete; left != 0; left &= left - 1) {
            const int output = tile.column + (__ffs(left) - 1) * PIECE_OUTPUTS;
            activate_group<Config, WARPS>(a, tile, progress.group_of(output), warp);
        }
        publish_global_writes();
        meet_at<BARRIER, WARPGROUP>();
        if (threadIdx.x % WARPGROUP == 0) {
            fence_device();
            atomicAdd(progress.activated, (u32)__popc(complete));
            atomicAdd(a.counters, (u32)__popc(complete));
        }
    }
}

// What the consumers do where no warpgroup has registers for the activation: a warpgroup that has stored a piece counts
// it, and activates the group of columns of which it was the last. All of the warpgroup call; `barrier` and `flag`, a word
// of shared memory, are its own.
template <typename Config>
__device__ __forceinline__ void finish_piece(const JoinedArgs<Config>& a, const Tile& tile, u32 number, int output,
                                             u32 flag, int barrier) {
    const Progress progress(a, number);
    const int group = progress.group_of(output);
    const bool first = threadIdx.x % WARPGROUP == 0;
    meet_threads<WARPGROUP>(barrier);
    if (first) {
        fence_device();
        const u32 before = atomicAdd(progress.activated + 1 + group, 1u);
        const bool complete = (int)before + 1 == progress.pieces(group);
        // What other blocks have stored of the group may be read from here on.
        if (complete) fence_device();
        store_shared_word(flag, complete);
    }
    meet_threads<WARPGROUP>(barrier);
    if (__any_sync(WARP, load_shared_word(flag) != 0)) {
        activate_group<Config, WARPGROUP / 32>(a, tile, group, threadIdx.x % WARPGROUP / 32);
        publish_global_writes();
        meet_threads<WARPGROUP>(barrier);
        if (first) {
            fence_device();
            atomicAdd(progress.activated, 1u);
            atomicAdd(a.counters, 1u);
        }
    }
    __syncwarp();
}

// Waits until all columns of a row tile are activated; the copy engine may read them from here on. Whether those of all
// rows are, so that nothing has to be waited for any more.
template <typename Config>
__device__ __forceinline__ bool wait_until_activated(const JoinedArgs<Config>& a, const Progress& progress,
                                                     int row_tiles) {
    const bool all = load_now(a.counters) == (u32)(row_tiles * progress.groups());
    while (!all && load_now(progress.activated) < (u32)progress.groups()) {
    }
    fence_device();
    publish_global_writes();
    return all;
}
