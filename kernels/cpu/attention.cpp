// Scores, softmax and values for a few queries of one head at a time, which share the keys they read.
#include "attention.h"

#include <algorithm>
#include <vector>

#include "ops.h"

namespace ql {

namespace {

constexpr int QUERIES = 8;

// N queries at q[n], the n-th seeing positions low[n] to high[n] (inclusive), into out[n].
template <int N>
void some_queries(const Attention& a, const Cache& cache, int kv_head, const float* const* q,
                  float* const* out, const int* low, const int* high, float* scores, int64_t room) {
    int start = low[0], stop = high[0];
    for (int n = 1; n < N; n++) {
        start = std::min(start, low[n]);
        stop = std::max(stop, high[n]);
    }
    const int first = start / LANES, last = stop / LANES;
    const I lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    F top[N];
    for (auto& t : top) t = splat(-INFINITY);
    for (int b = first; b <= last; b++) {
        const float* keys = cache.key_block(kv_head, b);
        F s[N] = {};
        for (int d = 0; d < a.head_dim; d++) {
            const F k = load<F>(keys + d * LANES);
            for (int n = 0; n < N; n++) s[n] += k * q[n][d];
        }
        const I position = lane + b * LANES;
        for (int n = 0; n < N; n++) {
            F v = s[n] * a.scale;
            if (a.cap > 0)
                for (int l = 0; l < LANES; l++) v[l] = softcap(v[l], a.cap);
            const I outside = (position < low[n]) | (position > high[n]);
            v = outside ? splat(-INFINITY) : v;
            top[n] = at_least(top[n], v);
            store(scores + n * room + (b - first) * LANES, v);
        }
    }
    float inverse[N];
    for (int n = 0; n < N; n++) {
        const F peak = splat(largest(top[n]));
        F total{};
        for (int b = 0; b <= last - first; b++) {
            float* at = scores + n * room + b * LANES;
            const F e = exponential(load<F>(at) - peak);
            total += e;
            store(at, e);
        }
        inverse[n] = 1.f / sum(total);
    }
    for (int d = 0; d < a.head_dim; d += LANES) {
        F y[N] = {};
        const int width = std::min(LANES, a.head_dim - d);
        for (int j = start; j <= stop; j++) {
            const float* value = cache.value(kv_head, j) + d;
            F v{};
            if (width == LANES) v = load<F>(value);
            else
                for (int l = 0; l < width; l++) v[l] = value[l];
            for (int n = 0; n < N; n++) y[n] += v * scores[n * room + j - first * LANES];
        }
        for (int n = 0; n < N; n++) {
            y[n] *= inverse[n];
            for (int l = 0; l < width; l++) out[n][d + l] = y[n][l];
        }
    }
}

}  // namespace

void attend(const Attention& a, const Cache& cache, const float* q, float* out, int first, int count,
            Pool& pool) {
#if QL_LEVEL >= 5
    if (count >= ATTEND_TILES && a.head_dim % LANES == 0)
        return attend_tiles(a, cache, q, out, first, count, pool);
#endif
    const int share = a.heads / cache.kv_heads, row = a.heads * a.head_dim;
    const int64_t room = ((first + count) / LANES + 1) * LANES;
    // The queries of a key-value head: every new position, times the heads that share it.
    const int queries = count * share, parts = (queries + QUERIES - 1) / QUERIES;
    pool.run((int64_t)cache.kv_heads * parts, 1, [&](int64_t begin, int64_t end, int) {
        static thread_local std::vector<float> scores;
        if ((int64_t)scores.size() < QUERIES * room) scores.resize(QUERIES * room);
        for (int64_t p = begin; p < end; p++) {
            const int head = (int)(p / parts), from = (int)(p % parts) * QUERIES;
            const float* q_of[QUERIES];
            float* out_of[QUERIES];
            int low[QUERIES], high[QUERIES];
            const int n = std::min(QUERIES, queries - from);
            for (int i = 0; i < n; i++) {
                const int position = (from + i) / share, h = head * share + (from + i) % share;
                q_of[i] = q + (int64_t)position * row + h * a.head_dim;
                out_of[i] = out + (int64_t)position * row + h * a.head_dim;
                high[i] = first + position;
                low[i] = a.window > 0 ? std::max(0, high[i] - a.window + 1) : 0;
            }
            int i = 0;
            auto take = [&](auto size) {
                constexpr int N = decltype(size)::value;
                for (; i + N <= n; i += N)
                    some_queries<N>(a, cache, head, q_of + i, out_of + i, low + i, high + i,
                                    scores.data(), room);
            };
            take(std::integral_constant<int, QUERIES>{});
            take(std::integral_constant<int, 3>{});
            take(std::integral_constant<int, 1>{});
        }
    });
}

}  // namespace ql
