"""Figures of walkthrough 5: GPTQ, column by column."""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go
from torch import Tensor

from quantlab.learn.columns import Against, Pull, Walk
from quantlab.plots import palette
from quantlab.plots.drawing import panels
from quantlab.plots.lessons.base import cool, diverging, marker_line, sheet, upright, warm
from quantlab.plots.words import Words


def pull(found: Pull, first: int, say: Words, dark: bool) -> go.Figure:
    """Above: how a channel goes with the others; below: what each later one takes of its error."""
    split = panels(2, 1, shared_xaxes=True, vertical_spacing=0.12)
    figure = sheet(say, dark, "pull", 440, split)
    numbers = [first + one for one in range(len(found.correlation))]
    for row, values, name, colour in (
        (1, found.correlation, "learn_axis_correlation", cool(dark)),
        (2, found.share, "learn_axis_share", warm(dark)),
    ):
        colours = [colour] * len(numbers)
        if row == 1:
            colours[found.column] = palette.INK[dark]
        figure.add_bar(
            x=numbers,
            y=values.tolist(),
            marker={"color": colours, "line": {"width": 0}},
            hovertemplate="%{x}: %{y:.3f}<extra></extra>",
            row=row,
            col=1,
        )
        figure.update_yaxes(title_text=say(name), row=row, col=1)
    figure.update_yaxes(range=[-1.05, 1.05], row=1, col=1)
    marker_line(figure, numbers[found.column], dark, (1, 2))
    figure.update_xaxes(title_text=say("learn_axis_channel"), row=2, col=1)
    figure.update_layout(bargap=0.15)
    return figure


def walk(found: Walk, done: int, say: Words, dark: bool) -> go.Figure:
    """Left: the error of the rounded columns and what was pushed into the others. Right: the output
    error so far, beside plain rounding."""
    split = panels(1, 2, column_widths=(0.6, 0.4), horizontal_spacing=0.11)
    step, last = found.steps[done], found.steps[-1]
    columns = step.values.shape[1]
    limit = float(last.rounding.abs().max()) * 0.7
    figure = sheet(say, dark, "walk", 430, split)
    shown = step.rounding.clone()
    shown[:, done:] = step.pushed[:, done:]
    figure.add_trace(_heat(shown, limit, dark), row=1, col=1)
    upright(figure, [done - 0.5], palette.INK[dark], 2)
    steps = list(range(columns + 1))
    for name, values, colour in (
        ("RTN", [one.rtn_error for one in found.steps], palette.colour("rtn", dark)),
        ("GPTQ", [one.error for one in found.steps], palette.colour("gptq", dark)),
    ):
        figure.add_scatter(
            x=steps,
            y=values,
            mode="lines",
            line={"color": colour, "width": 1},
            opacity=0.4,
            hoverinfo="skip",
            showlegend=False,
            row=1,
            col=2,
        )
        figure.add_scatter(
            x=steps[: done + 1],
            y=values[: done + 1],
            mode="lines",
            line={"color": colour, "width": 2.5},
            name=name,
            hovertemplate=f"{name}, %{{x}}: %{{y:.3%}}<extra></extra>",
            row=1,
            col=2,
        )
        figure.add_annotation(
            x=columns,
            y=values[-1],
            text=name,
            xanchor="right",
            yanchor="bottom",
            showarrow=False,
            font={"color": colour, "size": 12},
            row=1,
            col=2,
        )
    figure.update_xaxes(title_text=say("learn_axis_column"), row=1, col=1)
    figure.update_yaxes(
        title_text=say("learn_axis_row"), autorange="reversed", showgrid=False, row=1, col=1
    )
    figure.update_xaxes(
        title_text=say("learn_axis_done"), range=[0, columns], showgrid=False, row=1, col=2
    )
    figure.update_yaxes(
        title_text=say("learn_axis_output_error"), tickformat="~%", rangemode="tozero", row=1, col=2
    )
    return figure


def _heat(values: Tensor, limit: float, dark: bool) -> go.Heatmap:
    bar: dict[str, Any] = {
        "orientation": "h",
        "thickness": 8,
        "len": 0.55,
        "x": 0.28,
        "y": -0.3,
        "yanchor": "top",
        "tickfont": {"size": 10, "color": palette.MUTED[dark]},
        "outlinewidth": 0,
        "nticks": 5,
    }
    return go.Heatmap(
        z=values.tolist(),
        zmin=-limit,
        zmax=limit,
        colorscale=diverging(dark),
        colorbar=bar,
        hoverinfo="skip",
        xgap=0.5,
        ygap=0.5,
    )


def against(found: Against, say: Words, dark: bool) -> go.Figure:
    """Both methods' errors, on the tokens GPTQ was fitted to and on others."""
    figure = sheet(say, dark, "against", 380)
    places = [say("learn_seen"), say("learn_unseen")]
    for name, method, values in (
        ("RTN", "rtn", (found.rtn, found.rtn_unseen)),
        ("GPTQ", "gptq", (found.gptq, found.gptq_unseen)),
    ):
        figure.add_bar(
            x=places,
            y=list(values),
            name=name,
            marker={"color": palette.colour(method, dark)},
            text=[f"{name}<br>{value:.3%}" for value in values],
            textposition="outside",
            cliponaxis=False,
            textfont={"color": palette.INK[dark], "size": 12},
            hovertemplate=f"{name}: %{{y:.3%}}<extra></extra>",
        )
    top = max(found.rtn, found.gptq, found.rtn_unseen, found.gptq_unseen)
    figure.update_layout(barmode="group", bargap=0.35)
    figure.update_yaxes(
        title_text=say("learn_axis_output_error"), tickformat="~%", range=[0, top * 1.22]
    )
    return figure
