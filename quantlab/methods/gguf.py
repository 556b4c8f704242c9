"""GGUF: ggml's block formats, mixed over the tensors as llama.cpp's file types do.

The formats are in `quantlab.ggml`, one file each; `quantlab.ggml.mixes` says which tensor gets
which. Embedding and output head are quantized too, as in any GGUF file.

With an importance matrix, a row's codes and scales minimise  sum_j mean(x_j^2) (w_j - q_j)^2:  the
expected squared error of the output if the inputs were uncorrelated. x is what the linear reads in
the unquantized model. Embedding and head get none, as with llama.cpp's own tool: a row of the
embedding is looked up, not multiplied, and the tool leaves the head out unless told otherwise.
Source: ggml's block definitions and llama.cpp's quantization mixes (ggml-org).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantlab.calibration import ActStats, StatKind
from quantlab.errors import MethodError
from quantlab.ggml import quantize_rows
from quantlab.ggml.mixes import FILE_TYPES, TENSOR_KINDS, tensor_type
from quantlab.methods import base
from quantlab.models import Block
from quantlab.packing import GGMLWeight, PackedWeight, Storage


@dataclass(frozen=True)
class GGUFConfig(base.Config):
    type: str = base.option(
        "q4_k_m",
        "File type",
        "llama.cpp's name of the mix: which block format each tensor gets.",
        choices=tuple(FILE_TYPES),
    )
    imatrix: bool = base.option(
        False,
        "Importance matrix",
        "Weigh each column's rounding error by the mean square of its input on the calibration "
        "text.",
        paper="llama.cpp's --imatrix, off by default",
    )
    engine: str = base.option(
        "llama.cpp",
        "Engine",
        "What runs the row: llama.cpp, which reads such files everywhere, or QuantLab's kernels on "
        "the same codes.",
        choices=("llama.cpp", "quantlab"),
    )


@base.register
class GGUF(base.Quantizer):
    name = "gguf"
    title = "GGUF"
    paper = "llama.cpp (ggml-org)"
    summary = "llama.cpp's block formats; the file runs in llama.cpp (or QuantLab's kernels)."
    sees_error = False
    Config = GGUFConfig

    def needs_for(self, config: GGUFConfig) -> tuple[StatKind, ...]:
        return ("square",) if config.imatrix else ()

    def weight_bits(self, config: GGUFConfig) -> int:
        return FILE_TYPES[config.type].bits

    def storage(self, config: GGUFConfig) -> Storage:
        return Storage("ggml", (self.weight_bits(config),))

    def quantize_block(
        self, block: Block, stats: Mapping[str, ActStats], config: GGUFConfig
    ) -> dict[str, PackedWeight]:
        return {
            path: quantize_tensor(
                linear.weight, config, path, block, importance(stats, path, config)
            )
            for path, linear in block.linears.items()
        }

    def quantize_outer(
        self, weight: Tensor, kind: str, tied_head: bool, config: Any
    ) -> PackedWeight | None:
        rows, columns = weight.shape
        name = tensor_type(config.type, kind, 0, 0, columns, rows, gqa=1, tied_head=tied_head)
        return GGMLWeight(quantize_rows(weight.float(), name), name, columns)


def importance(stats: Mapping[str, ActStats], path: str, config: GGUFConfig) -> Tensor | None:
    """float32 [columns], the weight of each column's squared error; None without the option.
    Raises: MethodError when the inputs were not finite."""
    if not config.imatrix:
        return None
    squares = stats[path].mean_square
    assert squares is not None
    if not bool(torch.isfinite(squares).all()):
        raise MethodError("gguf: the calibration activations are not finite")
    return squares


def quantize_tensor(
    weight: Tensor, config: GGUFConfig, path: str, block: Block, importance: Tensor | None
) -> GGMLWeight:
    """One linear in the block format that the mix gives it."""
    rows, columns = weight.shape
    gqa = block.heads // block.kv_heads
    kind = block.kinds[path]
    if kind not in TENSOR_KINDS:  # a generic family; no rule of any mix singles out ffn_up
        kind = "ffn_up"
    name = tensor_type(
        config.type, kind, block.index, block.count, columns, rows,
        gqa=gqa, tied_head=False, importance=importance is not None,
    )  # fmt: skip
    return GGMLWeight(quantize_rows(weight.float(), name, importance), name, columns)
