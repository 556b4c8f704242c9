"""Measured records that lessons show: those that ship, and those of a run.

`assets/learn/records.json` holds results of `quantlab compare --json` on the bundled model, without
outputs and segments, each document with its environment (`scripts/learn_slices.py`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from quantlab.results import ResultRecord

SHIPPED = Path(__file__).resolve().parents[2] / "assets" / "learn" / "records.json"


@dataclass(frozen=True)
class Measured:
    """Results with the machine and the day they were measured on; `shipped` if they came with
    QuantLab and not from a run of this person's."""

    records: tuple[ResultRecord, ...]
    machine: str
    date: str
    shipped: bool


@cache
def shipped() -> tuple[Measured, ...]:
    """The documents that ship: a comparison at 4 and 8 bits, and EfficientQAT at 2 bits."""
    documents = json.loads(SHIPPED.read_text(encoding="utf-8"))
    return tuple(
        of(
            [_record(result) for result in document["results"]],
            document["environment"],
            shipped=True,
        )
        for document in documents
    )


def of(
    records: Sequence[ResultRecord], environment: Mapping[str, Any], *, shipped: bool = False
) -> Measured:
    """Finished records with the environment they were measured in."""
    done = tuple(record for record in records if record.status == "finished")
    machine = str(environment.get("cpu") or environment.get("system") or "")
    return Measured(done, machine, str(environment.get("date") or "")[:10], shipped)


def _record(data: Mapping[str, Any]) -> ResultRecord:
    values = dict(data)
    for name in ("perplexity_ci", "kl_divergence_ci"):
        if values[name] is not None:
            values[name] = tuple(values[name])
    return ResultRecord(**values)
