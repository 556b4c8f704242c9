// Rounding inputs to int8.
#include "input.h"

namespace ql {

namespace {

// Round to nearest, ties to even: the sum has no bits left for a fraction.
inline F round_even(F v) {
    const F magic = splat(12582912.f);  // 1.5 * 2^23
    return (v + magic) - magic;
}

inline void store_bytes(int8_t* p, F v) {
#if QL_LEVEL >= 3
    _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32((__m512)v)));
#else
    for (int i = 0; i < LANES; i++) p[i] = (int8_t)v[i];
#endif
}

inline F magnitude(F v) {
    return (F)((I)v & 0x7fffffff);
}

inline F larger(F a, F b) { return a > b ? a : b; }

inline float largest(F v) {
    float top = v[0];
    for (int i = 1; i < LANES; i++) top = v[i] > top ? v[i] : top;
    return top;
}

inline F bounded(F v, float low, float high) {
    v = v < splat(low) ? splat(low) : v;
    return v > splat(high) ? splat(high) : v;
}

inline float step_of(float peak) { return (peak < 1e-12f ? 1e-12f : peak) / 127.f; }

// x[k], or 0 behind the last column.
inline F part(const float* x, int k, int columns) {
    if (k + LANES <= columns) return load<F>(x + k);
    F v{};
    for (int i = 0; k + i < columns; i++) v[i] = x[k + i];
    return v;
}

}  // namespace

void quantize(Input& in, int mode, const float* given_step, const float* given_zero, int first,
              int last) {
    const int blocks = in.blocks();
    for (int m = first; m < last; m++) {
        const float* x = in.x + m * in.stride;
        int8_t* q = const_cast<int8_t*>(in.q) + (int64_t)m * in.padded;
        float* step = const_cast<float*>(in.step) + (int64_t)m * blocks;
        float* total = const_cast<float*>(in.total) + (int64_t)m * blocks;
        float row_step = 1.f, zero = 0.f;
        if (mode == INT8_ROW) {
            F top{};
            for (int k = 0; k < in.columns; k += LANES)
                top = larger(top, magnitude(part(x, k, in.columns)));
            row_step = step_of(largest(top));
        }
        if (mode == INT8_GIVEN) {
            row_step = given_step[m];
            zero = given_zero[m] - 128.f;  // codes 0 to 255 become signed
            const_cast<float*>(in.shift)[m] = -zero;
        }
        for (int b = 0; b < blocks; b++) {
            const int k = b * CHUNK;
            F low = part(x, k, in.columns), high = part(x, k + LANES, in.columns);
            float s = row_step;
            if (mode == INT8_BLOCK) s = step_of(largest(larger(magnitude(low), magnitude(high))));
            low = round_even(low / splat(s)) + splat(zero);
            high = round_even(high / splat(s)) + splat(zero);
            const float bottom = mode == INT8_GIVEN ? -128.f : -127.f;
            low = bounded(low, bottom, 127.f);
            high = bounded(high, bottom, 127.f);
            store_bytes(q + k, low);
            store_bytes(q + k + LANES, high);
            step[b] = s;
            float added = 0;
            const int count = in.columns - k < CHUNK ? in.columns - k : CHUNK;
            if (count < CHUNK)  // padding is code 0, also where 0 would not be
                for (int i = count < 0 ? 0 : count; i < CHUNK; i++) q[k + i] = 0;
            for (int i = 0; i < count; i++) added += q[k + i];
            total[b] = added * s;
        }
    }
}

}  // namespace ql
