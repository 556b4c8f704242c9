"""What the Inspect tab shows of a survey: heatmaps as HTML, figures, and short numbers.

Pure functions of what they are given; each answers in some ten milliseconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any

import plotly.graph_objects as go
from gradio.components.plot import PlotData

from quantlab.inspection import causal, detail
from quantlab.inspection.causal import Causal
from quantlab.inspection.survey import Linear, Survey
from quantlab.learn.material import Slice
from quantlab.plots import figures, numbers
from quantlab.plots.inspect import channels, distribution
from quantlab.plots.inspect.heatmap import heatmap
from quantlab.plots.templates import render
from quantlab.plots.terms import paragraphs
from quantlab.ui.client import Client

MEASURES = ("output", "weight", "kl")


@dataclass(frozen=True)
class Fact:
    """A number with its name: `key` is the text `inspect_fact_<key>`, explained on hover by
    `inspect_tip_<key>`."""

    key: str
    value: str


def facts_html(client: Client, facts: list[Fact], title: str = "") -> str:
    return render("inspect_facts.html", client.language, facts=facts, title=title)


def text_html(client: Client, key: str) -> str:
    """A title and prose whose terms are explained on hover."""
    say = client.say
    return render(
        "lesson_text.html",
        client.language,
        title=say(f"inspect_{key}_title"),
        paragraphs=paragraphs(say(f"inspect_{key}_text"), say),
    )


def plot(figure: go.Figure) -> PlotData:
    """The figure as the browser gets it."""
    return PlotData(type="plotly", plot=figures.to_json(figure))


def percent(value: float) -> str:
    """A share with three significant digits."""
    return f"{100 * value:.3g}%" if abs(value) < 9.995 else f"{100 * value:,.0f}%"


def size(value: float) -> str:
    """A magnitude: `0.0123`, `4.56`, `3,102`."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


# Activation outliers


def peaks_html(client: Client, found: Survey, chosen: str) -> str:
    """The heatmap of every input's largest channel maximum."""
    values = {name: float(one.read.peaks.max()) for name, one in found.linears.items()}
    marks = {
        name: f"{channels.spread(one.read.peaks):,.0f}×" for name, one in found.linears.items()
    }
    return _heatmap(client, found, values, chosen, client.say("inspect_map_peaks"), size, marks)


def _heatmap(
    client: Client,
    found: Survey,
    values: Mapping[str, float],
    chosen: str,
    label: str,
    spelled: Any,
    marks: Mapping[str, str] | None = None,
) -> str:
    return heatmap(
        values,
        found.paths,
        found.blocks,
        chosen,
        client.language,
        label=label,
        spelled=spelled,
        linears=list(found.linears),
        marks=marks,
    )


@dataclass(frozen=True)
class Grid:
    """What is set beside the distributions."""

    alpha: float
    bits: int
    symmetric: bool
    granularity: str


def outliers(
    client: Client, found: Survey, one: Linear, real: Slice | None, grid: Grid
) -> tuple[str, PlotData, PlotData | None, PlotData | None]:
    """(numbers, sorted maxima, activations, weights) of one linear; the latter two need its real
    values."""
    say, dark = client.say, client.dark
    maxima = detail.maxima(found, one, grid.alpha)
    facts = [
        Fact("peak", size(float(maxima.inputs.max()))),
        Fact("top", str(int(maxima.inputs.argmax()))),
        Fact("spread", f"{channels.spread(maxima.inputs):,.1f}×"),
    ]
    if maxima.smooth_inputs is not None:
        facts.append(Fact("spread_after", f"{channels.spread(maxima.smooth_inputs):,.1f}×"))
    shown = plot(channels.maxima(maxima, say, dark))
    if real is None:
        return facts_html(client, facts, one.name), shown, None, None
    scale = detail.scale_of(found, one, grid.alpha)
    before, after = detail.distributions(real, scale, grid.bits, grid.symmetric, grid.granularity)
    facts.append(Fact("output_before", percent(before.output_error)))
    if after is not None:
        facts.append(Fact("output_after", percent(after.output_error)))
    pictures = [
        plot(
            distribution.distribution(
                getattr(before, key), None if after is None else getattr(after, key), key, say, dark
            )
        )
        for key in ("inputs", "weights")
    ]
    return facts_html(client, facts, one.name), shown, pictures[0], pictures[1]


