"""Channel maxima in order of size, and the channels that add most to an output's error."""

from __future__ import annotations

from math import log10
from typing import Any

import plotly.graph_objects as go
import torch
from torch import Tensor

from quantlab.inspection.detail import Maxima
from quantlab.inspection.survey import Linear
from quantlab.plots import palette
from quantlab.plots.inspect.base import sheet
from quantlab.plots.lessons.base import cool, warm
from quantlab.plots.words import Words

DRAWN = 160
"""At most so many points of a line."""


def maxima(found: Maxima, say: Words, dark: bool) -> go.Figure:
    """Every channel's largest |x| and |w|, each sorted by itself; dotted after smoothing."""
    figure = sheet(say, dark, "maxima", 400)
    lines: list[tuple[Tensor | None, str, str, str]] = [
        (found.inputs, "inspect_activations", cool(dark), "solid"),
        (found.smooth_inputs, "inspect_smooth_activations", cool(dark), "dot"),
        (found.weights, "inspect_weights", warm(dark), "solid"),
        (found.smooth_weights, "inspect_smooth_weights", warm(dark), "dot"),
    ]
    hover = f"{say('learn_axis_channel')} %{{customdata}}: %{{y:.3g}}<extra></extra>"
    ends: list[float] = []
    traces: list[dict[str, Any]] = []
    for values, name, colour, dash in lines:
        if values is None:
            continue
        ends += [float(values.min()), float(values.max())]
        order = values.argsort(descending=True)
        ranks = ranks_of(len(values))
        shown = order[ranks]
        traces.append(
            {
                "type": "scatter",
                "x": (ranks + 1).tolist(),
                "y": values[shown].clamp_min(1e-9).tolist(),
                "customdata": shown.tolist(),
                "mode": "lines",
                "line": {"color": colour, "width": 2, "dash": dash},
                "name": say(name),
                "hovertemplate": hover,
            }
        )
    figure.add_traces(traces)
    figure.update_layout(
        showlegend=True,
        legend={"orientation": "h", "x": 0, "y": -0.2, "yanchor": "top"},
        margin={"b": 96},
        xaxis={"title": {"text": say("inspect_axis_rank")}, "type": "log", "dtick": 1},
        yaxis={
            "title": {"text": say("inspect_axis_maximum")},
            "type": "log",
            "exponentformat": "power",
            "dtick": 1,
            "range": [log10(max(min(ends), 1e-7)) - 0.15, log10(max(max(ends), 1e-6)) + 0.15],
        },
    )
    return figure


def ranks_of(count: int) -> Tensor:
    """Places in an order that are drawn: all of the first, then ever fewer (the axis is
    logarithmic), and the last. int64, ascending."""
    return torch.logspace(0, log10(count), DRAWN).sub(1).round().long().unique()


def worst(one: Linear, say: Words, dark: bool) -> go.Figure:
    """The input channels that add most to the output error, the largest on top."""
    figure = sheet(say, dark, "worst", 340, name=one.name)
    names = [say("inspect_channel_name", channel=channel) for channel, _ in one.worst]
    shares = [share for _, share in one.worst]
    figure.add_bar(
        x=shares,
        y=names,
        orientation="h",
        marker={"color": warm(dark), "line": {"width": 0}},
        text=[f"{100 * share:.2g}%" for share in shares],
        textposition="outside",
        cliponaxis=False,
        textfont={"color": palette.INK[dark], "size": 12},
        hoverinfo="skip",
        width=0.6,
    )
    figure.update_xaxes(
        title_text=say("inspect_axis_share"), tickformat="~%", range=[0, max(shares) * 1.2]
    )
    figure.update_yaxes(autorange="reversed", type="category", gridcolor="rgba(0,0,0,0)")
    return figure


def spread(peaks: Tensor) -> float:
    """How many times the median channel the largest is."""
    return float(peaks.max() / peaks.median().clamp_min(1e-12))
