"""Confidence intervals by the bootstrap, over segments of the evaluation tokens.

A segment is 128 consecutive tokens of one window. Whole windows would be the natural unit, but a
comparison has only 4 to 8 of them, too few to resample; at 128 tokens neighbours are nearly
independent in nats lost, and there are 8 segments a window.
Source: Efron and Tibshirani 1993, chapter 13 (percentile interval).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

SEGMENT_TOKENS = 128
RESAMPLES = 4000
LEVEL = 0.95


def interval(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """95% interval (low, high) of the mean of `values`, one value a segment."""
    data = np.asarray(values, dtype=np.float64)
    rng = np.random.default_rng(seed)
    means = data[rng.integers(0, len(data), (RESAMPLES, len(data)))].mean(1)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def paired_interval(
    first: Sequence[float], second: Sequence[float], seed: int = 0
) -> tuple[float, float, float]:
    """(mean, low, high) of first - second, both measured on the same segments.

    Where the interval covers zero the two are indistinguishable on this text.
    """
    difference = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    low, high = interval(difference.tolist(), seed)
    return float(difference.mean()), low, high
