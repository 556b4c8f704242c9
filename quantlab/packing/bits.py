"""Bit packing: codes of 1 to 8 bits as one little-endian bit stream a row."""

from __future__ import annotations

import torch
from torch import Tensor

from quantlab.errors import ConfigError


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Pack integer codes [rows, n] (0 <= code < 2**bits) into uint8 [rows, ceil(n * bits / 8)].

    A row is one little-endian bit stream: code i occupies bits i*bits to (i+1)*bits - 1.
    """
    _check_bits(bits)
    codes = codes.to(torch.uint8)
    rows, count = codes.shape
    if bits == 8:
        return codes.contiguous()
    if bits == 4:
        pairs = torch.nn.functional.pad(codes, (0, count % 2))
        return pairs[:, ::2] | pairs[:, 1::2] << 4
    padded = torch.nn.functional.pad(codes, (0, -count % 8)).to(torch.int64)
    # Eight codes make `bits` whole bytes: gather them in one 64-bit word, then split it.
    groups = padded.reshape(rows, -1, 8)
    word = (groups << (torch.arange(8, device=codes.device) * bits)).sum(-1)
    shifts = torch.arange(bits, device=codes.device) * 8
    packed = ((word[..., None] >> shifts) & 0xFF).to(torch.uint8).reshape(rows, -1)
    return packed[:, : packed_width(count, bits)].contiguous()


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """The codes (uint8 [rows, count]) that `pack_bits` packed."""
    _check_bits(bits)
    if bits == 8:
        return packed[:, :count]
    if bits == 4:
        pair = torch.stack((packed & 15, packed >> 4), -1)
        return pair.flatten(1)[:, :count]
    padded: Tensor = torch.nn.functional.pad(packed, (0, -packed.shape[1] % bits)).to(torch.int64)
    groups = padded.unflatten(1, (-1, bits))
    word = (groups << (torch.arange(bits, device=packed.device) * 8)).sum(-1)
    shifts = torch.arange(8, device=packed.device) * bits
    codes: Tensor = ((word[..., None] >> shifts) & (2**bits - 1)).to(torch.uint8)
    return codes.flatten(1)[:, :count]


def packed_width(count: int, bits: int) -> int:
    """Bytes that `count` codes of `bits` bits take."""
    return (count * bits + 7) // 8


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ConfigError(f"bits={bits}: codes are packed with 1 to 8 bits")
