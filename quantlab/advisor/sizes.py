"""Bytes of a variant's weights before it exists, from the arithmetic of the packed formats."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from quantlab.advisor.shapes import Matrix, ModelShape
from quantlab.codebook import NESTED_BLOCK
from quantlab.errors import ConfigError
from quantlab.ggml import FORMATS
from quantlab.ggml.mixes import tensor_type
from quantlab.methods import configure, parse_variant
from quantlab.models.families import FAMILIES
from quantlab.packing.affine import affine_nbytes

GROUP_SIZE = 64
GROUPED = ("rtn", "gptq", "awq", "efficientqat")
INT8_ROWS = ("smoothquant", "llm_int8")
CODEBOOK = ("nf4", "fp4")
UNQUANTIZED = {"bf16": 2, "fp32": 4}


@dataclass(frozen=True)
class WeightSize:
    """`total`: bytes of all weights at rest, scales and embeddings included; `read`: those that
    decoding one token reads (an embedding that is no head gives one row, counted as none)."""

    total: int
    read: int
    parameters: int

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.total / self.parameters


def weight_size(shape: ModelShape, variant: str, group_size: int = GROUP_SIZE) -> WeightSize:
    """The size of `variant` (as the command line writes it, `gptq:4`) with its default options.

    Raises: ConfigError for an unknown variant, or a method whose packing is decided by the model.
    """
    spec = parse_variant(variant)
    config = configure(spec, group_size)
    if spec.method in UNQUANTIZED:
        each = UNQUANTIZED[spec.method]
        table = each * shape.vocabulary * shape.width
        return _size(shape, each * shape.parameters, table, each)
    if spec.method == "gguf":
        return _gguf(shape, config.type)
    linears = shape.layers * sum(_packed(spec.method, m, config) for m in shape.matrices)
    table = 2 * shape.vocabulary * shape.width
    tables = table * (1 if shape.tied else 2)
    total = linears + tables + 2 * (shape.vectors + shape.positions * shape.width)
    return _size(shape, total, table, 2)


def _size(shape: ModelShape, total: int, table: int, each: int) -> WeightSize:
    unread = each * shape.positions * shape.width + (0 if shape.tied else table)
    return WeightSize(total, total - unread, shape.parameters)


def _packed(method: str, matrix: Matrix, config: Any) -> int:
    """Bytes of one linear: codes, scales, zero-points."""
    rows, columns = matrix.rows, matrix.columns
    if method in GROUPED:
        group = min(config.group_size, columns)
        symmetric = bool(getattr(config, "symmetric", False))
        return affine_nbytes(rows, columns, config.bits, group, symmetric)
    if method in INT8_ROWS:
        return rows * columns + 4 * rows  # one float32 scale a row
    if method in CODEBOOK:
        blocks = math.ceil(rows * columns / config.block_size)
        nested = blocks + 4 * math.ceil(blocks / NESTED_BLOCK) + 4
        return math.ceil(rows * columns / 2) + (nested if config.double_quant else 4 * blocks)
    raise ConfigError(f"{method}: its size cannot be known before it is made")


def _gguf(shape: ModelShape, mix: str) -> WeightSize:
    """A GGUF file's tensors. Norms, biases and positions are float32. An architecture that
    llama.cpp does not have keeps its embedding and all those in 16 bits (run in torch)."""
    blocks = 0
    for index in range(shape.layers):
        for m in shape.matrices:
            name = tensor_type(
                mix, m.kind, index, shape.layers, m.columns, m.rows,
                gqa=shape.heads // shape.kv_heads, tied_head=False,
            )  # fmt: skip
            blocks += ggml_nbytes(m.rows, m.columns, name)
    rows, columns = shape.vocabulary, shape.width
    if FAMILIES[shape.family].gguf is None:
        table = head = 2 * rows * columns
        each = 2
    else:
        each = 4
        table, head = (
            ggml_nbytes(
                rows,
                columns,
                tensor_type(mix, kind, 0, 0, columns, rows, gqa=1, tied_head=shape.tied),
            )
            for kind in ("token_embd", "output")
        )
    plain = each * (shape.vectors + shape.positions * shape.width)
    total = blocks + table + (0 if shape.tied else head) + plain
    return _size(shape, total, table, each)


def ggml_nbytes(rows: int, columns: int, name: str) -> int:
    """Bytes of a matrix in a ggml block format; rows are whole blocks."""
    format = FORMATS[name]
    return rows * (columns // format.block_size) * format.block_bytes
