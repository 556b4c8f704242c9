// bfloat16 on tiles: the weight as it is, or made into tiles from codes of any width, times inputs in one
// part or ("exact") two.
#include "linear.h"
#include "tile_loop.h"

#if QL_LEVEL >= 4
namespace ql {

namespace {

// Chunks `from` to `to` - 1 of sixteen rows as bfloat16 tiles [chunks][16 pairs of columns][16 rows][2]: the weight itself, and
// with `low` what its rounding left over.
template <int BITS>
void unpack_block(const Matrix& w, int block, int from, int to, uint16_t* high, uint16_t* low) {
    const uint8_t* p = w.block(block) + (int64_t)from * CHUNK * BITS * 2;
    const bool offset = w.zero == ZERO_OFFSET;
    F s{}, z{};
    int grid = -1;
    for (int t = from; t < to; t++, p += CHUNK * BITS * 2) {
        U8 steps[8];
        unpack_chunk<BITS>(p, steps);
        for (int i = 0; i < 8; i++) {
            const int g = std::min((t * CHUNK + 4 * i) / w.group, w.groups() - 1);
            if (g != grid) {
                grid = g;
                s = w.scale(block, g);
                z = w.zero_of(block, g);
            }
            for (int j = 0; j < 4; j += 2) {
                F v[2];
                for (int e = 0; e < 2; e++) {
                    const I index = byte_of(steps[i], j + e);
                    v[e] = w.table ? look_up(w.table, index) : to_float(index);
                    v[e] = offset ? s * v[e] + z : s * (v[e] - z);
                }
                const int at = (t - from) * TILE_PAIRS + (2 * i + j / 2) * 32;
                put_pairs(v, high + at, low ? low + at : nullptr);
            }
        }
    }
}

void unpack(const Matrix& w, int block, int from, int to, uint16_t* high, uint16_t* low) {
    with_bits(w.bits, [&](auto bits) { unpack_block<decltype(bits)::value>(w, block, from, to, high, low); });
}

uint16_t* panel(int64_t count) {
    static thread_local Buffer kept;
    return kept.get<uint16_t>(count);
}

#if QL_LEVEL >= 5
// Where the outputs of one or two blocks go. Large outputs pass the caches by: they would push the
// input out of them, which is read again for every pair of blocks.
class Target {
  public:
    Target(const Matrix& w, const Input& in, float* y, int64_t stride, const float* bias)
        : rows_(w.rows), inputs_(in.rows), y_(y), stride_(stride), bias_(bias) {
        const bool aligned = (uintptr_t)y % 64 == 0 && stride % LANES == 0;
        stream_ = aligned && (int64_t)in.rows * stride * 4 > LARGE;
    }
    ~Target() { _mm_sfence(); }

    // line(part, row) is what comes for row `row` of the input and block n + part.
    template <class Line>
    void put(int m_tile, int height, int n, int width, Line&& line) const {
        const int first = m_tile * TILE, last = std::min(inputs_, first + height * TILE);
        for (int part = 0; part < width; part++) {
            const int at = (n + part) * LANES, count = std::min(LANES, rows_ - at);
            const __mmask16 mask = (__mmask16)((1u << count) - 1);
            const __m512 add = bias_ ? _mm512_maskz_loadu_ps(mask, bias_ + at) : _mm512_setzero_ps();
            for (int m = first; m < last; m++) {
                const __m512 v = _mm512_add_ps((__m512)line(part, m), add);
                float* to = y_ + m * stride_ + at;
                if (count < LANES) _mm512_mask_storeu_ps(to, mask, v);
                else if (stream_) _mm512_stream_ps(to, v);
                else _mm512_storeu_ps(to, v);
            }
        }
    }

  private:
    static constexpr int64_t LARGE = 1 << 20;
    const int rows_, inputs_;
    float* const y_;
    const int64_t stride_;
    const float* const bias_;
    bool stream_;
};

// The sums of a 32 x 32 piece: row i of input tile h and block e at [h][e][i * 16].
using Sums = float[2][2][TILE * TILE];

// Products of both parts of the input and of the weight but that of both second parts.
struct Parts {
    const uint16_t *w_high[2], *w_low[2], *x_high[2], *x_low[2];

