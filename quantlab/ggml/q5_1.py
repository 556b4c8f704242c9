"""q5_1: 32 weights in 24 bytes, 6 bits a weight. x = d * q + m, q in 0 ... 31.

Bytes (`block_q5_1` in ggml-common.h): d float16, m float16, then qh and nibbles as in q5_0.
"""

from __future__ import annotations

from torch import Tensor

from .block import BlockFormat, Grids, Layout, bytes_to_half, half_to_bytes, join_bytes
from .q4_1 import affine_codes
from .q5_0 import pack_five_bits, unpack_five_bits


def quantize(blocks: Tensor, importance: Tensor | None = None) -> Tensor:
    """float32 `[n, 32]`, error weights `[n, 32]` or None, to uint8 `[n, 24]`."""
    d, m, codes = affine_codes(blocks, importance, 31)
    return join_bytes((half_to_bytes(d), half_to_bytes(m), pack_five_bits(codes)))


def read(data: Tensor) -> Grids:
    """The codes and grids in uint8 `[n, 24]`."""
    scales, offsets = bytes_to_half(data[:, :2]), bytes_to_half(data[:, 2:4])
    return Grids(unpack_five_bits(data[:, 4:]), scales, offsets=offsets)


def dequantize(data: Tensor) -> Tensor:
    """uint8 `[n, 24]` to float32 `[n, 32]`."""
    return read(data).values()


FORMAT = BlockFormat(
    name="q5_1",
    type_id=7,
    block_size=32,
    block_bytes=24,
    quantize=quantize,
    dequantize=dequantize,
    layout=Layout(4, 24, read, pack_five_bits),
    bits=5,
    row_weighted=True,
)
