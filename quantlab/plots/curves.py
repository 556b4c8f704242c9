"""The losses of trained variants as a figure: every step of a phase, blocks one after another."""

from __future__ import annotations

import html
from collections.abc import Sequence

import plotly.graph_objects as go

from quantlab.plots import palette
from quantlab.plots.drawing import canvas, panels
from quantlab.plots.words import words
from quantlab.results import ResultRecord

DASHES = ("solid", "dash", "dot", "dashdot")
"""Variants of one method share its colour and differ in these."""


def trained(records: Sequence[ResultRecord]) -> list[ResultRecord]:
    """The finished records that have loss curves."""
    return [r for r in records if r.status == "finished" and any(map(any, r.curves.values()))]


def training(
    records: Sequence[ResultRecord], dark: bool = False, language: str | None = None
) -> go.Figure:
    """Left: how far each block's loss came, at its first and last steps (Block-AP). Right: the loss
    of every step of training end to end. Logarithmic, since losses span decades."""
    say = words(language)
    shown = trained(records)
    split = panels(1, 2, horizontal_spacing=0.12)
    figure = canvas(say, dark, say("figure_training"), say("figure_training_lower"), split)
    for place, record in enumerate(shown):
        name = html.escape(palette.short(record))
        line = {
            "color": palette.colour(record.method, dark),
            "width": 2,
            "dash": DASHES[place % len(DASHES)],
        }
        blocks = [losses for losses in record.curves.get("block_ap", []) if losses]
        figure.add_scatter(
            x=list(range(1, len(blocks) + 1)),
            y=[losses[0] for losses in blocks],
            mode="lines",
            line={**line, "width": 1},
            opacity=0.6,
            name=f"{name}, {say('figure_training_first')}",
            row=1,
            col=1,
        )
        figure.add_scatter(
            x=list(range(1, len(blocks) + 1)),
            y=[sum(losses[-4:]) / len(losses[-4:]) for losses in blocks],
            mode="lines",
            line=line,
            name=f"{name}, {say('figure_training_last')}",
            row=1,
            col=1,
        )
        for phase, parts in record.curves.items():
            if phase != "block_ap" and parts:
                figure.add_scatter(
                    x=list(range(1, len(parts[0]) + 1)),
                    y=parts[0],
                    mode="lines",
                    line=line,
                    name=name,
                    row=1,
                    col=2,
                )
    figure.update_yaxes(type="log", dtick="D2", minor={"showgrid": False})
    figure.update_xaxes(title_text=say("axis_block"), col=1)
    figure.update_xaxes(title_text=say("axis_training_step"), col=2)
    figure.update_yaxes(title_text=say("axis_block_loss"), col=1)
    figure.update_yaxes(title_text=say("axis_loss"), col=2)
    figure.update_layout(showlegend=True, legend={"orientation": "h", "y": -0.22})
    return figure
