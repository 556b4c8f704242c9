"""Drawing a token, in torch and in C++, against exact sums; every token as often as it should."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from fractions import Fraction

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kernels import native_sample, reference

pytestmark = [pytest.mark.xdist_group("native"), pytest.mark.usefixtures("level")]

Draw = Callable[[torch.Tensor, float, float, float], int]
DRAWS: dict[str, Draw] = {"C++": native_sample.sample, "torch": reference.sample}
by_draw = pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)

numbers = st.floats(-40, 40, width=32) | st.sampled_from([0.0, -0.0, 1.0, -math.inf, 3e38, -3e38])
temperatures = st.sampled_from([5e-324, 1e-300, 1e-6, 1e30, 1.7e308]) | st.floats(0.05, 20)
shares = st.sampled_from([1.0, 0.5, 0.9, 1e-12, 1 - 2**-53]) | st.floats(1e-3, 1)
uniforms = st.sampled_from([0.0, 0.5, 1 - 2**-53]) | st.floats(0, 1, exclude_max=True)


def possible(logits: Sequence[float], temperature: float, top_p: float, uniform: float) -> set[int]:
    """The tokens that float64 may come to: sums are exact here, of weights to one unit in the last
    place. With n weights to 4 units and n sums in whatever order, an implementation's masses and
    the products with them are right to (n + 8) 2^-53; twice that, as both sides of a comparison are
    rounded, and a little for weights below the smallest normal number."""
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    top = logits[order[0]]
    scaled = [
        (logits[token] - top) / temperature if logits[token] != top else 0.0 for token in order
    ]
    mass = [Fraction(0), *itertools.accumulate(Fraction(math.exp(x)) for x in scaled)]
    slack = Fraction(2 * (len(logits) + 8), 2**53)

    def reached(wanted: Fraction, within: int) -> list[int]:
        """Where the mass may first come to `wanted`, among the first so many; or the last."""
        low, high = wanted * (1 - slack) - Fraction(1, 2**990), wanted * (1 + slack)
        return [k for k in range(within) if mass[k] <= high and low <= mass[k + 1] > mass[k]]

    kept = [len(order)]
    if top_p < 1:
        kept = [k + 1 for k in reached(Fraction(top_p) * mass[-1], len(order))]
    return {order[k] for n in kept for k in reached(Fraction(uniform) * mass[n], n)}


@by_draw
@settings(deadline=None, max_examples=150)
@given(
    some=st.lists(numbers, min_size=1, max_size=12),
    repeats=st.integers(1, 30),
    temperature=temperatures,
    top_p=shares,
    uniform=uniforms,
)
@example(some=[0.0, 0.0], repeats=40, temperature=1.0, top_p=0.5, uniform=0.5)  # ties, exactly half
@example(some=[2.0, -math.inf], repeats=1, temperature=1.0, top_p=1.0, uniform=1 - 2**-53)
@example(some=[0.0, 1.0, 2.0], repeats=100, temperature=1e30, top_p=0.9, uniform=0.99)
def test_the_token_is_the_one_up_to_which_the_mass_is_enough(
    draw: Draw, some: list[float], repeats: int, temperature: float, top_p: float, uniform: float
) -> None:
    logits = torch.tensor(some).repeat(repeats)
    if logits.max() == -math.inf:
        return
    token = draw(logits, temperature, top_p, uniform)
    assert token in possible(logits.tolist(), temperature, top_p, uniform)
    assert logits[token] > -math.inf


@by_draw
@pytest.mark.parametrize("top_p", [0.3, 0.95, 1.0])
def test_tokens_come_as_often_as_they_should(draw: Draw, top_p: float) -> None:
    """Uniform numbers at the middles of N equal steps: whole steps lie in a token's share, but for
    one at each of its ends, so it is drawn N p times to within 1."""
    logits = 3 * torch.randn(200, generator=torch.Generator().manual_seed(1))
    likely = torch.softmax(logits.double() / 1.5, 0)
    falling, order = likely.sort(descending=True)
    kept = order[: int((falling.cumsum(0) < top_p).sum()) + 1]
    wanted = torch.zeros(200, dtype=torch.float64)
    wanted[kept] = likely[kept] / likely[kept].sum()
    steps = 2000
    drawn = [draw(logits, 1.5, top_p, (step + 0.5) / steps) for step in range(steps)]
    counts = torch.bincount(torch.tensor(drawn), minlength=200)
    assert float((counts - steps * wanted).abs().max()) <= 1


@by_draw
def test_equal_tokens_have_equal_steps(draw: Draw) -> None:
    """Exactly: weights of 1, and sums without rounding. At a step's edge the next token begins."""
    logits = torch.zeros(128)
    drawn = [draw(logits, 2.0, 1.0, step / 256) for step in range(256)]
    assert drawn == [step // 2 for step in range(256)]
    drawn = [draw(logits, 2.0, 0.5, step / 128) for step in range(128)]
    assert drawn == [step // 2 for step in range(128)], "half of them are enough"


@pytest.mark.parametrize("count", [97, 49152])
def test_both_draw_the_same_tokens(count: int) -> None:
    """From the same numbers. That one of these lies within the rounding of a sum, 49,152 2^-53 of
    it, where they may differ, has a probability below 1e-9."""
    generator = torch.Generator().manual_seed(2)
    for spread, temperature, top_p in ((3, 1, 0.95), (4, 0.7, 1), (0.01, 1, 0.9), (2, 1e6, 1)):
        logits = spread * torch.randn(count, generator=generator)
        for uniform in torch.rand(4, dtype=torch.float64, generator=generator).tolist():
            tokens = {draw(logits, temperature, top_p, uniform) for draw in DRAWS.values()}
            assert len(tokens) == 1


@by_draw
@pytest.mark.parametrize("count", [1, 20, 300])
@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_without_probabilities_nothing_is_drawn(draw: Draw, count: int, wrong: float) -> None:
    """A NaN, an infinite largest logit, or none that is finite."""
    logits = torch.full((count,), wrong if wrong == -math.inf else 0.0)
    logits[count // 2] = wrong
    with pytest.raises(ValueError, match="no probabilities"):
        draw(logits, 1.0, 0.9, 0.5)


@by_draw
def test_any_layout_of_logits_is_read(draw: Draw) -> None:
    logits = torch.zeros(40, 2)
    logits[7, 1] = 50.0
    assert draw(logits[:, 1], 1.0, 1.0, 0.5) == 7
