"""q6_k: 256 weights in 210 bytes, 6.5625 bits a weight. x = d * scale * (q - 32), q in 0 ... 63.

Bytes (`block_q6_K` in ggml-common.h): ql 128 bytes, qh 64 bytes, 16 int8 scales (one a sub-block of
16 weights), d float16. In each half of 128 weights, ql byte l (of 64) holds the lower four bits of
q[l] and (upper nibble) q[l + 64]; qh byte l (of 32) holds the upper two bits of q[l], q[l + 32],
q[l + 64], q[l + 96].
"""

from __future__ import annotations

import torch
from torch import Tensor

from .block import (
    BlockFormat,
    Grids,
    Layout,
    bytes_to_half,
    from_columns,
    half_to_bytes,
    input_columns,
    join_bytes,
    pack_fields,
    to_columns,
    unpack_fields,
)
from .search import symmetric_search
from .superblock import (
    SUPER_BLOCK,
    by_sub_block,
    by_super_block,
    quantize_symmetric_codes,
    signed_factor,
)


def pack(codes: Tensor) -> Tensor:
    """q + 32, uint8 `[n, 256]`, to ql and qh, `[n, 192]`."""
    halves = codes.view(-1, 128)
    low = pack_fields((halves & 15).view(-1, 2, 64), 4).view(-1, 128)
    high = pack_fields((halves >> 4).view(-1, 4, 32), 2).view(-1, 64)
    return join_bytes((low, high))


def quantize(blocks: Tensor, importance: Tensor | None = None) -> Tensor:
    """float32 `[n, 256]`, importance `[n, 256]` or None, to uint8 `[n, 210]`.

    The error weights are the importance itself, or x^2 without one.
    """
    x = input_columns(blocks, 16)
    weights = x * x if importance is None else to_columns(importance, 16)
    fit = symmetric_search(x, weights, 32)
    scales = by_super_block(fit.scale, 16)
    d, scale_codes = signed_factor(scales, 128)
    q = quantize_symmetric_codes(x, by_sub_block(d * scale_codes), fit.inverse, 32)
    codes = from_columns(q, SUPER_BLOCK)
    # A super-block with no scale worth storing is all zero bytes.
    empty = scales.abs().amax(0) < 1e-15
    data = join_bytes(
        (
            pack(codes),
            scale_codes.t().to(torch.int8).contiguous().view(torch.uint8),
            half_to_bytes(d),
        )
    )
    return data.masked_fill_(empty.unsqueeze(1), 0)


def read(data: Tensor) -> Grids:
    """The codes and grids in uint8 `[n, 210]`."""
    low = unpack_fields(data[:, :128].reshape(-1, 64), 4, 2).view(-1, 256)
    high = unpack_fields(data[:, 128:192].reshape(-1, 32), 2, 4).view(-1, 256)
    factors = data[:, 192:208].contiguous().view(torch.int8).to(torch.float32)
    return Grids(low | (high << 4), bytes_to_half(data[:, 208:210]) * factors, zero=32)


def dequantize(data: Tensor) -> Tensor:
    """uint8 `[n, 210]` to float32 `[n, 256]`."""
    return read(data).values()


FORMAT = BlockFormat(
    name="q6_k",
    type_id=14,
    block_size=256,
    block_bytes=210,
    quantize=quantize,
    dequantize=dequantize,
    layout=Layout(0, 192, read, pack),
    bits=6,
)
