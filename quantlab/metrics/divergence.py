"""How far a variant's next-token distribution is from the original's.

KL(p || q) = sum_v p_v (log p_v - log q_v) in nats, p the original, q the variant; and whether both
prefer the same token (top-1 agreement).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels import native_compare, native_solve
from quantlab.metrics.perplexity import negative_log_likelihood


def compare_logits(
    original: Tensor, variant: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(nats lost, KL divergence, same top-1) of every token: float64 [n] twice, bool [n].

    original, variant: float32 [n, vocabulary]; targets: int64 [n]. All three in one pass where
    there is a native library, seven times as fast.
    """
    if native_solve.ready(original, variant):
        loss, kl, same = native_compare.compare_logits(original, variant, targets)
        return loss, kl.clamp_min_(0), same
    loss = negative_log_likelihood(variant, targets).double()
    return loss, kl_divergence(original, variant).double(), same_top1(original, variant)


def kl_divergence(original: Tensor, variant: Tensor) -> Tensor:
    """float32 [n] from two logits float32 [n, vocabulary]; never below zero."""
    log_p, log_q = F.log_softmax(original, -1), F.log_softmax(variant, -1)
    # A token that the original rules out adds nothing, also where the variant rules it out too.
    terms = torch.where(torch.isneginf(log_p), 0.0, log_p.exp() * (log_p - log_q))
    return terms.sum(-1).clamp_min(0)


def same_top1(original: Tensor, variant: Tensor) -> Tensor:
    """bool [n]: the most likely token is the same."""
    return torch.eq(original.argmax(-1), variant.argmax(-1))
