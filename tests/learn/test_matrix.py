"""The editable product, against loops in plain Python."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantlab.errors import ConfigError
from quantlab.learn import material, matrix
from quantlab.learn.matrix import Cells

numbers = st.floats(-100, 100, allow_nan=False).map(lambda value: round(value, 2))


def matrices(rows: int) -> st.SearchStrategy[Cells]:
    return st.tuples(*[st.tuples(*[numbers] * 4)] * rows)


def exact(x: Cells, w: Cells) -> list[list[float]]:
    return [[math.fsum(a * b for a, b in zip(r, c, strict=True)) for c in w] for r in x]


def check_factor(found: matrix.Factor, values: Cells, bits: int, symmetric: bool) -> None:
    """The grid is the one a person would find, and every code the nearest on it."""
    flat = [v for row in values for v in row]
    if symmetric:
        step, zero = max(map(abs, flat)) / (2 ** (bits - 1) - 1), 0.0
        lowest, highest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    else:
        low, high = min(*flat, 0.0), max(*flat, 0.0)
        step = (high - low) / (2**bits - 1)
        zero = -low / step if step else 0.0
        lowest, highest = 0, 2**bits - 1
    assert found.scale == pytest.approx(max(step, 1e-12), rel=1e-6)
    assert abs(found.zero - zero) <= 0.501
    rows = zip(values, found.codes, found.restored, strict=True)
    for value, code, back in ((*v,) for row in rows for v in zip(*row, strict=True)):
        wanted = min(max(value / found.scale + found.zero, lowest), highest)
        assert code == int(code)
        assert abs(code - wanted) <= 0.501
        assert back == pytest.approx((code - found.zero) * found.scale, rel=1e-5)


@given(matrices(3), matrices(3), st.integers(3, 8), st.booleans())
def test_one_grid_a_matrix(x: Cells, w: Cells, bits: int, symmetric: bool) -> None:
    found = matrix.product(x, w, "absmax" if symmetric else "zero_point", bits)
    assert found.x is not None
    assert found.w is not None
    check_factor(found.x, x, bits, symmetric)
    check_factor(found.w, w, bits, symmetric)
    for name, factors in (("exact", (x, w)), ("result", (found.x.restored, found.w.restored))):
        for row, line in zip(exact(*factors), getattr(found, name), strict=True):
            # Numbers of four digits are not exact in float32: 6e-8 of each factor.
            assert line == pytest.approx(row, rel=1e-5, abs=1e-2)
    squares = [
        g - e
        for r, s in zip(found.result, found.exact, strict=True)
        for g, e in zip(r, s, strict=True)
    ]
    assert [d for row in found.difference for d in row] == pytest.approx(squares)


def test_codes_and_error_of_a_product_worked_by_hand() -> None:
    x = ((1.0, -2.0), (0.5, 4.0))
    w = ((2.0, 1.0),)
    found = matrix.product(x, w, "absmax", 3)  # codes -3 to 3
    assert found.x is not None
    assert found.w is not None
    assert found.x.scale == pytest.approx(4 / 3)
    assert found.x.codes == ((1, -2), (0, 3))
    assert found.w.codes == ((3, 2),)
    step = 4 / 3 * 2 / 3
    assert found.result[0][0] == pytest.approx(step * (1 * 3 - 2 * 2))
    assert found.result[1][0] == pytest.approx(step * (0 * 3 + 3 * 2))
    assert found.exact == ((0.0,), (5.0,))
    off = (step * -1, step * 6 - 5)
    expected = math.sqrt((off[0] ** 2 + off[1] ** 2) / 2) / math.sqrt(25 / 2)
    assert found.error == pytest.approx(expected)


def test_outlier_channels_are_multiplied_apart() -> None:
    x, w = ((0.3, 50.0, -0.7),), ((0.21, 0.4, 0.013), (-0.5, 0.3, 0.1))
    found = matrix.product(x, w, "llm_int8", threshold=6.0)
    assert found.outliers == (1,)
    token = 0.7 / 127  # the outlier does not count in the token's step
    codes = (round(0.3 / token), round(-0.7 / token))
    for row, line in enumerate(w):
        step = max(map(abs, line)) / 127
        q = [round(v / step) for v in line]
        expected = token * step * (codes[0] * q[0] + codes[1] * q[2]) + 50.0 * step * q[1]
        assert found.result[0][row] == pytest.approx(expected, rel=1e-6)
    everything = matrix.product(x, w, "llm_int8", threshold=0.0)
    assert everything.outliers == ()
    assert everything.error > found.error


def test_the_real_factors_hold_the_largest_channel() -> None:
    one = material.load()
    x, w = matrix.real_factors(one)
    assert (len(x), len(x[0]), len(w), len(w[0])) == (3, 4, 3, 4)
    assert max(abs(v) for row in x for v in row) == float(f"{float(one.inputs.abs().max()):.4g}")
    errors = {name: matrix.product(x, w, name).error for name in matrix.SCHEMES}
    assert errors["llm_int8"] < min(errors["absmax"], errors["zero_point"])


def test_a_cell_is_edited_alone() -> None:
    before = ((1.0, 2.0), (3.0, 4.0))
    assert matrix.edited(before, 1, 0, " \N{MINUS SIGN}7,5 ") == ((1.0, 2.0), (-7.5, 4.0))


@pytest.mark.parametrize("text", ["", "x", "nan", "inf", "2e6", "<img src=x onerror=alert(1)>"])
def test_what_cannot_stand_in_a_cell_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="cell: needs a number"):
        matrix.edited(((1.0,),), 0, 0, text)


def test_a_place_outside_is_refused() -> None:
    with pytest.raises(ConfigError, match="no such place"):
        matrix.edited(((1.0,),), 0, 5, "1")
    with pytest.raises(ConfigError, match="choose one of absmax"):
        matrix.product(((1.0,),), ((1.0,),), "magic")
