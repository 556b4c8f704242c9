"""How long the Learn tab takes to answer: `python -m benchmarks.learn [--json OUT.json]`.

For every step of every walkthrough, on the slices that ship: milliseconds of what is computed and
drawn when a control moves, up to the JSON that the browser gets; the median and the worst of some
moves over the whole range of each control. The aim is 300 ms from the hand to the picture.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from quantlab.learn import columns, material
from quantlab.ui import learn_step
from quantlab.ui.client import Client
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


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for lesson in LESSONS.values():
        for step in lesson.steps:
            for layer in material.layers():
                taken = [1000 * seconds for seconds in measured(lesson, step, layer)]
                rows.append(
                    {
                        "lesson": lesson.name,
                        "step": step.name,
                        "layer": layer,
                        "median_ms": round(statistics.median(taken), 1),
                        "worst_ms": round(max(taken), 1),
                    }
                )
                print(
                    "{lesson:12} {step:14} {layer:22} {median_ms:7} {worst_ms:7}".format(**rows[-1])
                )
    print(f"slowest answer: {max(row['worst_ms'] for row in rows):.0f} ms (aim: 300 ms)")
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
