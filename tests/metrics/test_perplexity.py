"""Perplexity by hand: tokens of known probability."""

from __future__ import annotations

import math

import pytest
import torch

from quantlab.metrics.perplexity import negative_log_likelihood, perplexity, perplexity_interval
from tests.tiny import random


def test_likelihood_by_hand() -> None:
    probabilities = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7], [1 / 3] * 3])
    # A constant added to every logit of a position changes nothing.
    logits = probabilities.log() + torch.tensor([[0.0], [40.0], [-7.0]])
    nats = negative_log_likelihood(logits, torch.tensor([1, 2, 0]))
    wanted = [math.log(4), -math.log(0.7), math.log(3)]
    torch.testing.assert_close(nats, torch.tensor(wanted), rtol=0, atol=1e-5)
    # exp of the mean is the geometric mean of 4, 1/0.7 and 3.
    assert perplexity(float(nats.mean())) == pytest.approx((4 / 0.7 * 3) ** (1 / 3), rel=1e-5)


def test_likelihood_against_a_loop() -> None:
    logits, targets = 5 * random(40, 30), torch.arange(40) % 30
    nats = negative_log_likelihood(logits, targets)
    for row, target, found in zip(logits.tolist(), targets.tolist(), nats.tolist(), strict=True):
        total = sum(math.exp(value) for value in row)
        assert found == pytest.approx(-math.log(math.exp(row[target]) / total), abs=1e-4)


def test_certainty_and_a_uniform_guess() -> None:
    assert perplexity(0.0) == 1.0
    uniform = negative_log_likelihood(torch.zeros(5, 64), torch.arange(5))
    assert perplexity(float(uniform.mean())) == pytest.approx(64)


@pytest.mark.parametrize("nats", [float("nan"), float("inf"), 701.0, 1e9])
def test_no_number_where_there_is_none(nats: float) -> None:
    """JSON has no infinity, and a broken model no perplexity."""
    assert perplexity(nats) is None


def test_a_certain_mistake_is_infinite() -> None:
    logits = torch.tensor([[0.0, -float("inf")]])
    assert perplexity(float(negative_log_likelihood(logits, torch.tensor([1])))) is None


def test_the_interval_is_that_of_the_mean_nats() -> None:
    segments = (3 + 0.3 * random(60)).tolist()
    found = perplexity_interval(segments)
    assert found is not None
    low, high = found
    middle = math.exp(sum(segments) / len(segments))
    assert low < middle < high
    # A normal approximation, within a fifth of its width.
    error = float(torch.tensor(segments).std()) / math.sqrt(60)
    assert math.log(low) == pytest.approx(math.log(middle) - 1.96 * error, abs=0.4 * error)
    assert math.log(high) == pytest.approx(math.log(middle) + 1.96 * error, abs=0.4 * error)


def test_no_interval_of_a_broken_model() -> None:
    assert perplexity_interval([3.0, float("nan")]) is None
    assert perplexity_interval([3.0, float("inf")]) is None
    assert perplexity_interval([800.0, 900.0]) is None
