"""Walkthrough 9: the two phases of EfficientQAT, from a measured run's losses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from quantlab.learn.records import Measured
from quantlab.results import ResultRecord

PHASES = ("block_ap", "e2e_qp")


@dataclass(frozen=True)
class Losses:
    """`blocks`: the loss of every step of Block-AP, a list a block; `whole`: that of every step of
    E2E-QP. `beside` is another method's record at the same bits, if there is one."""

    record: ResultRecord
    blocks: tuple[tuple[float, ...], ...]
    whole: tuple[float, ...]
    beside: ResultRecord | None


def losses(measured: Measured) -> Losses | None:
    """The first EfficientQAT record that has both phases; None where there is none."""
    for record in measured.records:
        if record.method == "efficientqat" and all(record.curves.get(p) for p in PHASES):
            blocks = tuple(tuple(part) for part in record.curves["block_ap"])
            whole = tuple(record.curves["e2e_qp"][0])
            beside = [r for r in measured.records if r.method == "gptq" and r.bits == record.bits]
            return Losses(record, blocks, whole, beside[0] if beside else None)
    return None


def smooth(values: Sequence[float], width: int) -> tuple[float, ...]:
    """Running mean over the last `width` values (over all so far at the start)."""
    return tuple(
        sum(values[max(0, at + 1 - width) : at + 1]) / min(width, at + 1)
        for at in range(len(values))
    )


@dataclass(frozen=True)
class Moving:
    """How many numbers each phase trains: weights, steps and zero-points of a linear."""

    weights: int
    scales: int
    zeros: int


def moving(phase: str, rows: int, columns: int, group_size: int) -> Moving:
    """What moves in a phase: Block-AP trains everything, E2E-QP the step sizes alone."""
    groups = rows * -(-columns // group_size)
    if phase == "block_ap":
        return Moving(rows * columns, groups, groups)
    return Moving(0, groups, 0)
