"""Column-by-column compensation, the heart of GPTQ: round a column, and let the columns that are
not yet done answer for its error.

`quantlab.methods.gptq` writes down what is minimised, and quantizes with it; EfficientQAT's
training starts from the compensated values.
Source: Frantar et al. 2022, arXiv 2210.17323, section 3 and algorithm 1 (lazy blocks, Cholesky);
the debt: Li et al. 2025, arXiv 2504.02692, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import native_solve
from quantlab.errors import MethodError
from quantlab.grid import all_finite
from quantlab.heap import hand_back_after

LAZY_BLOCK = 128
"""Columns whose errors are gathered before they reach the columns after them, in one product."""

NEAR_BLOCK = 32
"""Columns within a lazy block whose errors are passed on one by one; they stay in cache."""

Regrid = Callable[[Tensor, int], tuple[Tensor, Tensor]]
"""(values [rows, columns of a group], first column) -> (scale, zero), both [rows, 1]."""


@dataclass(frozen=True)
class Compensated:
    """What `compensate` found. codes: float32 [rows, columns]; scale and zero, float32 [rows,
    groups], as they were used."""

    codes: Tensor
    scale: Tensor
    zero: Tensor
    work: Tensor
    """float32 [columns, rows], in the order the columns were rounded."""
    places: Tensor
    """int64 [columns]: which of them each column was."""

    def values(self) -> Tensor:
        """The compensated values that were rounded to the codes: float32 [rows, columns]."""
        return in_order(self.work, self.places).t().contiguous()


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
) -> Compensated:
    """Codes of the columns in order, each rounded as the errors of those before it left it.

    weight: float32 [rows, columns]; order: int64 [columns], columns in the order they are rounded;
    upper: `inverse_factor` and debt (P of GPTAQ, strictly upper), both [columns, columns] in that
    order; grids: scale and zero [rows, groups]. With `regrid` (only for the natural order) a
    group's grid is made anew from its values as compensated so far.
    """
    columns = weight.shape[1]
    scale, zero = (grid.clone() for grid in grids)
    places = torch.argsort(order)
    # Errors are passed on as they are, not divided by U_jj: that is done to U's rows, once.
    if regrid is None and native_solve.ready(weight, scale):
        turned = (upper / upper.diagonal()[:, None]).t().contiguous()
        return _natively(weight, places, order // group, turned, debt, (scale, zero), bits)
    pull = upper / upper.diagonal()[:, None]
    work = in_order(weight.t(), order).clone(memory_format=torch.contiguous_format)
    step, bottom = scale.t()[order // group], -zero.t()[order // group]
    top = bottom + (2**bits - 1)
    whole, errors = torch.empty_like(work), torch.empty_like(work)  # whole: code - zero
    lines = zip(*(t.unbind() for t in (work, step, bottom, top, whole, errors)), strict=True)
    for start in range(0, columns, LAZY_BLOCK):
        stop = min(start + LAZY_BLOCK, columns)
        for first in range(start, stop, NEAR_BLOCK):
            last = min(first + NEAR_BLOCK, stop)
            for j in range(first, last):
                if regrid is not None and j % group == 0:
                    # The grid of a group follows from its weights as compensated so far; columns
                    # past these two blocks have not seen the blocks' errors yet.
                    end = min(j + group, columns)
                    seen = work[j:end].clone()
                    seen[last - j :] -= pull[first:j, last:end].t() @ errors[first:j]
                    seen[stop - j :] -= pull[start:first, stop:end].t() @ errors[start:first]
                    s, z = regrid(seen.t().contiguous(), j)
                    scale[:, j // group], zero[:, j // group] = s[:, 0], z[:, 0]
                    step[j:end], bottom[j:end] = s.t(), -z.t()
                    top[j:end] = bottom[j:end] + (2**bits - 1)
                value, one, low, high, code, error = next(lines)
                torch.div(value, one, out=code).round_()
                torch.clamp(code, low, high, out=code)
                torch.addcmul(value, code, one, value=-1, out=error)
                rest = work[j + 1 : last]
                rest.addr_(pull[j, j + 1 : last], error, alpha=-1)
                if debt is not None:
                    rest.addr_(debt[j, j + 1 : last], value)
            pass_on(work, pull, errors, debt, slice(first, last), slice(last, stop))
        pass_on(work, pull, errors, debt, slice(start, stop), slice(stop, columns))
    codes = in_order(whole.sub_(bottom), places).t().contiguous()
    return Compensated(codes, scale, zero, work, places)


def _natively(
    weight: Tensor,
    places: Tensor,
    group_of: Tensor,
    pull: Tensor,
    debt: Tensor | None,
    grids: tuple[Tensor, Tensor],
    bits: int,
) -> Compensated:
    """`compensate` with the columns of a lazy block rounded by the native kernels, which read pull
    and debt transposed; pull comes so."""
    columns = weight.shape[1]
    work = native_solve.turn(weight.contiguous(), places)
    step, bottom = grids[0].t().contiguous(), -grids[1].t().contiguous()
    whole, errors = torch.empty_like(work), torch.empty_like(work)
    debt = None if debt is None else debt.t().contiguous()
    upright = pull.t(), None if debt is None else debt.t()
    for start in range(0, columns, LAZY_BLOCK):
        done = slice(start, min(start + LAZY_BLOCK, columns))
        native_solve.compensate(
            *(work, step, bottom, group_of, 2**bits - 1, whole, errors, pull, debt, done)
        )
        pass_on(work, upright[0], errors, upright[1], done, slice(done.stop, columns))
    codes = native_solve.turn_back(whole, places, (bottom, group_of))
    return Compensated(codes, *grids, work, places)


def in_order(values: Tensor, order: Tensor) -> Tensor:
    """`values[order]`; nothing is copied where that changes nothing."""
    natural = torch.equal(order, torch.arange(len(order)))
    return values if natural else values[order]


def pass_on(
    work: Tensor, pull: Tensor, errors: Tensor, debt: Tensor | None, done: slice, later: slice
) -> None:
    """Let the columns `later` answer for the errors of the columns `done`, and for their debt; of
    those, `work` holds the values that were rounded."""
    work[later].addmm_(pull[done, later].t(), errors[done], alpha=-1)
    if debt is not None:
        work[later].addmm_(debt[done, later].t(), work[done])


def inverse_factor(moment: Tensor, dead: Tensor, damp_percent: float, own: bool = False) -> Tensor:
    """U, upper triangular float32 [columns, columns], with U^T U = (H + damping)^-1.

    Damping starts at `damp_percent` of the mean diagonal (with `own`, of each channel's entry) and
    grows tenfold while the factorization fails in float32. Raises: MethodError when it never
    succeeds.
    """
    # From the last channel to the first, H = R R^T with R upper triangular; U is its inverse.
    moment, dead = moment.flip(0, 1), dead.flip(0)
    diagonal = moment.diagonal()
    diagonal[dead] = 1.0
    # Channels that never fire get weight 1 so that they decouple without upsetting the mean.
    mean = diagonal[~dead].mean() if bool((~dead).any()) else diagonal.mean()
    damping = damp_percent * (diagonal.clone() if own else mean)
    diagonal += damping
    for _ in range(4):
        inverse = inverse_cholesky(moment)
        if inverse is not None and all_finite(inverse):
            hand_back_after(len(inverse))
            return inverse.flip(0, 1)
        diagonal += 9 * damping
        damping = damping * 10
    raise MethodError("H cannot be inverted; raise damp_percent or calibrate on more tokens")


FACTORED_AT_ONCE = 192
"""Columns whose Cholesky factor LAPACK makes and inverts; of more, products take most of the time,
which all cores share."""


def inverse_cholesky(matrix: Tensor) -> Tensor | None:
    """L^-1, lower triangular, of a symmetric A = L L^T: float32 [columns, columns]. None where A is
    not positive definite in float32.

    By halves, of which L itself is never needed:

        A = [[P, .], [B, D]]    X = B L_P^-T    S = D - X X^T    L^-1 = [[L_P^-1, 0],
                                                                        [-L_S^-1 X L_P^-1, L_S^-1]]
    """
    columns = len(matrix)
    if columns <= FACTORED_AT_ONCE:
        lower, info = torch.linalg.cholesky_ex(matrix)
        if int(info) != 0:
            return None
        return torch.linalg.solve_triangular(lower, torch.eye(columns), upper=False)
    half = columns // 2
    first = inverse_cholesky(matrix[:half, :half])
    if first is None:
        return None
    across = matrix[half:, :half] @ first.t()
    second = inverse_cholesky(torch.addmm(matrix[half:, half:], across, across.t(), alpha=-1))
    if second is None:
        return None
    inverse = torch.zeros_like(matrix)
    inverse[:half, :half], inverse[half:, half:] = first, second
    inverse[half:, :half] = (second @ (across @ first)).neg_()
    return inverse
