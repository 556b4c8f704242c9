"""Blocks taken apart, against the gguf package and against bytes read by hand."""

from __future__ import annotations

import struct

import gguf
import numpy as np
import pytest
import torch

from quantlab.errors import ConfigError
from quantlab.learn import material, superblock
from quantlab.learn.superblock import Taken


@pytest.fixture(scope="module")
def weights() -> torch.Tensor:
    return superblock.weights_of(material.load(), 3)


def raw(found: Taken) -> bytes:
    return bytes(byte.value for byte in found.bytes)


@pytest.mark.parametrize("block", [0, 5])
def test_q4_0_bytes_are_those_of_the_gguf_package(weights: torch.Tensor, block: int) -> None:
    found = superblock.taken_apart(weights, "q4_0", block)
    part = weights[block * 32 : block * 32 + 32].numpy()
    kind = gguf.GGMLQuantizationType.Q4_0
    assert raw(found) == gguf.quantize(part[None], kind).tobytes()
    d = struct.unpack("<e", raw(found)[:2])[0]
    assert found.d == d
    for at, byte in enumerate(raw(found)[2:]):
        assert found.bytes[at + 2].weights == (at, at + 16)
        assert found.bytes[at + 2].codes == (byte & 15, byte >> 4)
        assert found.decoded[at] == pytest.approx(d * ((byte & 15) - 8))
        assert found.decoded[at + 16] == pytest.approx(d * ((byte >> 4) - 8))


def test_q4_k_means_what_the_gguf_package_reads(weights: torch.Tensor) -> None:
    found = superblock.taken_apart(weights, "q4_k")
    data = np.frombuffer(raw(found), np.uint8)
    assert len(data) == 144
    kind = gguf.GGMLQuantizationType.Q4_K
    np.testing.assert_array_equal(found.decoded.numpy(), gguf.dequantize(data, kind))
    d, dmin = struct.unpack("<ee", raw(found)[:4])
    assert (found.d, found.dmin) == (d, dmin)
    by_hand = found.scales * found.codes - found.minima
    np.testing.assert_allclose(by_hand.numpy(), found.decoded.numpy(), atol=1e-6)
    twelve = raw(found)[4:16]
    for j, (scale, minimum) in enumerate(found.factors):
        if j < 4:  # get_scale_min_k4 of ggml-quants.c
            assert (scale, minimum) == (twelve[j] & 63, twelve[j + 4] & 63)
        else:
            low, high = twelve[j + 4] & 15, twelve[j + 4] >> 4
            assert scale == low | (twelve[j - 4] >> 6) << 4
            assert minimum == high | (twelve[j] >> 6) << 4
        assert found.scales[32 * j] == pytest.approx(d * scale)
        assert found.minima[32 * j] == pytest.approx(dmin * minimum)


def test_every_weight_lies_in_one_byte(weights: torch.Tensor) -> None:
    for kind, size in (("q4_0", 32), ("q4_k", 256)):
        found = superblock.taken_apart(weights, kind)
        held = {
            place: code
            for byte in found.bytes
            for place, code in zip(byte.weights, byte.codes, strict=True)
        }
        assert sorted(held) == list(range(size))
        assert [held[place] for place in range(size)] == found.codes.tolist()
        for byte in found.bytes:
            if byte.field == "qs":
                assert byte.value == byte.codes[0] | byte.codes[1] << 4


def test_formats_beside_each_other() -> None:
    one = material.load()
    found = superblock.compared(one, 5)
    weight = one.weight[:5, :256].numpy()
    for kind in ("q4_0", "q5_0", "q8_0"):
        ggml = gguf.GGMLQuantizationType[kind.upper()]
        back = gguf.dequantize(gguf.quantize(weight, ggml), ggml)
        expected = np.sqrt(np.square(back - weight).mean() / np.square(weight).mean())
        assert found.errors[found.types.index(kind)] == pytest.approx(expected, rel=1e-5)
        size, count = gguf.GGML_QUANT_SIZES[ggml]
        assert found.bits_per_weight[found.types.index(kind)] == 8 * count / size
    errors = dict(zip(found.types, found.errors, strict=True))
    assert errors["q4_k"] < errors["q4_0"]


def test_a_narrow_linear_has_no_super_block() -> None:
    with pytest.raises(ConfigError, match="needs 256"):
        superblock.weights_of(material.random(columns=64), 0)
    with pytest.raises(ConfigError, match="choose one of q4_0, q4_k"):
        superblock.taken_apart(torch.zeros(256), "q9")
