// What quantizing itself spends its time on: rounding columns that answer for each other's errors, and
// trying many grids on the same weights. Sixteen rows of a weight are worked on at once, which never
// meet; what they need stays in the first cache.
#include <algorithm>

#include "pool.h"
#include "quadratic.h"

namespace ql {

namespace {

// Calls take turns with torch's own threads: nobody waits for the next one in a spin.
constexpr bool ASLEEP = false;

// The whole number nearest to v, within [low, high]. Bounded before it is rounded as well: every grid
// ends far below 2^21.
inline F nearest(F v, F low, F high) {
    const F limit = splat(2097152.f);
    return at_most(at_least(round_even(at_most(at_least(v, -limit), limit)), low), high);
}

// Up to sixteen floats at p.
struct Lanes {
    int count;
    F get(const float* p) const {
        if (count == LANES) return load<F>(p);
        F v{};
        for (int i = 0; i < count; i++) v[i] = p[i];
        return v;
    }
    void put(float* p, F v) const {
        if (count == LANES) return store(p, v);
        for (int i = 0; i < count; i++) p[i] = v[i];
    }
};

// sum_i row[i] * v[i], four sums so that none waits for the one before.
inline F dot(const float* row, const F* v, int count) {
    F total[4] = {};
    int i = 0;
    for (; i + 4 <= count; i += 4)
        for (int part = 0; part < 4; part++) total[part] += row[i + part] * v[i + part];
    for (; i < count; i++) total[0] += row[i] * v[i];
    return (total[0] + total[1]) + (total[2] + total[3]);
}

// How steps are stored: float32 without its last `dropped` bits, from `tiny` to `most`.
struct Stored {
    int dropped;
    float tiny, most;
    F round(F v) const {
        if (!dropped) return v;
        const I bits = (I)at_least(v, splat(tiny)), half = I{} + ((1 << (dropped - 1)) - 1);
        const F even = (F)((bits + half + (bits >> dropped & 1)) & ~((1 << dropped) - 1));
        return even > splat(most) ? splat(INFINITY) : even;
    }
};

struct Step {
    F size, zero;
};

// The grid that spans low to high, and 0 with them unless it is `symmetric`.
inline Step step_of(F low, F high, float levels, bool symmetric, const Stored& stored) {
    const F smallest = splat(1e-12f);
    if (symmetric) {
        const float half = (levels + 1) / 2;
        const F size = at_least(at_least(high, -low) / splat(std::max(half - 1, 1.f)), smallest);
        return {stored.round(size), splat(half)};
    }
    low = at_most(low, F{});
    const F size = at_least((at_least(high, F{}) - low) / splat(levels), smallest);
    return {stored.round(size), at_most(at_least(round_even(-low / size), F{}), splat(levels))};
}

}  // namespace

}  // namespace ql

using namespace ql;

