"""AWQ's channels and search on a slice, against numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quantlab.learn import material, salience
from quantlab.learn.material import Slice


@pytest.fixture(scope="module")
def one() -> Slice:
    return material.load()


def rounded(weight: np.ndarray, bits: int, group: int) -> np.ndarray:
    parts = weight.reshape(len(weight), -1, group)
    low, high = np.minimum(parts.min(-1), 0), np.maximum(parts.max(-1), 0)
    scale = ((high - low) / (2**bits - 1))[..., None]
    zero = np.round(-low[..., None] / scale)
    codes = np.clip(np.round(parts / scale) + zero, 0, 2**bits - 1)
    return ((codes - zero) * scale).reshape(weight.shape)


def error(one: Slice, back: np.ndarray) -> float:
    x, w = one.inputs.double().numpy(), one.weight.double().numpy()
    return float(np.square(x @ (back - w).T).sum() / np.square(x @ w.T).sum())


def test_keeping_channels(one: Slice) -> None:
    w, x = one.weight.double().numpy(), one.inputs.double().numpy()
    found = salience.kept(one, 2, 3, 64)
    assert found.count == round(0.02 * 256)
    top = np.argsort(-np.abs(x).mean(0), kind="stable")[: found.count]
    assert set(found.kept) == set(top.tolist())
    plain = rounded(w, 3, 64)
    assert found.none == pytest.approx(error(one, plain), rel=5e-3)
    plain[:, top] = w[:, top]
    assert found.errors["activations"] == pytest.approx(error(one, plain), rel=5e-3)
    assert found.errors["activations"] < found.errors["weights"] / 3
    assert found.errors["activations"] < found.errors["random"] / 3
    everything = salience.kept(one, 100, 3, 64)
    assert max(everything.errors.values()) == 0


def test_the_search_curve(one: Slice) -> None:
    w, x = one.weight.double().numpy(), one.inputs.double().numpy()
    found = salience.search(one, 4, 64)
    for exponent in (0.0, 0.4, 1.0):
        s = np.abs(x).mean(0) ** exponent
        s /= np.sqrt(s.max() * s.min())
        expected = error(one, rounded(w * s, 4, 64) / s)
        at = found.exponents.index(exponent)
        assert found.errors[at] == pytest.approx(expected, rel=2e-2)
    assert found.errors[found.best] == min(found.errors) < found.errors[0]


def test_before_and_after(one: Slice) -> None:
    best = salience.search(one, 3, 64)
    found = salience.scaled(one, best.exponents[best.best], 3, 64)
    assert found.error_after < found.error_before
    d = salience.rounded(one, 3, 64) - one.weight
    channel = int(found.before.argmax())
    expected = (d[:, channel][:, None] * one.inputs[:, channel]).square().mean(1).sum()
    assert float(found.before[channel]) == pytest.approx(float(expected), rel=1e-4)
    assert torch.equal(salience.rounded(one, 3, 64, torch.ones(256)), salience.rounded(one, 3, 64))
