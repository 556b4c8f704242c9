"""Walkthrough 7: NF4, its codebook, and double quantization."""

from __future__ import annotations

from quantlab.learn import codebooks
from quantlab.plots.lessons import codebooks as figures
from quantlab.ui.lessons.base import Control, Fact, Lesson, Scene, Shown, Step, percent

BLOCK = Control("block_size", "radio", 64, choices=(32, 64, 128, 256))


def codebook(scene: Scene) -> Shown:
    name = str(scene.values["codebook"])
    found = codebooks.coded(scene.slice, name, int(scene.values["block_size"]))
    best = min(found.rms, key=lambda one: found.rms[one])
    return Shown(
        figure=figures.codebook(found, scene.say, scene.client.dark),
        facts=tuple(
            Fact(f"rms_{one}", percent(found.rms[one]), "good" if one == best else "")
            for one in codebooks.NAMES
        ),
    )


def double(scene: Scene) -> Shown:
    found = codebooks.doubled(scene.slice, int(scene.values["block_size"]))
    return Shown(
        figure=figures.doubled(found, scene.say, scene.client.dark),
        facts=(
            Fact("bits_plain", f"{found.bits[0]:.3f}"),
            Fact("bits_double", f"{found.bits[1]:.3f}", "good"),
            Fact("rms_plain", percent(found.rms[0])),
            Fact("rms_double", percent(found.rms[1])),
            Fact("scale_error", percent(found.scale_error)),
        ),
    )


LESSON = Lesson(
    "codebooks",
    (
        Step(
            "codebook",
            codebook,
            (Control("codebook", "radio", "nf4", choices=codebooks.NAMES), BLOCK),
        ),
        Step("double", double, (BLOCK,)),
    ),
)
