// Two rows of logits against each other, in two passes over memory that is in the cache.
#include "ops.h"
#include "pool.h"

namespace ql {

namespace {

struct Row {
    const float* at;
    int64_t count;
    int64_t best = 0;
    double log_total = 0;

    // Where it is largest (the first of equals), and log sum exp.
    void read() {
        best = argmax(at, count);
        const float peak = at[best];
        double total = 0;
        each_block([&](int64_t from, int64_t to) {
            F sums{};
            for (int64_t k = from; k < to; k += LANES) sums += exponential(get(k, to) - splat(peak));
            total += sum(sums);
        });
        log_total = peak + std::log(total);
    }

    F get(int64_t k, int64_t to) const {
        if (k + LANES <= to) return load<F>(at + k);
        F v = splat(-INFINITY);
        for (int64_t l = 0; k + l < to; l++) v[l] = at[k + l];
        return v;
    }

    // Sums of float32 stay short; what they come to is added up in float64.
    template <class Body>
    void each_block(Body&& body) const {
        constexpr int64_t BLOCK = 2048;
        for (int64_t from = 0; from < count; from += BLOCK)
            body(from, from + BLOCK < count ? from + BLOCK : count);
    }
};

}  // namespace

}  // namespace ql

using namespace ql;

extern "C" {

// For row m of two logits p and q [rows][count]:
//     loss = log sum exp q - q[target]      apart = sum_v P_v (log P_v - log Q_v)      P = softmax p
// and whether both are largest at the same place. A token that p rules out adds nothing.
void ql_compare_logits(const float* p, const float* q, const int64_t* targets, int64_t rows,
                       int64_t count, double* loss, double* apart, uint8_t* same, void* pool) {
    ((Pool*)pool)->run(rows, 1, [&](int64_t first, int64_t last, int) {
        for (int64_t m = first; m < last; m++) {
            Row a{p + m * count, count}, b{q + m * count, count};
            a.read();
            b.read();
            loss[m] = b.log_total - b.at[targets[m]];
            same[m] = a.best == b.best;
            double total = 0;
            const F base = splat((float)a.log_total);
            a.each_block([&](int64_t from, int64_t to) {
                F sums{};
                for (int64_t k = from; k < to; k += LANES) {
                    const F x = a.get(k, to), weight = exponential(x - base), term = weight * (x - b.get(k, to));
                    sums += weight > splat(0.f) ? term : F{};
                }
                total += sum(sums);
            });
            apart[m] = total - (a.log_total - b.log_total);
        }
    }, false);
}

}  // extern "C"
