"""Forks: where a variant's greedy answer leaves the original's, and what it says once the
original's token is forced on it there, again and again.

A forced answer is an ordinary job of kind 'answer' whose spec has `forced` tokens, so a chain of
forks lies in the store as runs of one comparison and outlives the page.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

from quantlab.answers import first_difference
from quantlab.errors import JobError
from quantlab.runs import Run
from quantlab.types import Choice, Generation, RunSpec


@dataclass(frozen=True)
class Link:
    """One answer of a chain: its first `forced` tokens are the original's by force, those after
    them its own. `at` is the index of the first token that differs from the original's, None where
    none does; one of the two may have ended there. `run` is the run that gave it, None for the
    variant's own answer."""

    answer: Generation
    forced: int
    at: int | None
    run: Run | None = None

    @property
    def agreed(self) -> int:
        """Tokens after the forced ones that are the original's without force."""
        same = len(self.answer.tokens) if self.at is None else self.at
        return max(0, same - self.forced)


@dataclass(frozen=True)
class Chain:
    """The links in order, the variant's own answer first, and the run that shall give (or could
    not give) the next one."""

    original: Generation
    links: tuple[Link, ...]
    pending: Run | None = None

    def next_forced(self) -> tuple[int, ...] | None:
        """The tokens to force next: the original's up to and with the one it chose at the last
        fork. None where the answers part no more, or where the original ended there."""
        at = self.links[-1].at
        if at is None or at >= len(self.original.tokens):
            return None
        return self.original.tokens[: at + 1]


def chain(original: Generation, answer: Generation, runs: Iterable[Run], limit: int) -> Chain:
    """The chain of one variant's answer. `runs`: the forced answers of this variant to this prompt,
    newest first, of which those with other tokens or another `limit` (of tokens) do not count."""
    by_forced: dict[tuple[int, ...], Run] = {}
    for run in runs:
        if run.spec.max_new_tokens != limit or run.spec.prompts != (answer.prompt,):
            continue
        known = by_forced.setdefault(run.spec.forced, run)
        if _given(known) is None and _given(run) is not None:
            by_forced[run.spec.forced] = run  # A later attempt that failed takes nothing away.
    made = Chain(original, (_link(original, answer, 0, None),))
    while (wanted := made.next_forced()) is not None:
        run_of = by_forced.get(wanted)
        given = _given(run_of)
        if run_of is None or given is None:
            return dataclasses.replace(made, pending=run_of)
        link = _link(original, given, len(wanted), run_of)
        made = dataclasses.replace(made, links=(*made.links, link))
    return made


def _link(original: Generation, answer: Generation, forced: int, run: Run | None) -> Link:
    return Link(answer, forced, first_difference(answer, original), run)


def _given(run: Run | None) -> Generation | None:
    """The answer that a run gave, if it has."""
    if run is None:
        return None
    outputs = (r.outputs for r in run.records if r.status == "finished" and r.outputs)
    return next((given[0] for given in outputs), None)


def choices_at(answer: Generation, at: int) -> tuple[Choice, ...]:
    """The likeliest tokens of an answer at a place; empty where that was not kept."""
    return answer.choices[at] if at < len(answer.choices) else ()


def forcing(
    comparison: Run, round_: Run, index: int, variant: str, forced: tuple[int, ...]
) -> RunSpec:
    """What to submit (kind 'answer', the comparison as parent) so that `variant` answers prompt
    `index` of `round_` with these tokens first. Raises: JobError for a variant or a prompt that is
    not there."""
    named = [one for one in comparison.spec.variants if one.label == variant]
    if not named or not 0 <= index < len(round_.spec.prompts) or not forced:
        raise JobError(f"there is no answer of {variant} here to go on with")
    return dataclasses.replace(
        comparison.spec,
        variants=tuple(named),
        prompts=(round_.spec.prompts[index],),
        max_new_tokens=round_.spec.max_new_tokens,
        forced=forced,
    )
