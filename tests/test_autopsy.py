"""The failure autopsy: each failure planted by hand is named once; healthy runs say nothing."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantlab.packing.affine import Activation, AffineWeight, static_inputs
from quantlab.plots import autopsy
from quantlab.plots.words import translations, words
from quantlab.results import NOTHING_FINITE, ResultRecord
from quantlab.types import Generation
from tests.records import failed, record


def said(tokens: tuple[int, ...], prompt: str = "Why?", word: str = "w") -> Generation:
    return Generation(prompt, word * len(tokens), tokens, (word,) * len(tokens))


def kinds(*records: ResultRecord) -> list[tuple[str, str, str | None]]:
    return [(one.variant, one.kind, one.layer) for one in autopsy.findings(records)]


VARIED = tuple(range(100, 130))
BF16 = record("bf16", outputs=(said(VARIED),))


def test_a_healthy_run_has_no_findings() -> None:
    healthy = record(
        "gptq:4",
        perplexity=33.0,
        outputs=(said(VARIED[::-1]),),
        environment={"calibration": {"tokens": 1536, "widest_input": 1536}},
        details={"static_inputs": {"layer": "a", "step": 1.0, "median": 0.5}},
    )
    assert kinds(BF16, healthy, failed("awq:4", "out of memory")) == []
    assert autopsy.box([BF16, healthy]) == ""


@pytest.mark.parametrize(
    ("tokens", "found"),
    [
        ((), None),
        (VARIED, None),
        ((7,) * 12, (1, 12)),
        ((7,) * 11, None),  # Too short to be sure.
        ((*VARIED, *(1, 2, 3, 4) * 3), (4, 3)),
        ((*VARIED, *(1, 2, 3, 4) * 2), None),
        ((*VARIED, *(1, 2, 3, 4) * 5, 1, 2), (4, 5)),  # Cut off in the middle of a block.
        ((*(1, 2, 3, 4) * 5, *VARIED), None),  # It came out of the loop again.
        (tuple(range(16)) * 3, (16, 3)),
        (tuple(range(17)) * 3, None),
    ],
)
def test_loops_by_hand(tokens: tuple[int, ...], found: tuple[int, int] | None) -> None:
    assert autopsy.loop(tokens) == found


@given(st.lists(st.integers(0, 2), max_size=60))
def test_a_loop_is_one(tokens: list[int]) -> None:
    """Against the definition: the shortest block whose repetition the tokens end in."""
    wanted = None
    for period in range(1, 17):
        times = 0
        block = tokens[len(tokens) - period :] if period <= len(tokens) else None
        while block and tokens[: len(tokens) - times * period][-period:] == block:
            times += 1
        if times >= 3 and times * period >= 12:
            wanted = period, times
            break
    assert autopsy.loop(tokens) == wanted


def test_repetition_is_blamed_only_where_the_original_does_not_repeat() -> None:
    looping = record("rtn:2", outputs=(said((7,) * 20),))
    assert kinds(BF16, looping) == [("rtn:2", "repeats", None)]
    assert kinds(record("bf16", outputs=(said((8,) * 20),)), looping) == []
    assert kinds(looping) == [("rtn:2", "repeats", None)]  # Nothing to compare with.
    other = record("rtn:2", outputs=(said((7,) * 20, prompt="Unasked?"),))
    assert kinds(BF16, other) == []


def test_nan_and_exploding_perplexity() -> None:
    nan = failed("rtn:2", f"{NOTHING_FINITE}: its perplexity is not a number")
    assert kinds(BF16, nan) == [("rtn:2", "not_finite", None)]
    infinite = record("rtn:2", perplexity=math.inf)
    assert kinds(BF16, infinite) == [("rtn:2", "not_finite", None)]
    for perplexity, found in ((60.0, True), (59.9, False)):  # The original has 30.
        told = kinds(BF16, record("rtn:2", perplexity=perplexity))
        assert told == [("rtn:2", "exploded", None)] * found
    assert kinds(record("rtn:2", perplexity=1e9)) == []


@pytest.mark.parametrize(("tokens", "found"), [(1535, True), (1536, False)])
def test_calibration_needs_as_many_tokens_as_channels(tokens: int, found: bool) -> None:
    read = {"tokens": tokens, "widest_input": 1536, "widest_layer": "mlp.down_proj"}
    one = record("gptq:4", environment={"calibration": read})
    assert kinds(BF16, one) == [("gptq:4", "little_calibration", "mlp.down_proj")] * found


@pytest.mark.parametrize(
    ("step", "perplexity", "found"), [(30.0, 40.0, True), (29.0, 40.0, False), (300.0, 31.0, False)]
)
def test_an_activation_scale_of_an_outlier(step: float, perplexity: float, found: bool) -> None:
    """Blamed where the step is far above the median and quality suffered."""
    details = {"static_inputs": {"layer": "blocks.1.down", "step": step, "median": 1.0}}
    one = record("static_int8:8", perplexity=perplexity, details=details)
    assert kinds(BF16, one) == [("static_int8:8", "stretched", "blocks.1.down")] * found


def weight(activation: Activation | None) -> AffineWeight:
    codes = torch.zeros(2, 4, dtype=torch.uint8)
    made = AffineWeight(codes, torch.ones(2, 1), None, 8, 4, 4)
    return dataclasses.replace(made, activation=activation)


def test_static_inputs_by_hand() -> None:
    packed: dict[str, Any] = {
        "a": weight(Activation("tensor", 0.5)),
        "b": weight(Activation("tensor", 24.0)),
        "c": weight(Activation("tensor", 0.25)),
        "d": weight(Activation("token")),
        "e": weight(None),
    }
    found = static_inputs(packed)
    assert found == {"static_inputs": {"layer": "b", "step": 24.0, "median": 0.5}}
    assert static_inputs({"d": packed["d"], "e": packed["e"]}) == {}


@pytest.mark.parametrize("language", ["en", "ja"])
def test_every_finding_has_words_and_none_runs(language: str) -> None:
    hostile = "<script>alert(1)</script><img src=x onerror=alert(1)>"
    one = record(
        "rtn:2",
        perplexity=90.0,
        outputs=(said((7,) * 20, word=hostile),),
        environment={"calibration": {"tokens": 1, "widest_input": 2, "widest_layer": hostile}},
        details={"static_inputs": {"layer": hostile, "step": 90.0, "median": 1.0}},
    )
    nan = failed("awq:2", f"{NOTHING_FINITE}: {hostile}")
    told = {finding.kind for finding in autopsy.findings([BF16, one, nan])}
    assert told == {"not_finite", "exploded", "stretched", "little_calibration", "repeats"}
    page = autopsy.box([BF16, one, nan], language)
    assert "<script" not in page
    assert "<img" not in page
    for kind in told:
        assert words(language)(f"autopsy_{kind}") in page
        assert f"term_autopsy_{kind}" in translations()[language]
