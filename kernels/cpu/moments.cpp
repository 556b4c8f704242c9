// total += y^T x over tokens, on tiles: the second moments that GPTQ and AWQ are made of. Factors are
// bfloat16, so that every product is exact in float32, in which they are added up.
#include <algorithm>

#include "input.h"
#include "panels.h"
#include "pool.h"
#include "tile.h"

#if QL_LEVEL >= 4
namespace ql {

namespace {

constexpr int DEEP = 32;   // tokens in a tile
constexpr int WIDE = 18;        // tiles of columns that are worked on together,
constexpr int CHUNK_TILES = 16; // and their tiles of tokens: what the second cache holds with the sums

// Columns of x [tokens][columns] as tiles [column tile][token tile][512]: pairs of tokens side by side,
// [16 pairs][16 columns][2], or turned, [16 columns][16 pairs][2].
struct Tiles {
    const uint16_t* data;
    int64_t along;  // token tiles
    const uint16_t* at(int64_t column_tile, int64_t token_tile) const {
        return data + (column_tile * along + token_tile) * TILE_PAIRS;
    }
};

// A tile of x, plain and turned, where they are wanted.
void convert(const uint16_t* x, int64_t tokens, int64_t columns, int64_t column_tile, int64_t token_tile,
             uint16_t* plain, uint16_t* turned) {
    const int64_t c = column_tile * TILE;
    const __mmask16 mask = c < columns ? (__mmask16)((1u << std::min<int64_t>(TILE, columns - c)) - 1) : 0;
    __m512i pairs[16];
    for (int p = 0; p < 16; p++) {
        __m512i half[2];
        for (int e = 0; e < 2; e++) {
            const int64_t t = token_tile * DEEP + 2 * p + e;
            half[e] = t < tokens && mask ? _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, x + t * columns + c))
                                         : _mm512_setzero_si512();
        }
        pairs[p] = _mm512_or_si512(half[0], _mm512_slli_epi32(half[1], 16));
        if (plain) _mm512_storeu_si512(plain + p * 32, pairs[p]);
    }
    if (!turned) return;
    transpose(pairs);
    for (int i = 0; i < 16; i++) _mm512_storeu_si512(turned + i * 32, pairs[i]);
}

struct Product {
    Tiles y, x;
    int64_t columns, tiles;  // tiles is even: the last one may be padding
    bool triangle;
    float* total;

    // Column tiles i0 and j0 to WIDE after them. Their sums are kept side by side: rows of `total` lie
    // kilobytes apart, and would push each other out of the first cache.
    void block(int64_t i0, int64_t j0) const {
        static thread_local Buffer room;
        auto* sums = room.get<float>(WIDE * WIDE * TILE * TILE);
        for (int64_t first = 0; first < x.along; first += CHUNK_TILES) {
            const int64_t last = std::min<int64_t>(first + CHUNK_TILES, x.along);
            each(i0, j0, [&](int64_t i, int64_t j) { piece(i, j, first, last, sums_of(sums, i - i0, j - j0)); });
        }
        each(i0, j0, [&](int64_t i, int64_t j) { add(i, j, sums_of(sums, i - i0, j - j0)); });
    }

  private:
    static float* sums_of(float* sums, int64_t i, int64_t j) { return sums + (i * WIDE + j * 2) * TILE * TILE; }

    template <class Body>
    void each(int64_t i0, int64_t j0, Body&& body) const {
        for (int64_t i = i0; i < std::min(i0 + WIDE, tiles); i += 2)
            for (int64_t j = triangle ? std::max(i, j0) : j0; j < std::min(j0 + WIDE, tiles); j += 2) body(i, j);
    }

