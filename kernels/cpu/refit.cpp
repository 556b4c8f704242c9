// What the scales of fixed codes are solved from, on tiles: for every row of a weight the products of
// its groups of codes with each other and with the weight, under the inputs' second moment.
#include <algorithm>

#include "input.h"
#include "panels.h"
#include "pool.h"
#include "tile.h"

#if QL_LEVEL >= 4
namespace ql {

namespace {

constexpr int DEEP = 32;   // columns that meet in a tile
constexpr int PARTS = 3;   // bfloat16 parts of a float32, which hold all of its 24 bits
constexpr int STRIPS = 4;  // of sixteen rows, that meet the same tiles of M
constexpr int64_t SLAB_BYTES = 1 << 24;  // of M that are cut into parts at one time

struct Codes {
    const float *weight, *codes, *zeros, *moment;
    int64_t rows, columns, groups, size;

    int64_t first(int64_t g) const { return g * size; }
    int64_t last(int64_t g) const { return std::min(columns, (g + 1) * size); }
    int64_t deep() const { return (std::min(size, columns) + DEEP - 1) / DEEP; }  // tiles of a group
    int64_t tiles() const { return (columns + DEEP - 1) / DEEP * 2; }             // of M's rows, even
    int64_t a_tile_row() const { return deep() * PARTS * TILE_PAIRS; }
    int64_t a_group() const { return tiles() * a_tile_row(); }
};

// M[16 rows from tile j][columns of group g], as tiles [part][deep]; M is symmetric.
void cut(const Codes& c, int64_t g, int64_t j, uint16_t* to) {
    const int64_t deep = c.deep();
    for (int64_t k = 0; k < deep * DEEP; k += LANES) {
        const int64_t at = c.first(g) + k, there = std::clamp<int64_t>(c.last(g) - at, 0, LANES);
        const __mmask16 mask = (__mmask16)((1u << there) - 1);
        for (int i = 0; i < TILE; i++) {
            const int64_t row = j * TILE + i;
            __m512 v = row < c.columns && there ? _mm512_maskz_loadu_ps(mask, c.moment + row * c.columns + at)
                                                : _mm512_setzero_ps();
            for (int part = 0; part < PARTS; part++) {
                const F high = rounded_to_bf16((F)v);
                uint16_t* tile = to + (part * deep + k / DEEP) * TILE_PAIRS;
                put_parts((F)v, tile + i * 32 + k % DEEP, nullptr);
                v = (__m512)((F)v - high);
            }
        }
    }
}

// Rows of [rows][columns], sixteen columns from k on, side by side: lane l of out[i] is row l, column k + i.
void side_by_side(const float* from, int64_t columns, int64_t k, int rows, __m512i (&out)[16]) {
    const int64_t there = std::min<int64_t>(TILE, columns - k);
    const __mmask16 mask = (__mmask16)((1u << there) - 1);
    for (int l = 0; l < 16; l++)
        out[l] = l < rows ? _mm512_maskz_loadu_epi32(mask, from + l * columns + k) : _mm512_setzero_si512();
    transpose(out);
}

// Up to 64 rows: what they are made of, [columns][strip][16 rows], and the codes of a group as tiles.
class Rows {
  public:
    Rows(const Codes& c, int64_t first) : c_(c), first_(first) {
        const int64_t padded = c.tiles() * TILE;
        values_ = room(0, padded * STRIPS);
        weight_ = room(1, padded * STRIPS);
        sums_ = room(2, (c.groups + 1) * STRIPS);
        pairs_ = (uint16_t*)room(3, c.deep() * STRIPS * TILE);
        for (int s = 0; s < STRIPS; s++) {
            const int64_t row = first + s * TILE;
            const int count = (int)std::clamp<int64_t>(c.rows - row, 0, TILE);
            for (int64_t k = 0; k < padded; k += TILE) {
                __m512i codes[16] = {}, weights[16] = {};
                if (count && k < c.columns) {
                    side_by_side(c.codes + row * c.columns, c.columns, k, count, codes);
                    side_by_side(c.weight + row * c.columns, c.columns, k, count, weights);
                }
                for (int i = 0; i < TILE; i++) {
                    const bool there = k + i < c.columns;
                    const int64_t g = there ? (k + i) / c.size : 0;
                    if (there && (i == 0 || (k + i) % c.size == 0))
                        for (int l = 0; l < count; l++) zero_[l] = c.zeros[(row + l) * c.groups + g];
                    const F v = there ? (F)codes[i] - zero_ : F{};
                    values_[(k + i) * STRIPS + s] = v;
                    weight_[(k + i) * STRIPS + s] = (F)weights[i];
                }
            }
        }
    }

