"""What the numbers allow to be said of every two variants: a plain sentence each, and a matrix.

A quantized variant is held against the original by the nats it loses on the text, and against
another quantized one by its KL divergence to the original, which tells more with as few tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

from quantlab.plots import numbers, palette
from quantlab.plots.templates import render
from quantlab.plots.verdict import Difference, Measure, difference, original, quantized
from quantlab.plots.words import Words, words
from quantlab.results import ResultRecord

Relation = Literal["worse", "better", "same", "unpaired"]


@dataclass(frozen=True)
class Pair:
    """`first` held against `second`: the paired difference first - second of `measure`, in nats a
    token; None where they were not measured on the same segments."""

    first: ResultRecord
    second: ResultRecord
    measure: Measure
    gap: Difference | None

    @property
    def relation(self) -> Relation:
        """What the first is to the second; less is better in both measures."""
        if self.gap is None:
            return "unpaired"
        if not self.gap.clear:
            return "same"
        return "worse" if self.gap.low > 0 else "better"

    def turned(self) -> Pair:
        """The same pair with the second first."""
        gap = self.gap
        turned = None if gap is None else Difference(-gap.mean, -gap.high, -gap.low)
        return Pair(self.second, self.first, self.measure, turned)


def pairs(records: Sequence[ResultRecord]) -> list[Pair]:
    """Every quantized record against the original, then every two quantized ones, in order."""
    reference, others = original(records), quantized(records)
    found = []
    if reference is not None:
        found = [_pair(record, reference, "nll") for record in others]
    return found + [_pair(one, other, "kl") for one, other in combinations(others, 2)]


def _pair(first: ResultRecord, second: ResultRecord, measure: Measure) -> Pair:
    return Pair(first, second, measure, difference(first, second, measure))


def sentence(pair: Pair, say: Words) -> str:
    """`RTN 4-bit is worse than GPTQ 4-bit by 0.040 ± 0.010 nats of KL.`

    Of two quantized variants the worse is named first; no winner is named without evidence.
    """
    if pair.measure == "kl" and pair.relation == "better":
        pair = pair.turned()
    kind = pair.relation
    if pair.measure == "nll" and kind != "unpaired":
        kind_of = f"pair_{kind}_original"
    else:
        kind_of = f"pair_{kind}"
    return say(
        kind_of,
        first=palette.short(pair.first),
        second=palette.short(pair.second),
        gap=_gap(pair.gap, absolute=kind != "same"),
    )


def sentences(records: Sequence[ResultRecord], language: str | None = None) -> list[str]:
    """A sentence for every pair; empty while there is none."""
    say = words(language)
    return [sentence(pair, say) for pair in pairs(records)]


def _gap(gap: Difference | None, *, absolute: bool) -> str:
    if gap is None:
        return numbers.NOTHING
    return numbers.difference(abs(gap.mean) if absolute else gap.mean, gap.low, gap.high)


def box(records: Sequence[ResultRecord], language: str | None = None) -> str:
    """The matrix of all pairs, each row held against each column, with the sentences below; ''
    while there is none."""
    say = words(language)
    every = pairs(records)
    by_names = {
        (p.first.variant, p.second.variant): p for p in (*every, *(q.turned() for q in every))
    }
    reference, others = original(records), quantized(records)
    columns = [*([] if reference is None else [reference]), *others]
    rows = [
        {
            "method": row.method,
            "label": palette.short(row),
            "cells": [
                _cell(by_names.get((row.variant, column.variant)), say) for column in columns
            ],
        }
        for row in others
    ]
    return render(
        "pairs.html",
        language,
        columns=[{"method": one.method, "label": palette.short(one)} for one in columns],
        rows=rows if every else [],
        lines=[sentence(pair, say) for pair in every],
    )


def _cell(pair: Pair | None, say: Words) -> dict[str, Any]:
    """What a cell shows and, on hover, its sentence and the interval's ends."""
    if pair is None:  # A variant beside itself.
        return {"relation": "none", "word": "", "gap": "", "tip": ""}
    kind = pair.relation
    tip = sentence(pair, say)
    if pair.gap is not None:
        ends = [f"{end:.5f}" for end in (pair.gap.low, pair.gap.high)]
        tip += " " + say("pair_interval", low=ends[0], high=ends[1])
    return {
        "relation": kind,
        "word": say(f"pair_word_{kind}"),
        "gap": "" if kind == "unpaired" else _gap(pair.gap, absolute=kind != "same"),
        "tip": tip,
    }
