"""Figures of walkthrough 9: the losses of EfficientQAT's two phases."""

from __future__ import annotations

import plotly.graph_objects as go

from quantlab.learn.training import Losses, smooth
from quantlab.plots import palette
from quantlab.plots.drawing import panels
from quantlab.plots.lessons.base import cool, sheet
from quantlab.plots.words import Words


def blocks(found: Losses, block: int, width: int, say: Words, dark: bool) -> go.Figure:
    """Left: the loss of every step of one block. Right: every block's first and last losses."""
    split = panels(1, 2, horizontal_spacing=0.13)
    figure = sheet(say, dark, "block_ap", 400, split)
    shade = palette.colour("efficientqat", dark)
    one = found.blocks[block]
    steps = list(range(1, len(one) + 1))
    figure.add_scatter(
        x=steps,
        y=list(one),
        mode="lines",
        line={"color": shade, "width": 1},
        opacity=0.45,
        hoverinfo="skip",
        showlegend=False,
        row=1,
        col=1,
    )
    figure.add_scatter(
        x=steps,
        y=list(smooth(one, width)),
        mode="lines",
        showlegend=False,
        line={"color": shade, "width": 2.5},
        hovertemplate="%{x}: %{y:.4f}<extra></extra>",
        row=1,
        col=1,
    )
    numbers = list(range(1, len(found.blocks) + 1))
    begin = [sum(losses[:8]) / len(losses[:8]) for losses in found.blocks]
    end = [sum(losses[-8:]) / len(losses[-8:]) for losses in found.blocks]
    for values, colour, name in (
        (begin, cool(dark), "learn_legend_begin"),
        (end, shade, "learn_legend_end"),
    ):
        figure.add_scatter(
            x=numbers,
            y=values,
            mode="lines+markers",
            line={"color": colour, "width": 1.8},
            marker={"size": [11 if at == block else 5 for at in range(len(numbers))]},
            name=say(name),
            showlegend=True,
            hovertemplate="%{x}: %{y:.4f}<extra></extra>",
            row=1,
            col=2,
        )
    figure.update_yaxes(title_text=say("axis_block_loss"), rangemode="tozero", row=1, col=1)
    figure.update_xaxes(title_text=say("learn_axis_step"), row=1, col=1)
    figure.update_yaxes(rangemode="tozero", row=1, col=2)
    figure.update_xaxes(title_text=say("axis_block"), row=1, col=2)
    figure.update_layout(
        showlegend=True,
        legend={"x": 0.57, "y": 1.0, "xanchor": "left", "bgcolor": "rgba(0,0,0,0)"},
    )
    return figure


def whole(found: Losses, width: int, say: Words, dark: bool) -> go.Figure:
    """The loss of every step of E2E-QP, and its running mean."""
    figure = sheet(say, dark, "e2e_qp", 380)
    shade = palette.colour("efficientqat", dark)
    steps = list(range(1, len(found.whole) + 1))
    figure.add_scatter(
        x=steps,
        y=list(found.whole),
        mode="lines",
        line={"color": shade, "width": 1},
        opacity=0.45,
        hoverinfo="skip",
    )
    figure.add_scatter(
        x=steps,
        y=list(smooth(found.whole, width)),
        mode="lines",
        line={"color": shade, "width": 2.5},
        hovertemplate="%{x}: %{y:.4f}<extra></extra>",
    )
    figure.update_xaxes(title_text=say("axis_training_step"))
    figure.update_yaxes(title_text=say("axis_loss"), rangemode="tozero")
    return figure


def moving(counts: dict[str, int], say: Words, dark: bool) -> go.Figure:
    """How many numbers of a linear a phase trains, logarithmic."""
    figure = sheet(say, dark, "moving", 280)
    shade = palette.colour("efficientqat", dark)
    names = [say(f"learn_moving_{name}") for name in counts]
    figure.add_bar(
        x=[max(count, 0.9) for count in counts.values()],
        y=names,
        orientation="h",
        marker={"color": shade},
        text=[f"{count:,}" if count else say("learn_stands_still") for count in counts.values()],
        textposition="outside",
        cliponaxis=False,
        textfont={"color": palette.INK[dark], "size": 13},
        hoverinfo="skip",
        width=0.55,
    )
    figure.update_xaxes(
        title_text=say("learn_axis_numbers"),
        type="log",
        exponentformat="power",
        dtick=1,
        range=[0, 7.4],
    )
    figure.update_yaxes(autorange="reversed", gridcolor="rgba(0,0,0,0)")
    return figure
