"""The searches for scales and minima that make ggml's formats better than plain rounding.

Each of them minimises a weighted squared error `sum_i w_i * (x_i - y_i) ** 2` of one sub-block over
a small grid of candidate inverse scales: round with the candidate, then solve the least-squares
problem for the factors with the codes held fixed, and keep the best. The procedures are those of
`ggml-quants.c` in llama.cpp (`make_qx_quants`, `make_qkx2_quants` and `make_qkx3_quants`,
`make_qp_quants`, `make_q3_quants`), here for all sub-blocks at once.

Throughout, `x` and `weights` are float32 `[size, m]`: one sub-block a column (see `to_columns`).

llama.cpp's reference code adds float32 terms one after the other and compares errors that often
differ by a few units in the last place. `ordered_sum` keeps that order, and products keep theirs,
which makes the bytes agree exactly; `torch.sum` is faster per call (it would save about a third
here) but adds in another order and flips near-ties in one or two blocks of a hundred.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .block import divide_constant, signed_extreme

_SMALLEST = 1e-15
# A sub-block whose largest magnitude is below this is stored as zeros (ggml's GROUP_MAX_EPS).
_SMALLEST_RANGE = 1e-36
# Below this range an inverse scale overflows float32; float16 scales are zero long before.


class CandidateGrid(NamedTuple):
    """Candidate inverse scales `(start + step * i + levels) / range` for i = 0 ... steps."""

    start: float
    step: float
    steps: int

    def numerators(self, levels: int, device: torch.device) -> Tensor:
        """The numerators, float32 `[steps + 1]`, in float32 arithmetic as ggml has it."""
        index = torch.arange(self.steps + 1, dtype=torch.float32, device=device)
        return (index * self.step + self.start) + levels


IMPORTANCE_GRID = CandidateGrid(-0.9, 0.05, 36)
"""The finer grid that ggml uses wherever an importance vector is given."""


class SymmetricFit(NamedTuple):
    """x ~ scale * q. `inverse` is the factor whose rounding gave q. Both float32 `[m]`."""

    scale: Tensor
    inverse: Tensor


class AffineFit(NamedTuple):
    """x ~ scale * q - minimum, with minimum >= 0; q = round(inverse * (x - offset)). All `[m]`."""

    scale: Tensor
    minimum: Tensor
    inverse: Tensor
    offset: Tensor


def ordered_sum(rows: Sequence[Tensor]) -> Tensor:
    """Sum of equally shaped tensors, added strictly in order in their own precision."""
    total = rows[0].clone()
    for row in rows[1:]:
        total += row
    return total


def affine_search(
    x: Tensor, weights: Tensor, levels: int, grid: CandidateGrid, absolute: bool = False
) -> AffineFit:
    """Fit x ~ scale * q + low with q in 0 ... levels and low <= 0.

    For fixed codes the weighted least squares solution is, with all sums over the sub-block,

        D     = sum(w) sum(w q^2) - sum(w q)^2
        scale = (sum(w) sum(w q x) - sum(w x) sum(w q)) / D
        low   = (sum(w q^2) sum(w x) - sum(w q) sum(w q x)) / D

    and where low would be positive, low = 0 and scale = sum(w q x) / sum(w q^2). A better candidate
    also moves `low` for the candidates after it, so their order matters.

    Args:
        x, weights: float32 `[size, m]`.
        levels: largest code.
        grid: candidate inverse scales.
        absolute: compare candidates by `sum(w |error|)` instead of `sum(w error^2)` (q2_k).
    """
    q = torch.empty_like(x)
    # The terms of three sums side by side, so that one pass of additions serves all three.
    terms = x.new_empty(x.shape[0], 3, x.shape[1])
    wq, wqq, wqx = terms.unbind(1)
    term_rows, work_rows = terms.unbind(0), wq.unbind(0)
    low, high = x.amin(0).clamp_(max=0.0), x.amax(0)
    curved = high - low > _SMALLEST_RANGE
    sum_w = ordered_sum(weights.unbind(0))
    torch.mul(weights, x, out=wq)
    sum_x = ordered_sum(work_rows)

    def round_with(inverse: Tensor, offset: Tensor) -> None:
        torch.sub(x, offset, out=q).mul_(inverse).round_().clamp_(0, levels)

    def error_of(scale: Tensor, offset: Tensor) -> Tensor:
        work = torch.mul(q, scale, out=wq).add_(offset).sub_(x)
        if absolute:
            work.abs_()
        else:
            work.mul_(work)
        work.mul_(weights)
        return ordered_sum(work_rows)

    inverse = divide_constant(float(levels), (high - low).where(curved, 1.0))
    offset, scale = low, inverse.reciprocal()
    round_with(inverse, offset)
    best = error_of(scale, low)
    for numerator in grid.numerators(levels, x.device):
        trial = torch.div(numerator, high - low)
        round_with(trial, low)
        torch.mul(weights, q, out=wq)
        torch.mul(wq, q, out=wqq)
        torch.mul(wq, x, out=wqx)
        sum_q, sum_q2, sum_qx = ordered_sum(term_rows).unbind(0)
        determinant = sum_w * sum_q2 - sum_q * sum_q
        new_scale = (sum_w * sum_qx - sum_x * sum_q) / determinant
        new_low = (sum_q2 * sum_x - sum_q * sum_qx) / determinant
        positive = new_low > 0
        new_scale = torch.where(positive, sum_qx / sum_q2, new_scale)
        new_low = new_low.masked_fill(positive, 0.0)
        error = error_of(new_scale, new_low)
        better = (determinant > 0) & (error < best) & curved
        best = torch.where(better, error, best)
        scale = torch.where(better, new_scale, scale)
        inverse = torch.where(better, trial, inverse)
        offset = torch.where(better, low, offset)
        low = torch.where(better, new_low, low)
    flat = ~curved
    return AffineFit(scale.masked_fill(flat, 0.0), -low, inverse.masked_fill(flat, 0.0), offset)


def symmetric_search(x: Tensor, weights: Tensor, half: int) -> SymmetricFit:
    """Fit x ~ scale * q with q in -half ... half - 1.

    Candidates are `-(half + i / 10) / extreme` for i = -9 ... 9, the unperturbed one first, where
    `extreme` is the value of largest magnitude: it maps to -half, the end that reaches further. For
    fixed codes the best scale is sum(w x q) / sum(w q^2), and it lowers the weighted squared error
    by sum(w x q)^2 / sum(w q^2), which is what candidates are compared by.

    A sub-block with no magnitude above 1e-15 has scale 0 and inverse 0.
    """
    extreme = signed_extreme(x)
    zero = extreme.abs() < _SMALLEST
    extreme = extreme.masked_fill(zero, 1.0)
    q = torch.empty_like(x)
    terms = x.new_empty(x.shape[0], 2, x.shape[1])
    wqx, wqq = terms.unbind(1)
    term_rows = terms.unbind(0)
    weighted_x = weights * x
    index = torch.tensor([0, *range(-9, 0), *range(1, 10)], dtype=torch.float32, device=x.device)
    scale = inverse = best = torch.zeros_like(extreme)
    for trial_index, numerator in enumerate(-(index * 0.1 + half)):
        trial = torch.div(numerator, extreme)
        torch.mul(x, trial, out=q).round_().clamp_(-half, half - 1)
        torch.mul(weighted_x, q, out=wqx)
        torch.mul(weights, q, out=wqq).mul_(q)
        sum_xq, sum_q2 = ordered_sum(term_rows).unbind(0)
        new_scale = sum_xq / sum_q2
        if trial_index == 0:
            scale = torch.where(sum_q2 != 0, new_scale, 0.0)
            inverse, best = trial, scale * sum_xq
            continue
        better = (sum_q2 > 0) & (sum_xq * sum_xq > best * sum_q2)
        scale = torch.where(better, new_scale, scale)
        inverse = torch.where(better, trial, inverse)
        best = torch.where(better, new_scale * sum_xq, best)
    return SymmetricFit(scale.masked_fill(zero, 0.0), inverse.masked_fill(zero, 0.0))


def descent_search(x: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """Fit x ~ scale * q with weights x^2, improving one code at a time (q3_k without importance).

    Returns: scale float32 `[m]`; codes `[size, m]` in -half ... half - 1, float32. Codes of an
    all-zero sub-block are -half (a stored 0).
    """
    extreme = signed_extreme(x)
    zero = extreme.abs() < _SMALLEST
    inverse = divide_constant(-float(half), extreme.masked_fill(zero, 1.0))
    codes = (x * inverse).round_().clamp_(-half, half - 1)
    scale = _descend(x, x * x, codes, -half, half - 1)
    return scale.masked_fill(zero, 0.0), codes.masked_fill_(zero, -half)


def positive_search(x: Tensor, weights: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Fit x ~ scale * q for x >= 0 with q in 0 ... levels: the scales of a super-block's scales.

    Nine candidates `(levels + i / 10) / max(x)`, then up to five sweeps of code-wise descent.

    Returns: scale float32 `[m]`; codes `[size, m]`, float32.
    """
    largest = x.amax(0)
    zero = largest < _SMALLEST
    largest = largest.masked_fill(zero, 1.0)
    index = torch.tensor([0, *range(-4, 0), *range(1, 5)], dtype=torch.float32, device=x.device)
    inverse = best = torch.zeros_like(largest)
    for trial_index, numerator in enumerate(index * 0.1 + levels):
        trial = torch.div(numerator, largest)
        codes = (x * trial).round_().clamp_(0, levels)
        difference = x - codes * trial.reciprocal()
        error = ordered_sum((weights * difference * difference).unbind(0))
        better = error < best if trial_index else torch.ones_like(zero)
        best = torch.where(better, error, best)
        inverse = torch.where(better, trial, inverse)
    codes = (x * inverse).round_().clamp_(0, levels)
    scale = _descend(x, weights, codes, 0, levels)
    return scale.masked_fill(zero, 0.0), codes.masked_fill_(zero, 0.0)


