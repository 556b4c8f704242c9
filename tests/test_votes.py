"""Blind votes: pairs, the draw, the tally, and the binomial test against counting every outcome."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from fractions import Fraction

import pytest

from quantlab.types import Generation
from quantlab.ui import blind
from quantlab.ui.client import Client
from quantlab.votes import Tally, Trial, Vote, binomial_p, draw, tally, trials
from tests.records import failed, record

ORIGINALS = ["bf16"]


@pytest.mark.parametrize("wins", range(7))
@pytest.mark.parametrize("losses", range(7))
def test_the_p_value_counts_outcomes(wins: int, losses: int) -> None:
    """Of all sequences of fair coins, those at least as uneven as the one seen."""
    total = wins + losses
    uneven = [
        abs(2 * sum(coins) - total) >= abs(wins - losses)
        for coins in itertools.product((0, 1), repeat=total)
    ]
    assert binomial_p(wins, losses) == pytest.approx(float(Fraction(sum(uneven), len(uneven))))


def test_known_p_values() -> None:
    assert binomial_p(5, 0) == pytest.approx(0.0625)
    assert binomial_p(6, 0) == pytest.approx(0.03125)
    assert binomial_p(0, 0) == binomial_p(7, 7) == 1
    assert binomial_p(60, 40) == pytest.approx(0.0568879, rel=1e-5)  # R: binom.test(60, 100)


def said(prompt: str, text: str) -> Generation:
    return Generation(prompt, text, (1,), (text,))


def test_pairs_are_the_original_against_what_differs() -> None:
    records = [
        record("bf16", outputs=(said("one", " a"), said("two", "b"))),
        record("rtn:4", outputs=(said("one", "c"), said("two", "b "))),
        record("gptq:4", outputs=(said("one", "d"),)),
        failed("awq:4"),
    ]
    found = {trial.pair for trial in trials(records, ORIGINALS)}
    assert found == {("one", "bf16", "rtn:4"), ("one", "bf16", "gptq:4")}
    # Without an original every two are a pair.
    assert [t.pair for t in trials(records[1:], ORIGINALS)] == [("one", "gptq:4", "rtn:4")]
    (trial,) = trials(records[1:], ORIGINALS)
    assert (trial.left_text, trial.right_text) == ("d", "c")


def test_the_draw_is_fair_and_asks_what_was_asked_least() -> None:
    one, two = Trial("p", "bf16", "rtn:4", "a", "b"), Trial("q", "bf16", "rtn:4", "c", "d")
    rng = random.Random(0)
    drawn = Counter(draw([one, two], [], rng) for _ in range(4000))
    flipped = {Trial("p", "rtn:4", "bf16", "b", "a"), Trial("q", "rtn:4", "bf16", "d", "c")}
    assert set(drawn) == {one, two} | flipped
    # 1000 of each are expected; 6 standard deviations of a binomial(4000, 1/4) are 164.
    assert all(abs(count - 1000) < 164 for count in drawn.values())
    voted = [Vote("p", "rtn:4", "bf16", None)]
    assert {draw([one, two], voted, rng).prompt for _ in range(50)} == {"q"}  # type: ignore[union-attr]
    assert draw([], voted, rng) is None


def test_the_tally_by_hand() -> None:
    votes = [
        Vote("p", "rtn:4", "bf16", "bf16"),
        Vote("q", "bf16", "rtn:4", "rtn:4"),
        Vote("q", "bf16", "rtn:4", None),
        Vote("r", "bf16", "rtn:4", "bf16"),
        Vote("r", "awq:4", "bf16", "awq:4"),
    ]
    assert tally(votes, ORIGINALS) == [
        Tally("bf16", "rtn:4", 2, 1, 1),
        Tally("bf16", "awq:4", 0, 1, 0),
    ]
    assert tally(votes, ORIGINALS)[0].p_value == binomial_p(2, 1) == 1


@pytest.mark.parametrize("language", ["en", "ja"])
def test_names_come_after_the_vote_and_nothing_runs(language: str) -> None:
    hostile = "<script>alert(1)</script><img src=x onerror=alert(1)>"
    trial = Trial(hostile, "bf16", "gptq:4:group_size=32", hostile, "second")
    client = Client(language)
    before = blind.page(client, trial=trial)
    for word in ("bf16", "BF16", "gptq", "GPTQ", "--method"):
        assert word not in before
    after = blind.page(
        client, trial=trial, choice="right", counted=[Tally("bf16", "gptq:4", 5, 0, 1)]
    )
    assert "BF16" in after
    assert "GPTQ 4-bit (group_size=32)" in after
    assert "0.062" in after
    for page in (before, after):
        assert "<script" not in page
        assert "<img" not in page
        assert page.count("&lt;script&gt;") == 2
