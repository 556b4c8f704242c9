"""Walkthrough 1: number formats, bit by bit."""

from __future__ import annotations

from math import inf
from typing import Any

from quantlab.errors import ConfigError
from quantlab.learn import formats
from quantlab.learn.formats import Pattern
from quantlab.plots.lessons import formats as figures
from quantlab.ui.lessons.base import Control, Fact, Lesson, Scene, Shown, Step, percent, short

ROW = Control("row", "slider", 0, 0, 47, 1)


def patterns(scene: Scene) -> tuple[float, tuple[Pattern, ...]]:
    """The typed value (an empty field means the chosen weight) in every format."""
    row = scene.slice.weight[min(int(scene.values["row"]), scene.slice.weight.shape[0] - 1)]
    text = str(scene.values["value"] or "").strip()
    value = formats.parse(text) if text else float(row[0])
    symmetric = scene.values["grid"] == "absmax"
    return value, (*formats.floats(value), *formats.integers(value, row, symmetric))


def bits(scene: Scene) -> Shown:
    value, found = patterns(scene)
    rows = []
    for pattern in found:
        parts, start = [], 0
        names = ("sign", "exponent", "mantissa") if len(pattern.fields) == 3 else ("code",)
        for name, width in zip(names, pattern.fields, strict=True):
            places = range(start, start + width)
            parts.append({"name": name, "bits": [(at, pattern.bits[at]) for at in places]})
            start += width
        error = abs(pattern.value - value)
        rows.append(
            {
                "name": pattern.name,
                "title": pattern.title,
                "count": len(pattern.bits),
                "parts": parts,
                "value": short(pattern.value),
                "exact": repr(pattern.value),
                "error": percent(error / abs(value)) if value and 0 < error < inf else "",
                "same": error == 0,
                "scale": None if pattern.scale is None else short(pattern.scale),
                "zero": pattern.zero,
            }
        )
    return Shown(html=scene.html("lesson_bits.html", rows=rows, value=repr(value)))


def flip(scene: Scene, what: str) -> dict[str, Any]:
    """`flip:bf16:3` turns over bit 3: the value becomes what the bits then spell."""
    _, name, place = what.split(":")
    _, found = patterns(scene)
    pattern = next((one for one in found if one.name == name), None)
    if pattern is None or not 0 <= int(place) < len(pattern.bits):
        raise ConfigError("bit: there is no such place")
    return {"value": repr(formats.flipped(pattern, int(place)))}


def spacing(scene: Scene) -> Shown:
    row = scene.slice.weight[min(int(scene.values["row"]), scene.slice.weight.shape[0] - 1)]
    found = formats.precision(row)
    exponent = float(scene.values["magnitude"])
    at = 2.0**exponent
    place = min(range(len(found.at)), key=lambda one: abs(found.at[one] - at))
    facts = []
    for name in ("fp16", "bf16", "e4m3", "int8", "int4"):
        gap = found.spacing[name][place]
        facts.append(Fact(f"spacing_{name}", "–" if gap is None else percent(gap)))
    return Shown(
        figure=figures.precision(found, found.at[place], scene.say, scene.client.dark),
        facts=(Fact("magnitude", short(found.at[place])), *facts),
    )


LESSON = Lesson(
    "formats",
    (
        Step(
            "bits",
            bits,
            (
                Control("value", "text", ""),
                ROW,
                Control("grid", "radio", "absmax", choices=("absmax", "zero_point")),
            ),
            act=flip,
            figure=False,
        ),
        Step("spacing", spacing, (Control("magnitude", "slider", -5, -30, 20, 1), ROW)),
    ),
)
