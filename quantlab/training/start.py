"""Where training starts: grids with clipped ranges, and weights moved so that they round well.

Training changes codes slowly, so that it pays to begin near a good rounding. `compensated` is the
column-by-column compensation of GPTQ (arXiv 2210.17323, algorithm 1, with its columns ordered by
activation size) on fixed grids; instead of the codes it returns the real values that were rounded.
They lie in the cell of their code, some near its edge, and training goes on from them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from quantlab.calibration import ActStats
from quantlab.errors import MethodError
from quantlab.grid import find_grid, spread, to_codes
from quantlab.models import Block
from quantlab.training.linears import FakeLinear

LAZY_BLOCK = 128


def compensated(
    weight: Tensor,
    moment: Tensor,
    scale: Tensor,
    zero: Tensor,
    bits: int,
    group_size: int,
    damping: float = 0.1,
) -> Tensor:
    """Values that round to GPTQ's codes: float32 [rows, columns].

    weight: float32 [rows, columns]; moment: float32 [columns, columns], mean of x x^T; scale, zero:
    float32 [rows, groups]. Values beyond the range stop at half a step outside of it, where
    straight-through gradients still reach them. Raises: MethodError when `moment` is not finite.
    """
    if not bool(torch.isfinite(moment).all()):
        raise MethodError("the calibration activations are not finite")
    columns = weight.shape[1]
    dead = moment.diagonal() <= 0
    order = torch.argsort(moment.diagonal(), descending=True, stable=True)
    upper = _inverse_factor(moment, dead, damping, order)
    steps = spread(scale, group_size, columns).t()[order].contiguous()
    zeros = spread(zero, group_size, columns).t()[order].contiguous()
    work = weight.masked_fill(dead, 0.0).t()[order].contiguous()
    top = 2**bits - 1
    for start in range(0, columns, LAZY_BLOCK):
        stop = min(start + LAZY_BLOCK, columns)
        errors = torch.empty(stop - start, weight.shape[0])
        for j in range(start, stop):
            code = to_codes(work[j], steps[j], zeros[j], bits)
            error = (work[j] - (code - zeros[j]) * steps[j]) / upper[j, j]
            errors[j - start] = error
            work[j + 1 : stop].addr_(upper[j, j + 1 : stop], error, alpha=-1.0)
        work[stop:].addmm_(upper[start:stop, stop:].t(), errors, alpha=-1.0)
    low, high = (-zeros - 0.45) * steps, (top - zeros + 0.45) * steps
    result = torch.empty_like(work)
    result[order] = work.clamp(low, high)
    return result.t().contiguous()


def _inverse_factor(moment: Tensor, dead: Tensor, damping: float, order: Tensor) -> Tensor:
    """U, upper triangular float32, with U^T U = (H + damping)^-1 in the order given; the damping
    grows tenfold while the factorization fails. Raises: MethodError when it never succeeds."""
    mean = moment.diagonal()[~dead].mean() if bool((~dead).any()) else moment.new_ones(())
    moment = moment[order][:, order].double()
    moment.diagonal()[dead[order]] = float(mean)
    for attempt in range(5):
        damped = moment.clone()
        damped.diagonal().add_(damping * 10**attempt * float(mean))
        lower, info = torch.linalg.cholesky_ex(damped)
        if int(info) == 0:
            upper, info = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if int(info) == 0:
                factor: Tensor = upper.float()
                return factor
    raise MethodError("the second moments of the calibration activations cannot be inverted")


@torch.no_grad()
def begin(
    block: Block,
    stats: Mapping[str, ActStats],
    bits: int,
    group_size: int,
    *,
    compensate: bool,
    clip: bool = True,
) -> dict[str, FakeLinear]:
    """The block's linears ready for training, by path; the block itself stays as it is.

    Zero-point grids, with `clip` their ranges shrunk to where the output error is least; with
    `compensate` the weights moved as `compensated` does, otherwise the original's. `stats` needs
    'second_moment'. Raises: MethodError for activations that are not finite.
    """
    found: dict[str, FakeLinear] = {}
    for path, linear in block.linears.items():
        moment = stats[path].second_moment
        assert moment is not None
        if not bool(torch.isfinite(moment).all()):
            raise MethodError("the calibration activations are not finite")
        weight = linear.weight.detach().float()
        group = min(group_size, weight.shape[1])
        scale, zero = find_grid(
            weight, bits, group, symmetric=False, clip=clip, moment=moment,
            scale_dtype=torch.float16,
        )  # fmt: skip
        if compensate:
            weight = compensated(weight, moment, scale, zero, bits, group)
        found[path] = FakeLinear(linear, weight, scale, zero, bits, group)
    return found


def install(block: Block, linears: Mapping[str, nn.Module]) -> None:
    """Put `linears` in the places of the block's, by path."""
    for path, linear in linears.items():
        block.module.set_submodule(path, linear)
