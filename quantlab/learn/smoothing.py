"""Walkthrough 4: SmoothQuant's migration of difficulty, from activations to weights.

    s_j = max|x_j|^alpha / max|w_j|^(1 - alpha)        W x = (W s)(x / s)

The scale and the error are those of `quantlab.methods.smoothquant`, on the slice.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quantlab.learn.material import Slice
from quantlab.methods.smoothquant import (
    SmoothQuantConfig,
    choose_scale,
    simulated_error,
)
from quantlab.models import Block, Fold

ALPHAS = tuple(round(0.05 * step, 2) for step in range(21))


@dataclass(frozen=True)
class Smoothed:
    """Largest magnitude of every input channel [columns], before and after; scales s likewise.
    `error` is the output's squared error relative to the output, a mean over tokens."""

    alpha: float
    scale: Tensor
    inputs_before: Tensor
    inputs_after: Tensor
    weights_before: Tensor
    weights_after: Tensor
    error: float
    unsmoothed_error: float


def config(alpha: float, activations: str) -> SmoothQuantConfig:
    return SmoothQuantConfig(activations=activations, alpha=alpha, search=False)


def scale_of(one: Slice, alpha: float) -> Tensor:
    """Equation 4 for the slice: float32 [columns]."""
    rows, columns = one.weight.shape
    linear = nn.Linear(columns, rows, bias=False)
    linear.weight = nn.Parameter(one.weight, requires_grad=False)
    fold = Fold("norm", "norm", ("linear",))
    block = Block(0, 1, nn.Module(), {"linear": linear}, {"linear": "linear"}, (fold,), 1, 1, 1)
    return choose_scale(block, fold, one.stats, config(alpha, "static"))


def smoothed(one: Slice, alpha: float, activations: str) -> Smoothed:
    """The slice at one alpha. activations: 'static' (one grid a tensor) or 'dynamic' (a token)."""
    scale = scale_of(one, alpha)
    chosen = config(alpha, activations)
    peaks, weights = one.inputs.abs().amax(0), one.weight.abs().amax(0)
    return Smoothed(
        alpha,
        scale,
        peaks,
        peaks / scale,
        weights,
        weights * scale,
        simulated_error(one.weight, scale, one.stats, chosen),
        simulated_error(one.weight, torch.ones_like(scale), one.stats, chosen),
    )


@dataclass(frozen=True)
class Curve:
    """Relative output error at every alpha, and without smoothing; `best` is the least's place."""

    alphas: tuple[float, ...]
    errors: tuple[float, ...]
    unsmoothed: float

    @property
    def best(self) -> int:
        return self.errors.index(min(self.errors))


def curve(one: Slice, activations: str) -> Curve:
    """The error of W8A8 on the slice along alpha."""
    errors = tuple(
        simulated_error(one.weight, scale_of(one, a), one.stats, config(a, activations))
        for a in ALPHAS
    )
    ones = torch.ones(one.weight.shape[1])
    return Curve(
        ALPHAS, errors, simulated_error(one.weight, ones, one.stats, config(0.5, activations))
    )
