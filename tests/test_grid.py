"""Grids: hand-made numbers, half-step bounds, exact ends, ragged groups, the clipping search."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantlab.errors import ConfigError
from quantlab.grid import (
    SHRINK,
    all_finite,
    by_group,
    find_grid,
    from_codes,
    range_to_grid,
    refit_scales,
    spread,
    to_codes,
)
from tests.tiny import random


def quantized(weight: Tensor, scale: Tensor, zero: Tensor, bits: int, group_size: int) -> Tensor:
    columns = weight.shape[1]
    wide, offset = spread(scale, group_size, columns), spread(zero, group_size, columns)
    return from_codes(to_codes(weight, wide, offset, bits), wide, offset)


def test_symmetric_by_hand() -> None:
    """4 bits: the largest magnitude 3.5 is code 15 (or 1), zero is code 8, the step 0.5."""
    weight = torch.tensor([[3.5, -1.0, 0.2, 0.3]])
    scale, zero = find_grid(weight, 4, 4, symmetric=True)
    assert scale.tolist() == [[0.5]]
    assert zero.tolist() == [[8.0]]
    assert to_codes(weight, scale, zero, 4).tolist() == [[15, 6, 8, 9]]
    assert quantized(weight, scale, zero, 4, 4).tolist() == [[3.5, -1.0, 0.0, 0.5]]


def test_asymmetric_by_hand() -> None:
    """2 bits over [-1, 2]: steps of 1, zero at code 1."""
    weight = torch.tensor([[-1.0, 2.0, 0.4, 0.6]])
    scale, zero = find_grid(weight, 2, 4, symmetric=False)
    assert (scale.item(), zero.item()) == (1.0, 1.0)
    assert to_codes(weight, scale, zero, 2).tolist() == [[0, 3, 1, 2]]


@pytest.mark.parametrize(("values", "zero"), [([1.0, 3.0], 0.0), ([-1.0, -3.0], 15.0)])
def test_asymmetric_range_always_contains_zero(values: list[float], zero: float) -> None:
    weight = torch.tensor([values])
    scale, found = find_grid(weight, 4, 2, symmetric=False)
    assert found.item() == zero
    assert scale.item() == pytest.approx(3.0 / 15)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_zeros_stay_finite_and_zero(bits: int, symmetric: bool) -> None:
    weight = torch.zeros(2, 8)
    scale, zero = find_grid(weight, bits, 4, symmetric=symmetric, clip=True)
    assert bool((scale > 0).all())
    assert torch.equal(quantized(weight, scale, zero, bits, 4), weight)


@settings(deadline=None)
@given(
    bits=st.integers(2, 8),
    rows=st.integers(1, 4),
    columns=st.integers(1, 50),
    group_size=st.integers(1, 60),
    symmetric=st.booleans(),
    seed=st.integers(0, 999),
)
def test_error_is_bounded_by_half_a_step(
    bits: int, rows: int, columns: int, group_size: int, symmetric: bool, seed: int
) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    scale, zero = find_grid(weight, bits, group_size, symmetric=symmetric)
    assert scale.shape == zero.shape == (rows, -(-columns // group_size))
    assert torch.equal(zero, zero.round())
    assert bool(((zero >= 0) & (zero <= 2**bits - 1)).all())
    error = (quantized(weight, scale, zero, bits, group_size) - weight).abs()
    step = spread(scale, group_size, columns)
    slack = 1 + 1e-4  # float32 rounding of weight / step
    if symmetric:
        assert bool((error <= step / 2 * slack).all())
    else:
        # Rounding the zero-point shifts the grid by up to half a step, felt at the ends only.
        assert bool((error <= step * slack).all())
        low = spread(weight_min(weight, group_size), group_size, columns)
        high = spread(-weight_min(-weight, group_size), group_size, columns)
        inside = (weight > low + step) & (weight < high - step)
        assert bool((error <= step / 2 * slack)[inside].all())


def weight_min(weight: Tensor, group_size: int) -> Tensor:
    return by_group(weight, group_size, lambda g: (g.amin(-1), g.amin(-1)))[0]


@settings(deadline=None)
@given(bits=st.integers(2, 8), seed=st.integers(0, 999))
def test_symmetric_hits_the_largest_magnitude(bits: int, seed: int) -> None:
    weight = torch.randn(3, 16, generator=torch.Generator().manual_seed(seed))
    scale, zero = find_grid(weight, bits, 16, symmetric=True)
    again = quantized(weight, scale, zero, bits, 16)
    at = weight.abs().argmax(1, keepdim=True)
    torch.testing.assert_close(again.gather(1, at), weight.gather(1, at), rtol=1e-6, atol=0)


@settings(deadline=None)
@given(columns=st.integers(1, 40), group_size=st.integers(1, 50), seed=st.integers(0, 99))
def test_ragged_groups_stand_alone(columns: int, group_size: int, seed: int) -> None:
    """Each group's grid is what it would be were the group a weight of its own."""
    weight = torch.randn(2, columns, generator=torch.Generator().manual_seed(seed))
    scale, zero = find_grid(weight, 4, group_size, symmetric=False, clip=True)
    for group in range(scale.shape[1]):
        part = weight[:, group * group_size : (group + 1) * group_size]
        s, z = find_grid(part, 4, group_size, symmetric=False, clip=True)
        assert torch.equal(scale[:, group : group + 1], s)
        assert torch.equal(zero[:, group : group + 1], z)


