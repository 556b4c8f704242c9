"""Sums of y^T x over tokens, in float32; on bfloat16 hardware where that costs no exactness.

Under bfloat16 autocast a linear multiplies inputs rounded to bfloat16 (8 bits of mantissa). The
product of two such numbers has at most 16 bits and is exact in float32, so that a matrix product
which takes bfloat16 factors and adds up in float32 is as good as one in float32 throughout, and
three times as fast where the CPU has instructions for it (AVX512-BF16, AMX), six times in
QuantLab's own kernel, which computes half of a symmetric product.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from kernels import native_solve

STRIP = 256
"""Columns of x^T x that are computed at once."""


def as_multiplied(inputs: Tensor) -> Tensor:
    """The numbers that a linear called here would multiply with its weight, [tokens, columns]:
    `inputs` rounded to bfloat16 where linears do so. bfloat16 where QuantLab's own kernel adds
    their products up, float32 elsewhere."""
    x = inputs.detach().reshape(-1, inputs.shape[-1])
    if x.dtype != torch.bfloat16 and not multiplies_bfloat16():
        return x.float()
    x = x.bfloat16()
    return x.contiguous() if native_solve.multiplies_bfloat16() else x.float()


def multiplies_bfloat16() -> bool:
    """Whether linears called here round their inputs to bfloat16."""
    return torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16


@contextmanager
def bfloat16_factors(enabled: bool) -> Iterator[None]:
    """Products of float32 matrices may read their factors as bfloat16 while this is open; they are
    added up in float32. Without such instructions torch multiplies in float32 as ever."""
    matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    if enabled:
        matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def add_second_moment(total: Tensor, x: Tensor) -> None:
    """total += x^T x, right of the diagonal and some of what is left of it; `symmetric` fills in
    the rest. total: float32 [columns, columns]; x: from `as_multiplied`."""
    if x.dtype == torch.bfloat16:
        native_solve.add_moment(total, x, x, triangle=True)
        return
    # The columns right of each strip suffice: 7/12 of the work at 6 strips.
    with bfloat16_factors(multiplies_bfloat16()), torch.autocast("cpu", enabled=False):
        for start in range(0, x.shape[1], STRIP):
            stop = start + STRIP
            total[start:stop, start:].addmm_(x[:, start:stop].t(), x[:, start:])


def symmetric(total: Tensor) -> Tensor:
    """The matrix whose upper triangle `total` holds; `total` is used up."""
    if native_solve.ready(total):
        native_solve.mirror(total)
        return total
    upper = total.triu_()
    return upper + upper.triu(1).t()


def add_cross_moment(total: Tensor, y: Tensor, x: Tensor) -> None:
    """total += y^T x. total: float32 [columns, columns]; y, x: from `as_multiplied`."""
    if x.dtype == torch.bfloat16:
        native_solve.add_moment(total, y, x, triangle=False)
        return
    with bfloat16_factors(multiplies_bfloat16()), torch.autocast("cpu", enabled=False):
        total.addmm_(y.t(), x)
