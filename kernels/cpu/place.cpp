// A weight turned over, its columns put into another order on the way: what stands beside what decides
// how fast it is read.
#include <algorithm>

#include "pool.h"
#include "simd.h"

namespace ql {

namespace {

constexpr int64_t TOGETHER = 64;  // rows: a column of them fills whole lines of the cache

// `height` x `width` numbers, at most sixteen of each, from rows at `from`: column c at out + c * LANES.
void turned(const float* from, int64_t stride, int height, int width, float* out) {
#if QL_LEVEL >= 3
    if (height == LANES && width == LANES) {
        __m512i m[16];
        for (int i = 0; i < LANES; i++) m[i] = _mm512_loadu_si512(from + i * stride);
        transpose(m);
        for (int i = 0; i < LANES; i++) _mm512_store_si512(out + i * LANES, m[i]);
        return;
    }
#endif
    for (int i = 0; i < height; i++)
        for (int c = 0; c < width; c++) out[c * LANES + i] = from[i * stride + c];
}

// piece(first row, rows, first column, columns) over squares of a matrix.
template <class Piece>
void squares(int64_t rows, int64_t columns, Pool& pool, Piece&& piece) {
    pool.run((rows + TOGETHER - 1) / TOGETHER, 1, [&](int64_t begin, int64_t end, int) {
        for (int64_t part = begin; part < end; part++)
            for (int64_t c = 0; c < columns; c += LANES)
                for (int64_t r = part * TOGETHER; r < std::min(rows, (part + 1) * TOGETHER); r += LANES)
                    piece(r, (int)std::min<int64_t>(LANES, rows - r), c, (int)std::min<int64_t>(LANES, columns - c));
    }, false);
}

}  // namespace

}  // namespace ql

using namespace ql;

extern "C" {

// to[places[c]][r] = from[r][c]: from [rows][columns], to [columns][rows].
void ql_turn(const float* from, const int64_t* places, int64_t rows, int64_t columns, float* to, void* pool) {
    squares(rows, columns, *(Pool*)pool, [&](int64_t r, int height, int64_t c, int width) {
        alignas(64) float square[LANES * LANES];
        turned(from + r * columns + c, columns, height, width, square);
        for (int i = 0; i < width; i++)
            std::memcpy(to + places[c + i] * rows + r, square + i * LANES, sizeof(float) * height);
    });
}

// And back: to[r][c] = from[places[c]][r], less offsets[groups[places[c]]][r] where there are offsets.
void ql_turn_back(const float* from, const int64_t* places, const float* offsets, const int64_t* groups,
                  int64_t rows, int64_t columns, float* to, void* pool) {
    squares(rows, columns, *(Pool*)pool, [&](int64_t r, int height, int64_t c, int width) {
        alignas(64) float lines[LANES * LANES], square[LANES * LANES];
        for (int i = 0; i < width; i++) {
            const int64_t place = places[c + i];
            const float* line = from + place * rows + r;
            const float* less = offsets ? offsets + groups[place] * rows + r : nullptr;
            for (int l = 0; l < height; l++) lines[i * LANES + l] = less ? line[l] - less[l] : line[l];
        }
        turned(lines, LANES, width, height, square);
        for (int l = 0; l < height; l++)
            std::memcpy(to + (r + l) * columns + c, square + l * LANES, sizeof(float) * width);
    });
}

}  // extern "C"
