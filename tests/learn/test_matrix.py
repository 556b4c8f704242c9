"""The editable product, against loops in plain Python."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantlab.errors import ConfigError
from quantlab.learn import material, matrix
from quantlab.learn.matrix import Cells

numbers = st.floats(-100, 100, allow_nan=False).map(lambda value: float(f"{value:.4g}"))


def matrices(rows: int) -> st.SearchStrategy[Cells]:
    return st.tuples(*[st.tuples(*[numbers] * 4)] * rows)


def exact(x: Cells, w: Cells) -> list[list[float]]:
    return [[math.fsum(a * b for a, b in zip(r, c, strict=True)) for c in w] for r in x]


def rounded(values: Cells, bits: int, symmetric: bool) -> tuple[list[list[float]], float]:
    flat = [v for row in values for v in row]
    if symmetric:
        step, zero = max(map(abs, flat)) / (2 ** (bits - 1) - 1), 2 ** (bits - 1)
    else:
        low, high = min(*flat, 0.0), max(*flat, 0.0)
        step = (high - low) / (2**bits - 1)
        zero = round(-low / step) if step else 0
    step = max(step, 1e-12)
    codes = [[min(max(round(v / step) + zero, 0), 2**bits - 1) for v in row] for row in values]
    return [[(code - zero) * step for code in row] for row in codes], step


@given(matrices(3), matrices(3), st.integers(3, 8), st.booleans())
def test_one_grid_a_matrix(x: Cells, w: Cells, bits: int, symmetric: bool) -> None:
    found = matrix.product(x, w, "absmax" if symmetric else "zero_point", bits)
    (left, left_step), (right, right_step) = (
        rounded(x, bits, symmetric),
        rounded(w, bits, symmetric),
    )
    for row, line in enumerate(exact(x, w)):
        for column, value in enumerate(line):
            got = sum(a * b for a, b in zip(left[row], right[column], strict=True))
            assert found.exact[row][column] == pytest.approx(value, abs=1e-4 + 1e-6 * abs(value))
            # In float32 a number between two codes may fall to the other one.
            slack = 4 * (
                left_step * max(map(abs, right[column])) + right_step * max(map(abs, left[row]))
            )
            slack += 4 * left_step * right_step
            assert abs(found.result[row][column] - got) <= slack + 1e-4
            off = found.result[row][column] - found.exact[row][column]
            assert found.difference[row][column] == pytest.approx(off, abs=1e-9)
    assert found.x is not None
    assert found.x.scale == pytest.approx(left_step, rel=1e-5)


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
