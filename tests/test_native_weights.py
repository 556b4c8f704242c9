"""What has no native layout is refused with the reason, not computed wrongly."""

from __future__ import annotations

import pytest
import torch

from quantlab.native_weights import native_form
from quantlab.packing import Activation, affine


@pytest.mark.parametrize(("group", "fits"), [(8, True), (12, True), (64, True), (10, False)])
def test_groups_are_whole_steps_of_four_columns(group: int, fits: bool) -> None:
    grids = torch.ones(4, -(-64 // group))
    weight = affine(torch.zeros(4, 64), grids, None, 4, group)
    reason = native_form(weight)
    assert (reason is None) == fits
    assert fits or str(group) in str(reason)


def test_8_bit_inputs_want_one_grid_a_row() -> None:
    grids = torch.ones(4, 2)
    weight = affine(torch.zeros(4, 64), grids, None, 8, 32, activation=Activation("token"))
    assert "8-bit inputs" in str(native_form(weight))
