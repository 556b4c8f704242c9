"""Figures of walkthrough 7: a codebook over the weights, and its doubly quantized scales."""

from __future__ import annotations

import plotly.graph_objects as go

from quantlab.learn.codebooks import Coded, Doubled
from quantlab.plots import palette
from quantlab.plots.drawing import panels
from quantlab.plots.lessons.base import level, sheet, upright, warm
from quantlab.plots.words import Words

BINS = 100


def codebook(found: Coded, say: Words, dark: bool) -> go.Figure:
    """Above: the weights over their block's largest, with the codebook's values. Below: how many
    weights each value gets."""
    split = panels(2, 1, shared_xaxes=True, vertical_spacing=0.1, row_heights=(0.6, 0.4))
    figure = sheet(say, dark, "codebook", 470, split)
    counts = found.normalized.histc(BINS, -1, 1)
    width = 2 / BINS
    figure.add_bar(
        x=[-1 + width * (at + 0.5) for at in range(BINS)],
        y=(counts / counts.sum()).tolist(),
        marker={"color": palette.MUTED[dark], "line": {"width": 0}},
        opacity=0.65,
        hovertemplate="%{x:.2f}: %{y:.2%}<extra></extra>",
        row=1,
        col=1,
    )
    shade = palette.colour("nf4" if found.name == "nf4" else "fp4", dark)
    shade = warm(dark) if found.name == "int4" else shade
    upright(figure, found.values, shade, 1.4)
    figure.add_bar(
        x=list(found.values),
        y=list(found.shares),
        width=0.035,
        marker={"color": shade, "line": {"width": 0}},
        hovertemplate="%{x:.4f}: %{y:.2%}<extra></extra>",
        row=2,
        col=1,
    )
    even = 1 / len(found.values)
    level(figure, even, palette.INK[dark], 1, "dot", 2)
    figure.update_layout(bargap=0)
    figure.update_xaxes(range=[-1.04, 1.04])
    figure.update_xaxes(title_text=say("learn_axis_normalized"), row=2, col=1)
    figure.update_yaxes(title_text=say("learn_axis_weights_share"), tickformat="~%", row=1, col=1)
    figure.update_yaxes(title_text=say("learn_axis_code_share"), tickformat="~%", row=2, col=1)
    return figure


def doubled(found: Doubled, say: Words, dark: bool) -> go.Figure:
    """Every block's scale, as it was and as 8 bits keep it."""
    figure = sheet(say, dark, "double", 380)
    places = list(range(len(found.absmax)))
    figure.add_scatter(
        x=places,
        y=found.absmax.tolist(),
        mode="markers",
        marker={"size": 8, "symbol": "circle-open", "color": palette.INK[dark]},
        name=say("learn_legend_absmax"),
        hovertemplate="%{x}: %{y:.5f}<extra></extra>",
    )
    figure.add_scatter(
        x=places,
        y=found.restored.tolist(),
        mode="markers",
        marker={"size": 4.5, "color": palette.colour("nf4", dark)},
        name=say("learn_legend_restored"),
        hovertemplate="%{x}: %{y:.5f}<extra></extra>",
    )
    level(figure, found.mean, palette.MUTED[dark], 1.2, "dash")
    figure.update_layout(
        showlegend=True,
        legend={"orientation": "h", "x": 0, "y": -0.18, "yanchor": "top"},
        margin={"b": 84},
    )
    figure.update_xaxes(title_text=say("learn_axis_block"))
    figure.update_yaxes(title_text=say("learn_axis_absmax"), rangemode="tozero")
    return figure
