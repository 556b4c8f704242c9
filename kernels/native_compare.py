"""Losses and divergences of two sets of logits in C++ (`cpu/compare.cpp`)."""

from __future__ import annotations

from ctypes import c_int64

import torch
from torch import Tensor

from kernels import native


def compare_logits(p: Tensor, q: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(-log softmax(q)[target], KL(softmax p || softmax q), same most likely token) of every row.

    p, q: float32 [n, vocabulary] on the CPU; targets: int64 [n]. Returns float64 [n] (nats) twice
    and bool [n]; sums run in float64. Raises: BuildError without a native library.
    """
    rows, count = p.shape
    p, q, targets = p.contiguous(), q.contiguous(), targets.contiguous()
    loss, apart = torch.empty(2, rows, dtype=torch.float64)
    same = torch.empty(rows, dtype=torch.uint8)
    sizes = map(c_int64, (rows, count))
    native.native()("ql_compare_logits", p, q, targets, *sizes, loss, apart, same)
    return loss, apart, same.bool()
