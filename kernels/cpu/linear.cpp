// The product on vectors: 16 rows of the weight in a register, M rows of the input beside each other.
#include "linear.h"

#include <algorithm>
#include <numeric>

namespace ql {

namespace {

// What 16 outputs of M inputs are written through.
struct Target {
    float* y;
    int64_t stride;
    const float* bias;
    int rows;  // of the weight

    void put(int m, int block, F v) const {
        const int first = block * LANES, count = std::min(LANES, rows - first);
        float* to = y + m * stride + first;
        if (count == LANES) {
            store(to, bias ? v + load<F>(bias + first) : v);
            return;
        }
        for (int i = 0; i < count; i++) to[i] = v[i] + (bias ? bias[first + i] : 0.f);
    }
};

// Ask for the codes that come AHEAD bytes later, a chunk at a time. The hardware's own prefetcher runs
// too short a way ahead of a loop that also computes: reading and computing then add up.
constexpr int AHEAD = 6144;
template <int BYTES>
inline void read_ahead(const uint8_t* p) {
    for (int at = 0; at < BYTES; at += 64) __builtin_prefetch(p + AHEAD + at, 0, 2);
}

inline F value_of(const Matrix& w, I index) {
    return w.table ? look_up(w.table, index) : to_float(index);
}

// int8 inputs, of one byte or (WIDE) two. With d_b the whole-number dot product of a block of 32 columns,
//     y = sum_g s_g (sum_b step_b d_b - z_g sum_b total_b)
template <int BITS, int M, bool WIDE>
void int8_rows(const Matrix& w, const Input& in, int block, int m0, F (&y)[M]) {
    const uint8_t* p = w.block(block);
    const int chunks = w.padded() / CHUNK;
    const int a_group = w.groups() == 1 ? chunks : w.group / CHUNK;
    const int64_t blocks = in.blocks();
    for (int b = 0, g = 0; g < w.groups(); g++) {
        F part[M] = {};
        float total[M] = {};
        const int stop = g + 1 == w.groups() ? chunks : b + a_group;
        for (; b < stop; b++, p += CHUNK * BITS * 2) {
            U8 steps[8];
            unpack_chunk<BITS>(p, steps);
            read_ahead<CHUNK * BITS * 2>(p);
            for (int m = 0; m < M; m++) {
                const int64_t at = (int64_t)(m0 + m) * in.padded + b * CHUNK;
                I dots[2] = {};
                for (int i = 0; i < 8; i++) {
                    int32_t four;
                    std::memcpy(&four, in.q + at + 4 * i, 4);
                    dots[WIDE ? 0 : i & 1] = dot4(dots[WIDE ? 0 : i & 1], steps[i], four);
                    if (!WIDE) continue;
                    std::memcpy(&four, in.q_low + at + 4 * i, 4);
                    dots[1] = dot4(dots[1], steps[i], four);
                }
                // Two bytes of 127 and codes of 255: below 2^29.
                const I dot = (WIDE ? dots[0] * 256 : dots[0]) + dots[1];
                part[m] += to_float(dot) * in.step[(m0 + m) * blocks + b];
                total[m] += in.total[(m0 + m) * blocks + b];
            }
        }
        const F s = w.scale(block, g), z = w.zero_of(block, g);
        for (int m = 0; m < M; m++)
            y[m] += w.zero == ZERO_OFFSET ? s * part[m] + z * total[m] : s * (part[m] - z * total[m]);
    }
    if (in.shift != nullptr) {
        // A zero-point of the input: step * shift * sum_k w, and w has one grid a row.
        const F row = w.scale(block, 0) * to_float(load<I>(w.sums + block * LANES));
        for (int m = 0; m < M; m++) y[m] += row * (in.step[(m0 + m) * blocks] * in.shift[m0 + m]);
    }
}

// Groups that end inside a block of 32 columns, in pieces that no boundary cuts.
template <int BITS>
F int8_small_groups(const Matrix& w, const Input& in, int block, int m) {
    F y{};
    const uint8_t* p = w.block(block);
    const int piece = std::gcd(w.group, CHUNK), steps_each = piece / 4;
    const U8 ones = splat_byte(1);
    const int64_t blocks = in.blocks();
    for (int b = 0; b < blocks; b++, p += CHUNK * BITS * 2) {
        U8 steps[8];
        unpack_chunk<BITS>(p, steps);
        for (int first = 0; first < 8; first += steps_each) {
            const int g = (b * CHUNK + first * 4) / w.group;
            if (g >= w.groups()) break;  // only padding is left
            const F s = w.scale(block, g), z = w.zero_of(block, g);
            const int8_t* q = in.q + (int64_t)m * in.padded + b * CHUNK;
            I dot{}, added{};
            for (int i = first; i < first + steps_each; i++) {
                int32_t four;
                std::memcpy(&four, q + 4 * i, 4);
                dot = dot4(dot, steps[i], four);
                added = dot4(added, ones, four);
            }
            const float step = in.step[m * blocks + b];
            const F d = to_float(dot), t = to_float(added);
            y += step * (w.zero == ZERO_OFFSET ? s * d + z * t : s * (d - z * t));
        }
    }
    return y;
}

// float32 inputs, which tables need: y = sum_g s_g (sum_k v_k x_k - z_g sum_k x_k).
template <int BITS, int M>
void exact_rows(const Matrix& w, const Input& in, int block, int m0, F (&y)[M]) {
    const uint8_t* p = w.block(block);
    const int chunks = w.padded() / CHUNK;
    const int a_group = w.groups() == 1 ? chunks : w.group / CHUNK;
    const int64_t blocks = in.blocks();
    for (int b = 0, g = 0; g < w.groups(); g++) {
        F part[M] = {};
        float total[M] = {};
        const int stop = g + 1 == w.groups() ? chunks : b + a_group;
        for (; b < stop; b++, p += CHUNK * BITS * 2) {
            U8 steps[8];
            unpack_chunk<BITS>(p, steps);
            read_ahead<CHUNK * BITS * 2>(p);
            const float* x = in.x + m0 * in.stride + b * CHUNK;
            for (int i = 0; i < 8; i++)
                for (int j = 0; j < 4; j++) {
                    const F v = value_of(w, byte_of(steps[i], j));
                    for (int m = 0; m < M; m++) part[m] += v * x[m * in.stride + 4 * i + j];
                }
            for (int m = 0; m < M; m++) total[m] += in.total[(m0 + m) * blocks + b];
        }
        const F s = w.scale(block, g), z = w.zero_of(block, g);
        for (int m = 0; m < M; m++)
            y[m] += w.zero == ZERO_OFFSET ? s * part[m] + z * total[m] : s * (part[m] - z * total[m]);
    }
}

template <int BITS>
F exact_small_groups(const Matrix& w, const Input& in, int block, int m) {
    F y{};
    const uint8_t* p = w.block(block);
    for (int b = 0; b < in.blocks(); b++, p += CHUNK * BITS * 2) {
        U8 steps[8];
        unpack_chunk<BITS>(p, steps);
        const float* x = in.x + m * in.stride + b * CHUNK;
        for (int i = 0; i < 8; i++) {
            const int g = (b * CHUNK + 4 * i) / w.group;
            if (g >= w.groups()) break;
            const F s = w.scale(block, g), z = w.zero_of(block, g);
            for (int j = 0; j < 4; j++) {
                F v = value_of(w, byte_of(steps[i], j));
                v = w.zero == ZERO_OFFSET ? s * v + z : s * (v - z);
                y += v * x[4 * i + j];
            }
        }
    }
    return y;
}

template <int M>
void bf16_rows(const Matrix& w, const Input& in, int block, int m0, F (&y)[M]) {
    const uint8_t* p = w.block(block);
    const float* x = in.x + m0 * in.stride;
    F odd_sum[M] = {};
    for (int k = 0; k < in.padded; k += 2, p += 64) {
        const I pair = load<I>(p);
        read_ahead<64>(p);
        const F even = (F)(pair << 16), odd = (F)(pair & (int32_t)0xffff0000);
        for (int m = 0; m < M; m++) {
            y[m] += even * x[m * in.stride + k];
            odd_sum[m] += odd * x[m * in.stride + k + 1];
        }
    }
    for (int m = 0; m < M; m++) y[m] += odd_sum[m];
}

template <int M, class One>
void small_groups(One&& one, const Matrix& w, const Input& in, int block, int m0, F (&y)[M]) {
    for (int m = 0; m < M; m++) y[m] = one(w, in, block, m0 + m);
}

// No group ends inside a block of 32 columns.
bool whole_groups(const Matrix& w) { return w.groups() == 1 || w.group % CHUNK == 0; }

template <int M>
void some_rows(const Matrix& w, const Input& in, int block, int m0, const Target& out) {
    F y[M] = {};
    const bool whole = whole_groups(w);
    if (w.bits == 16) {
        bf16_rows<M>(w, in, block, m0, y);
    } else {
        with_bits(w.bits, [&](auto bits) {
            constexpr int BITS = decltype(bits)::value;
            if (in.int8 && whole) int8_rows<BITS, M, false>(w, in, block, m0, y);
            else if (in.q_low && whole && !w.table) int8_rows<BITS, M, true>(w, in, block, m0, y);
            else if (in.int8) small_groups<M>(int8_small_groups<BITS>, w, in, block, m0, y);
            else if (whole) exact_rows<BITS, M>(w, in, block, m0, y);
            else small_groups<M>(exact_small_groups<BITS>, w, in, block, m0, y);
        });
    }
    for (int m = 0; m < M; m++) out.put(m0 + m, block, y[m]);
}

void multiply_most(const Matrix& w, const Input& in, float* y, int64_t y_stride, const float* bias,
                   Pool& pool) {
    const Target out{y, y_stride, bias, w.rows};
#if QL_LEVEL >= 3
    if (in.q_tiles) {
        pool.run((w.row_blocks() + 1) / 2, 1, [&](int64_t first, int64_t last, int) {
            tiles_int8(w, in, (int)first * 2, std::min((int)last * 2, w.row_blocks()), y, y_stride, bias);
        });
        return;
    }
#endif
#if QL_LEVEL >= 4
    if (in.high) {
        pool.run((w.row_blocks() + 1) / 2, 1, [&](int64_t first, int64_t last, int) {
            tiles_bf16(w, in, (int)first * 2, std::min((int)last * 2, w.row_blocks()), y, y_stride, bias);
        });
        return;
    }
#endif
#if QL_LEVEL == 3 || QL_LEVEL == 4
    const bool codes = in.int8 ? in.rows >= STEPPED_FROM : in.wide != nullptr;
    if (codes && w.bits != 16 && !w.table && whole_groups(w)) {
        pool.run((w.row_blocks() + 1) / 2, 1, [&](int64_t first, int64_t last, int) {
            multiply_stepped(w, in, (int)first * 2, std::min((int)last * 2, w.row_blocks()), y, y_stride, bias);
        });
        return;
    }
#endif
    pool.run(w.row_blocks(), 1, [&](int64_t first, int64_t last, int) {
        int m = 0;
        // The weights of a few blocks stay in cache while all inputs pass by.
        for (; m + 8 <= in.rows; m += 8)
            for (int64_t block = first; block < last; block++) some_rows<8>(w, in, (int)block, m, out);
        for (; m + 4 <= in.rows; m += 4)
            for (int64_t block = first; block < last; block++) some_rows<4>(w, in, (int)block, m, out);
        for (; m < in.rows; m++)
            for (int64_t block = first; block < last; block++) some_rows<1>(w, in, (int)block, m, out);
    });
}

// y += the columns of 8-bit weights that int8 inputs left out, times the inputs as they are.
void add_outliers(const Matrix& w, const Input& in, float* y, int64_t y_stride, Pool& pool) {
    pool.run(w.row_blocks(), 4, [&](int64_t first, int64_t last, int) {
        for (int64_t block = first; block < last; block++) {
            const int n0 = (int)block * LANES, count = std::min(LANES, w.rows - n0);
            const F s = w.scale((int)block, 0), z = w.zero_of((int)block, 0);
            for (int k : in.outliers) {
                const U8 step = load<U8>(w.block((int)block) + k / 4 * 64);
                const F column = s * (to_float(byte_of(step, k % 4)) - z);
                for (int m = 0; m < in.rows; m++) {
                    const float x = in.x[m * in.stride + k];
                    float* to = y + m * y_stride + n0;
                    for (int l = 0; l < count; l++) to[l] += column[l] * x;
                }
            }
        }
    });
}

}  // namespace

void multiply(const Matrix& w, const Input& in, float* y, int64_t y_stride, const float* bias,
              Pool& pool) {
    multiply_most(w, in, y, y_stride, bias, pool);
    if (!in.outliers.empty()) add_outliers(w, in, y, y_stride, pool);
}

}  // namespace ql
