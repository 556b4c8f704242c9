"""Weights whose groups gather columns that do not stand side by side: GPTQ's act-order."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantlab.errors import ConfigError
from quantlab.packing.affine import AffineWeight
from quantlab.packing.base import bits_per_weight


@dataclass(frozen=True)
class PermutedWeight:
    """w[:, order[i]] = inner[:, i]: `inner` has the columns in the order of their groups.

    order: int32 [columns], a permutation. The product is that of `inner` with the input's columns
    in the same order, y = x[:, order] @ inner.T, so that any kernel for `inner` serves.
    """

    inner: AffineWeight
    order: Tensor

    def __post_init__(self) -> None:
        columns = self.inner.columns
        if self.order.dtype != torch.int32 or tuple(self.order.shape) != (columns,):
            raise ConfigError(f"order {tuple(self.order.shape)}: expected int32 [{columns}]")
        if not torch.equal(self.order.sort().values.long(), torch.arange(columns)):
            raise ConfigError("order: expected every column once")

    @property
    def shape(self) -> tuple[int, int]:
        return self.inner.shape

    @property
    def nbytes(self) -> int:
        return self.inner.nbytes + self.order.nbytes

    @property
    def bits_per_weight(self) -> float:
        return bits_per_weight(self)

    def dequantize(self) -> Tensor:
        weight = self.inner.dequantize()
        return torch.empty_like(weight).index_copy_(1, self.order.long(), weight)

    def tensors(self) -> dict[str, Tensor]:
        return {**self.inner.tensors(), "order": self.order}
