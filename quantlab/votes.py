"""Blind votes: which of two answers is better, not knowing whose they are, and what votes prove."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

from quantlab.results import ResultRecord


@dataclass(frozen=True, slots=True)
class Trial:
    """Two answers to one prompt, `left` and `right` the variants that gave them."""

    prompt: str
    left: str
    right: str
    left_text: str
    right_text: str

    @property
    def pair(self) -> tuple[str, str, str]:
        """What is compared, whichever side it stands on."""
        first, second = sorted((self.left, self.right))
        return self.prompt, first, second


@dataclass(frozen=True, slots=True)
class Vote:
    """A judged trial; `winner` is one of the two variants, None for a tie."""

    prompt: str
    left: str
    right: str
    winner: str | None


@dataclass(frozen=True, slots=True)
class Tally:
    """All votes on one pair of variants. `p_value`: see `binomial_p`."""

    first: str
    second: str
    first_wins: int
    second_wins: int
    ties: int

    @property
    def p_value(self) -> float:
        return binomial_p(self.first_wins, self.second_wins)


def trials(records: Iterable[ResultRecord], originals: Sequence[str]) -> list[Trial]:
    """Every pair of answers worth asking about: the original's (`originals` names variants that
    are not quantized) and a quantized variant's to the same prompt, where they differ; without an
    original, any two.

    Answers are paired within one round of records, in which each variant answered once.
    """
    by_prompt: dict[str, dict[str, str]] = {}
    for record in records:
        if record.status == "finished":
            for output in record.outputs:
                by_prompt.setdefault(output.prompt, {})[record.variant] = output.text.strip()
    found = []
    for prompt, answers in by_prompt.items():
        known = [name for name in answers if name in originals]
        for one, other in combinations(sorted(answers), 2):
            wanted = not known or (one in known) != (other in known)
            if wanted and answers[one] != answers[other]:
                found.append(Trial(prompt, one, other, answers[one], answers[other]))
    return found


def draw(candidates: Sequence[Trial], votes: Sequence[Vote], rng: random.Random) -> Trial | None:
    """One of the least judged trials, and which answer stands left, both by chance."""
    judged: dict[tuple[str, str, str], int] = {}
    for vote in votes:
        pair = Trial(vote.prompt, vote.left, vote.right, "", "").pair
        judged[pair] = judged.get(pair, 0) + 1
    least = min((judged.get(trial.pair, 0) for trial in candidates), default=0)
    open_ones = [trial for trial in candidates if judged.get(trial.pair, 0) == least]
    if not open_ones:
        return None
    trial = rng.choice(open_ones)
    if rng.random() < 0.5:
        return trial
    return Trial(trial.prompt, trial.right, trial.left, trial.right_text, trial.left_text)


def tally(votes: Iterable[Vote], originals: Sequence[str] = ()) -> list[Tally]:
    """Votes counted by pair, the original first in its pair; pairs in the order they were met."""
    counts: dict[tuple[str, str], list[int]] = {}
    for vote in votes:
        first, second = sorted((vote.left, vote.right), key=lambda v: (v not in originals, v))
        row = counts.setdefault((first, second), [0, 0, 0])
        row[2 if vote.winner is None else int(vote.winner == second)] += 1
    return [Tally(*pair, *row) for pair, row in counts.items()]


def binomial_p(wins: int, losses: int) -> float:
    """Two-sided exact binomial test of `wins` among `wins + losses` against chance 1/2.

    The probability, were both answers equally good, of a split at least as uneven:
    min(1, 2 * sum_(k <= min(wins, losses)) C(n, k) / 2^n). Ties are left out beforehand; 1 where
    nothing was decided.
    """
    total = wins + losses
    tail = sum(math.comb(total, k) for k in range(min(wins, losses) + 1))
    return min(1.0, 2 * tail / 2**total)
