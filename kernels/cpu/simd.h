// Sixteen lanes of whatever the machine has.
//
// Everything is written on vectors of 16 float32 or 16 int32 (one AVX-512 register, two of AVX2, four
// of NEON): GCC's and Clang's vector extensions turn plain + - * into the machine's instructions, so
// one source serves every instruction set. Only what has no operator is spelled out below.
//
// The level is fixed when the file is compiled: QL_LEVEL is 0 (portable), 1 (NEON with dot products),
// 2 (AVX2), 3 (AVX-512 with VNNI), 4 (that and AVX512-BF16) or 5 (that and AMX). `kernels/build.py`
// compiles the level of the machine it runs on.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#ifndef QL_LEVEL
#define QL_LEVEL 0
#endif
#if QL_LEVEL >= 2
#include <immintrin.h>
#elif QL_LEVEL == 1
#include <arm_neon.h>
#endif

namespace ql {

constexpr int LANES = 16;

using F = float __attribute__((vector_size(64), aligned(64)));
using I = int32_t __attribute__((vector_size(64), aligned(64)));
using U8 = uint8_t __attribute__((vector_size(64), aligned(64)));

template <class V, class T>
inline V load(const T* p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
template <class V, class T>
inline void store(T* p, const V& v) {
    std::memcpy(p, &v, sizeof v);
}
#if QL_LEVEL == 1
// Register i, 0 to 3, of sixteen lanes.
template <class Q, class V>
inline Q quarter(const V& v, int i) {
    Q q;
    std::memcpy(&q, (const char*)&v + 16 * i, 16);
    return q;
}
template <class V, class Q>
inline void set_quarter(V& v, int i, Q q) {
    std::memcpy((char*)&v + 16 * i, &q, 16);
}
#endif
inline F splat(float x) { return F{} + x; }
inline U8 splat_byte(uint8_t x) { return U8{} + x; }

inline F to_float(I v) {
#if QL_LEVEL >= 3
    return (F)_mm512_cvtepi32_ps((__m512i)v);
#else
    return __builtin_convertvector(v, F);
#endif
}

// The larger, the smaller of both lanes; the second where the first is NaN.
inline F at_least(F v, F low) {
#if QL_LEVEL >= 3
    return (F)_mm512_max_ps((__m512)v, (__m512)low);
#else
    return v > low ? v : low;
#endif
}
inline F at_most(F v, F high) {
#if QL_LEVEL >= 3
    return (F)_mm512_min_ps((__m512)v, (__m512)high);
#else
    return v < high ? v : high;
#endif
}

// Round to nearest, ties to even; whole numbers from 2^22 on may change.
inline F round_even(F v) {
#if QL_LEVEL >= 3
    return (F)_mm512_roundscale_ps((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif QL_LEVEL == 1
    for (int i = 0; i < 4; i++) set_quarter(v, i, vrndnq_f32(quarter<float32x4_t>(v, i)));
    return v;
#else
    const F magic = splat(12582912.f);  // 1.5 * 2^23: the sum has no bits left for a fraction
    return (v + magic) - magic;
#endif
}

inline float sum(F v) {
#if QL_LEVEL >= 3
    return _mm512_reduce_add_ps((__m512)v);
#elif QL_LEVEL == 1
    const auto low = vaddq_f32(quarter<float32x4_t>(v, 0), quarter<float32x4_t>(v, 1));
    return vaddvq_f32(vaddq_f32(low, vaddq_f32(quarter<float32x4_t>(v, 2), quarter<float32x4_t>(v, 3))));
#else
    float total = 0;
    for (int i = 0; i < LANES; i++) total += v[i];
    return total;
#endif
}

inline float largest(F v) {
#if QL_LEVEL >= 3
    return _mm512_reduce_max_ps((__m512)v);
#elif QL_LEVEL == 1
    const auto low = vmaxnmq_f32(quarter<float32x4_t>(v, 0), quarter<float32x4_t>(v, 1));
    return vmaxnmvq_f32(vmaxnmq_f32(low, vmaxnmq_f32(quarter<float32x4_t>(v, 2), quarter<float32x4_t>(v, 3))));
#else
    float top = v[0];
    for (int i = 1; i < LANES; i++) top = v[i] > top ? v[i] : top;
    return top;
#endif
}

// float16 (IEEE 754 binary16) of 16 lanes, widened exactly.
inline F load_half(const uint16_t* p) {
#if QL_LEVEL >= 3
    return (F)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif QL_LEVEL == 2
    F v;
    __m256 low = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
    __m256 high = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 8)));
    std::memcpy(&v, &low, 32);
    std::memcpy((char*)&v + 32, &high, 32);
    return v;
#elif QL_LEVEL == 1
    F v;
    for (int i = 0; i < 4; i++) set_quarter(v, i, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4 * i))));
    return v;
#else
    F v;
    for (int i = 0; i < LANES; i++) {
        uint32_t sign = (uint32_t)(p[i] & 0x8000) << 16, body = p[i] & 0x7fff;
        float value;
        if (body >= 0x7c00) {
            uint32_t bits = 0x7f800000u | (body & 0x3ff) << 13;
            std::memcpy(&value, &bits, 4);
        } else {
            // The exponent is 112 too small after the shift; the product mends subnormals as well.
            uint32_t bits = body << 13;
            std::memcpy(&value, &bits, 4);
            value *= 0x1p112f;
        }
        v[i] = sign ? -value : value;
    }
    return v;
#endif
}

// Unsigned bytes widened to 16 lanes.
inline F load_bytes(const uint8_t* p) {
#if QL_LEVEL >= 3
    return (F)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)));
