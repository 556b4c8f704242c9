// The input of a linear layer, prepared once for every layer that reads it.
//
//     int8:  x[m][k] = step[m][k / 32] * (q[m][k] + shift[m])         q in [-127, 127] or [-128, 127]
//
// Steps are one a block of 32 columns ("int8 per block"), or the same for a whole row ("token",
// "tensor"); `shift` is the zero-point of an asymmetric input, else absent.
//
//     exact: x[m][k] = step[m][k / 32] * (256 q[m][k] + q_low[m][k])  steps are powers of two
//
// Two bytes hold 15 bits and a sign below the block's largest |x|: numbers of up to 8 significant bits
// (bfloat16) are held exactly down to 1/128 of it, whole numbers up to 16,256 always.
#pragma once

#include <cstdint>
#include <vector>

#include "matrix.h"
#include "memory.h"

namespace ql {

enum Mode : int32_t {
    EXACT = 0,         // two bytes a block of 32 columns; on AMX tiles two bfloat16 parts; else float32
    INT8_BLOCK = 1,    // a step a block of 32 columns, max |x| / 127
    INT8_ROW = 2,      // a step a row, max |x| / 127
    INT8_GIVEN = 3,    // one step and zero-point for everything, known beforehand
    BF16 = 4,          // bfloat16
    INT8_RANGE_ROW = 5,  // step and zero-point of [min(x, 0), max(x, 0)], a row
    INT8_RANGE = 6,      // the same of the whole input
    INT8_OUTLIERS = 7,   // INT8_ROW but for columns where some |x| reaches the threshold
};

// How an input is to be prepared; step and zero serve INT8_GIVEN, threshold INT8_OUTLIERS.
struct How {
    int32_t mode;
    float step, zero, threshold;

    bool int8() const { return mode != EXACT && mode != BF16; }
    bool has_zero() const { return mode == INT8_GIVEN || mode == INT8_RANGE_ROW || mode == INT8_RANGE; }
    bool operator==(const How& o) const {
        return mode == o.mode && step == o.step && zero == o.zero && threshold == o.threshold;
    }
};

struct Input {
    int rows = 0, columns = 0, padded = 0;
    const float* x = nullptr;  // [rows][stride], always there
    int64_t stride = 0;
    bool int8 = false;
    const int8_t* q = nullptr;     // [rows][padded]
    const int8_t* q_low = nullptr; // [rows][padded], EXACT only
    const int16_t* wide = nullptr; // 256 q + q_low, in the place of both, where many rows are multiplied so
    const float* step = nullptr;   // [rows][padded / 32]
    const float* total = nullptr;  // [rows][padded / 32]: the sum of x, as rounded, in the block
    const float* shift = nullptr;  // [rows] or null
    // Instead of all that, where tiles will be multiplied, in their order [rows / 16][padded /
    // columns a tile][16 rows][64 bytes]: x ~ high + low in bfloat16 (32 columns a tile), or q (64
    // columns) with the step and the sum of x, as rounded, of each row.
    const uint16_t *high = nullptr, *low = nullptr;
    const int8_t* q_tiles = nullptr;
    const float *row_step = nullptr, *row_total = nullptr;  // [rows]
    std::vector<int> outliers;  // columns that are left out of q, for INT8_OUTLIERS
    Buffer q_, q_low_, wide_, step_, total_, shift_, padded_, high_, low_, tiles_, row_step_, row_total_;

    int blocks() const { return padded / CHUNK; }
};

// Round rows first to last - 1 of x to int8. `how` has no INT8_RANGE (which became INT8_GIVEN).
void quantize(Input& in, const How& how, int first, int last);
// The two bytes of EXACT, apart or as one number. A block with a number that is not finite gets a step that is not either.
void quantize_exact(Input& in, int first, int last);
// INT8_GIVEN with the step and zero-point of the whole input.
How range_of_all(const Input& in);
// The columns with some |x| >= threshold.
void find_outliers(Input& in, float threshold);

}  // namespace ql