extern "C" {

// Columns first to last - 1 of a weight [columns][rows], in the order they are rounded:
//     value_j = work_j - sum_i pull_ij error_i + sum_i debt_ij value_i      first <= i < j
//     whole_j = clamp(round(value_j / step_j), bottom_j, bottom_j + levels),  error = value - whole step
// pull and debt [columns][columns] are transposed (row j belongs to column j); debt may be null. work
// becomes the values; work, whole, errors: [columns][rows]; step, bottom: [groups][rows], of which column
// j has those of group_of[j].
void ql_compensate(float* work, const float* step, const float* bottom, const int64_t* group_of, float levels,
                   float* whole, float* errors, const float* pull, const float* debt, int64_t rows,
                   int64_t columns, int64_t first, int64_t last, void* pool) {
    const int count = (int)(last - first);
    ((Pool*)pool)->run((rows + LANES - 1) / LANES, 1, [&](int64_t begin, int64_t end, int) {
        static thread_local Buffer error_room, value_room;
        F *error = error_room.get<F>(count), *value = value_room.get<F>(count);
        for (int64_t strip = begin; strip < end; strip++) {
            const Lanes lanes{(int)std::min<int64_t>(LANES, rows - strip * LANES)};
            for (int j = 0; j < count; j++) {
                const int64_t at = (first + j) * rows + strip * LANES;
                const int64_t row = (first + j) * columns + first;
                F v = lanes.get(work + at) - dot(pull + row, error, j);
                if (debt) v += dot(debt + row, value, j);
                const int64_t grid = group_of[first + j] * rows + strip * LANES;
                F s = lanes.get(step + grid);
                if (lanes.count < LANES) s = at_least(s, splat(1e-30f));
                const F low = lanes.get(bottom + grid), code = nearest(v / s, low, low + splat(levels));
                value[j] = v;
                error[j] = v - code * s;
                lanes.put(work + at, v);
                lanes.put(whole + at, code);
                lanes.put(errors + at, error[j]);
            }
        }
    }, ASLEEP);
}

// matrix[j][i] = matrix[i][j] for j > i, in squares that fit the first cache: a column of a large matrix
// touches another page at every row.
void ql_mirror(float* matrix, int64_t size, void* pool) {
    constexpr int64_t SIDE = 64;
    ((Pool*)pool)->run((size + SIDE - 1) / SIDE, 1, [&](int64_t begin, int64_t end, int) {
        for (int64_t part = begin; part < end; part++)
            for (int64_t i0 = 0; i0 <= part * SIDE; i0 += SIDE)
                for (int64_t j = part * SIDE; j < std::min(size, (part + 1) * SIDE); j++)
                    for (int64_t i = i0; i < std::min(j, i0 + SIDE); i++)
                        matrix[j * size + i] = matrix[i * size + j];
    }, ASLEEP);
}

// The grid of every group of every row, of those that span its range times a fraction, with the least
// e M_g e^T, e = clamp(round(w / s), -z, levels - z) s - w; of equals the first, and none that is not a
// number. weight [rows][stride], its groups of `size` columns from the first on; moments
// [groups][size][size] or null (M = 1). Steps are rounded to float32 without its last `dropped` bits (13:
// float16, 16: bfloat16), from `tiny` to `most`. scales, zeros [rows][groups].
void ql_best_grids(const float* weight, int64_t rows, int64_t stride, int64_t groups, int64_t size,
                   const float* moments, const float* fractions, int64_t tries, float levels,
                   int64_t symmetric, int64_t dropped, float tiny, float most, float* scales, float* zeros,
                   void* pool) {
    const int64_t strips = (rows + LANES - 1) / LANES;
    const Stored stored{(int)dropped, tiny, most};
    ((Pool*)pool)->run(groups * strips, 4, [&](int64_t begin, int64_t end, int) {
        static thread_local Buffer value_room, error_room[TRIES];
        F *values = value_room.get<F>(size), *error[TRIES];
        for (int i = 0; i < TRIES; i++) error[i] = error_room[i].get<F>(size);
        Quadratic quadratic((int)size);
#if QL_LEVEL >= 5
        configure_tiles();
#endif
        for (int64_t strip = begin; strip < end; strip++) {
            const int64_t g = strip / strips, r = strip % strips * LANES;
            if (moments && (strip == begin || r == 0)) quadratic.take(moments + g * size * size);
            const int there = (int)std::min<int64_t>(LANES, rows - r);
            F low = splat(INFINITY), high = -low;
            for (int64_t k = 0; k < size; k++) {
                F v{};
                for (int l = 0; l < there; l++) v[l] = weight[(r + l) * stride + g * size + k];
                values[k] = v;
                low = at_most(v, low);
                high = at_least(v, high);
            }
            Step best{};
            F least = splat(INFINITY);
            for (int64_t t = 0; t < tries; t += TRIES) {
                const F* of[TRIES];
                Step step[TRIES];
                for (int64_t i = 0; i < TRIES; i++) {
                    const F fraction = splat(fractions[std::min(t + i, tries - 1)]);
                    step[i] = step_of(low * fraction, high * fraction, levels, symmetric, stored);
                    // A product in the place of a quotient: a tie may fall to the other side,
                    // at the same error.
                    const F bottom = -step[i].zero, top = bottom + splat(levels);
                    const F inverse = splat(1.f) / step[i].size;
                    for (int64_t k = 0; k < size; k++)
                        error[i][k] = nearest(values[k] * inverse, bottom, top) * step[i].size - values[k];
                    of[i] = error[i];
                }
                F loss[TRIES] = {};
                if (moments) quadratic.run(of, loss);
                else
                    for (int i = 0; i < TRIES; i++)
                        for (int64_t k = 0; k < size; k++) loss[i] += of[i][k] * of[i][k];
                if (t == 0) best = step[0];
                for (int i = 0; i < TRIES; i++) {
                    const auto less = loss[i] < least;
                    least = less ? loss[i] : least;
                    best.size = less ? step[i].size : best.size;
                    best.zero = less ? step[i].zero : best.zero;
                }
            }
            for (int l = 0; l < there; l++) {
                scales[(r + l) * groups + g] = best.size[l];
                zeros[(r + l) * groups + g] = best.zero[l];
            }
        }
#if QL_LEVEL >= 5
        release_tiles();
#endif
    }, ASLEEP);
}

// out = (Q(w s) - w s) / s, Q rounding each group of `size` columns (the last may be shorter) of each row
// to its own grid of levels + 1 codes: from min to max and 0, or with `symmetric` levels / 2 (rounded
// down) steps to the largest magnitude. weight, out [rows][columns]; s [columns].
void ql_scaled_error(const float* weight, const float* s, int64_t rows, int64_t columns, int64_t size,
                     int64_t levels, int64_t symmetric, float* out, void* pool) {
    ((Pool*)pool)->run(rows, 4, [&](int64_t begin, int64_t end, int) {
        static thread_local Buffer inverse_room;
        auto* inverse = inverse_room.get<float>(columns);
        for (int64_t k = 0; k < columns; k++) inverse[k] = 1.f / s[k];
        for (int64_t at = begin; at < end; at++)
            for (int64_t first = 0; first < columns; first += size) {
                const int64_t last = std::min(first + size, columns);
                const float* w = weight + at * columns;
                float* to = out + at * columns;
                F low{}, high{};
                for (int64_t k = first; k < last; k += LANES) {
                    const Lanes lanes{(int)std::min<int64_t>(LANES, last - k)};
                    const F v = lanes.get(w + k) * lanes.get(s + k);
                    lanes.put(to + k, v);
                    low = at_most(low, v);
                    high = at_least(high, v);
                }
                float bottom = 0, top = 0;
                for (int l = 0; l < LANES; l++) {
                    bottom = std::min(bottom, low[l]);
                    top = std::max(top, high[l]);
                }
                float step, zero;
                if (symmetric) {
                    step = std::max(top, -bottom) / (float)std::max<int64_t>((levels + 1) / 2 - 1, 1);
                    step = std::max(step, 1e-12f);
                    zero = (float)((levels + 1) / 2);
                } else {
                    step = std::max((top - bottom) / (float)levels, 1e-12f);
                    zero = std::min(std::max(std::nearbyint(-bottom / step), 0.f), (float)levels);
                }
                const F lowest = splat(-zero), highest = splat((float)levels - zero);
                const F each = splat(step), a_step = splat(1.f / step);
                for (int64_t k = first; k < last; k += LANES) {
                    const Lanes lanes{(int)std::min<int64_t>(LANES, last - k)};
                    const F v = lanes.get(to + k), q = nearest(v * a_step, lowest, highest);
                    lanes.put(to + k, (q * each - v) * lanes.get(inverse + k));
                }
            }
    }, ASLEEP);
}

}  // extern "C"
