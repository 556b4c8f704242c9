// What the machine can do at best, measured on the pool's threads: reading memory, multiplying. The
// benchmark holds the kernels against it.
#include <chrono>

#include "linear.h"
#include "panels.h"
#include "tile.h"

using namespace ql;

namespace {

double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Keeps the compiler from leaving out work whose result nobody reads. Sums are added up before: what
// has an address stays in memory.
template <class V>
void use(V& v) {
    asm volatile("" : "+m"(v) : : "memory");
}

// Four streams in turn, as the rows of a product are: each keeps the prefetchers of its own page.
void read_part(const uint8_t* p, int64_t bytes) {
    constexpr int STREAMS = 4, LINES = 4;
    const int64_t each = bytes / STREAMS / (64 * LINES) * (64 * LINES);
    I total[STREAMS] = {};
    for (int64_t at = 0; at < each; at += 64 * LINES)
        for (int s = 0; s < STREAMS; s++)
            for (int line = 0; line < LINES; line++)
                total[s] += load<I>(p + s * each + at + 64 * line);
    I sum = total[0] + total[1] + total[2] + total[3];
    use(sum);
}

#if QL_LEVEL >= 5
// Two tiles of the input meet two of the weight; four independent sums hide the latency. Zeros:
// numbers would lower the clock (2.9 to 2.3 GHz here), so that products of numbers reach 0.8 of this.
template <bool INT8>
double tiles(int64_t rounds) {
    configure_tiles();
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_zero(4);
    _tile_zero(5);
    _tile_zero(6);
    _tile_zero(7);
    for (int64_t i = 0; i < rounds; i++) {
        if constexpr (INT8) {
            _tile_dpbsud(0, 4, 6);
            _tile_dpbsud(1, 4, 7);
            _tile_dpbsud(2, 5, 6);
            _tile_dpbsud(3, 5, 7);
        } else {
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    release_tiles();
    return 4.0 * 2 * 16 * 16 * (INT8 ? 64 : 32);
}
#endif

// Twelve independent sums, more than latency times throughput. By name, because an array would stay in
// memory; from starts the compiler does not know, because equal sums would become one.
constexpr int SUMS = 12;

template <class V, class Step>
void repeat(int64_t rounds, Step&& step) {
    V s[SUMS] = {};
    use(s);
    V a = s[0], b = s[1], c = s[2], d = s[3], e = s[4], f = s[5];
    V g = s[6], h = s[7], i = s[8], j = s[9], k = s[10], l = s[11];
    for (int64_t round = 0; round < rounds; round++) {
        a = step(a), b = step(b), c = step(c), d = step(d), e = step(e), f = step(f);
        g = step(g), h = step(h), i = step(i), j = step(j), k = step(k), l = step(l);
    }
    V total = a + b + c + d + e + f + g + h + i + j + k + l;
    use(total);
}

double whole_numbers(int64_t rounds) {
    U8 codes = splat_byte(3);
    use(codes);
    repeat<I>(rounds, [&](I sum) { return dot4(sum, codes, 0x01010101); });
    return SUMS * 2.0 * 64;
}

#if QL_LEVEL == 4
double bfloat16(int64_t rounds) {
    I x = (I)splat(0.5f);
    use(x);
    repeat<I>(rounds, [&](I sum) { return (I)dots<false>((__m512i)sum, (__m512i)x, (__m512i)x); });
    return SUMS * 2.0 * 2 * LANES;
}
#endif

double floats(int64_t rounds) {
    F x = splat(0.5f);
    use(x);
    repeat<F>(rounds, [&](F sum) { return sum * x + x; });
    return SUMS * 2.0 * LANES;
}

double multiply_rounds(int kind, int64_t rounds) {
#if QL_LEVEL >= 5
    if (kind == 0) return tiles<true>(rounds);
    if (kind == 1) return tiles<false>(rounds);
#endif
    if (kind == 0) return whole_numbers(rounds);
#if QL_LEVEL == 4
    return bfloat16(rounds);
#else
    return floats(rounds);
#endif
}

}  // namespace

extern "C" {

// Bytes a second at which the threads read `bytes` bytes from `data`, once.
double ql_read_bandwidth(const uint8_t* data, int64_t bytes, void* pool) {
    constexpr int64_t PIECE = 1 << 20;
    const int64_t pieces = bytes / PIECE;
    const double start = now();
    ((Pool*)pool)->run(pieces, 1, [&](int64_t first, int64_t last, int) {
        read_part(data + first * PIECE, (last - first) * PIECE);
    });
    return (double)(pieces * PIECE) / (now() - start);
}

// Operations (two a multiply-add) a second of all threads: kind 0 int8, 1 bfloat16 (float32 where
// nothing multiplies bfloat16). `rounds` a thread; every round is some hundred operations or more.
double ql_peak(int kind, int64_t rounds, void* pool) {
    Pool& threads = *(Pool*)pool;
    double each = 0;
    const double start = now();
    // A part a thread's turn: 4 of them a thread, as many as the pool hands out.
    const int parts = 4 * threads.size();
    threads.run(parts, 1, [&](int64_t first, int64_t last, int thread) {
        for (int64_t part = first; part < last; part++) {
            const double operations = multiply_rounds(kind, rounds);
            if (thread == 0) each = operations;
        }
    });
    return each * (double)rounds * parts / (now() - start);
}

// Multiply x by every matrix in turn, as a token passes through a model. A matrix that is `joined` reads
// the input of the one before it, as keys read what queries read; every other one prepares its own. x and
// y are as wide as the widest needs them; the outputs of every matrix overwrite those before.
void ql_pass(const Matrix* const* matrices, const uint8_t* joined, int64_t count, const float* x,
             int64_t rows, float* y, const How* how, void* pool) {
    static thread_local Input in;
    Pool& threads = *(Pool*)pool;
    for (int64_t i = 0; i < count; i++) {
        const Matrix& w = *matrices[i];
        How real = *how;
        real.mode = mode_for(how->mode, (int)rows, w.table != nullptr, w.bits);
        const bool tiles = on_tiles(w, real, (int)rows);
        if (!joined[i]) prepare(in, x, (int)rows, w.columns, w.columns, real, tiles, threads);
        multiply(w, in, y, w.rows, nullptr, threads);
    }
}

}  // extern "C"
