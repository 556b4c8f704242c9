"""Walkthrough 7: NF4, a codebook in the shape of the weights, and double quantization.

    code = argmin_i |codebook[i] - w / absmax|        w ~ codebook[code] * absmax

(`quantlab.codebook`). The even grid beside it is the symmetric 4-bit one of `quantlab.grid`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantlab.codebook import codebook, decode, decode_absmax, encode, encode_absmax
from quantlab.learn.material import Slice
from quantlab.packing import codebook_weight

NAMES = ("nf4", "fp4", "int4")


def values_of(name: str) -> Tensor:
    """The ascending values of a 4-bit codebook, the largest magnitude being 1: float32 [15 or 16].

    'int4' is the even absmax grid: codes -7 to 7, divided by 7."""
    if name == "int4":
        return torch.arange(-7, 8) / 7
    return codebook("nf4" if name == "nf4" else "fp4").unique()


@dataclass(frozen=True)
class Coded:
    """The slice's weights over their block's absmax, [weights], with the share of weights at each
    value of the codebook. `rms` is the root mean square error of the weights by each codebook, as
    a share of their own root mean square."""

    name: str
    block_size: int
    normalized: Tensor
    values: tuple[float, ...]
    shares: tuple[float, ...]
    rms: dict[str, float]


def coded(one: Slice, name: str, block_size: int) -> Coded:
    """Code the slice with one codebook, and compare all of them at this block size."""
    stream = one.weight.reshape(-1)
    stream = stream[: stream.numel() // block_size * block_size]
    size = float(stream.square().mean().sqrt())
    rms, shares, normalized = {}, (), stream
    for kind in NAMES:
        values = values_of(kind)
        codes, absmax = encode(stream, values, block_size)
        back = decode(codes, absmax, values, block_size)
        rms[kind] = float((back - stream).square().mean().sqrt()) / size
        if kind == name:
            counts = torch.bincount(codes.long(), minlength=values.numel())
            shares = tuple((counts / counts.sum()).tolist())
            normalized = stream / absmax.repeat_interleave(block_size).clamp_min(1e-38)
    return Coded(name, block_size, normalized, tuple(values_of(name).tolist()), shares, rms)


@dataclass(frozen=True)
class Doubled:
    """Scales of the blocks [blocks], as they are and after double quantization, their relative
    error, and the weights' bits and error with and without it."""

    absmax: Tensor
    restored: Tensor
    mean: float
    scale_error: float
    bits: tuple[float, float]
    rms: tuple[float, float]


def doubled(one: Slice, block_size: int) -> Doubled:
    """NF4 without and with double quantization; (without, with) where there are two."""
    _, absmax = encode(one.weight.reshape(-1), codebook("nf4"), block_size)
    eight, nested, mean = encode_absmax(absmax)
    restored = decode_absmax(eight, nested, mean)
    size = float(one.weight.square().mean().sqrt())
    bits, rms = [], []
    for double in (False, True):
        packed = codebook_weight(one.weight, "nf4", block_size, double_quant=double)
        bits.append(packed.bits_per_weight)
        rms.append(float((packed.dequantize() - one.weight).square().mean().sqrt()) / size)
    return Doubled(
        absmax,
        restored,
        float(mean),
        float((restored - absmax).abs().mean() / absmax.mean()),
        (bits[0], bits[1]),
        (rms[0], rms[1]),
    )
