// One token, or many, through all blocks in one call; or many through one block, step by step.
#include "decoder.h"

#include <algorithm>

#include "ops.h"
#include "tile.h"

namespace ql {

namespace {

struct Memory {
    Buffer x, h, q, k, v, out, gate, up, last;
    Input input;
};

struct Job {
    Linear linear;
    float* y;
};

// Row `row` of a packed matrix, float32 [columns].
void row_of(const Matrix& w, int row, float* out) {
    const int block = row / LANES, l = row % LANES;
    if (w.bits == 16) {
        const auto* p = (const uint16_t*)w.block(block);
        for (int k = 0; k < w.columns; k++) out[k] = from_bf16(p[k / 2 * 32 + l * 2 + k % 2]);
        return;
    }
    with_bits(w.bits, [&](auto bits) {
        constexpr int BITS = decltype(bits)::value;
        const uint8_t* p = w.block(block);
        for (int k0 = 0; k0 < w.columns; k0 += CHUNK, p += CHUNK * BITS * 2) {
            U8 steps[8];
            unpack_chunk<BITS>(p, steps);
            for (int k = k0; k < std::min(k0 + CHUNK, w.columns); k++) {
                const int g = std::min(k / w.group, w.groups() - 1);
                const uint8_t code = steps[(k - k0) / 4][4 * l + k % 4];
                const float v = w.table ? w.table[code & 15] : (float)code;
                const float s = w.scale(block, g)[l], z = w.zero_of(block, g)[l];
                out[k] = w.zero == ZERO_OFFSET ? s * v + z : s * (v - z);
            }
        }
    });
}

class Reader {
  public:
    // `x`: the residual stream, where it is not the reader's own.
    Reader(const Model& model, Memory& memory, int first, int count, Pool& pool, float* x = nullptr)
        : model_(model), memory_(memory), first_(first), count_(count), pool_(pool) {
        x_ = x ? x : memory.x.get<float>((int64_t)count * model.width);
        h_ = memory.h.get<float>((int64_t)count * std::max(model.width, model.ffn));
    }

    void embed(const int32_t* tokens) {
        pool_.run(count_, 8, [&](int64_t begin, int64_t end, int) {
            for (int64_t i = begin; i < end; i++) {
                float* x = x_ + i * model_.width;
                row_of(*model_.embedding, tokens[i], x);
                if (model_.embedding_scale != 1.f)
                    for (int k = 0; k < model_.width; k++) x[k] *= model_.embedding_scale;
            }
        });
    }

    void layer(int index) {
        const Layer& l = model_.layers[index];
        const int64_t a_layer = (int64_t)model_.kv_heads * model_.capacity * model_.head_dim;
        auto* out = memory_.out.get<float>((int64_t)count_ * std::max(q_width(), model_.width));
        normalise(x_, l.attention_norm);
        project(l, [&](auto jobs) { products(h_, model_.width, count_, jobs); });
        look_back(l, a_layer * index, 0, count_, out);
        products(out, q_width(), count_, {{l.o, h_}});
        add(l.after_attention_norm);
        normalise(x_, l.ffn_norm);
        gate(l);
        products(gate_, model_.ffn, count_, {{l.down, h_}});
        add(l.after_ffn_norm);
    }

