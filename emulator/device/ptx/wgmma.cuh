// ptx/wgmma.cuh for the CPU. Products are made only when they are waited for, from what shared memory holds then, and
// until then the sum's registers hold NaN: a kernel that releases operands or reads a sum too early gets a wrong
// result.
#pragma once
#include <vector>

#include "ptx/hopper.cuh"

enum class Format { E4M3, BF16 };

// In units of 16 bytes, as the hardware's descriptors have it.
inline u64 operand(u32 address) { return address >> 4; }
inline u32 further(u32 address, u32 bytes) { return address + bytes; }

// Products that add up in one sum, one after the other.
struct EmulatedChain {
    float* sum;
    Format format;
    int outputs;
    bool continues;             // adds to what an earlier group, not waited for yet, will leave in the sum
    std::vector<float> before;  // what it adds to otherwise
    std::vector<std::pair<u64, u64>> operands;
};

struct EmulatedProducts {
    std::vector<std::vector<EmulatedChain>> groups;  // committed, oldest first; the last is still open

    EmulatedProducts() : groups(1) {}

    bool makes(const float* sum) const {
        for (const auto& group : groups)
            for (const EmulatedChain& chain : group)
                if (chain.sum == sum) return true;
        return false;
    }
};

inline EmulatedProducts& emulated_products() {
    if (emulated_self->products == nullptr) emulated_self->products = new EmulatedProducts();
    return *static_cast<EmulatedProducts*>(emulated_self->products);
}

extern "C" void emulated_end(EmulatedThread* thread) {
    delete static_cast<EmulatedProducts*>(thread->products);
    thread->products = nullptr;
}

inline float emulated_from_e4m3(u32 byte) {
    const u32 exponent = byte >> 3 & 15u;
    const u32 mantissa = byte & 7u;
    const float magnitude = (byte & 0x7fu) == 0x7fu ? NAN
                            : exponent == 0         ? ldexpf((float)mantissa, -9)
                                                    : ldexpf((float)(8 + mantissa), (int)exponent - 10);
    return (byte & 0x80u) != 0 ? -magnitude : magnitude;
}

// Values in 32 bytes.
template <Format FORMAT>
constexpr int emulated_values = FORMAT == Format::BF16 ? 16 : 32;

// 32 bytes of a row of an operand, where the copy engine's swizzle has put them: 16 bytes are moved by the row within
// the pattern.
template <Format FORMAT>
inline void emulated_load_row(u64 operand, int row, float (&values)[emulated_values<FORMAT>]) {
    static const struct Table {
        float of[256];
        Table() {
            for (u32 byte = 0; byte < 256; ++byte) of[byte] = emulated_from_e4m3(byte);
        }
    } table;
    for (int half = 0; half < 2; ++half) {
        const u32 plain = (u32)(operand << 4) + row * 128 + half * 16;
        const u32 place = plain ^ (plain >> 7 & 7u) << 4;
        for (int i = 0; i < emulated_values<FORMAT> / 2; ++i) {
            if constexpr (FORMAT == Format::BF16)
                values[half * 8 + i] = __uint_as_float((u32)emulated_shared<u16>(place + 2 * i) << 16);
            else
                values[half * 16 + i] = table.of[emulated_shared<u8>(place + i)];
        }
    }
}

// This thread's part of the sum: two rows, and two columns of every eight.
template <Format FORMAT>
inline void emulated_multiply(float* sum, int outputs, u64 a, u64 b) {
    constexpr int VALUES = emulated_values<FORMAT>;
    const int lane = emulated_lane();
    const int first = (threadIdx.x / 32) % 4 * 16 + lane / 4;
    float upper[VALUES], lower[VALUES], column[VALUES];
    emulated_load_row<FORMAT>(a, first, upper);
    emulated_load_row<FORMAT>(a, first + 8, lower);
    for (int n = 0; n < outputs / 4; ++n) {
        emulated_load_row<FORMAT>(b, n / 2 * 8 + lane % 4 * 2 + n % 2, column);
        float above = 0.0f, below = 0.0f;
        for (int k = 0; k < VALUES; ++k) {
            above += upper[k] * column[k];
            below += lower[k] * column[k];
        }
        sum[n / 2 * 4 + n % 2] += above;
        sum[n / 2 * 4 + 2 + n % 2] += below;
    }
}

inline void begin_products() {}

inline void commit_products() { emulated_products().groups.emplace_back(); }

template <int LATER>
inline void wait_for_products() {
    auto& groups = emulated_products().groups;
    while (groups.size() > LATER + 1) {
        for (EmulatedChain& chain : groups.front()) {
            if (!chain.continues) memcpy(chain.sum, chain.before.data(), chain.before.size() * sizeof(float));
            const auto multiply =
                chain.format == Format::BF16 ? emulated_multiply<Format::BF16> : emulated_multiply<Format::E4M3>;
            for (const auto& [a, b] : chain.operands) multiply(chain.sum, chain.outputs, a, b);
        }
        groups.erase(groups.begin());
    }
}

template <int REGISTERS>
inline void fence_accumulators(float (&)[REGISTERS]) {}

template <Format FORMAT, int N>
inline void multiply(float (&sum)[N / 2], u64 a, u64 b, int add) {
    EmulatedProducts& products = emulated_products();
    auto& open = products.groups.back();
    if (!open.empty() && open.back().sum == sum && add) {
        open.back().operands.emplace_back(a, b);
        return;
    }
    EmulatedChain chain{sum, FORMAT, N, add && products.makes(sum), std::vector<float>(N / 2, 0.0f), {}};
    if (!chain.continues) {
        if (add) chain.before.assign(sum, sum + N / 2);
        for (float& s : sum) s = NAN;
    }
    chain.operands.emplace_back(a, b);
    open.push_back(std::move(chain));
}
