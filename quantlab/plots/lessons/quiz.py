"""Figure of walkthrough 10: the measured ranking."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go

from quantlab.plots import numbers, palette
from quantlab.plots.lessons.base import sheet
from quantlab.plots.words import Words
from quantlab.results import ResultRecord


def ranking(records: Sequence[ResultRecord], say: Words, dark: bool) -> go.Figure:
    """KL divergence of every variant with its interval, the best on top."""
    figure = sheet(say, dark, "ranking", 120 + 46 * len(records))
    names = [palette.short(record) for record in records]
    values = [record.kl_divergence or 0.0 for record in records]
    intervals = [
        record.kl_divergence_ci or (value, value)
        for record, value in zip(records, values, strict=True)
    ]
    figure.add_bar(
        x=values,
        y=names,
        orientation="h",
        marker={"color": [palette.colour(record.method, dark) for record in records]},
        error_x={
            "type": "data",
            "symmetric": False,
            "array": [high - value for (_, high), value in zip(intervals, values, strict=True)],
            "arrayminus": [value - low for (low, _), value in zip(intervals, values, strict=True)],
            "color": palette.INK[dark],
            "thickness": 1.3,
        },
        hoverinfo="skip",
        width=0.6,
    )
    for name, value, (_, high) in zip(names, values, intervals, strict=True):
        figure.add_annotation(
            x=high,
            y=name,
            text=numbers.divergence(value),
            xanchor="left",
            xshift=8,
            showarrow=False,
            font={"color": palette.INK[dark], "size": 12},
        )
    top = max(high for _, high in intervals)
    figure.update_xaxes(title_text=say("axis_kl"), range=[0, top * 1.16])
    figure.update_yaxes(autorange="reversed", type="category", gridcolor="rgba(0,0,0,0)")
    figure.update_yaxes(tickfont={"size": 12, "color": palette.INK[dark]})
    return figure
