"""q3_k: 256 weights in 110 bytes, 3.4375 bits a weight. x = d * (scale - 32) * q, q in -4 ... 3.

Bytes (`block_q3_K` in ggml-common.h): hmask 32 bytes (bit g of byte l is the third bit of
q[32 g + l] + 4); 64 bytes with the lower two bits, as in q2_k; 12 bytes with 16 scales of six bits,
one a sub-block of 16 weights; d float16. Of the scales' bytes, 0-7 hold the lower nibbles of scales
0-7 and (upper half) 8-15; byte 8 + i holds the upper two bits of scales i, i + 4, i + 8, i + 12.
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
    round_to_half,
    unpack_fields,
)
from .ordered import ordered_sum
from .q2_k import pack_two_bits, unpack_two_bits
from .search import descent_search, symmetric_search
from .superblock import (
    SUPER_BLOCK,
    by_sub_block,
    by_super_block,
    importance_weights,
    mean_square,
    quantize_symmetric_codes,
    signed_factor,
)


def _pack_scales(scales: Tensor) -> Tensor:
    """Six-bit scales uint8 `[n, 16]` to `[n, 12]`."""
    low = pack_fields((scales & 15).view(-1, 2, 8), 4)
    high = pack_fields((scales >> 4).view(-1, 4, 4), 2)
    return join_bytes((low, high))


def _unpack_scales(data: Tensor) -> Tensor:
    """Undo `_pack_scales`: uint8 `[n, 12]` to `[n, 16]`."""
    low = unpack_fields(data[:, :8], 4, 2).reshape(-1, 16)
    high = unpack_fields(data[:, 8:], 2, 4).reshape(-1, 16)
    return low | (high << 4)


def pack(codes: Tensor) -> Tensor:
    """q + 4, uint8 `[n, 256]`, to the bytes of the third bits and the lower two, `[n, 96]`."""
    return join_bytes((pack_fields((codes >> 2).view(-1, 8, 32), 1), pack_two_bits(codes & 3)))


def quantize(blocks: Tensor, importance: Tensor | None = None) -> Tensor:
    """float32 `[n, 256]`, importance `[n, 256]` or None, to uint8 `[n, 110]`."""
    x = input_columns(blocks, 16)
    if importance is None:
        scale, searched = descent_search(x, 4)
        d, scale_codes = signed_factor(by_super_block(scale, 16), 32)
        final = by_sub_block(d * scale_codes)
        dead = final == 0
        q = x.div(final.masked_fill(dead, 1.0)).round_().clamp_(-4, 3)
        # A zero scale decodes to zeros whatever the codes; llama.cpp leaves those of the search.
        q = torch.where(dead, searched, q).add_(4)
    else:
        weights = importance_weights(x, importance, mean_square(blocks) * 2.0, 16)
        fit = symmetric_search(x, weights, 4)
        scales = by_super_block(fit.scale, 16)
        totals = by_super_block(ordered_sum(weights), 16)
        d, inverse = symmetric_search(scales, totals, 32)
        d = round_to_half(d)
        scale_codes = (scales * inverse).round_().clamp_(-32, 31)
        scale_codes.masked_fill_(inverse == 0, -32)
        q = quantize_symmetric_codes(x, by_sub_block(d * scale_codes), fit.inverse, 4)
    codes = from_columns(q, SUPER_BLOCK)
    stored_scales = scale_codes.add_(32).t().to(torch.uint8).contiguous()
    return join_bytes(
        (
            pack(codes),
            _pack_scales(stored_scales),
            half_to_bytes(d),
        )
    )


def read(data: Tensor) -> Grids:
    """The codes and grids in uint8 `[n, 110]`."""
    high = unpack_fields(data[:, :32], 1, 8).reshape(-1, 256)
    codes = unpack_two_bits(data[:, 32:96]) | (high << 2)
    factors = _unpack_scales(data[:, 96:108]).to(torch.float32) - 32
    return Grids(codes, bytes_to_half(data[:, 108:110]) * factors, zero=4)


def dequantize(data: Tensor) -> Tensor:
    """uint8 `[n, 110]` to float32 `[n, 256]`."""
    return read(data).values()


FORMAT = BlockFormat(
    name="q3_k",
    type_id=11,
    block_size=256,
    block_bytes=110,
    quantize=quantize,
    dequantize=dequantize,
    layout=Layout(0, 96, read, pack),
    bits=3,
)
