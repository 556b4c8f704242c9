"""Every format against llama.cpp's own quantizer, with and without an importance vector.

On x86-64 ggml's base library is compiled without fused multiply-add, and QuantLab keeps its order
of operations: the bytes agree in every block measured (the kinds below, and 13 million weights of
the bundled model). Where a compiler fuses, near-ties fall the other way in some blocks; then the
error must be as low.
"""

from __future__ import annotations

import platform

import pytest
import torch
from torch import Tensor

from quantlab.ggml import FORMATS, dequantize_rows, quantize_rows

from .conftest import LlamaQuantize

AGREEMENT = 0.9999 if platform.machine() in ("x86_64", "AMD64") else 0.9
BLOCK_FORMATS = [name for name, entry in FORMATS.items() if entry.block_size > 1]
ROWS, COLUMNS = 96, 1536


def _weights(kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(20)
    normal = torch.randn(ROWS, COLUMNS, generator=generator) * 0.05
    other = torch.randn(ROWS, COLUMNS, generator=generator)
    if kind == "bfloat16":  # +a and -a in one block, and many equal values
        return normal.to(torch.bfloat16).to(torch.float32)
    if kind == "heavy tails":
        return normal * other.abs() ** 4
    if kind == "sparse":  # zero blocks, blocks of one value, whole rows of zeros
        normal[:4] = 0
        return torch.where(other > 1.7, normal, 0.0)
    if kind == "outlier":  # sub-blocks whose scale rounds to zero beside the outlier's
        normal[:, 40::256] *= 3000
        return normal
    if kind == "shifted":  # all of one sign: minima that are positive, and large ones
        return normal + torch.where(other[:, :1] > 0, 0.3, -0.3)
    if kind == "tiny":  # float16 subnormal scales
        return normal * 1e-6
    return normal


def _importance(kind: str) -> Tensor | None:
    generator = torch.Generator().manual_seed(21)
    if kind == "none":
        return None
    values = torch.rand(COLUMNS, generator=generator) ** 4 * 1000 + 1e-3
    values[77] = 1e7  # a massive activation
    return values


@pytest.mark.parametrize("importance_kind", ["none", "skewed"])
@pytest.mark.parametrize(
    "kind", ["normal", "bfloat16", "heavy tails", "sparse", "outlier", "shifted", "tiny"]
)
@pytest.mark.parametrize("name", BLOCK_FORMATS)
def test_bytes_are_those_of_llama_cpp(
    name: str, kind: str, importance_kind: str, llama_quantize: LlamaQuantize
) -> None:
    weight, importance = _weights(kind), _importance(importance_kind)
    expected = llama_quantize(weight, name, importance)
    data = quantize_rows(weight, name, importance)

    block_bytes = FORMATS[name].block_bytes
    same = (data.view(-1, block_bytes) == expected.view(-1, block_bytes)).all(1)
    assert same.double().mean().item() >= AGREEMENT, f"{int((~same).sum())} of {len(same)} differ"

    error_weights = torch.ones(COLUMNS) if importance is None else importance

    def error(quantized: Tensor) -> float:
        difference = (dequantize_rows(quantized, name, COLUMNS) - weight).double()
        return float((error_weights * difference**2).sum())

    assert error(data) <= 1.001 * error(expected)


@pytest.mark.parametrize("name", ["f32", "f16", "bf16"])
def test_plain_types_are_those_of_llama_cpp(name: str, llama_quantize: LlamaQuantize) -> None:
    weight = _weights("heavy tails")
    assert torch.equal(quantize_rows(weight, name), llama_quantize(weight, name, None))


@pytest.mark.parametrize("name", BLOCK_FORMATS)
def test_chunks_do_not_show(name: str, llama_quantize: LlamaQuantize) -> None:
    """More weights than one chunk, a last chunk that is short, importance along the row."""
    weight = torch.randn(530, 512, generator=torch.Generator().manual_seed(3))
    importance = torch.rand(512, generator=torch.Generator().manual_seed(4)) + 0.01
    data = quantize_rows(weight, name, importance)
    assert torch.equal(data, llama_quantize(weight, name, importance))
