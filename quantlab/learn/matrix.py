"""Walkthrough 2: absmax, zero-point and LLM.int8() on a matrix product that a person can edit.

    Y = X W^T        X [tokens, channels], W [rows, channels]

Both factors are rounded to 8 bits (or fewer), multiplied as integers and scaled back.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.reference import outlier_linear, split_outliers
from quantlab.errors import ConfigError
from quantlab.grid import find_grid, from_codes, to_codes
from quantlab.learn.material import Slice
from quantlab.methods.llm_int8 import round_rows

TOKENS, CHANNELS, ROWS = 3, 4, 3
LIMIT = 1e6
Cells = tuple[tuple[float, ...], ...]


def real_factors(one: Slice) -> tuple[Cells, Cells]:
    """X and W of a real product: the slice's largest channel, and three quiet ones beside it."""
    peaks = one.inputs.abs().amax(0)
    top = int(peaks.argmax())
    order = peaks.argsort()
    middle = order[len(order) // 2 - 1 : len(order) // 2 + 2]
    picked = sorted({top, *middle.tolist()})[:CHANNELS]
    large = one.inputs[:, top].abs().argsort(descending=True)
    tokens = [int(large[0]), int(large[len(large) // 2]), int(large[-1])]
    x = one.inputs[tokens][:, picked]
    w = one.weight[:ROWS][:, picked]
    return cells(x), cells(w)


def cells(values: Tensor) -> Cells:
    """A matrix as numbers of four digits, which is what the page shows and computes with."""
    return tuple(tuple(float(f"{value:.4g}") for value in row) for row in values.tolist())


def edited(matrix: Cells, row: int, column: int, text: str) -> Cells:
    """The matrix with one cell typed anew. Raises: ConfigError."""
    try:
        value = float(text.strip().replace(",", ".").replace("\N{MINUS SIGN}", "-"))
    except ValueError:
        value = math.nan
    if not abs(value) <= LIMIT:
        raise ConfigError(f"cell: needs a number between {-LIMIT:,.0f} and {LIMIT:,.0f}")
    if not (0 <= row < len(matrix) and 0 <= column < len(matrix[0])):
        raise ConfigError("cell: there is no such place")
    changed = [list(line) for line in matrix]
    changed[row][column] = value
    return tuple(tuple(line) for line in changed)


@dataclass(frozen=True)
class Factor:
    """A rounded matrix: integer codes (zero-point taken off where symmetric), its step and
    zero-point, and what they stand for."""

    codes: Cells
    scale: float
    zero: int
    restored: Cells


@dataclass(frozen=True)
class Product:
    """Y by one scheme, its difference from the exact one, and the root mean square of that as a
    share of the exact Y's. `x` and `w` are the rounded factors (None where there is a grid for
    each row, as in LLM.int8()); `outliers` the channels kept in 16 bits."""

    scheme: str
    exact: Cells
    result: Cells
    difference: Cells
    error: float
    x: Factor | None
    w: Factor | None
    outliers: tuple[int, ...] = ()


SCHEMES = ("absmax", "zero_point", "llm_int8")


def product(x: Cells, w: Cells, scheme: str, bits: int = 8, threshold: float = 6.0) -> Product:
    """X W^T by 'absmax' or 'zero_point' (one grid a matrix) or 'llm_int8' (8 bits, one a row)."""
    left, right = torch.tensor(x), torch.tensor(w)
    exact = left.double() @ right.double().t()
    if scheme == "llm_int8":
        packed = round_rows(right, threshold)
        got = outlier_linear(left, packed.codes, packed.scales, None, threshold).double()
        columns = split_outliers(left, threshold)[2] if threshold > 0 else torch.empty(0)
        return _made(scheme, exact, got, None, None, [int(c) for c in columns])
    if scheme not in SCHEMES:
        raise ConfigError(f"scheme: {scheme!r}; choose one of {', '.join(SCHEMES)}")
    first = _factor(left, bits, scheme == "absmax")
    second = _factor(right, bits, scheme == "absmax")
    got = torch.tensor(first.restored).double() @ torch.tensor(second.restored).double().t()
    return _made(scheme, exact, got, first, second, [])


def _factor(values: Tensor, bits: int, symmetric: bool) -> Factor:
    scale, zero = find_grid(values.reshape(1, -1), bits, values.numel(), symmetric=symmetric)
    codes = to_codes(values, scale, zero, bits)
    shown = codes - zero if symmetric else codes
    restored = from_codes(codes, scale, zero)
    return Factor(
        _plain(shown),
        float(scale[0, 0]),
        0 if symmetric else int(zero[0, 0]),
        _plain(restored),
    )


def _made(
    scheme: str,
    exact: Tensor,
    got: Tensor,
    x: Factor | None,
    w: Factor | None,
    outliers: Sequence[int],
) -> Product:
    difference = got - exact
    size = float(exact.square().mean().sqrt())
    error = float(difference.square().mean().sqrt()) / size if size else 0.0
    return Product(
        scheme, _plain(exact), _plain(got), _plain(difference), error, x, w, tuple(outliers)
    )


def _plain(values: Tensor) -> Cells:
    return tuple(tuple(row) for row in values.tolist())
