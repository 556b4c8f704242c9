"""The paired token view: flips by hand, colours at their bounds, escaping, and readings of runs."""

from __future__ import annotations

import html
import json
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from quantlab.plots import tokens
from quantlab.results import ResultRecord
from tests.records import record

HOSTILE = ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "' onclick='x", "{{ 7 }}"]


class Runs(HTMLParser):
    """Finds what a browser would run: script, images, and attributes that are handlers."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [tag] if tag in ("script", "img") else []
        self.found += [name for name, _ in attrs if name.startswith("on")]


def runs(page: str) -> list[str]:
    parser = Runs()
    parser.feed(page)
    return parser.found


def reading(*rows: tuple[str, float, Any, Any], given: str = "It") -> dict[str, Any]:
    """(text, KL, original's top, variant's top) for each token; ids 0 to 9 are written as such."""
    return {
        "tokens": list(range(len(rows) + 1)),
        "text": [given, *(text for text, *_ in rows)],
        "kl": [kl for _, kl, _, _ in rows],
        "original": [original for *_, original, _ in rows],
        "variant": [variant for *_, variant in rows],
        "pieces": {str(token): f" word{token}" for token in range(10)},
    }


def read(variant: str, *rows: tuple[str, float, Any, Any], given: str = "It") -> ResultRecord:
    return record(variant, reading=reading(*rows, given=given))


def test_flips_by_hand() -> None:
    close, sure = [[1, 0.41], [2, 0.40]], [[1, 0.8], [2, 0.1]]
    other = [[2, 0.5], [1, 0.3]]
    assert tokens.flip(close, close) == ""
    assert tokens.flip(close, other) == "tie"
    assert tokens.flip(sure, other) == "sure"
    # Exactly the bound is no near tie; a lone candidate was sure.
    assert tokens.flip([[1, 0.5], [2, 0.375]], other) == "sure"
    assert tokens.flip([[1, 0.5], [2, 0.4375]], other) == "tie"
    assert tokens.flip([[1, 1.0]], other) == "sure"


@pytest.mark.parametrize(
    ("kl", "level"),
    [(0, 0), (0.00099, 0), (0.001, 1), (0.05, 2), (0.1, 3), (0.99, 3), (1, 4), (9, 4)],
)
def test_colours_step_at_decades(kl: float, level: int) -> None:
    top = [[1, 0.5], [2, 0.2]]
    (token,) = tokens.tokens(reading((" a", kl, top, top)))
    assert (token.text, token.kl, token.level, token.flip) == (" a", kl, level, "")


def test_columns_and_data() -> None:
    close, sure, other = [[1, 0.41], [2, 0.40]], [[1, 0.8], [2, 0.1]], [[2, 0.5], [1, 0.3]]
    gptq = read(
        "gptq:4", (" a", 0.2, close, other), (" b", 0.4, sure, other), ("\n", 0, sure, sure)
    )
    bf16 = read("bf16", (" a", 0, close, close), (" b", 0, sure, sure), ("\n", 0, sure, sure))
    page = tokens.view([gptq, bf16, record("rtn:4")])
    assert re.findall(r'data-reader="(.+?)"', page) == ["bf16", "gptq:4"]
    assert "mean KL 0.200 nats over 3 tokens" in page
    assert "first choice changed: 1 near ties, 1 confident" in page
    assert page.count('data-flip="tie"') == page.count('data-flip="sure"') == 2  # With the legend.
    assert "⏎" in page
    (found,) = re.findall(r'data-reading="(.*?)"', page)
    data = json.loads(html.unescape(found))
    assert data["variants"]["gptq:4"] == {"kl": [0.2, 0.4, 0], "top": [other, other, sure]}
    assert data["original"] == [close, sure, sure]


def test_without_a_reading_the_page_says_what_to_do() -> None:
    for records in ([], [record("gptq:4")], [record("gptq:4", status="failed")]):
        page = tokens.view(records)
        assert "run them again" in page
        assert "data-reading" not in page


@pytest.mark.parametrize("hostile", HOSTILE)
def test_tokens_cannot_run(hostile: str) -> None:
    top = [[1, 0.5], [2, 0.2]]
    one = reading((hostile, 0.2, top, top), given=hostile)
    one["pieces"] = {str(token): hostile for token in range(3)}
    page = tokens.view([record("gptq:4", reading=one)])
    assert runs(page) == []
    (found,) = re.findall(r'data-reading="(.*?)"', page)
    assert json.loads(html.unescape(found))["pieces"]["1"] == hostile


def test_a_reading_survives_the_record() -> None:
    top = [[1, 0.5], [2, 0.2]]
    one = read("gptq:4", (" a", 0.1, top, top))
    assert ResultRecord.from_json(json.loads(json.dumps(one.to_json()))) == one
    old = one.to_json()
    del old["reading"]
    assert ResultRecord.from_json(old).reading == {}
