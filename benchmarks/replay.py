"""A pipeline that measures nothing: it tells the precomputed comparison again, in half a minute.

For `benchmarks.page_cost`, which measures what watching a run costs.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from typing import Any

from quantlab import precomputed
from quantlab.results import ResultRecord
from quantlab.store import Store
from quantlab.types import (
    Emit,
    OutputDelta,
    Progress,
    RunSpec,
    VariantFinished,
    VariantStarted,
)

SECONDS = 5.0
"""For each variant: three fifths quantizing, one reading the text, one answering."""
BLOCKS, WINDOWS = 30, 8


def environment(spec: RunSpec) -> dict[str, Any]:
    return precomputed.run().environment


def compare(
    spec: RunSpec,
    *,
    store: Store,
    emit: Emit,
    run_id: str | None = None,
    skip: Collection[str] = (),
) -> list[ResultRecord]:
    """Tell the precomputed records of `spec.variants`, at the pace of SECONDS a variant."""
    records = [record for record in precomputed.run().records if record.variant not in skip]
    for place, record in enumerate(records):
        emit(VariantStarted(record.variant))

        def step(stage: str, done: int, total: int, share: float, seconds: float) -> None:
            fraction = (place + share) / len(records)  # noqa: B023 - called within this turn.
            emit(Progress(record.variant, stage, done, total, fraction))  # noqa: B023
            time.sleep(seconds)

        for done in range(1, BLOCKS + 1):
            step("quantize", done, BLOCKS, 0.6 * done / BLOCKS, 0.6 * SECONDS / BLOCKS)
        for done in range(1, WINDOWS + 1):
            step("evaluate", done, WINDOWS, 0.6 + 0.2 * done / WINDOWS, 0.2 * SECONDS / WINDOWS)
        pieces = [(at, piece) for at, one in enumerate(record.outputs) for piece in one.pieces]
        for at, piece in pieces:
            emit(OutputDelta(record.variant, at, piece))
            time.sleep(0.2 * SECONDS / len(pieces))
        emit(VariantFinished(record.variant, record.to_json()))
    return records
