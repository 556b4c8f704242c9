// The product of many rows on tiles, for bytes and for bfloat16 alike: a tile is 16 rows of 64 bytes.
// A piece is 32 rows of the input by 32 of the weight, four sums of 16 x 16, so that every tile is used
// twice.
//
// With AMX, a product of tiles from the first cache is as fast as the tiles can be; the second one feeds three
// quarters of that. So of the two blocks of weight that all rows pass by, as much as fits stays in the
// first cache, and everything else is loaded with a hint that keeps it from pushing that out. The outputs
// of a piece are written a row at a time between the products of the next one: written at once, they fill
// the buffers that loads wait for. Large outputs pass the caches by: they would push the input out of them.
#pragma once

#include <algorithm>

#include "input.h"
#include "panels.h"
#include "tile.h"

#if QL_LEVEL >= 3
namespace ql {

constexpr int64_t INPUT_BYTES = 1 << 20;  // of the input, while all of the weight passes by: stays in L2
constexpr int MOST_TILES = 32;            // of its rows
constexpr int SIDE = 2 * TILE, SUMS = SIDE * SIDE;

// Writes what the sums of a piece mean. `Meaning` reads what it needs of a block of weight into a part e of
// its `Columns`, and makes 16 outputs of row m of the input from 16 sums.
template <class Meaning>
class Writer {
  public:
    Writer(const Meaning& meaning, int outputs, int rows, float* y, int64_t stride, const float* bias)
        : meaning_(meaning), outputs_(outputs), rows_(rows), y_(y), stride_(stride), bias_(bias) {
        const bool aligned = (uintptr_t)y % 64 == 0 && stride % LANES == 0;
        stream_ = aligned && (int64_t)rows * stride * 4 > LARGE;
    }
    ~Writer() { _mm_sfence(); }

    // The pieces that come are of blocks n to n + width - 1. Rows may still be due of those before.
    void columns(int n, int width) {
        next_ ^= 1;
        Columns& c = columns_[next_];
        c.first = n * LANES;
        for (int e = 0; e < 2; e++) {
            const int count = e < width ? std::min(LANES, outputs_ - (n + e) * LANES) : 0;
            c.mask[e] = (__mmask16)((1u << count) - 1);
            if (!count) continue;
            meaning_.read(n + e, e, c.part);
            c.bias[e] = bias_ ? (F)_mm512_maskz_loadu_ps(c.mask[e], bias_ + c.first + e * LANES) : F{};
        }
    }

    // Of rows m_tile * 16 and up: [2][2][16][16].
    void due(const int32_t* sums, int m_tile) {
        now_ = &columns_[next_];
        sums_ = sums;
        m_ = m_tile * TILE;
        left_ = std::min(SIDE, rows_ - m_);
        turn_ = left_ - TILE;
        to_ = y_ + m_ * stride_ + now_->first;
        fast_ = stream_ && now_->mask[1] == 0xffff;
    }

    inline void rows(int count) {
        for (; count > 0 && left_ > 0; count--) {
            for (int e = 0; e < 2; e++) {
                const F v = meaning_.outputs(sums_ + e * TILE * TILE, m_, e, now_->part) + now_->bias[e];
                if (fast_) _mm512_stream_ps(to_ + e * LANES, (__m512)v);
                else _mm512_mask_storeu_ps(to_ + e * LANES, now_->mask[e], (__m512)v);
            }
            m_++;
            left_--;
            to_ += stride_;
            sums_ += left_ == turn_ ? TILE + TILE * TILE : TILE;
        }
    }
    void rest() { rows(SIDE); }

  private:
    static constexpr int64_t LARGE = 1 << 20;
    struct Columns {
        typename Meaning::Columns part;
        F bias[2];
        int first;
        __mmask16 mask[2];
    };

