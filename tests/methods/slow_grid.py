"""Grids found the slow way: float64, one candidate range of one group after the other."""

from __future__ import annotations

import torch
from torch import Tensor

FRACTIONS = [1 - 0.0125 * step for step in range(41)]


def rounded(weight: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """The weights that the codes nearest to `weight` stand for."""
    codes = (torch.round(weight / scale) + zero).clamp(0, 2**bits - 1)
    return (codes - zero) * scale


def grid_of(low: float, high: float, bits: int, symmetric: bool) -> tuple[float, float]:
    """(scale as float16 holds it, zero) of the grid over [low, high]."""
    if symmetric:
        scale = max(abs(low), abs(high)) / (2 ** (bits - 1) - 1)
        zero = 2.0 ** (bits - 1)
    else:
        low, high = min(low, 0.0), max(high, 0.0)
        scale = (high - low) / (2**bits - 1)
        zero = float(round(-low / scale)) if scale else 0.0
    smallest = torch.finfo(torch.float16).tiny
    return float(torch.tensor(max(scale, smallest)).half()), zero


def check_grid(
    weight: Tensor,
    moment: Tensor,
    bits: int,
    scale: Tensor,
    zero: Tensor,
    *,
    symmetric: bool,
    clip: bool,
) -> None:
    """Assert that the grids found for one group are the ones a person would find.

    weight: float64 [rows, size]; moment: float64 [size, size]; scale, zero: [rows]. Each must be a
    candidate's (a float16 rounding away from it), and, with clipping, no candidate's output error
    d M d^T may be less by more than rounding in float32 explains.
    """
    for row, values in enumerate(weight.double()):
        low, high = float(values.min()), float(values.max())
        fractions = FRACTIONS if clip else [1.0]
        candidates = [grid_of(low * f, high * f, bits, symmetric) for f in fractions]
        s, z = float(scale[row]), float(zero[row])
        matches = [
            abs(s - c) <= 2.0**-10 * c and (abs(z - cz) <= 1 if not symmetric else z == cz)
            for c, cz in candidates
        ]
        assert any(matches), (row, s, z, candidates)

        def loss(s: float, z: float, values: Tensor = values) -> float:
            grid = torch.tensor([s, z], dtype=torch.float64)
            d = rounded(values, grid[0], grid[1], bits) - values
            return float(d @ moment.double() @ d)

        best = min(loss(c, cz) for c, cz in candidates)
        size = float(values @ moment.double() @ values)
        assert loss(s, z) <= best * 1.001 + 1e-6 * size, (row, loss(s, z), best)
