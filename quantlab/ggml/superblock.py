"""What the K formats share: 256 weights a block, cut into sub-blocks with quantized factors.

A K block ("super-block") holds sub-blocks of 16 or 32 weights. Each sub-block has a small integer
scale (and minimum); one float16 factor (or two) a super-block multiplies those. So

    x = d * scale_code * q                          (q3_k, q6_k: signed q)
    x = d * scale_code * q - dmin * min_code        (q2_k, q4_k, q5_k: q >= 0)

The field names d, dmin, scales, qs, qh, hmask are those of `ggml-common.h`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .block import (
    HALF_MAX,
    divide_constant,
    exact_sqrt,
    from_columns,
    input_columns,
    join_bytes,
    round_to_half,
    safe_reciprocal,
    to_columns,
)
from .ordered import ordered_sum
from .search import (
    IMPORTANCE_GRID,
    CandidateGrid,
    affine_search,
    positive_search,
)

SUPER_BLOCK = 256


class AffineBlocks(NamedTuple):
    """Super-blocks with minima, before packing."""

    d: Tensor
    """float32 `[n]`, float16 values."""
    dmin: Tensor
    """float32 `[n]`, float16 values."""
    scale_codes: Tensor
    """uint8 `[n, sub-blocks]`."""
    min_codes: Tensor
    """uint8 `[n, sub-blocks]`."""
    codes: Tensor
    """uint8 `[n, 256]`."""


def by_super_block(values: Tensor, count: int) -> Tensor:
    """Values of sub-blocks `[n * count]` to `[count, n]`."""
    return values.view(-1, count).t().contiguous()


def by_sub_block(values: Tensor) -> Tensor:
    """Values `[count, n]` back to one a sub-block, `[n * count]`."""
    return values.t().reshape(-1)


def mean_square(blocks: Tensor) -> Tensor:
    """Mean of x^2 over each super-block `[n, 256]`, added in ggml's order; float32 `[n]`."""
    x = input_columns(blocks, SUPER_BLOCK)
    return ordered_sum(x * x) / SUPER_BLOCK


def importance_weights(x: Tensor, importance: Tensor, variance: Tensor, sub_blocks: int) -> Tensor:
    """Error weights `importance * sqrt(variance + x^2)`.

    Args: x `[size, m]`; importance `[n, 256]`; variance `[n]`, ggml's sigma2. Returns `[size, m]`.
    """
    spread = variance.repeat_interleave(sub_blocks)
    return to_columns(importance, x.shape[0]) * exact_sqrt(x * x + spread)


def quantize_affine(
    blocks: Tensor,
    importance: Tensor | None,
    *,
    size: int,
    levels: int,
    factor_levels: int,
    grid: CandidateGrid,
) -> AffineBlocks:
    """Quantize super-blocks of q2_k (size 16), q4_k or q5_k (size 32).

    Without importance the error weights are |x| (size 16, absolute errors) or sqrt(mean(x^2)) + |x|
    (size 32), and the largest scale and minimum of a super-block set d and dmin. With importance
    they are `importance * sqrt(sigma2 + x^2)` and d, dmin are searched as well.

    Args:
        blocks: float32 `[n, 256]`. importance: the same shape, or None.
        levels: largest code. factor_levels: largest scale and minimum code.
        grid: candidates of the search without importance.
    """
    x = input_columns(blocks, size)
    sub_blocks = SUPER_BLOCK // size
    if importance is None:
        weights = x.abs()
        if size == 32:
            weights += exact_sqrt(ordered_sum(x * x) / size)
        fit = affine_search(x, weights, levels, grid, absolute=size == 16)
        d, scale_codes = _shared_factor(by_super_block(fit.scale, sub_blocks), factor_levels)
        dmin, min_codes = _shared_factor(by_super_block(fit.minimum, sub_blocks), factor_levels)
    else:
        variance = mean_square(blocks) * (1.0 if size == 16 else 2.0)
        weights = importance_weights(x, importance, variance, sub_blocks)
        fit = affine_search(x, weights, levels, IMPORTANCE_GRID)
        totals = by_super_block(ordered_sum(weights), sub_blocks)
        scales = by_super_block(fit.scale, sub_blocks)
        minima = by_super_block(fit.minimum, sub_blocks)
        d, scale_codes = positive_search(scales, totals, factor_levels)
        dmin, min_codes = positive_search(minima, totals, factor_levels)
    d, dmin = round_to_half(d), round_to_half(dmin)
    scale = by_sub_block(d * scale_codes)
    minimum = by_sub_block(dmin * min_codes)
    dead = scale == 0
    q = (x + minimum).div_(scale.masked_fill(dead, 1.0)).round_().clamp_(0, levels)
    replace_dead(q, dead, x, fit.inverse, fit.offset, (0, levels))
    return AffineBlocks(
        d,
        dmin,
        scale_codes.t().to(torch.uint8),
        min_codes.t().to(torch.uint8),
        from_columns(q, SUPER_BLOCK),
    )


