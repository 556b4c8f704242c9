// The product of many rows on AMX tiles: sums of 16 x 16 outputs, fed by 16 rows of the input and 16 of
// the weight. Four sums are kept at once (32 x 32 outputs), so that every tile loaded is used twice.
#include "linear.h"
#include "piece.h"

#if QL_LEVEL >= 4
#include <algorithm>

namespace ql {

namespace {

// Sixteen rows as bfloat16 tiles [padded / 32][16 pairs of columns][16 rows][2]: the weight itself, and
// with `low` what its rounding left over.
template <int BITS>
void unpack_block(const Matrix& w, int block, uint16_t* high, uint16_t* low) {
    const uint8_t* p = w.block(block);
    const bool offset = w.zero == ZERO_OFFSET;
    F s{}, z{};
    int grid = -1;
    for (int t = 0; t < w.padded() / CHUNK; t++, p += CHUNK * BITS * 2) {
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
                const int at = t * TILE_PAIRS + (2 * i + j / 2) * 32;
                put_pairs(v, high + at, low ? low + at : nullptr);
            }
        }
    }
}

void unpack(const Matrix& w, int block, uint16_t* high, uint16_t* low) {
    with_bits(w.bits, [&](auto bits) { unpack_block<decltype(bits)::value>(w, block, high, low); });
}

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

uint16_t* panel(int64_t count) {
    static thread_local Buffer kept;
    return kept.get<uint16_t>(count);
}

}  // namespace

