// y[m][n] = sum_k x[m][k] w[n][k] + bias[n]: every layer's product, for one row or many.
#pragma once

#include "input.h"
#include "pool.h"

namespace ql {

// Make `in` ready for products with matrices of `columns` columns in `mode`: int8 codes or bfloat16
// parts, for tiles or for vectors. x: [rows][stride] float32; pointers into it are kept.
void prepare(Input& in, const float* x, int rows, int columns, int64_t stride, How how, bool tiles,
             Pool& pool);

// The product; `in` was prepared in a mode that suits w (see `mode_for`). y: [rows][y_stride].
void multiply(const Matrix& w, const Input& in, float* y, int64_t y_stride, const float* bias,
              Pool& pool);

// The mode that really runs for so many rows: codebooks take no int8 inputs, and with AMX many rows are
// faster, and more exact, in bfloat16 than in int8 a block.
int mode_for(int mode, int rows, bool table, int bits);

// Whether the product of so many rows runs on tiles; `how` has the mode that really runs. int8 inputs do
// where the sums run through all columns: with codes of 8 bits and one grid a row. Two bfloat16 parts
// ("exact") only pay with AMX.
bool on_tiles(const Matrix& w, const How& how, int rows);

// Rows that are multiplied together on tiles: fewer take the path for one row. Codes have to be made into
// tiles of bfloat16 first, which costs as much as eight rows without AMX.
constexpr int TILE_FROM = 6, CODES_FROM = QL_LEVEL >= 5 ? TILE_FROM : 16;

// Whether there is a path of its own for many rows whose inputs have a step for every 32 columns, and
// from how many on it is taken.
constexpr bool STEPPED = QL_LEVEL == 3 || QL_LEVEL == 4;
constexpr int STEPPED_FROM = 16;

// That path, for row blocks first to last - 1; groups are whole blocks of 32 columns.
void multiply_stepped(const Matrix& w, const Input& in, int first, int last, float* y, int64_t y_stride,
                      const float* bias);

#if QL_LEVEL >= 3
// The input in the order of tiles, int8 (`how` has no INT8_RANGE), and its product for row blocks first to
// last - 1.
void quantize_tiles(Input& in, const How& how, Pool& pool);
void tiles_int8(const Matrix& w, const Input& in, int first, int last, float* y, int64_t y_stride,
                const float* bias);
#endif

#if QL_LEVEL >= 4
// As `prepare` in mode BF16, of x [rows][columns] that is bfloat16 already; for many rows only.
void take_bf16(Input& in, const uint16_t* x, int rows, int columns, Pool& pool);
// y = act(gate x + bias) * (up x + bias), rounded to bfloat16: [rows of x][rows of the weights]. Weights
// are bfloat16, biases may be null; `in` is from `take_bf16`.
struct Gated {
    const Matrix *gate, *up;
    const float *gate_bias, *up_bias;
    bool gelu;  // else SiLU
};
void multiply_gated(const Gated& gated, const Input& in, uint16_t* y, Pool& pool);
// The same in one or two bfloat16 parts.
void arrange_tiles(Input& in, bool two, Pool& pool);
void tiles_bf16(const Matrix& w, const Input& in, int first, int last, float* y, int64_t y_stride,
                const float* bias);
#endif

}  // namespace ql
