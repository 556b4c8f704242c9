// A weight at rest.
//
//     w[n][k] = s[n][g] * (value(c[n][k]) - z[n][g])          g = k / group
//
// c are codes of 2 to 8 bits, value(c) = c or an entry of a table of 16 numbers (NF4, FP4, IQ4_NL).
// `zeros` holds z, or with ZERO_OFFSET the finished product o = -s z (ggml's types with a minimum).
// 16 bits means bfloat16 weights, which need no grids.
//
// Sixteen rows lie side by side, so that one register holds the same columns of 16 outputs and no sum
// ever crosses lanes. For codes the unit is a *step*: columns k to k + 3 of 16 rows, a register of 64
// bytes [16 rows][4 columns]. Where codes are narrower than a byte, 8 / bits steps share a register:
// step i sits in bits i * width and up. A code is cut into *planes* of 8, 4, 2 and 1 bits (3 bits are
// 2 + 1, 6 bits 4 + 2); every 32 columns, a plane of width b is b / 4 ... 8 registers:
//
//     codes[rows / 16][columns / 32][planes, widest first][64 bytes * width]
//     scales, zeros[rows / 16][groups][16]
//     bfloat16: codes[rows / 16][columns / 2][16][2]
//
// Rows are padded to 16 and columns to 64 (one AMX tile); padding has code 0 and meets inputs of 0.
#pragma once

#include <cstdint>
#include <type_traits>

#include "simd.h"

namespace ql {

enum Zero : int32_t { ZERO_MIDDLE = 0, ZERO_BYTE = 1, ZERO_OFFSET = 2 };

constexpr int CHUNK = 32;  // columns whose codes lie together
constexpr int COLUMN_PAD = 64;

struct Matrix {
    int32_t rows, columns;
    int32_t bits;
    int32_t group;       // columns a grid; a multiple of 4, or at least the whole row
    int32_t wide_scales; // scales (and offsets) are float32, else float16
    int32_t zero;        // enum Zero
    const uint8_t* codes;
    const void* scales;
    const void* zeros;   // uint8 or as the scales; null for ZERO_MIDDLE
    const float* table;  // 16 values, or null
    const int32_t* sums; // [rows padded]: sum over k of (c - middle), for inputs with a zero-point

    int row_blocks() const { return (rows + LANES - 1) / LANES; }
    int padded() const { return (columns + COLUMN_PAD - 1) / COLUMN_PAD * COLUMN_PAD; }
    int groups() const { return (columns + group - 1) / group; }
    int64_t block_bytes() const {
        return bits == 16 ? (int64_t)padded() * 2 * LANES : (int64_t)padded() / 8 * bits * LANES;
    }
    const uint8_t* block(int index) const { return codes + block_bytes() * index; }

    F scale(int block, int g) const {
        int64_t at = ((int64_t)block * groups() + g) * LANES;
        return wide_scales ? load<F>((const float*)scales + at) : load_half((const uint16_t*)scales + at);
    }
    // z, or for ZERO_OFFSET the offset itself.
    F zero_of(int block, int g) const {
        int64_t at = ((int64_t)block * groups() + g) * LANES;
        if (zero == ZERO_MIDDLE) return splat(table ? 0.f : (float)(1 << (bits - 1)));
        if (zero == ZERO_BYTE) return load_bytes((const uint8_t*)zeros + at);
        return wide_scales ? load<F>((const float*)zeros + at) : load_half((const uint16_t*)zeros + at);
    }
};

// Adds the plane of WIDTH bits at p, its codes shifted left by SHIFT, to the eight steps of a chunk.
template <int WIDTH, int SHIFT, bool FIRST>
inline const uint8_t* add_plane(const uint8_t* p, U8 (&steps)[8]) {
    constexpr int a_register = 8 / WIDTH;
    const U8 mask = splat_byte((uint8_t)(((1 << WIDTH) - 1) << SHIFT));
    for (int i = 0; i < 8; i++) {
        // Shifting 32-bit lanes moves bits across bytes; the mask removes what came over.
        const I packed = load<I>(p + 64 * (i / a_register));
        const int down = i % a_register * WIDTH - SHIFT;
        const U8 part = (U8)(down >= 0 ? packed >> down : packed << -down) & mask;
        steps[i] = FIRST ? part : steps[i] | part;
    }
    return p + 64 * WIDTH;
}

// The eight steps (32 columns) of a chunk of 16 rows, as bytes. BITS is 2 to 8.
template <int BITS>
inline void unpack_chunk(const uint8_t* p, U8 (&steps)[8]) {
    if constexpr (BITS == 8) {
        for (int i = 0; i < 8; i++) steps[i] = load<U8>(p + 64 * i);
        return;
    }
    // Widest plane first; it holds the highest bits.
    if constexpr (BITS & 4) p = add_plane<4, BITS & 3, true>(p, steps);
    if constexpr (BITS & 2) p = add_plane<2, BITS & 1, !(BITS & 4)>(p, steps);
    if constexpr (BITS & 1) add_plane<1, 0, false>(p, steps);
}

// Calls f(std::integral_constant<int, bits>) for the width at hand.
template <class Call>
inline void with_bits(int bits, Call&& f) {
    switch (bits) {
        case 2: f(std::integral_constant<int, 2>{}); break;
        case 3: f(std::integral_constant<int, 3>{}); break;
        case 4: f(std::integral_constant<int, 4>{}); break;
        case 5: f(std::integral_constant<int, 5>{}); break;
        case 6: f(std::integral_constant<int, 6>{}); break;
        case 7: f(std::integral_constant<int, 7>{}); break;
        case 8: f(std::integral_constant<int, 8>{}); break;
    }
}

}  // namespace ql
