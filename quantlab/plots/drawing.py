"""How figures are drawn: the empty canvas, labelled points with intervals, bars with values."""

from __future__ import annotations

import copy
import functools
import html
import math
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from quantlab.plots import numbers, palette
from quantlab.plots.placement import place
from quantlab.plots.words import Words
from quantlab.results import ResultRecord

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Noto Sans', 'Noto Sans JP', sans-serif"


def canvas(
    say: Words, dark: bool, title: str, subtitle: str, figure: go.Figure | None = None
) -> go.Figure:
    """An empty figure, or the empty panels given, in the page's own style.

    The layout is set whole: Plotly takes ten times as long to update one piece by piece.
    """
    made = go.Figure() if figure is None else figure
    ink, muted, grid = palette.INK[dark], palette.MUTED[dark], palette.GRID[dark]
    axis: dict[str, Any] = {
        "gridcolor": grid,
        "linecolor": grid,
        "zeroline": False,
        "ticks": "",
        "automargin": True,
        "title": {"font": {"size": 12, "color": muted}},
        "tickfont": {"size": 11, "color": muted},
    }
    empty = {"xaxis": {}, "yaxis": {}} | made.layout.to_plotly_json()
    made.layout = {
        **{
            name: {**given, **axis} if name.startswith(("xaxis", "yaxis")) else given
            for name, given in empty.items()
        },
        "template": "none",
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": FONT, "size": 12, "color": ink},
        "title": {
            "text": title,
            "subtitle": {"text": subtitle, "font": {"size": 12, "color": muted}},
            "font": {"size": 15, "color": ink},
            "x": 0,
            "xanchor": "left",
            "xref": "container",
            "pad": {"l": 4, "t": 5},
            "y": 1,
            "yanchor": "top",
            "yref": "container",
            "automargin": False,
        },
        "margin": {"l": 56, "r": 16, "t": 62, "b": 48},
        "height": 360,
        "showlegend": False,
        "hoverlabel": {
            "bgcolor": palette.PAPER[dark],
            "bordercolor": muted,
            "font": {"family": FONT, "color": ink, "size": 12},
            "align": "left",
        },
        "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": muted, "activecolor": ink},
        "uirevision": "keep",
        "meta": {"language": say.language},
    }
    return made


def panels(rows: int, columns: int, **options: Any) -> go.Figure:
    """Empty panels, as `make_subplots` lays them out: once, and then copied, which takes a tenth of
    the time. Options in lists are given as tuples."""
    return copy.deepcopy(_panels(rows, columns, tuple(sorted(options.items()))))


@functools.cache
def _panels(rows: int, columns: int, options: tuple[tuple[str, Any], ...]) -> go.Figure:
    made = make_subplots(rows=rows, cols=columns, **dict(options))
    made.layout.template = "none"  # Plotly's own is larger than all the rest.
    return made


def nothing(figure: go.Figure, say: Words, dark: bool) -> None:
    """Say that there is nothing to draw yet, in place of axes without values."""
    figure.update_xaxes(visible=False)
    figure.update_yaxes(visible=False)
    figure.add_annotation(
        text=say("figure_nothing"),
        x=0.5,
        y=0.5,
        xref="paper",
        yref="paper",
        showarrow=False,
        font={"size": 12, "color": palette.MUTED[dark]},
    )


def scatter(
    figure: go.Figure,
    shown: Sequence[ResultRecord],
    points: Sequence[tuple[float, float]],
    intervals: Sequence[tuple[float, float] | None],
    say: Words,
    dark: bool,
    spread: float,
) -> None:
    """One labelled point a record, with its interval; a logarithmic axis where values explode."""
    if not points:
        nothing(figure, say, dark)
        return
    heights = [y for _, y in points if y > 0 and math.isfinite(y)]
    logarithmic = bool(heights) and max(heights) / min(heights) > spread
    labels = [palette.short(record) for record in shown]
    x_range, y_range = _ranges(points, intervals, logarithmic)
    unit = [(_unit(x, x_range), _unit(y, y_range, logarithmic)) for x, y in points]
    bars = [
        (_unit(low, y_range, logarithmic), _unit(high, y_range, logarithmic))
        for low, high in (ends or (y, y) for ends, (_, y) in zip(intervals, points, strict=True))
    ]
    places = place(unit, labels, bars)
    for record, (x, y), interval, text, position in zip(
        shown, points, intervals, labels, places, strict=True
    ):
        shade = palette.colour(record.method, dark)
        figure.add_scatter(
            x=[x],
            y=[y],
            mode="markers+text",
            name=text,
            text=[html.escape(text)],
            textposition=position,
            textfont={"color": palette.INK[dark], "size": 12},
            cliponaxis=False,
            marker={
                "symbol": palette.marker(record),
                "size": 12,
                "color": shade,
                "line": {"width": 2 if record.execution == "simulated" else 0, "color": shade},
            },
            error_y=_error(y, interval, shade),
            hovertemplate=hover(record, say),
        )
    figure.update_yaxes(type="log" if logarithmic else "linear", range=y_range)
    if logarithmic:
        # Few labels, at powers of ten with 2 and 5 between them, are easier to read than all nine.
        figure.update_yaxes(dtick="D2", minor={"showgrid": False})
    else:
        figure.update_yaxes(exponentformat="power")
    figure.update_xaxes(range=x_range)


