"""The kernel of LLM.int8(): outputs against exact sums, both ways of reading weight columns."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import dispatch, reference, torch_outlier, torch_w8a8
from kernels.base import Operands, Problem

U = 2.0**-8  # the largest relative error of rounding to bfloat16 (8 significant bits)
U32 = 2.0**-24

pytestmark = pytest.mark.skipif(
    not torch.cpu._is_vnni_supported(), reason="oneDNN's int8 sums are exact with VNNI only"
)


def layer_of(
    rows: int,
    columns: int,
    threshold: float,
    dtype: torch.dtype = torch.float32,
    *,
    seed: int = 0,
    bias: bool = True,
) -> tuple[torch_outlier.OutlierLinear, Operands]:
    generator = torch.Generator().manual_seed(seed)
    operands = Operands(
        codes=torch.randint(1, 256, (rows, columns), generator=generator).to(torch.uint8),
        scales=torch.rand(rows, 1, generator=generator) * 0.02 + 1e-4,
        zeros=torch.full((rows, 1), 128.0),
        bias=torch.randn(rows, generator=generator) if bias else None,
        threshold=threshold,
    )
    problem = Problem(rows, columns, 8, columns, True, "outlier", "cpu", dtype)
    return torch_outlier.OutlierLinear(problem, operands), operands


def expected(x: Tensor, operands: Operands) -> Tensor:
    signed = (operands.codes ^ 128).view(torch.int8)
    scales, threshold = operands.scales[:, 0], operands.threshold
    return reference.outlier_linear(x.double(), signed, scales, operands.bias, threshold)


def bound(x: Tensor, o: Operands, want: Tensor, dtype: torch.dtype) -> Tensor:
    """How far float32 may be off: a code that falls to the other side of a tie, the roundings of
    the scales, those of the outliers' sum, and that of the output."""
    x = x.double()
    inside = x.masked_fill(x.abs() >= o.threshold, 0)
    step = inside.abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
    scaled = inside / step
    tie = ((scaled - scaled.floor()) - 0.5).abs() <= 8 * U32 * scaled.abs().clamp_min(1)
    weight = (o.codes.double() - 128).abs() * o.scales.double()
    size = x.abs() @ weight.T + step * weight.sum(1)
    limit = tie.double() @ weight.T * step + (8 + x.shape[1]) * U32 * size + 4 * U32 * want.abs()
    if o.bias is not None:
        limit = limit + 4 * U32 * o.bias.double().abs()
    return limit + U * (want.abs() + limit) if dtype == torch.bfloat16 else limit


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 150),
    columns=st.integers(1, 300),
    m=st.sampled_from([1, 2, 17, 64]),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    seed=st.integers(0, 2**16),
    bias=st.booleans(),
    threshold=st.sampled_from([0.5, 6.0, 12.0, 100.0]),
)
def test_within_the_bound(
    rows: int,
    columns: int,
    m: int,
    dtype: torch.dtype,
    seed: int,
    bias: bool,
    threshold: float,
) -> None:
    """From every column an outlier to none."""
    layer, o = layer_of(rows, columns, threshold, dtype, seed=seed, bias=bias)
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(m, columns, generator=generator) * 5).to(dtype)
    kept = x.clone()
    y = layer(x)
    assert (y.shape, y.dtype) == ((m, rows), dtype)
    assert torch.equal(x, kept)
    want = expected(x, o)
    assert bool(((y.double() - want).abs() <= bound(x, o, want, dtype) + 1e-30).all())
    assert torch.equal(layer.codes(), o.codes)


def test_this_machine_runs_it() -> None:
    assert dispatch.probe(torch_outlier.KERNEL) is None


def test_both_ways_of_reading_columns_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, o = layer_of(40, 96, 6.0)
    columns = torch.tensor([0, 3, 50, 95])
    weight = (o.codes.float() - 128) * o.scales
    want = weight[:, columns].T
    assert torch.equal(layer.weight_columns(columns), want)
    monkeypatch.setattr(torch_outlier, "FEW", 3)
    assert torch.equal(layer.weight_columns(columns), want)


@pytest.mark.parametrize("threshold", [6.0, float("inf")])
def test_inputs_without_outliers_are_plain_w8a8(threshold: float) -> None:
    layer, o = layer_of(64, 96, threshold)
    problem = Problem(64, 96, 8, 96, True, "token", "cpu", torch.float32)
    x = torch.randn(7, 96, generator=torch.Generator().manual_seed(1))
    assert torch.equal(layer(x), torch_w8a8.Int8Linear(problem, o)(x))


def test_one_huge_value_no_longer_drowns_its_row() -> None:
    """The point of the method: 3,000 beside numbers of size 1 would leave those no codes."""
    layer, o = layer_of(48, 128, 6.0, bias=False)
    naive, _ = layer_of(48, 128, float("inf"), bias=False)
    x = torch.randn(16, 128, generator=torch.Generator().manual_seed(1))
    x[3, 77] = 3000.0
    want = x @ ((o.codes.float() - 128) * o.scales).T
    error, drowned = ((f(x)[3] - want[3]).norm() for f in (layer, naive))
    assert error < drowned / 100


def test_memory_is_one_copy_of_the_codes() -> None:
    layer, _ = layer_of(192, 576, 6.0, bias=False)
    kept = layer.tensors()
    assert kept["packed"].nbytes == 192 * 576
    assert sum(tensor.nbytes for tensor in kept.values()) == 192 * (576 + 4 + 4)
