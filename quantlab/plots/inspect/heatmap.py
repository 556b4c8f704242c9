"""Blocks by linears as a table of buttons: colours on a logarithmic scale, every cell with its
number in words, one tab stop for the keyboard."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import isfinite, log10

from plotly.colors import sample_colorscale

from quantlab.plots.templates import render

SCALE = "Viridis"
"""Colour-blind people see its order too, and it has one on light and on dark pages."""
STOPS = 9


def ends(values: Sequence[float]) -> tuple[float, float]:
    """Least and largest of what can be drawn on a logarithmic scale; (1, 1) of nothing."""
    shown = [value for value in values if isfinite(value) and value > 0]
    return (min(shown), max(shown)) if shown else (1.0, 1.0)


def place(value: float, low: float, high: float) -> float:
    """Where a value lies between the ends, 0 to 1, by its logarithm."""
    if not isfinite(value):
        return 1.0
    if value <= low or high <= low:
        return 0.0
    return min(log10(value / low) / log10(high / low), 1.0)


def short(path: str, paths: Sequence[str]) -> str:
    """The last part of a path, where no other path ends in it."""
    tail = path.rpartition(".")[2]
    return tail if [one.rpartition(".")[2] for one in paths].count(tail) == 1 else path


def heatmap(
    values: Mapping[str, float],
    paths: Sequence[str],
    blocks: int,
    chosen: str,
    language: str,
    *,
    label: str,
    spelled: Callable[[float], str],
    linears: Sequence[str],
    marks: Mapping[str, str] | None = None,
) -> str:
    """The table. values: what is known, by the linear's name; `linears`: all that there are, which
    can be chosen whether or not their value is known; `marks`: a remark to a cell, by name."""
    low, high = ends(list(values.values()))
    there = set(linears)
    colours = sample_colorscale(SCALE, [place(v, low, high) for v in values.values()])
    shades = dict(zip(values, colours, strict=True))
    rows = [
        {
            "path": path,
            "short": short(path, paths),
            "cells": [
                {
                    "name": f"{block}.{path}",
                    "there": f"{block}.{path}" in there,
                    "colour": shades.get(f"{block}.{path}"),
                    "value": spelled(values[name]) if (name := f"{block}.{path}") in values else "",
                    "mark": (marks or {}).get(f"{block}.{path}", ""),
                }
                for block in range(blocks)
            ],
        }
        for path in paths
    ]
    return render(
        "inspect_heatmap.html",
        language,
        rows=rows,
        blocks=blocks,
        chosen=chosen,
        label=label,
        known=len(values),
        low=spelled(low),
        middle=spelled((low * high) ** 0.5),
        high=spelled(high),
        stops=", ".join(sample_colorscale(SCALE, [at / (STOPS - 1) for at in range(STOPS)])),
    )
