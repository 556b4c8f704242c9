"""Bit packing and packed weights: bytes laid out by hand, round trips, and files' descriptions."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantlab.errors import ConfigError
from quantlab.grid import find_grid, spread, to_codes
from quantlab.packing import (
    Activation,
    AffineWeight,
    GGMLWeight,
    OutlierWeight,
    PackedWeight,
    affine,
    codebook_weight,
    describe,
    pack_bits,
    packed_width,
    restore,
    unpack_bits,
)


def random_codes(rows: int, count: int, bits: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, (rows, count), generator=generator, dtype=torch.uint8)


# --- bits --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bits", "codes", "expected"),
    [
        # A row is a little-endian bit stream: the first code sits in the lowest bits.
        (1, [1, 0, 0, 0, 0, 0, 0, 1, 1], [0b10000001, 0b1]),
        (2, [3, 0, 1, 2, 1], [0b10_01_00_11, 0b01]),
        (3, [1, 2, 3, 4, 5, 6, 7, 0], [0b11_010_001, 0b0_101_100_0, 0b000_111_11]),
        (4, [1, 15, 8], [0xF1, 0x08]),
        (5, [31, 0, 21], [0b000_11111, 0b0_10101_00]),
        (6, [63, 1, 32, 5], [0b01_111111, 0b0000_0000, 0b000101_10]),
        (7, [127, 1], [0b1_1111111, 0b00000000]),
        (8, [7, 255], [7, 255]),
    ],
)
def test_bytes_by_hand(bits: int, codes: list[int], expected: list[int]) -> None:
    packed = pack_bits(torch.tensor([codes]), bits)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == [expected]


@settings(deadline=None)
@given(
    bits=st.integers(1, 8),
    rows=st.integers(1, 4),
    count=st.integers(1, 70),
    seed=st.integers(0, 99),
)
def test_round_trip(bits: int, rows: int, count: int, seed: int) -> None:
    codes = random_codes(rows, count, bits, seed)
    packed = pack_bits(codes, bits)
    assert packed.shape == (rows, packed_width(count, bits))
    assert packed.shape[1] == -(-count * bits // 8)
    assert torch.equal(unpack_bits(packed, bits, count), codes)


@settings(deadline=None)
@given(bits=st.integers(1, 8), count=st.integers(1, 70), seed=st.integers(0, 99))
def test_a_row_is_one_bit_stream(bits: int, count: int, seed: int) -> None:
    """Against python's own big integers; padding bits are 0."""
    codes = random_codes(1, count, bits, seed)
    stream = sum(code << (i * bits) for i, code in enumerate(codes[0].tolist()))
    packed = pack_bits(codes, bits)[0]
    assert int.from_bytes(bytes(packed.tolist()), "little") == stream


def test_packing_accepts_float_codes() -> None:
    assert pack_bits(torch.tensor([[1.0, 15.0]]), 4).tolist() == [[0xF1]]


@pytest.mark.parametrize("bits", [0, 9, -1])
def test_other_bits_are_refused(bits: int) -> None:
    codes = torch.zeros(1, 8, dtype=torch.uint8)
    with pytest.raises(ConfigError, match=f"bits={bits}"):
        pack_bits(codes, bits)
    with pytest.raises(ConfigError, match=f"bits={bits}"):
        unpack_bits(codes, bits, 8)


# --- affine weights ----------------------------------------------------------------------------


