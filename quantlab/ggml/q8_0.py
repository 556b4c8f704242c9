"""q8_0: 32 weights in 34 bytes, 8.5 bits a weight. x = d * q, q in -127 ... 127.

Bytes (`block_q8_0` in ggml-common.h): d float16, then 32 int8.
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
    half_to_bytes,
    join_bytes,
    safe_reciprocal,
)

_BELOW_HALF = 0.5 - 2.0**-25
"""The float32 before one half."""


def quantize(blocks: Tensor, importance: Tensor | None = None) -> Tensor:
    """float32 `[n, 32]` to uint8 `[n, 34]`: d = max|x| / 127, q = x / d with halves away from zero.

    `importance` is not used, as in llama.cpp.
    """
    x = clamp_input(blocks)
    d = (x.abs().amax(1) / 127).clamp_(max=HALF_MAX)
    scaled = x.mul_(safe_reciprocal(d).unsqueeze(1))
    # C's roundf is to add this and truncate. Adding a whole half would round 0.49999997 up.
    scaled += torch.copysign(torch.tensor(_BELOW_HALF, device=x.device), scaled)
    codes = scaled.clamp_(-127, 127).to(torch.int8)
    return join_bytes((half_to_bytes(d), codes.view(torch.uint8)))


def pack(codes: Tensor) -> Tensor:
    """q + 128 to the bytes of q."""
    return codes ^ 128


def read(data: Tensor) -> Grids:
    """The codes and grids in uint8 `[n, 34]`."""
    return Grids(data[:, 2:] ^ 128, bytes_to_half(data[:, :2]), zero=128)


def dequantize(data: Tensor) -> Tensor:
    """uint8 `[n, 34]` to float32 `[n, 32]`."""
    return read(data).values()


FORMAT = BlockFormat(
    name="q8_0",
    type_id=8,
    block_size=32,
    block_bytes=34,
    quantize=quantize,
    dequantize=dequantize,
    layout=Layout(2, 34, read, pack),
    bits=8,
)
