"""q4_0: 32 weights in 18 bytes, 4.5 bits a weight. x = d * (q - 8), q in 0 ... 15.

Bytes (`block_q4_0` in ggml-common.h): d float16, then 16 bytes whose low nibbles are q[0..15] and
whose high nibbles are q[16..31].
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
    clamp_input,
    from_columns,
    half_to_bytes,
    input_columns,
    join_bytes,
    pack_halves,
    safe_reciprocal,
    signed_extreme_of_rows,
    to_columns,
    unpack_halves,
)
from .search import symmetric_search


def symmetric_codes(blocks: Tensor, importance: Tensor | None, half: int) -> tuple[Tensor, Tensor]:
    """d and the codes of q4_0 (half 8) and q5_0 (half 16).

    Without importance the value of largest magnitude maps to code 0, so d = extreme / -half and
    q = floor(x / d + half + 0.5). With importance d is searched.

    Returns: d float32 `[n]`; codes uint8 `[n, 32]` in 0 ... 2 * half - 1.
    """
    if importance is None:
        # No sums over a block, so nothing is won by laying blocks in columns.
        x = clamp_input(blocks)
        d = (signed_extreme_of_rows(x) / -half).clamp_(-HALF_MAX, HALF_MAX)
        q = x.mul_(safe_reciprocal(d).unsqueeze(1)).add_(half + 0.5).clamp_(0, 2 * half - 1)
        return d, q.to(torch.uint8)
    x = input_columns(blocks, 32)
    d, inverse = symmetric_search(x, to_columns(importance, 32), half)
    q = (x * inverse).round_().clamp_(-half, half - 1).add_(half).masked_fill_(inverse == 0, 0)
    return d, from_columns(q, 32)


def quantize(blocks: Tensor, importance: Tensor | None = None) -> Tensor:
    """float32 `[n, 32]`, error weights `[n, 32]` or None, to uint8 `[n, 18]`."""
    d, codes = symmetric_codes(blocks, importance, 8)
    return join_bytes((half_to_bytes(d), pack_halves(codes)))


def read(data: Tensor) -> Grids:
    """The codes and grids in uint8 `[n, 18]`."""
    codes = unpack_halves(data[:, 2:])
    return Grids(codes, bytes_to_half(data[:, :2]), zero=8)


def dequantize(data: Tensor) -> Tensor:
    """uint8 `[n, 18]` to float32 `[n, 32]`."""
    return read(data).values()


FORMAT = BlockFormat(
    name="q4_0",
    type_id=2,
    block_size=32,
    block_bytes=18,
    quantize=quantize,
    dequantize=dequantize,
    layout=Layout(2, 18, read, pack_halves),
    bits=4,
    row_weighted=True,
)
