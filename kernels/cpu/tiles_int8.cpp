// Bytes times bytes on tiles: 8-bit codes with one grid a row meet int8 inputs with one step a row, so
// that the sums run through all columns, straight from the packed codes.
#include "linear.h"
#include "tile_loop.h"

#if QL_LEVEL >= 3
namespace ql {

namespace {

// y = s (step dot - z total), and s step shift sum_k w where the input has a zero-point.
struct Meaning {
    const Matrix& w;
    const Input& in;

    struct Columns {
        F scale[2], zero[2], sum[2];
    };

    void read(int block, int e, Columns& c) const {
        c.scale[e] = w.scale(block, 0);
        c.zero[e] = c.scale[e] * w.zero_of(block, 0);
        c.sum[e] = c.scale[e] * to_float(load<I>(w.sums + block * LANES));
    }
    inline F outputs(const int32_t* dots, int m, int e, const Columns& c) const {
        const float step = in.row_step[m];
        const F v = c.scale[e] * (to_float(load<I>(dots)) * step) - c.zero[e] * in.row_total[m];
        return in.shift ? v + c.sum[e] * (step * in.shift[m]) : v;
    }
};

}  // namespace

void tiles_int8(const Matrix& w, const Input& in, int first, int last, float* y, int64_t y_stride,
                const float* bias) {
    configure_tiles();
    Writer<Meaning> writer({w, in}, w.rows, in.rows, y, y_stride, bias);
    const Sides sides{(const uint8_t*)in.q_tiles, w.block_bytes(), (in.rows + TILE - 1) / TILE, first, last};
    multiply_tiles<true>(sides, [&](int n, int64_t k, int64_t) { return pair_of(w, n, last, k); }, writer);
    release_tiles();
}

}  // namespace ql
#endif
