"""A tensor's values and the grid that rounds them, before and after smoothing; and a weight's."""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go
import torch
from torch import Tensor

from quantlab.inspection.detail import OnGrid, group_levels
from quantlab.inspection.survey import Linear
from quantlab.plots import palette
from quantlab.plots.inspect.base import sheet
from quantlab.plots.lessons.base import cool, halves, warm
from quantlab.plots.words import Words

BINS = 72


def distribution(
    before: OnGrid, after: OnGrid | None, key: str, say: Words, dark: bool
) -> go.Figure:
    """Histograms (logarithmic counts) of all values, and of those that share the drawn grid; the
    grid's points as ticks below. `key`: 'inputs' or 'weights'."""
    panels = [before] if after is None else [before, after]
    titles = [say("inspect_before"), say("inspect_after")][: len(panels)]
    split = halves(len(panels), 1, vertical_spacing=0.2, subplot_titles=titles)
    figure = sheet(say, dark, key, 210 + 165 * len(panels), split)
    colour = cool(dark) if key == "inputs" else warm(dark)
    traces, axes = [], {}
    for row, found in enumerate(panels):
        low, high = (float(end) for end in torch.aminmax(found.values))
        low, high = min(low, float(found.levels[0])), max(high, float(found.levels[-1]))
        whole = found.inside.numel() == found.values.numel()
        drawn = [] if whole else [(found.values, palette.MUTED[dark], "inspect_all", 0.35)]
        drawn.append((found.inside, colour, "inspect_all" if whole else "inspect_inside", 1.0))
        axis = "" if row == 0 else str(row + 1)
        made = [
            bars(torch.histc(values, BINS, low, high), low, high, shade, say(name), opacity)
            for values, shade, name, opacity in drawn
        ]
        made.append(ticks(found.levels, palette.INK[dark], say("inspect_levels")))
        for trace in made:
            seen = {one["name"] for one in traces}
            group = {"legendgroup": trace["name"], "showlegend": trace["name"] not in seen}
            traces.append(trace | group | {"xaxis": f"x{axis}", "yaxis": f"y{axis}"})
        axes[f"xaxis{axis}"] = {"range": _padded(low, high), "zeroline": False}
        axes[f"yaxis{axis}"] = _counts(say)
    figure.add_traces(traces)
    figure.update_layout(
        barmode="overlay",
        bargap=0,
        showlegend=True,
        legend={"orientation": "h", "x": 0, "y": -0.13, "yanchor": "top"},
        margin={"b": 84, "t": 86},
        **axes,
    )
    return figure


def _counts(say: Words) -> dict[str, Any]:
    return {"type": "log", "title": {"text": say("inspect_axis_count")}, "dtick": 1}


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


def ticks(levels: Tensor, colour: str, name: str, y: float = 0.75) -> dict[str, Any]:
    """A grid's points as short marks at height `y` of the axis (a count below one)."""
    few = len(levels) <= 64
    return {
        "type": "scatter",
        "x": levels.tolist(),
        "y": [y] * len(levels),
        "mode": "markers",
        "marker": {
            "symbol": "line-ns",
            "size": 9 if few else 6,
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
    figure = sheet(say, dark, "weight", 320, name=one.name, bits=bits)
    high = one.largest
    grids = (
        (one.usual, "inspect_usual", cool(dark), 0.62),
        (one.widest, "inspect_widest", warm(dark), 0.3),
    )
    figure.add_traces(
        [
            bars(one.histogram, -high, high, palette.MUTED[dark], say("inspect_all")),
            *(
                ticks(group_levels(ends, bits), colour, say(name), y)
                for ends, name, colour, y in grids
            ),
        ]
    )
    figure.update_layout(
        bargap=0,
        showlegend=True,
        legend={"orientation": "h", "x": 0, "y": -0.2, "yanchor": "top"},
        margin={"b": 84},
        xaxis={"title": {"text": say("inspect_axis_weight")}, "range": _padded(-high, high)},
        yaxis=_counts(say),
    )
    return figure
