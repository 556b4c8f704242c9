"""iq4_nl: 32 weights in 18 bytes, 4.5 bits a weight. x = d * levels[q], q in 0 ... 15.

The 16 levels are unevenly spaced, denser around zero where weights are (the table is part of the
format, `kvalues_iq4nl` in ggml-common.h). Bytes: as in q4_0.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from .block import (
    HALF_MAX,
    BlockFormat,
    Grids,
    Layout,
    bytes_to_half,
    divide_constant,
    exact_sqrt,
    half_to_bytes,
    input_columns,
    join_bytes,
    pack_halves,
    safe_reciprocal,
    signed_extreme,
    to_columns,
    unpack_halves,
)
from .ordered import ordered_sum

LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


# Index of the nearest level for every value of floor(2 x) from -256 to 255, the upper one half way
# between two. Twice a midpoint is a whole number, so floor(2 x) decides exactly. (A search in the
# sorted midpoints, torch.bucketize, takes fifteen times as long.)
_CODES = tuple(
    sum(twice >= low + high for low, high in pairwise(LEVELS)) for twice in range(-256, 256)
)


def _lookup(x: Tensor, table: Tensor) -> Tensor:
    """table[floor(2 x) + 256], the shape of x."""
    index = (x + x).floor_().clamp_(-256, 255).add_(256).to(torch.int32)
    return table.index_select(0, index.view(-1)).view(x.shape)


def quantize(blocks: Tensor, importance: Tensor | None = None) -> Tensor:
    """float32 `[n, 32]`, importance `[n, 32]` or None, to uint8 `[n, 18]`.

    The extreme value is mapped near the first or the last level; candidates for the inverse scale
    are `(i - 127) / extreme`, i = -7 ... 7, compared as in `symmetric_search`. Error weights are
    x^2, or `importance * sqrt(2 mean(x^2) + x^2)`.
    """
    x = input_columns(blocks, 32)
    codes = torch.tensor(_CODES, dtype=torch.uint8, device=x.device)
    levels = torch.tensor(LEVELS, dtype=torch.float32, device=x.device)[codes.to(torch.int32)]
    weights = x * x
    if importance is not None:
        variance = ordered_sum(weights) * (2.0 / 32)
        weights = to_columns(importance, 32) * exact_sqrt(weights.add_(variance))
    extreme = signed_extreme(x)
    zero = extreme.abs() < 1e-15
    extreme = extreme.masked_fill(zero, 1.0)

    def sums(inverse: Tensor) -> tuple[Tensor, Tensor]:
        q = _lookup(x * inverse, levels)
        weighted = weights * q
        sum_q2 = ordered_sum(weighted * q)
        return ordered_sum(weighted.mul_(x)), sum_q2

    sum_xq, sum_q2 = sums((extreme / -LEVELS[0]).reciprocal())
    d = torch.where(sum_q2 > 0, sum_xq / sum_q2, 0.0)
    best = d * sum_xq
    for shift in range(-7, 8):
        sum_xq, sum_q2 = sums(divide_constant(float(shift + LEVELS[0]), extreme))
        better = (sum_q2 > 0) & (sum_xq * sum_xq > best * sum_q2)
        d = torch.where(better, sum_xq / sum_q2, d)
        best = torch.where(better, d * sum_xq, best)
    d = d.clamp_(-HALF_MAX, HALF_MAX).masked_fill_(zero, 0.0)
    q = _lookup(x * safe_reciprocal(d), codes).t().contiguous()
    return join_bytes((half_to_bytes(d), pack_halves(q)))


def read(data: Tensor) -> Grids:
    """The codes and grids in uint8 `[n, 18]`."""
    codes = unpack_halves(data[:, 2:])
    return Grids(codes, bytes_to_half(data[:, :2]), table=LEVELS)


def dequantize(data: Tensor) -> Tensor:
    """uint8 `[n, 18]` to float32 `[n, 32]`."""
    return read(data).values()


FORMAT = BlockFormat(
    name="iq4_nl",
    type_id=20,
    block_size=32,
    block_bytes=18,
    quantize=quantize,
    dequantize=dequantize,
    layout=Layout(2, 18, read, pack_halves),
    bits=4,
)
