"""Walkthrough 1: one value as bits, in floating point and on a quantization grid.

A floating-point number of a sign, e exponent bits E and m mantissa bits M is

    (-1)^sign * 2^(E - bias) * (1 + M / 2^m),   or (-1)^sign * 2^(1 - bias) * M / 2^m for E = 0

A grid of b bits is  (code - zero) * scale  (`quantlab.grid`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from quantlab.errors import ConfigError
from quantlab.grid import find_grid, from_codes, to_codes
from quantlab.learn.material import Slice


@dataclass(frozen=True)
class Float:
    """A floating-point format: bits of exponent and mantissa (the sign is one), and its types."""

    title: str
    exponent: int
    mantissa: int
    dtype: torch.dtype
    integer: torch.dtype

    @property
    def bits(self) -> int:
        return 1 + self.exponent + self.mantissa


FLOATS: dict[str, Float] = {
    "fp32": Float("FP32", 8, 23, torch.float32, torch.int32),
    "fp16": Float("FP16", 5, 10, torch.float16, torch.int16),
    "bf16": Float("BF16", 8, 7, torch.bfloat16, torch.int16),
    "e4m3": Float("FP8 E4M3", 4, 3, torch.float8_e4m3fn, torch.uint8),
    "e5m2": Float("FP8 E5M2", 5, 2, torch.float8_e5m2, torch.uint8),
}

WIDTHS = (8, 4)
"""Bits of the integer formats."""


@dataclass(frozen=True)
class Pattern:
    """One format's nearest number to a value. `bits` are 0 and 1, the most significant first;
    `fields` the width of its parts in that order (sign, exponent, mantissa; or one code).
    `scale` and `zero` belong to the grid of an integer format."""

    name: str
    title: str
    bits: tuple[int, ...]
    fields: tuple[int, ...]
    value: float
    scale: float | None = None
    zero: int | None = None


def parse(text: str) -> float:
    """The number a person typed. Raises: ConfigError for what is none."""
    try:
        return float(text.strip().replace(",", ".").replace("\N{MINUS SIGN}", "-"))
    except (ValueError, OverflowError):
        raise ConfigError("value: needs a number, for example 0.0123 or -3e-5") from None


def floats(value: float) -> tuple[Pattern, ...]:
    """The value in every floating-point format, rounded to the nearest as torch does."""
    return tuple(float_pattern(name, value) for name in FLOATS)


def float_pattern(name: str, value: float) -> Pattern:
    """`value` in one floating-point format."""
    form = FLOATS[name]
    stored = torch.tensor([value], dtype=torch.float64).to(form.dtype)
    word = int(stored.view(form.integer)[0]) & (2**form.bits - 1)
    fields = (1, form.exponent, form.mantissa)
    return Pattern(name, form.title, spelled(word, form.bits), fields, float(stored[0]))


def float_value(name: str, bits: tuple[int, ...]) -> float:
    """The number that these bits of a floating-point format spell."""
    form = FLOATS[name]
    word = int("".join(map(str, bits)), 2)
    # Signed integers of the same width: the top half of the words is negative.
    signed = word - 2**form.bits if form.integer.is_signed and bits[0] else word
    return float(torch.tensor([signed], dtype=form.integer).view(form.dtype)[0])


def spelled(word: int, count: int) -> tuple[int, ...]:
    return tuple(word >> place & 1 for place in reversed(range(count)))


def integers(value: float, row: Tensor, symmetric: bool) -> tuple[Pattern, ...]:
    """The value as int8 and int4 code, on the grid of a row of weights [columns].

    Symmetric codes are shown in two's complement of code - zero, as they are computed with;
    others as they are stored. A value beyond the grid takes its last code.
    """
    found = []
    for bits in WIDTHS:
        scale, zero = find_grid(row[None], bits, row.shape[0], symmetric=symmetric)
        code = to_codes(torch.tensor([[value]]), scale, zero, bits)
        back = float(from_codes(code, scale, zero)[0, 0])
        shown = int(code - zero) if symmetric else int(code)
        word = shown & (2**bits - 1)
        found.append(
            Pattern(
                f"int{bits}",
                f"INT{bits}",
                spelled(word, bits),
                (bits,),
                back,
                float(scale[0, 0]),
                0 if symmetric else int(zero[0, 0]),
            )
        )
    return tuple(found)


def integer_value(pattern: Pattern, bits: tuple[int, ...]) -> float:
    """The number that these bits mean on the grid of `pattern`."""
    assert pattern.scale is not None
    assert pattern.zero is not None
    word = int("".join(map(str, bits)), 2)
    if pattern.zero == 0 and bits[0]:
        word -= 2 ** len(bits)
    return (word - pattern.zero) * pattern.scale


def flipped(pattern: Pattern, place: int) -> float:
    """The number after bit `place` (0: the most significant) is turned over."""
    bits = tuple(1 - bit if at == place else bit for at, bit in enumerate(pattern.bits))
    if pattern.scale is None:
        return float_value(pattern.name, bits)
    return integer_value(pattern, bits)


@dataclass(frozen=True)
class Precision:
    """Relative distance to the next number, (next - x) / x, of each format at the powers of two
    `at`, where it is largest; None where the format has no number (too large or too small)."""

    at: tuple[float, ...]
    spacing: dict[str, tuple[float | None, ...]]


def precision(row: Tensor) -> Precision:
    """How fine every format is between 2^-30 and 2^20, and the int8 and int4 grid of this row."""
    at = tuple(2.0**exponent for exponent in range(-30, 21))
    spacing: dict[str, tuple[float | None, ...]] = {}
    for name, form in FLOATS.items():
        spacing[name] = tuple(_spacing(form, x) for x in at)
    peak = float(row.abs().max())
    for bits in WIDTHS:
        scale = float(find_grid(row[None], bits, row.shape[0], symmetric=True)[0][0, 0])
        spacing[f"int{bits}"] = tuple(scale / x if scale / 2 <= x <= peak else None for x in at)
    return Precision(at, spacing)


def _spacing(form: Float, x: float) -> float | None:
    stored = torch.tensor([x], dtype=torch.float64).to(form.dtype)
    value = float(stored.double()[0])
    if not math.isfinite(value) or value <= 0:
        return None
    if value > float(torch.finfo(form.dtype).max) or x > float(torch.finfo(form.dtype).max):
        return None
    exponent = max(math.frexp(value)[1] - 1, 2 - 2 ** (form.exponent - 1))
    return 2.0 ** (exponent - form.mantissa) / value


def real_value(one: Slice, row: int, column: int) -> float:
    """A weight of the slice; places beyond its edge are its last ones."""
    rows, columns = one.weight.shape
    return float(one.weight[min(row, rows - 1), min(column, columns - 1)])
