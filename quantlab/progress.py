"""What a page shows of a run while it goes on: events folded, piece by piece, into a JobView."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from quantlab.results import ResultRecord
from quantlab.runs import ACTIVE, Run, RunStatus
from quantlab.types import VariantSpec

VariantState = Literal["waiting", "running", "finished", "failed", "cancelled"]

# No time left is told before the worker has shown this much of its speed.
_SPEED_SECONDS, _SPEED_FRACTION = 1.0, 0.01
_SMOOTHING_SECONDS = 15.0


@dataclass(frozen=True)
class VariantView:
    """One variant of a run: its state, the stage and step it is at (or ended at), and its result.

    `outputs` is the text generated so far for each prompt. `record` is None until it is settled,
    and stays None where the whole run failed before any work.
    """

    label: str
    state: VariantState
    stage: str
    done: int
    total: int
    record: ResultRecord | None
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class JobView:
    """A run as it stands: `fraction` 0 to 1 (never falls), `seconds_left` None while unknown,
    `position` 0 when it runs or has ended, n as the n-th in the queue."""

    run: Run
    status: RunStatus
    fraction: float
    seconds_left: float | None
    position: int
    message: str
    variants: tuple[VariantView, ...]
    notices: tuple[str, ...]


def plain_title(variant: VariantSpec) -> str:
    """`GPTQ 4-bit` from the label alone, for callers without the methods' own titles."""
    name = variant.method.upper() if len(variant.method) <= 4 else variant.method.capitalize()
    kind = dict(variant.options).get("type")
    if variant.method == "gguf" and kind is not None:
        return f"{name} {str(kind).upper()}"
    return name if variant.bits is None else f"{name} {variant.bits}-bit"


@dataclass
class Forecast:
    """When one worker will be done, from the speed it has shown, smoothed over some seconds."""

    first: tuple[float, float] | None = None
    at: float = 0.0
    fraction: float = 0.0
    finish: float | None = None

    def add(self, at: float, fraction: float) -> None:
        if self.first is None:
            self.first, self.at, self.fraction = (at, fraction), at, fraction
        if fraction <= self.fraction:
            return
        seconds, gained = at - self.first[0], fraction - self.first[1]
        if seconds >= _SPEED_SECONDS and gained >= _SPEED_FRACTION:
            finish = at + (1.0 - fraction) * seconds / gained
            weight = 1.0 - math.exp(-max(at - self.at, 0.0) / _SMOOTHING_SECONDS)
            self.finish = (
                finish if self.finish is None else (self.finish + weight * (finish - self.finish))
            )
        self.at, self.fraction = at, fraction

    def seconds_left(self, now: float) -> float | None:
        """None until there is something to go on; grows again while nothing moves."""
        if self.finish is None:
            return None
        return max(0.0, self.finish - now, (1.0 - self.fraction) * (now - self.at))


@dataclass
class _Step:
    stage: str = ""
    done: int = 0
    total: int = 0
    outputs: list[str] = field(default_factory=list)


class RunProgress:
    """The fold over a run's events. Read any number of times, each time what is new."""

    def __init__(self, labels: Iterable[str]) -> None:
        self.steps = {label: _Step() for label in labels}
        self.seen = 0
        self.fraction = 0.0
        self.current: str | None = None
        self.last: dict[str, Any] | None = None
        self.notices: dict[str, None] = {}
        self.forecast = Forecast()
        self._attempt = 0

    def read(self, rows: Iterable[tuple[int, float, dict[str, Any]]], attempt: int) -> None:
        """Fold in `rows` (number, time, event); those above `attempt` are of the newest worker."""
        for number, at, event in rows:
            if number > attempt:
                self._begin(attempt)
            self.seen = number
            getattr(self, f"_on_{event['kind']}", self._ignore)(at, event)
        self._begin(attempt)

    def _begin(self, attempt: int) -> None:
        if attempt != self._attempt:
            self._attempt = attempt
            self.current = self.last = None
            self.forecast = Forecast()

    def _ignore(self, at: float, event: dict[str, Any]) -> None:
        """An event of a kind that a newer version writes."""

    def _on_variant_started(self, at: float, event: dict[str, Any]) -> None:
        if event["variant"] in self.steps:
            self.steps[event["variant"]] = _Step()  # A second worker begins its texts anew.
            self.current = event["variant"]

    def _on_variant_finished(self, at: float, event: dict[str, Any]) -> None:
        if event["variant"] == self.current:
            self.current = None

    def _on_progress(self, at: float, event: dict[str, Any]) -> None:
        step = self.steps.get(event["variant"])
        if step is not None:
            self.current = event["variant"]
            step.stage, step.done, step.total = event["stage"], event["done"], event["total"]
        self.last = event
        self.fraction = max(self.fraction, min(event["fraction"], 1.0))
        self.forecast.add(at, event["fraction"])

    def _on_output(self, at: float, event: dict[str, Any]) -> None:
        step = self.steps.get(event["variant"])
        if step is not None and event["prompt"] >= 0:
            missing = event["prompt"] + 1 - len(step.outputs)
            step.outputs.extend([""] * missing)
            step.outputs[event["prompt"]] += event["text"]

    def _on_notice(self, at: float, event: dict[str, Any]) -> None:
        self.notices[event["message"]] = None


def job_view(
    run: Run,
    progress: RunProgress,
    *,
    position: int,
    cancelling: bool,
    now: float,
    title: Callable[[VariantSpec], str] = plain_title,
) -> JobView:
    """The view of a run with its records; `now` in epoch seconds."""
    running = run.status == "running"
    return JobView(
        run=run,
        status=run.status,
        fraction=1.0 if run.status == "finished" else progress.fraction,
        seconds_left=progress.forecast.seconds_left(now) if running else None,
        position=position,
        message="cancelling" if running and cancelling else _message(run, progress, title),
        variants=tuple(_variant_view(run, progress, v.label) for v in run.spec.variants),
        notices=tuple(progress.notices),
    )


def _variant_view(run: Run, progress: RunProgress, label: str) -> VariantView:
    step = progress.steps[label]
    record = next((record for record in run.records if record.variant == label), None)
    state: VariantState = "waiting"
    if record is not None:
        state = record.status
    elif run.status not in ACTIVE:
        state = "cancelled" if run.status == "cancelled" else "failed"
    elif run.status == "running" and progress.current == label:
        state = "running"
    outputs = list(step.outputs)
    if record is not None and record.outputs:
        outputs = [output.text for output in record.outputs]
    outputs.extend([""] * (len(run.spec.prompts) - len(outputs)))
    return VariantView(label, state, step.stage, step.done, step.total, record, tuple(outputs))


def _message(run: Run, progress: RunProgress, title: Callable[[VariantSpec], str]) -> str:
    if run.status == "queued":
        return "waiting for its turn"
    if run.status != "running":
        return run.error or run.status
    if progress.last is None:
        # Nothing measured yet: perhaps it waits for another program, and has said so.
        return next(reversed(progress.notices), "starting")
    event = progress.last
    titles = {variant.label: title(variant) for variant in run.spec.variants}
    parts = [titles.get(event["variant"], event["variant"]), event["stage"].replace("_", " ")]
    if event["total"] > 0:
        unit = "block " if event["stage"] == "quantize" else ""
        parts.append(f"{unit}{event['done']}/{event['total']}")
    return " · ".join(part for part in parts if part)
