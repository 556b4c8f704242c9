// Codes to planes and back; see matrix.h for the layout.
#include "pack.h"

namespace ql {

namespace {

// Byte and shift of the piece of `width` bits of one code, inside its plane of a chunk.
struct Place {
    int64_t byte;
    int shift;
};
inline Place place(int width, int row, int column) {
    const int step = column / 4, a_register = 8 / width;
    return {(int64_t)(step / a_register) * 64 + row * 4 + column % 4, step % a_register * width};
}

template <class Piece>
void each_plane(int bits, Piece&& piece) {
    int offset = 0, left = bits;
    for (int width = 8; width >= 1; width /= 2)
        if (bits & width) {
            left -= width;
            piece(width, offset, left);
            offset += 64 * width;
        }
}

}  // namespace

void pack(const uint8_t* codes, int rows, int columns, int bits, int row_block, uint8_t* out) {
    const int padded = (columns + COLUMN_PAD - 1) / COLUMN_PAD * COLUMN_PAD;
    uint8_t* to = out + (int64_t)row_block * (padded / 8 * bits * LANES);
    std::memset(to, 0, (size_t)padded / 8 * bits * LANES);
    for (int l = 0; l < LANES && row_block * LANES + l < rows; l++) {
        const uint8_t* from = codes + ((int64_t)row_block * LANES + l) * columns;
        each_plane(bits, [&](int width, int offset, int shift) {
            const int mask = (1 << width) - 1;
            for (int k = 0; k < columns; k++) {
                const Place at = place(width, l, k % CHUNK);
                uint8_t* chunk = to + (int64_t)(k / CHUNK) * CHUNK * bits * 2 + offset;
                chunk[at.byte] |= (uint8_t)((from[k] >> shift & mask) << at.shift);
            }
        });
    }
}

void unpack(const uint8_t* planes, int rows, int columns, int bits, int row_block, uint8_t* codes) {
    const int padded = (columns + COLUMN_PAD - 1) / COLUMN_PAD * COLUMN_PAD;
    const uint8_t* from = planes + (int64_t)row_block * (padded / 8 * bits * LANES);
    for (int l = 0; l < LANES && row_block * LANES + l < rows; l++) {
        uint8_t* to = codes + ((int64_t)row_block * LANES + l) * columns;
        std::memset(to, 0, columns);
        each_plane(bits, [&](int width, int offset, int shift) {
            const int mask = (1 << width) - 1;
            for (int k = 0; k < columns; k++) {
                const Place at = place(width, l, k % CHUNK);
                const uint8_t* chunk = from + (int64_t)(k / CHUNK) * CHUNK * bits * 2 + offset;
                to[k] |= (uint8_t)((chunk[at.byte] >> at.shift & mask) << shift);
            }
        });
    }
}

// bfloat16 weights [rows][columns] to [rows / 16][padded / 2][16][2].
void pack_bf16(const uint16_t* w, int rows, int columns, int row_block, uint16_t* out) {
    const int padded = (columns + COLUMN_PAD - 1) / COLUMN_PAD * COLUMN_PAD;
    uint16_t* to = out + (int64_t)row_block * padded * LANES;
    std::memset(to, 0, sizeof(uint16_t) * padded * LANES);
    for (int l = 0; l < LANES && row_block * LANES + l < rows; l++) {
        const uint16_t* from = w + ((int64_t)row_block * LANES + l) * columns;
        for (int k = 0; k < columns; k++) to[k / 2 * 32 + l * 2 + k % 2] = from[k];
    }
}

}  // namespace ql
