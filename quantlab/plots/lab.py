"""The calibration lab as a heatmap with numbers in its cells, and in sentences."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from quantlab.labs import Cell
from quantlab.plots import drawing, numbers, palette
from quantlab.plots.templates import render
from quantlab.plots.verdict import difference
from quantlab.plots.words import Words, words
from quantlab.results import ResultRecord

SHADES = {False: ("#eef3fa", "#f2a65e"), True: ("#1d2c40", "#8c4d14")}
"""From the smallest KL divergence to the largest; the page's ink is readable on all of them."""
ROW_PIXELS, LEAST_PIXELS = 50, 150
SIGNS = {"missing": "–", "waiting": "…", "running": "▶", "failed": "⚠", "cancelled": "✕"}


def text_name(name: str) -> str:
    """A text in few words: a named one as the command line calls it, a file by its own name."""
    return Path(name).name


def rows(cells: Sequence[Cell]) -> list[tuple[str, str]]:
    """(variant, calibration) of each row, in order."""
    return list(dict.fromkeys((cell.variant, cell.calibration) for cell in cells))


def figure(cells: Sequence[Cell], dark: bool = False, language: str | None = None) -> go.Figure:
    """Rows are a method calibrated on a text, columns are evaluation texts; a cell's colour is its
    KL divergence, its text that with the interval, and the perplexity with its own."""
    say = words(language)
    down, across = rows(cells), list(dict.fromkeys(cell.evaluation for cell in cells))
    by_place = {(c.variant, c.calibration, c.evaluation): c for c in cells}
    grid = [[by_place[(*row, column)] for column in across] for row in down]
    made = drawing.canvas(say, dark, say("lab_figure"), say("lab_figure_how"))
    ticks_down = [_row_name(*row, say) for row in down]
    ticks_across = [html.escape(text_name(name)) for name in across]
    low, high = SHADES[dark]
    made.add_trace(
        go.Heatmap(
            z=[
                [cell.record.kl_divergence if cell.record else None for cell in row] for row in grid
            ],
            x=list(range(len(across))),
            y=list(range(len(down))),
            text=[[_numbers(cell.record, say) if cell.record else "" for cell in r] for r in grid],
            texttemplate="%{text}",
            textfont={"size": 13, "color": palette.INK[dark]},
            hovertext=[[_hover(cell, say) for cell in row] for row in grid],
            hovertemplate="%{hovertext}<extra></extra>",
            colorscale=[[0, low], [1, high]],
            showscale=False,
            xgap=3,
            ygap=3,
        )
    )
    for y, row in enumerate(grid):
        for x, cell in enumerate(row):
            if cell.record is None:
                # A heatmap writes nothing into a cell without a value.
                made.add_annotation(
                    x=x,
                    y=y,
                    text=f"{SIGNS[cell.state]} {html.escape(say(f'lab_{cell.state}'))}",
                    showarrow=False,
                    font={"size": 13, "color": palette.MUTED[dark]},
                    hovertext=_hover(cell, say),
                )
    made.update_xaxes(
        tickvals=list(range(len(across))),
        ticktext=ticks_across,
        side="top",
        title_text=say("lab_evaluated"),
        title_standoff=6,
        range=[-0.5, len(across) - 0.5],
        showgrid=False,
    )
    made.update_yaxes(
        tickvals=list(range(len(down))),
        ticktext=ticks_down,
        range=[len(down) - 0.5, -0.5],
        showgrid=False,
    )
    made.update_layout(
        height=LEAST_PIXELS + ROW_PIXELS * len(down), margin={"l": 56, "r": 12, "t": 104, "b": 12}
    )
    return made


def _row_name(variant: str, calibration: str, say: Words) -> str:
    name = html.escape(palette.variant_label(variant))
    return f"{name}<br>{html.escape(text_name(calibration))}"


def _numbers(record: ResultRecord, say: Words) -> str:
    kl, ppl = numbers.divergence(record.kl_divergence), numbers.perplexity(record.perplexity)
    first = f"{kl} {numbers.plus_minus(record.kl_divergence_ci, kl)}".strip()
    second = f"{ppl} {numbers.plus_minus(record.perplexity_ci, ppl)}".strip()
    return f"<b>{first}</b><br>{html.escape(say('lab_ppl', value=second))}"


def _hover(cell: Cell, say: Words) -> str:
    """The cell by its names, then its record or why there is none."""
    lines = [
        f"<b>{html.escape(palette.variant_label(cell.variant))}</b>",
        f"{say('lab_calibrated')}: {html.escape(text_name(cell.calibration))}",
        f"{say('lab_evaluated')}: {html.escape(text_name(cell.evaluation))}",
    ]
    if cell.record is not None:
        return "<br>".join([*lines, _numbers(cell.record, say)])
    reason = f": {html.escape(cell.reason[:200])}" if cell.reason else ""
    return "<br>".join([*lines, html.escape(say(f"lab_{cell.state}")) + reason])


def sentences(cells: Sequence[Cell], language: str | None = None) -> list[str]:
    """For each method and evaluation text: each calibration text against the best one, by the
    paired interval of the KL divergence."""
    say = words(language)
    said = []
    for variant, text in dict.fromkeys((cell.variant, cell.evaluation) for cell in cells):
        known = [
            (cell.calibration, cell.record)
            for cell in cells
            if (cell.variant, cell.evaluation) == (variant, text) and cell.record is not None
        ]
        if len(known) < 2:
            continue
        best, leader = min(known, key=lambda pair: pair[1].kl_divergence or 0.0)
        for calibration, record in known:
            gap = difference(record, leader, "kl")
            if calibration == best or gap is None:
                continue
            kind = "worse" if gap.low > 0 else "same"
            said.append(
                say(
                    f"lab_says_{kind}",
                    method=palette.variant_label(variant),
                    text=text_name(text),
                    best=text_name(best),
                    other=text_name(calibration),
                    gap=numbers.difference(gap.mean, gap.low, gap.high),
                )
            )
    return said


def notes(cells: Sequence[Cell], language: str | None = None) -> str:
    """The sentences, and every cell that has none of its numbers because something went wrong."""
    say = words(language)
    failures: list[dict[str, Any]] = [
        {
            "method": cell.variant.partition(":")[0],
            "label": palette.variant_label(cell.variant),
            "texts": f"{text_name(cell.calibration)} → {text_name(cell.evaluation)}",
            "reason": cell.reason or say("lab_failed"),
        }
        for cell in cells
        if cell.state == "failed"
    ]
    lines = sentences(cells, language)
    return render("lab.html", language, lines=lines, failures=failures, any=bool(cells))
