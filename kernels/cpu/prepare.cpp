// How inputs enter the products.
#include <algorithm>

#include "linear.h"

namespace ql {

namespace {

// The sum of every block of 32 columns.
void add_up(const float* x, int columns, float* totals, int64_t blocks) {
    for (int64_t b = 0; b < blocks; b++) {
        const int first = (int)b * CHUNK, count = std::min(CHUNK, columns - first);
        if (count == CHUNK) {
            totals[b] = sum(load<F>(x + first) + load<F>(x + first + LANES));
            continue;
        }
        totals[b] = 0;
        for (int k = 0; k < count; k++) totals[b] += x[first + k];
    }
}

// x padded with zeros to whole blocks of 32 columns, which the product on vectors reads, and their sums.
void take_floats(Input& in, Pool& pool) {
    const int64_t blocks = in.blocks();
    const float* x = in.x;
    const int64_t stride = in.stride;
    const bool pad = in.columns < in.padded;
    float* copy = pad ? in.padded_.get<float>((int64_t)in.rows * in.padded) : nullptr;
    auto* total = in.total_.get<float>(in.rows * blocks);
    pool.run(in.rows, 4, [&](int64_t first, int64_t last, int) {
        for (int64_t m = first; m < last; m++) {
            add_up(x + m * stride, in.columns, total + m * blocks, blocks);
            if (!pad) continue;
            std::memcpy(copy + m * in.padded, x + m * stride, sizeof(float) * in.columns);
            std::memset(copy + m * in.padded + in.columns, 0, sizeof(float) * (in.padded - in.columns));
        }
    });
    in.total = total;
    if (!pad) return;
    in.x = copy;
    in.stride = in.padded;
}

}  // namespace

int mode_for(int mode, int rows, bool table, int bits) {
    const bool tiles = QL_LEVEL >= 4 && rows >= (bits == 16 ? TILE_FROM : CODES_FROM);
    const bool stepped = STEPPED && bits != 16 && !table;
    if (mode == INT8_ROW || mode == INT8_GIVEN || mode > BF16) return mode;
    if (bits == 16 || table) return tiles && mode != EXACT ? BF16 : EXACT;
    if (mode == INT8_BLOCK) return tiles && !stepped ? BF16 : INT8_BLOCK;
    return mode == BF16 && !tiles ? EXACT : mode;
}

bool on_tiles(const Matrix& w, const How& how, int rows) {
    if (how.mode == EXACT) return QL_LEVEL >= 5 && rows >= TILE_FROM;
    if (how.mode == BF16) return QL_LEVEL >= 4;
    if (QL_LEVEL < 3 || rows < TILE_FROM || how.mode == INT8_BLOCK) return false;
    return w.bits == 8 && w.groups() == 1 && w.zero != ZERO_OFFSET;
}

void prepare(Input& in, const float* x, int rows, int columns, int64_t stride, How how, bool tiles,
             Pool& pool) {
    in.rows = rows;
    in.columns = columns;
    in.padded = (columns + COLUMN_PAD - 1) / COLUMN_PAD * COLUMN_PAD;
    in.x = x;
    in.stride = stride;
    in.int8 = how.int8();
    in.outliers.clear();
    in.shift = in.step = in.total = in.row_step = in.row_total = nullptr;
    in.high = in.low = nullptr;
    in.q = in.q_low = in.q_tiles = nullptr;
    in.wide = nullptr;
    if (how.has_zero()) in.shift = in.shift_.get<float>(rows);
    if (how.mode == INT8_RANGE) how = range_of_all(in);
    if (how.mode == INT8_OUTLIERS) find_outliers(in, how.threshold);
#if QL_LEVEL >= 3
    if (tiles && in.int8) return quantize_tiles(in, how, pool);
#endif
#if QL_LEVEL >= 4
    if (tiles) return arrange_tiles(in, how.mode == EXACT, pool);
#endif
    (void)tiles;
    if (!in.int8) take_floats(in, pool);
    if (!in.int8 && how.mode != EXACT) return;
    const int64_t size = (int64_t)rows * in.padded;
    if (!in.int8 && STEPPED && rows >= STEPPED_FROM) {
        in.wide = in.wide_.get<int16_t>(size);
    } else {
        in.q = in.q_.get<int8_t>(size);
        if (!in.int8) in.q_low = in.q_low_.get<int8_t>(size);
    }
    in.step = in.step_.get<float>((int64_t)rows * in.blocks());
    in.total = in.total_.get<float>((int64_t)rows * in.blocks());
    pool.run(rows, 4, [&](int64_t first, int64_t last, int) {
        if (in.int8) quantize(in, how, (int)first, (int)last);
        else quantize_exact(in, (int)first, (int)last);
    });
}

}  // namespace ql
