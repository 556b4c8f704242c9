// Rounding inputs to int8, straight into the order of tiles. The codes are those of quantize.cpp.
#include <algorithm>

#include "linear.h"
#include "tile.h"

#if QL_LEVEL >= 3
namespace ql {

namespace {

constexpr int WIDE = 64;  // columns of a tile

// Sixty-four columns from k on; behind the last one zeros.
inline void fetch(const float* x, int k, int columns, __m512 (&v)[4]) {
    if (k + WIDE <= columns) {
        for (int i = 0; i < 4; i++) v[i] = _mm512_loadu_ps(x + k + i * LANES);
        return;
    }
    for (int i = 0; i < 4; i++) {
        const int there = std::clamp(columns - k - i * LANES, 0, LANES);
        v[i] = _mm512_maskz_loadu_ps((__mmask16)((1u << there) - 1), x + k + i * LANES);
    }
}

// The larger magnitude of both; of a number and what is none, the number.
inline __m512 larger(__m512 a, __m512 b) { return _mm512_range_ps(a, b, 0b1011); }

// The largest |x|, of those below the limit where there is one.
template <bool LIMITED>
float peak_of(const float* x, int columns, float limit) {
    __m512 top[4] = {}, v[4];
    for (int k = 0; k < columns; k += WIDE) {
        fetch(x, k, columns, v);
        for (int i = 0; i < 4; i++) {
            if (LIMITED) {
                const __m512 size = _mm512_abs_ps(v[i]);
                v[i] = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(size, _mm512_set1_ps(limit), _CMP_LT_OQ), size);
            }
            top[i] = larger(top[i], v[i]);
        }
    }
    return _mm512_reduce_max_ps(larger(larger(top[0], top[1]), larger(top[2], top[3])));
}

float peak_of(const float* x, int columns, const How& how) {
    if (how.mode == INT8_OUTLIERS) return peak_of<true>(x, columns, how.threshold);
    const float peak = peak_of<false>(x, columns, 0);
    return peak < INFINITY ? peak : peak_of<true>(x, columns, INFINITY);
}

// x ~ step (code + 128 - zero), code from `bottom` to 127.
struct Grid {
    float step, zero;
    int bottom;
};

// The grid of 0 to 255 that spans the row and zero.
Grid span_of(const float* x, int columns) {
    __m512 low{}, high{}, v[4];
    for (int k = 0; k < columns; k += WIDE) {
        fetch(x, k, columns, v);
        for (int i = 0; i < 4; i++) {
            // The second where one is not a number.
            low = _mm512_min_ps(v[i], low);
            high = _mm512_max_ps(v[i], high);
        }
    }
    const float bottom = _mm512_reduce_min_ps(low), top = _mm512_reduce_max_ps(high);
    const float step = std::max((top - bottom) / 255.f, 1e-12f);
    return {step, std::clamp(std::nearbyint(-bottom / step), 0.f, 255.f), -128};
}

Grid grid_of(const float* x, int columns, const How& how) {
    if (how.mode == INT8_RANGE_ROW) return span_of(x, columns);
    if (how.mode == INT8_GIVEN) return {how.step, how.zero, -128};
    return {std::max(peak_of(x, columns, how), 1e-12f) / 127.f, 128, -127};
}

// round(v / step), as float32 division gives it. A product with 1 / step is off by 1e-4 at most, which
// only matters where it comes near a tie. What lies far outside of a byte may come nearer.
inline void round_all(const __m512 (&v)[4], float step, float inverse, __m512i (&codes)[4]) {
    const __m512 far = _mm512_set1_ps(1000.f), near_tie = _mm512_set1_ps(0.4999f);
    const auto bounded = [&](__m512 q) {
        return _mm512_min_ps(_mm512_max_ps(q, _mm512_sub_ps(_mm512_setzero_ps(), far)), far);
    };
    __m512 off = _mm512_setzero_ps();
    for (int i = 0; i < 4; i++) {
        const __m512 q = bounded(_mm512_mul_ps(v[i], _mm512_set1_ps(inverse)));
        codes[i] = _mm512_cvtps_epi32(q);
        off = larger(off, _mm512_reduce_ps(q, 0));  // what rounding takes away
    }
    if (__builtin_expect(_mm512_cmp_ps_mask(off, near_tie, _CMP_GE_OQ) == 0, 1)) return;
    for (int i = 0; i < 4; i++)
        codes[i] = _mm512_cvtps_epi32(bounded(_mm512_div_ps(v[i], _mm512_set1_ps(step))));
}

// A row into its places, a tile apart; returns the sum of its codes. What lies `ahead` is read next.
int round_row(const float* x, int columns, int padded, const Grid& grid, int64_t ahead, int8_t* to) {
    const __m512i in_order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i zero = _mm512_set1_epi32((int)grid.zero - 128), bottom = _mm512_set1_epi8((char)grid.bottom);
    const float inverse = 1.f / grid.step;
    __m512i total = _mm512_setzero_si512();
    __m512 v[4];
    __m512i codes[4];
    for (int k = 0; k < padded; k += WIDE, to += TILE_BYTES) {
        fetch(x, k, columns, v);
        for (int i = 0; i < 4; i++) _mm_prefetch((const char*)(x + ahead + k + i * LANES), _MM_HINT_T1);
        round_all(v, grid.step, inverse, codes);
        for (auto& c : codes) c = _mm512_add_epi32(c, zero);
        const __m512i bytes = _mm512_packs_epi16(_mm512_packs_epi32(codes[0], codes[1]),
                                                 _mm512_packs_epi32(codes[2], codes[3]));
        // Padding is code 0, also where the zero-point is another.
        const int there = std::min(columns - k, WIDE);
        const __mmask64 mask = there < WIDE ? ((__mmask64)1 << there) - 1 : ~(__mmask64)0;
        const __m512i row = _mm512_maskz_max_epi8(mask, _mm512_permutexvar_epi32(in_order, bytes), bottom);
        _mm512_storeu_si512(to, row);
        total = _mm512_dpbusd_epi32(total, _mm512_set1_epi8(1), row);
    }
    return _mm512_reduce_add_epi32(total);
}

}  // namespace

void quantize_tiles(Input& in, const How& how, Pool& pool) {
    const int64_t whole = (in.rows + TILE - 1) / TILE * TILE, tiles = in.padded / WIDE;
    auto* all = in.tiles_.get<int8_t>(whole * in.padded);
    auto *step = in.row_step_.get<float>(in.rows), *total = in.row_total_.get<float>(in.rows);
    pool.run(whole, TILE, [&](int64_t first, int64_t last, int) {
        for (int64_t m = first; m < last; m++) {
            int8_t* to = all + m / TILE * tiles * TILE_BYTES + m % TILE * WIDE;
            if (m >= in.rows) {
                for (int64_t t = 0; t < tiles; t++) std::memset(to + t * TILE_BYTES, 0, WIDE);
                continue;
            }
            const float* x = in.x + m * in.stride;
            const Grid grid = grid_of(x, in.columns, how);
            int sum = round_row(x, in.columns, in.padded, grid, in.stride, to);
            for (int k : in.outliers) {
                int8_t& code = to[k / WIDE * TILE_BYTES + k % WIDE];
                sum -= code;
                code = 0;
            }
            step[m] = grid.step;
            total[m] = (float)sum * grid.step;
            if (in.shift) const_cast<float*>(in.shift)[m] = 128 - grid.zero;
        }
    });
    in.q_tiles = all;
    in.row_step = step;
    in.row_total = total;
}

}  // namespace ql
#endif