def note_html(client: Client, found: Survey, one: Linear, real: Slice | None) -> str:
    """What the distributions are of; or why there are none, and the button that changes it."""
    say = client.say
    lines = []
    if real is None:
        lines.append(say("inspect_no_values", name=one.name))
    else:
        lines.append(
            say(
                "inspect_values",
                tokens=real.inputs.shape[0],
                rows=real.weight.shape[0],
                first=real.channels.start,
                last=real.channels.stop - 1,
                columns=one.shape[1],
            )
        )
    if one.read.fold is None:
        lines.append(say("inspect_no_fold", name=one.path))
    return render("inspect_note.html", client.language, lines=lines, missing=real is None)


# Layers


@dataclass(frozen=True)
class Measured:
    """The causal measurements at some bits, those that count most first, and whether each came with
    QuantLab."""

    documents: tuple[tuple[Causal, bool], ...] = ()

    def of(self, name: str) -> Causal | None:
        """The measurement that a linear's value is taken from."""
        return next((one for one, _ in self.documents if name in one.cells), None)


def measured(found: Survey, bits: int, shipped: bool) -> Measured:
    """Everything known at these bits: what was measured here, the latest first, then what ships."""
    documents = causal.known(found.origin.fingerprint, shipped)
    return Measured(tuple((one, came) for one, came in documents if one.setting.bits == bits))


def values_of(found: Survey, measure: str, bits: int, of: Measured) -> dict[str, float]:
    """What the heatmap colours, by the linear's name."""
    if measure == "kl":
        taken = {name: of.of(name) for name in found.linears}
        return {name: one.cells[name][0] for name, one in taken.items() if one is not None}
    errors = {name: _errors(one, measure) for name, one in found.linears.items()}
    return {name: table[bits] for name, table in errors.items()}


def _errors(one: Linear, measure: str) -> dict[int, float]:
    return one.weight_errors if measure == "weight" else one.output_errors


def layers_html(
    client: Client, found: Survey, chosen: str, measure: str, bits: int, of: Measured
) -> str:
    """The heatmap of what rounding costs each linear, with a line about how it was measured."""
    say = client.say
    values = values_of(found, measure, bits, of)
    spelled = numbers.divergence if measure == "kl" else percent
    label = say(f"inspect_map_{measure}", bits=bits)
    made = _heatmap(client, found, values, chosen, label, spelled)
    lines = _about(client, measure, of)
    return made + render("inspect_measured.html", client.language, lines=lines)


def _about(client: Client, measure: str, of: Measured) -> list[dict[str, Any]]:
    """How what is coloured was measured, a line for each measurement that it is taken from."""
    say = client.say
    if measure != "kl":
        return [{"text": say("inspect_errors_how"), "tip": ""}]
    lines: list[dict[str, Any]] = []
    for one, shipped in of.documents:
        count = sum(of.of(name) is one for name in one.cells)
        text = say(
            "inspect_kl_how",
            tokens=f"{one.setting.tokens:,}",
            window=one.setting.window,
            count=count,
            floor=numbers.divergence(one.floor),
        )
        tip = say("inspect_kl_tip", machine=one.machine, date=one.date[:10], kernel=one.kernel)
        lines += [{"text": text, "tip": tip, "shipped": shipped}] if count else []
    return lines or [{"text": say("inspect_kl_none"), "tip": ""}]


def layer(client: Client, one: Linear, bits: int, of: Measured) -> tuple[str, PlotData, PlotData]:
    """(numbers, weights with their grids, worst channels) of one linear."""
    say, dark = client.say, client.dark
    facts = [
        Fact("shape", f"{one.shape[0]:,} × {one.shape[1]:,}"),
        Fact("weight_error", percent(one.weight_errors[bits])),
        Fact("output_error", percent(one.output_errors[bits])),
    ]
    taken = of.of(one.name)
    if taken is not None:
        cell = taken.cells[one.name]
        facts.append(Fact("kl", f"{numbers.divergence(cell[0])} {_interval(cell)}".strip()))
        facts.append(Fact("kl_above", numbers.divergence(max(cell[0] - taken.floor, 0.0))))
    return (
        facts_html(client, facts, one.name),
        plot(distribution.weight(one, bits, say, dark)),
        plot(channels.worst(one, say, dark)),
    )


def _interval(cell: causal.Cell) -> str:
    low, high = cell[1:]
    if not (isfinite(low) and isfinite(high)):
        return ""
    return f"({numbers.divergence(low)} – {numbers.divergence(high)})"
