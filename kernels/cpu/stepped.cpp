// The product of many rows on vectors where inputs have a step for every 32 columns: int8, or two bytes as
// one int16 ("exact"). Two blocks of the weight are unpacked, and the rows of the input pass by, six at a
// time: their sums by 32 outputs stay in registers. The sizes below were measured (LOG.md); parts that fit
// the first or second cache were slower.
#include <algorithm>

#include "linear.h"

#if QL_LEVEL == 3 || QL_LEVEL == 4
namespace ql {

namespace {

constexpr int ROWS = 6;               // that pass together
constexpr int PANEL_BYTES = 512 << 10;  // of unpacked codes,
constexpr int INPUT_BYTES = 2 << 20;  // and of the rows that pass by

// Columns of a pair of blocks. Codes of 32 columns lie together: [e][8][16 rows][4 columns] as bytes, or (WIDE)
// [e][16][16 rows][2 columns] as int16, whose zero-points are taken off where they are whole numbers.
template <bool WIDE>
struct Unpacked {
    static constexpr int STEPS = WIDE ? 16 : 8, BYTES = 64 * STEPS;  // of 32 columns of one block
    static constexpr int MOST = PANEL_BYTES / (2 * BYTES);
    const Matrix& w;
    const int chunks, a_group;
    uint8_t* codes;
    F *scale, *offset;  // [group][e]; offset: what a group's sum of x is multiplied with
    int block = 0, width = 0;  // blocks of the pair
    int from = 0, to = 0;      // chunks whose codes are there

    explicit Unpacked(const Matrix& w)
        : w(w), chunks(w.padded() / CHUNK), a_group(w.groups() == 1 ? chunks : w.group / CHUNK),
          codes(room<uint8_t>(0, PANEL_BYTES)), scale(room<F>(1, w.groups() * 4)),
          offset(scale + w.groups() * 2) {}

    bool has_offset() const { return !WIDE || w.zero == ZERO_OFFSET; }

    void start(int first, int blocks) {
        block = first;
        width = blocks;
        for (int e = 0; e < 2; e++)
            for (int g = 0; g < w.groups(); g++) {
                const F s = w.scale(of(e), g), z = w.zero_of(of(e), g);
                scale[g * 2 + e] = s;
                offset[g * 2 + e] = w.zero == ZERO_OFFSET ? z : -(s * z);
            }
    }

    void take(int first) {
        from = first;
        to = std::min(first + MOST, chunks);
        for (int e = 0; e < 2; e++)
            with_bits(w.bits, [&](auto bits) { unpack<decltype(bits)::value>(of(e), codes + e * BYTES); });
    }

  private:
    int of(int e) const { return block + std::min(e, width - 1); }

    template <class T>
    static T* room(int which, int64_t count) {
        static thread_local Buffer kept[2];
        return kept[which].get<T>(count);
    }

