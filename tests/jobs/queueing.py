"""What tests of the queue ask of it and wait for."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil

from quantlab.jobs import JobQueue, JobView
from quantlab.types import (
    RunSpec,
    VariantSpec,
)

TESTS = Path(__file__).resolve().parents[1]
"""Where the fake pipeline is."""
ENDED = ("finished", "failed", "cancelled")
MakeQueue = Callable[[], JobQueue]


def variant(method: str, file: Path | None = None, bits: int | None = None) -> VariantSpec:
    return VariantSpec(method, bits, () if file is None else (("file", str(file)),))


def spec_of(*variants: VariantSpec | str, **fields: object) -> RunSpec:
    specs = tuple(variant(v) if isinstance(v, str) else v for v in variants)
    return replace(RunSpec(variants=specs), **fields)  # type: ignore[arg-type]


def until(condition: Callable[[], object], seconds: float = 30.0) -> None:
    """Wait for what has to come; how long it takes is not what is tested."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def ended(queue: JobQueue, run_id: str) -> JobView:
    until(lambda: queue.view(run_id).status in ENDED)
    return queue.view(run_id)


def untimed(view: JobView) -> JobView:
    """The view without the only part that depends on when it is asked for."""
    return replace(view, seconds_left=None)


def states(view: JobView) -> list[str]:
    return [variant.state for variant in view.variants]


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def lines(path: Path) -> int:
    """The process id that a fake variant wrote, once it is there."""
    until(path.exists)
    return int(path.read_text())
