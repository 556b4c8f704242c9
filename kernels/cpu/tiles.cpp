// The product of many rows on AMX tiles: sums of 16 x 16 outputs, fed by 16 rows of the input and 16 of
// the weight. Four sums are kept at once (32 x 32 outputs), so that every tile loaded is used twice.
#include "linear.h"

#if QL_LEVEL >= 4
#include <algorithm>

namespace ql {

namespace {

constexpr int TILE = 16;
constexpr int TILE_BYTES = 1024;
constexpr int64_t INPUT_BYTES = 1 << 20;  // of the input that pass by a piece of weight: stays in L2

struct alignas(64) TileConfig {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

void configure() {
    static const TileConfig config;
    _tile_loadconfig(&config);
}

// Two registers of float32 as bfloat16 pairs, and what the rounding left over.
inline void put_pairs(const F (&v)[2], uint16_t* high, uint16_t* low) {
    const I upper = I{} + (int32_t)0xffff0000;
    F top[2];
    for (int e = 0; e < 2; e++) {
        const __m256bh rounded = _mm512_cvtneps_pbh((__m512)v[e]);
        top[e] = (F)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)rounded), 16);
    }
    store(high, (I)_mm512_srli_epi32((__m512i)top[0], 16) | ((I)top[1] & upper));
    if (low)
        store(low, (I)_mm512_srli_epi32((__m512i)(v[0] - top[0]), 16) | ((I)(v[1] - top[1]) & upper));
}

// Sixteen rows as bfloat16 tiles [padded / 32][16 pairs of columns][16 rows][2]. Folded: the weight
// itself, rounded. Otherwise value - z, the grid left for later: whole numbers up to 256, which
// bfloat16 holds exactly; a table's values are split in a high and a low part.
template <int BITS, bool FOLDED>
void unpack_block(const Matrix& w, int block, uint16_t* high, uint16_t* low) {
    const uint8_t* p = w.block(block);
    const bool offset = w.zero == ZERO_OFFSET;
    F s = splat(1.f), z{};
    int grid = -1;
    for (int t = 0; t < w.padded() / CHUNK; t++, p += CHUNK * BITS * 2) {
        U8 steps[8];
        unpack_chunk<BITS>(p, steps);
        for (int i = 0; i < 8; i++) {
            const int g = std::min((t * CHUNK + 4 * i) / w.group, w.groups() - 1);
            if (g != grid) {
                grid = g;
                if (FOLDED) s = w.scale(block, g);
                if (FOLDED || !offset) z = w.zero_of(block, g);
            }
            for (int j = 0; j < 4; j += 2) {
                F v[2];
                for (int e = 0; e < 2; e++) {
                    const I index = byte_of(steps[i], j + e);
                    v[e] = w.table ? look_up(w.table, index) : to_float(index);
                    if (FOLDED) v[e] = offset ? s * v[e] + z : s * (v[e] - z);
                    else v[e] -= z;
                }
                const int at = t * 512 + (2 * i + j / 2) * 32;
                put_pairs(v, high + at, low ? low + at : nullptr);
            }
        }
    }
}

void unpack(const Matrix& w, int block, bool folded, uint16_t* high, uint16_t* low) {
    with_bits(w.bits, [&](auto bits) {
        constexpr int BITS = decltype(bits)::value;
        if (folded) unpack_block<BITS, true>(w, block, high, nullptr);
        else unpack_block<BITS, false>(w, block, high, low);
    });
}

void put(const F* total, int m0, int rows, int block, const Matrix& w, float* y, int64_t stride,
         const float* bias) {
    const int first = block * LANES, count = std::min(LANES, w.rows - first);
    const __mmask16 mask = (__mmask16)((1u << count) - 1);
    const __m512 add = bias ? _mm512_maskz_loadu_ps(mask, bias + first) : _mm512_setzero_ps();
    for (int i = 0; i < TILE && m0 + i < rows; i++)
        _mm512_mask_storeu_ps(y + (m0 + i) * stride + first, mask, _mm512_add_ps((__m512)total[i], add));
}

uint16_t* panel(int64_t count) {
    static thread_local Buffer kept;
    return kept.get<uint16_t>(count);
}