def test_spread_by_hand() -> None:
    assert spread(torch.tensor([[1.0, 2.0]]), 3, 5).tolist() == [[1, 1, 1, 2, 2]]


@pytest.mark.parametrize("group_size", [0, -4])
def test_group_size_below_one_is_refused(group_size: int) -> None:
    with pytest.raises(ConfigError, match=f"group_size={group_size}"):
        find_grid(torch.ones(1, 4), 4, group_size, symmetric=True)


# --- clipping ----------------------------------------------------------------------------------


def loss(weight: Tensor, grid: tuple[Tensor, Tensor], bits: int, moment: Tensor) -> Tensor:
    """d M d^T of each row, d the error of quantizing it with one grid, in float64."""
    scale, zero = grid
    error = (quantized(weight, scale, zero, bits, weight.shape[1]) - weight).double()
    return torch.stack([d @ moment.double() @ d for d in error])


@settings(deadline=None)
@given(
    bits=st.integers(2, 4),
    symmetric=st.booleans(),
    weighted=st.booleans(),
    seed=st.integers(0, 99),
)
def test_clipping_finds_the_best_candidate(
    bits: int, symmetric: bool, weighted: bool, seed: int
) -> None:
    """Against trying every fraction of the range one by one."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(3, 24, generator=generator) ** 3
    x = torch.randn(60, 24, generator=generator)
    moment = x.T @ x if weighted else torch.eye(24)
    found = find_grid(
        weight, bits, 24, symmetric=symmetric, clip=True, moment=moment if weighted else None
    )
    low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    tried = [
        loss(weight, range_to_grid(low * f, high * f, bits, symmetric), bits, moment)
        for f in SHRINK.tolist()
    ]
    best = torch.stack(tried).amin(0)
    torch.testing.assert_close(loss(weight, found, bits, moment), best, rtol=1e-4, atol=1e-7)


@settings(deadline=None, max_examples=25)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 60),
    group_size=st.integers(1, 32),
    cached=st.sampled_from([1, 100, 1000]),
    weighted=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_search_in_parts_finds_the_same_grids(
    rows: int, columns: int, group_size: int, cached: int, weighted: bool, seed: int
) -> None:
    """However a matrix is cut up for the caches, ragged or not."""
    weight = random(rows, columns, seed=seed)
    weight[0] = 0  # all candidates are equal: the full range
    x = random(80, columns, seed=seed + 1)
    moment = x.T @ x if weighted else None
    whole = find_grid(weight, 3, group_size, symmetric=False, clip=True, moment=moment)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("quantlab.grid.CACHED", cached)
        patch.setattr("quantlab.grid.PART_ROWS", 7)
        parts = find_grid(weight, 3, group_size, symmetric=False, clip=True, moment=moment)
    starts = range(0, columns, group_size)
    for g, start in enumerate(starts):
        part = weight[:, start : start + group_size]
        block = (
            None
            if moment is None
            else moment[start : start + group_size][:, start : start + group_size]
        )
        full = torch.eye(part.shape[1]) if block is None else block
        losses = [
            loss(part, (found[0][:, g : g + 1], found[1][:, g : g + 1]), 3, full)
            for found in (whole, parts)
        ]
        # Sums may be in another order, and near-ties fall either way: 60 roundings of 2^-24.
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-9)
    assert torch.equal(whole[0][0], parts[0][0])


def test_moment_decides_what_is_clipped() -> None:
    """An outlier that matters is kept; one that does not is clipped for the sake of the rest."""
    weight = torch.cat([torch.linspace(-1, 1, 31), torch.tensor([3.0])])[None]
    matters = torch.ones(32)
    matters[-1] = 1000.0
    kept, _ = find_grid(weight, 3, 32, symmetric=True, clip=True, moment=matters.diag())
    dropped, _ = find_grid(weight, 3, 32, symmetric=True, clip=True, moment=(1 / matters).diag())
    assert kept.item() == pytest.approx(1.0)
    assert dropped.item() < 0.75


@pytest.mark.parametrize("group_size", [8, 5, 20])
def test_each_group_reads_its_own_block_of_the_moment(group_size: int) -> None:
    """Also the ragged last one: the same grids as for a weight of that group alone."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(2, 20, generator=generator) ** 3
    x = torch.randn(50, 20, generator=generator)
    moment = x.T @ x
    scale, zero = find_grid(weight, 3, group_size, symmetric=False, clip=True, moment=moment)
    for group in range(scale.shape[1]):
        part = slice(group * group_size, (group + 1) * group_size)
        s, z = find_grid(
            weight[:, part], 3, group_size, symmetric=False, clip=True, moment=moment[part, part]
        )
        torch.testing.assert_close(scale[:, group : group + 1], s)
        assert torch.equal(zero[:, group : group + 1], z)


