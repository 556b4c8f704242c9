"""Walkthrough 9: EfficientQAT's two phases, from a measured run."""

from __future__ import annotations

from quantlab.errors import ConfigError
from quantlab.learn import records, training
from quantlab.learn.records import Measured
from quantlab.learn.training import Losses
from quantlab.plots import numbers
from quantlab.plots.lessons import training as figures
from quantlab.ui.lessons.base import Control, Fact, Lesson, Scene, Shown, Step, short

WIDTH = Control("width", "slider", 8, 1, 32, 1)


def found(scene: Scene) -> tuple[Losses, Measured]:
    """The run in view's losses if it trained, else those that ship."""
    for measured in (scene.run, *records.shipped()):
        if measured is not None and (losses := training.losses(measured)) is not None:
            return losses, measured
    raise ConfigError("training: no record of EfficientQAT is here")


def origin(scene: Scene, measured: Measured) -> str:
    return scene.html("lesson_measured.html", measured=measured)


def block_ap(scene: Scene) -> Shown:
    losses, measured = found(scene)
    block = min(int(scene.values["block_number"]), len(losses.blocks)) - 1
    one = losses.blocks[block]
    begin, end = sum(one[:8]) / len(one[:8]), sum(one[-8:]) / len(one[-8:])
    dark = scene.client.dark
    return Shown(
        html=origin(scene, measured),
        figure=figures.blocks(losses, block, int(scene.values["width"]), scene.say, dark),
        facts=(
            Fact("loss_begin", short(begin)),
            Fact("loss_end", short(end), "good" if end < begin else ""),
            Fact("loss_fallen", f"{100 * (1 - end / begin):.0f}%"),
        ),
    )


def e2e_qp(scene: Scene) -> Shown:
    losses, measured = found(scene)
    facts = [
        Fact("qat_perplexity", numbers.perplexity(losses.record.perplexity), "good"),
        Fact("qat_kl", numbers.divergence(losses.record.kl_divergence)),
    ]
    if losses.beside is not None:
        facts.append(Fact("gptq_perplexity", numbers.perplexity(losses.beside.perplexity)))
        facts.append(Fact("gptq_kl", numbers.divergence(losses.beside.kl_divergence)))
    facts.append(Fact("qat_time", numbers.duration(losses.record.quantize_seconds)))
    return Shown(
        html=origin(scene, measured),
        figure=figures.whole(losses, int(scene.values["width"]), scene.say, scene.client.dark),
        facts=tuple(facts),
    )


def moves(scene: Scene) -> Shown:
    rows, columns = scene.slice.shape
    counts = training.moving(
        str(scene.values["phase"]), rows, columns, int(scene.values["group_size"])
    )
    every = {"weights": counts.weights, "scales": counts.scales, "zeros": counts.zeros}
    total = sum(every.values())
    return Shown(
        figure=figures.moving(every, scene.say, scene.client.dark),
        facts=(
            Fact("moving_total", f"{total:,}"),
            Fact("moving_share", f"{100 * total / (rows * columns):.3g}%"),
        ),
    )


LESSON = Lesson(
    "training",
    (
        Step("block_ap", block_ap, (Control("block_number", "slider", 4, 1, 30, 1), WIDTH)),
        Step("e2e_qp", e2e_qp, (WIDTH,)),
        Step(
            "moves",
            moves,
            (
                Control("phase", "radio", "block_ap", choices=training.PHASES),
                Control("group_size", "radio", 64, choices=(32, 64, 128)),
            ),
        ),
    ),
)