    const Meaning meaning_;
    const int outputs_, rows_;
    float* const y_;
    const int64_t stride_;
    const float* const bias_;
    bool stream_;
    Columns columns_[2] = {};
    int next_ = 0;
    // The rows that are due, and where the next one comes from and goes to.
    const Columns* now_ = columns_;
    const int32_t* sums_ = nullptr;
    float* to_ = nullptr;
    int m_ = 0, left_ = 0, turn_ = 0;
    bool fast_ = false;
};

// What a piece is made of: two tiles of the input and two of the weight, the same columns of each.
struct Piece {
    const uint8_t *a0, *a1, *b0, *b1;
};

#if QL_LEVEL >= 5
// What is read next of the weight, on its way to the second cache a few lines a step.
struct Ahead {
    const uint8_t* next;
    int lines;

    inline void step() {
        for (int i = 0; i < lines; i++) _mm_prefetch((const char*)next + 64 * i, _MM_HINT_T1);
        next += 64 * lines;
    }
};

// Steps of a tile's width, `first` to `last` in bytes of a block. The weight is KEPT in the first cache or
// not; ROWS of the piece before are written in each.
template <bool INT8, bool KEPT, int ROWS, class Out>
__attribute__((always_inline)) inline void steps(const Piece& p, int64_t first, int64_t last, Ahead& ahead,
                                                 Out& writer) {
    for (int64_t at = first; at < last; at += TILE_BYTES) {
        _tile_stream_loadd(4, p.a0 + at, 64);
        _tile_stream_loadd(5, p.a1 + at, 64);
        if constexpr (KEPT) _tile_loadd(6, p.b0 + at, 64);
        else _tile_stream_loadd(6, p.b0 + at, 64);
        if constexpr (INT8) _tile_dpbsud(0, 4, 6);
        else _tile_dpbf16ps(0, 4, 6);
        ahead.step();
        if constexpr (INT8) _tile_dpbsud(2, 5, 6);
        else _tile_dpbf16ps(2, 5, 6);
        if constexpr (KEPT) _tile_loadd(7, p.b1 + at, 64);
        else _tile_stream_loadd(7, p.b1 + at, 64);
        if constexpr (INT8) _tile_dpbsud(1, 4, 7);
        else _tile_dpbf16ps(1, 4, 7);
        writer.rows(ROWS);
        if constexpr (INT8) _tile_dpbsud(3, 5, 7);
        else _tile_dpbf16ps(3, 5, 7);
    }
}

template <bool INT8, int ROWS, class Out>
void run(const Piece& p, int64_t bytes, Ahead ahead, Out& writer) {
    const int64_t kept = std::min(bytes, KEPT_BYTES);
    steps<INT8, true, ROWS>(p, 0, kept, ahead, writer);
    steps<INT8, false, ROWS>(p, kept, bytes, ahead, writer);
    writer.rest();
}

inline void start_sums(const int32_t* sums) {
    if (!sums) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        return;
    }
    _tile_loadd(0, sums, 64);
    _tile_loadd(1, sums + SUMS / 4, 64);
    _tile_loadd(2, sums + SUMS / 2, 64);
    _tile_loadd(3, sums + SUMS / 4 * 3, 64);
}

inline void store_sums(int32_t* sums) {
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + SUMS / 4, 64);
    _tile_stored(2, sums + SUMS / 2, 64);
    _tile_stored(3, sums + SUMS / 4 * 3, 64);
}

// The sums of a piece: what is in `from`, or zeros, and the products of all `bytes`. Rows that are due are
// written meanwhile, `a_step` in each step.
template <bool INT8, class Out>
void multiply_piece(const Piece& p, int64_t bytes, const int32_t* from, int32_t* to, const Ahead& ahead,
                    int64_t a_step, Out& writer) {
    start_sums(from);
    if (a_step == 1) run<INT8, 1>(p, bytes, ahead, writer);
    else if (a_step <= 4) run<INT8, 4>(p, bytes, ahead, writer);
    else run<INT8, 8>(p, bytes, ahead, writer);
    store_sums(to);
}
#else
// Vectors need neither what is ahead nor rows between their products.
struct Ahead {
    const uint8_t* next;
    int lines;
};

