"""Speed on a decoder whose time is known: a clock that only its calls move."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import repeat

import pytest

from quantlab.metrics.speed import Speed, measure_speed


class Clockwork:
    """Reads tokens in `prefill` seconds each and `step` seconds each, slowed by `noise`."""

    def __init__(self, prefill: float, step: float, noise: Iterator[float] | None = None) -> None:
        self.now = 0.0
        self.prompts: list[int] = []
        self.position = self.longest = self.steps = 0
        self._prefill, self._step = prefill, step
        self._noise = noise or repeat(1.0)

    def clock(self) -> float:
        return self.now

    def prefill(self, ids: Sequence[int]) -> int:
        assert all(0 <= token < 100 for token in ids)
        self.now += self._prefill * len(ids) * next(self._noise)
        self.prompts.append(len(ids))
        self.position = len(ids)
        self.longest = max(self.longest, self.position)
        return 1

    def step(self, token: int) -> int:
        assert 0 <= token < 100
        self.now += self._step
        self.steps += 1
        self.position += 1
        self.longest = max(self.longest, self.position)
        return (token + 1) % 100


def measure(decoder: Clockwork, context: int | None = None) -> Speed:
    return measure_speed(decoder, 100, context, clock=decoder.clock)


def test_known_speeds_come_out() -> None:
    decoder = Clockwork(prefill=0.001, step=0.02)
    speed = measure(decoder)
    assert speed.prefill_tokens_per_second == pytest.approx(1000)
    assert speed.decode_tokens_per_second == pytest.approx(50)
    assert speed.time_to_first_token_seconds == pytest.approx(0.064)
    # Three rounds and a warm-up before them.
    assert decoder.prompts.count(512) == 4
    assert decoder.steps >= 3 * 32 + 2
    assert decoder.longest == 512


def test_one_disturbed_round_does_not_count() -> None:
    # warm-up: short, short, long; then long and short of each round, the second disturbed
    noise = iter([9.0, 1.0, 9.0, 1.0, 1.0, 5.0, 5.0, 1.0, 1.0])
    speed = measure(Clockwork(prefill=0.0001, step=0.001, noise=noise))
    assert speed.prefill_tokens_per_second == pytest.approx(10_000)
    assert speed.time_to_first_token_seconds == pytest.approx(0.0064)


@pytest.mark.parametrize("context", [1, 2, 3, 40, 96, 100, 512, 4096])
def test_short_contexts_are_respected(context: int) -> None:
    decoder = Clockwork(prefill=0.001, step=0.02)
    speed = measure(decoder, context)
    assert decoder.longest <= max(context, 2)
    assert max(decoder.prompts) == min(context, 512)
    assert speed.prefill_tokens_per_second == pytest.approx(1000)
    assert speed.decode_tokens_per_second == pytest.approx(50)


@pytest.mark.parametrize("slowness", [1, 3, 10, 30])
def test_time_is_bounded(slowness: int) -> None:
    """About ten seconds, or one round where even that takes longer."""
    decoder = Clockwork(prefill=0.001 * slowness, step=0.02 * slowness)
    speed = measure(decoder)
    one_round = (512 + 64) * 0.001 * slowness + 32 * 0.02 * slowness
    warm_up = 2 * 64 * 0.001 * slowness + 2 * 0.02 * slowness
    assert decoder.now <= max(10.0, one_round + warm_up) + 2.5
    assert speed.decode_tokens_per_second == pytest.approx(50 / slowness)
