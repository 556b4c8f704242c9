// Products of tiles on vectors, where there are no AMX tiles: the same layouts, so that everything around
// them is the same. Sums of eight rows of the input by two blocks of the weight stay in registers while
// all columns pass by, sixteen lanes wide.
#pragma once

#include "tile.h"

#if QL_LEVEL == 3 || QL_LEVEL == 4
namespace ql {

constexpr int STRIP = 8;  // rows of the input whose sums are in registers
constexpr int SUM_TILE = TILE * TILE;

// acc[l] plus four unsigned bytes of w times four signed ones of x, or two bfloat16 times two.
template <bool INT8>
inline __m512i dots(__m512i acc, __m512i w, __m512i x) {
    if constexpr (INT8) return _mm512_dpbusd_epi32(acc, w, x);
#if QL_LEVEL == 4
    else return (__m512i)_mm512_dpbf16_ps((__m512)acc, (__m512bh)w, (__m512bh)x);
#endif
}

// `count` tiles of the input, and as many of each of two blocks of the weight; in bytes, how far apart.
struct Panel {
    const uint8_t *a, *b0, *b1;
    int64_t count, a_step, b_step;
};

// to[e][row][16], e the block of the weight: the products of the first STRIP rows of the input's tiles, and
// what is in `from`, unless it is null.
template <bool INT8>
__attribute__((always_inline)) inline void multiply_strip(const Panel& p, const int32_t* from, int32_t* to) {
    __m512i s[STRIP][2];
    for (int r = 0; r < STRIP; r++)
        for (int e = 0; e < 2; e++)
            s[r][e] = from ? _mm512_loadu_si512(from + e * SUM_TILE + r * TILE) : _mm512_setzero_si512();
    const uint8_t *a = p.a, *b0 = p.b0, *b1 = p.b1;
    for (int64_t t = 0; t < p.count; t++, a += p.a_step, b0 += p.b_step, b1 += p.b_step) {
#pragma GCC unroll 16
        for (int j = 0; j < 16; j++) {
            const __m512i w0 = _mm512_loadu_si512(b0 + 64 * j), w1 = _mm512_loadu_si512(b1 + 64 * j);
#pragma GCC unroll 8
            for (int r = 0; r < STRIP; r++) {
                int32_t four;
                std::memcpy(&four, a + 64 * r + 4 * j, 4);
                const __m512i x = _mm512_set1_epi32(four);
                s[r][0] = dots<INT8>(s[r][0], w0, x);
                s[r][1] = dots<INT8>(s[r][1], w1, x);
            }
        }
    }
    for (int r = 0; r < STRIP; r++)
        for (int e = 0; e < 2; e++) _mm512_storeu_si512(to + e * SUM_TILE + r * TILE, s[r][e]);
}

// All sixteen rows of the input's tiles: to[e][16][16]. `from` may be where `to` is.
template <bool INT8>
inline void multiply_panel(Panel p, const int32_t* from, int32_t* to) {
    constexpr int HALF = STRIP * TILE;
    multiply_strip<INT8>(p, from, to);
    p.a += 64 * STRIP;
    multiply_strip<INT8>(p, from ? from + HALF : nullptr, to + HALF);
}

// A product of 32 rows and two blocks, as four tiles of AMX hold it: to[2][e][16][16].
template <bool INT8>
inline void multiply_panels(const Panel& p, const uint8_t* a1, const int32_t* from, int32_t* to) {
    constexpr int HALF = 2 * SUM_TILE;
    multiply_panel<INT8>(p, from, to);
    multiply_panel<INT8>({a1, p.b0, p.b1, p.count, p.a_step, p.b_step}, from ? from + HALF : nullptr, to + HALF);
}

}  // namespace ql
#endif
