"""How the formats keep a linear, against the peers' loops and Python's integers."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantlab.errors import ConfigError
from quantlab.export.base import CheckpointFormat, Layer, Linear, Stored, check_fields
from quantlab.export.formats import FORMATS
from quantlab.export.words import from_words, to_words
from quantlab.layers import QuantLinear
from quantlab.models.quantization import FormatName, Quantization, Scheme
from quantlab.packing import (
    Activation,
    AffineWeight,
    PackedWeight,
    PermutedWeight,
    affine,
    describe,
    restore,
)
from tests.tiny import random

DTYPES = {
    torch.int32: "I32",
    torch.int64: "I64",
    torch.int8: "I8",
    torch.float16: "F16",
    torch.float32: "F32",
}


def weight_of(
    rows: int,
    columns: int,
    bits: int,
    group: int,
    *,
    symmetric: bool = False,
    seed: int = 0,
    **more: Any,
) -> AffineWeight:
    """Codes and zero-points over their whole range, random scales."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(2**bits, (rows, columns), generator=generator)
    groups = -(-columns // group)
    scales = torch.rand(rows, groups, generator=generator) + 0.01
    zeros = torch.randint(2**bits, (rows, groups), generator=generator)
    return affine(codes, scales, None if symmetric else zeros, bits, group, **more)


def quantization(
    name: FormatName, weight: AffineWeight, *, offset: int = 0, **more: Any
) -> Quantization:
    group = None if weight.group_size >= weight.columns else weight.group_size
    kind = None if weight.activation is None else weight.activation.kind
    one = weight.scales.shape[0] == 1 < weight.shape[0]
    scheme = Scheme(weight.bits, group, weight.symmetric, one, kind, int8=kind is not None)
    return Quantization(name, (dataclasses.replace(scheme, **more),), offset)


def decoded(
    format: CheckpointFormat, tensors: dict[str, Tensor], said: Quantization, shape: Any
) -> PackedWeight:
    stored = {
        field: Stored(DTYPES[tensor.dtype], tuple(tensor.shape))
        for field, tensor in tensors.items()
    }
    linear = Linear("layer", shape, stored)
    scheme = format.scheme(said, linear)
    fields = format.fields(scheme, linear)
    check_fields("layer", fields, stored)
    return format.decode(said, Layer(scheme, shape, tuple(fields), bias=False), tensors)


def same(first: PackedWeight, second: PackedWeight) -> None:
    assert describe(first) == describe(second)
    kept = second.tensors()
    for name, tensor in first.tensors().items():
        assert tensor.dtype == kept[name].dtype
        assert torch.equal(tensor, kept[name]), name
    assert first.tensors().keys() == kept.keys()


# --- words -------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 8), st.integers(1, 70), st.integers(1, 3), st.integers(0, 999))
def test_words_are_one_stream_of_bits(bits: int, count: int, rows: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(2**bits, (rows, count), generator=generator).to(torch.uint8)
    words = to_words(codes, bits)
    for row, found in zip(codes.tolist(), words.tolist(), strict=True):
        stream = sum(code << (bits * index) for index, code in enumerate(row))
        assert sum((word % 2**32) << (32 * index) for index, word in enumerate(found)) == stream
    assert torch.equal(from_words(words, bits, count), codes)


# --- what is written comes back ----------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from([2, 3, 4, 8]),
    st.sampled_from([1, 2]),
    st.sampled_from([32, 96]),
    st.sampled_from([16, 32, 96]),
    st.booleans(),
    st.integers(0, 999),
)
def test_gptq_comes_back(
    bits: int, tall: int, columns: int, group: int, symmetric: bool, seed: int
) -> None:
    weight = weight_of(
        32 * tall, columns, bits, min(group, columns), symmetric=symmetric, seed=seed
    )
    format = FORMATS["gptq"]
    said = quantization("gptq", weight, offset=int(symmetric))
    assert format.settings({"a": weight}, [], [])["checkpoint_format"] == (
        "gptq" if symmetric else "gptq_v2"
    )
    same(decoded(format, format.encode(weight), said, weight.shape), weight)


@settings(max_examples=15, deadline=None)
@given(st.sampled_from([8, 40]), st.sampled_from([32, 64]), st.integers(0, 999))
def test_awq_comes_back(rows: int, columns: int, seed: int) -> None:
    weight = weight_of(rows, columns, 4, 32, seed=seed)
    format = FORMATS["awq"]
    same(decoded(format, format.encode(weight), quantization("awq", weight), weight.shape), weight)


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from([2, 3, 4, 5, 6, 7, 8]),
    st.sampled_from([32, 64]),
    st.sampled_from([16, 32, 64]),
    st.booleans(),
    st.integers(0, 999),
)
def test_packed_compressed_tensors_come_back(
    bits: int, columns: int, group: int, symmetric: bool, seed: int
) -> None:
    weight = weight_of(32, columns, bits, min(group, columns), symmetric=symmetric, seed=seed)
    format = FORMATS["compressed-tensors"]
    said = quantization("compressed-tensors", weight)
    same(decoded(format, format.encode(weight), said, weight.shape), weight)


