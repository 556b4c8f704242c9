// The small steps between the products: norms, activations, rotation, exponentials, maxima.
#pragma once

#include "simd.h"

namespace ql {

// e^x for every lane, within 2 units in the last place; 0 below -87.3, where float32 ends.
// x = n ln 2 + r with |r| <= ln 2 / 2, ln 2 in two parts so that r is exact, then a polynomial in r.
inline F exponential(F x) {
    const F top = splat(88.f), bottom = splat(-87.3f);
    const auto under = x < bottom;
    x = x > top ? top : x;
    x = x < bottom ? bottom : x;
    const F magic = splat(12582912.f);
    const F n = (x * splat(1.44269504f) + magic) - magic;
    const F r = (x - n * splat(0.693359375f)) - n * splat(-2.12194440e-4f);
    F p = splat(1.f / 5040);
    p = p * r + splat(1.f / 720);
    p = p * r + splat(1.f / 120);
    p = p * r + splat(1.f / 24);
    p = p * r + splat(1.f / 6);
    p = p * r + splat(0.5f);
    p = p * r * r + r + splat(1.f);
#if QL_LEVEL >= 3
    const I power = (I)_mm512_cvtps_epi32((__m512)n);
#else
    const I power = __builtin_convertvector(n, I);
#endif
    const F value = p * (F)((power + 127) << 23);
    return under ? F{} : value;
}

// x / (1 + e^-x)
inline F silu(F x) { return x / (splat(1.f) + exponential(-x)); }

// 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), the tanh as 1 - 2 / (e^2t + 1)
inline F gelu_tanh(F x) {
    const F t = splat(0.7978845608f) * (x + splat(0.044715f) * x * x * x);
    return x - x / (exponential(t + t) + splat(1.f));
}

// y = x / sqrt(mean(x^2) + eps) * weight; float32 [count]. Zhang and Sennrich 2019, arXiv 1910.07467.
inline void rms_norm(const float* x, const float* weight, float* y, int count, float eps) {
    F squares{};
    int k = 0;
    for (; k + LANES <= count; k += LANES) {
        const F v = load<F>(x + k);
        squares += v * v;
    }
    float total = sum(squares);
    for (; k < count; k++) total += x[k] * x[k];
    const float factor = 1.f / std::sqrt(total / count + eps);
    for (k = 0; k + LANES <= count; k += LANES)
        store(y + k, load<F>(x + k) * factor * load<F>(weight + k));
    for (; k < count; k++) y[k] = x[k] * factor * weight[k];
}

// Rotate the first `rotary` values of a head in pairs (i, i + rotary / 2) by the angle of their
// position, given as cos and sin [rotary / 2]. Su et al. 2021, arXiv 2104.09864, in the order of
// transformers' Llama.
inline void rotate(float* head, const float* cosine, const float* sine, int rotary) {
    const int half = rotary / 2;
    for (int i = 0; i < half; i++) {
        const float a = head[i], b = head[i + half];
        head[i] = a * cosine[i] - b * sine[i];
        head[i + half] = b * cosine[i] + a * sine[i];
    }
}

// Where it is largest, the first of equals. NaN is passed over; 0 where there is nothing else.
inline int64_t argmax(const float* at, int64_t count) {
    F top = splat(-INFINITY);
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) top = at_least(load<F>(at + i), top);
    float peak = largest(top);
    for (; i < count; i++) peak = at[i] > peak ? at[i] : peak;
    for (i = 0; i < count; i++)
        if (at[i] == peak) return i;
    return 0;
}

inline float softcap(float x, float cap) { return cap > 0 ? cap * std::tanh(x / cap) : x; }

}  // namespace ql
