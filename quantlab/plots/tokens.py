"""The paired token view: one text as every variant predicted it, each token coloured by how far
its prediction moved. Everything comes from the records' readings; nothing is computed anew."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from quantlab.plots import numbers, palette
from quantlab.plots.templates import render
from quantlab.plots.words import Words, words
from quantlab.results import ResultRecord

LEVELS = (0.001, 0.01, 0.1, 1.0)
"""KL divergences in nats at which the colour of a token steps up: a decade each."""
NEAR_TIE = 0.1
"""A flip is a near tie where the original gave its first choice less than this more than its
second: it hardly preferred it. Probability."""

Flip = Literal["", "tie", "sure"]


@dataclass(frozen=True)
class Token:
    """A token of the text, the KL divergence (nats) of the distributions that predicted it, its
    colour (0 to `len(LEVELS)`), and whether the variant's first choice differs: in a near `tie`,
    or although the original was `sure`."""

    text: str
    kl: float
    level: int
    flip: Flip


def margin(top: Sequence[Sequence[float]]) -> float:
    """How much more probable the first choice is than the second. `top`: [[token, probability]]."""
    return top[0][1] - top[1][1] if len(top) > 1 else 1.0


def flip(original: Sequence[Sequence[float]], variant: Sequence[Sequence[float]]) -> Flip:
    """Whether the first choice changed, and how sure the original was of its own."""
    if original[0][0] == variant[0][0]:
        return ""
    return "tie" if margin(original) < NEAR_TIE else "sure"


def tokens(reading: Mapping[str, Any]) -> list[Token]:
    """The predicted tokens of a reading: all but the first one, which is given."""
    rows = zip(
        reading["text"][1:], reading["kl"], reading["original"], reading["variant"], strict=True
    )
    return [
        Token(_seen(text), kl, bisect_right(LEVELS, kl), flip(original, variant))
        for text, kl, original, variant in rows
    ]


def _seen(text: str) -> str:
    """A token with something to point at, also where it is a line break alone."""
    return text if text.strip(" \n") else text.replace("\n", "⏎\n")


def view(records: Sequence[ResultRecord], language: str | None = None) -> str:
    """A column a variant, the unquantized first, and the box that shows a chosen token's top fives;
    what to do where no record has a reading."""
    say = words(language)
    read = [r for r in records if r.status == "finished" and r.reading]
    read.sort(key=lambda record: not palette.is_reference(record))
    return render(
        "tokens.html",
        language,
        columns=[_column(record, say) for record in read],
        data=json.dumps(_data(read)) if read else "",
        bounds=[f"{bound:g}" for bound in LEVELS],
        near=f"{100 * NEAR_TIE:.0f}%",
    )


def _column(record: ResultRecord, say: Words) -> dict[str, Any]:
    shown = tokens(record.reading)
    ties, sure = (sum(token.flip == kind for token in shown) for kind in ("tie", "sure"))
    mean = sum(token.kl for token in shown) / len(shown)
    return {
        "variant": record.variant,
        "method": record.method,
        "label": palette.short(record),
        "given": record.reading["text"][0],
        "tokens": shown,
        "mean": say("tokens_mean", kl=numbers.divergence(mean), count=len(shown)),
        "flips": say("tokens_flips", ties=ties, sure=sure),
    }


def _data(read: Sequence[ResultRecord]) -> dict[str, Any]:
    """What the script needs to fill the box: the original once, each variant by its name."""
    return {
        "pieces": {key: text for r in read for key, text in r.reading["pieces"].items()},
        "text": read[0].reading["text"],
        "original": read[0].reading["original"],
        "variants": {r.variant: {"kl": r.reading["kl"], "top": r.reading["variant"]} for r in read},
    }