def _error(y: float, interval: tuple[float, float] | None, shade: str) -> dict[str, Any]:
    if interval is None:
        return {"visible": False}
    return {
        "type": "data",
        "symmetric": False,
        "array": [max(0.0, interval[1] - y)],
        "arrayminus": [max(0.0, y - interval[0])],
        "color": shade,
        "thickness": 1.4,
        "width": 5,
    }


def _ranges(
    points: Sequence[tuple[float, float]],
    intervals: Sequence[tuple[float, float] | None],
    logarithmic: bool,
) -> tuple[list[float], list[float]]:
    """The two axis ranges that hold the points, their intervals and their labels."""
    xs = [x for x, _ in points]
    ys = [y for _, y in points if math.isfinite(y)]
    for interval in intervals:
        ys += [end for end in interval or () if math.isfinite(end)]
    if logarithmic:
        floor = min(y for _, y in points if y > 0) / 2
        ys = [math.log10(max(y, floor)) for y in ys]
    return _padded(min(xs), max(xs), 0.10, 0.18), _padded(min(ys), max(ys), 0.12, 0.12)


def _unit(value: float, axis: Sequence[float], logarithmic: bool = False) -> float:
    """Where a value lies on an axis, 0 at its start and 1 at its end."""
    if logarithmic:
        value = math.log10(value) if value > 0 else axis[0]
    if not math.isfinite(value):
        return 1.0
    return (value - axis[0]) / (axis[1] - axis[0])


def _padded(low: float, high: float, before: float, after: float) -> list[float]:
    span = (high - low) or max(abs(high), 1e-6) * 0.5
    return [low - before * span, high + after * span]


def bars(
    figure: go.Figure,
    shown: Sequence[ResultRecord],
    names: Sequence[str],
    values: Sequence[float | None],
    texts: Sequence[str],
    say: Words,
    dark: bool,
    column: int | None,
) -> None:
    """Horizontal bars, the first record on top, each with its value at its end."""
    place_in = {} if column is None else {"row": 1, "col": column}
    figure.add_trace(
        go.Bar(
            x=list(values),
            y=list(names),
            orientation="h",
            text=list(texts),
            textposition="auto",
            insidetextanchor="end",
            cliponaxis=False,
            textfont={"size": 12},
            outsidetextfont={"color": palette.INK[dark]},
            insidetextfont={"color": [_contrast(r.method, dark) for r in shown]},
            marker={
                "color": [palette.colour(r.method, dark) for r in shown],
                "line": {"width": 0},
            },
            hovertemplate=[hover(record, say) for record in shown],
            width=0.62,
        ),
        **place_in,
    )
    figure.update_yaxes(autorange="reversed", type="category", gridcolor="rgba(0,0,0,0)")
    figure.update_yaxes(tickfont={"size": 12, "color": palette.INK[dark]})


def _contrast(method: str, dark: bool) -> str:
    """Black or white, whichever reads better on the method's colour."""
    red, green, blue = (int(palette.colour(method, dark)[i : i + 2], 16) for i in (1, 3, 5))
    return "#000000" if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "#ffffff"


def bar_height(count: int) -> int:
    return 130 + 34 * max(count, 2)


def hover(record: ResultRecord, say: Words) -> str:
    """The essentials of a record as the lines of a hover box."""
    ppl, kl = numbers.perplexity(record.perplexity), numbers.divergence(record.kl_divergence)
    rows = [
        (say("column_perplexity"), f"{ppl} {numbers.plus_minus(record.perplexity_ci, ppl)}"),
        (say("column_kl"), f"{kl} {numbers.plus_minus(record.kl_divergence_ci, kl)}"),
        (say("column_top1"), numbers.percent(record.top1_agreement)),
        (say("column_size"), f"{numbers.megabytes(record.size_bytes)} MB"),
        (say("column_bits"), numbers.bits(record.bits_per_weight)),
        (say("column_decode"), numbers.speed(record.decode_tokens_per_second)),
        (say("column_prefill"), numbers.speed(record.prefill_tokens_per_second)),
        (say("column_quantized"), numbers.duration(record.quantize_seconds)),
        (say("column_kernel"), record.kernel or numbers.NOTHING),
    ]
    lines = [f"<b>{html.escape(palette.short(record))}</b>"]
    if record.execution is not None:
        lines[0] += f" · {html.escape(say('badge_' + record.execution))}"
    lines += [f"{html.escape(name)}: {html.escape(str(value).strip())}" for name, value in rows]
    return "<br>".join(lines) + "<extra></extra>"
