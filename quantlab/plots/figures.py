"""Records as Plotly figures. Every value drawn was measured; every interval is 95%.

Figures are transparent and carry their own text colours; `dark` chooses the page they lie on.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import plotly.graph_objects as go

from quantlab.plots import numbers, palette
from quantlab.plots.curves import trained, training
from quantlab.plots.drawing import bar_height, bars, canvas, nothing, panels, scatter
from quantlab.plots.words import words
from quantlab.results import ResultRecord

EXPLODED = 4.0
"""Perplexity this many times the smallest one is an explosion, and the axis turns logarithmic."""
SPREAD = 30.0
"""The same for KL divergence, which spans more even where all is well."""

CONFIG = {
    "displaylogo": False,
    "displayModeBar": "hover",
    "modeBarButtonsToRemove": ["select2d", "lasso2d", "autoScale2d"],
    "toImageButtonOptions": {"format": "png", "scale": 2, "filename": "quantlab"},
}


def perplexity_size(
    records: Sequence[ResultRecord], dark: bool = False, language: str | None = None
) -> go.Figure:
    """Perplexity against size on disk, with the line of variants that nothing beats on both."""
    say = words(language)
    shown = [r for r in finished(records) if r.perplexity is not None and r.size_bytes is not None]
    figure = canvas(say, dark, say("figure_perplexity_size"), say("figure_lower_left"))
    points = [((r.size_bytes or 0) / 1e6, r.perplexity or 0.0) for r in shown]
    line = pareto(points)
    if len(line) > 1:
        figure.add_scatter(
            x=[point[0] for point in line],
            y=[point[1] for point in line],
            mode="lines",
            line={"shape": "hv", "width": 1.5, "dash": "dot", "color": palette.MUTED[dark]},
            hoverinfo="skip",
            name="pareto",
        )
    scatter(figure, shown, points, [r.perplexity_ci for r in shown], say, dark, EXPLODED)
    figure.update_xaxes(title_text=say("axis_size"))
    figure.update_yaxes(title_text=say("axis_perplexity"))
    return figure


def kl_bits(
    records: Sequence[ResultRecord], dark: bool = False, language: str | None = None
) -> go.Figure:
    """KL divergence to the original against bits per weight; the original itself is left out."""
    say = words(language)
    shown = [
        r
        for r in finished(records)
        if r.kl_divergence is not None
        and r.bits_per_weight is not None
        and not palette.is_reference(r)
    ]
    figure = canvas(say, dark, say("figure_kl_bits"), say("figure_lower_left"))
    points = [(r.bits_per_weight or 0.0, r.kl_divergence or 0.0) for r in shown]
    scatter(figure, shown, points, [r.kl_divergence_ci for r in shown], say, dark, SPREAD)
    figure.update_xaxes(title_text=say("axis_bits"))
    figure.update_yaxes(title_text=say("axis_kl"))
    return figure


def speed(
    records: Sequence[ResultRecord], dark: bool = False, language: str | None = None
) -> go.Figure:
    """Decode and prefill speed of the packed variants; simulated ones have none and are named."""
    say = words(language)
    shown = [r for r in finished(records) if r.decode_tokens_per_second is not None]
    silent = [palette.short(r) for r in finished(records) if r.execution == "simulated"]
    note = say("figure_speed_without", names=", ".join(silent)) if silent else ""
    subtitle = " · ".join(part for part in (say("figure_longer"), note) if part)
    figure = canvas(
        say,
        dark,
        say("figure_speed"),
        subtitle,
        panels(1, 2, shared_yaxes=True, horizontal_spacing=0.08),
    )
    figure.update_layout(height=bar_height(len(finished(records))))
    if not shown:
        nothing(figure, say, dark)
        return figure
    names = [palette.short(r) for r in shown]
    for column, field in ((1, "decode_tokens_per_second"), (2, "prefill_tokens_per_second")):
        values = [getattr(r, field) for r in shown]
        bars(figure, shown, names, values, [numbers.speed(v) for v in values], say, dark, column)
    figure.update_xaxes(nticks=4, tickangle=0)
    figure.update_xaxes(title_text=say("axis_decode"), col=1)
    figure.update_xaxes(title_text=say("axis_prefill"), col=2)
    return figure


def size(
    records: Sequence[ResultRecord], dark: bool = False, language: str | None = None
) -> go.Figure:
    """Bytes of all weights on disk, and how many times smaller than the original."""
    say = words(language)
    shown = [r for r in finished(records) if r.size_bytes is not None]
    whole = next((r.size_bytes for r in shown if palette.is_reference(r)), None)
    texts = []
    for record in shown:
        text = f"{numbers.megabytes(record.size_bytes)} MB"
        if whole and not palette.is_reference(record) and record.size_bytes:
            text += f" · {whole / record.size_bytes:.1f}×"
        texts.append(text)
    figure = canvas(say, dark, say("figure_size"), say("figure_shorter"))
    values = [(r.size_bytes or 0) / 1e6 for r in shown]
    bars(figure, shown, [palette.short(r) for r in shown], values, texts, say, dark, None)
    figure.update_xaxes(title_text=say("axis_size"))
    figure.update_layout(height=bar_height(len(finished(records))))
    return figure


FIGURES = {
    "perplexity_size": perplexity_size,
    "kl_bits": kl_bits,
    "speed": speed,
    "size": size,
    "training": training,
}


def drawn(records: Sequence[ResultRecord]) -> list[str]:
    """Names of the figures that these records fill; training has one only where there was any."""
    names = list(FIGURES) if finished(records) else []
    return [name for name in names if name != "training" or trained(records)]


def to_json(figure: go.Figure) -> str:
    """The figure with its mode bar settings, as Plotly in a browser takes it."""
    data = json.loads(figure.to_json())
    data["config"] = CONFIG
    return json.dumps(data)


def mark(figure: go.Figure, text: str) -> None:
    """Say `text` under the figure's title, before what stands there."""
    subtitle = figure.layout.title.subtitle
    subtitle.text = " · ".join(part for part in (text, subtitle.text) if part)


def finished(records: Sequence[ResultRecord]) -> list[ResultRecord]:
    return [record for record in records if record.status == "finished"]


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other one beats on both axes, from left to right."""
    line: list[tuple[float, float]] = []
    for point in sorted(set(points)):
        if not line or point[1] < line[-1][1]:
            line.append(point)
    return line
