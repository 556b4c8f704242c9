"""The searches by themselves: what each promises, against brute force and limits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quantlab.ggml.search import (
    IMPORTANCE_GRID,
    CandidateGrid,
    affine_search,
    descent_search,
    positive_search,
    symmetric_search,
)


def _columns(seed: int, size: int = 32, count: int = 200) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, count, generator=generator)
    return x, torch.rand(size, count, generator=generator) + 0.01


def _error(x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    return (weights * (x - y) ** 2).double().sum(0)


def test_affine_search_is_no_worse_than_min_and_max() -> None:
    x, weights = _columns(1)
    fit = affine_search(x, weights, 15, CandidateGrid(-1.0, 0.1, 20))
    q = ((x - fit.offset) * fit.inverse).round().clamp(0, 15)
    searched = _error(x, fit.scale * q - fit.minimum, weights)
    low, step = x.amin(0), (x.amax(0) - x.amin(0)) / 15
    plain = _error(x, low + step * ((x - low) / step).round(), weights)
    assert bool((searched <= plain * (1 + 1e-6)).all())
    assert searched.sum() < 0.93 * plain.sum()
    assert bool((fit.minimum >= 0).all())


def test_affine_search_solves_for_the_best_factors() -> None:
    """With the codes it ends at, no other scale and minimum have a smaller error."""
    x, weights = _columns(2)
    fit = affine_search(x, weights, 15, IMPORTANCE_GRID)
    q = ((x - fit.offset) * fit.inverse).round().clamp(0, 15)
    best = _error(x, fit.scale * q - fit.minimum, weights)
    for stretch in (0.999, 1.001):
        assert bool((best <= _error(x, stretch * fit.scale * q - fit.minimum, weights)).all())
        assert bool((best <= _error(x, fit.scale * q - stretch * fit.minimum, weights)).all())


def test_symmetric_search_is_no_worse_than_the_extreme() -> None:
    x, weights = _columns(3)
    fit = symmetric_search(x, weights, 8)
    q = (x * fit.inverse).round().clamp(-8, 7)
    searched = _error(x, fit.scale * q, weights)
    plain_scale = x.gather(0, x.abs().argmax(0, keepdim=True)) / -8
    plain = _error(x, plain_scale * (x / plain_scale).round().clamp(-8, 7), weights)
    assert bool((searched <= plain * (1 + 1e-6)).all())
    assert searched.sum() < 0.9 * plain.sum()


@pytest.mark.parametrize("seed", [4, 5])
def test_descent_only_improves(seed: int) -> None:
    x, _ = _columns(seed, size=16)
    scale, codes = descent_search(x, 4)
    plain_scale = x.gather(0, x.abs().argmax(0, keepdim=True)) / -4
    plain = _error(x, plain_scale * (x / plain_scale).round().clamp(-4, 3), x * x)
    searched = _error(x, scale * codes, x * x)
    assert bool((searched <= plain * (1 + 1e-6)).all())
    assert bool((codes == codes.round()).all())
    assert codes.min() >= -4
    assert codes.max() <= 3


def test_positive_search_is_no_worse_than_the_largest() -> None:
    x, weights = _columns(6, size=8)
    x = x.abs() + 0.1
    scale, codes = positive_search(x, weights, 63)
    searched = _error(x, scale * codes, weights)
    plain_scale = x.amax(0) / 63
    plain = _error(x, plain_scale * (x / plain_scale).round(), weights)
    assert bool((searched <= plain * (1 + 1e-6)).all())
    assert searched.sum() < 0.81 * plain.sum()


@pytest.mark.parametrize("size", [0.0, 1e-44, 1e-38, 1e-20])
def test_next_to_nothing_stays_finite(size: float) -> None:
    x = torch.linspace(-1, 1, 32).mul(size).view(32, 1)
    weights = torch.ones_like(x)
    for values in affine_search(x, weights, 15, IMPORTANCE_GRID):
        assert bool(values.isfinite().all())
    for values in (*symmetric_search(x, weights, 8), *descent_search(x, 4)):
        assert bool(values.isfinite().all())
    for values in positive_search(x.abs(), weights, 63):
        assert bool(values.isfinite().all())
