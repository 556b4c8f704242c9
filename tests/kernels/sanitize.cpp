// Runs every kernel over many shapes on memory of exactly the documented size, for the sanitizers to
// watch. test_sanitizers.py builds it with kernels/cpu/*.cpp; what comes out is right by other tests,
// here it only has to be finite. With an argument all of it is written out, to be compared with what
// another instruction set makes of the same numbers (test_arm.py).
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#include "decoder.h"

using namespace ql;

extern "C" {
int ql_init();
void* ql_pool_new(int threads);
void ql_pool_free(void* pool);
void ql_pack(const uint8_t*, int rows, int columns, int bits, uint8_t*, void* pool);
void ql_unpack(const uint8_t*, int rows, int columns, int bits, uint8_t*, void* pool);
void ql_pack_bf16(const uint16_t*, int rows, int columns, uint16_t*, void* pool);
void ql_linear(const Matrix*, const float* x, int64_t rows, float* y, const How*, const float* bias, void*);
void ql_compensate(float*, const float*, const float*, const int64_t*, float, float*, float*, const float*,
                   const float*, int64_t rows, int64_t columns, int64_t first, int64_t last, void* pool);
void ql_turn(const float*, const int64_t*, int64_t rows, int64_t columns, float*, void* pool);
void ql_turn_back(const float*, const int64_t*, const float*, const int64_t*, int64_t rows, int64_t columns,
                  float*, void* pool);
void ql_best_grids(const float*, int64_t rows, int64_t stride, int64_t groups, int64_t size, const float*,
                   const float*, int64_t tries, float, int64_t symmetric, int64_t dropped, float, float,
                   float*, float*, void* pool);
void ql_scaled_error(const float*, const float*, int64_t rows, int64_t columns, int64_t size, int64_t levels,
                     int64_t symmetric, float*, void* pool);
#if QL_LEVEL >= 4
void ql_group_products(const float*, const float*, const float*, const float*, int64_t rows, int64_t columns,
                       int64_t size, float*, float*, void* pool);
void ql_add_moment(float*, const uint16_t*, const uint16_t*, int64_t tokens, int64_t columns, int64_t, void*);
#endif
void ql_compare_logits(const float*, const float*, const int64_t*, int64_t rows, int64_t count, double*,
                       double*, uint8_t*, void* pool);
int ql_sample(const float*, int64_t count, double temperature, double top_p, double uniform, void*);
int ql_read(const Model*, const int32_t*, int first, int count, int every, float* logits, void* pool);
}

namespace {

std::mt19937 generator(1);
int whole(int below) { return (int)(generator() % (unsigned)below); }
float number() { return (float)whole(2001) / 1000.f - 1.f; }

// Memory that ends where the values end, and starts where only its type has to be aligned.
template <class T>
struct Exact {
    std::unique_ptr<T[]> data;
    int64_t count;
    explicit Exact(int64_t n) : data(new T[n]()), count(n) {}
    T* get() const { return data.get(); }
    T& operator[](int64_t i) { return data[i]; }
};

Exact<float> numbers(int64_t count) {
    Exact<float> made(count);
    for (int64_t i = 0; i < count; i++) made[i] = number();
    return made;
}

void fail(const char* what) {
    std::fprintf(stderr, "%s\n", what);
    std::exit(1);
}

bool written = false;

void finite(const float* y, int64_t count) {
    if (written) {
        std::fwrite(&count, sizeof count, 1, stdout);
        std::fwrite(y, sizeof *y, (size_t)count, stdout);
    }
    for (int64_t i = 0; i < count; i++)
        if (!std::isfinite(y[i])) fail("a result is not finite");
}

// A random weight and the memory it lies in.
struct Weight {
    Matrix record{};
    Exact<uint8_t> planes{0}, zero_bytes{0};
    Exact<uint16_t> halves{0}, offsets{0}, plain{0};
    Exact<float> floats{0}, wide_offsets{0}, table{0};
    Exact<int32_t> sums{0};

