"""Codes in 32-bit words, as GPTQ, AWQ and compressed-tensors files keep them."""

from __future__ import annotations

import torch
from torch import Tensor

from quantlab.packing import pack_bits, unpack_bits


def to_words(codes: Tensor, bits: int) -> Tensor:
    """uint8 [rows, n] -> int32 [rows, ceil(n * bits / 32)]: a row is one little-endian bit stream,
    code i in the bits from i * bits on; what is left of the last word is 0."""
    packed = pack_bits(codes, bits)
    padded: Tensor = torch.nn.functional.pad(packed, (0, -packed.shape[1] % 4))
    # Flat, since a single row may be contiguous with any stride.
    return padded.reshape(-1).view(torch.int32).view(padded.shape[0], -1)


def from_words(words: Tensor, bits: int, count: int) -> Tensor:
    """The codes (uint8 [rows, count]) that `to_words` packed."""
    packed = words.reshape(-1).view(torch.uint8).view(words.shape[0], -1)
    return unpack_bits(packed, bits, count)


def words_for(count: int, bits: int) -> int:
    """Words that a row of `count` codes takes."""
    return -(-count * bits // 32)
