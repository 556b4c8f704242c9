// What everything on tiles shares: their shape, and float32 as pairs of bfloat16 parts. With AMX (level 5)
// tiles are registers; below, `panels.h` multiplies the same layouts on vectors.
#pragma once

#include "simd.h"

#if QL_LEVEL >= 3
namespace ql {

constexpr int TILE = 16;        // rows of a tile, 64 bytes each
constexpr int TILE_BYTES = 1024;
constexpr int64_t KEPT_BYTES = 15 << 10;  // of each of two blocks of weight: what L1 keeps of them
constexpr int TILE_PAIRS = 512;  // bfloat16 numbers in one: [16][32], or [16 pairs][16][2]

#if QL_LEVEL >= 5
struct alignas(64) TileConfig {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Eight tiles of 16 rows; `release_tiles` when done.
inline void configure_tiles() {
    static const TileConfig config;
    _tile_loadconfig(&config);
}
inline void release_tiles() { _tile_release(); }
#else
inline void configure_tiles() {}
inline void release_tiles() {}
#endif

#if QL_LEVEL >= 4

// v rounded to bfloat16, as float32.
inline F rounded_to_bf16(F v) {
    const __m256bh rounded = _mm512_cvtneps_pbh((__m512)v);
    return (F)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)rounded), 16);
}

// Two registers of float32 as bfloat16 pairs [16][2], and what the rounding left over (cut off to
// bfloat16; `low` may be null).
inline void put_pairs(const F (&v)[2], uint16_t* high, uint16_t* low) {
    const I upper = I{} + (int32_t)0xffff0000;
    const F top[2] = {rounded_to_bf16(v[0]), rounded_to_bf16(v[1])};
    store(high, (I)_mm512_srli_epi32((__m512i)top[0], 16) | ((I)top[1] & upper));
    if (low)
        store(low, (I)_mm512_srli_epi32((__m512i)(v[0] - top[0]), 16) | ((I)(v[1] - top[1]) & upper));
}

// Sixteen float32 as they lie, in two bfloat16 parts.
inline void put_parts(F v, uint16_t* high, uint16_t* low) {
    const __m256i top = (__m256i)_mm512_cvtneps_pbh((__m512)v);
    _mm256_storeu_si256((__m256i*)high, top);
    if (!low) return;
    const __m512 kept = (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(top), 16);
    _mm256_storeu_si256((__m256i*)low, (__m256i)_mm512_cvtneps_pbh(_mm512_sub_ps((__m512)v, kept)));
}
#endif

}  // namespace ql
#endif
