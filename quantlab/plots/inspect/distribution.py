"""A tensor's values and the grid that rounds them, before and after smoothing; and a weight's."""

from __future__ import annotations

from math import log10
from typing import Any

import plotly.graph_objects as go
import torch
from torch import Tensor

from quantlab.inspection.detail import OnGrid, group_levels
from quantlab.inspection.survey import Linear
from quantlab.plots import palette
from quantlab.plots.inspect.base import sheet
from quantlab.plots.lessons.base import cool, warm
from quantlab.plots.words import Words

BINS = 72
GAP = 0.42
"""Space between two panels, as a share of a panel's height."""


def distribution(
    before: OnGrid, after: OnGrid | None, key: str, say: Words, dark: bool
) -> go.Figure:
    """Histograms (logarithmic counts) of all values, and of those that share the drawn grid; the
    grid's points as ticks below. `key`: 'inputs' or 'weights'."""
    panels = [before] if after is None else [before, after]
    titles = ("inspect_before", "inspect_after")
    figure = sheet(say, dark, key, 210 + 165 * len(panels))
    colour = cool(dark) if key == "inputs" else warm(dark)
    traces: list[dict[str, Any]] = []
    layout: dict[str, Any] = {"annotations": []}
    for row, found in enumerate(panels):
        low, high = (float(end) for end in torch.aminmax(found.values))
        low, high = min(low, float(found.levels[0])), max(high, float(found.levels[-1]))
        whole = found.inside.numel() == found.values.numel()
        drawn = [] if whole else [(found.values, palette.MUTED[dark], "inspect_all", 0.35)]
        drawn.append((found.inside, colour, "inspect_all" if whole else "inspect_inside", 1.0))
        made = [
            bars(torch.histc(values, BINS, low, high), low, high, shade, say(name), opacity)
            for values, shade, name, opacity in drawn
        ]
        rug = ticks(found.levels, palette.INK[dark], say("inspect_levels"))
        top = 1 - row * (1 + GAP) / (len(panels) * (1 + GAP) - GAP)
        height = 1 / (len(panels) * (1 + GAP) - GAP)
        traces += panel(
            layout, 2 * row + 1, top, height, _padded(low, high), made, [rug], say, dark
        )
        layout["annotations"].append(
            {
                "text": say(titles[row]),
                "x": 0,
                "y": top,
                "xref": "paper",
                "yref": "paper",
                "xanchor": "left",
                "yanchor": "bottom",
                "yshift": 4,
                "showarrow": False,
                "font": {"size": 12.5, "color": palette.INK[dark]},
            }
        )
    seen: set[str] = set()
    for trace in traces:
        trace |= {"legendgroup": trace["name"], "showlegend": trace["name"] not in seen}
        seen.add(trace["name"])
    figure.add_traces(traces)
    figure.update_layout(
        barmode="overlay",
        bargap=0,
        showlegend=True,
        legend={"orientation": "h", "x": 0, "y": -0.1, "yanchor": "top"},
        margin={"b": 76, "t": 84},
        **layout,
    )
    return figure


def panel(
    layout: dict[str, Any],
    number: int,
    top: float,
    height: float,
    across: list[float],
    counts: list[dict[str, Any]],
    rugs: list[dict[str, Any]],
    say: Words,
    dark: bool,
) -> list[dict[str, Any]]:
    """Traces of one panel, and its axes in `layout`: counts above (y axis `number`), grids as rows
    of marks below (y axis `number` + 1), both over x axis `number`. Heights are shares of the
    figure."""
    most = max((y or 1 for trace in counts for y in trace["y"]), default=1)
    names = ["" if one == 1 else str(one) for one in (number, number + 1)]
    share = 0.1 + 0.07 * len(rugs)
    line = {
        "gridcolor": palette.GRID[dark],
        "zeroline": False,
        "tickfont": {"size": 11, "color": palette.MUTED[dark]},
    }
    layout[f"yaxis{names[0]}"] = line | {
        "domain": [top - height * (1 - share), top],
        "anchor": f"x{names[0]}",
        "type": "log",
        "dtick": 1,
        "range": [log10(0.6), log10(most) + 0.2],
        "title": {
            "text": say("inspect_axis_count"),
            "font": {"size": 12, "color": palette.MUTED[dark]},
        },
    }
    layout[f"yaxis{names[1]}"] = {
        "domain": [top - height, top - height * (1 - share)],
        "anchor": f"x{names[0]}",
        "visible": False,
        "fixedrange": True,
        "range": [-0.5, len(rugs) - 0.5],
    }
    layout[f"xaxis{names[0]}"] = line | {"anchor": f"y{names[1]}", "range": across}
    return [
        trace | {"xaxis": f"x{names[0]}", "yaxis": f"y{name}", **more}
        for name, group in ((names[0], counts), (names[1], rugs))
        for place, trace in enumerate(group)
        for more in [{} if group is counts else {"y": [place] * len(trace["x"])}]
    ]


def bars(
    counts: Tensor, low: float, high: float, colour: str, name: str, opacity: float = 1.0
) -> dict[str, Any]:
    """A histogram of bins of equal width from low to high; counts: [bins]."""
    bins = len(counts)
    width = (high - low) / bins
    return {
        "type": "bar",
        "x": [low + width * (at + 0.5) for at in range(bins)],
        "y": [count or None for count in counts.tolist()],
        "width": width,
        "marker": {"color": colour, "line": {"width": 0}},
        "opacity": opacity,
        "name": name,
        "hovertemplate": "%{x:.4g}: %{y:,}<extra></extra>",
    }


def ticks(levels: Tensor, colour: str, name: str) -> dict[str, Any]:
    """A grid's points as short marks; the panel gives their height."""
    few = len(levels) <= 64
    return {
        "type": "scatter",
        "x": levels.tolist(),
        "mode": "markers",
        "marker": {
            "symbol": "line-ns",
            "size": 11 if few else 8,
            "line": {"width": 1.6 if few else 0.8, "color": colour},
        },
        "name": name,
        "cliponaxis": False,
        "hovertemplate": "%{x:.4g}<extra></extra>",
    }


def _padded(low: float, high: float) -> list[float]:
    span = (high - low) or 1.0
    return [low - 0.02 * span, high + 0.02 * span]


def weight(one: Linear, bits: int, say: Words, dark: bool) -> go.Figure:
    """All weights of a linear by size, and below them the grids of two of its groups: the one in
    the middle by span, and the widest."""
    figure = sheet(say, dark, "weight", 340, name=one.name, bits=bits)
    high = one.largest
    counts = [bars(one.histogram, -high, high, palette.MUTED[dark], say("inspect_all"))]
    grids = [
        ticks(group_levels(one.widest, bits), warm(dark), say("inspect_widest")),
        ticks(group_levels(one.usual, bits), cool(dark), say("inspect_usual")),
    ]
    layout: dict[str, Any] = {}
    figure.add_traces(panel(layout, 1, 1.0, 1.0, _padded(-high, high), counts, grids, say, dark))
    figure.update_layout(
        bargap=0,
        showlegend=True,
        legend={"orientation": "h", "x": 0, "y": -0.12, "yanchor": "top"},
        margin={"b": 90},
        **layout,
    )
    return figure
