"""Walkthrough 3: what one outlier does to a grid, and what groups save.

The step of an absmax grid is max|w| / (2^(b-1) - 1), so that one large value makes it coarser for
all that share it (`quantlab.grid`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantlab.grid import find_grid, from_codes, spread, to_codes
from quantlab.learn.material import Slice


@dataclass(frozen=True)
class Rounded:
    """A row of weights [columns] with one of them stretched, and what a grid makes of it.

    `scale` is the step and `groups` the group of every weight; `rms` is the root mean square error
    of all weights but the outlier, `codes_used` how many different codes those take in the
    outlier's group.
    """

    weights: Tensor
    rounded: Tensor
    scale: Tensor
    outlier: int
    group_size: int
    rms: float
    codes_used: int


def stretched(row: Tensor, times: float) -> tuple[Tensor, int]:
    """The row with its largest weight made `times` as large, and where that stands."""
    place = int(row.abs().argmax())
    longer = row.clone()
    longer[place] *= times
    return longer, place


def rounded(row: Tensor, times: float, bits: int, group_size: int, symmetric: bool) -> Rounded:
    """Round a row [columns] whose largest weight is made `times` as large."""
    weights, place = stretched(row, times)
    columns = row.shape[0]
    group = min(group_size, columns)
    scale, zero = find_grid(weights[None], bits, group, symmetric=symmetric)
    steps, zeros = spread(scale, group, columns), spread(zero, group, columns)
    codes = to_codes(weights[None], steps, zeros, bits)
    back = from_codes(codes, steps, zeros)[0]
    others = torch.arange(columns) != place
    inside = others & (torch.arange(columns) // group == place // group)
    return Rounded(
        weights,
        back,
        steps[0],
        place,
        group,
        float((back - weights)[others].square().mean().sqrt()),
        int(codes[0, inside].unique().numel()),
    )


GROUPS = (16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Sweep:
    """Root mean square error of the other weights, and bits a weight with float16 scales (and
    b-bit zero-points), by group size."""

    group_sizes: tuple[int, ...]
    rms: tuple[float, ...]
    bits_per_weight: tuple[float, ...]


def sweep(row: Tensor, times: float, bits: int, symmetric: bool) -> Sweep:
    """`rounded` for every group size that the row holds."""
    sizes = tuple(size for size in GROUPS if size <= row.shape[0]) or (row.shape[0],)
    errors = tuple(rounded(row, times, bits, size, symmetric).rms for size in sizes)
    extra = 16 if symmetric else 16 + bits
    return Sweep(sizes, errors, tuple(bits + extra / size for size in sizes))


@dataclass(frozen=True)
class Channels:
    """Largest |x| of every channel of a real input, float32 [channels]; `top` is the largest's
    place, `ratio` how many times the median it is. `rms` is the error (as a share of the values'
    own root mean square) of the 8-bit grid one value of every channel but the top one sees: with
    the top channel on the same grid, and without it."""

    peaks: Tensor
    top: int
    ratio: float
    rms_with: float
    rms_without: float


def channels(one: Slice, bits: int) -> Channels:
    """What the largest channel of the slice's input costs the others on one grid a tensor."""
    x = one.inputs
    peaks = x.abs().amax(0)
    top = int(peaks.argmax())
    rest = torch.cat((x[:, :top], x[:, top + 1 :]), 1)
    errors = []
    for seen in (x, rest):
        scale, zero = find_grid(seen.reshape(1, -1), bits, seen.numel(), symmetric=True)
        back = from_codes(to_codes(rest, scale, zero, bits), scale, zero)
        errors.append(float((back - rest).square().mean().sqrt() / rest.square().mean().sqrt()))
    median = float(peaks.median())
    return Channels(peaks, top, float(peaks[top]) / max(median, 1e-12), *errors)
