// The errors of grids that are tried on sixteen rows of a weight, weighed by their inputs' second moment.
#pragma once

#include "input.h"
#include "tile.h"

namespace ql {

constexpr int TRIES = 2;  // grids that are tried together

// e M e^T for sixteen vectors e and each of TRIES tries.
class Quadratic {
  public:
    explicit Quadratic(int size) : size_(size) {}

#if QL_LEVEL >= 5
    // On AMX tiles: M and e in two bfloat16 parts each, 16 bits of fraction; the product of both second
    // parts is left out. Tiles are [32 rows of M][their 32 columns][part][16 rows].
    void take(const float* moment) {
        uint16_t* to = room<uint16_t>(0, (int64_t)deep() * deep() * 4 * TILE_PAIRS);
        m_ = to;
        e_ = room<uint16_t>(1, (int64_t)TRIES * deep() * 2 * TILE_PAIRS);
        for (int j = 0; j < deep() * 2; j++)
            for (int k = 0; k <= j / 2; k++)
                for (int i = 0; i < TILE; i++)
                    for (int half = 0; half < 32; half += LANES) {
                        const int row = j * TILE + i;
                        F v{};
                        for (int l = 0; l < LANES; l++) {
                            const int column = k * 32 + half + l;
                            if (row < size_ && column <= row)
                                v[l] = moment[row * size_ + column] * (column < row ? 2.f : 1.f);
                        }
                        uint16_t* tile = to + tile_at(j, k) + i * 32 + half;
                        put_parts(v, tile, tile + TILE_PAIRS);
                    }
    }

    void run(const F* const (&e)[TRIES], F (&out)[TRIES]) {
        for (int t = 0; t < TRIES; t++) {
            out[t] = F{};
            for (int k = 0; k < deep() * 32; k += 2) {
                const F v[2] = {k < size_ ? e[t][k] : F{}, k + 1 < size_ ? e[t][k + 1] : F{}};
                uint16_t* tile = e_ + (t * deep() + k / 32) * 2 * TILE_PAIRS + k % 32 * LANES;
                put_pairs(v, tile, tile + TILE_PAIRS);
            }
        }
        const uint16_t *e0 = e_, *e1 = e_ + deep() * 2 * TILE_PAIRS;
        alignas(64) F product[4][TILE];
        for (int j = 0; j < deep(); j++) {
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
            for (int k = 0; k <= j; k++) {
                const uint16_t *m0 = m_ + tile_at(2 * j, k), *m1 = m_ + tile_at(2 * j + 1, k);
                const int64_t at = (int64_t)k * 2 * TILE_PAIRS;
                meet(m0, m1, e0 + at, e1 + at);
                meet(m0, m1, e0 + at + TILE_PAIRS, e1 + at + TILE_PAIRS);
                meet(m0 + TILE_PAIRS, m1 + TILE_PAIRS, e0 + at, e1 + at);
            }
            _tile_stored(0, product[0], 64);
            _tile_stored(1, product[1], 64);
            _tile_stored(2, product[2], 64);
            _tile_stored(3, product[3], 64);
            for (int i = 0; i < 32 && j * 32 + i < size_; i++)
                for (int t = 0; t < TRIES; t++) out[t] += product[i / TILE * 2 + t][i % TILE] * e[t][j * 32 + i];
        }
    }

  private:
    int deep() const { return (size_ + 31) / 32; }
    int64_t tile_at(int j, int k) const { return ((int64_t)j * deep() + k) * 2 * TILE_PAIRS; }
    template <class T>
    static T* room(int which, int64_t count) {
        static thread_local Buffer kept[2];
        return kept[which].get<T>(count);
    }
    static void meet(const uint16_t* m0, const uint16_t* m1, const uint16_t* e0, const uint16_t* e1) {
        _tile_loadd(4, m0, 64);
        _tile_loadd(6, e0, 64);
        _tile_loadd(7, e1, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, m1, 64);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }

    const uint16_t* m_ = nullptr;
    uint16_t* e_ = nullptr;
#else
    void take(const float* moment) {
        static thread_local Buffer room;
        float* lower = room.get<float>((int64_t)size_ * size_);
        std::memcpy(lower, moment, sizeof(float) * size_ * size_);
        for (int i = 0; i < size_; i++)
            for (int j = 0; j < i; j++) lower[i * size_ + j] *= 2;
        lower_ = lower;
    }

    void run(const F* const (&e)[TRIES], F (&out)[TRIES]) {
        constexpr int ROWS = 4;
        for (auto& o : out) o = F{};
        int i = 0;
        for (; i + ROWS <= size_; i += ROWS) {
            F part[ROWS][TRIES] = {};
            for (int j = 0; j < i; j++)
                for (int r = 0; r < ROWS; r++) {
                    const F m = splat(lower_[(i + r) * size_ + j]);
                    for (int t = 0; t < TRIES; t++) part[r][t] += m * e[t][j];
                }
            for (int r = 0; r < ROWS; r++)
                for (int t = 0; t < TRIES; t++) {
                    for (int j = i; j <= i + r; j++) part[r][t] += lower_[(i + r) * size_ + j] * e[t][j];
                    out[t] += part[r][t] * e[t][i + r];
                }
        }
        for (; i < size_; i++)
            for (int t = 0; t < TRIES; t++) {
                F part{};
                for (int j = 0; j <= i; j++) part += lower_[i * size_ + j] * e[t][j];
                out[t] += part * e[t][i];
            }
    }

  private:
    const float* lower_ = nullptr;  // M's diagonal, and left of it twice its entries
#endif
    const int size_;
};

}  // namespace ql
