// A Llama-like decoder on packed weights: what Python fills in, and what runs it.
#pragma once

#include "attention.h"
#include "linear.h"

namespace ql {

// A linear layer: its matrix, its bias or null, and how its input enters.
struct Linear {
    const Matrix* w;
    const float* bias;
    How how;
};

// One block. Norm weights are float32 with any offset added; absent ones are null.
struct Layer {
    Linear q, k, v, o, gate, up, down;
    const float *attention_norm, *ffn_norm;
    const float *after_attention_norm, *after_ffn_norm;  // Gemma 2 and 3, before the residual
    const float *q_norm, *k_norm;                        // [head_dim], Qwen 3 and Gemma 3
    const float *cosine, *sine;                          // [positions][rotary / 2]
    int32_t window;                                      // 0: sees everything
};

struct Model {
    const Layer* layers;
    int32_t layer_count, width, heads, kv_heads, head_dim, rotary, ffn, vocabulary;
    int32_t gelu;        // 0: SiLU
    int32_t capacity;    // positions of the cache, a multiple of 16
    float eps, attention_scale, attention_cap, logit_cap, embedding_scale;
    const Matrix* embedding;
    Linear head;
    const float* final_norm;
    float *keys, *values;  // of all layers: [layers] of what `Cache` describes
};

// Read `count` tokens after the `first` that are in the cache. Logits of the last token, or of every
// one, go to `logits` [1 or count][vocabulary].
void read(const Model& model, const int32_t* tokens, int first, int count, bool every, float* logits,
          Pool& pool);

#if QL_LEVEL >= 4
// One block in five steps, between which somebody may look at what its linears read, and change them.
// x: the residual stream [sequences * length][width], float32, read and written; `input` and `output`,
// bfloat16, are what the linears of this step and of the next one read:
//     0  output = norm(x)                          [width]         read by q, k, v
//     1  output = attention(q, k, v of input)      [q width]       o
//     2  x += o(input); output = norm(x)           [width]         gate, up
//     3  output = act(gate(input)) * up(input)     [ffn]           down
//     4  x += down(input)
// Linears are bfloat16. The cache serves one sequence at a time.
void step(const Model& model, const Layer& layer, int which, float* x, const uint16_t* input,
          uint16_t* output, int sequences, int length, Pool& pool);
#endif

}  // namespace ql