// One 32 x 32 piece: outputs of blocks n and n + 1 (weights high[n], low[n] as tiles) for input tiles
// m and m + 1, of which `height` exist.
struct Piece {
    const Matrix& w;
    const Input& in;
    const uint16_t *high[2], *low[2];
    int block[2];

    void run(int m_tile, int height, F (&total)[4][TILE]) const {
        const int tiles = w.padded() / CHUNK;
        const bool plain = w.bits == 16 || !in.low;  // the grids are in the tiles already
        const int groups = plain ? 1 : w.groups();
        const int a_group = groups == 1 ? tiles : w.group / CHUNK;
        const int64_t a_row = (int64_t)tiles * 512;
        const uint16_t* a_high[2] = {in.high + m_tile * a_row, in.high + (m_tile + height - 1) * a_row};
        const uint16_t* a_low[2] = {nullptr, nullptr};
        if (in.low) {
            a_low[0] = in.low + m_tile * a_row;
            a_low[1] = in.low + (m_tile + height - 1) * a_row;
        }
        alignas(64) float sums[4][TILE * TILE];
        for (int g = 0, t = 0; g < groups; g++) {
            const int start = t, stop = g + 1 == groups ? tiles : t + a_group;
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
            for (; t < stop; t++) {
                _tile_loadd(6, high[0] + t * 512, 64);
                _tile_loadd(7, high[1] + t * 512, 64);
                _tile_loadd(4, a_high[0] + t * 512, 64);
                _tile_dpbf16ps(0, 4, 6);
                _tile_dpbf16ps(1, 4, 7);
                _tile_loadd(5, a_high[1] + t * 512, 64);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
                if (low[0]) {
                    if (in.low) add_low_input(a_low, t);
                    _tile_loadd(6, low[0] + t * 512, 64);
                    _tile_loadd(7, low[1] + t * 512, 64);
                    _tile_loadd(4, a_high[0] + t * 512, 64);
                    _tile_dpbf16ps(0, 4, 6);
                    _tile_dpbf16ps(1, 4, 7);
                    _tile_loadd(5, a_high[1] + t * 512, 64);
                    _tile_dpbf16ps(2, 5, 6);
                    _tile_dpbf16ps(3, 5, 7);
                } else if (in.low) {
                    add_low_input(a_low, t);
                }
            }
            _tile_stored(0, sums[0], 64);
            _tile_stored(1, sums[1], 64);
            _tile_stored(2, sums[2], 64);
            _tile_stored(3, sums[3], 64);
            for (int part = 0; part < 4; part++) {
                const F s = plain ? splat(1.f) : w.scale(block[part & 1], g);
                for (int i = 0; i < TILE; i++) total[part][i] += load<F>(sums[part] + i * TILE) * s;
            }
            if (!plain && w.zero == ZERO_OFFSET) add_offsets(m_tile, start, stop, g, total);
        }
    }

    static void add_low_input(const uint16_t* const (&a_low)[2], int t) {
        _tile_loadd(4, a_low[0] + t * 512, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, a_low[1] + t * 512, 64);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }

    void add_offsets(int m_tile, int start, int stop, int g, F (&total)[4][TILE]) const {
        for (int part = 0; part < 4; part++) {
            const F offset = w.zero_of(block[part & 1], g);
            const int m0 = (m_tile + (part >> 1)) * TILE;
            for (int i = 0; i < TILE && m0 + i < in.rows; i++) {
                float added = 0;
                for (int b = start; b < stop; b++) added += in.total[(int64_t)(m0 + i) * in.blocks() + b];
                total[part][i] += offset * added;
            }
        }
    }
};

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
                const __m256i top = (__m256i)_mm512_cvtneps_pbh(v);
                _mm256_storeu_si256((__m256i*)(high + at), top);
                if (!low) continue;
                const __m512 kept = (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(top), 16);
                _mm256_storeu_si256((__m256i*)(low + at),
                                    (__m256i)_mm512_cvtneps_pbh(_mm512_sub_ps(v, kept)));
            }
    });
    in.high = high;
    in.low = low;
}

