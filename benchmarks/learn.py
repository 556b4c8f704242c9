"""How long Learn and Inspect take to answer: `python -m benchmarks.learn [--json OUT.json]`.

For every step of every walkthrough and every view of Inspect, on what ships: milliseconds of what
is computed and drawn when a control moves, up to the JSON that the browser gets; the median and the
worst of some moves over the whole range of each control. The aim is 300 ms from the hand to the
picture.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from quantlab.inspection.detail import GRANULARITIES
from quantlab.inspection.survey import WIDTHS
from quantlab.learn import columns, material
from quantlab.ui import inspection_painting as painting
from quantlab.ui import learn_step
from quantlab.ui.client import Client
from quantlab.ui.inspection_views import MEASURES
from quantlab.ui.lessons import LESSONS
from quantlab.ui.lessons.base import Control, Lesson, Scene, Step

MOVES = 5


def moves(control: Control) -> list[Any]:
    """Values that a hand would give the control, from one end to the other."""
    if control.kind == "slider":
        span = control.maximum - control.minimum
        steps = round(span / control.step)
        places = sorted({round(steps * at / (MOVES - 1)) for at in range(MOVES)})
        return [control.minimum + control.step * place for place in places]
    if control.kind == "check":
        return [True, False]
    return list(control.choices) or ["0.1", "-3e-5", "12345"]


def measured(lesson: Lesson, step: Step, layer: str) -> list[float]:
    """Seconds of every move."""
    stage = learn_step.Stage(lesson, step, 1, figure=object() if step.figure else None)
    one = material.load(layer=layer)
    start = {control.name: control.value for control in step.controls}
    learn_step.drawn(stage, Scene(Client(), one, start, {}))
    taken = []
    for control in step.controls or (None,):
        for value in moves(control) if control else [None] * MOVES:
            values = start if control is None else {**start, control.name: value}
            columns.walk.cache_clear()
            begin = time.perf_counter()
            learn_step.drawn(stage, Scene(Client(), one, values, {}))
            taken.append(time.perf_counter() - begin)
    return taken


def inspected(name: str) -> Iterator[tuple[str, list[float]]]:
    """Seconds of every move in each view of Inspect, for one linear of the survey that ships."""
    chosen = {"file": "", "name": name}
    start = {"alpha": 0.5, "bits": 4, "symmetric": False, "granularity": "tensor"}
    spans: dict[str, Sequence[Any]] = {
        "alpha": (0.0, 0.25, 0.5, 0.75, 1.0),
        "bits": (2, 3, 4, 6, 8),
        "symmetric": (True, False),
        "granularity": GRANULARITIES,
    }
    moves = [{**start, control: value} for control, values in spans.items() for value in values]
    yield "outliers", timed(lambda one: painting.moved(Client(), chosen, **one), moves)
    yield (
        "choosing",
        timed(lambda one: painting.outliers(Client(), chosen, **one), moves[:MOVES]),
    )
    layers = [{"measure": one, "bits": bits} for one in MEASURES for bits in WIDTHS]
    yield "layers", timed(lambda one: painting.layers(Client(), chosen, **one), layers)


def timed(draw: Callable[[dict[str, Any]], object], moves: Sequence[dict[str, Any]]) -> list[float]:
    """Seconds of `draw` for each of the moves, after one that is not counted."""
    draw(moves[0])
    taken = []
    for one in moves:
        begin = time.perf_counter()
        draw(one)
        taken.append(time.perf_counter() - begin)
    return taken


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []

    def add(lesson: str, step: str, layer: str, seconds: list[float]) -> None:
        taken = [1000 * one for one in seconds]
        median, worst = round(statistics.median(taken), 1), round(max(taken), 1)
        row = {"lesson": lesson, "step": step, "layer": layer}
        rows.append({**row, "median_ms": median, "worst_ms": worst})
        print(f"{lesson:12} {step:14} {layer:22} {median:7} {worst:7}", flush=True)

    for layer in material.layers():
        for view, seconds in inspected(layer):
            add("inspect", view, layer, seconds)
    for lesson in LESSONS.values():
        for step in lesson.steps:
            for layer in material.layers():
                add(lesson.name, step.name, layer, measured(lesson, step, layer))
    print(f"slowest answer: {max(row['worst_ms'] for row in rows):.0f} ms (aim: 300 ms)")
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
