"""Turns the stages of many variants into one fraction that only grows."""

from __future__ import annotations

import dataclasses

from quantlab.types import Emit, Event, Progress

SHARES = {
    "load": (0.0, 0.02),
    "plan": (0.02, 0.30),
    "quantize": (0.02, 0.55),
    "block_ap": (0.02, 0.40),
    "e2e_qp": (0.42, 0.48),
    "qat": (0.02, 0.88),
    "perplexity": (0.57, 0.28),
    "speed": (0.85, 0.05),
    "answers": (0.90, 0.10),
}
"""(start, length) of each stage within a variant's share of the run. Training (`block_ap`,
`e2e_qp`, `qat`) takes nearly all of its variant's time; what follows moves the fraction little."""

PREPARATION = 0.05
"""Share of the run for what comes before the first variant."""


class Meter:
    """An `Emit` that fills in `Progress.fraction` for variant `index` of `count`."""

    def __init__(self, emit: Emit, count: int) -> None:
        self._emit, self._count = emit, max(count, 1)
        self.index = 0
        self._highest = 0.0

    def __call__(self, event: Event) -> None:
        if isinstance(event, Progress):
            self._highest = max(self._highest, self._fraction(event))
            event = dataclasses.replace(event, fraction=self._highest)
        self._emit(event)

    def _fraction(self, event: Progress) -> float:
        within = event.done / max(event.total, 1)
        if event.stage not in SHARES:
            return PREPARATION * within
        start, length = SHARES[event.stage]
        share = (self.index + start + length * within) / self._count
        return PREPARATION + (1 - PREPARATION) * share
