"""The arithmetic of codebook quantization: NF4 and FP4 codes, and 8-bit codes for their scales.

A weight is read as one row-major stream and cut into blocks of `block_size` values; the last block
may be shorter. A block keeps its largest magnitude, a value the nearest entry of a codebook:

    code = argmin_i |codebook[i] - w / absmax|        w ~ codebook[code] * absmax

Double quantization stores `absmax` itself in 8 bits: its mean over the tensor is taken off, and the
rest is coded the same way, in blocks of 256, by a dynamic 8-bit codebook.
Sources: Dettmers et al. 2023 (QLoRA, arXiv 2305.14314, section 3 and appendix E); Dettmers 2015
(arXiv 1511.04561, the dynamic 8-bit type).
"""

from __future__ import annotations

import functools
from statistics import NormalDist
from typing import Literal, get_args

import torch
from torch import Tensor

CodebookName = Literal["nf4", "fp4"]
CODEBOOKS: tuple[CodebookName, ...] = get_args(CodebookName)

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCK = 256
"""Absmax values that share a step of their own in double quantization (QLoRA, section 3)."""

NF4_EDGE = 0.9677083
"""Probability of the outermost quantile: 1 - (1/30 + 1/32) / 2, between what 15 and 16 evenly
filled bins would have. Seven digits, as the authors released it, so that the values are theirs."""

SMALLEST = 1e-38
"""Floor of the absmax that values are divided by, so that blocks of zeros stay finite."""


def codebook(name: CodebookName) -> Tensor:
    """The 16 values that codes 0 to 15 stand for, float32, the largest magnitude being 1."""
    return _nf4() if name == "nf4" else _fp4()


@functools.cache
def _nf4() -> Tensor:
    """NormalFloat: quantiles of N(0, 1), 7 below zero, 8 above it, and an exact zero between.

    Both sides take evenly spaced probabilities from 1/2 to the edge and are divided by the largest
    value. The probabilities are float32, as they were when the published values were made.
    """

    def side(count: int) -> list[float]:
        probabilities = torch.linspace(NF4_EDGE, 0.5, count + 1)[:-1]
        return [NormalDist().inv_cdf(float(p)) for p in probabilities]

    values = torch.tensor([*(-value for value in side(7)), 0.0, *reversed(side(8))])
    return values / values.max()


@functools.cache
def _fp4() -> Tensor:
    """A float with a sign, two exponent bits e and a mantissa bit m, in the order of its bits.

    (1 + m/2) * 2^(4 - e) for e > 0, m / 16 for e = 0, all divided by the largest, 12.
    """
    positive = [0.0, 1 / 16, *((1 + m / 2) * 2.0 ** (4 - e) for e in (1, 2, 3) for m in (0, 1))]
    return torch.tensor([*positive, *(-value for value in positive)]) / 12


@functools.cache
def dynamic_codebook() -> Tensor:
    """The 256 sorted values of the signed dynamic 8-bit type, float32.

    For each power of ten 10^-6 to 1, the middles of 1, 2, 4 ... 64 equal parts of [0.1, 1], with
    both signs; besides them 0 and 1.
    """
    parts = []
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1)
        parts.append((edges[:-1] + edges[1:]) / 2 * 10.0 ** (exponent - 6))
    middles = torch.cat(parts)
    return torch.cat((-middles, middles, torch.tensor([0.0, 1.0]))).sort().values


@functools.cache
def _borders(values: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """(borders between neighbouring entries, code of each entry in ascending order)."""
    ascending, order = torch.tensor(values).sort(stable=True)
    return (ascending[:-1] + ascending[1:]) / 2, order.to(torch.uint8)


def nearest_codes(scaled: Tensor, values: Tensor) -> Tensor:
    """Codes (uint8, the shape of `scaled`) of the nearest of `values`; ties go to the lower one."""
    borders, order = _borders(tuple(values.tolist()))
    if len(borders) < 16:
        # Counting the borders below: vectorized, where a binary search takes several times longer.
        place = torch.zeros(scaled.shape, dtype=torch.uint8, device=scaled.device)
        for border in borders.tolist():
            place += scaled > border
    else:
        place = torch.bucketize(scaled.contiguous(), borders.to(scaled.device))
    return order.to(scaled.device).index_select(0, place.flatten().int()).view(scaled.shape)


def encode(stream: Tensor, values: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """(codes uint8 [n], absmax float32 [ceil(n / block_size)]) of a float32 stream [n]."""
    padded = torch.nn.functional.pad(stream, (0, -stream.numel() % block_size))
    blocks = padded.view(-1, block_size)
    absmax = blocks.abs().amax(1)
    # Times the reciprocal, as bitsandbytes does, so that ties fall to the same side.
    scaled = blocks * (1 / absmax.clamp_min(SMALLEST))[:, None]
    return nearest_codes(scaled, values).view(-1)[: stream.numel()], absmax


def decode(codes: Tensor, absmax: Tensor, values: Tensor, block_size: int) -> Tensor:
    """The float32 stream [n] that codes [n] with their blocks' absmax stand for."""
    stream = values.to(codes.device).index_select(0, codes.int())
    return _scaled_blocks(stream, absmax, block_size)


def decode_pairs(packed: Tensor, absmax: Tensor, values: Tensor, block_size: int) -> Tensor:
    """`decode` of two 4-bit codes a byte, the first in the high half: float32 [2 * bytes]."""
    pairs = torch.cartesian_prod(values, values).to(packed.device)  # what each byte stands for
    return _scaled_blocks(pairs.index_select(0, packed.int()).view(-1), absmax, block_size)


def _scaled_blocks(stream: Tensor, absmax: Tensor, block_size: int) -> Tensor:
    """Multiply each block, the last of which may be ragged, by its absmax, in place."""
    whole = stream.numel() // block_size
    stream[: whole * block_size].view(-1, block_size).mul_(absmax[:whole, None])
    stream[whole * block_size :] *= absmax[whole:].sum()  # of one or none
    return stream


def encode_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Double quantization: (codes uint8 [blocks], their own absmax float32, the mean, a scalar)."""
    mean = absmax.mean()
    codes, nested = encode(absmax - mean, dynamic_codebook(), NESTED_BLOCK)
    return codes, nested, mean


def decode_absmax(codes: Tensor, nested: Tensor, mean: Tensor) -> Tensor:
    """The absmax values (float32 [blocks]) that `encode_absmax` coded."""
    return decode(codes, nested, dynamic_codebook(), NESTED_BLOCK) + mean
