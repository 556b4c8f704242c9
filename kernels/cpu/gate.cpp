// A gate and what it lets through, in one pass on AMX tiles: their sums never leave the first cache, where
// each alone would write and read float32 of four times the size of what comes out.
#include <algorithm>

#include "linear.h"
#include "ops.h"
#include "piece.h"

#if QL_LEVEL >= 4
namespace ql {

void multiply_gated(const Gated& g, const Input& in, uint16_t* y, Pool& pool) {
    const int rows = g.gate->rows, tiles = g.gate->padded() / CHUNK, m_tiles = (in.rows + TILE - 1) / TILE;
    const int64_t a_row = (int64_t)in.padded * TILE;
    const int m_block = std::max<int>(2, (int)(INPUT_BYTES / (a_row * 2)) & ~1);
    pool.run(g.gate->row_blocks(), 2, [&](int64_t first, int64_t last, int) {
        configure_tiles();
        alignas(64) Sums sums;
        for (int m_first = 0; m_first < m_tiles; m_first += m_block)
            for (int n = (int)first; n < (int)last; n++) {
                const int at = n * LANES;
                const __mmask16 mask = (__mmask16)((1u << std::min(LANES, rows - at)) - 1);
                const auto bias = [&](const float* from) {
                    return from ? (F)_mm512_maskz_loadu_ps(mask, from + at) : F{};
                };
                const F gate_bias = bias(g.gate_bias), up_bias = bias(g.up_bias);
                Piece piece{};
                piece.w_high[0] = (const uint16_t*)g.gate->block(n);
                piece.w_high[1] = (const uint16_t*)g.up->block(n);
                for (int m = m_first; m < std::min(m_first + m_block, m_tiles); m += 2) {
                    for (int h = 0; h < 2; h++) piece.x_high[h] = in.high + std::min(m + h, m_tiles - 1) * a_row;
                    piece.run(tiles, sums);
                    for (int row = m * TILE; row < std::min(in.rows, (m + 2) * TILE); row++) {
                        const auto& both = sums[row / TILE - m];
                        const F gate = load<F>(both[0] + row % TILE * TILE) + gate_bias;
                        const F up = load<F>(both[1] + row % TILE * TILE) + up_bias;
                        const __m512 v = (__m512)((g.gelu ? gelu_tanh(gate) : silu(gate)) * up);
                        _mm256_mask_storeu_epi16(y + (int64_t)row * rows + at, mask, (__m256i)_mm512_cvtneps_pbh(v));
                    }
                }
            }
        _tile_release();
    });
}

}  // namespace ql
#endif
