"""Walkthrough 6: AWQ, the channels that matter."""

from __future__ import annotations

from quantlab.learn import salience
from quantlab.plots.lessons import salience as figures
from quantlab.ui.lessons.base import Control, Fact, Lesson, Scene, Shown, Step, percent

BITS = Control("bits", "slider", 3, 2, 8, 1)
GROUP = Control("group_size", "radio", 64, choices=(32, 64, 128, 256))
EXPONENT = Control("exponent", "slider", 0.5, 0, 1, 0.05)


def keep(scene: Scene) -> Shown:
    found = salience.kept(
        scene.slice,
        float(scene.values["percent"]),
        int(scene.values["bits"]),
        int(scene.values["group_size"]),
    )
    return Shown(
        figure=figures.kept(found, scene.slice.first, scene.say, scene.client.dark),
        facts=(
            Fact("kept_channels", f"{found.count} / {len(found.importance)}"),
            Fact("kept_activations", percent(found.errors["activations"]), "good"),
            Fact("kept_weights", percent(found.errors["weights"])),
            Fact("kept_random", percent(found.errors["random"])),
            Fact("kept_none", percent(found.none)),
        ),
    )


def search(scene: Scene) -> Shown:
    exponent = float(scene.values["exponent"])
    found = salience.search(scene.slice, int(scene.values["bits"]), int(scene.values["group_size"]))
    here = min(range(len(found.exponents)), key=lambda one: abs(found.exponents[one] - exponent))
    return Shown(
        figure=figures.search(found, found.exponents[here], scene.say, scene.client.dark),
        facts=(
            Fact("error_here", percent(found.errors[here])),
            Fact("best_exponent", f"{found.exponents[found.best]:.2f}"),
            Fact("best_awq", percent(found.errors[found.best]), "good"),
            Fact("plain", percent(found.errors[0])),
        ),
    )


def after(scene: Scene) -> Shown:
    found = salience.scaled(
        scene.slice,
        float(scene.values["exponent"]),
        int(scene.values["bits"]),
        int(scene.values["group_size"]),
    )
    better = found.error_after <= found.error_before
    return Shown(
        figure=figures.scaled(found, scene.slice.first, scene.say, scene.client.dark),
        facts=(
            Fact("plain", percent(found.error_before)),
            Fact("error_scaled", percent(found.error_after), "good" if better else "bad"),
            Fact("largest_scale", f"{float(found.scale.max() / found.scale.median()):.1f}×"),
        ),
    )


LESSON = Lesson(
    "salience",
    (
        Step("keep", keep, (Control("percent", "slider", 1, 0, 20, 0.5), BITS, GROUP)),
        Step("search", search, (EXPONENT, BITS, GROUP)),
        Step("after", after, (EXPONENT, BITS, GROUP)),
    ),
)
