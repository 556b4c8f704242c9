"""Figures of walkthrough 3: a grid and its outlier."""

from __future__ import annotations

from math import log10

import plotly.graph_objects as go
import torch

from quantlab.learn.outlier import Channels, Rounded, Sweep
from quantlab.plots import palette
from quantlab.plots.lessons.base import cool, sheet, upright, warm
from quantlab.plots.words import Words

LINES = 33
"""Grid lines are drawn up to this many; more would be a grey area."""


def row(found: Rounded, say: Words, dark: bool, key: str = "outlier") -> go.Figure:
    """Each weight as it was and as it is rounded; the steps of the grid as lines; groups apart."""
    figure = sheet(say, dark, key, 420)
    columns = found.weights.shape[0]
    places = list(range(columns))
    edges = list(range(0, columns, found.group_size))
    top = float(found.weights.abs().max()) * 1.08
    lines_x: list[float | None] = []
    lines_y: list[float | None] = []
    for first in edges:
        last = min(first + found.group_size, columns)
        step = float(found.scale[first])
        levels = int(top / step) if step > 0 else 0
        peak = float(found.weights[first:last].abs().max())
        for level in range(-levels, levels + 1):
            if 2 * levels + 1 <= LINES and abs(level * step) <= peak + step / 2:
                lines_x += [first - 0.5, last - 0.5, None]
                lines_y += [level * step, level * step, None]
    upright(figure, [first - 0.5 for first in edges if first], palette.MUTED[dark], 1)
    figure.add_scatter(
        x=lines_x,
        y=lines_y,
        mode="lines",
        line={"color": palette.MUTED[dark], "width": 0.6},
        opacity=0.7,
        hoverinfo="skip",
        name=say("learn_legend_grid"),
    )
    figure.add_scatter(
        x=places,
        y=found.weights.tolist(),
        mode="markers",
        marker={"size": 7, "symbol": "circle-open", "color": palette.INK[dark]},
        name=say("learn_legend_weight"),
        hovertemplate="%{y:.4f}<extra></extra>",
    )
    figure.add_scatter(
        x=places,
        y=found.rounded.tolist(),
        mode="markers",
        marker={"size": 5, "color": warm(dark)},
        name=say("learn_legend_rounded"),
        hovertemplate="%{y:.4f}<extra></extra>",
    )
    figure.update_layout(
        showlegend=True,
        legend={"orientation": "h", "x": 0, "y": -0.16, "yanchor": "top"},
        margin={"b": 84},
    )
    figure.update_xaxes(title_text=say("learn_axis_column"), range=[-1, columns])
    figure.update_yaxes(title_text=say("learn_axis_weight"), showgrid=False)
    return figure


def sweep(found: Sweep, chosen: int, say: Words, dark: bool) -> go.Figure:
    """Error by group size, the chosen one set off."""
    figure = sheet(say, dark, "groups", 300)
    names = [str(size) for size in found.group_sizes]
    figure.add_bar(
        x=names,
        y=list(found.rms),
        marker={
            "color": [
                warm(dark) if size == chosen else palette.MUTED[dark] for size in found.group_sizes
            ]
        },
        text=[f"{say('learn_bits_each', bits=f'{bits:.2f}')}" for bits in found.bits_per_weight],
        textposition="outside",
        cliponaxis=False,
        textfont={"color": palette.INK[dark], "size": 11},
        hovertemplate="%{y:.5f}<extra></extra>",
        width=0.6,
    )
    figure.update_xaxes(title_text=say("learn_axis_group"), type="category")
    figure.update_yaxes(title_text=say("learn_axis_rms"), range=[0, max(found.rms) * 1.18])
    return figure


def channels(found: Channels, first: int, say: Words, dark: bool) -> go.Figure:
    """The largest magnitude of every channel of a real input."""
    figure = sheet(say, dark, "channels", 380)
    peaks = found.peaks.clamp_min(1e-6)
    colour = [cool(dark)] * len(peaks)
    colour[found.top] = warm(dark)
    numbers = (torch.arange(len(peaks)) + first).tolist()
    figure.add_bar(
        x=numbers,
        y=peaks.tolist(),
        marker={"color": colour, "line": {"width": 0}},
        hovertemplate="%{x}: %{y:.3g}<extra></extra>",
    )
    figure.add_annotation(
        x=numbers[found.top],
        y=log10(float(peaks[found.top])),
        text=f"{float(peaks[found.top]):,.1f}",
        showarrow=False,
        yshift=10,
        font={"color": warm(dark), "size": 13},
    )
    figure.update_layout(bargap=0)
    figure.update_xaxes(title_text=say("learn_axis_channel"))
    figure.update_yaxes(
        title_text=say("learn_axis_peak"),
        type="log",
        exponentformat="power",
        dtick=1,
        range=[log10(float(peaks.min())) - 0.1, log10(float(peaks.max())) + 0.35],
    )
    return figure
