"""Dynamic INT8: int8 weights, and inputs quantized at run time from their own minimum and maximum.

    w ~ w_code * w_step                  w_step = max|w| / 127, a row or a whole matrix
    x ~ (x_code - zero) * x_step         x_step = (max(x, 0) - min(x, 0)) / 255
                                         zero = round(-min(x, 0) / x_step), x_code 0 to 255
    y = w_step * x_step * sum_k w_code (x_code - zero)

The sum is one of whole numbers. Needs no data. With one grid for the whole input ('tensor', the
classic scheme), what a token becomes depends on the others that are read with it: a massive
activation anywhere coarsens all of them, and decoding token by token is not the prefill repeated.
Sources: ONNX operator DynamicQuantizeLinear (opset 11); torch.ao.nn.quantized.dynamic.Linear;
Krishnamoorthi 2018 (arXiv 1806.08342, 3.1); 'token' as in arXiv 2206.01861 (ZeroQuant, 4.1), there
without a zero-point.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from quantlab.calibration import ActStats
from quantlab.methods import base
from quantlab.methods.w8a8 import int8_storage, pack_int8
from quantlab.models import Block
from quantlab.packing import Activation, PackedWeight, Storage
from quantlab.packing.storage import Inputs


@dataclass(frozen=True)
class DynamicInt8Config(base.WeightConfig):
    bits: int = base.option(8, "Bits", "Bits of weights and activations.", choices=(8,))
    activations: str = base.option(
        "tensor",
        "Activation granularity",
        "What shares one run-time grid: the whole input of a linear, or one token.",
        choices=("tensor", "token"),
    )
    per_channel: bool = base.option(
        True, "Scale per channel", "One weight scale a row; otherwise one for the whole matrix."
    )


@base.register
class DynamicInt8(base.Quantizer):
    name = "dynamic_int8"
    title = "Dynamic INT8"
    paper = "arXiv 1806.08342"
    summary = "8-bit weights, and activations rounded at run time by their own range; no data."
    bits = (8,)
    Config = DynamicInt8Config

    def activation_bits(self, config: DynamicInt8Config) -> int:
        return 8

    def storage(self, config: DynamicInt8Config) -> Storage:
        kind: Inputs = "dynamic_tensor" if config.activations == "tensor" else "dynamic_token"
        return int8_storage(config, kind, per_channel=config.per_channel)

    def quantize_block(
        self, block: Block, stats: Mapping[str, ActStats], config: DynamicInt8Config
    ) -> dict[str, PackedWeight]:
        kind = self.storage(config).activation
        assert kind is not None
        activation = Activation(kind)
        return {
            path: pack_int8(linear.weight, activation, per_channel=config.per_channel)
            for path, linear in block.linears.items()
        }
