"""q2_k: 256 weights in 84 bytes, 2.625 bits a weight. x = d * scale * q - dmin * min, q in 0 ... 3.

Bytes (`block_q2_K` in ggml-common.h): 16 bytes of factors, one a sub-block of 16 weights (low
nibble scale, high nibble minimum); 64 bytes of codes; d float16; dmin float16. In each half of 128
weights, byte l of its 32 code bytes holds q[l], q[l + 32], q[l + 64], q[l + 96], two bits each.
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
from .search import CandidateGrid
from .superblock import quantize_affine

_GRID = CandidateGrid(-0.5, 0.1, 15)


def pack_two_bits(codes: Tensor) -> Tensor:
    """Codes below 4, uint8 `[n, 256]`, to the 64 bytes of q2_k and q3_k, `[n, 64]`."""
    return pack_fields(codes.reshape(-1, 4, 32), 2).view(-1, 64)


def unpack_two_bits(data: Tensor) -> Tensor:
    """Undo `pack_two_bits`: uint8 `[n, 64]` to `[n, 256]`."""
    return unpack_fields(data.reshape(-1, 32), 2, 4).view(-1, 256)


def quantize(blocks: Tensor, importance: Tensor | None = None) -> Tensor:
    """float32 `[n, 256]`, importance `[n, 256]` or None, to uint8 `[n, 84]`."""
    fit = quantize_affine(blocks, importance, size=16, levels=3, factor_levels=15, grid=_GRID)
    factors = fit.scale_codes | (fit.min_codes << 4)
    return join_bytes(
        (factors, pack_two_bits(fit.codes), half_to_bytes(fit.d), half_to_bytes(fit.dmin))
    )


def read(data: Tensor) -> Grids:
    """The codes and grids in uint8 `[n, 84]`."""
    factors = data[:, :16]
    scales = bytes_to_half(data[:, 80:82]) * (factors & 15).to(torch.float32)
    minima = bytes_to_half(data[:, 82:84]) * (factors >> 4).to(torch.float32)
    return Grids(unpack_two_bits(data[:, 16:80]), scales, offsets=-minima)


def dequantize(data: Tensor) -> Tensor:
    """uint8 `[n, 84]` to float32 `[n, 256]`."""
    return read(data).values()


FORMAT = BlockFormat(
    name="q2_k",
    type_id=10,
    block_size=256,
    block_bytes=84,
    quantize=quantize,
    dequantize=dequantize,
    layout=Layout(16, 80, read, pack_two_bits),
    bits=2,
)
