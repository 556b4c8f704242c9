"""Walkthrough 4: SmoothQuant moves the difficulty from activations to weights."""

from __future__ import annotations

from torch import Tensor

from quantlab.learn import smoothing
from quantlab.plots.lessons import smoothing as figures
from quantlab.ui.lessons.base import Control, Fact, Lesson, Scene, Shown, Step, percent

ALPHA = Control("alpha", "slider", 0.5, 0, 1, 0.05)
ACTIVATIONS = Control("activations", "radio", "static", choices=("static", "dynamic"))


def spread(peaks: Tensor) -> str:
    """How far the largest channel stands above the median one."""
    return f"{float(peaks.max() / peaks.median().clamp_min(1e-12)):,.1f}×"


def distributions(scene: Scene) -> Shown:
    kind = str(scene.values["activations"])
    found = smoothing.smoothed(scene.slice, float(scene.values["alpha"]), kind)
    better = found.error <= found.unsmoothed_error
    return Shown(
        figure=figures.distributions(found, scene.slice.first, scene.say, scene.client.dark),
        facts=(
            Fact("spread_inputs", spread(found.inputs_after)),
            Fact("spread_weights", spread(found.weights_after)),
            Fact("output_error", percent(found.error), "good" if better else "bad"),
            Fact("unsmoothed", percent(found.unsmoothed_error)),
        ),
    )


def error(scene: Scene) -> Shown:
    alpha, kind = float(scene.values["alpha"]), str(scene.values["activations"])
    curve = smoothing.curve(scene.slice, kind)
    here = smoothing.smoothed(scene.slice, alpha, kind)
    return Shown(
        figure=figures.curve(curve, alpha, scene.say, scene.client.dark),
        facts=(
            Fact("output_error", percent(here.error)),
            Fact("best_alpha", f"{curve.alphas[curve.best]:.2f}"),
            Fact("best_error", percent(curve.errors[curve.best]), "good"),
            Fact("unsmoothed", percent(curve.unsmoothed)),
        ),
    )


LESSON = Lesson(
    "smoothing",
    (
        Step("distributions", distributions, (ALPHA, ACTIVATIONS)),
        Step("error", error, (ALPHA, ACTIVATIONS)),
    ),
)
