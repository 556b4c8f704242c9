"""Run: one comparison in the history, and its translation from rows of the database."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from typing import Any, Literal

from quantlab.results import ResultRecord
from quantlab.types import RunSpec, Status, VariantSpec

Kind = Literal["compare", "answer", "lab"]
RunStatus = Literal["queued", "running", "finished", "failed", "cancelled"]

ACTIVE = ("queued", "running")
SHIPPED = "precomputed"
"""The name of the run that comes with QuantLab; those of a store are named by their time."""
COLUMNS = "id, kind, spec, status, error, created, started, ended, environment, parent"


@dataclass(frozen=True)
class Run:
    """One comparison, or one round of answers to new prompts with the comparison as `parent`; a
    comparison of kind 'lab' is one pair of texts in the calibration lab (`quantlab.labs`).

    Times are seconds since the epoch. `records` are in the order of `spec.variants`.
    """

    id: str
    kind: Kind
    spec: RunSpec
    status: RunStatus
    error: str | None
    created: float
    started: float | None
    ended: float | None
    environment: dict[str, Any]
    records: tuple[ResultRecord, ...]
    parent: str | None

    @property
    def shipped(self) -> bool:
        """Whether it came with QuantLab (`quantlab.precomputed`) and nobody ran it here."""
        return self.id == SHIPPED

    @property
    def unsettled(self) -> tuple[VariantSpec, ...]:
        """The variants that have no record yet."""
        settled = {record.variant for record in self.records}
        return tuple(v for v in self.spec.variants if v.label not in settled)

    def with_records(self, records: list[ResultRecord]) -> Run:
        """This run with these records, in the order of its variants."""
        order = {variant.label: place for place, variant in enumerate(self.spec.variants)}
        ranked = sorted(records, key=lambda record: order.get(record.variant, len(order)))
        return replace(self, records=tuple(ranked))


def head_from_row(row: tuple[Any, ...]) -> Run:
    """A run without records from a row of `COLUMNS`."""
    run_id, kind, spec, status, error, created, started, ended, environment, parent = row
    return Run(
        id=run_id,
        kind=kind,
        spec=RunSpec.from_json(json.loads(spec)),
        status=status,
        error=error,
        created=created,
        started=started,
        ended=ended,
        environment=json.loads(environment),
        records=(),
        parent=parent,
    )


def record_from_row(variant: str, text: str) -> ResultRecord:
    """A record from its JSON; one that another version wrote becomes a failed row that says so."""
    try:
        return ResultRecord.from_json(json.loads(text))
    except (TypeError, KeyError, ValueError):
        method, *rest = variant.split(":")
        spec = VariantSpec(method, int(rest[0]) if rest and rest[0].isdigit() else None)
        reason = "this result was written by another version of QuantLab and cannot be read"
        return replace(unmeasured(spec, "failed", reason), variant=variant)


def unmeasured(
    variant: VariantSpec, status: Status, error: str | None, hint: str | None = None
) -> ResultRecord:
    """The record of a variant that has no result: failed in its worker, or cancelled."""
    return ResultRecord(
        variant=variant.label,
        method=variant.method,
        bits=nominal_bits(variant),
        config=dict(variant.options),
        status=status,
        error=error,
        hint=hint,
    )


def nominal_bits(variant: VariantSpec) -> int:
    """The bits that the variant's name says: `gptq:4` 4, `bf16` 16, `gguf:q4_k_m` 4; else 0."""
    if variant.bits is not None:
        return variant.bits
    name = str(dict(variant.options).get("type", variant.method))
    number = re.search(r"\d+", name)
    return int(number.group()) if number else 0
