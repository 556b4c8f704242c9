"""What the numbers allow to be said, in sentences: no winner without evidence.

Two variants are compared by the paired bootstrap interval of their difference over the evaluation
segments. Where it covers zero they are indistinguishable on this text, and the sentence says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from quantlab.metrics.intervals import paired_interval
from quantlab.plots import numbers, palette
from quantlab.plots.figures import finished
from quantlab.plots.words import Words, words
from quantlab.results import ResultRecord

Measure = Literal["nll", "kl"]


@dataclass(frozen=True)
class Difference:
    """The mean of `a - b` over the segments, with its 95% interval."""

    mean: float
    low: float
    high: float

    @property
    def clear(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.low > 0 or self.high < 0


def difference(a: ResultRecord, b: ResultRecord, measure: Measure) -> Difference | None:
    """Paired difference of two records; None where they were not measured on the same segments."""
    first, second = a.segments.get(measure), b.segments.get(measure)
    if not first or not second or len(first) != len(second) or len(first) < 2:
        return None
    return _paired(tuple(first), tuple(second))


@lru_cache(maxsize=1024)
def _paired(first: tuple[float, ...], second: tuple[float, ...]) -> Difference:
    """The page asks for the same pairs twice a second."""
    return Difference(*paired_interval(first, second))


def quantized(records: Sequence[ResultRecord]) -> list[ResultRecord]:
    return [r for r in finished(records) if not palette.is_reference(r)]


def original(records: Sequence[ResultRecord]) -> ResultRecord | None:
    """The unquantized record the others are measured against."""
    return next((r for r in finished(records) if palette.is_reference(r)), None)


def best(records: Sequence[ResultRecord], measure: Measure) -> ResultRecord | None:
    """The quantized record that is clearly below every other one; None where none is."""
    candidates = [r for r in quantized(records) if r.segments.get(measure)]
    if len(candidates) < 2:
        return None
    leader = min(candidates, key=lambda r: _mean(r, measure))
    for other in candidates:
        if other is leader:
            continue
        gap = difference(leader, other, measure)
        if gap is None or gap.high >= 0:
            return None
    return leader


def sentences(records: Sequence[ResultRecord], language: str | None = None) -> list[str]:
    """The verdict as plain sentences, most telling first; empty while nothing can be compared.

    Variants are ranked among those with the same nominal bits, since more bits keep more; then
    each is held against the original.
    """
    say = words(language)
    measured = [r for r in quantized(records) if r.kl_divergence is not None]
    said = []
    for bits in sorted({r.bits for r in measured}):
        group = [r for r in measured if r.bits == bits]
        if len(group) > 1:
            said.append(_rank(group, bits, say))
    reference = original(records)
    if reference is not None:
        said += _against(reference, quantized(records), say)
    if not said and len(measured) == 1:
        said.append(say("verdict_one", name=palette.short(measured[0]), kl=_kl(measured[0])))
    return said


def _rank(group: list[ResultRecord], bits: int, say: Words) -> str:
    """Who keeps the most at these bits, or that nobody can be told apart."""
    leader = min(group, key=lambda r: r.kl_divergence or 0.0)
    rest = sorted((r for r in group if r is not leader), key=lambda r: r.kl_divergence or 0.0)
    gaps = {r.variant: difference(leader, r, "kl") for r in rest}
    if any(gap is None for gap in gaps.values()):
        return say("verdict_unpaired", bits=bits)
    tied = [r for r in rest if (gap := gaps[r.variant]) is not None and gap.high >= 0]
    behind = [r for r in rest if r not in tied]
    name, kl = palette.short(leader), _kl(leader)
    if not behind:
        names = _listed([leader, *tied], say)
        return say("verdict_tied", bits=bits, names=names)
    if tied:
        return say(
            "verdict_leads_some",
            bits=bits,
            name=name,
            kl=kl,
            tied=_listed(tied, say),
            behind=_listed(behind, say),
        )
    return say("verdict_leads", bits=bits, name=name, kl=kl, behind=_listed(behind, say, True))


def _against(reference: ResultRecord, others: Sequence[ResultRecord], say: Words) -> list[str]:
    """Which variants the perplexity can tell from the original, and which it cannot."""
    gaps = [(r, difference(r, reference, "nll")) for r in others]
    same = [r for r, gap in gaps if gap is not None and not gap.clear]
    worse = [r for r, gap in gaps if gap is not None and gap.low > 0]
    better = [r for r, gap in gaps if gap is not None and gap.high < 0]
    said = []
    if same:
        said.append(say("verdict_same", names=_listed(same, say)))
    if len(worse) == len(others) > 1:
        said.append(say("verdict_all_worse"))
    elif worse:
        said.append(say("verdict_worse", names=_listed(worse, say)))
    if better:
        said.append(say("verdict_better", names=_listed(better, say)))
    return said


def _kl(record: ResultRecord) -> str:
    text = numbers.divergence(record.kl_divergence)
    return f"{text} {numbers.plus_minus(record.kl_divergence_ci, text)}".strip()


def _listed(records: Sequence[ResultRecord], say: Words, with_kl: bool = False) -> str:
    """Names joined as the language joins them, each with its divergence where asked."""
    names = [
        f"{palette.short(r)} ({numbers.divergence(r.kl_divergence)})"
        if with_kl
        else palette.short(r)
        for r in records
    ]
    if len(names) == 1:
        return names[0]
    return say("list_join").join(names[:-1]) + say("list_last") + names[-1]


def _mean(record: ResultRecord, measure: Measure) -> float:
    values = record.segments[measure]
    return sum(values) / len(values)