// With x in two parts ("exact"):  y = sum_g s_g (tile products of value - z and both parts of x); the
// groups are whole tiles of 32 columns. With one part, the weight is rounded to bfloat16 as well and
// nothing is left to do between tiles.
void tiles_bf16(const Matrix& w, const Input& in, int first, int last, float* y, int64_t y_stride,
                const float* bias) {
    configure();
    const bool plain = w.bits == 16;
    const int64_t a_block = (int64_t)w.padded() * LANES;
    uint16_t* unpacked = plain ? nullptr : panel(a_block * (w.table ? 4 : 2));
    const int m_tiles = (in.rows + TILE - 1) / TILE;
    const int64_t a_tile_row = (int64_t)in.padded * TILE * 2 * (in.low ? 2 : 1);
    const int m_block = std::max<int>(2, (int)(INPUT_BYTES / a_tile_row) & ~1);
    for (int m_first = 0; m_first < m_tiles; m_first += m_block)
        for (int n = first; n < last; n += 2) {
            const int width = std::min(2, last - n);
            Piece piece{w, in, {}, {}, {n, n + width - 1}};
            for (int e = 0; e < 2; e++) {
                if (plain) {
                    piece.high[e] = (const uint16_t*)w.block(piece.block[e]);
                    piece.low[e] = nullptr;
                    continue;
                }
                uint16_t* low = w.table && in.low ? unpacked + (2 + e) * a_block : nullptr;
                unpack(w, piece.block[e], !in.low, unpacked + e * a_block, low);
                piece.high[e] = unpacked + e * a_block;
                piece.low[e] = low;
            }
            for (int m = m_first; m < std::min(m_first + m_block, m_tiles); m += 2) {
                const int height = std::min(2, m_tiles - m);
                F total[4][TILE] = {};
                piece.run(m, height, total);
                for (int part = 0; part < 4; part++)
                    if ((part & 1) < width && (part >> 1) < height)
                        put(total[part], (m + (part >> 1)) * TILE, in.rows, n + (part & 1), w, y,
                            y_stride, bias);
            }
        }
    _tile_release();
}

// 8-bit codes with one grid a row meet int8 inputs with one step a row: the sums run through all
// columns, straight from the packed bytes.
void tiles_int8(const Matrix& w, const Input& in, int first, int last, float* y, int64_t y_stride,
                const float* bias) {
    configure();
    const int64_t tiles = w.padded() / 64, a_row = tiles * TILE_BYTES;
    const int m_tiles = (in.rows + TILE - 1) / TILE;
    const int m_block = std::max<int>(2, (int)(INPUT_BYTES / a_row) & ~1);
    alignas(64) int32_t sums[4][TILE * TILE];
    for (int m_first = 0; m_first < m_tiles; m_first += m_block)
        for (int n = first; n < last; n += 2) {
            const int width = std::min(2, last - n);
            const uint8_t *b0 = w.block(n), *b1 = w.block(n + width - 1);
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
                _tile_stored(0, sums[0], 64);
                _tile_stored(1, sums[1], 64);
                _tile_stored(2, sums[2], 64);
                _tile_stored(3, sums[3], 64);
                for (int part = 0; part < 4; part++) {
                    const int block = n + (part & 1), m0 = (m + (part >> 1)) * TILE;
                    if ((part & 1) >= width || (part >> 1) >= height) continue;
                    const F s = w.scale(block, 0), z = w.zero_of(block, 0);
                    const F row = s * to_float(load<I>(w.sums + block * LANES));
                    F total[TILE] = {};
                    for (int i = 0; i < TILE && m0 + i < in.rows; i++) {
                        const int64_t m1 = m0 + i;
                        const float step = in.step[m1 * in.blocks()];
                        const F dot = to_float(load<I>(sums[part] + i * TILE));
                        total[i] = s * (dot * step - z * in.row_total[m1]);
                        if (in.shift) total[i] += row * (step * in.shift[m1]);
                    }
                    put(total, m0, in.rows, block, w, y, y_stride, bias);
                }
            }
        }
    _tile_release();
}

}  // namespace ql
#endif
