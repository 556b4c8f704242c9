"""Walkthrough 3: why one outlier ruins a tensor, and what groups save."""

from __future__ import annotations

from torch import Tensor

from quantlab.learn import outlier
from quantlab.plots.lessons import outlier as figures
from quantlab.ui.lessons.base import Control, Fact, Lesson, Scene, Shown, Step, percent, short

SHOWN = 128
"""Weights of the row that are drawn."""

TIMES = Control("times", "slider", 1, 1, 30, 0.5)
BITS = Control("bits", "slider", 4, 2, 8, 1)


def weights(scene: Scene) -> Tensor:
    return scene.slice.weight[0, :SHOWN]


def one(scene: Scene) -> Shown:
    row = weights(scene)
    times, bits = float(scene.values["times"]), int(scene.values["bits"])
    found = outlier.rounded(row, times, bits, row.shape[0], True)
    before = outlier.rounded(row, 1.0, bits, row.shape[0], True)
    return Shown(
        figure=figures.row(found, scene.say, scene.client.dark),
        facts=(
            Fact("step", short(float(found.scale[0]))),
            Fact("codes_used", f"{found.codes_used} / {2**bits - 1}"),
            Fact("rms", short(found.rms)),
            Fact("rms_times", f"{found.rms / max(before.rms, 1e-12):.1f}×"),
        ),
    )


def groups(scene: Scene) -> Shown:
    row = weights(scene)
    times, bits = float(scene.values["times"]), int(scene.values["bits"])
    size = int(scene.values["group_size"])
    found = outlier.rounded(row, times, bits, size, True)
    sweep = outlier.sweep(row, times, bits, True)
    at = sweep.group_sizes.index(found.group_size) if found.group_size in sweep.group_sizes else -1
    return Shown(
        figure=figures.row(found, scene.say, scene.client.dark, "outlier_groups"),
        facts=(
            Fact("rms", short(found.rms)),
            Fact("rms_whole", short(sweep.rms[-1])),
            Fact("bits_per_weight", f"{sweep.bits_per_weight[at]:.3f}"),
            Fact("step_outlier", short(float(found.scale[found.outlier]))),
            Fact("step_least", short(float(found.scale.min()))),
        ),
    )


def price(scene: Scene) -> Shown:
    row = weights(scene)
    times, bits = float(scene.values["times"]), int(scene.values["bits"])
    symmetric = scene.values["grid"] == "absmax"
    sweep = outlier.sweep(row, times, bits, symmetric)
    return Shown(
        figure=figures.sweep(sweep, sweep.group_sizes[0], scene.say, scene.client.dark),
        facts=(
            Fact("rms_least", short(sweep.rms[0])),
            Fact("rms_whole", short(sweep.rms[-1])),
            Fact("bits_least", f"{sweep.bits_per_weight[0]:.3f}"),
            Fact("bits_whole", f"{sweep.bits_per_weight[-1]:.3f}"),
        ),
    )


def activations(scene: Scene) -> Shown:
    found = outlier.channels(scene.slice, int(scene.values["bits"]))
    return Shown(
        figure=figures.channels(found, scene.slice.first, scene.say, scene.client.dark),
        facts=(
            Fact("channel_ratio", f"{found.ratio:,.0f}×"),
            Fact("error_with", percent(found.rms_with), "bad"),
            Fact("error_without", percent(found.rms_without), "good"),
        ),
    )


LESSON = Lesson(
    "outlier",
    (
        Step("one", one, (TIMES, BITS)),
        Step(
            "groups",
            groups,
            (
                Control("times", "slider", 10, 1, 30, 0.5),
                BITS,
                Control("group_size", "radio", 32, choices=(16, 32, 64, 128)),
            ),
        ),
        Step(
            "price",
            price,
            (
                Control("times", "slider", 10, 1, 30, 0.5),
                BITS,
                Control("grid", "radio", "absmax", choices=("absmax", "zero_point")),
            ),
        ),
        Step("activations", activations, (Control("bits", "slider", 8, 2, 8, 1),)),
    ),
)
