// A gate and what it lets through, in one pass on tiles: their sums never leave the first cache, where
// each alone would write and read float32 of four times the size of what comes out.
#include "linear.h"
#include "ops.h"
#include "tile_loop.h"

#if QL_LEVEL >= 4
namespace ql {

namespace {

// As `Writer`, for pieces whose first block is the gate's and whose second one what it lets through.
class GateWriter {
  public:
    GateWriter(const Gated& gated, int inputs, uint16_t* y) : g_(gated), inputs_(inputs), y_(y) {}

    void columns(int n, int) {
        next_ ^= 1;
        Columns& c = columns_[next_];
        c.first = n / 2 * LANES;
        c.mask = (__mmask16)((1u << std::min(LANES, g_.gate->rows - c.first)) - 1);
        c.gate = bias(g_.gate_bias, c);
        c.up = bias(g_.up_bias, c);
    }

    void due(const int32_t* sums, int m_tile) {
        now_ = &columns_[next_];
        sums_ = (const float*)sums;
        m_ = m_tile * TILE;
        last_ = std::min(inputs_, m_ + SIDE);
        turn_ = m_ + TILE;
    }

    inline void rows(int count) {
        for (; count > 0 && m_ < last_; count--) {
            const F gate = load<F>(sums_) + now_->gate, up = load<F>(sums_ + TILE * TILE) + now_->up;
            const __m512 v = (__m512)((g_.gelu ? gelu_tanh(gate) : silu(gate)) * up);
            uint16_t* to = y_ + (int64_t)m_ * g_.gate->rows + now_->first;
            _mm256_mask_storeu_epi16(to, now_->mask, (__m256i)_mm512_cvtneps_pbh(v));
            m_++;
            sums_ += m_ == turn_ ? TILE + TILE * TILE : TILE;
        }
    }
    void rest() { rows(SIDE); }

  private:
    struct Columns {
        F gate, up;
        int first;
        __mmask16 mask;
    };
    static F bias(const float* from, const Columns& c) {
        return from ? (F)_mm512_maskz_loadu_ps(c.mask, from + c.first) : F{};
    }

    const Gated& g_;
    const int inputs_;
    uint16_t* const y_;
    Columns columns_[2] = {};
    int next_ = 0;
    const Columns* now_ = columns_;
    const float* sums_ = nullptr;
    int m_ = 0, last_ = 0, turn_ = 0;
};

}  // namespace

void multiply_gated(const Gated& g, const Input& in, uint16_t* y, Pool& pool) {
    const int64_t row = (int64_t)in.padded * TILE * 2;
    pool.run(g.gate->row_blocks(), 2, [&](int64_t first, int64_t last, int) {
        configure_tiles();
        GateWriter writer(g, in.rows, y);
        // Blocks are counted twice, once in each of both weights.
        const Sides sides{(const uint8_t*)in.high, row, (in.rows + TILE - 1) / TILE, 2 * (int)first, 2 * (int)last};
        const auto pair_at = [&](int n, int64_t k, int64_t) {
            const int block = n / 2;
            return Pair{g.gate->block(block) + k, g.up->block(block) + k,
                        block + 1 < last ? g.gate->block_bytes() : 0};
        };
        multiply_tiles<false>(sides, pair_at, writer);
        release_tiles();
    });
}

}  // namespace ql
#endif