def random_affine(
    rows: int,
    columns: int,
    bits: int,
    group_size: int,
    *,
    symmetric: bool,
    shared: bool = False,
    seed: int = 0,
    activation: Activation | None = None,
) -> tuple[AffineWeight, Tensor, Tensor, Tensor]:
    """(weight, codes, scales, zeros) with scales that float16 holds exactly."""
    groups = -(-columns // group_size)
    grids = (1 if shared else rows, groups)
    generator = torch.Generator().manual_seed(seed)
    codes = random_codes(rows, columns, bits, seed)
    scales = torch.rand(grids, generator=generator).half().float() + 2**-6
    scales = scales.half().float()
    zeros = torch.randint(0, 2**bits, grids, generator=generator).float()
    if symmetric:
        zeros = torch.full(grids, float(2 ** (bits - 1)))
    weight = affine(
        codes, scales, None if symmetric else zeros, bits, group_size, activation=activation
    )
    return weight, codes, scales, zeros


@settings(deadline=None)
@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 60),
    bits=st.integers(1, 8),
    group_size=st.integers(1, 70),
    symmetric=st.booleans(),
    shared=st.booleans(),
    seed=st.integers(0, 99),
)
def test_dequantize_is_code_minus_zero_times_scale(
    rows: int, columns: int, bits: int, group_size: int, symmetric: bool, shared: bool, seed: int
) -> None:
    """One entry at a time, ragged last group included."""
    weight, codes, scales, zeros = random_affine(
        rows, columns, bits, group_size, symmetric=symmetric, shared=shared, seed=seed
    )
    assert weight.shape == (rows, columns)
    assert isinstance(weight, PackedWeight)
    dense = weight.dequantize()
    assert dense.dtype == torch.float32
    for row in range(rows):
        grid = 0 if shared else row
        for column in range(columns):
            group = column // group_size
            want = (codes[row, column] - zeros[grid, group]) * scales[grid, group]
            assert dense[row, column] == want