def test_scales_are_rounded_before_use() -> None:
    """The returned scale is one that float16 holds, so that the stored grid is the searched one."""
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    for clip in (False, True):
        scale, _ = find_grid(weight, 4, 16, symmetric=False, clip=clip, scale_dtype=torch.float16)
        assert torch.equal(scale, scale.half().float())
    tiny, _ = find_grid(weight * 1e-9, 4, 16, symmetric=False, scale_dtype=torch.float16)
    assert bool((tiny > 0).all())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_value_that_is_not_finite_is_found(value: float, dtype: torch.dtype) -> None:
    weight = torch.linspace(-1, 1, 21, dtype=dtype).reshape(3, 7)
    assert all_finite(weight)
    assert all_finite(weight[:0])
    for place in range(weight.numel()):
        changed = weight.clone().flatten()
        changed[place] = value
        assert not all_finite(changed.view(3, 7))


# --- refitted scales ---------------------------------------------------------------------------


def refit_case(seed: int, bits: int, columns: int = 44) -> dict[str, Tensor]:
    """A weight rounded on its grids, and a second moment in which channels hang together."""
    inputs = random(200, columns, seed=seed) @ random(columns, columns, seed=seed + 1)
    weight = random(5, columns, seed=seed + 2)
    scale, zero = find_grid(weight, bits, 16, symmetric=False, scale_dtype=torch.float16)
    codes = to_codes(weight, spread(scale, 16, columns), spread(zero, 16, columns), bits)
    moment = inputs.T @ inputs / len(inputs) + torch.eye(columns)
    return {"weight": weight, "codes": codes, "scale": scale, "zero": zero, "moment": moment}


def output_errors(case: dict[str, Tensor], scale: Tensor) -> Tensor:
    columns = case["weight"].shape[1]
    steps, zeros = spread(scale, 16, columns), spread(case["zero"], 16, columns)
    error = from_codes(case["codes"], steps, zeros) - case["weight"]
    return ((error @ case["moment"]) * error).sum(1)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_refitted_scales_solve_the_least_squares(bits: int) -> None:
    """Row by row in float64: || L (w - sum_g s_g v_g) || with L^T L = M, by numpy."""
    case = refit_case(3, bits)
    found = refit_scales(**case, group_size=16, damping=0.0, scale_dtype=torch.float32)
    factor = np.linalg.cholesky(case["moment"].double().numpy()).T
    for row in range(5):
        values = (case["codes"][row] - spread(case["zero"], 16, 44)[row]).double().numpy()
        design = np.zeros((44, 3))
        for column in range(44):
            design[column, column // 16] = values[column]
        target = factor @ case["weight"][row].double().numpy()
        wanted, *_ = np.linalg.lstsq(factor @ design, target, rcond=None)
        # The ridge of 1e-4 keeps at most that share of the old steps, times the condition.
        np.testing.assert_allclose(found[row].numpy(), wanted, rtol=5e-3)
    assert bool((output_errors(case, found) < 0.999 * output_errors(case, case["scale"])).any())


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 999), bits=st.sampled_from([2, 3, 4, 8]))
def test_refitting_never_raises_the_error(seed: int, bits: int) -> None:
    case = refit_case(seed, bits)
    found = refit_scales(**case, group_size=16, damping=0.0)
    assert torch.equal(found, found.half().float())
    assert bool((found > 0).all())
    before, after = output_errors(case, case["scale"]), output_errors(case, found)
    assert bool((after <= before * (1 + 1e-4) + 1e-6).all())


def test_groups_of_zeros_keep_their_steps() -> None:
    case = refit_case(1, 4)
    case["weight"][2, 16:32] = 0
    case["codes"][2, 16:32] = case["zero"][2, 1]
    found = refit_scales(**case, group_size=16, damping=0.0)
    assert bool(torch.isfinite(found).all())
    assert found[2, 1] == case["scale"][2, 1]
