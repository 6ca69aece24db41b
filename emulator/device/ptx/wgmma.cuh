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

// Where the operands of a product are: the first in shared memory, or in registers, which are read when the product is
// made.
struct EmulatedOperands {
    u64 a;
    const u32* registers;  // null where `a` is in shared memory
    u64 b;
};

// Products that add up in one sum, one after the other.
struct EmulatedChain {
    float* sum;
    Format format;
    int outputs;
    bool continues;             // adds to what an earlier group, not waited for yet, will leave in the sum
    std::vector<float> before;  // what it adds to otherwise
    std::vector<EmulatedOperands> operands;
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

// A thread's two rows of an operand in registers: four lanes have a row, a half of whose values is in one register of
// each.
template <Format FORMAT>
inline void emulated_load_registers(const u32* registers, float (&upper)[emulated_values<FORMAT>],
                                    float (&lower)[emulated_values<FORMAT>]) {
    constexpr int EACH = FORMAT == Format::BF16 ? 2 : 4;
    for (int i = 0; i < 4; ++i) {
        const EmulatedWarp words(registers[i]);
        float* row = i % 2 == 0 ? upper : lower;
        for (int lane = 0; lane < 4; ++lane) {
            const u32 word = words.of<u32>(emulated_lane() / 4 * 4 + lane);
            for (int j = 0; j < EACH; ++j)
                row[i / 2 * 4 * EACH + lane * EACH + j] = FORMAT == Format::BF16
                                                              ? __uint_as_float(word >> 16 * j << 16)
                                                              : emulated_from_e4m3(word >> 8 * j & 0xffu);
        }
    }
}

// This thread's part of the sum: two rows, and two columns of every eight.
template <Format FORMAT>
inline void emulated_multiply(float* sum, int outputs, const EmulatedOperands& operands) {
    constexpr int VALUES = emulated_values<FORMAT>;
    const int lane = emulated_lane();
    const int first = (threadIdx.x / 32) % 4 * 16 + lane / 4;
    const u64 b = operands.b;
    float upper[VALUES], lower[VALUES], column[VALUES];
    if (operands.registers != nullptr) {
        emulated_load_registers<FORMAT>(operands.registers, upper, lower);
    } else {
        emulated_load_row<FORMAT>(operands.a, first, upper);
        emulated_load_row<FORMAT>(operands.a, first + 8, lower);
    }
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
            for (const EmulatedOperands& operands : chain.operands) multiply(chain.sum, chain.outputs, operands);
        }
        groups.erase(groups.begin());
    }
}

template <int REGISTERS>
inline void fence_accumulators(float (&)[REGISTERS]) {}
template <int REGISTERS>
inline void fence_operands(u32 (&)[REGISTERS]) {}

inline void emulated_start(float* sum, Format format, int outputs, const EmulatedOperands& operands, int add) {
    EmulatedProducts& products = emulated_products();
    auto& open = products.groups.back();
    if (!open.empty() && open.back().sum == sum && add) {
        open.back().operands.push_back(operands);
        return;
    }
    EmulatedChain chain{sum, format, outputs, add && products.makes(sum), std::vector<float>(outputs / 2, 0.0f), {}};
    if (!chain.continues) {
        if (add) chain.before.assign(sum, sum + outputs / 2);
        for (int i = 0; i < outputs / 2; ++i) sum[i] = NAN;
    }
    chain.operands.push_back(operands);
    open.push_back(std::move(chain));
}

template <Format FORMAT, int N>
inline void multiply(float (&sum)[N / 2], u64 a, u64 b, int add) {
    emulated_start(sum, FORMAT, N, EmulatedOperands{a, nullptr, b}, add);
}

template <Format FORMAT, int N>
inline void multiply_registers(float* sum, const u32* a, u64 b, int add) {
    emulated_start(sum, FORMAT, N, EmulatedOperands{0, a, b}, add);
}