// Copy the input into the order of tiles; rows behind the last are zero.
void arrange_tiles(Input& in, int mode, Pool& pool) {
    const int64_t tile_rows = (in.rows + TILE - 1) / TILE, whole = tile_rows * TILE;
    const int64_t columns = in.int8 ? 64 : 32, tiles = in.padded / columns;
    if (mode == INT8_BLOCK) return;
    if (in.int8) {
        auto* to = in.tiles_.get<int8_t>(whole * in.padded);
        auto* row_total = in.row_total_.get<float>(in.rows);
        pool.run(whole, TILE, [&](int64_t first, int64_t last, int) {
            for (int64_t m = first; m < last; m++) {
                for (int64_t t = 0; t < tiles; t++) {
                    const __m512i v = m < in.rows ? _mm512_loadu_si512(in.q + m * in.padded + t * 64)
                                                  : _mm512_setzero_si512();
                    _mm512_storeu_si512(to + ((m / TILE * tiles + t) * TILE + m % TILE) * 64, v);
                }
                if (m >= in.rows) continue;
                row_total[m] = 0;
                for (int b = 0; b < in.blocks(); b++) row_total[m] += in.total[m * in.blocks() + b];
            }
        });
        in.q_tiles = to;
        in.row_total = row_total;
        return;
    }
    auto* high = in.high_.get<uint16_t>(whole * in.padded);
    auto* low = mode == EXACT ? in.low_.get<uint16_t>(whole * in.padded) : nullptr;
    pool.run(whole, TILE, [&](int64_t first, int64_t last, int) {
        for (int64_t m = first; m < last; m++)
            for (int64_t k = 0; k < in.padded; k += LANES) {
                const __m512 v = m < in.rows ? _mm512_loadu_ps(in.x + m * in.stride + k) : _mm512_setzero_ps();
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

// With x in two parts ("exact") the weight is in two parts as well, unless it is bfloat16 itself.
void tiles_bf16(const Matrix& w, const Input& in, int first, int last, float* y, int64_t y_stride,
                const float* bias) {
    configure_tiles();
    const bool plain = w.bits == 16, two = in.low != nullptr;
    const int64_t a_block = (int64_t)w.padded() * LANES;
    uint16_t* unpacked = plain ? nullptr : panel(a_block * (two ? 4 : 2));
    const int tiles = w.padded() / CHUNK, m_tiles = (in.rows + TILE - 1) / TILE;
    const int64_t a_row = (int64_t)in.padded * TILE;
    const int m_block = std::max<int>(2, (int)(INPUT_BYTES / (a_row * 2 * (two ? 2 : 1))) & ~1);
    const Target target(w, in, y, y_stride, bias);
    alignas(64) Sums sums;
    for (int m_first = 0; m_first < m_tiles; m_first += m_block)
        for (int n = first; n < last; n += 2) {
            const int width = std::min(2, last - n);
            Piece piece{};
            for (int e = 0; e < 2; e++) {
                const int block = n + std::min(e, width - 1);
                if (plain) {
                    piece.w_high[e] = (const uint16_t*)w.block(block);
                    continue;
                }
                uint16_t *high = unpacked + e * a_block, *low = two ? high + 2 * a_block : nullptr;
                unpack(w, block, high, low);
                piece.w_high[e] = high;
                piece.w_low[e] = low;
            }
            for (int m = m_first; m < std::min(m_first + m_block, m_tiles); m += 2) {
                const int height = std::min(2, m_tiles - m);
                for (int h = 0; h < 2; h++) {
                    const int64_t at = (m + std::min(h, height - 1)) * a_row;
                    piece.x_high[h] = in.high + at;
                    piece.x_low[h] = two ? in.low + at : nullptr;
                }
                piece.run(tiles, sums);
                target.put(m, height, n, width, [&](int part, int row) {
                    return load<F>(sums[(row / TILE) - m][part] + row % TILE * TILE);
                });
            }
        }
    _tile_release();
}

// 8-bit codes with one grid a row meet int8 inputs with one step a row: the sums run through all
// columns, straight from the packed bytes.
void tiles_int8(const Matrix& w, const Input& in, int first, int last, float* y, int64_t y_stride,
                const float* bias) {
    configure_tiles();
    const int64_t a_row = w.padded() / 64 * TILE_BYTES;
    const int m_tiles = (in.rows + TILE - 1) / TILE;
    const int m_block = std::max<int>(2, (int)(INPUT_BYTES / a_row) & ~1);
    const Target target(w, in, y, y_stride, bias);
    alignas(64) int32_t sums[2][2][TILE * TILE];
    for (int m_first = 0; m_first < m_tiles; m_first += m_block)
        for (int n = first; n < last; n += 2) {
            const int width = std::min(2, last - n);
            const uint8_t *b0 = w.block(n), *b1 = w.block(n + width - 1);
            F scale[2], zero[2], row_sum[2];
            for (int e = 0; e < width; e++) {
                scale[e] = w.scale(n + e, 0);
                zero[e] = scale[e] * w.zero_of(n + e, 0);
                row_sum[e] = scale[e] * to_float(load<I>(w.sums + (n + e) * LANES));
            }
            for (int m = m_first; m < std::min(m_first + m_block, m_tiles); m += 2) {
                const int height = std::min(2, m_tiles - m);
                const int8_t *a0 = in.q_tiles + m * a_row, *a1 = a0 + (height - 1) * a_row;
                _tile_zero(0);
                _tile_zero(1);
                _tile_zero(2);
                _tile_zero(3);
                for (int64_t at = 0; at < a_row; at += TILE_BYTES) {
                    _tile_loadd(6, b0 + at, 64);
                    _tile_loadd(7, b1 + at, 64);
                    _tile_loadd(4, a0 + at, 64);
                    _tile_dpbsud(0, 4, 6);
                    _tile_dpbsud(1, 4, 7);
                    _tile_loadd(5, a1 + at, 64);
                    _tile_dpbsud(2, 5, 6);
                    _tile_dpbsud(3, 5, 7);
                }
                _tile_stored(0, sums[0][0], 64);
                _tile_stored(1, sums[0][1], 64);
                _tile_stored(2, sums[1][0], 64);
                _tile_stored(3, sums[1][1], 64);
                target.put(m, height, n, width, [&](int part, int row) {
                    const F dot = to_float(load<I>(sums[row / TILE - m][part] + row % TILE * TILE));
                    const float step = in.step[row * (int64_t)in.blocks()];
                    const F y = scale[part] * (dot * step) - zero[part] * in.row_total[row];
                    return in.shift ? y + row_sum[part] * (step * in.shift[row]) : y;
                });
            }
        }
    _tile_release();
}

}  // namespace ql
#endif
