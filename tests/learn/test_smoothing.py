"""SmoothQuant on a slice, against the paper's formula in numpy."""

from __future__ import annotations

import numpy as np
import pytest

from quantlab.learn import material, smoothing
from quantlab.learn.material import Slice


@pytest.fixture(scope="module")
def one() -> Slice:
    return material.load()


def numbers(one: Slice) -> tuple[np.ndarray, np.ndarray]:
    return one.inputs.double().numpy(), one.weight.double().numpy()


@pytest.mark.parametrize("alpha", [0.0, 0.35, 1.0])
def test_scales_follow_equation_4(one: Slice, alpha: float) -> None:
    x, w = numbers(one)
    expected = np.abs(x).max(0) ** alpha / np.abs(w).max(0) ** (1 - alpha)
    np.testing.assert_allclose(smoothing.scale_of(one, alpha).numpy(), expected, rtol=2e-6)


@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_the_error_is_that_of_8_bit_arithmetic(one: Slice, kind: str) -> None:
    x, w = numbers(one)
    scale = smoothing.scale_of(one, 0.5).double().numpy()
    xs, ws = x / scale, w * scale
    step = np.abs(ws).max(1, keepdims=True) / 127
    q = np.round(ws / step) * step
    if kind == "static":
        low, high = min(xs.min(), 0), max(xs.max(), 0)
        x_step = (high - low) / 255
        zero = np.round(-low / x_step)
        back = (np.clip(np.round(xs / x_step) + zero, 0, 255) - zero) * x_step
    else:
        x_step = np.abs(xs).max(1, keepdims=True) / 127
        back = np.round(xs / x_step) * x_step
    wanted = x @ w.T
    error = (((back @ q.T - wanted) ** 2).sum(1) / (wanted**2).sum(1)).mean()
    found = smoothing.smoothed(one, 0.5, kind)
    assert found.error == pytest.approx(error, rel=0.02)  # a few ties fall otherwise in float32
    curve = smoothing.curve(one, kind)
    at = curve.alphas.index(0.5)
    assert curve.errors[at] == found.error
    assert curve.unsmoothed == found.unsmoothed_error
    assert curve.errors[curve.best] == min(curve.errors) < curve.unsmoothed


def test_what_leaves_the_activations_arrives_in_the_weights(one: Slice) -> None:
    found = smoothing.smoothed(one, 0.7, "static")
    product = found.inputs_after * found.weights_after
    np.testing.assert_allclose(
        product.numpy(), (found.inputs_before * found.weights_before).numpy(), rtol=1e-5
    )
    flat = smoothing.smoothed(one, 1.0, "static").inputs_after
    np.testing.assert_allclose(flat.numpy(), 1.0, rtol=1e-5)
