"""What the figures of all walkthroughs share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from quantlab.plots import palette
from quantlab.plots.drawing import canvas
from quantlab.plots.words import Words

WARM = ("#d55e00", "#ee7733")
COOL = ("#0072b2", "#3a9bdc")
"""Two colours of the house (on a light page, on a dark one) for pairs that are no methods."""


def warm(dark: bool) -> str:
    return WARM[dark]


def cool(dark: bool) -> str:
    return COOL[dark]


def sheet(
    say: Words, dark: bool, key: str, height: int = 380, split: Any = None, **places: object
) -> go.Figure:
    """An empty figure with the texts `learn_figure_<key>` and `learn_figure_<key>_how`, whose
    places are filled."""
    title, how = f"learn_figure_{key}", f"learn_figure_{key}_how"
    figure = canvas(say, dark, say(title), say(how, **places), split)
    figure.update_layout(
        height=height,
        modebar={"remove": ["zoom", "pan", "select", "lasso"]},
        transition={"duration": 0},
        dragmode=False,
    )
    return figure


def legend(figure: go.Figure, dark: bool) -> None:
    """A flat legend under the title, where direct labels do not fit."""
    figure.update_layout(
        showlegend=True,
        legend={
            "orientation": "h",
            "x": 0,
            "y": 1.0,
            "yanchor": "bottom",
            "font": {"size": 12, "color": palette.INK[dark]},
            "bgcolor": "rgba(0,0,0,0)",
        },
    )
    figure.update_layout(margin={"t": 88})


def diverging(dark: bool) -> list[list[Any]]:
    """Blue to vermilion through the page's own background."""
    middle = palette.PAPER[dark]
    return [[0.0, COOL[dark]], [0.5, middle], [1.0, WARM[dark]]]


def marker_line(figure: go.Figure, x: float, dark: bool, panels: tuple[int, ...] = (1,)) -> None:
    """A vertical line where the slider stands."""
    upright(figure, [x], palette.INK[dark], 1.5, "dot", panels)


def upright(
    figure: go.Figure,
    places: Sequence[float],
    colour: str,
    width: float,
    dash: str = "solid",
    panels: tuple[int, ...] = (1,),
) -> None:
    """Vertical lines over the whole height of the panels (numbered as Plotly numbers its axes).

    All shapes at once, and set, not updated: `add_vline` takes some ten milliseconds for each.
    """
    shapes = [
        {
            "type": "line",
            "x0": x,
            "x1": x,
            "y0": 0,
            "y1": 1,
            "xref": f"x{panel}" if panel > 1 else "x",
            "yref": f"y{panel} domain" if panel > 1 else "y domain",
            "line": {"color": colour, "width": width, "dash": dash},
        }
        for x in places
        for panel in panels
    ]
    figure.layout.shapes = [*figure.layout.shapes, *shapes]


def level(
    figure: go.Figure, y: float, colour: str, width: float, dash: str, panel: int = 1
) -> None:
    """A horizontal line over the whole width of a panel, without what `add_hline` takes."""
    number = panel if panel > 1 else ""
    line = {
        "type": "line",
        "x0": 0,
        "x1": 1,
        "y0": y,
        "y1": y,
        "xref": f"x{number} domain",
        "yref": f"y{number}",
        "line": {"color": colour, "width": width, "dash": dash},
    }
    figure.layout.shapes = [*figure.layout.shapes, line]
