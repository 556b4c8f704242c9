// Rounding inputs to int8.
#include "input.h"

namespace ql {

namespace {

inline void store_bytes(int8_t* p, F v) {
#if QL_LEVEL >= 3
    _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32((__m512)v)));
#else
    for (int i = 0; i < LANES; i++) p[i] = (int8_t)v[i];
#endif
}

inline void store_words(int16_t* p, F v) {
#if QL_LEVEL >= 3
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_cvtps_epi32((__m512)v)));
#else
    for (int i = 0; i < LANES; i++) p[i] = (int16_t)v[i];
#endif
}

inline F magnitude(F v) {
    return (F)((I)v & 0x7fffffff);
}

inline F bounded(F v, float low, float high) { return at_most(at_least(v, splat(low)), splat(high)); }

inline float step_of(float peak) { return (peak < 1e-12f ? 1e-12f : peak) / 127.f; }

// round(v / s), the quotient as float32 division gives it. A product with 1 / s is off by 2 units in
// the last place at most, which only matters where it comes near a tie.
inline F rounded_quotient(F v, float s, float inverse) {
    const F product = v * splat(inverse), whole = round_even(product);
    const F off = magnitude(product - whole);
    if (largest(off) < 0.499f) return whole;
    return round_even(v / splat(s));
}

// x[k], or 0 behind the last column.
inline F part(const float* x, int k, int columns) {
    if (k + LANES <= columns) return load<F>(x + k);
    F v{};
    for (int i = 0; k + i < columns; i++) v[i] = x[k + i];
    return v;
}

// The grid of 0 to 255 that spans [low, high] and zero: (step, zero).
struct Range {
    float low = 0, high = 0;

    void widen(const float* x, int columns) {
        for (int k = 0; k < columns; k++) {
            low = x[k] < low ? x[k] : low;
            high = x[k] > high ? x[k] : high;
        }
    }
    float step() const {
        const float s = (high - low) / 255.f;
        return s < 1e-12f ? 1e-12f : s;
    }
    float zero() const {
        const float z = std::nearbyint(-low / step());
        return z < 0 ? 0.f : z > 255 ? 255.f : z;
    }
};

float peak_of(const float* x, int columns, float below) {
    F top{};
    for (int k = 0; k < columns; k += LANES) {
        const F v = magnitude(part(x, k, columns));
        top = at_least(top, v < splat(below) ? v : F{});
    }
    return largest(top);
}

// The largest |x| of both; NaN and infinity are larger than any number when compared as bits.
inline float largest_of(F a, F b) {
    const I x = (I)magnitude(a), y = (I)magnitude(b), top = x > y ? x : y;
    int32_t most = top[0];
    for (int i = 1; i < LANES; i++) most = top[i] > most ? top[i] : most;
    float value;
    std::memcpy(&value, &most, 4);
    return value;
}

// The smallest power of two that brings `peak` to 127 * 256 at most.
inline float power_step(float peak) {
    if (!(peak < INFINITY)) return NAN;
    if (peak < 0x1p-100f) return 0x1p-115f;
    int exponent;
    std::frexp(peak, &exponent);  // peak = f 2^exponent, 1/2 <= f < 1
    const float step = std::ldexp(1.f, exponent - 15);
    return peak > 127 * 256 * step ? 2 * step : step;
}

}  // namespace

How range_of_all(const Input& in) {
    Range range;
    for (int m = 0; m < in.rows; m++) range.widen(in.x + m * in.stride, in.columns);
    return {INT8_GIVEN, range.step(), range.zero(), 0};
}

void find_outliers(Input& in, float threshold) {
    in.outliers.clear();
    for (int k = 0; k < in.columns; k++)
        for (int m = 0; m < in.rows; m++)
            if (std::fabs(in.x[m * in.stride + k]) >= threshold) {
                in.outliers.push_back(k);
                break;
            }
}

void quantize(Input& in, const How& how, int first, int last) {
    const int blocks = in.blocks();
    for (int m = first; m < last; m++) {
        const float* x = in.x + m * in.stride;
        int8_t* q = const_cast<int8_t*>(in.q) + (int64_t)m * in.padded;
        float* step = const_cast<float*>(in.step) + (int64_t)m * blocks;
        float* total = const_cast<float*>(in.total) + (int64_t)m * blocks;
        float row_step = how.step, zero = 0.f;
        if (how.mode == INT8_ROW) row_step = step_of(peak_of(x, in.columns, INFINITY));
        if (how.mode == INT8_OUTLIERS) row_step = step_of(peak_of(x, in.columns, how.threshold));
        if (how.has_zero()) {
            float given = how.zero;
            if (how.mode == INT8_RANGE_ROW) {
                Range range;
                range.widen(x, in.columns);
                row_step = range.step();
                given = range.zero();
            }
            zero = given - 128.f;  // codes 0 to 255 become signed
            const_cast<float*>(in.shift)[m] = -zero;
        }
        const float bottom = how.has_zero() ? -128.f : -127.f;
        for (int b = 0; b < blocks; b++) {
            const int k = b * CHUNK;
            F low = part(x, k, in.columns), high = part(x, k + LANES, in.columns);
            float s = row_step;
            if (how.mode == INT8_BLOCK) s = step_of(largest(at_least(magnitude(low), magnitude(high))));
            const float inverse = 1.f / s;
            low = bounded(rounded_quotient(low, s, inverse) + splat(zero), bottom, 127.f);
            high = bounded(rounded_quotient(high, s, inverse) + splat(zero), bottom, 127.f);
            store_bytes(q + k, low);
            store_bytes(q + k + LANES, high);
            step[b] = s;
            total[b] = sum(low + high) * s;
        }
        if (in.outliers.empty() && in.columns == in.padded) continue;
        for (int k : in.outliers) q[k] = 0;
        // Padding is code 0, also where the zero-point is another.
        std::memset(q + in.columns, 0, in.padded - in.columns);
        for (int b = 0; b < blocks; b++) {
            int added = 0;
            for (int i = 0; i < CHUNK; i++) added += q[b * CHUNK + i];
            total[b] = (float)added * step[b];
        }
    }
}

void quantize_exact(Input& in, int first, int last) {
    const int blocks = in.blocks();
    for (int m = first; m < last; m++) {
        const float* x = in.x + m * in.stride;
        const int64_t row = (int64_t)m * in.padded;
        for (int b = 0; b < blocks; b++) {
            const F v[2] = {part(x, b * CHUNK, in.columns), part(x, b * CHUNK + LANES, in.columns)};
            const float s = power_step(largest_of(v[0], v[1])), inverse = 1.f / s;
            F added{};
            for (int i = 0; i < 2; i++) {
                const F whole = round_even(v[i] * inverse);
                const int64_t to = row + b * CHUNK + i * LANES;
                added += whole;
                if (in.wide) {
                    store_words(const_cast<int16_t*>(in.wide) + to, whole);
                    continue;
                }
                const F top = round_even(whole * (1.f / 256));
                // What is left lies in [-128, 128]; 128 itself, a tie, goes to the byte above.
                const F over = whole - top * 256.f > splat(127.f) ? splat(1.f) : F{};
                store_bytes(const_cast<int8_t*>(in.q) + to, top + over);
                store_bytes(const_cast<int8_t*>(in.q_low) + to, whole - (top + over) * 256.f);
            }
            const int64_t at = (int64_t)m * blocks + b;
            const_cast<float*>(in.step)[at] = s;
            const_cast<float*>(in.total)[at] = sum(added) * s;
        }
    }
}

}  // namespace ql
