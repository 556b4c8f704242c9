// 32 x 32 outputs of a product on AMX tiles.
#pragma once

#include "tile.h"

#if QL_LEVEL >= 4
namespace ql {

constexpr int64_t INPUT_BYTES = 1 << 20;  // of the input that pass by a piece of weight: stays in L2

// The sums of a 32 x 32 piece: row i of input tile h and block e at [h][e][i * 16].
using Sums = float[2][2][TILE * TILE];

// Products of both parts of the input and of the weight but that of both second parts.
struct Piece {
    const uint16_t *w_high[2], *w_low[2], *x_high[2], *x_low[2];

    void run(int tiles, Sums& sums) const {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t at = 0; at < (int64_t)tiles * TILE_PAIRS; at += TILE_PAIRS) {
            _tile_loadd(6, w_high[0] + at, 64);
            _tile_loadd(7, w_high[1] + at, 64);
            meet(x_high, at);
            if (!x_low[0]) continue;
            meet(x_low, at);
            if (!w_low[0]) continue;
            _tile_loadd(6, w_low[0] + at, 64);
            _tile_loadd(7, w_low[1] + at, 64);
            meet(x_high, at);
        }
        _tile_stored(0, sums[0][0], 64);
        _tile_stored(1, sums[0][1], 64);
        _tile_stored(2, sums[1][0], 64);
        _tile_stored(3, sums[1][1], 64);
    }

  private:
    static void meet(const uint16_t* const (&x)[2], int64_t at) {
        _tile_loadd(4, x[0] + at, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, x[1] + at, 64);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
};

}  // namespace ql
#endif
