"""What the figures of the Inspect tab share."""

from __future__ import annotations

import plotly.graph_objects as go

from quantlab.plots.drawing import canvas
from quantlab.plots.words import Words


def sheet(say: Words, dark: bool, key: str, height: int, **places: object) -> go.Figure:
    """An empty figure with the texts `inspect_figure_<key>` and `inspect_figure_<key>_how`, whose
    places are filled."""
    title = f"inspect_figure_{key}"
    figure = canvas(say, dark, say(title, **places), say(f"{title}_how", **places))
    figure.update_layout(
        height=height,
        dragmode=False,
        transition={"duration": 0},
        modebar={"remove": ["zoom", "pan", "select", "lasso"]},
    )
    return figure
