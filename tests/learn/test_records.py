"""Records that ship, the quiz's scores, and the losses of training."""

from __future__ import annotations

from itertools import permutations

import pytest

from quantlab.errors import ConfigError
from quantlab.learn import quiz, records, training
from quantlab.learn.records import Measured
from quantlab.results import ResultRecord


def record(variant: str, kl: float, half: float = 0.01, bits: int = 4) -> ResultRecord:
    return ResultRecord(
        variant,
        variant.split(":")[0],
        bits,
        {},
        "finished",
        kl_divergence=kl,
        kl_divergence_ci=(kl - half, kl + half),
    )


def measured(*found: ResultRecord) -> Measured:
    return records.of(found, {"cpu": "a", "date": "2026-01-02T03:04:05"})


def test_what_ships_says_where_it_was_measured() -> None:
    for one in records.shipped():
        assert one.shipped
        assert one.machine
        assert one.date.startswith("20")
        assert all(r.status == "finished" and r.perplexity for r in one.records)
    assert records.SHIPPED.stat().st_size < 100_000
    assert quiz.playable(records.shipped()[0])
    assert training.losses(records.shipped()[1]) is not None


def test_failed_records_do_not_count() -> None:
    failed = ResultRecord("awq:4", "awq", 4, {}, "failed")
    found = measured(record("rtn:4", 0.3), failed)
    assert [r.variant for r in found.records] == ["rtn:4"]
    assert (found.machine, found.date, found.shipped) == ("a", "2026-01-02", False)
    assert not quiz.playable(found)


def test_scores_count_pairs_that_can_be_told_apart() -> None:
    found = measured(
        record("a:4", 0.10), record("b:4", 0.105), record("c:4", 0.3), record("bf16", 0.0, bits=16)
    )
    assert [r.variant for r in quiz.ranking(found)] == ["a:4", "b:4", "c:4"]
    for guess in permutations(["a:4", "b:4", "c:4"]):
        right = sum(guess.index(one) < guess.index("c:4") for one in ("a:4", "b:4"))
        assert quiz.score(found, guess) == quiz.Score(right, 2, 1)


@pytest.mark.parametrize("guess", [["a:4"], ["a:4", "a:4", "b:4"], ["a:4", "b:4", "<b>"]])
def test_a_guess_names_every_variant_once(guess: list[str]) -> None:
    found = measured(record("a:4", 0.1), record("b:4", 0.2), record("c:4", 0.3))
    with pytest.raises(ConfigError, match="every variant once"):
        quiz.score(found, guess)


def test_moving_in_the_order() -> None:
    assert quiz.moved(["a", "b", "c"], "c", -1) == ["a", "c", "b"]
    assert quiz.moved(["a", "b", "c"], "a", -1) == ["a", "b", "c"]
    assert quiz.moved(["a", "b", "c"], "c", 1) == ["a", "b", "c"]
    assert quiz.moved(["a", "b"], "nobody", 1) == ["a", "b"]


def test_losses_come_from_the_record() -> None:
    base = record("efficientqat:2", 0.7, bits=2)
    curves = {"block_ap": [[3.0, 1.0], [4.0, 2.0]], "e2e_qp": [[0.5, 0.25]]}
    trained = ResultRecord(**{**vars(base), "curves": curves})
    found = training.losses(measured(record("gptq:4", 0.1), record("gptq:2", 2.0, bits=2), trained))
    assert found is not None
    assert found.blocks == ((3.0, 1.0), (4.0, 2.0))
    assert found.whole == (0.5, 0.25)
    assert found.beside is not None
    assert found.beside.variant == "gptq:2"
    assert training.losses(measured(base)) is None


def test_running_means() -> None:
    assert training.smooth([1.0, 3.0, 5.0, 7.0], 2) == (1.0, 2.0, 4.0, 6.0)
    assert training.smooth([2.0, 4.0], 9) == (2.0, 3.0)


def test_what_moves_in_each_phase() -> None:
    first, second = (training.moving(phase, 10, 100, 64) for phase in training.PHASES)
    assert (first.weights, first.scales, first.zeros) == (1000, 20, 20)  # the last group is ragged
    assert (second.weights, second.scales, second.zeros) == (0, 20, 0)
