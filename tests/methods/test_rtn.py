"""Round to nearest: numbers done by hand, half-step bounds, granularities, clipping."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantlab.methods import METHODS
from quantlab.methods.rtn import RTNConfig, round_weight
from quantlab.packing import AffineWeight
from tests.tiny import block_of, random, tiny

BITS = (2, 3, 4, 5, 6, 7, 8)
GRANULARITIES = ("group", "channel", "tensor")


def test_zero_point_by_hand() -> None:
    """2 bits over [-1, 2]: step 1, zero at code 1. 0.4 becomes 0 and 0.6 becomes 1."""
    weight = torch.tensor([[-1.0, 2.0, 0.4, 0.6, 0.0, 1.4, -0.7, 2.0]])
    packed = round_weight(weight, RTNConfig(bits=2, group_size=8))
    codes, scales, zeros = packed.unpacked()
    assert (scales.item(), zeros.item()) == (1.0, 1.0)
    assert codes.tolist() == [[0, 3, 1, 2, 1, 2, 0, 3]]
    assert packed.dequantize().tolist() == [[-1, 2, 0, 1, 0, 1, -1, 2]]


def test_absmax_by_hand() -> None:
    """4 bits, largest magnitude 3.5: step 3.5 / 7 = 0.5, zero at code 8."""
    weight = torch.tensor([[-3.5, 1.0, 0.2, 0.3, -0.8, 2.0, 3.4, 0.0]])
    packed = round_weight(weight, RTNConfig(bits=4, group_size=8, symmetric=True))
    codes, scales, zeros = packed.unpacked()
    assert (scales.item(), zeros.item()) == (0.5, 8.0)
    assert codes.tolist() == [[1, 10, 8, 9, 6, 12, 15, 8]]
    assert packed.dequantize().tolist() == [[-3.5, 1.0, 0.0, 0.5, -1.0, 2.0, 3.5, 0.0]]
    assert packed.symmetric
    assert "zeros" not in packed.tensors()


def test_a_range_on_one_side_reaches_to_zero() -> None:
    """[2, 6] is spanned from 0: 2 bits, step 2, zero at code 0."""
    packed = round_weight(torch.tensor([[2.0, 6.0, 4.0, 5.2] * 2]), RTNConfig(bits=2, group_size=8))
    codes, scales, zeros = packed.unpacked()
    assert (scales.item(), zeros.item()) == (2.0, 0.0)
    assert codes.tolist() == [[1, 3, 2, 3] * 2]


@pytest.mark.parametrize(
    ("granularity", "grids"), [("group", (3, 5)), ("channel", (3, 1)), ("tensor", (1, 1))]
)
def test_what_shares_a_scale(granularity: str, grids: tuple[int, int]) -> None:
    weight = random(3, 40) * torch.tensor([[1.0], [10.0], [100.0]])
    packed = round_weight(weight, RTNConfig(granularity=granularity, group_size=8, symmetric=True))
    assert tuple(packed.scales.shape) == grids
    regions = {"group": (1, 8), "channel": (1, 40), "tensor": (3, 40)}[granularity]
    for (row, grid_row), (column, grid_column) in itertools.product(
        zip(range(0, 3, regions[0]), range(grids[0]), strict=True),
        zip(range(0, 40, regions[1]), range(grids[1]), strict=True),
    ):
        part = weight[row : row + regions[0], column : column + regions[1]]
        wanted = (part.abs().max() / 7).half()
        assert packed.scales[grid_row, grid_column] == wanted


def steps(packed: AffineWeight) -> Tensor:
    """The step of every weight's grid, float32 [rows, columns]."""
    _, scales, _ = packed.unpacked()
    rows, columns = packed.shape
    return scales.repeat_interleave(packed.group_size, 1)[:, :columns].expand(rows, columns)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_no_weight_moves_further_than_half_a_step(
    bits: int, symmetric: bool, granularity: str
) -> None:
    """Except at the ends of a zero-point grid: its rounded zero shifts it by half a step there, and
    a float16 step that was rounded down leaves its ends short of the range."""
    weight = random(6, 100, seed=bits)
    config = RTNConfig(bits=bits, granularity=granularity, group_size=32, symmetric=symmetric)
    packed = round_weight(weight, config)
    codes, _, _ = packed.unpacked()
    error, step = (packed.dequantize() - weight).abs(), steps(packed)
    at_end = (codes == 0) | (codes == 2**bits - 1)
    slack = 1 + 1e-4
    assert bool((error <= step / 2 * slack)[~at_end].all())
    short = 2**bits * 2.0**-11  # steps by which 2^bits float16 steps may miss the range
    assert bool((error <= step * (0.5 + short + (0 if symmetric else 0.5)) * slack).all())
    # And it is the nearest code, not merely one within reach.
    for other in (codes.float() - 1, codes.float() + 1):
        inside = (other >= 0) & (other < 2**bits)
        _, _, zeros = packed.unpacked()
        wide = zeros.repeat_interleave(packed.group_size, 1)[:, :100]
        moved = ((other - wide) * step - weight).abs()
        assert bool((moved >= error * (1 - 1e-4))[inside].all())


