"""Sides take turns, again and again: what slows the machine for a while slows all of them."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from quantlab.bench.sides import Side
from quantlab.metrics.speed import CONTEXT_TOKENS, DECODED_TOKENS, PROMPT_TOKENS

LEAST, MOST = 3, 9
"""Rounds."""
BUDGET_SECONDS = 12.0
"""After which no round begins, once there are LEAST."""
SLOW_SECONDS = 4.0
"""A side that would decode longer than this decodes a quarter of the tokens."""
PAUSE_SECONDS = 0.05
"""Between sides: OpenMP's threads and QuantLab's spin for some milliseconds after their work."""

Rates = dict[tuple[str, str], list[float]]
"""Tokens a second of every round, by (part, side)."""


@dataclass(frozen=True)
class Tokens:
    """What every side reads: `prompt` for prefill, `short` before decoding `decoded` tokens."""

    prompt: tuple[int, ...]
    short: tuple[int, ...]
    decoded: int


def draw(vocabulary: int, context: int | None, quick: bool) -> Tokens:
    """Seeded random ids; as many as the product measures with, or what fits `context`."""
    wanted = PROMPT_TOKENS // (8 if quick else 1)
    length = wanted if context is None else min(wanted, context)
    drawn = random.Random(0)
    prompt = tuple(drawn.randrange(vocabulary) for _ in range(length))
    decoded = max(1, min(DECODED_TOKENS // (8 if quick else 1), length // 2))
    return Tokens(prompt, prompt[: max(1, min(CONTEXT_TOKENS, length - decoded))], decoded)


def take_turns(
    sides: Sequence[Side], tokens: Tokens, parts: Sequence[str], quick: bool = False
) -> Rates:
    """Tokens a second of every side in every round, after a warm-up of each."""
    rates: Rates = {}
    decoded: dict[str, int] = {}
    for side in sides:
        few = min(2, tokens.decoded)
        seconds = side.decode(tokens.short, few) * tokens.decoded / few
        slow = seconds > SLOW_SECONDS
        decoded[side.name] = max(1, tokens.decoded // 4) if slow else tokens.decoded
    started = time.perf_counter()
    rounds = 0
    while rounds < (1 if quick else LEAST) or not (
        quick or rounds == MOST or time.perf_counter() - started > BUDGET_SECONDS
    ):
        for part in ("decode", "prefill"):
            for side in sides:
                if part not in parts or part not in side.parts:
                    continue
                time.sleep(PAUSE_SECONDS)
                if part == "decode":
                    count = decoded[side.name]
                    rate = count / side.decode(tokens.short, count)
                else:
                    rate = len(tokens.prompt) / side.prefill(tokens.prompt)
                rates.setdefault((part, side.name), []).append(rate)
        rounds += 1
    return rates


def compared(
    rates: Rates,
    part: str,
    side: str,
    peer: tuple[str, str] | None,
    plain: str | None,
    goal: float | None,
) -> dict[str, Any]:
    """One figure of the document: medians, the ratio of `side` to the peer (its name in the
    document, its side's name), to the unquantized engine `plain`, and the range of each."""
    ours = rates[part, side]
    entry: dict[str, Any] = {"quantlab": statistics.median(ours)}
    ranges = {"quantlab": [min(ours), max(ours)]}
    if peer is not None and (part, peer[1]) in rates:
        theirs = rates[part, peer[1]]
        entry[peer[0]] = statistics.median(theirs)
        entry["ratio"] = entry["quantlab"] / entry[peer[0]]
        entry["peer"] = peer[1]
        ranges[peer[0]] = [min(theirs), max(theirs)]
        if goal is not None:
            entry["goal"] = goal
    if plain is not None and (part, plain) in rates:
        entry["unquantized"] = statistics.median(rates[part, plain])
        entry["ratio_to_unquantized"] = entry["quantlab"] / entry["unquantized"]
    return {**entry, "range": ranges, "rounds": len(ours)}
