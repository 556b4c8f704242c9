"""The results table as data: columns, what each cell says and sorts by, and which cell is best.

The page, the report and the CSV read this one list; adding a column is adding one entry.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from quantlab.plots import numbers, palette, verdict
from quantlab.results import ResultRecord


@dataclass(frozen=True)
class Column:
    """One measured column.

    `key` names the texts `column_<key>` and `term_<key>`; `value` is what the column sorts by,
    `text` what a cell says, `interval` what follows the ±. `compare` names the measure whose paired
    interval decides whether a best cell is marked; exact figures (sizes) need none.
    """

    key: str
    value: Callable[[ResultRecord], float | None]
    text: Callable[[float | None], str]
    interval: Callable[[ResultRecord], tuple[float, float] | None] | None = None
    compare: verdict.Measure | None = None
    exact: bool = False
    narrow: bool = True
    """Whether a page shows it in the table itself rather than in the row's details."""


COLUMNS: tuple[Column, ...] = (
    Column("bits", lambda r: r.bits_per_weight, numbers.bits, exact=True),
    Column("size", lambda r: r.size_bytes, numbers.megabytes, exact=True),
    Column(
        "perplexity",
        lambda r: r.perplexity,
        numbers.perplexity,
        interval=lambda r: r.perplexity_ci,
        compare="nll",
    ),
    Column(
        "kl",
        lambda r: r.kl_divergence,
        numbers.divergence,
        interval=lambda r: r.kl_divergence_ci,
        compare="kl",
    ),
    Column("top1", lambda r: r.top1_agreement, numbers.percent),
    Column("decode", lambda r: r.decode_tokens_per_second, numbers.speed),
    Column("prefill", lambda r: r.prefill_tokens_per_second, numbers.speed),
    Column("ttft", lambda r: r.time_to_first_token_seconds, numbers.milliseconds),
    Column("quantized", lambda r: r.quantize_seconds, numbers.duration),
    Column("memory", lambda r: r.peak_rss_bytes, numbers.megabytes, narrow=False),
)


@dataclass(frozen=True)
class Cell:
    """One cell: its text, the ± after it, the number to sort by, whether it is the best."""

    key: str
    text: str
    plus_minus: str
    value: float | None
    best: bool


def cells(record: ResultRecord, winners: dict[str, str]) -> list[Cell]:
    """The cells of a finished record; `winners` comes from `best_cells`."""
    row = []
    for column in COLUMNS:
        value = column.value(record)
        text = column.text(value)
        interval = column.interval(record) if column.interval else None
        row.append(
            Cell(
                column.key,
                text,
                numbers.plus_minus(interval, text) if value is not None else "",
                value if value is None or math.isfinite(value) else None,
                winners.get(column.key) == record.variant,
            )
        )
    return row


def best_cells(records: Sequence[ResultRecord]) -> dict[str, str]:
    """Column key -> variant of its best cell, among quantized variants.

    Only where that can be said: measured columns need a paired interval that leaves zero out
    against every other variant; sizes are exact and need a single smallest one. Speeds and times
    are single measurements with no interval, so none of them is marked.
    """
    winners: dict[str, str] = {}
    candidates = verdict.quantized(records)
    for column in COLUMNS:
        if column.compare is not None:
            leader = verdict.best(records, column.compare)
            if leader is not None:
                winners[column.key] = leader.variant
        elif column.exact:
            values = [(v, r.variant) for r in candidates if (v := column.value(r)) is not None]
            values.sort()
            if len(values) > 1 and values[0][0] < values[1][0]:
                winners[column.key] = values[0][1]
    return winners


def badges(record: ResultRecord) -> list[str]:
    """What a record's badges are, in order: `packed`, `simulated`, `failed`, `cached`, …"""
    if record.status != "finished":
        return [record.status]
    found: list[str] = []
    if record.execution is not None and not (
        palette.is_reference(record) and record.execution == "simulated"
    ):
        found.append(record.execution)
    if record.cached:
        found.append("cached")
    if record.fallbacks:
        found.append("fallback")
    return found
