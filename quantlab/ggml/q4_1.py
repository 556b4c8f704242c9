"""q4_1: 32 weights in 20 bytes, 5 bits a weight. x = d * q + m, q in 0 ... 15.

Bytes (`block_q4_1` in ggml-common.h): d float16, m float16, then 16 bytes whose low nibbles are
q[0..15] and whose high nibbles are q[16..31].
"""

from __future__ import annotations

import torch
from torch import Tensor

from .block import (
    HALF_MAX,
    BlockFormat,
    Grids,
    Layout,
    bytes_to_half,
    half_to_bytes,
    input_columns,
    join_bytes,
    pack_halves,
    safe_reciprocal,
    to_columns,
    unpack_halves,
)
from .search import IMPORTANCE_GRID, affine_search


def affine_codes(
    blocks: Tensor, importance: Tensor | None, levels: int
) -> tuple[Tensor, Tensor, Tensor]:
    """d, m and the codes of q4_1 (levels 15) and q5_1 (levels 31).

    Without importance m = min(x), d = (max(x) - m) / levels, q = floor((x - m) / d + 0.5). With
    importance d and m <= 0 are searched.

    Returns: d, m float32 `[n]`; codes uint8 `[n, 32]`.
    """
    x = input_columns(blocks, 32)
    if importance is None:
        m = x.amin(0).clamp_(-HALF_MAX, HALF_MAX)
        d = ((x.amax(0) - m) / levels).clamp_(0.0, HALF_MAX)
        q = (x - m).mul_(safe_reciprocal(d)).add_(0.5)
    else:
        fit = affine_search(x, to_columns(importance, 32), levels, IMPORTANCE_GRID)
        d, m = fit.scale, -fit.minimum
        q = (x - fit.offset).mul_(fit.inverse).round_()
    return d, m, q.clamp_(0, levels).to(torch.uint8).t().contiguous()


def quantize(blocks: Tensor, importance: Tensor | None = None) -> Tensor:
    """float32 `[n, 32]`, error weights `[n, 32]` or None, to uint8 `[n, 20]`."""
    d, m, codes = affine_codes(blocks, importance, 15)
    return join_bytes((half_to_bytes(d), half_to_bytes(m), pack_halves(codes)))


def read(data: Tensor) -> Grids:
    """The codes and grids in uint8 `[n, 20]`."""
    codes = unpack_halves(data[:, 4:])
    return Grids(codes, bytes_to_half(data[:, :2]), offsets=bytes_to_half(data[:, 2:4]))


def dequantize(data: Tensor) -> Tensor:
    """uint8 `[n, 20]` to float32 `[n, 32]`."""
    return read(data).values()


FORMAT = BlockFormat(
    name="q4_1",
    type_id=3,
    block_size=32,
    block_bytes=20,
    quantize=quantize,
    dequantize=dequantize,
    layout=Layout(4, 20, read, pack_halves),
    bits=4,
    row_weighted=True,
)