    template <int BITS>
    void unpack(int which, uint8_t* out) const {
        const uint8_t* p = w.block(which) + (int64_t)from * CHUNK * BITS * 2;
        for (int t = from; t < to; t++, p += CHUNK * BITS * 2, out += 2 * BYTES) {
            U8 steps[8];
            unpack_chunk<BITS>(p, steps);
            if constexpr (!WIDE) {
                for (int i = 0; i < 8; i++) store(out + 64 * i, steps[i]);
                continue;
            }
            __m512i zero = _mm512_setzero_si512();
            if (w.zero != ZERO_OFFSET) {
                zero = _mm512_cvtps_epi32((__m512)w.zero_of(which, std::min(t / a_group, w.groups() - 1)));
                zero = _mm512_or_si512(zero, _mm512_slli_epi32(zero, 16));
            }
            for (int i = 0; i < 8; i++)
                for (int half = 0; half < 2; half++) {
                    // Bytes 0 and 1 (or 2 and 3) of every lane, each in 16 bits of its own.
                    const I c = (I)steps[i] >> (16 * half), pair = (c & 0xff) | (c << 8 & 0xff0000);
                    _mm512_store_si512(out + 128 * i + 64 * half, _mm512_sub_epi16((__m512i)pair, zero));
                }
        }
    }
};

// Which of sixteen outputs from n on there are.
inline __mmask16 lanes_of(const Matrix& w, int n) {
    return (__mmask16)((1u << std::min(LANES, w.rows - n)) - 1);
}

template <bool WIDE>
inline __m512i dots(__m512i acc, __m512i w, __m512i x) {
    return WIDE ? _mm512_dpwssd_epi32(acc, w, x) : _mm512_dpbusd_epi32(acc, w, x);
}

// What the columns of the panel add to y[r][e], of row m + r of the input and block e.
template <bool WIDE, int COUNT>
void add_columns(const Unpacked<WIDE>& p, const Input& in, int m, F (&y)[COUNT][2]) {
    constexpr int WIDTH = WIDE ? 64 : 32;  // bytes of 32 columns of a row
    const int64_t blocks = in.blocks(), row = blocks * WIDTH;
    const auto* x = (WIDE ? (const uint8_t*)in.wide : (const uint8_t*)in.q) + m * row + p.from * WIDTH;
    const float* step = in.step + m * blocks;
    const uint8_t* codes = p.codes;
    const F *scale = p.scale + std::min(p.from / p.a_group, p.w.groups() - 1) * 2;
    const F* const last = p.scale + (p.w.groups() - 1) * 2;  // padding goes on in it
    int left = p.a_group - p.from % p.a_group;  // of a group
    for (int t = p.from; t < p.to; t++, x += WIDTH, codes += 2 * p.BYTES) {
        __m512i s[COUNT][2];
        for (auto& pair : s) pair[0] = pair[1] = _mm512_setzero_si512();
#pragma GCC unroll 16
        for (int j = 0; j < p.STEPS; j++) {
            const __m512i w0 = _mm512_load_si512(codes + 64 * j);
            const __m512i w1 = _mm512_load_si512(codes + p.BYTES + 64 * j);
#pragma GCC unroll 6
            for (int r = 0; r < COUNT; r++) {
                int32_t four;
                std::memcpy(&four, x + r * row + 4 * j, 4);
                s[r][0] = dots<WIDE>(s[r][0], w0, _mm512_set1_epi32(four));
                s[r][1] = dots<WIDE>(s[r][1], w1, _mm512_set1_epi32(four));
            }
        }
        for (int r = 0; r < COUNT; r++)
            for (int e = 0; e < 2; e++) y[r][e] += to_float((I)s[r][e]) * (scale[e] * step[r * blocks + t]);
        if (--left > 0 || scale == last) continue;
        left = p.a_group;
        scale += 2;
    }
}

// What zero-points and the bias add; where the input has one, see linear.cpp.
template <bool WIDE, int COUNT>
void finish(const Unpacked<WIDE>& p, const Input& in, int m, const float* bias, F (&y)[COUNT][2]) {
    const int64_t blocks = in.blocks();
    if (p.has_offset()) {
        const float* total = in.total + m * blocks;
        for (int g = 0, t = 0; g < p.w.groups(); g++) {
            float added[COUNT] = {};
            for (const int stop = g + 1 == p.w.groups() ? p.chunks : t + p.a_group; t < stop; t++)
                for (int r = 0; r < COUNT; r++) added[r] += total[r * blocks + t];
            for (int r = 0; r < COUNT; r++)
                for (int e = 0; e < 2; e++) y[r][e] += p.offset[g * 2 + e] * added[r];
        }
    }
    for (int e = 0; e < p.width; e++) {
        const int n = (p.block + e) * LANES;
        if (in.shift) {
            const F row = p.w.scale(p.block + e, 0) * to_float(load<I>(p.w.sums + n));
            for (int r = 0; r < COUNT; r++) y[r][e] += row * (in.step[(m + r) * blocks] * in.shift[m + r]);
        }
        if (!bias) continue;
        const F add = (F)_mm512_maskz_loadu_ps(lanes_of(p.w, n), bias + n);
        for (int r = 0; r < COUNT; r++) y[r][e] += add;
    }
}

template <bool WIDE, int COUNT>
void some_rows(const Unpacked<WIDE>& p, const Input& in, int m, float* y, int64_t stride, const float* bias) {
    F sums[COUNT][2] = {};
    const auto each = [&](auto&& body) {
        for (int e = 0; e < p.width; e++) {
            const int n = (p.block + e) * LANES;
            for (int r = 0; r < COUNT; r++) body(y + (m + r) * stride + n, lanes_of(p.w, n), sums[r][e]);
        }
    };
    if (p.from) each([](float* at, __mmask16 mask, F& v) { v = (F)_mm512_maskz_loadu_ps(mask, at); });
    add_columns<WIDE, COUNT>(p, in, m, sums);
    if (p.to == p.chunks) finish<WIDE, COUNT>(p, in, m, bias, sums);
    each([](float* at, __mmask16 mask, F& v) { _mm512_mask_storeu_ps(at, mask, (__m512)v); });
}

template <bool WIDE>
void all_rows(const Matrix& w, const Input& in, int first, int last, float* y, int64_t stride,
              const float* bias) {
    Unpacked<WIDE> unpacked(w);
    const int together = std::max(4, INPUT_BYTES / (in.padded * (WIDE ? 2 : 1) * ROWS)) * ROWS;
    for (int from = 0; from < in.rows; from += together) {
        const int to = std::min(from + together, in.rows);
        for (int n = first; n < last; n += 2) {
            unpacked.start(n, std::min(2, last - n));
            for (int t = 0; t < unpacked.chunks; t += unpacked.MOST) {
                unpacked.take(t);
                int m = from;
                for (; m + ROWS <= to; m += ROWS) some_rows<WIDE, ROWS>(unpacked, in, m, y, stride, bias);
                for (; m + 2 <= to; m += 2) some_rows<WIDE, 2>(unpacked, in, m, y, stride, bias);
                for (; m < to; m++) some_rows<WIDE, 1>(unpacked, in, m, y, stride, bias);
            }
        }
    }
}

}  // namespace

void multiply_stepped(const Matrix& w, const Input& in, int first, int last, float* y, int64_t y_stride,
                      const float* bias) {
    if (in.wide) all_rows<true>(w, in, first, last, y, y_stride, bias);
    else all_rows<false>(w, in, first, last, y, y_stride, bias);
}

}  // namespace ql
#endif