@pytest.mark.parametrize("one_scale", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(
    "activation",
    [Activation("token"), Activation("dynamic_token"), Activation("tensor", 0.0123, 3)],
    ids=lambda a: a.kind,
)
def test_int8_compressed_tensors_come_back(
    activation: Activation, symmetric: bool, one_scale: bool
) -> None:
    weight = weight_of(24, 40, 8, 40, symmetric=symmetric, scale_dtype=torch.float32)
    step = float(torch.tensor(activation.scale))  # as float32 keeps it
    activation = dataclasses.replace(activation, scale=step)
    if one_scale:
        zeros = None if weight.zeros is None else weight.zeros[:1]
        weight = dataclasses.replace(weight, scales=weight.scales[:1], zeros=zeros)
    weight = dataclasses.replace(weight, activation=activation)
    format = FORMATS["compressed-tensors"]
    said = quantization("compressed-tensors", weight)
    same(decoded(format, format.encode(weight), said, weight.shape), weight)


# --- against loops as the peers write them -----------------------------------------------------


def test_gptq_packs_as_autogptq_does() -> None:
    """4 bits: word i of an output holds inputs 8 i to 8 i + 7, the first in the lowest bits; zeros
    the same along the outputs, minus 1."""
    weight = weight_of(8, 16, 4, 8, symmetric=True)
    tensors = FORMATS["gptq"].encode(weight)
    codes = weight.unpacked()[0].tolist()
    for out in range(8):
        for word in range(2):
            value = sum(codes[out][8 * word + i] << (4 * i) for i in range(8))
            assert int(tensors["qweight"][word, out]) % 2**32 == value
    assert tensors["qzeros"].tolist() == [[0x77777777], [0x77777777]]
    assert tensors["g_idx"].tolist() == [0] * 8 + [1] * 8
    assert torch.equal(tensors["scales"], weight.scales.T)


def test_awq_packs_as_autoawq_does() -> None:
    """Its loop, from modules/linear/gemm.py: nibble i of word c is output 8 c + order[i]."""
    weight = weight_of(16, 32, 4, 32)
    tensors = FORMATS["awq"].encode(weight)
    codes, _, zeros = weight.unpacked()
    for name, values in (("qweight", codes.T), ("qzeros", zeros.T.to(torch.int64))):
        for row in range(values.shape[0]):
            for column in range(2):
                word = 0
                for i, order in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
                    word |= int(values[row, 8 * column + order]) << (4 * i)
                assert int(tensors[name][row, column]) % 2**32 == word


def test_version_1_of_gptq_adds_one_to_whole_words() -> None:
    """A zero-point of 0 borrows from its neighbour when GPTQModel writes it, and gives it back."""
    weight = weight_of(32, 32, 4, 32)
    tensors = FORMATS["gptq"].encode(weight)
    tensors["qzeros"] = tensors["qzeros"] - 0x11111111
    assert int(weight.unpacked()[2].min()) == 0
    said = quantization("gptq", weight, offset=1)
    same(decoded(FORMATS["gptq"], tensors, said, weight.shape), weight)


# --- act-order ---------------------------------------------------------------------------------


def act_ordered(index: Tensor, bits: int = 4) -> tuple[PackedWeight, Tensor]:
    """(what is read of a file with this g_idx, the weight that its definition gives)."""
    weight = weight_of(32, 64, bits, 16)
    tensors = FORMATS["gptq"].encode(weight) | {"g_idx": index.to(torch.int32)}
    codes, scales, zeros = weight.unpacked()
    dense = (codes.float() - zeros[:, index]) * scales[:, index]
    said = quantization("gptq", weight)
    return decoded(FORMATS["gptq"], tensors, said, weight.shape), dense


def test_columns_out_of_order_are_read_exactly() -> None:
    index = (torch.arange(64) // 16)[torch.randperm(64, generator=torch.Generator().manual_seed(3))]
    read, dense = act_ordered(index)
    assert isinstance(read, PermutedWeight)
    assert torch.equal(read.dequantize(), dense)
    same(restore(describe(read), read.tensors()), read)


def test_groups_in_another_order_need_no_permutation() -> None:
    read, dense = act_ordered(torch.tensor([2, 0, 3, 1]).repeat_interleave(16))
    assert isinstance(read, AffineWeight)
    assert torch.equal(read.dequantize(), dense)


@pytest.mark.parametrize("index", [torch.arange(64) % 4 // 3, torch.arange(64) // 16 - 1])
def test_a_g_idx_that_cannot_be_is_refused(index: Tensor) -> None:
    with pytest.raises(ConfigError, match="g_idx"):
        act_ordered(index)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_layer_of_permuted_columns_runs_and_keeps_its_weight(dtype: torch.dtype) -> None:
    index = (torch.arange(64) // 16)[torch.randperm(64, generator=torch.Generator().manual_seed(3))]
    read, dense = act_ordered(index)
    bias = random(32, seed=1).to(dtype)
    layer = QuantLinear(read, bias, dtype=dtype)
    same(layer.weight_packed, read)
    same(layer.__reduce__()[0](*layer.__reduce__()[1]).weight_packed, read)
    x = random(3, 64, seed=2).to(dtype)
    wanted = x.double() @ dense.double().T + bias.double()
    # Inputs are exact; weights, products' sums and the output are rounded once each.
    unit = {torch.bfloat16: 2.0**-8, torch.float32: 2.0**-23}[dtype]
    bound = 3 * unit * (x.double().abs() @ dense.double().abs().T + bias.double().abs())
    if dtype == torch.float32:
        bound = bound * 64
    assert bool(((layer(x).double() - wanted).abs() <= bound).all())


@pytest.mark.parametrize("order", [[0, 1, 1], [0, 1, 3], [-1, 0, 1]])
def test_an_order_is_a_permutation(order: list[int]) -> None:
    inner = weight_of(8, 3, 4, 3)
    with pytest.raises(ConfigError, match="every column once"):
        PermutedWeight(inner, torch.tensor(order, dtype=torch.int32))