def _descend(x: Tensor, weights: Tensor, codes: Tensor, lowest: int, highest: int) -> Tensor:
    """Coordinate descent on `codes` (changed in place); returns the best scale for them, `[m]`.

    With code i taken out, the others alone give scale sum(w x q) / sum(w q^2), so the best code i
    is x_i over that. It is taken if sum(w x q)^2 / sum(w q^2) rises.
    """
    weighted_x = weights * x
    sum_xq = ordered_sum((weighted_x * codes).unbind(0))
    sum_q2 = ordered_sum((weights * codes * codes).unbind(0))
    for _ in range(5):
        changed = torch.zeros_like(sum_xq, dtype=torch.bool)
        for i in range(x.shape[0]):
            code, w, wx = codes[i], weights[i], weighted_x[i]
            rest_xq = sum_xq - wx * code
            rest_q2 = sum_q2 - w * code * code
            new = (x[i] * rest_q2 / rest_xq).round_().clamp_(lowest, highest)
            new_xq = rest_xq + wx * new
            new_q2 = rest_q2 + w * new * new
            better = (rest_xq > 0) & (new != code) & (new_q2 > 0)
            better &= new_xq * new_xq * sum_q2 > sum_xq * sum_xq * new_q2
            codes[i] = torch.where(better, new, code)
            sum_xq = torch.where(better, new_xq, sum_xq)
            sum_q2 = torch.where(better, new_q2, sum_q2)
            changed |= better
        if not bool(changed.any()):
            break
    return torch.where(sum_q2 > 0, sum_xq / sum_q2, 0.0)
