"""Codebook quantization: published values, nearest codes, blocks by hand, double quantization."""

from __future__ import annotations

import dataclasses
import itertools
from statistics import NormalDist

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantlab.codebook import (
    BLOCK_SIZES,
    CODEBOOKS,
    NF4_EDGE,
    CodebookName,
    codebook,
    decode,
    decode_absmax,
    dynamic_codebook,
    encode,
    encode_absmax,
    nearest_codes,
)
from quantlab.errors import ConfigError
from quantlab.packing import CodebookWeight, codebook_weight
from tests.tiny import random

# QLoRA, appendix E.
PUBLISHED_NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip

by_name = pytest.mark.parametrize("name", CODEBOOKS)


# --- the codebooks -----------------------------------------------------------------------------


def test_nf4_is_the_published_data_type() -> None:
    assert codebook("nf4").dtype == torch.float32
    assert codebook("nf4").tolist() == torch.tensor(PUBLISHED_NF4).tolist()


def test_nf4_values_are_evenly_spaced_quantiles() -> None:
    """Back through the normal distribution: steps of equal probability on each side of zero."""
    normal = NormalDist()
    edge = 1 - (1 / 30 + 1 / 32) / 2
    assert pytest.approx(edge, abs=5e-8) == NF4_EDGE
    probabilities = [normal.cdf(v * normal.inv_cdf(edge)) for v in codebook("nf4").tolist()]
    assert probabilities[:8] == pytest.approx(
        [1 - edge + i * (edge - 0.5) / 7 for i in range(8)], abs=1e-6
    )
    assert probabilities[7:] == pytest.approx(
        [0.5 + i * (edge - 0.5) / 8 for i in range(9)], abs=1e-6
    )


def test_fp4_by_hand() -> None:
    """s ee m: the four exponents in the order of their bits, twelve being the largest number."""
    twelfths = [0, 1 / 16, 8, 12, 4, 6, 2, 3]
    assert (codebook("fp4") * 12).tolist() == pytest.approx([*twelfths, *(-v for v in twelfths)])


def test_dynamic_codebook_by_hand() -> None:
    values = dynamic_codebook()
    assert values.shape == (256,)
    assert bool((values.diff() > 0).all())
    # One value below 1e-6, two below 1e-5, and so on to 64 below 1.
    for exponent in range(7):
        low, high = 10.0 ** (exponent - 7), 10.0 ** (exponent - 6)
        inside = values[(values > low) & (values < high)]
        width = (high - low) / 2**exponent
        wanted = [low + (i + 0.5) * width for i in range(2**exponent)]
        assert inside.tolist() == pytest.approx(wanted, rel=1e-5)
        assert (-inside.flip(0)).tolist() == values[(values < -low) & (values > -high)].tolist()
    assert values[127] == 0
    assert values[-1] == 1


# --- codes -------------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    name=st.sampled_from([*CODEBOOKS, "dynamic"]),
    values=st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=40),
)
def test_codes_are_the_nearest(name: str, values: list[float]) -> None:
    """No entry is nearer, but for what float32 borders lose."""
    book = dynamic_codebook() if name == "dynamic" else codebook(name)  # type: ignore[arg-type]
    x = torch.tensor(values)
    distances = (x.double()[:, None] - book.double()).abs()
    codes = nearest_codes(x, book)
    assert codes.dtype == torch.uint8
    chosen = distances.gather(1, codes.long()[:, None])[:, 0]
    assert bool((chosen <= distances.amin(1) + 2**-23).all())


@by_name
def test_every_value_has_its_own_code(name: CodebookName) -> None:
    book = codebook(name)
    for absmax in (1.0, 0.37, 1e-20, 1e20):
        stream = book.repeat(4) * absmax
        codes, peaks = encode(stream, book, 64)
        assert peaks.tolist() == [pytest.approx(absmax)]
        torch.testing.assert_close(decode(codes, peaks, book, 64), stream, rtol=1e-6, atol=0)
        if name == "nf4":
            assert codes.tolist() == [*range(16)] * 4


def test_blocks_by_hand() -> None:
    """Two blocks of 32 and half a one: each value is measured by its own block's largest."""
    stream = torch.zeros(80)
    stream[:4] = torch.tensor([-2.0, 1.2, 0.5, 0.01])  # -1, 0.6, 0.25, 0.005 of the largest
    stream[40] = 1e-30
    stream[64:66] = torch.tensor([3.0, -3.0])
    codes, absmax = encode(stream, codebook("nf4"), 32)
    assert absmax.tolist() == pytest.approx([2.0, 1e-30, 3.0])
    assert codes[:5].tolist() == [0, 13, 10, 7, 7]
    assert (codes[40], codes[64], codes[65], codes[79]) == (15, 15, 0, 7)


@by_name
def test_zeros_stay_zero(name: CodebookName) -> None:
    weight = torch.zeros(4, 64)
    for double_quant in (False, True):
        packed = codebook_weight(weight, name, 64, double_quant=double_quant)
        assert torch.equal(packed.dequantize(), weight)
    weight[2, 5] = 1e-39  # not a normal number: its reciprocal would overflow
    packed = codebook_weight(weight, name, 64, double_quant=False)
    assert bool(torch.isfinite(packed.dequantize()).all())


# --- packed weights ----------------------------------------------------------------------------


