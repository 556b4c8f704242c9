"""Blocks put together by hand from the definition of the format, decoded in plain Python."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import pytest
import torch

from quantlab.ggml import FORMATS


def _decode(name: str, block: bytes) -> list[float]:
    data = torch.frombuffer(bytearray(block), dtype=torch.uint8).view(1, -1)
    assert data.shape[1] == FORMATS[name].block_bytes
    return FORMATS[name].dequantize(data)[0].tolist()


def _numbers(values: Sequence[float]) -> torch.Tensor:
    return torch.tensor([list(values)])


def _half(value: float) -> bytes:
    return struct.pack("<e", value)


def test_q4_0() -> None:
    low, high = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15], [15, 0, 7, 9] * 4
    block = _half(-0.5) + bytes(a | b << 4 for a, b in zip(low, high, strict=True))
    assert _decode("q4_0", block) == [-0.5 * (q - 8) for q in low + high]


def test_q4_0_of_known_weights() -> None:
    """The value of largest magnitude is code 0; the others are rounded on its scale."""
    weights = [-8.0, 7.0, 0.0, 3.4, -3.4, 0.6, -0.6, 0.4] * 4  # scale 1
    codes = [0, 15, 8, 11, 5, 9, 7, 8] * 4
    block = FORMATS["q4_0"].quantize(torch.tensor([weights]), None)
    expected = _half(1.0) + bytes(a | b << 4 for a, b in zip(codes[:16], codes[16:], strict=True))
    assert bytes(block[0].tolist()) == expected


def test_q5_0() -> None:
    codes = [(7 * j + 3) % 32 for j in range(32)]
    high = sum((q >> 4) << j for j, q in enumerate(codes))
    nibbles = bytes((codes[j] & 15) | (codes[j + 16] & 15) << 4 for j in range(16))
    block = _half(0.25) + struct.pack("<I", high) + nibbles
    assert _decode("q5_0", block) == [0.25 * (q - 16) for q in codes]


def test_q8_0_rounds_halves_away_from_zero() -> None:
    below_half = 0.49999997  # the float32 below 0.5; adding 0.5 to it in float32 gives 1
    weights = [127.0, 0.5, -0.5, 1.5, -2.5, 2.4999998, below_half, -127.0] * 4
    block = FORMATS["q8_0"].quantize(torch.tensor([weights]), None)
    codes = [127, 1, -1, 2, -3, 2, 0, -127] * 4
    assert bytes(block[0].tolist()) == _half(1.0) + struct.pack("<32b", *codes)


def test_q4_k() -> None:
    scales = [1, 15, 16, 63, 2, 17, 35, 62]  # six bits: the last four exercise the split fields
    mins = [63, 0, 48, 5, 33, 16, 1, 47]
    codes = [(5 * i + i // 32) % 16 for i in range(256)]
    factors = bytearray(12)
    for j in range(4):
        factors[j] = scales[j] | (scales[j + 4] >> 4) << 6
        factors[4 + j] = mins[j] | (mins[j + 4] >> 4) << 6
        factors[8 + j] = (scales[j + 4] & 15) | (mins[j + 4] & 15) << 4
    packed = bytearray()
    for quarter in range(4):
        for j in range(32):
            first = 64 * quarter + j
            packed.append(codes[first] | codes[first + 32] << 4)
    block = _half(0.5) + _half(0.25) + bytes(factors) + bytes(packed)
    expected = [0.5 * scales[i // 32] * q - 0.25 * mins[i // 32] for i, q in enumerate(codes)]
    assert _decode("q4_k", block) == expected


def test_q6_k() -> None:
    scales = [-128, 127, 0, 1, -1, 5, -7, 64, -64, 2, 3, 100, -100, 33, -2, 9]
    codes = [(11 * i + i // 16) % 64 for i in range(256)]
    low, high = bytearray(128), bytearray(64)
    for half in range(2):
        for j in range(128):
            q = codes[128 * half + j]
            low[64 * half + j % 64] |= (q & 15) << (4 * (j // 64))
            high[32 * half + j % 32] |= (q >> 4) << (2 * (j // 32))
    block = bytes(low) + bytes(high) + struct.pack("<16b", *scales) + _half(0.125)
    expected = [0.125 * scales[i // 16] * (q - 32) for i, q in enumerate(codes)]
    assert _decode("q6_k", block) == expected


def test_q3_k() -> None:
    scales = [0, 1, 15, 16, 31, 32, 33, 47, 48, 63, 62, 17, 8, 40, 25, 50]
    codes = [(3 * i + i // 16) % 8 for i in range(256)]
    mask, low, factors = bytearray(32), bytearray(64), bytearray(12)
    for i, q in enumerate(codes):
        mask[i % 32] |= (q >> 2) << (i // 32)
        low[32 * (i // 128) + i % 32] |= (q & 3) << (2 * (i % 128 // 32))
    for j, scale in enumerate(scales):
        factors[j % 8] |= (scale & 15) << (4 * (j // 8))
        factors[8 + j % 4] |= (scale >> 4) << (2 * (j // 4))
    block = bytes(mask) + bytes(low) + bytes(factors) + _half(0.5)
    expected = [0.5 * (scales[i // 16] - 32) * (q - 4) for i, q in enumerate(codes)]
    assert _decode("q3_k", block) == expected


def test_iq4_nl() -> None:
    levels = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113]
    block = _half(0.5) + bytes(j | (15 - j) << 4 for j in range(16))
    assert _decode("iq4_nl", block) == [0.5 * v for v in levels + levels[::-1]]


@pytest.mark.parametrize(
    ("name", "levels"),
    [
        ("q2_k", (0, 1, 2, 3)),
        ("q4_k", tuple(range(16))),
        ("q6_k", (-32, -27, -21, -16, -11, -5, 0, 3, 5, 8, 11, 15, 18, 22, 27, 31)),
    ],
)
def test_a_grid_of_the_format_is_recovered_exactly(name: str, levels: tuple[int, ...]) -> None:
    step = {"q2_k": 15, "q4_k": 63, "q6_k": 128}[name] * 2.0**-8
    weights = _numbers([step * levels[i % len(levels)] for i in range(256)])
    entry = FORMATS[name]
    assert torch.equal(entry.dequantize(entry.quantize(weights, None)), weights)


def test_importance_moves_the_scale_to_what_matters() -> None:
    """With all weight on small values, a symmetric block gives up its outlier's accuracy."""
    weights = _numbers([0.013 * (i - 15) for i in range(31)] + [1.0])
    important = _numbers([1.0] * 31 + [1e-6])
    entry = FORMATS["q4_0"]
    plain = (entry.dequantize(entry.quantize(weights, None)) - weights)[:, :31].square().sum()
    guided = (entry.dequantize(entry.quantize(weights, important)) - weights)[:, :31].square().sum()
    assert guided < 0.9 * plain
