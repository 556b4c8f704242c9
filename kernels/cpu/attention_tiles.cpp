// Attention of many queries on AMX tiles. Queries, keys, probabilities and values are bfloat16 in two
// parts each, 16 bits of fraction in all; the product of both second parts is left out.
#include <algorithm>

#include "attention.h"
#include "input.h"
#include "ops.h"
#include "tile.h"

#if QL_LEVEL >= 5
namespace ql {

namespace {

constexpr int PART = 2 * TILE_PAIRS;  // a tile and the tile of what its rounding left over

// Keys and values of one head as tiles: keys [positions / 16][dim / 32], values [positions / 32]
// [dim / 16], each tile followed by its second part.
struct HeadTiles {
    const uint16_t *keys, *values;
};

struct Sizes {
    int dim, key_tiles, value_tiles;  // tiles along the dimension
    int positions;                    // a multiple of 32
    int64_t keys() const { return (int64_t)positions / TILE * key_tiles * PART; }
    int64_t values() const { return (int64_t)positions / 32 * value_tiles * PART; }
};

void convert_keys(const Cache& cache, const Sizes& size, int head, int block, int seen, uint16_t* to) {
    for (int t = 0; t < size.key_tiles; t++, to += PART)
        for (int pair = 0; pair < 16; pair++) {
            F v[2];
            for (int e = 0; e < 2; e++) {
                const int d = t * 32 + 2 * pair + e;
                const bool there = d < size.dim && block * LANES < seen;
                v[e] = there ? load<F>(cache.key_block(head, block) + d * LANES) : F{};
            }
            put_pairs(v, to + pair * 32, to + TILE_PAIRS + pair * 32);
        }
}

void convert_values(const Cache& cache, const Sizes& size, int head, int group, int seen, uint16_t* to) {
    for (int t = 0; t < size.value_tiles; t++, to += PART)
        for (int pair = 0; pair < 16; pair++) {
            F v[2];
            for (int e = 0; e < 2; e++) {
                const int position = group * 32 + 2 * pair + e;
                v[e] = position < seen ? load<F>(cache.value(head, position) + t * LANES) : F{};
            }
            put_pairs(v, to + pair * 32, to + TILE_PAIRS + pair * 32);
        }
}

// P in both parts (tiles 4 and 5) meets a tile of values. The intrinsics want a tile's number written
// out, so this cannot be a function.
#define QL_MEET(SUM, V)                        \
    _tile_loadd(6, V, 64);                     \
    _tile_loadd(7, (V) + TILE_PAIRS, 64);      \
    _tile_dpbf16ps(SUM, 4, 6);                 \
    _tile_dpbf16ps(SUM, 5, 6);                 \
    _tile_dpbf16ps(SUM, 4, 7)

// Sixteen queries of one head, at consecutive positions.
class Queries {
  public:
    Queries(const Attention& a, const Sizes& size, const HeadTiles& head) : a_(a), size_(size), head_(head) {
        q_ = room<uint16_t>(0, (int64_t)size.key_tiles * PART);
        scores_ = room<float>(1, (int64_t)TILE * stride());
        p_ = room<uint16_t>(2, (int64_t)size.positions / 32 * PART);
    }

    // q, out: the first query's row, of `stride`; `count` queries from position `first` on.
    void run(const float* q, float* out, int64_t stride, int first, int count) {
        for (int t = 0; t < size_.key_tiles; t++)
            for (int i = 0; i < TILE; i++)
                for (int half = 0; half < 2; half++) {
                    const int d = t * 32 + half * LANES;
                    const F v = i < count && d < size_.dim ? load<F>(q + i * stride + d) : F{};
                    uint16_t* to = q_ + t * PART + i * 32 + half * LANES;
                    put_parts(v, to, to + TILE_PAIRS);
                }
        // All positions that some of these queries see, in whole groups of 32.
        const int lowest = a_.window > 0 ? std::max(0, first - a_.window + 1) : 0;
        const int begin = lowest / 32, end = (first + count - 1) / 32 + 1;
        for (int group = begin; group < end; group++) score(group, begin);
        for (int i = 0; i < TILE; i++) inverse_[i] = weigh(first + i, i, begin, end);
        gather(out, stride, count, begin, end);
    }

  private:
    // Of scores, in floats: rows a power of two apart would share their places in the cache.
    int64_t stride() const { return size_.positions + LANES; }

    template <class T>
    static T* room(int which, int64_t count) {
        static thread_local Buffer kept[3];
        return kept[which].get<T>(count);
    }

