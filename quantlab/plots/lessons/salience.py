"""Figures of walkthrough 6: AWQ's channels and its search."""

from __future__ import annotations

from math import log10

import plotly.graph_objects as go

from quantlab.learn.salience import Kept, Scaled, Search
from quantlab.plots import palette
from quantlab.plots.lessons.base import marker_line, sheet
from quantlab.plots.words import Words


def kept(found: Kept, first: int, say: Words, dark: bool) -> go.Figure:
    """Mean magnitude of every channel; the channels that stay unrounded are set off."""
    figure = sheet(say, dark, "salient", 340)
    chosen = set(found.kept)
    shade, quiet = palette.colour("awq", dark), palette.MUTED[dark]
    figure.add_bar(
        x=[first + one for one in range(len(found.importance))],
        y=found.importance.tolist(),
        marker={
            "color": [shade if one in chosen else quiet for one in range(len(found.importance))],
            "line": {"width": 0},
        },
        hovertemplate="%{x}: %{y:.3g}<extra></extra>",
    )
    figure.update_layout(bargap=0)
    figure.update_xaxes(title_text=say("learn_axis_channel"))
    figure.update_yaxes(
        title_text=say("learn_axis_mean"), type="log", exponentformat="power", dtick=1
    )
    return figure


def search(found: Search, exponent: float, say: Words, dark: bool) -> go.Figure:
    """Output error along the exponent; the search takes the lowest point."""
    figure = sheet(say, dark, "search", 380)
    shade = palette.colour("awq", dark)
    figure.add_scatter(
        x=list(found.exponents),
        y=list(found.errors),
        mode="lines+markers",
        line={"color": shade, "width": 2},
        marker={"size": 6},
        hovertemplate="r = %{x}: %{y:.3%}<extra></extra>",
    )
    figure.add_scatter(
        x=[found.exponents[found.best]],
        y=[found.errors[found.best]],
        mode="markers",
        marker={"size": 14, "symbol": "circle-open", "line": {"width": 2}, "color": shade},
        hoverinfo="skip",
    )
    figure.add_annotation(
        x=0,
        y=log10(found.errors[0]),
        text="RTN",
        xanchor="left",
        yanchor="bottom",
        xshift=6,
        showarrow=False,
        font={"color": palette.colour("rtn", dark), "size": 12},
    )
    marker_line(figure, exponent, dark)
    low, high = min(found.errors), max(found.errors)
    figure.update_xaxes(title_text=say("learn_axis_exponent"), range=[-0.03, 1.03])
    figure.update_yaxes(
        title_text=say("learn_axis_output_error"),
        type="log",
        tickformat="~%",
        dtick="D2" if high < 100 * low else 1,
        minor={"showgrid": False},
        range=[log10(low) - 0.15, log10(high) + 0.2],
    )
    return figure


def scaled(found: Scaled, first: int, say: Words, dark: bool) -> go.Figure:
    """What each channel adds to the output error, before and after, the noisiest first."""
    figure = sheet(say, dark, "scaled", 400)
    order = found.before.argsort(descending=True)[:40]
    names = [str(first + int(one)) for one in order]
    for values, name, colour in (
        (found.before, "learn_legend_rtn", palette.colour("rtn", dark)),
        (found.after, "learn_legend_awq", palette.colour("awq", dark)),
    ):
        figure.add_bar(
            x=names,
            y=(values[order] / found.before.sum()).tolist(),
            name=say(name),
            marker={"color": colour, "line": {"width": 0}},
            hovertemplate="%{x}: %{y:.2%}<extra></extra>",
        )
    figure.update_layout(
        barmode="group",
        bargap=0.15,
        showlegend=True,
        legend={"orientation": "h", "x": 1, "xanchor": "right", "y": 0.98},
    )
    figure.update_xaxes(title_text=say("learn_axis_noisiest"), type="category", tickangle=-60)
    figure.update_yaxes(title_text=say("learn_axis_error_share"), tickformat="~%")
    return figure
