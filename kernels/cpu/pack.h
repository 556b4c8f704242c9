// Codes to planes and back, one block of 16 rows a call.
#pragma once

#include "matrix.h"

namespace ql {

void pack(const uint8_t* codes, int rows, int columns, int bits, int row_block, uint8_t* out);
void unpack(const uint8_t* planes, int rows, int columns, int bits, int row_block, uint8_t* codes);
void pack_bf16(const uint16_t* w, int rows, int columns, int row_block, uint16_t* out);

}  // namespace ql