    // Scores of 32 positions, [query][position].
    void score(int group, int begin) {
        _tile_zero(0);
        _tile_zero(1);
        const uint16_t* keys = head_.keys + (int64_t)group * 2 * size_.key_tiles * PART;
        for (int t = 0; t < size_.key_tiles; t++) {
            const uint16_t *k0 = keys + t * PART, *k1 = k0 + size_.key_tiles * PART;
            _tile_loadd(4, q_ + t * PART, 64);
            _tile_loadd(5, q_ + t * PART + TILE_PAIRS, 64);
            _tile_loadd(6, k0, 64);
            _tile_loadd(7, k1, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(0, 5, 6);
            _tile_dpbf16ps(1, 5, 7);
            _tile_loadd(6, k0 + TILE_PAIRS, 64);
            _tile_loadd(7, k1 + TILE_PAIRS, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
        }
        float* to = scores_ + (int64_t)(group - begin) * 32;
        _tile_stored(0, to, stride() * sizeof(float));
        _tile_stored(1, to + LANES, stride() * sizeof(float));
    }

    // The scores of query i become exp(score - largest), as tiles; returns 1 / their sum.
    float weigh(int position, int i, int begin, int end) {
        const int high = position, low = a_.window > 0 ? std::max(0, position - a_.window + 1) : 0;
        const I lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        float* row = scores_ + i * stride();
        F top = splat(-INFINITY);
        for (int b = begin * 2; b < end * 2; b++) {
            float* at = row + (b - begin * 2) * LANES;
            F v = load<F>(at) * a_.scale;
            if (a_.cap > 0)
                for (int l = 0; l < LANES; l++) v[l] = softcap(v[l], a_.cap);
            if (b * LANES < low || b * LANES + LANES > high + 1) {
                const I where = lane + b * LANES, outside = (where < low) | (where > high);
                v = outside ? splat(-INFINITY) : v;
            }
            top = at_least(v, top);
            store(at, v);
        }
        const F peak = splat(largest(top));
        F total{};
        for (int b = 0; b < (end - begin) * 2; b++) {
            const F e = exponential(load<F>(row + b * LANES) - peak);
            total += e;
            uint16_t* to = p_ + (int64_t)(b / 2) * PART + i * 32 + b % 2 * LANES;
            put_parts(e, to, to + TILE_PAIRS);
        }
        return 1.f / sum(total);
    }

    void gather(float* out, int64_t stride, int count, int begin, int end) const {
        alignas(64) float sums[4][TILE * TILE];
        for (int t = 0; t < size_.value_tiles; t += 4) {
            const int width = std::min(4, size_.value_tiles - t);
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
            for (int group = begin; group < end; group++) {
                const uint16_t* p = p_ + (int64_t)(group - begin) * PART;
                const uint16_t* v = head_.values + ((int64_t)group * size_.value_tiles + t) * PART;
                _tile_loadd(4, p, 64);
                _tile_loadd(5, p + TILE_PAIRS, 64);
                QL_MEET(0, v);
                if (width > 1) { QL_MEET(1, v + PART); }
                if (width > 2) { QL_MEET(2, v + 2 * PART); }
                if (width > 3) { QL_MEET(3, v + 3 * PART); }
            }
            _tile_stored(0, sums[0], 64);
            _tile_stored(1, sums[1], 64);
            _tile_stored(2, sums[2], 64);
            _tile_stored(3, sums[3], 64);
            for (int e = 0; e < width; e++)
                for (int i = 0; i < count; i++)
                    store(out + i * stride + (t + e) * LANES, load<F>(sums[e] + i * TILE) * inverse_[i]);
        }
    }

    const Attention& a_;
    const Sizes& size_;
    const HeadTiles& head_;
    uint16_t *q_, *p_;
    float* scores_;
    float inverse_[TILE];
};

#undef QL_MEET

}  // namespace

void attend_tiles(const Attention& a, const Cache& cache, const float* q, float* out, int first, int count,
                  Pool& pool) {
    static thread_local Buffer key_room, value_room;
    const int share = a.heads / cache.kv_heads, seen = first + count;
    const int64_t row = (int64_t)a.heads * a.head_dim;
    const Sizes size{a.head_dim, (a.head_dim + 31) / 32, a.head_dim / LANES, (seen + 31) / 32 * 32};
    auto* keys = key_room.get<uint16_t>(size.keys() * cache.kv_heads);
    auto* values = value_room.get<uint16_t>(size.values() * cache.kv_heads);
    const int groups = size.positions / 32;
    pool.run((int64_t)cache.kv_heads * groups, 1, [&](int64_t begin, int64_t end, int) {
        for (int64_t i = begin; i < end; i++) {
            const int head = (int)(i / groups), group = (int)(i % groups);
            uint16_t* to = keys + size.keys() * head + (int64_t)group * 2 * size.key_tiles * PART;
            for (int b = 0; b < 2; b++)
                convert_keys(cache, size, head, group * 2 + b, seen, to + b * size.key_tiles * PART);
            convert_values(cache, size, head, group, seen,
                           values + size.values() * head + (int64_t)group * size.value_tiles * PART);
        }
    });
    const int tiles = (count + TILE - 1) / TILE;
    pool.run((int64_t)a.heads * tiles, 1, [&](int64_t begin, int64_t end, int) {
        configure_tiles();
        for (int64_t i = begin; i < end; i++) {
            // The last queries see the most: taken in turn with the first, parts are alike.
            const int h = (int)(i / tiles), turn = (int)(i % tiles);
            const int tile = turn % 2 ? tiles - 1 - turn / 2 : turn / 2;
            const HeadTiles head{keys + size.keys() * (h / share), values + size.values() * (h / share)};
            const int64_t at = (int64_t)tile * TILE * row + (int64_t)h * a.head_dim;
            Queries(a, size, head).run(q + at, out + at, row, first + tile * TILE, std::min(TILE, count - tile * TILE));
        }
        release_tiles();
    });
}

}  // namespace ql
#endif
