"""q5_0: 32 weights in 22 bytes, 5.5 bits a weight. x = d * (q - 16), q in 0 ... 31.

Bytes (`block_q5_0` in ggml-common.h): d float16, qh 4 bytes (bit j is the fifth bit of q[j]), then
16 bytes whose low nibbles are the lower four bits of q[0..15] and whose high nibbles q[16..31].
"""

from __future__ import annotations

import torch
from torch import Tensor

from .block import (
    BlockFormat,
    Grids,
    Layout,
    bytes_to_half,
    half_to_bytes,
    join_bytes,
    pack_fields,
    unpack_fields,
)
from .q4_0 import symmetric_codes

_LOW_BITS = 0x0101010101010101
_GATHER = 0x0102040810204080


def pack_five_bits(codes: Tensor) -> Tensor:
    """qh and the nibbles of five-bit codes: uint8 `[n, 32]` to `[n, 20]`."""
    # Bit j of the 32 is bit j % 8 of byte j // 8. Eight codes are one int64 whose bytes hold their
    # fifth bits; the multiplication moves the one of byte i to bit i of the top byte, no carries.
    fifth = (codes.contiguous().view(torch.int64) >> 4) & _LOW_BITS
    high = ((fifth * _GATHER) >> 56).to(torch.uint8)
    low = pack_fields((codes & 15).view(-1, 2, 16), 4)
    return join_bytes((high, low))


def unpack_five_bits(data: Tensor) -> Tensor:
    """Undo `pack_five_bits`: uint8 `[n, 20]` to codes uint8 `[n, 32]`."""
    high = unpack_fields(data[:, :4], 1, 8).transpose(1, 2).reshape(-1, 32)
    low = unpack_fields(data[:, 4:], 4, 2).reshape(-1, 32)
    return low | (high << 4)


def quantize(blocks: Tensor, importance: Tensor | None = None) -> Tensor:
    """float32 `[n, 32]`, error weights `[n, 32]` or None, to uint8 `[n, 22]`."""
    d, codes = symmetric_codes(blocks, importance, 16)
    return join_bytes((half_to_bytes(d), pack_five_bits(codes)))


def read(data: Tensor) -> Grids:
    """The codes and grids in uint8 `[n, 22]`."""
    return Grids(unpack_five_bits(data[:, 2:]), bytes_to_half(data[:, :2]), zero=16)


def dequantize(data: Tensor) -> Tensor:
    """uint8 `[n, 22]` to float32 `[n, 32]`."""
    return read(data).values()


FORMAT = BlockFormat(
    name="q5_0",
    type_id=6,
    block_size=32,
    block_bytes=22,
    quantize=quantize,
    dequantize=dequantize,
    layout=Layout(2, 22, read, pack_five_bits),
    bits=5,
    row_weighted=True,
)
