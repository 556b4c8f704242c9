"""Walkthrough 8: blocks of GGUF, byte by byte."""

from __future__ import annotations

from typing import Any

from quantlab.errors import ConfigError
from quantlab.learn import superblock
from quantlab.learn.superblock import Taken
from quantlab.plots.lessons import superblock as figures
from quantlab.ui.lessons.base import Control, Fact, Lesson, Scene, Shown, Step, percent, short

ROW = Control("row", "slider", 0, 0, 47, 1)


def block(scene: Scene, kind: str) -> Shown:
    weights = superblock.weights_of(scene.slice, int(scene.values["row"]))
    found = superblock.taken_apart(weights, kind, int(scene.values.get("block", 0)))
    chosen = min(int(scene.state.get(kind, 0)), len(found.bytes) - 1)
    byte = found.bytes[chosen]
    html = scene.html(
        "lesson_bytes.html",
        kind=kind,
        bytes=[(at, f"{one.value:02x}", one.field) for at, one in enumerate(found.bytes)],
        fields=list(dict.fromkeys(one.field for one in found.bytes)),
        chosen=chosen,
        byte=byte,
        spelled=f"{byte.value:08b}",
        lines=explained(scene, found, chosen),
    )
    error = float((found.decoded - found.weights).square().mean().sqrt())
    size = float(found.weights.square().mean().sqrt())
    return Shown(
        html=html,
        figure=figures.weights(found, byte.weights, scene.say, scene.client.dark),
        facts=(
            Fact("block_bytes", f"{len(found.bytes)} / {len(found.weights)}"),
            Fact("bits_per_weight", f"{found.bits_per_weight:.4g}"),
            Fact("block_error", percent(error / size) if size else "–"),
        ),
    )


def explained(scene: Scene, found: Taken, chosen: int) -> list[str]:
    """What the chosen byte means, in sentences."""
    say, byte = scene.say, found.bytes[chosen]
    if byte.field == "qs":
        name = "learn_says_code_k" if found.type == "q4_k" else "learn_says_code_0"
        return [
            say(
                name,
                half=say("learn_low_half") if at == 0 else say("learn_high_half"),
                code=code,
                place=place,
                scale=short(float(found.scales[place])),
                minimum=short(float(found.minima[place])),
                value=short(float(found.decoded[place])),
                weight=short(float(found.weights[place])),
            )
            for at, (place, code) in enumerate(zip(byte.weights, byte.codes, strict=True))
        ]
    if byte.field == "scales":
        at = chosen - 4
        part = "first" if at < 4 else "second" if at < 8 else "third"
        lines = [say(f"learn_says_scales_{part}", place=at % 4, later=at % 4 + 4)]
        picked = (at % 4, at % 4 + 4)
        return lines + [
            say(
                "learn_says_factor",
                place=place,
                scale=found.factors[place][0],
                minimum=found.factors[place][1],
            )
            for place in picked
        ]
    value = found.d if byte.field == "d" else found.dmin
    return [say(f"learn_says_{byte.field}", value=short(value or 0.0))]


def choose(kind: str) -> Any:
    """The answer to a click on a byte."""

    def chosen(scene: Scene, what: str) -> dict[str, Any]:
        place = int(what.removeprefix("byte:"))
        if place < 0:
            raise ConfigError("byte: there is no such place")
        return {kind: place}

    return chosen


def beside(scene: Scene) -> Shown:
    found = superblock.compared(scene.slice, int(scene.values["rows"]))
    errors = dict(zip(found.types, found.errors, strict=True))
    return Shown(
        figure=figures.compared(found, scene.say, scene.client.dark),
        facts=(
            Fact("error_q4_0", percent(errors["q4_0"])),
            Fact("error_q4_k", percent(errors["q4_k"]), "good"),
            Fact("bits_both", "4.5"),
        ),
    )


LESSON = Lesson(
    "superblock",
    (
        Step(
            "q4_0",
            lambda scene: block(scene, "q4_0"),
            (ROW, Control("block", "slider", 0, 0, 7, 1)),
            act=choose("q4_0"),
        ),
        Step("q4_k", lambda scene: block(scene, "q4_k"), (ROW,), act=choose("q4_k")),
        Step("beside", beside, (Control("rows", "slider", 48, 1, 48, 1),)),
    ),
)
