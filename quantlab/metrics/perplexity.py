"""Perplexity: exp of the mean negative log-likelihood of the next token, in nats."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from quantlab.metrics.intervals import interval


def negative_log_likelihood(logits: Tensor, targets: Tensor) -> Tensor:
    """-log softmax(logits)[target], nats: float32 [n] from float32 [n, vocabulary], int64 [n]."""
    return F.cross_entropy(logits, targets, reduction="none")


def perplexity(mean_nll: float) -> float | None:
    """exp(mean); None where it is no finite number (a broken model), since JSON has no infinity."""
    if not math.isfinite(mean_nll) or mean_nll > 700:
        return None
    return math.exp(mean_nll)


def perplexity_interval(segments: Sequence[float]) -> tuple[float, float] | None:
    """95% interval of the perplexity, from each segment's mean nats."""
    if not all(map(math.isfinite, segments)):
        return None
    low, high = interval(segments)
    bounds = perplexity(low), perplexity(high)
    return None if bounds[0] is None or bounds[1] is None else (bounds[0], bounds[1])
