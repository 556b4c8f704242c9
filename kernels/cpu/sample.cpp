// One token drawn from softmax(logits / temperature), without sorting the vocabulary.
#include <algorithm>
#include <vector>

#include "ops.h"

namespace ql {

namespace {

constexpr int WIDE = 8;
using D = double __attribute__((vector_size(64), aligned(64)));
using Bits = uint64_t __attribute__((vector_size(64), aligned(64)));
using Narrow = float __attribute__((vector_size(32), aligned(32)));

inline D splat_wide(double x) { return D{} + x; }

// e^x for every lane and x <= 0, within 2 units in the last place; 0 below -708, where float64 ends.
// As `exponential` in ops.h, with the terms of the series that float64 needs.
inline D exponential(D x) {
    const D bottom = splat_wide(-708.);
    const auto under = x < bottom;
    x = under ? bottom : x;
    const D magic = splat_wide(0x1.8p52);
    const D shifted = x * splat_wide(0x1.71547652b82fep0) + magic, n = shifted - magic;
    const D r = (x - n * splat_wide(0x1.62e42fee00000p-1)) - n * splat_wide(0x1.a39ef35793c76p-33);
    D p = splat_wide(1. / 6227020800);
    for (const double factorial : {479001600., 39916800., 3628800., 362880., 40320., 5040., 720., 120., 24., 6., 2.})
        p = p * r + splat_wide(1. / factorial);
    p = p * r * r + r + splat_wide(1.);
    const D value = p * (D)(((Bits)shifted + 1023) << 52);
    return under ? D{} : value;
}

// A token that may be drawn; its weight is e^((logit - largest) / temperature).
struct Candidate {
    double weight;
    float logit;
    int32_t token;
};

bool before(const Candidate& a, const Candidate& b) {
    return a.logit != b.logit ? a.logit > b.logit : a.token < b.token;
}

struct Weights {
    const float* logits;
    int64_t count;
    double largest, temperature;

    D at(int64_t i) const {
        Narrow v;
        if (i + WIDE <= count) {
            v = load<Narrow>(logits + i);
        } else {
            v = Narrow{} - INFINITY;
            for (int64_t l = 0; i + l < count; l++) v[l] = logits[i + l];
        }
        return exponential((__builtin_convertvector(v, D) - splat_wide(largest)) / splat_wide(temperature));
    }

    double total() const {
        D sums{};
        for (int64_t i = 0; i < count; i += WIDE) sums += at(i);
        double all = 0;
        for (int l = 0; l < WIDE; l++) all += sums[l];
        return all;
    }

    // All tokens whose weight is at least `least`, and perhaps some below.
    void gather(double least, std::vector<Candidate>& found) const {
        const float cut = std::nextafter((float)(largest + temperature * std::log(least)), -INFINITY);
        constexpr int64_t BLOCK = 4 * LANES;
        for (int64_t from = 0; from < count; from += BLOCK) {
            const int64_t to = std::min(from + BLOCK, count);
            if (to - from == BLOCK) {
                F top = load<F>(logits + from);
                for (int l = 1; l < 4; l++) top = at_least(load<F>(logits + from + l * LANES), top);
                if (ql::largest(top) < cut) continue;
            }
            for (int64_t i = from; i < to; i += WIDE) {
                const int64_t end = std::min(i + WIDE, to);
                if (*std::max_element(logits + i, logits + end) < cut) continue;
                const D weight = at(i);
                for (int64_t k = i; k < end; k++)
                    if (logits[k] >= cut && weight[k - i] > 0)
                        found.push_back({weight[k - i], logits[k], (int32_t)k});
            }
        }
    }
};

// The first of the candidates, in their order, up to which the mass is enough; that mass. The last
// one where rounding leaves none. Halves are split off by their mass, so nothing is sorted but some.
template <class Enough>
Candidate* reach(Candidate* first, Candidate* last, double& mass, Enough&& enough) {
    mass = 0;
    while (last - first > 64) {
        Candidate* middle = first + (last - first) / 2;
        std::nth_element(first, middle, last, before);
        double upper = mass;
        for (Candidate* c = first; c < middle; c++) upper += c->weight;
        if (enough(upper)) {
            last = middle;
        } else {
            mass = upper;
            first = middle;
        }
    }
    std::sort(first, last, before);
    for (; first < last; first++) {
        mass += first->weight;
        if (enough(mass)) return first;
    }
    return last - 1;
}

}  // namespace

}  // namespace ql

using namespace ql;

extern "C" {

// See `sample` in reference.py; temperature > 0, 0 < top_p <= 1, 0 <= uniform < 1. -1 where a logit is
// NaN, or the largest is infinite: there are no probabilities then.
int ql_sample(const float* logits, int64_t count, double temperature, double top_p, double uniform, void*) {
    static thread_local std::vector<Candidate> candidates;
    const Weights weights{logits, count, logits[argmax(logits, count)], temperature};
    const double total = weights.total();
    if (!(total < INFINITY)) return -1;
    // What is left out weighs at most half of what comes after the token that is looked for.
    const double share = top_p < 1 ? top_p : uniform;
    candidates.clear();
    weights.gather((1 - share) * total / (2. * (double)count), candidates);
    Candidate *first = candidates.data(), *last = first + candidates.size();
    double mass = total, at;
    if (top_p < 1) last = reach(first, last, mass, [&](double m) { return m >= top_p * total; }) + 1;
    const double drawn = uniform * mass;
    return reach(first, last, at, [&](double m) { return m > drawn; })->token;
}

}  // extern "C"
