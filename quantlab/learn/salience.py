"""Walkthrough 6: AWQ, the channels that matter and the search for their scales.

Channels are ranked by mean|x|; s_j = mean|x_j|^r, and the exponent r is chosen by the output error
(`quantlab.methods.awq`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantlab.learn.material import Slice
from quantlab.methods.awq import AWQConfig, rounding_error

POINTS = 20
RANKINGS = ("activations", "weights", "random")


def rounded(one: Slice, bits: int, group_size: int, scale: Tensor | None = None) -> Tensor:
    """Q(W s) / s by plain rounding: float32 [rows, columns]."""
    columns = one.weight.shape[1]
    scale = torch.ones(columns) if scale is None else scale
    group = min(group_size, columns)
    return one.weight + rounding_error(one.weight, scale, group, config(bits, group_size))


@dataclass(frozen=True)
class Kept:
    """Relative output error when `count` channels stay unrounded, the largest by each ranking.
    `importance` is mean|x| a channel [columns]; `kept` the channels kept by activations."""

    count: int
    importance: Tensor
    kept: tuple[int, ...]
    errors: dict[str, float]
    none: float


def kept(one: Slice, percent: float, bits: int, group_size: int) -> Kept:
    """Keep `percent` of the channels in 16 bits and round the rest."""
    columns = one.weight.shape[1]
    count = min(columns, round(percent / 100 * columns))
    importance = one.inputs.abs().mean(0)
    plain = rounded(one, bits, group_size)
    ranks = {
        "activations": importance.argsort(descending=True),
        "weights": one.weight.abs().mean(0).argsort(descending=True),
        "random": torch.randperm(columns, generator=torch.Generator().manual_seed(0)),
    }
    errors = {}
    for name in RANKINGS:
        mixed = plain.clone()
        mixed[:, ranks[name][:count]] = one.weight[:, ranks[name][:count]]
        errors[name] = one.output_error(mixed)
    chosen = tuple(int(channel) for channel in ranks["activations"][:count])
    return Kept(count, importance, chosen, errors, one.output_error(plain))


@dataclass(frozen=True)
class Search:
    """Relative squared output error at every exponent; the least's place is `best`."""

    exponents: tuple[float, ...]
    errors: tuple[float, ...]

    @property
    def best(self) -> int:
        return self.errors.index(min(self.errors))


def scale_of(one: Slice, exponent: float) -> Tensor:
    """Channel scales with geometric mid-range 1: float32 [columns]."""
    scale = one.inputs.abs().mean(0).clamp_min(1e-8).pow(exponent)
    return scale / (scale.max() * scale.min()).sqrt()


def config(bits: int, group_size: int) -> AWQConfig:
    return AWQConfig(bits=bits, group_size=group_size)


def search(one: Slice, bits: int, group_size: int) -> Search:
    """The curve that AWQ's search walks along."""
    exponents = tuple(point / POINTS for point in range(POINTS + 1))
    errors = tuple(
        one.output_error(rounded(one, bits, group_size, scale_of(one, r))) for r in exponents
    )
    return Search(exponents, errors)


@dataclass(frozen=True)
class Scaled:
    """One exponent: scales [columns], and each channel's share of the output error,
    mean (sum_rows D_ij x_j)^2 with D its rounding error [columns], before and after."""

    exponent: float
    scale: Tensor
    before: Tensor
    after: Tensor
    error_before: float
    error_after: float


def scaled(one: Slice, exponent: float, bits: int, group_size: int) -> Scaled:
    """Plain rounding beside rounding under the scales of one exponent."""
    scale = scale_of(one, exponent)
    plain, better = rounded(one, bits, group_size), rounded(one, bits, group_size, scale)
    power = one.moment.diagonal()
    before, after = ((back - one.weight).square().sum(0) * power for back in (plain, better))
    return Scaled(exponent, scale, before, after, one.output_error(plain), one.output_error(better))
