"""Figures of walkthrough 4: what SmoothQuant moves, and what it is worth."""

from __future__ import annotations

from math import log10

import plotly.graph_objects as go
from torch import Tensor

from quantlab.learn.smoothing import Curve, Smoothed
from quantlab.plots import palette
from quantlab.plots.drawing import panels
from quantlab.plots.lessons.base import cool, marker_line, sheet
from quantlab.plots.words import Words


def distributions(found: Smoothed, first: int, say: Words, dark: bool) -> go.Figure:
    """Largest magnitude of every channel, of activations above and of weights below, before (thin)
    and after smoothing; the axes stay where they are while alpha moves."""
    split = panels(2, 1, shared_xaxes=True, vertical_spacing=0.1)
    figure = sheet(say, dark, "smoothed", 480, split)
    pairs = (
        (1, found.inputs_before, found.inputs_after, "learn_legend_activations", cool(dark)),
        (
            2,
            found.weights_before,
            found.weights_after,
            "learn_legend_weights",
            palette.colour("smoothquant", dark),
        ),
    )
    for row, before, after, name, colour in pairs:
        numbers = list(range(first, first + len(before)))
        figure.add_bar(
            x=numbers,
            y=after.clamp_min(1e-6).tolist(),
            marker={"color": colour, "line": {"width": 0}},
            name=say(name),
            hovertemplate="%{x}: %{y:.3g}<extra></extra>",
            row=row,
            col=1,
        )
        figure.add_scatter(
            x=numbers,
            y=before.clamp_min(1e-6).tolist(),
            mode="lines",
            line={"color": palette.INK[dark], "width": 1, "shape": "hvh"},
            opacity=0.7,
            hoverinfo="skip",
            name=say("learn_legend_before"),
            row=row,
            col=1,
        )
        figure.update_yaxes(
            title_text=say(name),
            type="log",
            exponentformat="power",
            dtick=1,
            range=_limits(before, found),
            row=row,
            col=1,
        )
    figure.update_xaxes(title_text=say("learn_axis_channel"), row=2, col=1)
    figure.update_layout(bargap=0)
    return figure


def _limits(before: Tensor, found: Smoothed) -> list[float]:
    """A range that holds the tensor before and after smoothing for every alpha: at alpha 1 the
    weights take all of the activations' spread, at 0 the activations that of the weights."""
    x, w = found.inputs_before.clamp_min(1e-5), found.weights_before.clamp_min(1e-5)
    ends = [before, x * w] if before is found.weights_before else [before, x * w, x / x]
    low = min(float(one.clamp_min(1e-6).min()) for one in ends)
    high = max(float(one.max()) for one in ends)
    return [log10(low) - 0.15, log10(high) + 0.25]


def curve(found: Curve, alpha: float, say: Words, dark: bool) -> go.Figure:
    """Relative output error against alpha; without smoothing as a line across."""
    figure = sheet(say, dark, "alpha", 380)
    colour = palette.colour("smoothquant", dark)
    figure.add_scatter(
        x=list(found.alphas),
        y=list(found.errors),
        mode="lines+markers",
        line={"color": colour, "width": 2},
        marker={"size": 5},
        hovertemplate="α = %{x}: %{y:.3%}<extra></extra>",
        name="SmoothQuant",
    )
    figure.add_hline(
        y=found.unsmoothed,
        line={"color": palette.MUTED[dark], "width": 1.5, "dash": "dash"},
        annotation={
            "text": say("learn_legend_unsmoothed"),
            "font": {"color": palette.MUTED[dark], "size": 12},
        },
        annotation_position="top left",
    )
    place = min(range(len(found.alphas)), key=lambda one: abs(found.alphas[one] - alpha))
    marker_line(figure, found.alphas[place], dark)
    best = found.best
    figure.add_scatter(
        x=[found.alphas[best]],
        y=[found.errors[best]],
        mode="markers",
        marker={"size": 13, "symbol": "circle-open", "line": {"width": 2}, "color": colour},
        hoverinfo="skip",
        name=say("learn_legend_best"),
    )
    values = [*found.errors, found.unsmoothed]
    figure.update_xaxes(title_text=say("learn_axis_alpha"), range=[-0.03, 1.03])
    figure.update_yaxes(
        title_text=say("learn_axis_output_error"),
        type="log",
        dtick="D2" if max(values) < 100 * min(values) else 1,
        tickformat="~%",
        minor={"showgrid": False},
        range=[log10(min(values)) - 0.15, log10(max(values)) + 0.2],
    )
    return figure
