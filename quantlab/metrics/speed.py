"""Prefill and decode speed of anything that reads tokens one after the other."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

PROMPT_TOKENS = 512
CONTEXT_TOKENS = 64
DECODED_TOKENS = 32
REPEATS = 3
BUDGET_SECONDS = 10.0


class Decoder(Protocol):
    """Greedy decoding; both methods return only when the next token's id is known."""

    def prefill(self, ids: Sequence[int]) -> int:
        """Start over with a prompt; the id of the next token."""
        ...

    def step(self, token: int) -> int:
        """Read one more token; the id of the next one."""
        ...


@dataclass(frozen=True)
class Speed:
    """Medians over the repeats, wall clock, batch of one.

    `prefill_tokens_per_second`: reading a prompt of 512 tokens, its next token included;
    `decode_tokens_per_second`: 32 further tokens, one by one, after a prompt of 64;
    `time_to_first_token_seconds`: from that prompt of 64 tokens to its next token.
    Models with a shorter context are measured with what fits.
    """

    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    time_to_first_token_seconds: float


def measure_speed(
    decoder: Decoder,
    vocabulary: int,
    context: int | None = None,
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> Speed:
    """Measure `decoder` on seeded random token ids below `vocabulary`.

    `context` is the most tokens it can read. After a warm-up, prompt and decoding are measured in
    turn, three times, or as often as about ten seconds allow, at least once.
    """
    limit = PROMPT_TOKENS if context is None else min(PROMPT_TOKENS, context)
    draw = random.Random(0)
    prompt = [draw.randrange(vocabulary) for _ in range(limit)]
    decoded = max(1, min(DECODED_TOKENS, limit // 2))
    short = prompt[: max(1, min(CONTEXT_TOKENS, limit - decoded))]

    def prefill(ids: Sequence[int]) -> float:
        start = clock()
        decoder.prefill(ids)
        return clock() - start

    def decode(tokens: int) -> tuple[float, float]:
        """Seconds to the first token of the short prompt, and for `tokens` after it."""
        start = clock()
        token = decoder.prefill(short)
        first = clock()
        for _ in range(tokens):
            token = decoder.step(token)
        return first - start, clock() - first

    began = clock()
    decode(min(2, decoded))
    if prefill(short) * len(prompt) / len(short) < BUDGET_SECONDS / 4:
        prefill(prompt)
    rounds: list[tuple[float, float, float]] = []
    while len(rounds) < REPEATS:
        started = clock()
        rounds.append((prefill(prompt), *decode(decoded)))
        ended = clock()
        if ended - began + (ended - started) > BUDGET_SECONDS:
            break
    prefilled, first, decoding = (statistics.median(column) for column in zip(*rounds, strict=True))
    return Speed(len(prompt) / prefilled, decoded / decoding, first)