template <bool INT8, class Out>
void multiply_piece(const Piece& p, int64_t bytes, const int32_t* from, int32_t* to, const Ahead&, int64_t,
                    Out& writer) {
    writer.rest();
    const Panel panel{p.a0, p.b0, p.b1, bytes / TILE_BYTES, TILE_BYTES, TILE_BYTES};
    if (p.a1 == p.a0) multiply_panel<INT8>(panel, from, to);
    else multiply_panels<INT8>(panel, p.a1, from, to);
}
#endif

// Pieces between products; of one thread.
inline int32_t* room_for_sums(int64_t pieces) {
    static thread_local Buffer kept;
    return kept.get<int32_t>(pieces * SUMS);
}

// The input, in the order of tiles, and row blocks first to last - 1 of the weight.
struct Sides {
    const uint8_t* input;
    int64_t row;  // bytes of a row of tiles, and of a block of the weight
    int m_tiles, first, last;
};

// Some columns of a pair of blocks of the weight as tiles; the second one may be the first again. `to_next`
// leads from them to the pair that comes next, or is 0.
struct Pair {
    const uint8_t *b0, *b1;
    int64_t to_next;
};

// From byte k on, of a weight that is in tiles already.
inline Pair pair_of(const Matrix& w, int n, int last, int64_t k) {
    return {w.block(n) + k, w.block(std::min(n + 1, last - 1)) + k, n + 4 <= last ? 2 * w.block_bytes() : 0};
}

// `pair_at(n, k, bytes)` gives blocks n and n + 1, `bytes` of them from byte k on. The columns are taken in
// equal parts, whose input stays in L2; the sums of all pieces wait for the next part.
template <bool INT8, class PairAt, class Out>
void multiply_tiles(const Sides& s, PairAt&& pair_at, Out& writer) {
    const int m_block = std::min(MOST_TILES, s.m_tiles + s.m_tiles % 2);
    const int64_t parts = (m_block * s.row + INPUT_BYTES - 1) / INPUT_BYTES;
    const int64_t part = (s.row / TILE_BYTES + parts - 1) / parts * TILE_BYTES;
    const int64_t pieces = (int64_t)((s.last - s.first + 1) / 2) * (m_block / 2);
    int32_t *sums = room_for_sums(2 + (parts > 1 ? pieces : 0)), *kept = sums + 2 * SUMS;
    const int64_t a_step = (SIDE * TILE_BYTES + part - 1) / part;  // rows to write
    int turn = 0;
    for (int m_first = 0; m_first < s.m_tiles; m_first += m_block)
        for (int64_t k = 0, piece = 0; k < s.row; k += part, piece = 0) {
            const int m_last = std::min(m_first + m_block, s.m_tiles);
            const int64_t bytes = std::min(part, s.row - k);
            const bool more = k + bytes < s.row;
            const int lines = std::min(8, 2 * SIDE / (m_last - m_first));
            for (int n = s.first; n < s.last; n += 2) {
                const Pair p = pair_at(n, k, bytes);
                int64_t asked = 0;
                if (!more) writer.columns(n, std::min(2, s.last - n));
                for (int m = m_first; m < m_last; m += 2, piece++) {
                    const uint8_t *a0 = s.input + m * s.row + k, *a1 = m + 1 < s.m_tiles ? a0 + s.row : a0;
                    const Ahead ahead{(asked < bytes ? p.b0 + asked : p.b1 + asked - bytes) + p.to_next,
                                      p.to_next && asked < 2 * bytes ? lines : 0};
                    asked += bytes / TILE_BYTES * lines * 64;
                    int32_t *waiting = kept + piece * SUMS, *to = more ? waiting : sums + (turn ^= 1) * SUMS;
                    multiply_piece<INT8>({a0, a1, p.b0, p.b1}, bytes, k ? waiting : nullptr, to, ahead, a_step,
                                         writer);
                    if (!more) writer.due(to, m);
                }
            }
        }
    writer.rest();
}

}  // namespace ql
#endif
