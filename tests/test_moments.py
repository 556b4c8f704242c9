"""Sums of y^T x on bfloat16 hardware against float64, and what they leave behind."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import native_solve
from quantlab.moments import (
    add_cross_moment,
    add_second_moment,
    as_multiplied,
    bfloat16_factors,
    multiplies_bfloat16,
    symmetric,
)
from tests.tiny import random

HALF_UNIT = 2.0**-24
"""Relative error of one rounding to float32."""


def bound(y: Tensor, x: Tensor) -> Tensor:
    """How far a sum of exact products may be from the truth: a rounding for every token, each of
    the sum so far, which is no larger than the sum of magnitudes (Higham 2002, section 3.1)."""
    magnitude = y.double().abs().T @ x.double().abs()
    return 1.01 * (len(x) + 1) * HALF_UNIT * magnitude


@settings(deadline=None, max_examples=30)
@given(
    tokens=st.one_of(st.integers(1, 300), st.sampled_from([512, 513, 1100])),
    columns=st.one_of(st.integers(1, 300), st.sampled_from([288, 290, 320])),
    rounded=st.booleans(),
    native=st.booleans(),
    seed=st.integers(0, 99),
)
def test_moments_are_as_exact_as_float32_sums(
    tokens: int, columns: int, rounded: bool, native: bool, seed: int
) -> None:
    """Of the numbers that are multiplied: bfloat16 ones where linears round to that; in QuantLab's
    own kernel, where there is one, and in torch."""
    runs = native and native_solve.multiplies_bfloat16()
    y, x = random(tokens, columns, seed=seed), random(tokens, columns, seed=seed + 100) + 3
    square, cross = torch.zeros(columns, columns), torch.zeros(columns, columns)
    with (
        mock.patch.object(native_solve, "multiplies_bfloat16", return_value=runs),
        torch.autocast("cpu", torch.bfloat16, enabled=rounded),
    ):
        assert multiplies_bfloat16() == rounded
        y, x = as_multiplied(y), as_multiplied(x)
        add_second_moment(square, x)
        add_cross_moment(cross, y, x)
    assert x.dtype == (torch.bfloat16 if rounded and runs else torch.float32)
    if rounded:
        assert torch.equal(x.float(), x.bfloat16().float())
    square = symmetric(square)
    assert torch.equal(square, square.T)
    assert bool(((square.double() - x.double().T @ x.double()).abs() <= bound(x, x)).all())
    assert bool(((cross.double() - y.double().T @ x.double()).abs() <= bound(y, x)).all())


def test_sums_go_on_where_they_were() -> None:
    x, start = random(40, 20, seed=1), random(20, 20, seed=2)
    total = start.clone()
    add_cross_moment(total, x, x)
    torch.testing.assert_close(total, start + x.T @ x, rtol=1e-5, atol=1e-5)


def test_without_autocast_nothing_is_rounded() -> None:
    x = random(50, 8, seed=1)
    assert torch.equal(as_multiplied(x), x)


def test_the_setting_is_put_back_even_after_an_error() -> None:
    before = torch.backends.mkldnn.matmul.fp32_precision

    def fail() -> None:
        with bfloat16_factors(True):
            assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert torch.backends.mkldnn.matmul.fp32_precision == before
    with bfloat16_factors(False):
        assert torch.backends.mkldnn.matmul.fp32_precision == before