def slow_dequantize(weight: CodebookWeight) -> Tensor:
    """One weight at a time, from the bytes."""
    absmax = weight.absmax.tolist()
    if weight.nested_absmax is not None and weight.offset is not None:
        book, mean = dynamic_codebook().tolist(), float(weight.offset)
        nested = weight.nested_absmax.tolist()
        absmax = [book[code] * nested[i // 256] + mean for i, code in enumerate(absmax)]
    values = codebook(weight.codebook).tolist()
    stream = []
    for i in range(weight.rows * weight.columns):
        byte = int(weight.codes[i // 2])
        code = byte >> 4 if i % 2 == 0 else byte & 15
        stream.append(values[code] * absmax[i // weight.block_size])
    return torch.tensor(stream, dtype=torch.float64).view(weight.rows, weight.columns)


@settings(deadline=None, max_examples=40)
@given(
    name=st.sampled_from(CODEBOOKS),
    rows=st.integers(1, 9),
    columns=st.integers(1, 90),
    block_size=st.sampled_from([32, 64]),
    double_quant=st.booleans(),
    data=st.data(),
)
def test_dequantize_is_codebook_times_absmax(
    name: CodebookName,
    rows: int,
    columns: int,
    block_size: int,
    double_quant: bool,
    data: st.DataObject,
) -> None:
    """Also rows alone, though blocks run across rows and the last one is ragged."""
    weight = random(rows, columns, seed=columns)
    packed = codebook_weight(weight, name, block_size, double_quant=double_quant)
    dense = packed.dequantize()
    assert packed.shape == tuple(dense.shape) == (rows, columns)
    assert dense.dtype == torch.float32
    torch.testing.assert_close(dense.double(), slow_dequantize(packed), rtol=1e-6, atol=1e-7)
    first = data.draw(st.integers(0, rows - 1))
    last = data.draw(st.integers(first + 1, rows))
    assert torch.equal(packed.dequantize_rows(first, last), dense[first:last])


@by_name
def test_weights_come_back_within_half_a_gap(name: CodebookName) -> None:
    weight = random(32, 96)
    packed = codebook_weight(weight, name, 64, double_quant=False)
    absmax = weight.reshape(-1, 64).abs().amax(1)
    assert torch.equal(packed.absmax, absmax)
    gap = float(codebook(name).sort().values.diff().max())
    error = (packed.dequantize() - weight).abs().reshape(-1, 64)
    assert bool((error <= (gap / 2 + 1e-6) * absmax[:, None]).all())


def test_double_quantization_moves_a_scale_by_half_a_gap_of_its_codebook() -> None:
    absmax = random(5000).abs() + torch.arange(5000) / 1000
    codes, nested, mean = encode_absmax(absmax)
    assert (codes.dtype, codes.shape, nested.shape, mean.shape) == (
        torch.uint8, (5000,), (20,), (),
    )  # fmt: skip
    assert float(mean) == pytest.approx(float(absmax.double().mean()), rel=1e-6)
    gaps = (0.9 / 64 + 1e-5) / 2  # the widest gaps are 1/64 of [0.1, 1]
    error = (decode_absmax(codes, nested, mean) - absmax).abs()
    reach = nested.repeat_interleave(256)[:5000]
    assert bool((error <= gaps * reach + 1e-6).all())
    assert bool((error > 0).any())
    same = torch.full((300,), 0.25)
    assert torch.equal(decode_absmax(*encode_absmax(same)), same)


def test_double_quantization_saves_what_the_paper_says() -> None:
    """Section 3: 0.5 bits a weight for scales become 0.127, a saving of 0.373."""
    weight = random(512, 1024)
    plain = codebook_weight(weight, "nf4", 64, double_quant=False)
    double = codebook_weight(weight, "nf4", 64, double_quant=True)
    assert plain.bits_per_weight == 4.5
    blocks = 512 * 1024 // 64
    assert double.nbytes == 512 * 1024 // 2 + blocks + 4 * blocks // 256 + 4
    assert double.bits_per_weight == pytest.approx(4.127, abs=5e-4)
    lost, more = ((w.dequantize() - weight).square().mean().sqrt() for w in (plain, double))
    assert lost < more < 1.01 * lost


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_smaller_blocks_lose_less(block_size: int) -> None:
    weight = random(64, 256)
    small, large = (
        float((codebook_weight(weight, "nf4", size, double_quant=False).dequantize() - weight)
              .square().mean())
        for size in (block_size, 2 * block_size)
    )  # fmt: skip
    assert small < large


@pytest.mark.parametrize(
    "changes",
    [
        {"codebook": "nf5"},
        {"block_size": 0},
        {"block_size": 33},
        {"codes": torch.zeros(95, dtype=torch.uint8)},
        {"codes": torch.zeros(96, dtype=torch.int8)},
        {"absmax": torch.ones(4)},
        {"absmax": torch.ones(3, dtype=torch.uint8)},
        {"offset": torch.tensor(1.0)},
        {"nested_absmax": torch.ones(1)},
        {"nested_absmax": torch.ones(1), "offset": torch.tensor(1.0)},
        {"columns": 65},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_parts_that_do_not_fit_are_refused(changes: dict[str, object]) -> None:
    packed = codebook_weight(random(3, 64), "nf4", 64, double_quant=False)
    with pytest.raises(ConfigError, match=r"expected|choose"):
        dataclasses.replace(packed, **changes)


def test_order_of_nibbles() -> None:
    """The first of two codes is in the high half of its byte, as in bitsandbytes' files."""
    weight = torch.tensor(list(itertools.islice(itertools.cycle([1.0, -1.0]), 64))).view(2, 32)
    packed = codebook_weight(weight, "nf4", 64, double_quant=False)
    assert set(packed.codes.tolist()) == {0xF0}