    // system [rows][groups][groups] and right [rows][groups], of group g with those from g on; `m` are its
    // tiles.
    void group(int64_t g, const uint16_t* m, float* system, float* right) {
        const int64_t deep = c_.deep();
        for (int64_t k = 0; k < deep * DEEP; k += 2)
            for (int s = 0; s < STRIPS; s++) {
                F v[2];
                for (int e = 0; e < 2; e++) {
                    const int64_t at = c_.first(g) + k + e;
                    v[e] = at < c_.last(g) ? values_[at * STRIPS + s] : F{};
                }
                put_pairs(v, pairs_ + (s * deep + k / DEEP) * TILE_PAIRS + k % DEEP / 2 * 32, nullptr);
            }
        std::fill(sums_, sums_ + (c_.groups + 1) * STRIPS, F{});
        for (int64_t j = 0; j < c_.tiles(); j += 2)
            for (int s = 0; s < STRIPS; s += 2) meet(g, m + j * c_.a_tile_row(), j, s);
        for (int s = 0; s < STRIPS; s++)
            for (int l = 0; l < TILE && first_ + s * TILE + l < c_.rows; l++) {
                const int64_t row = first_ + s * TILE + l;
                float* matrix = system + row * c_.groups * c_.groups;
                for (int64_t h = g; h < c_.groups; h++)
                    matrix[g * c_.groups + h] = matrix[h * c_.groups + g] = sums_[h * STRIPS + s][l];
                right[row * c_.groups + g] = sums_[c_.groups * STRIPS + s][l];
            }
    }

  private:
    static F* room(int which, int64_t count) {
        static thread_local Buffer kept[4];
        return kept[which].get<F>(count);
    }

    // Thirty-two rows of M from tile j on meet the codes of strips s and s + 1.
    void meet(int64_t g, const uint16_t* m, int64_t j, int s) {
        alignas(64) F product[4][TILE];
        const int64_t deep = c_.deep();
        const uint16_t *m0 = m, *m1 = m + c_.a_tile_row();
        const uint16_t *v0 = pairs_ + s * deep * TILE_PAIRS, *v1 = v0 + deep * TILE_PAIRS;
#if QL_LEVEL >= 5
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t t = 0; t < PARTS * deep; t++) {
            _tile_loadd(4, m0 + t * TILE_PAIRS, 64);
            _tile_loadd(6, v0 + t % deep * TILE_PAIRS, 64);
            _tile_loadd(7, v1 + t % deep * TILE_PAIRS, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            _tile_loadd(5, m1 + t * TILE_PAIRS, 64);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        _tile_stored(0, product[0], 64);
        _tile_stored(1, product[1], 64);
        _tile_stored(2, product[2], 64);
        _tile_stored(3, product[3], 64);
#else
        auto* to = (int32_t*)product;
        for (int64_t part = 0; part < PARTS; part++) {
            const int64_t at = part * deep * TILE_PAIRS;
            const Panel panel{(const uint8_t*)(m0 + at), (const uint8_t*)v0, (const uint8_t*)v1, deep, TILE_BYTES,
                              TILE_BYTES};
            multiply_panels<false>(panel, (const uint8_t*)(m1 + at), part ? to : nullptr, to);
        }
#endif
        F* right = sums_ + c_.groups * STRIPS + s;
        for (int i = 0; i < 2 * TILE && j * TILE + i < c_.columns; i++) {
            const int64_t column = j * TILE + i, at = column * STRIPS + s;
            const F p0 = product[i / TILE * 2][i % TILE], p1 = product[i / TILE * 2 + 1][i % TILE];
            right[0] += p0 * weight_[at];
            right[1] += p1 * weight_[at + 1];
            const int64_t h = column / c_.size;
            if (h < g) continue;
            sums_[h * STRIPS + s] += p0 * values_[at];
            sums_[h * STRIPS + s + 1] += p1 * values_[at + 1];
        }
    }

    const Codes& c_;
    const int64_t first_;
    F *values_, *weight_, *sums_, zero_{};
    uint16_t* pairs_;
};

}  // namespace

}  // namespace ql

using namespace ql;

// With v_g a row's codes - zeros inside its group g of `size` columns, and 0 elsewhere:
//     system[r][g][h] = v_g M v_h^T      right[r][g] = v_g M w^T
// weight, codes [rows][columns]; zeros [rows][groups]; moment: M, symmetric [columns][columns]. Differences
// of codes and zeros are whole numbers up to 256, which bfloat16 holds exactly; M enters with all its bits.
extern "C" void ql_group_products(const float* weight, const float* codes, const float* zeros,
                                  const float* moment, int64_t rows, int64_t columns, int64_t size,
                                  float* system, float* right, void* pool) {
    static thread_local Buffer slab_room;
    Pool& threads = *(Pool*)pool;
    const Codes c{weight, codes, zeros, moment, rows, columns, (columns + size - 1) / size, size};
    const int64_t together = std::clamp<int64_t>(SLAB_BYTES / (c.a_group() * 2), 1, c.groups);
    auto* slab = slab_room.get<uint16_t>(c.a_group() * together);
    constexpr int HIGH = STRIPS * TILE;
    for (int64_t from = 0; from < c.groups; from += together) {
        const int64_t count = std::min(together, c.groups - from);
        threads.run(count * c.tiles(), 4, [&](int64_t begin, int64_t end, int) {
            for (int64_t at = begin; at < end; at++) cut(c, from + at / c.tiles(), at % c.tiles(), slab + at * c.a_tile_row());
        }, false);
        threads.run((rows + HIGH - 1) / HIGH, 1, [&](int64_t begin, int64_t end, int) {
            configure_tiles();
            for (int64_t part = begin; part < end; part++) {
                Rows some(c, part * HIGH);
                for (int64_t g = 0; g < count; g++) some.group(from + g, slab + g * c.a_group(), system, right);
            }
            release_tiles();
        }, false);
    }
}
#endif
