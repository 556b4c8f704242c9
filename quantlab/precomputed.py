"""The default comparison of the bundled model that ships with QuantLab, measured once.

`assets/precomputed.json` is what `scripts/precomputed.py` kept of a finished run: the document that
`compare --json` writes, with the run it belongs to. It is a run of nobody's history: no store has
it, so nothing of it is ever found as a cached result.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from quantlab.results import SCHEMA, ResultRecord
from quantlab.runs import SHIPPED, Run
from quantlab.types import RunSpec

FILE = Path(__file__).resolve().parents[1] / "assets" / "precomputed.json"
SHARED = ("tokens", "text", "original")
"""Parts of a reading that are the same for every variant of a run; kept once."""


@cache
def run() -> Run:
    """The comparison as a finished run."""
    return read(json.loads(FILE.read_text(encoding="utf-8")))


def read(document: Mapping[str, Any]) -> Run:
    """The run that `write` made a document of."""
    told, environment = document["run"], document["environment"]
    made = Run(
        id=SHIPPED,
        kind="compare",
        spec=RunSpec.from_json(told["spec"]),
        status="finished",
        error=None,
        created=told["created"],
        started=told["started"],
        ended=told["ended"],
        environment=environment,
        records=(),
        parent=None,
    )
    records = [
        ResultRecord.from_json(
            result
            | {
                "environment": environment | result["environment"],
                "reading": result["reading"] and document["reading"] | result["reading"],
            }
        )
        for result in document["results"]
    ]
    return made.with_records(records)


def write(run: Run) -> dict[str, Any]:
    """What ships of a finished run. Left out: paths of artifacts, and in each record what all have
    in common (the run's environment, the text that they read and what the original made of it).

    Raises: ValueError for a run that did not measure all of its variants itself.
    """
    wrong = [r.variant for r in run.records if r.status != "finished" or r.cached]
    if run.status != "finished" or wrong or run.unsettled:
        raise ValueError(f"run {run.id}: {run.status}; not measured by it: {', '.join(wrong)}")
    readings = [record.reading for record in run.records if record.reading]
    common = {
        key: readings[0][key]
        for key in SHARED
        if readings and all(reading[key] == readings[0][key] for reading in readings)
    }
    results = []
    for record in run.records:
        own = record.environment.items()
        results.append(
            record.to_json()
            | {
                "artifact": None,
                "environment": {k: v for k, v in own if run.environment.get(k) != v},
                "reading": {k: v for k, v in record.reading.items() if k not in common},
            }
        )
    return {
        "schema": SCHEMA,
        "run": {
            "spec": run.spec.to_json(),
            "created": run.created,
            "started": run.started,
            "ended": run.ended,
        },
        "environment": run.environment,
        "reading": common,
        "results": results,
    }
