"""Where the time of one quantization goes, without a line about it in the product."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from quantlab import blockwise, calibration, variants
from quantlab.export import gguf, quantlab_format
from quantlab.export.spool import Spool
from quantlab.methods.base import Quantizer
from quantlab.models import LoadedModel

LOADING, READING, FORWARDS, STATISTICS, SOLVING, KEEPING, WRITING, OTHER = (
    "loading",
    "reading blocks",
    "calibration forwards",
    "statistics",
    "solving and packing",
    "writing blocks",
    "writing",
    "other",
)


class Phases:
    """Seconds by phase. A phase inside another one is not counted twice: the outer one pauses."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inner = [0.0]

    def timed(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, its exclusive seconds added to `phase`."""

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            self._inner.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                whole = time.perf_counter() - started
                own = whole - self._inner.pop()
                self._inner[-1] += whole
                self.seconds[phase] = self.seconds.get(phase, 0.0) + own

        return run


@contextmanager
def watching(method: Quantizer) -> Iterator[Phases]:
    """Time the steps of `prepare_variant` while the context is open."""
    phases = Phases()
    runner, sums = calibration.BlockRunner, calibration.Accumulator
    places: list[tuple[Any, str, str]] = [
        (variants, "_load", LOADING),
        (LoadedModel, "fetch", READING),
        (Spool, "keep", KEEPING),
        (runner, "__init__", FORWARDS),
        (runner, "collect", FORWARDS),
        (runner, "advance", FORWARDS),
        (blockwise, "advance_in_lockstep", FORWARDS),
        (blockwise, "install", SOLVING),
        (sums, "add", STATISTICS),
        (sums, "result", STATISTICS),
        (type(method), "quantize_block", SOLVING),
        (type(method), "quantize_outer", SOLVING),
        (quantlab_format, "save", WRITING),
        (gguf, "write", WRITING),
    ]
    kept = [(owner, name, vars(owner).get(name)) for owner, name, _ in places]
    for owner, name, phase in places:
        setattr(owner, name, phases.timed(phase, getattr(owner, name)))
    try:
        yield phases
    finally:
        for owner, name, original in kept:
            if original is None:  # inherited: the wrapper alone stood on this class
                delattr(owner, name)
            else:
                setattr(owner, name, original)
