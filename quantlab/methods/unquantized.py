"""The model as it is: bfloat16 (what people deploy) and float32 (the reference of every metric)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quantlab.calibration import ActStats
from quantlab.methods import base
from quantlab.models import Block
from quantlab.packing import PackedWeight


@dataclass(frozen=True)
class NoConfig(base.Config):
    """Nothing to choose."""


class _Unquantized(base.Quantizer):
    paper = ""
    quantizes = False
    Config = NoConfig

    def quantize_block(
        self, block: Block, stats: Mapping[str, ActStats], config: Any
    ) -> dict[str, PackedWeight]:
        return {}


@base.register
class BFloat16(_Unquantized):
    name = "bf16"
    title = "bfloat16"
    summary = "Unquantized weights and activations in 16 bits."

    def weight_bits(self, config: Any) -> int:
        return 16


@base.register
class Float32(_Unquantized):
    name = "fp32"
    title = "float32"
    summary = "Unquantized weights and activations in 32 bits, the reference of every metric."

    def weight_bits(self, config: Any) -> int:
        return 32

    def activation_bits(self, config: Any) -> int:
        return 32