    // The logits of the last token, or of every one.
    void answer(bool every, float* logits) {
        const int from = every ? 0 : count_ - 1, rows = count_ - from;
        auto* last = memory_.last.get<float>((int64_t)rows * model_.width);
        pool_.run(rows, 8, [&](int64_t begin, int64_t end, int) {
            for (int64_t i = begin; i < end; i++)
                rms_norm(x_ + (from + i) * model_.width, model_.final_norm, last + i * model_.width,
                         model_.width, model_.eps);
        });
        products(last, model_.width, rows, {{model_.head, logits}});
        if (model_.logit_cap > 0)
            pool_.run((int64_t)rows * model_.vocabulary, 4096, [&](int64_t begin, int64_t end, int) {
                for (int64_t i = begin; i < end; i++) logits[i] = softcap(logits[i], model_.logit_cap);
            });
    }

#if QL_LEVEL >= 4
    // See decoder.h.
    void step(const Layer& l, int which, const uint16_t* input, uint16_t* output, int length) {
        const auto multiply_all = [&](auto jobs) { products_of(input, model_.width, jobs); };
        switch (which) {
            case 0:
                normalise(x_, l.attention_norm);
                return round_rows(h_, model_.width, output);
            case 1: {
                auto* out = memory_.out.get<float>((int64_t)count_ * q_width());
                project(l, multiply_all);
                for (int from = 0; from < count_; from += length) look_back(l, 0, from, length, out);
                return round_rows(out, q_width(), output);
            }
            case 2:
                products_of(input, q_width(), {{l.o, h_}});
                add(l.after_attention_norm);
                normalise(x_, l.ffn_norm);
                return round_rows(h_, model_.width, output);
            case 3:
                take_bf16(memory_.input, input, count_, model_.width, pool_);
                return multiply_gated({l.gate.w, l.up.w, l.gate.bias, l.up.bias, model_.gelu != 0}, memory_.input,
                                      output, pool_);
            case 4:
                products_of(input, model_.ffn, {{l.down, h_}});
                return add(l.after_ffn_norm);
        }
    }
#endif

  private:
    template <class Body>
    void each_row(Body&& body) {
        pool_.run(count_, 4, [&](int64_t begin, int64_t end, int) {
            for (int64_t i = begin; i < end; i++) body(i);
        });
    }

    void normalise(const float* x, const float* weight) {
        each_row([&](int64_t i) {
            rms_norm(x + i * model_.width, weight, h_ + i * model_.width, model_.width, model_.eps);
        });
    }

    // Norm of each head where the family has one, then its rotation.
    void place(const Layer& l, float* heads, int count, const float* norm, int position) const {
        const int half = model_.rotary / 2;
        for (int h = 0; h < count; h++) {
            float* head = heads + h * model_.head_dim;
            if (norm) rms_norm(head, norm, head, model_.head_dim, model_.eps);
            rotate(head, l.cosine + (int64_t)position * half, l.sine + (int64_t)position * half,
                   model_.rotary);
        }
    }

    // Layers that read one input share its preparation.
    void products(const float* x, int columns, int rows, std::initializer_list<Job> jobs) {
        How prepared{-1, 0, 0, 0};
        bool tiled = false;
        for (const Job& job : jobs) {
            const Matrix& w = *job.linear.w;
            How how = job.linear.how;
            how.mode = mode_for(how.mode, rows, w.table != nullptr, w.bits);
            const bool tiles = on_tiles(w, how, rows);
            if (!(how == prepared) || tiles != tiled) {
                prepare(memory_.input, x, rows, columns, columns, how, tiles, pool_);
                prepared = how;
                tiled = tiles;
            }
            multiply(w, memory_.input, job.y, w.rows, job.linear.bias, pool_);
        }
    }

    // x += h, or its norm where the family norms what a sublayer adds.
    void add(const float* norm) {
        each_row([&](int64_t i) {
            float *x = x_ + i * model_.width, *h = h_ + i * model_.width;
            if (norm) rms_norm(h, norm, h, model_.width, model_.eps);
            for (int k = 0; k < model_.width; k++) x[k] += h[k];
        });
    }

    int q_width() const { return model_.heads * model_.head_dim; }
    int kv_width() const { return model_.kv_heads * model_.head_dim; }

    // Queries, keys and values; `multiply_all` does the products.
    template <class Products>
    void project(const Layer& l, Products&& multiply_all) {
        q_ = memory_.q.get<float>((int64_t)count_ * q_width());
        k_ = memory_.k.get<float>((int64_t)count_ * kv_width());
        v_ = memory_.v.get<float>((int64_t)count_ * kv_width());
        multiply_all(std::initializer_list<Job>{{l.q, q_}, {l.k, k_}, {l.v, v_}});
    }

