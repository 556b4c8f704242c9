"""The searches for scales and minima that make ggml's formats better than plain rounding.

Each of them minimises a weighted squared error `sum_i w_i * (x_i - y_i) ** 2` of one sub-block over
a small grid of candidate inverse scales: round with the candidate, then solve the least-squares
problem for the factors with the codes held fixed, and keep the best. The procedures are those of
`ggml-quants.c` in llama.cpp (`make_qx_quants`, `make_qkx2_quants` and `make_qkx3_quants`,
`make_qp_quants`, `make_q3_quants`), here for all sub-blocks at once.

Throughout, `x` and `weights` are float32 `[size, m]`: one sub-block a column (see `to_columns`).

llama.cpp's reference code adds float32 terms one after the other and compares errors that often
differ by a few units in the last place. `quantlab.ggml.ordered` keeps that order, and products keep
theirs, which makes the bytes agree exactly. (So torch.addcmul, which fuses its addition, is out.)

Buffers that stay in a processor's second cache count for as much as the arithmetic: an operation in
place is three times as fast as one that reads and writes elsewhere. Terms laid side by side, so
that one call serves three sums, were a third slower than three calls on a buffer each.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .block import divide_constant, signed_extreme
from .ordered import LANES, Terms, ordered_sum, replace_

_TRIAL_TERMS = 5 * 2**15
# Terms of all candidates that `_trial_sums` works on at once: two buffers stay in a 2 MB cache.
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
    q, wq, terms = torch.empty_like(x), Terms(x), Terms(x)
    work = terms.values

    def round_with(inverse: Tensor, offset: Tensor) -> None:
        torch.sub(x, offset, out=q).mul_(inverse).round_().clamp_(0, levels)

    def error_of(scale: Tensor, offset: Tensor) -> Tensor:
        torch.mul(q, scale, out=work).add_(offset).sub_(x)
        if absolute:
            work.abs_()
        else:
            work.mul_(work)
        work.mul_(weights)
        return terms.sum()

    # The best candidate so far and the one in hand, five rows each. `low` is what the candidates to
    # come start from, `offset` what the codes of this one were made with.
    state, trial = x.new_empty(2, 5, x.shape[1]).unbind(0)
    best, scale, low, inverse, offset = state.unbind(0)
    error, new_scale, new_low, new_inverse, new_offset = trial.unbind(0)
    sum_w = ordered_sum(weights)
    torch.mul(weights, x, out=work)
    sum_x = terms.sum()
    lowest, high = x.amin(0).clamp_(max=0.0), x.amax(0)
    flat = high - lowest <= _SMALLEST_RANGE
    low.copy_(lowest)
    offset.copy_(lowest)
    inverse.copy_(divide_constant(float(levels), (high - lowest).masked_fill_(flat, 1.0)))
    torch.reciprocal(inverse, out=scale)
    round_with(inverse, low)
    best.copy_(error_of(scale, low))
    for numerator in grid.numerators(levels, x.device):
        torch.div(numerator, high - low, out=new_inverse)
        new_offset.copy_(low)
        round_with(new_inverse, low)
        torch.mul(weights, q, out=wq.values)
        torch.mul(wq.values, x, out=work)
        sum_qx = terms.sum()
        torch.mul(wq.values, q, out=work)
        sum_q2 = terms.sum()
        sum_q = wq.sum()
        determinant = sum_w * sum_q2 - sum_q * sum_q
        torch.sub(sum_w * sum_qx, sum_x * sum_q, out=new_scale).div_(determinant)
        torch.sub(sum_q2 * sum_x, sum_q * sum_qx, out=new_low).div_(determinant)
        positive = new_low > 0
        if bool(positive.any()):  # seldom: sub-blocks mostly hold weights of both signs
            torch.where(positive, sum_qx / sum_q2, new_scale, out=new_scale)
            new_low.clamp_(max=0.0)
        error.copy_(error_of(new_scale, new_low))
        replace_(state, trial, (error < best).logical_and_(determinant > 0))
    return AffineFit(
        scale.masked_fill(flat, 0.0),
        -torch.where(flat, lowest, low),
        inverse.masked_fill(flat, 0.0),
        offset,
    )


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
    index = torch.tensor([0, *range(-9, 0), *range(1, 10)], dtype=torch.float32, device=x.device)
    trials = (-(index * 0.1 + half)).unsqueeze(1) / extreme
    sum_xq, sum_q2 = _trial_sums(x, weights, trials, half)
    scales = sum_xq / sum_q2
    # Three rows a candidate: what it gains, scale, inverse.
    trial = torch.stack((scales * sum_xq, scales, trials), dim=1)
    state = trial[0].masked_fill(sum_q2[0] == 0, 0.0)
    state[2] = trials[0]
    squares = (sum_xq * sum_xq).masked_fill_(sum_q2 <= 0, -1.0)
    for row in range(1, len(index)):
        replace_(state, trial[row], squares[row] > state[0] * sum_q2[row])
    _, scale, inverse = state.unbind(0)
    return SymmetricFit(scale.masked_fill(zero, 0.0), inverse.masked_fill(zero, 0.0))


def _trial_sums(x: Tensor, weights: Tensor, trials: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """sum(w x q) and sum(w q^2), each `[t, m]`, of the codes for inverse scales `[t, m]`.

    All candidates at once for a few columns, whose terms then stay in the cache.
    """
    size, m = x.shape
    weighted_x = weights * x
    sums = x.new_empty(2, len(trials), m)
    step = max(LANES, _TRIAL_TERMS // (size * len(trials)) // LANES * LANES)
    q = x.new_empty(len(trials), size, 0)
    terms = Terms(q, 1)
    for start in range(0, m, step):
        columns = slice(start, min(start + step, m))
        width = columns.stop - start
        if q.shape[-1] != width:
            q = x.new_empty(len(trials), size, width)
            terms = Terms(q, 1)
        torch.mul(x[:, columns], trials[:, None, columns], out=q).round_().clamp_(-half, half - 1)
        torch.mul(weighted_x[:, columns], q, out=terms.values)
        sums[0, :, columns] = terms.sum()
        torch.mul(weights[:, columns], q, out=terms.values).mul_(q)
        sums[1, :, columns] = terms.sum()
    return sums[0], sums[1]


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
        error = ordered_sum(weights * difference * difference)
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
    sum_xq = ordered_sum(weighted_x * codes)
    sum_q2 = ordered_sum(weights * codes * codes)
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
