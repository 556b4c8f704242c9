"""What ships of a run: all that the page shows of it, as it was measured, and no path of it."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

import pytest

from quantlab import precomputed
from quantlab.plots.words import words
from quantlab.runs import Run
from quantlab.ui import form
from tests.records import failed, record

ENVIRONMENT = {"cpu": "a chip", "cores": 2, "date": "2026-11-22T10:00:00+00:00"}


def reading(*kl: float) -> dict[str, Any]:
    return {
        "tokens": [1, 2],
        "text": ["A", "b"],
        "original": [[[2, 0.5], [3, 0.25]]],
        "pieces": {"2": "b", "3": str(kl[0])},
        "kl": list(kl),
        "variant": [[[3, kl[0]], [2, 0.1]]],
    }


def a_run(**changes: Any) -> Run:
    shipped = precomputed.run()
    spec = dataclasses.replace(shipped.spec, variants=shipped.spec.variants[:2])
    records = tuple(
        record(
            label,
            artifact="/a/folder/of/somebody",
            environment={**ENVIRONMENT, "date": "later", "text": {"name": "project"}},
            reading=reading(kl),
        )
        for label, kl in (("bf16", 0.125), ("rtn:4", 0.1))
    )
    values: dict[str, Any] = {
        "id": "20261122-100000-abcdef",
        "spec": spec,
        "environment": ENVIRONMENT,
        "records": records,
    }
    return dataclasses.replace(shipped, **(values | changes))


def test_what_is_read_is_what_was_measured() -> None:
    run = a_run()
    document = json.loads(json.dumps(precomputed.write(run)))
    back = precomputed.read(document)
    assert back.shipped
    assert not run.shipped
    bare = tuple(dataclasses.replace(one, artifact=None) for one in run.records)
    assert dataclasses.replace(back, id=run.id) == dataclasses.replace(run, records=bare)
    assert "/a/folder" not in json.dumps(document)
    for result in document["results"]:  # Once, not once a variant.
        assert set(result["reading"]) == {"pieces", "kl", "variant"}
        assert set(result["environment"]) == {"date", "text"}


def test_a_reading_of_another_text_is_kept_whole() -> None:
    first, second = a_run().records
    other = dataclasses.replace(second, reading={**second.reading, "text": ["A", "c"]})
    run = a_run(records=(first, other))
    back = precomputed.read(precomputed.write(run))
    assert [one.reading for one in back.records] == [one.reading for one in run.records]


@pytest.mark.parametrize(
    "changes",
    [
        {"status": "cancelled"},
        {"records": (record("bf16"), record("rtn:4", cached=True))},
        {"records": (record("bf16"), failed("rtn:4"))},
        {"records": (record("bf16"),)},
    ],
    ids=["cancelled", "cached", "failed", "unfinished"],
)
def test_only_a_run_that_measured_everything_ships(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="20261122-100000-abcdef"):
        precomputed.write(a_run(**changes))


def test_what_ships_is_the_default_comparison() -> None:
    run = precomputed.run()
    assert run.spec == form.spec_of(form.defaults(), words())
    assert [one.variant for one in run.records] == [one.label for one in run.spec.variants]
    for one in run.records:
        assert one.status == "finished"
        assert one.artifact is None
        assert not one.cached
        assert len(one.outputs) == len(run.spec.prompts)
        assert len(one.segments["kl"]) == len(one.segments["nll"]) >= 16
        assert one.reading["kl"]
    assert run.environment["cpu"]
    assert re.match(r"\d{4}-\d\d-\d\d", run.environment["date"])
    assert precomputed.FILE.stat().st_size < 300_000
