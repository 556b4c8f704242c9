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
from quantlab.compensation import compensate, inverse_factor
from quantlab.errors import MethodError
from quantlab.grid import all_finite, find_grid, spread
from quantlab.models import Block
from quantlab.training.linears import FakeLinear


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
    if not all_finite(moment):
        raise MethodError("the calibration activations are not finite")
    columns = weight.shape[1]
    dead = moment.diagonal() <= 0
    order = torch.argsort(moment.diagonal(), descending=True, stable=True)
    upper = inverse_factor(moment[order][:, order], dead[order], damping)
    weight = weight.masked_fill(dead, 0.0)
    values = compensate(weight, order, upper, (scale, zero), bits, group_size).values()
    steps, zeros = spread(scale, group_size, columns), spread(zero, group_size, columns)
    low, high = (-zeros - 0.45) * steps, (2**bits - 1 - zeros + 0.45) * steps
    return values.clamp(low, high)


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
        if not all_finite(moment):
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
