// The input of a linear layer, prepared once for every layer that reads it.
//
//     int8:  x[m][k] = step[m][k / 32] * (q[m][k] + shift[m])         q in [-127, 127] or [-128, 127]
//
// Steps are one a block of 32 columns ("int8 per block"), or the same for a whole row ("token",
// "tensor"); `shift` is the zero-point of an asymmetric input, else absent.
#pragma once

#include <cstdint>
#include <vector>

#include "matrix.h"

namespace ql {

enum Mode : int32_t { EXACT = 0, INT8_BLOCK = 1, INT8_ROW = 2, INT8_GIVEN = 3, BF16 = 4 };

struct Buffer {
    // Memory that grows and is kept; 64-byte aligned.
    template <class T>
    T* get(int64_t count) {
        int64_t bytes = count * (int64_t)sizeof(T) + 64;
        if ((int64_t)data_.size() < bytes) data_.resize(bytes);
        auto address = (uintptr_t)data_.data();
        return (T*)((address + 63) & ~(uintptr_t)63);
    }

  private:
    std::vector<char> data_;
};

struct Input {
    int rows = 0, columns = 0, padded = 0;
    const float* x = nullptr;  // [rows][stride], always there
    int64_t stride = 0;
    bool int8 = false;
    const int8_t* q = nullptr;     // [rows][padded]
    const float* step = nullptr;   // [rows][padded / 32]
    const float* total = nullptr;  // [rows][padded / 32]: step times the sum of q in the block
    const float* shift = nullptr;  // [rows] or null
    // In the order of AMX tiles, [rows / 16][padded / columns a tile][16 rows][64 bytes], where tiles
    // will be multiplied: x ~ high + low in bfloat16 (32 columns a tile), or q (64 columns).
    const uint16_t *high = nullptr, *low = nullptr;
    const int8_t* q_tiles = nullptr;
    const float* row_total = nullptr;  // [rows]: the sum of `total`, beside q_tiles
    Buffer q_, step_, total_, shift_, padded_, high_, low_, tiles_, row_total_;

    int blocks() const { return padded / CHUNK; }
};

// Round x to int8 as `mode` says; given_step and given_zero serve INT8_GIVEN.
void quantize(Input& in, int mode, const float* given_step, const float* given_zero, int first, int last);

}  // namespace ql
