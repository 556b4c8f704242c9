// The C ABI that Python calls through ctypes. Pointers are the caller's; nothing is copied or kept.
#include "decoder.h"
#include "ops.h"
#include "pack.h"

#if QL_LEVEL >= 5
#include <sys/syscall.h>
#include <unistd.h>
#endif

using namespace ql;

namespace {

int64_t packed_bytes(int rows, int columns, int bits) {
    Matrix shape{};
    shape.rows = rows;
    shape.columns = columns;
    shape.bits = bits;
    return shape.block_bytes() * shape.row_blocks();
}

}  // namespace

extern "C" {

// Called once. 0 when the machine lets this process use what it was compiled for.
int ql_init() {
#if QL_LEVEL >= 5
    constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;  // Linux: arch_prctl(2)
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0 ? 0 : 1;
#else
    return 0;
#endif
}

int ql_level() { return QL_LEVEL; }

void* ql_pool_new(int threads) { return new Pool(threads); }
void ql_pool_free(void* pool) { delete (Pool*)pool; }

// See memory.h.
void ql_prefer_huge_pages(void* data, int64_t bytes) { prefer_huge_pages(data, bytes); }

void ql_pack(const uint8_t* codes, int rows, int columns, int bits, uint8_t* out, void* pool) {
    ql_prefer_huge_pages(out, packed_bytes(rows, columns, bits));
    ((Pool*)pool)->run((rows + LANES - 1) / LANES, 1, [&](int64_t first, int64_t last, int) {
        for (int64_t b = first; b < last; b++) pack(codes, rows, columns, bits, (int)b, out);
    });
}

void ql_unpack(const uint8_t* planes, int rows, int columns, int bits, uint8_t* codes, void* pool) {
    ((Pool*)pool)->run((rows + LANES - 1) / LANES, 1, [&](int64_t first, int64_t last, int) {
        for (int64_t b = first; b < last; b++) unpack(planes, rows, columns, bits, (int)b, codes);
    });
}

void ql_pack_bf16(const uint16_t* w, int rows, int columns, uint16_t* out, void* pool) {
    ql_prefer_huge_pages(out, packed_bytes(rows, columns, 16));
    ((Pool*)pool)->run((rows + LANES - 1) / LANES, 1, [&](int64_t first, int64_t last, int) {
        for (int64_t b = first; b < last; b++) pack_bf16(w, rows, columns, (int)b, out);
    });
}

int ql_mode_for(int mode, int rows, int table, int bits) {
    return mode_for(mode, rows, table != 0, bits);
}

// y[rows][w.rows] = x[rows][w.columns] w^T + bias.
void ql_linear(const Matrix* w, const float* x, int64_t rows, float* y, const How* how, const float* bias,
               void* pool) {
    static thread_local Input in;
    Pool& threads = *(Pool*)pool;
    How real = *how;
    real.mode = mode_for(how->mode, (int)rows, w->table != nullptr, w->bits);
    prepare(in, x, (int)rows, w->columns, w->columns, real, on_tiles(*w, real, (int)rows), threads);
    multiply(*w, in, y, w->rows, bias, threads);
}

// Read tokens after the `first` in the model's cache; see decoder.h. Returns the most likely next
// token (the lowest among equals).
int ql_read(const Model* model, const int32_t* tokens, int first, int count, int every, float* logits,
            void* pool) {
    read(*model, tokens, first, count, every != 0, logits, *(Pool*)pool);
    const float* last = logits + (every ? (int64_t)(count - 1) * model->vocabulary : 0);
    return (int)argmax(last, model->vocabulary);
}

#if QL_LEVEL >= 4
// A step of one block; see decoder.h.
void ql_step(const Model* model, const Layer* layer, int64_t which, float* x, const uint16_t* input,
             uint16_t* output, int64_t sequences, int64_t length, void* pool) {
    step(*model, *layer, (int)which, x, input, output, (int)sequences, (int)length, *(Pool*)pool);
}
#endif

}  // extern "C"
