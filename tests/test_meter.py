"""The fraction of a run: from 0 to 1, never back, whatever the stages do."""

from __future__ import annotations

import itertools

import pytest

from quantlab.meter import PREPARATION, SHARES, Meter
from quantlab.types import Event, Notice, Progress

WALKS = {
    "rounding": ("load", "quantize", "perplexity", "speed", "answers"),
    "planned": ("load", "plan"),
    "EfficientQAT": ("load", "block_ap", "e2e_qp"),
    "QAT": ("load", "qat"),
}


def test_every_stage_is_in_a_walk() -> None:
    assert {stage for walk in WALKS.values() for stage in walk} == SHARES.keys()


@pytest.mark.parametrize("walk", WALKS)
def test_shares_lie_one_after_the_other(walk: str) -> None:
    end = 0.0
    for stage in WALKS[walk]:
        start, length = SHARES[stage]
        assert start == pytest.approx(end)
        end = start + length
    assert end == pytest.approx(1.0) if walk == "rounding" else end < 1.0


@pytest.mark.parametrize("count", [1, 3])
def test_the_fraction_only_grows(count: int) -> None:
    events: list[Event] = []
    meter = Meter(events.append, count)
    for done in range(3):
        meter(Progress("original", "reference", done, 2, 0.0))
    for meter.index in range(count):
        for stage in SHARES:
            for done in range(6):
                meter(Progress("rtn:4", stage, done, 5, 0.0))
    fractions = [event.fraction for event in events if isinstance(event, Progress)]
    for before, after in itertools.pairwise(fractions):
        assert after >= before - 1e-12
    assert fractions[0] == 0
    assert fractions[2] == pytest.approx(PREPARATION)
    assert fractions[-1] == pytest.approx(1.0)


def test_other_events_pass_as_they_are() -> None:
    events: list[Event] = []
    meter = Meter(events.append, 0)
    notice = Notice("a fallback")
    meter(notice)
    meter(Progress("", "quantize", 0, 0, 0.0))
    assert events[0] is notice
    assert isinstance(events[1], Progress)
    assert 0 <= events[1].fraction <= 1