    void run(int tiles, Sums& sums) const {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        // What the first cache keeps of the weight's parts; see tile_loop.h.
        const int64_t end = (int64_t)tiles * TILE_PAIRS, part = KEPT_BYTES / 2 / (w_low[0] ? 2 : 1);
        const int64_t kept = std::min(end, part / TILE_PAIRS * TILE_PAIRS);
        steps<true>(0, kept);
        steps<false>(kept, end);
        _tile_stored(0, sums[0][0], 64);
        _tile_stored(1, sums[0][1], 64);
        _tile_stored(2, sums[1][0], 64);
        _tile_stored(3, sums[1][1], 64);
    }

  private:
    template <bool KEPT>
    void steps(int64_t first, int64_t last) const {
        for (int64_t at = first; at < last; at += TILE_PAIRS) {
            meet<KEPT>(x_high, w_high, at);
            meet<KEPT>(x_low, w_high, at);
            if (w_low[0]) meet<KEPT>(x_high, w_low, at);
        }
    }

    template <bool KEPT>
    static void meet(const uint16_t* const (&x)[2], const uint16_t* const (&w)[2], int64_t at) {
        _tile_stream_loadd(4, x[0] + at, 64);
        _tile_stream_loadd(5, x[1] + at, 64);
        if constexpr (KEPT) _tile_loadd(6, w[0] + at, 64);
        else _tile_stream_loadd(6, w[0] + at, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(2, 5, 6);
        if constexpr (KEPT) _tile_loadd(7, w[1] + at, 64);
        else _tile_stream_loadd(7, w[1] + at, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
    }
};
#endif

}  // namespace

void arrange_tiles(Input& in, bool two, Pool& pool) {
    const int64_t whole = (in.rows + TILE - 1) / TILE * TILE, tiles = in.padded / 32;
    auto* high = in.high_.get<uint16_t>(whole * in.padded);
    auto* low = two ? in.low_.get<uint16_t>(whole * in.padded) : nullptr;
    pool.run(whole, TILE, [&](int64_t first, int64_t last, int) {
        for (int64_t m = first; m < last; m++)
            for (int64_t k = 0; k < in.padded; k += LANES) {
                const int64_t there = m < in.rows ? std::clamp<int64_t>(in.columns - k, 0, LANES) : 0;
                const __m512 v = _mm512_maskz_loadu_ps((__mmask16)((1u << there) - 1), in.x + m * in.stride + k);
                const int64_t at = ((m / TILE * tiles + k / 32) * TILE + m % TILE) * 32 + k % 32;
                put_parts((F)v, high + at, low ? low + at : nullptr);
            }
    });
    in.high = high;
    in.low = low;
}

void take_bf16(Input& in, const uint16_t* x, int rows, int columns, Pool& pool) {
    in.rows = rows;
    in.columns = columns;
    in.padded = (columns + COLUMN_PAD - 1) / COLUMN_PAD * COLUMN_PAD;
    in.x = nullptr;
    in.int8 = false;
    in.outliers.clear();
    in.q = in.q_low = in.q_tiles = nullptr;
    in.wide = nullptr;
    in.shift = nullptr;
    in.low = nullptr;
    const int64_t whole = (rows + TILE - 1) / TILE * TILE, tiles = in.padded / 32;
    auto* high = in.high_.get<uint16_t>(whole * in.padded);
    pool.run(whole, TILE, [&](int64_t first, int64_t last, int) {
        for (int64_t m = first; m < last; m++)
            for (int64_t t = 0; t < tiles; t++) {
                const int64_t there = m < rows ? std::clamp<int64_t>(columns - t * 32, 0, 32) : 0;
                const __mmask32 mask = (__mmask32)((1ull << there) - 1);
                const __m512i v = _mm512_maskz_loadu_epi16(mask, x + m * columns + t * 32);
                _mm512_storeu_si512(high + ((m / TILE * tiles + t) * TILE + m % TILE) * 32, v);
            }
    });
    in.high = high;
}

namespace {

struct Meaning {
    struct Columns {};
    void read(int, int, Columns&) const {}
    inline F outputs(const int32_t* sums, int, int, const Columns&) const { return load<F>((const float*)sums); }
};

void one_part(const Matrix& w, const Input& in, int first, int last, float* y, int64_t y_stride,
              const float* bias) {
    Writer<Meaning> writer({}, w.rows, in.rows, y, y_stride, bias);
    const int64_t row = (int64_t)w.padded() * LANES;
    const Sides sides{(const uint8_t*)in.high, 2 * row, (in.rows + TILE - 1) / TILE, first, last};
    if (w.bits == 16) {
        const auto there = [&](int n, int64_t k, int64_t) { return pair_of(w, n, last, k); };
        return multiply_tiles<false>(sides, there, writer);
    }
    uint16_t* unpacked = panel(2 * row);
    const auto make = [&](int n, int64_t k, int64_t bytes) {
        const int from = (int)(k / TILE_BYTES), to = from + (int)(bytes / TILE_BYTES);
        for (int e = 0; e < std::min(2, last - n); e++) unpack(w, n + e, from, to, unpacked + e * row, nullptr);
        return Pair{(const uint8_t*)unpacked, (const uint8_t*)(n + 1 < last ? unpacked + row : unpacked), 0};
    };
    multiply_tiles<false>(sides, make, writer);
}

#if QL_LEVEL >= 5
// The weight is in two parts as well, unless it is bfloat16 itself.
void two_parts(const Matrix& w, const Input& in, int first, int last, float* y, int64_t y_stride,
               const float* bias) {
    const bool plain = w.bits == 16;
    const int64_t a_block = (int64_t)w.padded() * LANES;
    uint16_t* unpacked = plain ? nullptr : panel(a_block * 4);
    const int tiles = w.padded() / CHUNK, m_tiles = (in.rows + TILE - 1) / TILE;
    const int64_t a_row = (int64_t)in.padded * TILE;
    const int m_block = std::max<int>(2, (int)(INPUT_BYTES / (a_row * 4)) & ~1);
    const Target target(w, in, y, y_stride, bias);
    alignas(64) Sums sums;
    for (int m_first = 0; m_first < m_tiles; m_first += m_block)
        for (int n = first; n < last; n += 2) {
            const int width = std::min(2, last - n);
            Parts parts{};
            for (int e = 0; e < 2; e++) {
                const int block = n + std::min(e, width - 1);
                if (plain) {
                    parts.w_high[e] = (const uint16_t*)w.block(block);
                    continue;
                }
                uint16_t *high = unpacked + e * a_block, *low = high + 2 * a_block;
                unpack(w, block, 0, tiles, high, low);
                parts.w_high[e] = high;
                parts.w_low[e] = low;
            }
            for (int m = m_first; m < std::min(m_first + m_block, m_tiles); m += 2) {
                const int height = std::min(2, m_tiles - m);
                for (int h = 0; h < 2; h++) {
                    const int64_t at = (m + std::min(h, height - 1)) * a_row;
                    parts.x_high[h] = in.high + at;
                    parts.x_low[h] = in.low + at;
                }
                parts.run(tiles, sums);
                target.put(m, height, n, width, [&](int part, int row) {
                    return load<F>(sums[(row / TILE) - m][part] + row % TILE * TILE);
                });
            }
        }
}
#endif

}  // namespace

void tiles_bf16(const Matrix& w, const Input& in, int first, int last, float* y, int64_t y_stride,
                const float* bias) {
    configure_tiles();
#if QL_LEVEL >= 5
    if (in.low) two_parts(w, in, first, last, y, y_stride, bias);
    else
#endif
        one_part(w, in, first, last, y, y_stride, bias);
    release_tiles();
}

}  // namespace ql
#endif
