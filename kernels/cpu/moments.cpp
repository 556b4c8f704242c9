// total += y^T x over tokens, on AMX tiles: the second moments that GPTQ and AWQ are made of. Factors are
// bfloat16, so that every product is exact in float32, in which they are added up.
#include <algorithm>

#include "input.h"
#include "pool.h"
#include "tile.h"

#if QL_LEVEL >= 4
namespace ql {

namespace {

constexpr int DEEP = 32;   // tokens in a tile
constexpr int WIDE = 8;    // tiles of columns that are worked on together, for the second cache
constexpr int CHUNK_TILES = 32;  // and their tiles of tokens

// Columns of x [tokens][columns] as tiles [column tile][token tile][512]: pairs of tokens side by side,
// [16 pairs][16 columns][2], or turned, [16 columns][16 pairs][2].
struct Tiles {
    const uint16_t* data;
    int64_t along;  // token tiles
    const uint16_t* at(int64_t column_tile, int64_t token_tile) const {
        return data + (column_tile * along + token_tile) * TILE_PAIRS;
    }
};

void convert(const uint16_t* x, int64_t tokens, int64_t columns, int64_t column_tile, int64_t token_tile,
             bool turned, uint16_t* to) {
    const int64_t c = column_tile * TILE;
    const __mmask16 mask = (__mmask16)((1u << std::min<int64_t>(TILE, columns - c)) - 1);
    alignas(64) uint32_t pairs[16][16];
    for (int p = 0; p < 16; p++) {
        __m512i half[2];
        for (int e = 0; e < 2; e++) {
            const int64_t t = token_tile * DEEP + 2 * p + e;
            half[e] = t < tokens ? _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, x + t * columns + c))
                                 : _mm512_setzero_si512();
        }
        _mm512_store_si512(pairs[p], _mm512_or_si512(half[0], _mm512_slli_epi32(half[1], 16)));
    }
    if (!turned) {
        std::memcpy(to, pairs, sizeof pairs);
        return;
    }
    const I lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const I down = lane * 16;
    for (int i = 0; i < 16; i++)
        store(to + i * 32, (I)_mm512_i32gather_epi32((__m512i)(down + i), pairs, 4));
}

// The 32 x 32 entries from (i, j) tiles on, over token tiles first to last - 1.
void piece(const Tiles& y, const Tiles& x, int64_t i, int64_t j, int64_t first, int64_t last, float* c,
           int64_t stride) {
    const int64_t row = stride * (int64_t)sizeof(float);
    _tile_loadd(0, c, row);
    _tile_loadd(1, c + TILE, row);
    _tile_loadd(2, c + TILE * stride, row);
    _tile_loadd(3, c + TILE * stride + TILE, row);
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
    _tile_stored(0, c, row);
    _tile_stored(1, c + TILE, row);
    _tile_stored(2, c + TILE * stride, row);
    _tile_stored(3, c + TILE * stride + TILE, row);
}

struct Product {
    Tiles y, x;
    int64_t columns, tiles;  // tiles is even: the last one may be padding
    bool triangle;
    float* total;

    // Column tiles i0 and j0 to WIDE after them.
    void block(int64_t i0, int64_t j0) const {
        alignas(64) float edge[32 * 32];
        for (int64_t first = 0; first < x.along; first += CHUNK_TILES) {
            const int64_t last = std::min<int64_t>(first + CHUNK_TILES, x.along);
            for (int64_t i = i0; i < std::min(i0 + WIDE, tiles); i += 2)
                for (int64_t j = triangle ? std::max(i, j0) : j0; j < std::min(j0 + WIDE, tiles); j += 2) {
                    float* c = total + i * TILE * columns + j * TILE;
                    const int64_t high = std::min<int64_t>(32, columns - i * TILE);
                    const int64_t wide = std::min<int64_t>(32, columns - j * TILE);
                    if (high == 32 && wide == 32) {
                        piece(y, x, i, j, first, last, c, columns);
                        continue;
                    }
                    std::memset(edge, 0, sizeof edge);
                    piece(y, x, i, j, first, last, edge, 32);
                    for (int64_t r = 0; r < high; r++)
                        for (int64_t k = 0; k < wide; k++) c[r * columns + k] += edge[r * 32 + k];
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
            const int64_t c = at / along, t = at % along;
            uint16_t *turned = y_tiles + at * TILE_PAIRS, *plain = x_tiles + at * TILE_PAIRS;
            if (c * TILE >= columns) {
                std::memset(turned, 0, TILE_BYTES);
                std::memset(plain, 0, TILE_BYTES);
                continue;
            }
            convert(y, tokens, columns, c, t, true, turned);
            convert(x, tokens, columns, c, t, false, plain);
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
        _tile_release();
    }, false);
}
#endif
