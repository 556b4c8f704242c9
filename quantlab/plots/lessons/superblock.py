"""Figures of walkthrough 8: a block's weights, and formats beside each other."""

from __future__ import annotations

import plotly.graph_objects as go

from quantlab.learn.superblock import Compared, Taken
from quantlab.plots import palette
from quantlab.plots.lessons.base import sheet, upright, warm
from quantlab.plots.words import Words


def weights(found: Taken, chosen: tuple[int, ...], say: Words, dark: bool) -> go.Figure:
    """The block's weights, what they decode to, and the span of every sub-block's grid."""
    figure = sheet(say, dark, "block", 300)
    places = list(range(len(found.weights)))
    low = (-found.minima).tolist()
    high = (15 * found.scales - found.minima).tolist()
    for values, options in ((high, {}), (low, {"fill": "tonexty"})):
        figure.add_scatter(
            x=places,
            y=values,
            mode="lines",
            line={"width": 0.8, "shape": "hvh", "color": palette.MUTED[dark]},
            fillcolor=palette.GRID[dark],
            hoverinfo="skip",
            showlegend=False,
            **options,
        )
    figure.add_scatter(
        x=places,
        y=found.weights.tolist(),
        mode="markers",
        marker={"size": 7, "symbol": "circle-open", "color": palette.INK[dark]},
        name=say("learn_legend_weight"),
        hovertemplate="%{x}: %{y:.4f}<extra></extra>",
    )
    figure.add_scatter(
        x=places,
        y=found.decoded.tolist(),
        mode="markers",
        marker={"size": 5, "color": palette.colour("gguf", dark)},
        name=say("learn_legend_rounded"),
        hovertemplate="%{x}: %{y:.4f}<extra></extra>",
    )
    upright(figure, chosen, warm(dark), 1.5, "dot")
    figure.update_layout(
        showlegend=True,
        legend={"orientation": "h", "x": 0, "y": -0.26, "yanchor": "top"},
        margin={"b": 84},
    )
    figure.update_xaxes(title_text=say("learn_axis_place"), range=[-1, len(places)])
    figure.update_yaxes(title_text=say("learn_axis_weight"))
    return figure


def compared(found: Compared, say: Words, dark: bool) -> go.Figure:
    """Error against bits a weight, one labelled point a format."""
    figure = sheet(say, dark, "formats", 430)
    shade = palette.colour("gguf", dark)
    below = {"q4_k", "q5_k", "q3_k"}
    figure.add_scatter(
        x=list(found.bits_per_weight),
        y=list(found.errors),
        mode="markers+text",
        marker={
            "size": 11,
            "color": shade,
            "symbol": ["diamond" if kind.endswith("_k") else "circle" for kind in found.types],
        },
        text=[kind.upper() for kind in found.types],
        textposition=[
            "bottom center"
            if kind in below
            else "top center"
            if kind != "iq4_nl"
            else "middle left"
            for kind in found.types
        ],
        textfont={"color": palette.INK[dark], "size": 12},
        cliponaxis=False,
        hovertemplate="%{text}: %{x:.4g} · %{y:.2%}<extra></extra>",
    )
    figure.update_xaxes(title_text=say("learn_axis_bits_per_weight"), range=[2, 9])
    figure.update_yaxes(
        title_text=say("learn_axis_rms_share"),
        type="log",
        tickvals=[0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5],
        ticktext=["0.5%", "1%", "2%", "5%", "10%", "20%", "50%"],
    )
    return figure
