"""LLM.int8(): int8 rows, and inputs of which the outlier columns stay in 16 bits."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from quantlab.errors import ConfigError
from quantlab.packing.base import bits_per_weight


@dataclass(frozen=True)
class OutlierWeight:
    """w = code * scale, one absmax grid a row; the input is split at run time.

    codes: int8 [rows, columns], -127 to 127; scales: float32 [rows], max|w| / 127. A column of the
    input in which any |x| >= `threshold` is an outlier: it meets the dequantized weights in 16
    bits. The others become int8, one absmax grid a token. `threshold` 0: no column is an outlier.
    """

    codes: Tensor
    scales: Tensor
    threshold: float = 6.0

    def __post_init__(self) -> None:
        if self.codes.dtype != torch.int8 or self.codes.dim() != 2:
            raise ConfigError(f"outlier codes {self.codes.dtype}: expected int8 [rows, columns]")
        if self.scales.dtype != torch.float32 or tuple(self.scales.shape) != self.codes.shape[:1]:
            found = tuple(self.scales.shape)
            raise ConfigError(f"outlier scales {found}: expected float32 [{self.codes.shape[0]}]")
        if not (math.isfinite(self.threshold) and self.threshold >= 0):
            raise ConfigError(f"threshold={self.threshold}: expected a number from 0 on")

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes

    @property
    def bits_per_weight(self) -> float:
        return bits_per_weight(self)

    def dequantize(self) -> Tensor:
        return self.codes.float().mul_(self.scales[:, None])

    def tensors(self) -> dict[str, Tensor]:
        return {"codes": self.codes, "scales": self.scales}