@settings(deadline=None)
@given(
    rows=st.integers(1, 4),
    columns=st.integers(1, 50),
    bits=st.integers(2, 8),
    group_size=st.integers(1, 60),
    symmetric=st.booleans(),
    seed=st.integers(0, 99),
)
def test_weights_come_back_within_half_a_step(
    rows: int, columns: int, bits: int, group_size: int, symmetric: bool, seed: int
) -> None:
    """find_grid -> to_codes -> affine -> dequantize, as methods use them."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    scale, zero = find_grid(
        weight, bits, group_size, symmetric=symmetric, scale_dtype=torch.float32
    )
    wide_scale, wide_zero = spread(scale, group_size, columns), spread(zero, group_size, columns)
    packed = affine(
        to_codes(weight, wide_scale, wide_zero, bits), scale, None if symmetric else zero, bits,
        group_size, scale_dtype=torch.float32,
    )  # fmt: skip
    error = (packed.dequantize() - weight).abs()
    # The rounded zero-point moves an asymmetric grid by up to half a step: a full one at its ends.
    reach = 0.5 if symmetric else 1.0
    assert bool((error <= reach * wide_scale * (1 + 1e-4)).all())


def test_size_counts_scales_and_zeros() -> None:
    """64 columns of 3 bits in two groups: 24 bytes of codes, 2 float16, 6 bits of zeros a row."""
    weight, *_ = random_affine(4, 64, 3, 32, symmetric=False)
    assert weight.nbytes == 4 * (24 + 4 + 1)
    assert weight.bits_per_weight == pytest.approx(8 * 29 / 64)
    symmetric, *_ = random_affine(4, 64, 3, 32, symmetric=True)
    assert symmetric.nbytes == 4 * (24 + 4)
    assert symmetric.symmetric
    assert not weight.symmetric


@pytest.mark.parametrize(
    "changes",
    [
        {"codes": torch.zeros(3, 15, dtype=torch.uint8)},
        {"codes": torch.zeros(3, 16, dtype=torch.int8)},
        {"scales": torch.ones(3, 3)},
        {"scales": torch.ones(2, 2)},
        {"group_size": 0},
        {"columns": 40},
        {"bits": 5},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_parts_that_do_not_fit_are_refused(changes: dict[str, object]) -> None:
    weight, *_ = random_affine(3, 32, 4, 16, symmetric=True)
    with pytest.raises(ConfigError, match="expected"):
        dataclasses.replace(weight, **changes)


# --- descriptions ------------------------------------------------------------------------------

WEIGHTS = {
    "asymmetric": random_affine(3, 40, 3, 16, symmetric=False)[0],
    "symmetric": random_affine(3, 40, 5, 40, symmetric=True)[0],
    "per tensor": random_affine(3, 40, 8, 40, symmetric=True, shared=True)[0],
    "static w8a8": random_affine(
        3, 40, 8, 40, symmetric=True, activation=Activation("tensor", 0.125, 130)
    )[0],
    "dynamic w8a8": random_affine(3, 40, 8, 40, symmetric=True, activation=Activation("token"))[0],
    "nf4": codebook_weight(torch.linspace(-1, 2, 120).view(3, 40), "nf4", 64, double_quant=False),
    "nested fp4": codebook_weight(
        torch.linspace(-1, 2, 999).view(27, 37), "fp4", 32, double_quant=True
    ),
    "outlier": OutlierWeight(torch.arange(-6, 6, dtype=torch.int8).view(3, 4), torch.rand(3), 4.5),
    "ggml": GGMLWeight(torch.arange(34, dtype=torch.uint8).reshape(1, 34), "q8_0", 32),
}


@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS)
def test_description_survives_json(weight: PackedWeight) -> None:
    written = json.loads(json.dumps(describe(weight)))
    again = restore(written, {name: tensor.clone() for name, tensor in weight.tensors().items()})
    assert type(again) is type(weight)
    assert describe(again) == describe(weight)
    assert again.tensors().keys() == weight.tensors().keys()
    for name, tensor in weight.tensors().items():
        assert torch.equal(again.tensors()[name], tensor)
    assert torch.equal(again.dequantize(), weight.dequantize())
    assert getattr(again, "activation", None) == getattr(weight, "activation", None)


def test_outlier_weights_by_hand() -> None:
    codes = torch.tensor([[-127, 0, 5], [1, 2, 127]], dtype=torch.int8)
    weight = OutlierWeight(codes, torch.tensor([0.5, 2.0]))
    assert weight.dequantize().tolist() == [[-63.5, 0, 2.5], [2, 4, 254]]
    assert weight.shape == (2, 3)
    assert weight.nbytes == 6 + 8
    assert weight.bits_per_weight == pytest.approx(8 * 14 / 6)
    assert isinstance(weight, PackedWeight)


@pytest.mark.parametrize(
    "changes",
    [
        {"codes": torch.zeros(3, 4, dtype=torch.uint8)},
        {"codes": torch.zeros(12, dtype=torch.int8)},
        {"codes": torch.zeros(4, 4, dtype=torch.int8)},
        {"scales": torch.ones(3, 1)},
        {"scales": torch.ones(3).half()},
        {"threshold": -1.0},
        {"threshold": float("inf")},
    ],
)
def test_outlier_parts_that_do_not_fit_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="expected"):
        dataclasses.replace(WEIGHTS["outlier"], **changes)


@pytest.mark.parametrize("lost", ["codes", "scales", "bits", "group_size", "columns"])
def test_a_missing_part_is_refused(lost: str) -> None:
    weight = WEIGHTS["asymmetric"]
    description = {key: value for key, value in describe(weight).items() if key != lost}
    tensors = {name: tensor for name, tensor in weight.tensors().items() if name != lost}
    with pytest.raises(ConfigError, match=lost):
        restore(description, tensors)


def test_unknown_parts_are_refused() -> None:
    weight = WEIGHTS["symmetric"]
    with pytest.raises(ConfigError, match="colour"):
        restore(describe(weight) | {"colour": "red"}, weight.tensors())
    with pytest.raises(ConfigError, match="unknown representation"):
        restore(describe(weight) | {"representation": "nf5"}, weight.tensors())
    with pytest.raises(ConfigError, match="unknown representation"):
        restore({}, weight.tensors())
