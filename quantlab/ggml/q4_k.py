"""q4_k: 256 weights in 144 bytes, 4.5 bits a weight. x = d * scale * q - dmin * min, q in 0 ... 15.

Bytes (`block_q4_K` in ggml-common.h): d float16; dmin float16; 12 bytes with the six-bit scales and
minima of eight sub-blocks of 32 (see `pack_scale_mins`); 128 bytes of codes. In each quarter of 64
weights, byte l of its 32 code bytes holds q[l] (low nibble) and q[l + 32].
"""

from __future__ import annotations

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
from .superblock import pack_scale_mins, quantize_affine, unpack_scale_mins

_GRID = CandidateGrid(-1.0, 0.1, 20)


def pack_nibbles(codes: Tensor) -> Tensor:
    """Codes below 16, uint8 `[n, 256]`, to the 128 bytes of q4_k and q5_k, `[n, 128]`."""
    return pack_fields(codes.reshape(-1, 2, 32), 4).view(-1, 128)


def unpack_nibbles(data: Tensor) -> Tensor:
    """Undo `pack_nibbles`: uint8 `[n, 128]` to `[n, 256]`."""
    return unpack_fields(data.reshape(-1, 32), 4, 2).view(-1, 256)


def read_affine(head: Tensor, codes: Tensor) -> Grids:
    """What q4_k and q5_k spell: head uint8 `[n, 16]` (d, dmin, factors), codes uint8 `[n, 256]`."""
    scales, minima = unpack_scale_mins(head[:, 4:16])
    offsets = -(bytes_to_half(head[:, 2:4]) * minima)
    return Grids(codes, bytes_to_half(head[:, :2]) * scales, offsets=offsets)


def quantize(blocks: Tensor, importance: Tensor | None = None) -> Tensor:
    """float32 `[n, 256]`, importance `[n, 256]` or None, to uint8 `[n, 144]`."""
    fit = quantize_affine(blocks, importance, size=32, levels=15, factor_levels=63, grid=_GRID)
    return join_bytes(
        (
            half_to_bytes(fit.d),
            half_to_bytes(fit.dmin),
            pack_scale_mins(fit.scale_codes, fit.min_codes),
            pack_nibbles(fit.codes),
        )
    )


def read(data: Tensor) -> Grids:
    """The codes and grids in uint8 `[n, 144]`."""
    return read_affine(data[:, :16], unpack_nibbles(data[:, 16:]))


def dequantize(data: Tensor) -> Tensor:
    """uint8 `[n, 144]` to float32 `[n, 256]`."""
    return read(data).values()


FORMAT = BlockFormat(
    name="q4_k",
    type_id=12,
    block_size=256,
    block_bytes=144,
    quantize=quantize,
    dequantize=dequantize,
    layout=Layout(16, 144, read, pack_nibbles),
    bits=4,
)
