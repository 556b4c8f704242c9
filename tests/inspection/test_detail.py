"""SmoothQuant on a whole input and grids on real values, against the formulas in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quantlab.inspection import capture, detail, survey
from quantlab.inspection.survey import Survey
from quantlab.learn import material
from quantlab.models import get_block
from tests.tiny import tiny, token_ids

NAME = "11.mlp.down_proj"


@pytest.fixture(scope="module")
def bundled() -> Survey:
    return survey.load()


@pytest.mark.parametrize("alpha", [0.0, 0.35, 1.0])
def test_scales_follow_equation_4(bundled: Survey, alpha: float) -> None:
    one = bundled.linears[NAME]
    x, w = one.read.peaks.double().numpy(), one.read.weights.double().numpy()
    s = x**alpha / w ** (1 - alpha)
    found = detail.maxima(bundled, one, alpha)
    assert found.smooth_inputs is not None
    assert found.smooth_weights is not None
    np.testing.assert_allclose(found.smooth_inputs.numpy(), x / s, rtol=1e-5)
    np.testing.assert_allclose(found.smooth_weights.numpy(), w * s, rtol=1e-5)


def test_a_value_fold_shares_scales_between_heads(bundled: Survey) -> None:
    """Three query heads read one value channel: they get the geometric mean of their scales."""
    one = bundled.linears["3.self_attn.o_proj"]
    assert (one.read.fold, bundled.attention) == ("value", (9, 3, 64))
    x, w = one.read.peaks.double().numpy(), one.read.weights.double().numpy()
    s = np.sqrt(x / w).reshape(3, 3, 64)
    shared = np.exp(np.log(s).mean(1, keepdims=True)).repeat(3, 1).reshape(-1)
    found = detail.scale_of(bundled, one, 0.5)
    assert found is not None
    np.testing.assert_allclose(found.numpy(), shared, rtol=1e-5)


def test_without_a_fold_nothing_is_smoothed() -> None:
    model = tiny("gpt2")
    found = capture.survey(model, token_ids(1, 32))
    targets = {t for fold in get_block(model.module, model.family, 0).folds for t in fold.targets}
    alone = [one for one in found.linears.values() if one.path not in targets]
    assert alone
    for one in alone:
        assert one.read.fold is None
        maxima = detail.maxima(found, one, 0.5)
        assert (maxima.smooth_inputs, maxima.smooth_weights) == (None, None)
        assert torch.equal(maxima.inputs, one.read.peaks)


@pytest.mark.parametrize("granularity", detail.GRANULARITIES)
@pytest.mark.parametrize("symmetric", [True, False])
def test_grids_are_those_of_plain_rounding(granularity: str, symmetric: bool) -> None:
    weight = material.load(layer=NAME).weight
    found, back = detail.on_grid(weight, 4, symmetric, granularity)
    w = weight.double().numpy()
    size = {"group": 64, "channel": w.shape[1], "tensor": w.size}[granularity]
    parts = w.reshape(-1, size)
    if symmetric:
        step = np.abs(parts).max(1, keepdims=True) / 7
        zero = np.full_like(step, 8)
    else:
        low, high = np.minimum(parts.min(1), 0), np.maximum(parts.max(1), 0)
        step = ((high - low) / 15)[:, None]
        zero = np.round(-low[:, None] / step)
    codes = np.clip(np.round(parts / step) + zero, 0, 15)
    rounded = ((codes - zero) * step).reshape(w.shape)
    # Values half way between two points may fall on either in float32.
    off = (np.abs(back.numpy() - rounded).reshape(parts.shape) / step).round(3)
    assert np.isin(off, (0, 1)).all()
    assert (off == 0).mean() > 0.999
    error = np.square(rounded - w).sum() / np.square(w).sum()
    assert found.error == pytest.approx(error, rel=1e-3)
    top = np.abs(parts).max(1).argmax()
    np.testing.assert_array_equal(np.sort(found.inside.numpy()), np.sort(parts[top]))
    np.testing.assert_allclose(found.levels, (np.arange(16) - zero[top]) * step[top], rtol=1e-4)
    assert found.codes_used == len(np.unique(codes[top]))
    assert found.values.numel() == w.size


def test_the_error_is_of_the_linears_output(bundled: Survey) -> None:
    real, one = material.load(layer=NAME), bundled.linears[NAME]
    scale = detail.scale_of(bundled, one, 0.6)
    assert scale is not None
    before, after = detail.distributions(real, scale, 8, True, "channel")
    assert after is not None
    x, w = real.inputs.double().numpy(), real.weight.double().numpy()
    s = scale[real.first : real.first + x.shape[1]].double().numpy()

    def error(x: np.ndarray, w: np.ndarray) -> float:
        wanted = real.inputs.double().numpy() @ real.weight.double().numpy().T
        rows = []
        for values in (x, w):
            step = np.abs(values).max(1, keepdims=True) / 127
            rows.append(np.round(values / step) * step)
        return float(np.square(rows[0] @ rows[1].T - wanted).sum() / np.square(wanted).sum())

    assert before.output_error == pytest.approx(error(x, w), rel=0.01)
    assert after.output_error == pytest.approx(error(x / s, w * s), rel=0.01)
    assert detail.distributions(real, None, 8, True, "channel")[1] is None


def test_a_groups_grid_spans_its_weights() -> None:
    levels = detail.group_levels((-0.5, 0.25), 3)
    step = 0.75 / 7
    assert levels.tolist() == pytest.approx([(code - 5) * step for code in range(8)])
