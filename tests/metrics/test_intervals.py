"""Bootstrap intervals: they cover as often as they say, and pairs see small differences."""

from __future__ import annotations

import numpy as np
import pytest

from quantlab.metrics.intervals import interval, paired_interval

RUNS, SEGMENTS = 300, 64


def drawn(kind: str, seed: int) -> np.ndarray:
    """Segments with a mean of 3: symmetric, or skewed as nats are."""
    rng = np.random.default_rng(seed)
    if kind == "normal":
        return rng.normal(3, 0.5, SEGMENTS)
    return 2 + rng.gamma(2.0, 0.5, SEGMENTS)


@pytest.mark.parametrize("kind", ["normal", "skewed"])
def test_the_true_mean_is_covered_about_95_times_in_100(kind: str) -> None:
    """Percentile intervals of 64 segments cover 93 to 95 times; over 300 draws that varies by
    1.3 (one standard error)."""
    covered = sum(
        low <= 3 <= high
        for low, high in (interval(drawn(kind, seed).tolist()) for seed in range(RUNS))
    )
    assert 0.90 <= covered / RUNS <= 0.985


def test_width_follows_spread_and_number() -> None:
    values = drawn("normal", 0)
    low, high = interval(values.tolist())
    assert high - low == pytest.approx(2 * 1.96 * values.std() / SEGMENTS**0.5, rel=0.1)
    wide = interval((3 + 2 * (values - 3)).tolist())
    assert wide[1] - wide[0] == pytest.approx(2 * (high - low), rel=1e-6)
    few = interval(values[:16].tolist())
    assert few[1] - few[0] > 1.5 * (high - low)


def test_intervals_are_seeded() -> None:
    values = drawn("skewed", 1).tolist()
    assert interval(values) == interval(values)
    assert interval(values, seed=1) != interval(values)


def test_one_segment_has_no_width() -> None:
    assert interval([2.5]) == (2.5, 2.5)
    assert interval([2.0] * 9) == (2.0, 2.0)


def test_identical_inputs_are_indistinguishable() -> None:
    values = drawn("skewed", 2).tolist()
    assert paired_interval(values, values) == (0.0, 0.0, 0.0)


def test_pairs_see_what_single_intervals_cannot() -> None:
    """A loss of 0.02 nats on every segment, while segments differ by 0.5 from each other."""
    first = drawn("normal", 3)
    second = first - 0.02 + 0.01 * np.random.default_rng(0).normal(size=SEGMENTS)
    mean, low, high = paired_interval(first.tolist(), second.tolist())
    assert mean == pytest.approx(float((first - second).mean()))
    assert low <= mean <= high
    assert low > 0.015
    apart = interval(first.tolist()), interval(second.tolist())
    assert apart[0][0] < apart[1][1], "the single intervals overlap"
    other = paired_interval(second.tolist(), first.tolist())
    assert other[0] == pytest.approx(-mean)
    assert other[2] < 0


def test_noise_alone_covers_zero_about_95_times_in_100() -> None:
    covered = 0
    for seed in range(RUNS):
        base = drawn("skewed", seed)
        noise = np.random.default_rng(10_000 + seed).normal(0, 0.1, (2, SEGMENTS))
        _, low, high = paired_interval((base + noise[0]).tolist(), (base + noise[1]).tolist())
        covered += low <= 0 <= high
    assert 0.90 <= covered / RUNS <= 0.985


def test_pairs_need_the_same_segments() -> None:
    with pytest.raises(ValueError, match="shape"):
        paired_interval([1.0, 2.0], [1.0, 2.0, 3.0])
