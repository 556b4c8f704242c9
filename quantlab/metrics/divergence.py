"""How far a variant's next-token distribution is from the original's.

KL(p || q) = sum_v p_v (log p_v - log q_v) in nats, p the original, q the variant; and whether both
prefer the same token (top-1 agreement).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def kl_divergence(original: Tensor, variant: Tensor) -> Tensor:
    """float32 [n] from two logits float32 [n, vocabulary]; never below zero."""
    log_p, log_q = F.log_softmax(original, -1), F.log_softmax(variant, -1)
    # A token that the original rules out adds nothing, also where the variant rules it out too.
    terms = torch.where(torch.isneginf(log_p), 0.0, log_p.exp() * (log_p - log_q))
    return terms.sum(-1).clamp_min(0)


def same_top1(original: Tensor, variant: Tensor) -> Tensor:
    """bool [n]: the most likely token is the same."""
    return torch.eq(original.argmax(-1), variant.argmax(-1))