#elif QL_LEVEL == 1
    F v;
    const uint8x16_t bytes = vld1q_u8(p);
    const uint16x8_t low = vmovl_u8(vget_low_u8(bytes)), high = vmovl_u8(vget_high_u8(bytes));
    set_quarter(v, 0, vcvtq_f32_u32(vmovl_u16(vget_low_u16(low))));
    set_quarter(v, 1, vcvtq_f32_u32(vmovl_u16(vget_high_u16(low))));
    set_quarter(v, 2, vcvtq_f32_u32(vmovl_u16(vget_low_u16(high))));
    set_quarter(v, 3, vcvtq_f32_u32(vmovl_u16(vget_high_u16(high))));
    return v;
#else
    F v;
    for (int i = 0; i < LANES; i++) v[i] = p[i];
    return v;
#endif
}

// bfloat16, rounded to nearest even; NaN stays NaN.
inline uint16_t to_bf16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline float from_bf16(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

// acc[l] += sum_j codes[4 l + j] * x[j]; codes unsigned, x four signed bytes. Exact on every level.
inline I dot4(I acc, U8 codes, int32_t x) {
#if QL_LEVEL >= 3
    return (I)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)codes, _mm512_set1_epi32(x));
#elif QL_LEVEL == 2
    __m256i input = _mm256_cvtepi8_epi16(_mm_set1_epi32(x));
    for (int half = 0; half < 2; half++) {
        __m256i sums[2];
        for (int part = 0; part < 2; part++) {
            __m128i eight_pairs = _mm_loadu_si128((const __m128i*)&codes + 2 * half + part);
            sums[part] = _mm256_madd_epi16(_mm256_cvtepu8_epi16(eight_pairs), input);
        }
        // hadd interleaves its halves: put the quarters back in order.
        __m256i joined = _mm256_permute4x64_epi64(_mm256_hadd_epi32(sums[0], sums[1]), 0xd8);
        __m256i* target = (__m256i*)&acc + half;
        *target = _mm256_add_epi32(*target, joined);
    }
    return acc;
#elif QL_LEVEL == 1
    const int8x16_t input = vreinterpretq_s8_s32(vdupq_n_s32(x));
    // The instruction wants signs on both sides: codes less 128, and what that takes away given back.
    const int32x4_t taken = vdotq_s32(vdupq_n_s32(0), input, vdupq_n_s8(-128));
    for (int i = 0; i < 4; i++) {
        const auto signs = vreinterpretq_s8_u8(veorq_u8(quarter<uint8x16_t>(codes, i), vdupq_n_u8(128)));
        const int32x4_t start = vsubq_s32(quarter<int32x4_t>(acc, i), taken);
        set_quarter(acc, i, vdotq_s32(start, signs, input));
    }
    return acc;
#else
    int8_t part[4];
    std::memcpy(part, &x, 4);
    for (int l = 0; l < LANES; l++)
        for (int j = 0; j < 4; j++) acc[l] += (int32_t)codes[4 * l + j] * part[j];
    return acc;
#endif
}

// Byte j of every lane, as a number 0 to 255.
inline I byte_of(U8 codes, int j) { return (I)codes >> (8 * j) & 255; }

// table[index] of every lane, index 0 to 15.
inline F look_up(const float* table, I index) {
#if QL_LEVEL >= 3
    return (F)_mm512_permutexvar_ps((__m512i)index, _mm512_loadu_ps(table));
#elif QL_LEVEL == 1
    const uint8x16x4_t bytes = vld1q_u8_x4((const uint8_t*)table);
    F v;
    for (int i = 0; i < 4; i++) {
        // Where the four bytes of lane l lie: 4 * index, and the three behind it.
        const uint32x4_t lane = vandq_u32(quarter<uint32x4_t>(index, i), vdupq_n_u32(15));
        const uint32x4_t places = vmlaq_n_u32(vdupq_n_u32(0x03020100), lane, 0x04040404);
        set_quarter(v, i, vqtbl4q_u8(bytes, vreinterpretq_u8_u32(places)));
    }
    return v;
#else
    F v;
    for (int l = 0; l < LANES; l++) v[l] = table[index[l] & 15];
    return v;
#endif
}

#if QL_LEVEL >= 3
// 16 x 16 numbers of 32 bits: row i becomes column i.
inline void transpose(__m512i (&m)[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 4) {
        const __m512i a = _mm512_unpacklo_epi32(m[i], m[i + 1]), b = _mm512_unpackhi_epi32(m[i], m[i + 1]);
        const __m512i c = _mm512_unpacklo_epi32(m[i + 2], m[i + 3]), d = _mm512_unpackhi_epi32(m[i + 2], m[i + 3]);
        t[i] = _mm512_unpacklo_epi64(a, c);
        t[i + 1] = _mm512_unpackhi_epi64(a, c);
        t[i + 2] = _mm512_unpacklo_epi64(b, d);
        t[i + 3] = _mm512_unpackhi_epi64(b, d);
    }
    // Quarter q of t[4 r + i] holds rows 4 r to 4 r + 3 of column 4 q + i.
    for (int i = 0; i < 4; i++) {
        const __m512i a = _mm512_shuffle_i32x4(t[i], t[i + 4], 0x44), b = _mm512_shuffle_i32x4(t[i], t[i + 4], 0xee);
        const __m512i c = _mm512_shuffle_i32x4(t[i + 8], t[i + 12], 0x44);
        const __m512i d = _mm512_shuffle_i32x4(t[i + 8], t[i + 12], 0xee);
        m[i] = _mm512_shuffle_i32x4(a, c, 0x88);
        m[i + 4] = _mm512_shuffle_i32x4(a, c, 0xdd);
        m[i + 8] = _mm512_shuffle_i32x4(b, d, 0x88);
        m[i + 12] = _mm512_shuffle_i32x4(b, d, 0xdd);
    }
}
#endif

}  // namespace ql
