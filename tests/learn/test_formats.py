"""Number formats against struct, and against tables spelled out by the formats' own definitions."""

from __future__ import annotations

import math
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantlab.errors import ConfigError
from quantlab.learn import formats, material

FIELDS = {"e4m3": (4, 3, 7), "e5m2": (5, 2, 15)}


def spelled(word: int, count: int) -> tuple[int, ...]:
    return tuple(int(bit) for bit in f"{word:0{count}b}")


def packed(kind: str, value: float, count: int) -> tuple[int, ...]:
    return spelled(int.from_bytes(struct.pack(kind, value), "big"), count)


def eight_bits(name: str) -> list[float]:
    """What each of the 256 patterns means, by the definition of the format (OCP 8-bit, 2023)."""
    exponent_bits, mantissa_bits, bias = FIELDS[name]
    values = []
    for word in range(256):
        sign = -1.0 if word >> 7 else 1.0
        exponent = word >> mantissa_bits & (2**exponent_bits - 1)
        mantissa = word & (2**mantissa_bits - 1)
        top = exponent == 2**exponent_bits - 1
        if name == "e5m2" and top:
            values.append(math.nan if mantissa else sign * math.inf)
        elif name == "e4m3" and top and mantissa == 7:
            values.append(math.nan)
        elif exponent:
            scale = 2.0 ** (exponent - bias)
            values.append(sign * scale * (1 + mantissa / 2**mantissa_bits))
        else:
            values.append(sign * 2.0 ** (1 - bias) * mantissa / 2**mantissa_bits)
    return values


@given(st.floats(-60000, 60000, allow_nan=False))
def test_bits_are_those_of_struct(value: float) -> None:
    found = {pattern.name: pattern for pattern in formats.floats(value)}
    assert found["fp32"].bits == packed(">f", value, 32)
    assert found["fp16"].bits == packed(">e", value, 16)
    # bfloat16: the upper half of a float32, rounded to the nearest even.
    word = int.from_bytes(struct.pack(">f", value), "big")
    upper = (word + 0x7FFF + (word >> 16 & 1)) >> 16
    assert found["bf16"].bits == spelled(upper, 16)


@pytest.mark.parametrize("name", list(FIELDS))
def test_every_8_bit_float_means_what_the_format_says(name: str) -> None:
    for word, value in enumerate(eight_bits(name)):
        got = formats.float_value(name, spelled(word, 8))
        assert got == value or (math.isnan(got) and math.isnan(value)), word


@pytest.mark.parametrize("name", list(FIELDS))
@given(value=st.floats(-400, 400, allow_nan=False))
def test_8_bit_floats_are_the_nearest(name: str, value: float) -> None:
    pattern = formats.float_pattern(name, value)
    least = min(abs(one - value) for one in eight_bits(name) if math.isfinite(one))
    assert abs(pattern.value - value) == least
    assert formats.float_value(name, pattern.bits) == pattern.value


@given(st.floats(-1e30, 1e30, allow_nan=False), st.sampled_from(list(formats.FLOATS)), st.data())
def test_a_bit_flipped_twice_is_back(value: float, name: str, data: st.DataObject) -> None:
    pattern = formats.float_pattern(name, value)
    place = data.draw(st.integers(0, len(pattern.bits) - 1))
    once = tuple(1 - bit if at == place else bit for at, bit in enumerate(pattern.bits))
    flipped = formats.flipped(pattern, place)
    expected = formats.float_value(name, once)
    assert flipped == expected or (math.isnan(flipped) and math.isnan(expected))


def test_the_top_bit_is_the_sign_and_the_next_ones_powers_of_two() -> None:
    half = formats.float_pattern("fp16", 1.0)
    assert half.fields == (1, 5, 10)
    assert formats.flipped(half, 0) == -1.0
    assert formats.flipped(half, 5) == 0.5  # the exponent's last bit: 15 becomes 14
    assert formats.flipped(half, 6) == 1.5  # the mantissa's first bit
    assert formats.flipped(half, 15) == 1 + 2.0**-10


@pytest.mark.parametrize("symmetric", [True, False])
def test_integer_codes_are_those_of_the_rows_grid(symmetric: bool) -> None:
    row = torch.tensor([-0.3, 0.02, 0.11, 0.7])
    for value in (-0.3, 0.0, 0.11, 0.699, 5.0):
        for pattern, bits in zip(formats.integers(value, row, symmetric), (8, 4), strict=True):
            if symmetric:
                step, zero, low, high = (
                    0.7 / (2 ** (bits - 1) - 1),
                    0,
                    -(2 ** (bits - 1)),
                    2 ** (bits - 1) - 1,
                )
            else:
                step = 1.0 / (2**bits - 1)
                zero, low, high = round(0.3 / step), 0, 2**bits - 1
            code = min(max(round(value / step) + zero, low), high)
            assert pattern.scale == pytest.approx(step, rel=1e-6)
            assert pattern.zero == zero
            assert pattern.bits == spelled(code % 2**bits, bits)
            assert pattern.value == pytest.approx((code - zero) * step, rel=1e-6, abs=1e-9)
            for place in range(bits):
                word = int("".join(map(str, pattern.bits)), 2) ^ 1 << bits - 1 - place
                turned = word - 2**bits if symmetric and word >> bits - 1 else word
                expected = (turned - zero) * step
                assert formats.flipped(pattern, place) == pytest.approx(expected, abs=1e-6)


def test_precision_is_the_distance_to_the_next_number() -> None:
    row = material.load().weight[0]
    found = formats.precision(row)
    for name in FIELDS:
        table = sorted(v for v in eight_bits(name) if math.isfinite(v) and v > 0)
        for at, spacing in zip(found.at, found.spacing[name], strict=True):
            near = min(table, key=lambda v: abs(v - at))
            if spacing is None:
                assert at > table[-1] or at < table[0]
                continue
            above = [v for v in table if v > near]
            if above and near == at:
                assert spacing == pytest.approx((above[0] - near) / near, rel=1e-12)
    halves = dict(zip(found.at, found.spacing["fp16"], strict=True))
    assert halves[1.0] == 2.0**-10
    assert halves[2.0**20] is None
    step = float(row.abs().max()) / 127
    eights = dict(zip(found.at, found.spacing["int8"], strict=True))
    assert eights[2.0**-4] == pytest.approx(step / 2.0**-4, rel=1e-6)
    assert eights[1.0] is None  # beyond the row's largest weight


@pytest.mark.parametrize("text", ["", "abc", "<script>alert(1)</script>", "1 2", "0x10"])
def test_what_is_no_number_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="needs a number"):
        formats.parse(text)


def test_numbers_as_people_write_them() -> None:
    assert formats.parse(" 1,5 ") == 1.5
    assert formats.parse("\N{MINUS SIGN}3e-2") == -0.03
