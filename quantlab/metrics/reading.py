"""The first evaluation tokens one by one: how far each prediction moved, and what both expected.

Kept while the quality of a variant is measured, from the very logits and KL divergences that the
mean is made of, so that the page can show tokens without running anything again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from quantlab.metrics.intervals import SEGMENT_TOKENS

TOP = 5
"""Most likely tokens kept of each distribution."""


@dataclass
class Closeup:
    """Collects the first `SEGMENT_TOKENS` predictions of the first window, in pieces of any size.

    `given` is the token before the first prediction. What `add` is given is what the metric saw.
    """

    given: int
    targets: list[int] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    original: list[list[list[float]]] = field(default_factory=list)
    variant: list[list[list[float]]] = field(default_factory=list)

    def add(self, original: Tensor, variant: Tensor, kl: Tensor, targets: Tensor) -> None:
        """original, variant: float32 logits [n, vocabulary]; kl: float64 [n] nats; targets: [n]."""
        room = SEGMENT_TOKENS - len(self.kl)
        if room <= 0:
            return
        self.targets += targets[:room].tolist()
        self.kl += kl[:room].tolist()
        self.original += most_likely(original[:room])
        self.variant += most_likely(variant[:room])

    def to_json(self) -> dict[str, Any]:
        """`tokens`: ids [n + 1], the given one first; `kl`: nats [n]; `original` and `variant`: for
        each of the n predictions the most likely tokens as [id, probability], likeliest first."""
        return {
            "tokens": [self.given, *self.targets],
            "kl": self.kl,
            "original": self.original,
            "variant": self.variant,
        }


def most_likely(logits: Tensor) -> list[list[list[float]]]:
    """The `TOP` tokens of each row as [id, softmax probability to six decimals].

    logits: float32 [n, vocabulary]."""
    best = logits.topk(min(TOP, logits.shape[-1]), dim=-1)
    chances = torch.exp(best.values - logits.logsumexp(-1, keepdim=True))
    return [
        [[token, round(chance, 6)] for token, chance in zip(ids, row, strict=True)]
        for ids, row in zip(best.indices.tolist(), chances.tolist(), strict=True)
    ]


def token_ids(reading: Mapping[str, Any]) -> set[int]:
    """Every token that a reading speaks of."""
    tops = [*reading["original"], *reading["variant"]]
    return {*reading["tokens"], *(int(token) for top in tops for token, _ in top)}
