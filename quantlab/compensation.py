"""Column-by-column compensation, the heart of GPTQ: round a column, and let the columns that are
not yet done answer for its error.

`quantlab.methods.gptq` writes down what is minimised, and quantizes with it; EfficientQAT's
training starts from the compensated values.
Source: Frantar et al. 2022, arXiv 2210.17323, section 3 and algorithm 1 (lazy blocks, Cholesky);
the debt: Li et al. 2025, arXiv 2504.02692, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from quantlab.errors import MethodError
from quantlab.grid import spread

LAZY_BLOCK = 128
"""Columns whose errors are gathered before they reach the columns after them, in one product."""

Regrid = Callable[[Tensor, int], tuple[Tensor, Tensor]]
"""(values [rows, columns of a group], first column) -> (scale, zero), both [rows, 1]."""


def compensate(
    weight: Tensor,
    order: Tensor,
    upper: Tensor,
    grids: tuple[Tensor, Tensor],
    bits: int,
    group: int,
    *,
    regrid: Regrid | None = None,
    debt: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(codes, scale, zero, values): codes and the compensated values that were rounded to them,
    float32 [rows, columns]; scale and zero, float32 [rows, groups], as they were used.

    weight: float32 [rows, columns]; order: int64 [columns], columns in the order they are rounded;
    upper: `inverse_factor` and debt (P of GPTAQ, strictly upper), both [columns, columns] in that
    order; grids: scale and zero [rows, groups]. With `regrid` (only for the natural order) a
    group's grid is made anew from its values as compensated so far.
    """
    rows, columns = weight.shape
    scale, zero = (grid.clone() for grid in grids)
    column_scale = spread(scale, group, columns).t()[order].contiguous()
    column_zero = spread(zero, group, columns).t()[order].contiguous()
    work = weight.t()[order].contiguous()
    codes = torch.empty_like(work)
    top = 2**bits - 1
    for start in range(0, columns, LAZY_BLOCK):
        stop = min(start + LAZY_BLOCK, columns)
        errors = torch.empty(stop - start, rows)
        for j in range(start, stop):
            if regrid is not None and j % group == 0:
                # The grid of a group follows from its weights as compensated so far; columns past
                # this lazy block have not seen the block's errors yet.
                end = min(j + group, columns)
                pending = upper[start:j, j:end].t() @ errors[: j - start]
                seen = work[j:end].clone()
                seen[stop - j :] -= pending[stop - j :]
                s, z = regrid(seen.t().contiguous(), j)
                scale[:, j // group], zero[:, j // group] = s[:, 0], z[:, 0]
                column_scale[j:end], column_zero[j:end] = s.t(), z.t()
            value = work[j]
            code = torch.round(value / column_scale[j]).add_(column_zero[j]).clamp_(0, top)
            codes[j] = code
            quantized = (code - column_zero[j]) * column_scale[j]
            error = (value - quantized) / upper[j, j]
            errors[j - start] = error
            work[j + 1 : stop].addr_(upper[j, j + 1 : stop], error, alpha=-1.0)
            if debt is not None:
                work[j + 1 : stop].addr_(debt[j, j + 1 : stop], value)
        work[stop:].addmm_(upper[start:stop, stop:].t(), errors, alpha=-1.0)
        if debt is not None:  # rows start to stop hold the values that were rounded
            work[stop:].addmm_(debt[start:stop, stop:].t(), work[start:stop])
    back = torch.argsort(order)
    return codes[back].t().contiguous(), scale, zero, work[back].t().contiguous()


def inverse_factor(moment: Tensor, dead: Tensor, damp_percent: float, own: bool = False) -> Tensor:
    """U, upper triangular float32 [columns, columns], with U^T U = (H + damping)^-1.

    Damping starts at `damp_percent` of the mean diagonal (with `own`, of each channel's entry) and
    grows tenfold while the factorization fails in float32. Raises: MethodError when it never
    succeeds.
    """
    moment = moment.clone()
    diagonal = moment.diagonal()
    diagonal[dead] = 1.0
    # Channels that never fire get weight 1 so that they decouple without upsetting the mean.
    mean = diagonal[~dead].mean() if bool((~dead).any()) else diagonal.mean()
    damping = damp_percent * (diagonal.clone() if own else mean)
    diagonal += damping
    for _ in range(4):
        lower, info = torch.linalg.cholesky_ex(moment)
        if int(info) == 0:
            inverse = torch.cholesky_inverse(lower)
            upper: Tensor
            upper, info = torch.linalg.cholesky_ex(inverse, upper=True)
            if int(info) == 0:
                return upper
        diagonal += 9 * damping
        damping = damping * 10
    raise MethodError("H cannot be inverted; raise damp_percent or calibrate on more tokens")
