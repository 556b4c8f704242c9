"""KL divergence against a float64 loop, and top-1 agreement by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlab.metrics.divergence import kl_divergence, same_top1
from tests.tiny import random


def probabilities(logits: list[float]) -> list[float]:
    largest = max(logits)
    weights = [math.exp(value - largest) for value in logits]
    return [weight / sum(weights) for weight in weights]


def loop(original: list[float], variant: list[float]) -> float:
    """sum_v p_v (log p_v - log q_v), token by token."""
    p, q = probabilities(original), probabilities(variant)
    return sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True) if a > 0)


@settings(deadline=None, max_examples=50)
@given(
    seed=st.integers(0, 99),
    spread=st.sampled_from([0.1, 1.0, 8.0]),
    distance=st.sampled_from([0.01, 0.3, 4.0]),
)
def test_divergence_is_that_of_the_loop(seed: int, spread: float, distance: float) -> None:
    original = spread * random(6, 50, seed=seed)
    variant = original + distance * random(6, 50, seed=seed + 1)
    found = kl_divergence(original, variant)
    wanted = [loop(a, b) for a, b in zip(original.tolist(), variant.tolist(), strict=True)]
    torch.testing.assert_close(found, torch.tensor(wanted), rtol=1e-4, atol=2e-6)


def test_divergence_by_hand() -> None:
    original = torch.tensor([[0.5, 0.5], [0.75, 0.25]]).log()
    variant = torch.tensor([[0.75, 0.25], [0.5, 0.5]]).log()
    found = kl_divergence(original, variant).tolist()
    assert found[0] == pytest.approx(0.5 * math.log(4 / 3), abs=1e-6)
    assert found[1] == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), abs=1e-6)
    assert found[0] != pytest.approx(found[1], abs=1e-3), "the original comes first"


def test_equal_distributions_do_not_diverge() -> None:
    logits = 10 * random(20, 100)
    assert bool((kl_divergence(logits, logits.clone()) == 0).all())
    # A constant in the logits is no difference; rounding never makes it negative.
    shifted = kl_divergence(logits, logits + 31.7)
    assert bool((shifted >= 0).all())
    assert float(shifted.max()) < 1e-4


def test_confident_distributions_stay_finite() -> None:
    original, variant = torch.zeros(1, 4), torch.zeros(1, 4)
    original[0, 1], variant[0, 2] = 200.0, 200.0
    assert float(kl_divergence(original, variant)) == pytest.approx(200.0, rel=1e-4)


def test_tokens_ruled_out_by_both_add_nothing() -> None:
    """Models mask unused rows of their vocabulary with minus infinity."""
    original = torch.tensor([[0.5, 0.5, 0.0], [0.75, 0.0, 0.25]]).log()
    variant = torch.tensor([[0.75, 0.25, 0.0], [0.5, 0.25, 0.25]]).log()
    found = kl_divergence(original, variant).tolist()
    assert found == pytest.approx([0.5 * math.log(4 / 3), 0.75 * math.log(1.5)], abs=1e-6)


def test_agreement_by_hand() -> None:
    original = torch.tensor([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0], [0.0, 5.0, 4.9]])
    variant = torch.tensor([[0.0, 0.1, 0.2], [2.0, 2.1, 0.0], [9.0, 9.5, 0.0]])
    assert same_top1(original, variant).tolist() == [True, False, True]