def quantize_symmetric_codes(x: Tensor, scale: Tensor, inverse: Tensor, half: int) -> Tensor:
    """Codes q = round(x / scale) in -half ... half - 1 for the final scales, plus half.

    Args: x `[size, m]`; scale, inverse (from the search) `[m]`. Returns float `[size, m]`.
    """
    dead = scale == 0
    q = x.div(scale.masked_fill(dead, 1.0)).round_().clamp_(-half, half - 1)
    replace_dead(q, dead, x, inverse, torch.zeros_like(inverse), (-half, half - 1))
    q += half
    return q.masked_fill_(dead & (inverse == 0), 0.0)


def replace_dead(
    q: Tensor,
    dead: Tensor,
    x: Tensor,
    inverse: Tensor,
    offset: Tensor,
    limits: tuple[int, int],
) -> None:
    """Give sub-blocks whose stored scale is zero the codes of the search, as llama.cpp does.

    They decode to the same value whatever the codes; this only keeps the bytes equal. In place.
    """
    columns = dead.nonzero().squeeze(1)
    if columns.numel():
        searched = (x[:, columns] - offset[columns]).mul_(inverse[columns]).round_()
        q[:, columns] = searched.clamp_(*limits)


def _shared_factor(values: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """d = max / levels and codes round(values / d), for values >= 0 `[count, n]`.

    Returns: d `[n]`; codes `[count, n]`, float32.

    d is kept within float16, so that sub-blocks saturate rather than overflow.
    """
    # Adding zero turns -0 (the minimum of a block without one) into +0.
    largest = values.amax(0).clamp_(0.0, HALF_MAX * levels) + 0.0
    inverse = divide_constant(float(levels), largest)
    inverse = inverse.where(inverse.isfinite(), torch.zeros_like(inverse))
    codes = (values * inverse).round_().clamp_(0, levels)
    return largest / levels, codes


def signed_factor(scales: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """Codes of signed scales: the one of largest magnitude maps to -half.

    Args: scales `[count, n]`. Returns: d float32 `[n]` (a float16 value) and codes in
    -half ... half - 1, float32 `[count, n]`; a super-block of zeros has d = 0 and codes -half.
    """
    position = scales.abs().argmax(0, keepdim=True)
    extreme = scales.gather(0, position).squeeze(0)
    extreme = extreme.clamp(-HALF_MAX * half, HALF_MAX * half)
    inverse = divide_constant(-float(half), extreme)
    zero = ~inverse.isfinite()
    inverse = inverse.masked_fill(zero, 0.0)
    codes = (scales * inverse).round_().clamp_(-half, half - 1).masked_fill_(zero, -half)
    return round_to_half(safe_reciprocal(inverse)), codes


def pack_scale_mins(scales: Tensor, mins: Tensor) -> Tensor:
    """The 12 bytes that hold 8 scales and 8 minima of 6 bits (q4_k, q5_k).

    Bytes 0-3: scales 0-3, in their top bits the upper two bits of scales 4-7. Bytes 4-7: the same
    for the minima. Bytes 8-11: the lower four bits of scales 4-7 and (upper nibble) of minima 4-7.

    Args: uint8 `[n, 8]` each. Returns: uint8 `[n, 12]`.
    """
    first = scales[:, :4] | (scales[:, 4:] >> 4 << 6)
    second = mins[:, :4] | (mins[:, 4:] >> 4 << 6)
    third = (scales[:, 4:] & 15) | (mins[:, 4:] << 4)
    return join_bytes((first, second, third))


def unpack_scale_mins(data: Tensor) -> tuple[Tensor, Tensor]:
    """Undo `pack_scale_mins`: uint8 `[n, 12]` to scales and minima, float32 `[n, 8]` each."""
    first, second, third = data[:, :4], data[:, 4:8], data[:, 8:]
    scales = torch.cat((first & 63, (third & 15) | (first >> 6 << 4)), dim=1)
    mins = torch.cat((second & 63, (third >> 4) | (second >> 6 << 4)), dim=1)
    return scales.to(torch.float32), mins.to(torch.float32)
