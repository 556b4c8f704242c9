"""Figures of walkthrough 1: how fine the number formats are at every magnitude."""

from __future__ import annotations

from math import log10

import plotly.graph_objects as go

from quantlab.learn.formats import FLOATS, Precision
from quantlab.plots import palette
from quantlab.plots.lessons.base import marker_line, sheet
from quantlab.plots.words import Words

COLOURS = {
    "fp32": ("#000000", "#ffffff"),
    "fp16": ("#0072b2", "#3a9bdc"),
    "bf16": ("#009e73", "#1fb58a"),
    "e4m3": ("#b0568a", "#cc79a7"),
    "e5m2": ("#e69f00", "#e69f00"),
    "int8": ("#d55e00", "#ee7733"),
    "int4": ("#767676", "#a3a3a3"),
}
DASHES = {"int8": "dash", "int4": "dash"}


def precision(found: Precision, at: float, say: Words, dark: bool) -> go.Figure:
    """Relative distance between neighbouring numbers against magnitude, both logarithmic."""
    figure = sheet(say, dark, "precision", 430)
    for name, spacing in found.spacing.items():
        title = FLOATS[name].title if name in FLOATS else name.upper()
        points = [(x, y) for x, y in zip(found.at, spacing, strict=True) if y is not None]
        if not points:
            continue
        figure.add_scatter(
            x=[x for x, _ in points],
            y=[y for _, y in points],
            mode="lines",
            name=title,
            line={"color": COLOURS[name][dark], "width": 2, "dash": DASHES.get(name, "solid")},
            hovertemplate=f"{title}: %{{y:.3%}}<extra></extra>",
        )
        x, y = points[0] if name in ("int4", "int8") else points[-1]
        figure.add_annotation(
            x=log10(x),
            y=log10(y),
            text=title,
            showarrow=False,
            xanchor="right" if name in ("int4", "int8") else "left",
            xshift=-5 if name in ("int4", "int8") else 5,
            font={"color": COLOURS[name][dark], "size": 12},
        )
    marker_line(figure, at, dark)
    figure.update_xaxes(
        title_text=say("learn_axis_magnitude"),
        type="log",
        range=[-9.6, 7.6],
        exponentformat="power",
        dtick=3,
    )
    figure.update_yaxes(
        title_text=say("learn_axis_spacing"),
        title_standoff=14,
        type="log",
        tickvals=[1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1],
        ticktext=["10⁻⁵%", "10⁻⁴%", "0.001%", "0.01%", "0.1%", "1%", "10%", "100%"],
        range=[-7.4, 0.5],
    )
    figure.update_layout(font={"color": palette.INK[dark]})
    return figure
