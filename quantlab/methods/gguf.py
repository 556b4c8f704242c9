"""GGUF: ggml's block formats, mixed over the tensors as llama.cpp's file types do.

The formats are in `quantlab.ggml`, one file each; `quantlab.ggml.mixes` says which tensor gets
which. Embedding and output head are quantized too, as in any GGUF file.
Source: ggml's block definitions and llama.cpp's quantization mixes (ggml-org).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from quantlab.calibration import ActStats
from quantlab.ggml import quantize_rows
from quantlab.ggml.mixes import FILE_TYPES, TENSOR_KINDS, tensor_type
from quantlab.methods import base
from quantlab.models import Block
from quantlab.packing import GGMLWeight, PackedWeight


@dataclass(frozen=True)
class GGUFConfig(base.Config):
    type: str = base.option(
        "q4_k_m",
        "File type",
        "llama.cpp's name of the mix: which block format each tensor gets.",
        choices=tuple(FILE_TYPES),
    )


@base.register
class GGUF(base.Quantizer):
    name = "gguf"
    title = "GGUF"
    paper = "llama.cpp (ggml-org)"
    summary = "llama.cpp's block formats; the file runs in llama.cpp."
    Config = GGUFConfig

    def weight_bits(self, config: GGUFConfig) -> int:
        return FILE_TYPES[config.type].bits

    def quantize_block(
        self, block: Block, stats: Mapping[str, ActStats], config: GGUFConfig
    ) -> dict[str, PackedWeight]:
        return {
            path: quantize_tensor(
                linear.weight, config, block.kinds[path], block.index, block.count, block
            )
            for path, linear in block.linears.items()
        }

    def quantize_outer(
        self, weight: Tensor, kind: str, tied_head: bool, config: Any
    ) -> PackedWeight | None:
        rows, columns = weight.shape
        name = tensor_type(config.type, kind, 0, 0, columns, rows, gqa=1, tied_head=tied_head)
        return GGMLWeight(quantize_rows(weight.float(), name), name, columns)


def quantize_tensor(
    weight: Tensor, config: GGUFConfig, kind: str, index: int, count: int, block: Block
) -> GGMLWeight:
    """One linear in the block format that the mix gives it."""
    rows, columns = weight.shape
    gqa = block.heads // block.kv_heads
    if kind not in TENSOR_KINDS:  # a generic family; no rule of any mix singles out ffn_up
        kind = "ffn_up"
    name = tensor_type(config.type, kind, index, count, columns, rows, gqa=gqa, tied_head=False)
    return GGMLWeight(quantize_rows(weight.float(), name), name, columns)