    // Attention of `count` rows from `from` on, which are one sequence that goes on behind `first_`;
    // `at` is the layer's place in the cache.
    void look_back(const Layer& l, int64_t at, int64_t from, int count, float* out) {
        const Cache cache{model_.keys + at, model_.values + at, model_.kv_heads, model_.capacity,
                          model_.head_dim};
        float *q = q_ + from * q_width(), *k = k_ + from * kv_width(), *v = v_ + from * kv_width();
        pool_.run(count, 4, [&](int64_t begin, int64_t end, int) {
            for (int64_t i = begin; i < end; i++) {
                place(l, q + i * q_width(), model_.heads, l.q_norm, first_ + (int)i);
                place(l, k + i * kv_width(), model_.kv_heads, l.k_norm, first_ + (int)i);
                cache.put(first_ + (int)i, k + i * kv_width(), v + i * kv_width());
            }
        });
        const Attention attention{model_.heads, model_.head_dim, model_.attention_scale,
                                  model_.attention_cap, l.window};
        attend(attention, cache, q, out + from * q_width(), first_, count, pool_);
    }

    // What the down-projection reads: act(gate) * up.
    void gate(const Layer& l) {
        const int64_t size = (int64_t)count_ * model_.ffn;
        gate_ = memory_.gate.get<float>(size);
        auto* up = memory_.up.get<float>(size);
        products(h_, model_.width, count_, {{l.gate, gate_}, {l.up, up}});
        pool_.run(size, 4096, [&](int64_t begin, int64_t end, int) {
            int64_t i = begin;
            for (; i + LANES <= end; i += LANES) {
                const F g = load<F>(gate_ + i);
                store(gate_ + i, (model_.gelu ? gelu_tanh(g) : silu(g)) * load<F>(up + i));
            }
            for (; i < end; i++) {
                const F g = splat(gate_[i]);
                gate_[i] = (model_.gelu ? gelu_tanh(g) : silu(g))[0] * up[i];
            }
        });
    }

#if QL_LEVEL >= 4
    // Rows of float32 [count_][columns], rounded to bfloat16.
    void round_rows(const float* from, int columns, uint16_t* to) {
        each_row([&](int64_t i) {
            const float* row = from + i * columns;
            uint16_t* out = to + i * columns;
            for (int k = 0; k < columns; k += LANES) {
                const __mmask16 mask = columns - k < LANES ? (__mmask16)((1u << (columns - k)) - 1) : 0xffff;
                const __m256i v = (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(mask, row + k));
                _mm256_mask_storeu_epi16(out + k, mask, v);
            }
        });
    }

    void products_of(const uint16_t* x, int columns, std::initializer_list<Job> jobs) {
        take_bf16(memory_.input, x, count_, columns, pool_);
        for (const Job& job : jobs)
            multiply(*job.linear.w, memory_.input, job.y, job.linear.w->rows, job.linear.bias, pool_);
    }
#endif

    const Model& model_;
    Memory& memory_;
    const int first_, count_;
    Pool& pool_;
    float *x_, *h_, *q_, *k_, *v_, *gate_;
};

}  // namespace

void read(const Model& model, const int32_t* tokens, int first, int count, bool every, float* logits,
          Pool& pool) {
    static thread_local Memory memory;
    Reader reader(model, memory, first, count, pool);
    reader.embed(tokens);
    for (int i = 0; i < model.layer_count; i++) reader.layer(i);
    reader.answer(every, logits);
}

#if QL_LEVEL >= 4
void step(const Model& model, const Layer& layer, int which, float* x, const uint16_t* input,
          uint16_t* output, int sequences, int length, Pool& pool) {
    static thread_local Memory memory;
    constexpr int ROWS = 1024;  // what a core's second cache holds of them
    const int q_width = model.heads * model.head_dim;
    const int reads[] = {0, model.width, q_width, model.width, model.ffn};
    const int gives[] = {model.width, q_width, model.width, model.ffn, 0};
    const int together = std::max(1, ROWS / length);
    for (int from = 0; from < sequences; from += together) {
        const int64_t row = (int64_t)from * length;
        const int count = std::min(together, sequences - from) * length;
        Reader reader(model, memory, 0, count, pool, x + row * model.width);
        reader.step(layer, which, input + row * reads[which], output + row * gives[which], length);
    }
    pool.run(pool.size(), 1, [](int64_t, int64_t, int) {}, false);  // torch has the cores next
}
#endif

}  // namespace ql
