"""The calibration lab: methods × calibration texts × evaluation texts, each cell a real comparison.

A lab is kept as its plan and the runs that fill it, one run of kind 'lab' for each pair of texts.
The runs go through the queue like any other, so they can be cancelled, go on after a restart, and
keep what is finished; weights are quantized once for all evaluation texts (the artifact's key knows
the calibration tokens, not what is evaluated).
"""

from __future__ import annotations

import dataclasses
import json
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from quantlab.errors import ConfigError
from quantlab.jobs import JobQueue, JobView
from quantlab.results import ResultRecord
from quantlab.store import Store
from quantlab.types import Estimate, RunSpec

MOST_RUNS = 24
"""Pairs of texts in one lab, so that a wrong click does not fill the queue for days."""

State = Literal["missing", "waiting", "running", "finished", "failed", "cancelled"]


@dataclass(frozen=True)
class Plan:
    """What a lab compares: the methods are `spec.variants`; its two texts are replaced by each of
    `calibrations` and `evaluations`."""

    spec: RunSpec
    calibrations: tuple[str, ...]
    evaluations: tuple[str, ...]

    def specs(self) -> Iterator[RunSpec]:
        """One comparison for each pair of texts; a calibration's own stand together, since they
        share its quantized weights."""
        for calibration in self.calibrations:
            for text in self.evaluations:
                yield dataclasses.replace(self.spec, calibration=calibration, text=text)

    def to_json(self) -> dict[str, Any]:
        return {
            "spec": self.spec.to_json(),
            "calibrations": list(self.calibrations),
            "evaluations": list(self.evaluations),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Plan:
        return cls(
            RunSpec.from_json(data["spec"]),
            tuple(data["calibrations"]),
            tuple(data["evaluations"]),
        )


@dataclass(frozen=True)
class Lab:
    """A lab in the store; `runs` in the order of the plan, without those deleted since."""

    id: str
    plan: Plan
    runs: tuple[str, ...]


@dataclass(frozen=True)
class Cell:
    """One method calibrated on one text and evaluated on another. `record` once it is finished;
    `reason` why there is none."""

    variant: str
    calibration: str
    evaluation: str
    state: State
    record: ResultRecord | None = None
    reason: str | None = None


def check(plan: Plan, validate: Callable[[RunSpec], None]) -> None:
    """Refuse what cannot work before anything is queued; `validate` is the pipeline's.

    Raises: ConfigError, ModelError or TextError, one message each.
    """
    if not plan.calibrations:
        raise ConfigError("calibration: choose at least one calibration text")
    if not plan.evaluations:
        raise ConfigError("text: choose at least one evaluation text")
    runs = len(plan.calibrations) * len(plan.evaluations)
    if runs > MOST_RUNS:
        raise ConfigError(
            f"calibration: {runs} pairs of texts are more than the {MOST_RUNS} of one matrix; "
            "choose fewer texts"
        )
    for spec in plan.specs():
        validate(spec)


def cost(plan: Plan, estimate: Callable[..., Estimate]) -> Estimate:
    """What the whole matrix will take: of each calibration text's comparisons only the first has to
    quantize. `estimate` is the pipeline's.

    Raises: ConfigError, for options that cannot be."""
    every = [
        estimate(
            dataclasses.replace(plan.spec, calibration=calibration, text=text), quantized=place > 0
        )
        for calibration in plan.calibrations
        for place, text in enumerate(plan.evaluations)
    ]
    return Estimate(
        sum(one.seconds for one in every),
        max((one.peak_bytes for one in every), default=0),
        next((one.note for one in every if one.note), ""),
    )


def submit(store: Store, queue: JobQueue, plan: Plan) -> str:
    """Queue every comparison of the plan and keep the lab: all of it or nothing. Its id."""
    lab_id = secrets.token_hex(6)
    with store.database.transaction() as db:
        db.execute(
            "INSERT INTO labs (id, plan, created) VALUES (?, ?, ?)",
            (lab_id, json.dumps(plan.to_json()), time.time()),
        )
        for spec in plan.specs():
            run_id = queue.submit(spec, kind="lab")
            db.execute("INSERT INTO lab_runs (lab_id, run_id) VALUES (?, ?)", (lab_id, run_id))
    return lab_id


def latest(store: Store) -> Lab | None:
    """The newest lab, None where there is none (or another version wrote it)."""
    with store.database.transaction(write=False) as db:
        row = db.execute("SELECT id, plan FROM labs ORDER BY seq DESC LIMIT 1").fetchone()
        if row is None:
            return None
        runs = db.execute(
            "SELECT run_id FROM lab_runs JOIN runs ON runs.id = run_id"
            " WHERE lab_id = ? ORDER BY lab_runs.seq",
            (row[0],),
        ).fetchall()
    try:
        plan = Plan.from_json(json.loads(row[1]))
    except (TypeError, KeyError, ValueError):
        return None
    return Lab(row[0], plan, tuple(run_id for (run_id,) in runs))


def mark(store: Store) -> tuple[Any, ...]:
    """What changes whenever a cell of the newest lab does; cheap, unlike the cells."""
    with store.database.transaction(write=False) as db:
        return tuple(
            db.execute(
                "SELECT lab_id, runs.id, runs.status, max(records.seq) FROM lab_runs"
                " JOIN runs ON runs.id = lab_runs.run_id"
                " LEFT JOIN records ON records.run_id = runs.id"
                " WHERE lab_id = (SELECT id FROM labs ORDER BY seq DESC LIMIT 1)"
                " GROUP BY runs.id ORDER BY runs.seq"
            ).fetchall()
        )


def cells(plan: Plan, views: list[JobView]) -> list[Cell]:
    """Every cell of the matrix, by method, then calibration, then evaluation."""
    by_texts = {(view.run.spec.calibration, view.run.spec.text): view for view in views}
    return [
        _cell(variant.label, calibration, text, by_texts.get((calibration, text)))
        for variant in plan.spec.variants
        for calibration in plan.calibrations
        for text in plan.evaluations
    ]


def _cell(variant: str, calibration: str, text: str, view: JobView | None) -> Cell:
    if view is None:
        return Cell(variant, calibration, text, "missing")
    one = next(each for each in view.variants if each.label == variant)
    reason = view.run.error if one.record is None else one.record.error
    if one.record is not None and one.record.status == "failed" and one.record.hint:
        reason = f"{reason} ({one.record.hint})"
    finished = one.record if one.state == "finished" else None
    return Cell(variant, calibration, text, one.state, finished, None if finished else reason)
