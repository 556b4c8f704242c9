"""The arithmetic behind one chosen linear: SmoothQuant's scales for its whole input, and the grids
that rounding puts over its activations and weights, before and after smoothing.

    s_j = max|x_j|^alpha / max|w_j|^(1 - alpha)        W x = (W s)(x / s)

Scales and grids are those of `quantlab.methods.smoothquant` and `quantlab.grid`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quantlab.calibration import ActStats
from quantlab.grid import find_grid, from_codes, range_to_grid, spread, to_codes
from quantlab.inspection.survey import GROUP_SIZE, Linear, Survey
from quantlab.learn.material import Slice
from quantlab.learn.smoothing import config
from quantlab.methods.smoothquant import choose_scale
from quantlab.models import Block, Fold

GRANULARITIES = ("group", "channel", "tensor")


def scale_of(found: Survey, one: Linear, alpha: float) -> Tensor | None:
    """Equation 4 for the linear's input and all linears that read it: float32 [columns]; None where
    the architecture has nothing that such a scale can be folded into."""
    read = one.read
    if read.fold is None:
        return None
    # The equation reads maxima only, so that one row of them stands for the whole weight.
    linear = nn.Linear(len(read.weights), 1, bias=False)
    linear.weight = nn.Parameter(read.weights[None], requires_grad=False)
    fold = Fold(read.fold, "source", ("linear",))
    block = Block(
        0, 1, nn.Module(), {"linear": linear}, {"linear": "linear"}, (fold,), *found.attention
    )
    stats = ActStats(1, low=-read.peaks, high=read.peaks)
    return choose_scale(block, fold, stats, config(alpha, "static"))


@dataclass(frozen=True)
class Maxima:
    """Largest magnitude of every channel of the linear's input and of the weights that read it,
    float32 [columns], before and after smoothing (None without a fold)."""

    inputs: Tensor
    weights: Tensor
    smooth_inputs: Tensor | None
    smooth_weights: Tensor | None


def maxima(found: Survey, one: Linear, alpha: float) -> Maxima:
    read, scale = one.read, scale_of(found, one, alpha)
    if scale is None:
        return Maxima(read.peaks, read.weights, None, None)
    return Maxima(read.peaks, read.weights, read.peaks / scale, read.weights * scale)


@dataclass(frozen=True)
class OnGrid:
    """A tensor and what a grid makes of it.

    values: float32 [n], all of the tensor; inside: those that share one grid with the largest, and
    levels: that grid's points, ascending, 2**bits. `codes_used` of them are taken by `inside`.
    error: ||Q(v) - v||^2 / ||v||^2 over the whole tensor.
    """

    values: Tensor
    inside: Tensor
    levels: Tensor
    codes_used: int
    error: float


def on_grid(tensor: Tensor, bits: int, symmetric: bool, granularity: str) -> tuple[OnGrid, Tensor]:
    """The tensor (float32 [rows, columns]) rounded, and the result [rows, columns].

    granularity: 'tensor' (one grid), 'channel' (one a row) or 'group' (one for GROUP_SIZE
    neighbours of a row)."""
    rows, columns = tensor.shape
    whole = granularity == "tensor"
    grouped = tensor.reshape(1, -1) if whole else tensor
    size = min(GROUP_SIZE, columns) if granularity == "group" else grouped.shape[1]
    scale, zero = find_grid(grouped, bits, size, symmetric=symmetric)
    steps, zeros = (spread(one, size, grouped.shape[1]) for one in (scale, zero))
    codes = to_codes(grouped, steps, zeros, bits)
    back = from_codes(codes, steps, zeros)
    row, column = divmod(int(grouped.abs().argmax()), grouped.shape[1])
    group = column // size
    here = slice(group * size, (group + 1) * size)
    levels = from_codes(torch.arange(2.0**bits), scale[row, group], zero[row, group])
    power = max(float(grouped.square().sum()), 1e-30)
    made = OnGrid(
        tensor.flatten(),
        grouped[row, here],
        levels,
        int(codes[row, here].unique().numel()),
        float((back - grouped).square().sum()) / power,
    )
    return made, back.reshape(rows, columns)


@dataclass(frozen=True)
class Pair:
    """A linear's activations (rows are tokens) and weights (rows are output channels) on grids of
    the same kind, and ||Q(x) Q(W)^T - x W^T||^2 / ||x W^T||^2."""

    inputs: OnGrid
    weights: OnGrid
    output_error: float


def distributions(
    one: Slice, scale: Tensor | None, bits: int, symmetric: bool, granularity: str
) -> tuple[Pair, Pair | None]:
    """The slice as it is, and smoothed where there is a scale (float32 [columns] of the whole
    linear)."""
    wanted = one.inputs @ one.weight.t()
    power = max(float(wanted.square().sum()), 1e-30)

    def pair(inputs: Tensor, weight: Tensor) -> Pair:
        x, rounded_x = on_grid(inputs, bits, symmetric, granularity)
        w, rounded_w = on_grid(weight, bits, symmetric, granularity)
        error = float((rounded_x @ rounded_w.t() - wanted).square().sum()) / power
        return Pair(x, w, error)

    before = pair(one.inputs, one.weight)
    if scale is None:
        return before, None
    part = scale[one.channels.start : one.channels.stop]
    return before, pair(one.inputs / part, one.weight * part)


def group_levels(ends: tuple[float, float], bits: int) -> Tensor:
    """The points of the zero-point grid of a group of weights: float32 [2**bits], ascending."""
    scale, zero = range_to_grid(torch.tensor(ends[0]), torch.tensor(ends[1]), bits, False)
    return from_codes(torch.arange(2.0**bits), scale, zero)
