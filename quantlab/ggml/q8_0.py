"""q8_0: 32 weights in 34 bytes, 8.5 bits a weight. x = d * q, q in -127 ... 127.

Bytes (`block_q8_0` in ggml-common.h): d float16, then 32 int8.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .block import (
    HALF_MAX,
    BlockFormat,
    bytes_to_half,
    half_to_bytes,
    input_columns,
    join_bytes,
    safe_reciprocal,
)


def quantize(blocks: Tensor, importance: Tensor | None = None) -> Tensor:
    """float32 `[n, 32]` to uint8 `[n, 34]`: d = max|x| / 127, q = x / d with halves away from zero.

    `importance` is not used, as in llama.cpp.
    """
    x = input_columns(blocks, 32)
    d = (x.abs().amax(0) / 127).clamp_(max=HALF_MAX)
    scaled = x * safe_reciprocal(d)
    # C's roundf. Adding a half before truncating would round 0.49999997 up.
    magnitude = scaled.abs()
    whole = magnitude.floor()
    whole += magnitude.sub_(whole) >= 0.5
    codes = whole.copysign_(scaled).clamp_(-127, 127).to(torch.int8)
    return join_bytes((half_to_bytes(d), codes.t().contiguous().view(torch.uint8)))


def dequantize(data: Tensor) -> Tensor:
    """uint8 `[n, 34]` to float32 `[n, 32]`."""
    codes = data[:, 2:].contiguous().view(torch.int8)
    return bytes_to_half(data[:, :2]) * codes.to(torch.float32)


FORMAT = BlockFormat(
    name="q8_0",
    type_id=8,
    block_size=32,
    block_bytes=34,
    quantize=quantize,
    dequantize=dequantize,
    bits=8,
)
