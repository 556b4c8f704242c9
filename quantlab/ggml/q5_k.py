"""q5_k: 256 weights in 176 bytes, 5.5 bits a weight. x = d * scale * q - dmin * min, q in 0 ... 31.

Bytes (`block_q5_K` in ggml-common.h): d float16; dmin float16; 12 bytes of factors as in q4_k; qh
32 bytes (bit g of byte l is the fifth bit of q[32 g + l]); 128 bytes with the lower four bits, as
in q4_k.
"""

from __future__ import annotations

from torch import Tensor

from .block import BlockFormat, Grids, Layout, half_to_bytes, join_bytes, pack_fields, unpack_fields
from .q4_k import pack_nibbles, read_affine, unpack_nibbles
from .search import CandidateGrid
from .superblock import pack_scale_mins, quantize_affine

_GRID = CandidateGrid(-0.5, 0.1, 15)


def pack(codes: Tensor) -> Tensor:
    """Codes below 32, uint8 `[n, 256]`, to qh and the lower four bits, `[n, 160]`."""
    return join_bytes((pack_fields((codes >> 4).view(-1, 8, 32), 1), pack_nibbles(codes & 15)))


def quantize(blocks: Tensor, importance: Tensor | None = None) -> Tensor:
    """float32 `[n, 256]`, importance `[n, 256]` or None, to uint8 `[n, 176]`."""
    fit = quantize_affine(blocks, importance, size=32, levels=31, factor_levels=63, grid=_GRID)
    return join_bytes(
        (
            half_to_bytes(fit.d),
            half_to_bytes(fit.dmin),
            pack_scale_mins(fit.scale_codes, fit.min_codes),
            pack(fit.codes),
        )
    )


def read(data: Tensor) -> Grids:
    """The codes and grids in uint8 `[n, 176]`."""
    high = unpack_fields(data[:, 16:48], 1, 8).reshape(-1, 256)
    return read_affine(data[:, :16], unpack_nibbles(data[:, 48:]) | (high << 4))


def dequantize(data: Tensor) -> Tensor:
    """uint8 `[n, 176]` to float32 `[n, 256]`."""
    return read(data).values()


FORMAT = BlockFormat(
    name="q5_k",
    type_id=13,
    block_size=256,
    block_bytes=176,
    quantize=quantize,
    dequantize=dequantize,
    layout=Layout(16, 176, read, pack),
    bits=5,
)
