"""Against the numpy implementation in the gguf package: bytes out, and values from any bytes."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from quantlab.ggml import FORMATS, dequantize_rows, quantize_rows

HALVES = {
    "q4_0": (0,),
    "q4_1": (0, 2),
    "q5_0": (0,),
    "q5_1": (0, 2),
    "q8_0": (0,),
    "q2_k": (80, 82),
    "q3_k": (108,),
    "q4_k": (0, 2),
    "q5_k": (0, 2),
    "q6_k": (208,),
    "iq4_nl": (0,),
}
"""Where the float16 factors of a block lie."""


def _type(name: str) -> gguf.GGMLQuantizationType:
    return gguf.GGMLQuantizationType(FORMATS[name].type_id)


@pytest.mark.parametrize("name", list(FORMATS))
def test_sizes_and_numbers_are_those_of_gguf(name: str) -> None:
    assert _type(name).name.lower() == name
    entry = FORMATS[name]
    assert gguf.GGML_QUANT_SIZES[_type(name)] == (entry.block_size, entry.block_bytes)
    assert entry.bits_per_weight == 8 * entry.block_bytes / entry.block_size
    assert entry.bits <= entry.bits_per_weight


@pytest.mark.parametrize("name", ["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"])
@pytest.mark.parametrize("spread", [1e-3, 0.05, 20.0])
def test_quantize_gives_the_same_bytes(name: str, spread: float) -> None:
    weight = np.random.default_rng(5).normal(0, spread, (64, 576)).astype(np.float32)
    weight[3] = 0
    weight[4, 64:96] = 0.25
    expected = gguf.quantize(weight, _type(name)).view(np.uint8)
    assert torch.equal(quantize_rows(torch.from_numpy(weight), name), torch.from_numpy(expected))


@pytest.mark.parametrize("name", list(FORMATS))
def test_dequantize_gives_the_same_values(name: str) -> None:
    """Any bytes are a valid block once the factors are finite, so every bit pattern can occur."""
    entry, random = FORMATS[name], np.random.default_rng(6)
    columns, rows = 512, 40
    blocks = rows * columns // entry.block_size
    if entry.block_size == 1:
        weight = torch.from_numpy(random.normal(0, 1, (rows, columns)).astype(np.float32))
        data = quantize_rows(weight, name).numpy()
    else:
        raw = random.integers(0, 256, (blocks, entry.block_bytes), dtype=np.uint8)
        for offset in HALVES[name]:
            factors = random.normal(0, 1, blocks) * 10.0 ** random.integers(-7, 3, blocks)
            raw[:, offset : offset + 2] = factors.astype("<f2").view(np.uint8).reshape(-1, 2)
        data = raw.reshape(rows, -1)
    expected = gguf.dequantize(data, _type(name))
    decoded = dequantize_rows(torch.from_numpy(data), name, columns)
    assert decoded.dtype == torch.float32
    assert torch.equal(decoded, torch.from_numpy(expected))
