"""Observers against their definitions in numpy: quantiles of sorted values, brute-force search."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantlab.observers import (
    OCTAVES,
    STEPS,
    bin_values,
    count_values,
    mse_range,
    percentile_range,
)

U = 2.0**-8
"""Largest relative error of rounding to bfloat16."""


def samples(name: str, seed: int = 0, count: int = 20_011) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, generator=generator)
    match name:
        case "normal":
            return x
        case "one-sided":
            return x.abs() * 3
        case "negative":
            return -x.abs() - 0.5
        case "massive":
            x[7], x[1234] = 3100.0, -220.0
            return x
        case "heavy":
            return x.sign() * x.abs().exp().pow(1.5)
        case "tiny":
            return x * 1e-20
    raise ValueError(name)


NAMES = ["normal", "one-sided", "negative", "massive", "heavy", "tiny"]


def rounded(x: Tensor) -> np.ndarray:
    return x.to(torch.bfloat16).double().numpy()


# --- counting ----------------------------------------------------------------------------------


def test_bins_are_all_bfloat16_numbers_in_order() -> None:
    values = bin_values()
    finite = values[torch.isfinite(values)]
    assert bool((finite.diff() >= 0).all())
    assert int((finite.diff() == 0).sum()) == 1  # -0 and 0
    assert values.unique().numel() >= 2**16 - 2 * 127 - 3
    assert torch.equal(finite.to(torch.bfloat16).float(), finite)


@pytest.mark.parametrize("name", NAMES)
def test_counts_are_those_of_the_rounded_values(name: str) -> None:
    x = samples(name)
    counts = count_values(x.view(1, -1))
    found = dict(zip(bin_values().tolist(), counts.tolist(), strict=True))
    for value, times in zip(*np.unique(rounded(x), return_counts=True), strict=True):
        assert found.pop(float(value)) == times
    assert not any(found.values())
    assert counts.dtype == torch.int64


def test_counts_add_up_over_batches() -> None:
    x = samples("heavy")
    parts = [count_values(part) for part in x.split(777)]
    assert torch.equal(torch.stack(parts).sum(0), count_values(x))


def test_what_is_not_finite_goes_uncounted() -> None:
    inf = float("inf")
    counts = count_values(torch.tensor([inf, -inf, float("nan"), -float("nan"), 1.0, -0.0, 0.0]))
    assert int(counts.sum()) == 3


# --- percentile --------------------------------------------------------------------------------


@pytest.mark.parametrize("percentile", [99.0, 99.9, 99.99, 99.999, 100.0])
@pytest.mark.parametrize("name", NAMES)
def test_percentiles_are_numpy_s(name: str, percentile: float) -> None:
    """`inverted_cdf` is numpy's name for the smallest value that enough values do not exceed."""
    x = samples(name)
    low, high = percentile_range(count_values(x), percentile)
    tails = [(100 - percentile) / 2, 100 - (100 - percentile) / 2]
    wanted = np.percentile(rounded(x), tails, method="inverted_cdf")
    assert [float(low), float(high)] == wanted.tolist()
    near = np.percentile(x.double().numpy(), tails, method="inverted_cdf")
    assert np.all(np.abs(wanted - near) <= U * np.abs(near))


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.floats(-1e4, 1e4, width=16), min_size=1, max_size=300),
    st.sampled_from([99.0, 99.5, 99.9, 100.0]),
)
def test_no_more_than_the_tails_is_cut_off(values: list[float], percentile: float) -> None:
    x = torch.tensor(values).to(torch.bfloat16).float()
    low, high = percentile_range(count_values(x), percentile)
    outside = [int((x < low).sum()), int((x > high).sum())]
    assert all(count <= (100 - percentile) / 200 * len(values) + 1e-9 for count in outside)
    assert low in x
    assert high in x


# --- least squared error -----------------------------------------------------------------------


def squared_error(x: np.ndarray, low: float, high: float) -> float:
    """Sum of (Q(x) - x)^2 on the 8-bit zero-point grid of [low, high], written out."""
    low, high = min(low, 0.0), max(high, 0.0)
    step = (high - low) / 255
    zero = np.round(-low / step)
    codes = np.clip(np.round(x / step) + zero, 0, 255)
    return float(np.sum(((codes - zero) * step - x) ** 2))


@pytest.mark.parametrize("name", ["normal", "one-sided", "negative", "massive", "heavy"])
@pytest.mark.parametrize("seed", [0, 1])
def test_mse_finds_the_best_threshold(name: str, seed: int) -> None:
    x = rounded(samples(name, seed))
    low, high = (float(v) for v in mse_range(count_values(torch.tensor(x))))
    tried = {}
    for k in range(OCTAVES * STEPS + 1):
        threshold = float(np.abs(x).max()) * 2 ** (-k / STEPS)
        bounds = max(float(x.min()), -threshold), min(float(x.max()), threshold)
        tried[bounds] = squared_error(x, *bounds)
    best = min(tried.values())
    assert squared_error(x, low, high) == pytest.approx(best, rel=1e-3)
    # And no threshold in between is much better: the error is flat about its minimum.
    fine = np.abs(x).max() * np.exp2(-np.linspace(0, OCTAVES, 1200))
    finest = min(squared_error(x, max(x.min(), -t), min(x.max(), t)) for t in fine)
    assert best <= 1.1 * finest


@pytest.mark.parametrize("name", NAMES)
def test_mse_beats_the_other_observers_at_its_own_measure(name: str) -> None:
    x = rounded(samples(name))
    counts = count_values(torch.tensor(x))
    ours = squared_error(x, *(float(v) for v in mse_range(counts)))
    for percentile in (99.0, 99.9, 99.99, 100.0):
        low, high = (float(v) for v in percentile_range(counts, percentile))
        # Its thresholds are symmetric and an eighth of an octave apart.
        assert ours <= 1.1 * squared_error(x, low, high)
    assert ours <= squared_error(x, x.min(), x.max()) * (1 + 1e-6)


def test_an_outlier_is_clipped_only_where_the_others_outweigh_it() -> None:
    """A million normal values gain more by finer steps than one of 30 loses; against one of 3,100
    nothing weighs as much, so that the least squared error keeps it."""
    x = samples("normal", count=1_000_000)
    for outlier, clipped in ((30.0, True), (3100.0, False)):
        x[5] = outlier
        _, high = mse_range(count_values(x))
        assert (float(high) < 15) is clipped
        assert clipped or float(high) == pytest.approx(outlier, rel=U)


def test_constant_and_zero_inputs() -> None:
    for value in (0.0, 2.5, -2.5):
        counts = count_values(torch.full((50,), value))
        for low, high in (percentile_range(counts, 99.9), mse_range(counts)):
            assert float(low) <= value <= float(high)
            assert bool(torch.isfinite(low) & torch.isfinite(high))