    Weight(int rows, int columns, int bits, int group, int zero, bool wide, bool codebook, void* pool) {
        record.rows = rows;
        record.columns = columns;
        record.bits = bits;
        record.group = group;
        record.zero = zero;
        record.wide_scales = wide;
        const int padded_rows = record.row_blocks() * LANES;
        if (bits == 16) {
            Exact<uint16_t> source((int64_t)rows * columns);
            for (int64_t i = 0; i < source.count; i++) source[i] = (uint16_t)(0x3c00 + whole(256));
            plain = Exact<uint16_t>((int64_t)padded_rows * record.padded());
            ql_pack_bf16(source.get(), rows, columns, plain.get(), pool);
            record.codes = (const uint8_t*)plain.get();
            return;
        }
        Exact<uint8_t> codes((int64_t)rows * columns), back((int64_t)rows * columns);
        for (int64_t i = 0; i < codes.count; i++) codes[i] = (uint8_t)whole(1 << bits);
        planes = Exact<uint8_t>(record.block_bytes() * record.row_blocks());
        ql_pack(codes.get(), rows, columns, bits, planes.get(), pool);
        ql_unpack(planes.get(), rows, columns, bits, back.get(), pool);
        if (std::memcmp(codes.get(), back.get(), (size_t)codes.count) != 0) fail("codes changed");
        const int64_t grids = (int64_t)padded_rows * record.groups();
        sums = Exact<int32_t>(padded_rows);
        if (wide) floats = numbers(grids);
        else halves = Exact<uint16_t>(grids);
        for (int64_t i = 0; i < halves.count; i++) halves[i] = (uint16_t)whole(0x3c00);
        if (zero == ZERO_BYTE) zero_bytes = Exact<uint8_t>(grids);
        if (zero == ZERO_OFFSET && wide) wide_offsets = numbers(grids);
        if (zero == ZERO_OFFSET && !wide) offsets = Exact<uint16_t>(grids);
        for (int64_t i = 0; i < zero_bytes.count; i++) zero_bytes[i] = (uint8_t)whole(1 << bits);
        for (int64_t i = 0; i < offsets.count; i++) offsets[i] = (uint16_t)whole(0x3c00);
        if (codebook) table = numbers(16);
        record.codes = planes.get();
        record.scales = wide ? (const void*)floats.get() : halves.get();
        if (zero == ZERO_BYTE) record.zeros = zero_bytes.get();
        if (zero == ZERO_OFFSET) record.zeros = wide ? (const void*)wide_offsets.get() : offsets.get();
        if (codebook) record.table = table.get();
        record.sums = sums.get();
    }
};

void products(const Weight& w, int rows, How how, bool bias, void* pool) {
    const Exact<float> x = numbers((int64_t)rows * w.record.columns);
    const Exact<float> b = numbers(w.record.rows);
    Exact<float> y((int64_t)rows * w.record.rows);
    ql_linear(&w.record, x.get(), rows, y.get(), &how, bias ? b.get() : nullptr, pool);
    finite(y.get(), y.count);
}

void linears(void* pool) {
    const int shapes[][2] = {{1, 1}, {3, 31}, {16, 32}, {17, 33}, {33, 64}, {40, 65}, {50, 130}, {48, 200}};
    for (const auto& [rows, columns] : shapes)
        for (int m : {1, 5, 6, 17, 40}) {
            for (int bits = 2; bits <= 8; bits++)
                for (int group : {4, 12, 32, 64, columns})
                    for (int zero = ZERO_MIDDLE; zero <= ZERO_OFFSET; zero++)
                        for (int mode : {EXACT, INT8_BLOCK, INT8_ROW, BF16}) {
                            // Every fourth combination: the shapes go round, the rest takes turns.
                            if (whole(4)) continue;
                            const bool wide = zero == ZERO_OFFSET || whole(2);
                            const Weight w(rows, columns, bits, std::min(group, columns), zero, wide,
                                           bits == 4 && zero == ZERO_MIDDLE && mode != INT8_ROW && whole(2), pool);
                            products(w, m, {mode, 0, 0, 0}, whole(2), pool);
                        }
            const Weight bytes(rows, columns, 8, columns, ZERO_MIDDLE, false, false, pool);
            for (int mode : {INT8_ROW, INT8_GIVEN, INT8_RANGE_ROW, INT8_RANGE, INT8_OUTLIERS})
                products(bytes, m, {mode, 0.01f, 121, 0.9f}, true, pool);
            const Weight plain(rows, columns, 16, columns, ZERO_MIDDLE, false, false, pool);
            for (int mode : {EXACT, INT8_BLOCK, BF16}) products(plain, m, {mode, 0, 0, 0}, false, pool);
        }
}

// More rows, columns and outputs than the caches take whole.
void large(void* pool) {
    const int shapes[][3] = {{33, 2200, 490}, {17, 40, 530}};
    for (const auto& [rows, columns, m] : shapes) {
        const Weight bytes(rows, columns, 8, columns, ZERO_MIDDLE, false, false, pool);
        products(bytes, m, {INT8_RANGE_ROW, 0, 0, 0}, true, pool);
        products(bytes, m, {INT8_OUTLIERS, 0, 0, 0.9f}, false, pool);
        products(bytes, m, {BF16, 0, 0, 0}, true, pool);
        products(Weight(rows, columns, 16, columns, ZERO_MIDDLE, false, false, pool), m, {BF16, 0, 0, 0},
                 false, pool);
    }
}

void solving(void* pool) {
    for (int rows : {1, 15, 16, 37})
        for (int columns : {1, 31, 48}) {
            const int64_t all = (int64_t)rows * columns;
            const Exact<float> bottom(all), pull = numbers((int64_t)columns * columns);
            Exact<float> work = numbers(all), step(all), codes(all), errors(all), scale(columns), out(all);
            for (int64_t i = 0; i < all; i++) step[i] = 0.1f;
            for (int64_t i = 0; i < columns; i++) scale[i] = 0.5f + (float)i;
            Exact<int64_t> own(columns), places(columns);
            for (int c = 0; c < columns; c++) {
                own[c] = c;
                places[c] = columns - 1 - c;
            }
            ql_compensate(work.get(), step.get(), bottom.get(), own.get(), 7, codes.get(), errors.get(), pull.get(),
                          whole(2) ? pull.get() : nullptr, rows, columns, columns / 3, columns, pool);
            finite(errors.get(), all);
            ql_turn(work.get(), places.get(), rows, columns, out.get(), pool);
            ql_turn_back(out.get(), places.get(), whole(2) ? step.get() : nullptr, own.get(), rows, columns,
                         errors.get(), pool);
            finite(errors.get(), all);
#if QL_LEVEL >= 4
            for (int size : {1, 20, 32, 1000}) {
                const int64_t groups = (columns + size - 1) / size;
                const Exact<float> zeros(rows * groups);
                Exact<float> system(rows * groups * groups), right(rows * groups);
                ql_group_products(work.get(), codes.get(), zeros.get(), pull.get(), rows, columns, size,
                                  system.get(), right.get(), pool);
                finite(system.get(), system.count);
                finite(right.get(), right.count);
            }
#endif
            ql_scaled_error(work.get(), scale.get(), rows, columns, 20, 15, whole(2), out.get(), pool);
            finite(out.get(), all);
            const int tries = 3;
            Exact<float> fractions(tries), grids(rows), zeros(rows);
            for (int i = 0; i < tries; i++) fractions[i] = 1 - 0.1f * i;
            ql_best_grids(work.get(), rows, columns, 1, columns, whole(2) ? pull.get() : nullptr,
                          fractions.get(), tries, 15, whole(2), 13, 6e-5f, 65504, grids.get(), zeros.get(), pool);
            finite(grids.get(), grids.count);
            finite(zeros.get(), zeros.count);
            Exact<int64_t> targets(rows);
            Exact<double> loss(rows), apart(rows);
            Exact<uint8_t> same(rows);
            ql_compare_logits(work.get(), out.get(), targets.get(), rows, columns, loss.get(), apart.get(),
                              same.get(), pool);
        }
}

void sampling(void* pool) {
    for (int64_t count : {1, 7, 8, 9, 63, 64, 65, 200, 1000})
        for (const double temperature : {5e-324, 1e-3, 0.7, 1.7e308})
            for (const double top_p : {1e-9, 0.5, 0.95, 1.})
                for (const double uniform : {0., 0.4, 0x1.fffffffffffffp-1}) {
                    Exact<float> logits = numbers(count);
                    for (int64_t i = 1; i < count; i++)
                        if (!whole(5)) logits[i] = whole(2) ? logits[i - 1] : -INFINITY;
                    const int token = ql_sample(logits.get(), count, temperature, top_p, uniform, pool);
                    if (token < 0 || token >= count || !(logits[token] > -INFINITY)) fail("no such token");
                    logits[whole((int)count)] = whole(2) ? NAN : INFINITY;
                    if (ql_sample(logits.get(), count, temperature, top_p, uniform, pool) != -1)
                        fail("a token without probabilities");
                }
}

void moments(void* pool) {
#if QL_LEVEL >= 4
    for (int tokens : {1, 31, 40, 600})
        for (int columns : {1, 16, 33, 300}) {
            const Exact<uint16_t> x((int64_t)tokens * columns);
            Exact<float> total((int64_t)columns * columns);
            for (int triangle : {0, 1})
                ql_add_moment(total.get(), x.get(), x.get(), tokens, columns, triangle, pool);
            finite(total.get(), total.count);
        }
#else
    (void)pool;
#endif
}

// A decoder whose sizes are multiples of nothing, with every option of every family.
void decoder(int bits, int mode, bool options, void* pool) {
    const int layers = 2, width = 42, heads = 4, kv_heads = 2, head_dim = 10, ffn = 50, words = 37;
    const int capacity = 48, rotary = options ? 6 : head_dim;
    std::vector<std::unique_ptr<Weight>> kept;
    std::vector<Exact<float>> vectors;
    auto vector = [&](int64_t count) {
        vectors.push_back(numbers(count));
        return vectors.back().get();
    };
    auto linear = [&](int rows, int columns) {
        const int zero = bits == 8 ? ZERO_MIDDLE : ZERO_BYTE, group = bits == 8 ? columns : 12;
        kept.push_back(std::make_unique<Weight>(rows, columns, bits, group, zero, true, false, pool));
        return Linear{&kept.back()->record, options ? vector(rows) : nullptr, {mode, 0.01f, 121, 0.9f}};
    };
    std::vector<Layer> blocks;
    for (int i = 0; i < layers; i++) {
        Layer l{};
        l.q = linear(heads * head_dim, width);
        l.k = linear(kv_heads * head_dim, width);
        l.v = linear(kv_heads * head_dim, width);
        l.o = linear(width, heads * head_dim);
        l.gate = linear(ffn, width);
        l.up = linear(ffn, width);
        l.down = linear(width, ffn);
        l.attention_norm = vector(width);
        l.ffn_norm = vector(width);
        l.cosine = vector((int64_t)capacity * (rotary / 2));
        l.sine = vector((int64_t)capacity * (rotary / 2));
        if (options) {
            l.after_attention_norm = vector(width);
            l.after_ffn_norm = vector(width);
            l.q_norm = vector(head_dim);
            l.k_norm = vector(head_dim);
            l.window = i ? 0 : 5;
        }
        blocks.push_back(l);
    }
    const int64_t cached = (int64_t)layers * kv_heads * capacity * head_dim;
    Exact<float> keys(cached), values(cached);
    const Weight embedding(words, width, bits, width, ZERO_MIDDLE, true, false, pool);
    Model model{};
    model.layers = blocks.data();
    model.layer_count = layers;
    model.width = width;
    model.heads = heads;
    model.kv_heads = kv_heads;
    model.head_dim = head_dim;
    model.rotary = rotary;
    model.ffn = ffn;
    model.vocabulary = words;
    model.gelu = options;
    model.capacity = capacity;
    model.eps = 1e-5f;
    model.attention_scale = 0.3f;
    model.attention_cap = options ? 5.f : 0.f;
    model.logit_cap = options ? 3.f : 0.f;
    model.embedding_scale = options ? 6.5f : 1.f;
    model.embedding = &embedding.record;
    model.head = linear(words, width);
    model.final_norm = vector(width);
    model.keys = keys.get();
    model.values = values.get();
    // A prompt in two parts, some tokens, and the last place of the cache.
    int first = 0;
    for (int count : {7, 1, 1, 17, 1, 20, 1}) {
        Exact<int32_t> tokens(count);
        for (int i = 0; i < count; i++) tokens[i] = whole(words);
        const bool every = first % 2;
        Exact<float> logits((int64_t)(every ? count : 1) * words);
        const int next = ql_read(&model, tokens.get(), first, count, every, logits.get(), pool);
        if (next < 0 || next >= words) fail("no such token");
        finite(logits.get(), logits.count);
        first += count;
    }
    if (first != capacity) fail("the cache was not filled");
}

}  // namespace

int main(int arguments, char**) {
    written = arguments > 1;
    if (ql_init() != 0) fail("the operating system does not let this process use the level");
    for (int threads : {1, 2}) {
        void* pool = ql_pool_new(threads);
        linears(pool);
        large(pool);
        const bool writing = written;
        written = false;  // What is rounded on its way to a result can fall to the other side.
        solving(pool);
        written = writing;
        sampling(pool);
        moments(pool);
        for (const bool options : {false, true}) {
            decoder(16, EXACT, options, pool);
            decoder(4, EXACT, options, pool);
            written = false;
            decoder(16, INT8_BLOCK, options, pool);
            decoder(4, INT8_BLOCK, options, pool);
            for (int mode : {INT8_ROW, INT8_GIVEN, INT8_RANGE_ROW, INT8_RANGE, INT8_OUTLIERS})
                decoder(8, mode, options, pool);
            written = writing;
        }
        ql_pool_free(pool);
    }
    if (!written) std::puts("clean");
}
