"""Walkthrough 10: predict the ranking, then see the measured one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from quantlab.errors import ConfigError
from quantlab.learn.records import Measured
from quantlab.results import ResultRecord

MOST, FEWEST = 6, 3


def candidates(measured: Measured) -> tuple[ResultRecord, ...]:
    """Quantized variants with a measured KL divergence, at most `MOST`, by their name."""
    found = [
        record
        for record in measured.records
        if record.kl_divergence is not None and record.bits < 16
    ]
    return tuple(sorted(found[:MOST], key=lambda record: record.variant))


def playable(measured: Measured) -> bool:
    """Whether there is enough to rank."""
    return len(candidates(measured)) >= FEWEST


def ranking(measured: Measured) -> tuple[ResultRecord, ...]:
    """The candidates, the least KL divergence to the original first."""
    return tuple(sorted(candidates(measured), key=lambda r: (r.kl_divergence or 0.0, r.variant)))


@dataclass(frozen=True)
class Score:
    """Of `pairs` pairs, how many were put in the measured order, not counting the `open` ones whose
    intervals overlap: those nobody can get wrong."""

    right: int
    pairs: int
    open: int


def score(measured: Measured, guess: Sequence[str]) -> Score:
    """Compare a guessed order (variant names, best first) with the measured one.

    Raises: ConfigError unless the guess names every candidate once."""
    records = {record.variant: record for record in candidates(measured)}
    if sorted(guess) != sorted(records):
        raise ConfigError("ranking: name every variant once")
    right = pairs = undecided = 0
    for place, better in enumerate(guess):
        for worse in guess[place + 1 :]:
            first, second = records[better], records[worse]
            if overlap(first, second):
                undecided += 1
                continue
            pairs += 1
            right += (first.kl_divergence or 0.0) < (second.kl_divergence or 0.0)
    return Score(right, pairs, undecided)


def overlap(one: ResultRecord, other: ResultRecord) -> bool:
    """Whether the 95% intervals of the two share a point; without intervals, whether equal."""
    if one.kl_divergence_ci is None or other.kl_divergence_ci is None:
        return one.kl_divergence == other.kl_divergence
    return (
        one.kl_divergence_ci[0] <= other.kl_divergence_ci[1]
        and other.kl_divergence_ci[0] <= one.kl_divergence_ci[1]
    )


def moved(order: Sequence[str], name: str, by: int) -> list[str]:
    """The order with one name moved by so many places, within its ends."""
    if name not in order:
        return list(order)
    rest = [other for other in order if other != name]
    place = min(max(order.index(name) + by, 0), len(rest))
    return [*rest[:place], name, *rest[place:]]