@settings(deadline=None)
@given(
    bits=st.sampled_from(BITS),
    symmetric=st.booleans(),
    granularity=st.sampled_from(GRANULARITIES),
    columns=st.integers(8, 90),
    heavy=st.booleans(),
    seed=st.integers(0, 99),
)
def test_clipping_never_raises_the_squared_error(
    bits: int, symmetric: bool, granularity: str, columns: int, heavy: bool, seed: int
) -> None:
    weight = random(4, columns, seed=seed)
    weight = weight**5 if heavy else weight
    errors = []
    for clip in (False, True):
        config = RTNConfig(bits, granularity, 16, symmetric, clip)
        errors.append((round_weight(weight, config).dequantize() - weight).square().sum())
    assert errors[1] <= errors[0] * (1 + 1e-5)


def test_clipping_helps_where_there_are_outliers() -> None:
    weight = random(8, 256)
    weight[:, 7] = 8.0
    plain, clipped = (
        (round_weight(weight, RTNConfig(3, group_size=256, clip=clip)).dequantize() - weight)
        .square()
        .sum()
        for clip in (False, True)
    )
    assert clipped < 0.9 * plain


@pytest.mark.parametrize("bits", BITS)
def test_weights_on_the_grid_come_back_exactly(bits: int) -> None:
    """Powers of two as steps, ends and zero included."""
    codes = torch.randint(0, 2**bits, (4, 64), generator=torch.Generator().manual_seed(bits))
    codes[:, 0], codes[:, 1] = 0, 2**bits - 1
    zero = 2 ** (bits - 1) - 1
    weight = (codes - zero) * 2.0**-5
    packed = round_weight(weight, RTNConfig(bits=bits, group_size=64))
    assert torch.equal(packed.dequantize(), weight)
    assert torch.equal(packed.unpacked()[0].long(), codes)


def test_more_bits_lose_less() -> None:
    weight = random(16, 128)
    errors = [
        float((round_weight(weight, RTNConfig(bits=bits)).dequantize() - weight).square().mean())
        for bits in BITS
    ]
    # A bit more halves the step: a fourth of the squared error, roughly.
    for fewer, more in itertools.pairwise(errors):
        assert 3 < fewer / more < 8


@pytest.mark.parametrize(
    ("bits", "group", "wanted"), [(4, 64, 4 + 20 / 64), (3, 128, 3 + 19 / 128)]
)
def test_bits_per_weight_count_scales_and_zeros(bits: int, group: int, wanted: float) -> None:
    packed = round_weight(random(16, 1024), RTNConfig(bits=bits, group_size=group))
    assert packed.bits_per_weight == pytest.approx(wanted)


def test_a_block_is_rounded_linear_by_linear() -> None:
    block = block_of(tiny("gpt2"))
    packed = METHODS["rtn"].quantize_block(block, {}, RTNConfig(bits=4, group_size=32))
    for path, linear in block.linears.items():
        alone = round_weight(linear.weight, RTNConfig(bits=4, group_size=32))
        assert torch.equal(packed[path].dequantize(), alone.dequantize())
