"""ONNX Runtime's dynamic INT8: its own `quantize_dynamic`, run by its own engine.

The model is written as an ONNX file (`quantlab.export.onnx_graph`), quantized by ONNX Runtime's
tool and measured in ONNX Runtime, as GGUF rows are in llama.cpp. What it computes is the arithmetic
of `dynamic_int8` with one grid for each input and, by default, one for each weight matrix; the
packed weights that `quantize_block` returns are that arithmetic in QuantLab's terms.
Sources: onnxruntime.quantization.quantize_dynamic; ONNX operators DynamicQuantizeLinear and
MatMulInteger.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from quantlab.calibration import ActStats
from quantlab.errors import ConfigError
from quantlab.methods import base
from quantlab.methods.w8a8 import int8_storage, pack_int8
from quantlab.models import Block
from quantlab.packing import Activation, PackedWeight, Storage

REQUIREMENTS = "requirements-onnx.txt"


@dataclass(frozen=True)
class OnnxInt8Config(base.Config):
    bits: int = base.option(8, "Bits", "Bits of weights and activations.", choices=(8,))
    per_channel: bool = base.option(
        False, "Scale per channel", "One weight scale a row; otherwise one for the whole matrix."
    )
    reduce_range: bool = base.option(
        False,
        "Reduced range",
        "Weights in 7 bits, for processors whose 8-bit products saturate (AVX2 without VNNI).",
    )
    head: bool = base.option(
        False,
        "Quantize the head",
        "Also put the output head in 8 bits, apart from the embedding it may share.",
        paper="true",
    )

    def validate(self) -> None:
        super().validate()
        missing = base.missing_packages("onnx", "onnxruntime")
        if missing:
            raise ConfigError(
                f"onnx_int8 needs {' and '.join(missing)}, which "
                f"{'is' if len(missing) == 1 else 'are'} not installed: "
                f"pip install -r {REQUIREMENTS}"
            )


@base.register
class OnnxInt8(base.Quantizer):
    name = "onnx_int8"
    title = "ONNX Runtime INT8"
    paper = "onnxruntime.quantization"
    summary = "ONNX Runtime's dynamic 8-bit quantization, run in ONNX Runtime; no data."
    bits = (8,)
    Config = OnnxInt8Config

    def activation_bits(self, config: OnnxInt8Config) -> int:
        return 8

    def storage(self, config: OnnxInt8Config) -> Storage:
        return int8_storage(config, "dynamic_tensor", per_channel=config.per_channel)

    def whole_model(self, config: object) -> bool:
        """ONNX Runtime quantizes a graph of the whole model."""
        return True

    def quantize_block(
        self, block: Block, stats: Mapping[str, ActStats], config: OnnxInt8Config
    ) -> dict[str, PackedWeight]:
        return {
            path: pack_int8(
                linear.weight,
                Activation("dynamic_tensor"),
                per_channel=config.per_channel,
                largest=64 if config.reduce_range else 127,
            )
            for path, linear in block.linears.items()
        }
