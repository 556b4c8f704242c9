"""What went wrong, read off the records: each failure by name, where known with its layer, and
what to try. Nothing is run; a finding says only what the record holds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from quantlab.plots import numbers, palette
from quantlab.plots.templates import render
from quantlab.plots.verdict import original
from quantlab.plots.words import words
from quantlab.results import NOTHING_FINITE, ResultRecord
from quantlab.types import Generation

EXPLODED = 2.0
"""Perplexity as a multiple of the original's from which it counts as exploded."""
STRETCHED, WORSE = 30.0, 1.1
"""A static activation step is an outlier's from this multiple of the median layer's on, and blamed
where perplexity has grown by this factor too."""
LONGEST_PERIOD, TIMES, LEAST_TOKENS = 16, 3, 12
"""A loop: an answer ends in a block of at most so many tokens, at least so often, over so many."""

Kind = Literal["not_finite", "exploded", "stretched", "little_calibration", "repeats"]


@dataclass(frozen=True)
class Finding:
    """One failure of one variant; `layer` is the path of a linear, None where it is not known.
    `values` fill the places of its text."""

    variant: str
    kind: Kind
    layer: str | None = None
    values: dict[str, str] = field(default_factory=dict)


def findings(records: Sequence[ResultRecord]) -> list[Finding]:
    """Everything wrong with the variants, in their order, the gravest of each first."""
    reference = original(records)
    found = []
    for record in records:
        found += _not_finite(record)
        if record.status != "finished":
            continue
        if not palette.is_reference(record):
            found += _exploded(record, reference)
            found += _stretched(record, reference)
            found += _little_calibration(record)
            found += _repeats(record, reference)
    return found


def _not_finite(record: ResultRecord) -> list[Finding]:
    told = record.status == "failed" and (record.error or "").startswith(NOTHING_FINITE)
    measured = record.perplexity is not None and not math.isfinite(record.perplexity)
    return [Finding(record.variant, "not_finite")] if told or measured else []


def _growth(record: ResultRecord, reference: ResultRecord | None) -> float | None:
    """Perplexity as a multiple of the original's; None where one of the two is missing."""
    if reference is None or not reference.perplexity or record.perplexity is None:
        return None
    return record.perplexity / reference.perplexity


def _exploded(record: ResultRecord, reference: ResultRecord | None) -> list[Finding]:
    growth = _growth(record, reference)
    if growth is None or not EXPLODED <= growth < math.inf or reference is None:
        return []
    values = {
        "perplexity": numbers.perplexity(record.perplexity),
        "original": numbers.perplexity(reference.perplexity),
    }
    return [Finding(record.variant, "exploded", None, values)]


def _stretched(record: ResultRecord, reference: ResultRecord | None) -> list[Finding]:
    static = record.details.get("static_inputs")
    growth = _growth(record, reference)
    if not static or growth is None or growth < WORSE or not static["median"]:
        return []
    ratio = static["step"] / static["median"]
    if ratio < STRETCHED:
        return []
    return [Finding(record.variant, "stretched", static["layer"], {"ratio": f"{ratio:,.0f}"})]


def _little_calibration(record: ResultRecord) -> list[Finding]:
    read = record.environment.get("calibration", {})
    tokens, widest = read.get("tokens"), read.get("widest_input")
    if not tokens or not widest or tokens >= widest:
        return []
    values = {"tokens": f"{tokens:,}", "widest": f"{widest:,}"}
    return [Finding(record.variant, "little_calibration", read.get("widest_layer"), values)]


def _repeats(record: ResultRecord, reference: ResultRecord | None) -> list[Finding]:
    """Answers that end in a loop, where the original's to the same prompt does not."""
    steady = {o.prompt for o in reference.outputs if loop(o.tokens) is None} if reference else None
    for output in record.outputs:
        found = loop(output.tokens)
        if found is None or (steady is not None and output.prompt not in steady):
            continue
        period, times = found
        text = _block(output, period)
        return [Finding(record.variant, "repeats", None, {"times": str(times), "text": text})]
    return []


def _block(output: Generation, period: int) -> str:
    text = "".join(output.pieces[-period:]).strip() or "␣"
    return text if len(text) <= 60 else f"{text[:60]}…"


def loop(tokens: Sequence[int]) -> tuple[int, int] | None:
    """(period, times) of the block that `tokens` end in again and again; None without a loop.

    The shortest period that repeats at least `TIMES` times over at least `LEAST_TOKENS` tokens.
    """
    for period in range(1, LONGEST_PERIOD + 1):
        same = 0
        while same < len(tokens) - period and tokens[-1 - same] == tokens[-1 - same - period]:
            same += 1
        times = same // period + 1
        if times >= TIMES and times * period >= LEAST_TOKENS:
            return period, times
    return None


def box(records: Sequence[ResultRecord], language: str | None = None) -> str:
    """The findings as a list with what to try; '' where there are none."""
    say = words(language)
    method = {record.variant: record.method for record in records}
    shown = [
        {
            "method": method[one.variant],
            "label": palette.variant_label(one.variant),
            "name": say(f"autopsy_{one.kind}"),
            "tip": say(f"term_autopsy_{one.kind}"),
            "layer": one.layer,
            "text": say(f"autopsy_{one.kind}_text", **one.values),
            "advice": say(f"autopsy_{one.kind}_try"),
        }
        for one in findings(records)
    ]
    return render("autopsy.html", language, findings=shown)
