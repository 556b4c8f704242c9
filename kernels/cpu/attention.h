// Attention of new queries over a cache of keys and values.
#pragma once

#include "pool.h"
#include "simd.h"

namespace ql {

// One layer's cache. Sixteen positions lie side by side in the keys, so that one register holds the
// scores of sixteen keys; values lie position by position.
//     keys[kv_heads][capacity / 16][head_dim][16], values[kv_heads][capacity][head_dim], float32
struct Cache {
    float *keys, *values;
    int kv_heads, capacity, head_dim;

    float* key_block(int head, int block) const {
        return keys + ((int64_t)head * (capacity / LANES) + block) * head_dim * LANES;
    }
    float* value(int head, int position) const {
        return values + ((int64_t)head * capacity + position) * head_dim;
    }
    void put(int position, const float* key, const float* val) const {
        for (int h = 0; h < kv_heads; h++) {
            float* block = key_block(h, position / LANES) + position % LANES;
            for (int d = 0; d < head_dim; d++) block[d * LANES] = key[h * head_dim + d];
            std::memcpy(value(h, position), val + h * head_dim, sizeof(float) * head_dim);
        }
    }
};

struct Attention {
    int heads, head_dim;
    float scale, cap;   // cap 0: none
    int window;         // a query sees its own position and window - 1 before it; 0: all
};

// out[i][head] = sum_j softmax_j(scale q_i k_j) v_j over positions j <= first + i; the keys and values
// of the new positions are in the cache already. q, out: [count][heads * head_dim].
void attend(const Attention& a, const Cache& cache, const float* q, float* out, int first, int count,
            Pool& pool);

#if QL_LEVEL >= 5
// The same for at least ATTEND_TILES queries, with a head_dim that is a multiple of 16.
constexpr int ATTEND_TILES = 16;
void attend_tiles(const Attention& a, const Cache& cache, const float* q, float* out, int first, int count,
                  Pool& pool);
#endif

}  // namespace ql