    // The 32 x 32 entries from (i, j) tiles on, over token tiles first to last - 1: four tiles of sums.
    void piece(int64_t i, int64_t j, int64_t first, int64_t last, float* sums) const {
#if QL_LEVEL >= 5
        constexpr int A_TILE = TILE * TILE;
        if (first == 0) {
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
        } else {
            _tile_loadd(0, sums, 64);
            _tile_loadd(1, sums + A_TILE, 64);
            _tile_loadd(2, sums + 2 * A_TILE, 64);
            _tile_loadd(3, sums + 3 * A_TILE, 64);
        }
        for (int64_t t = first; t < last; t++) {
            _tile_loadd(4, y.at(i, t), 64);
            _tile_loadd(6, x.at(j, t), 64);
            _tile_loadd(7, x.at(j + 1, t), 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            _tile_loadd(5, y.at(i + 1, t), 64);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        _tile_stored(0, sums, 64);
        _tile_stored(1, sums + A_TILE, 64);
        _tile_stored(2, sums + 2 * A_TILE, 64);
        _tile_stored(3, sums + 3 * A_TILE, 64);
#else
        const auto bytes = [](const uint16_t* p) { return (const uint8_t*)p; };
        const Panel panel{bytes(y.at(i, first)), bytes(x.at(j, first)), bytes(x.at(j + 1, first)), last - first,
                          TILE_BYTES, TILE_BYTES};
        auto* to = (int32_t*)sums;
        multiply_panels<false>(panel, bytes(y.at(i + 1, first)), first ? to : nullptr, to);
#endif
    }

    void add(int64_t i, int64_t j, const float* sums) const {
        for (int part = 0; part < 4; part++) {
            const int64_t row = (i + part / 2) * TILE, column = (j + part % 2) * TILE;
            if (column >= columns) continue;
            const __mmask16 mask = (__mmask16)((1u << std::min<int64_t>(TILE, columns - column)) - 1);
            for (int64_t r = 0; r < std::min<int64_t>(TILE, columns - row); r++) {
                float* to = total + (row + r) * columns + column;
                const __m512 more = _mm512_loadu_ps(sums + (part * TILE + r) * TILE);
                _mm512_mask_storeu_ps(to, mask, _mm512_add_ps(_mm512_maskz_loadu_ps(mask, to), more));
            }
        }
    }
};

}  // namespace

}  // namespace ql

using namespace ql;

// total [columns][columns] += y^T x with y, x [tokens][columns] bfloat16. With `triangle`, where y is x,
// only what lies right of the diagonal is sure to be added.
extern "C" void ql_add_moment(float* total, const uint16_t* y, const uint16_t* x, int64_t tokens,
                              int64_t columns, int64_t triangle, void* pool) {
    static thread_local Buffer y_room, x_room;
    Pool& threads = *(Pool*)pool;
    const int64_t tiles = (columns + 31) / 32 * 2, along = (tokens + DEEP - 1) / DEEP;
    auto* y_tiles = y_room.get<uint16_t>(tiles * along * TILE_PAIRS);
    auto* x_tiles = x_room.get<uint16_t>(tiles * along * TILE_PAIRS);
    threads.run(tiles * along, 16, [&](int64_t begin, int64_t end, int) {
        for (int64_t at = begin; at < end; at++) {
            const int64_t t = at / tiles, c = at % tiles, to = (c * along + t) * TILE_PAIRS;
            uint16_t *turned = y_tiles + to, *plain = x_tiles + to;
            convert(x, tokens, columns, c, t, plain, y == x ? turned : nullptr);
            if (y != x) convert(y, tokens, columns, c, t, nullptr, turned);
        }
    }, false);
    const Product product{{y_tiles, along}, {x_tiles, along}, columns, tiles, triangle != 0, total};
    const int64_t blocks = (tiles + WIDE - 1) / WIDE;
    threads.run(blocks * blocks, 1, [&](int64_t begin, int64_t end, int) {
        configure_tiles();
        for (int64_t at = begin; at < end; at++) {
            const int64_t i = at / blocks, j = at % blocks;
            if (!product.triangle || j >= i) product.block(i * WIDE, j * WIDE);
        }
        release_tiles();
    }, false);
}
#endif
