"""oneDNN's int8 kernel: codes against exact rounding, products against whole numbers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import dispatch, reference, torch_w8a8
from kernels.base import ActivationKind, Operands, Problem

U = 2.0**-8  # the largest relative error of rounding to bfloat16 (8 significant bits)
U32 = 2.0**-24

pytestmark = pytest.mark.skipif(
    not torch.cpu._is_vnni_supported(), reason="oneDNN's int8 sums are exact with VNNI only"
)


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def layer_of(
    rows: int,
    columns: int,
    kind: ActivationKind,
    dtype: torch.dtype,
    *,
    seed: int = 0,
    bias: bool = True,
    per_row: bool = True,
    input_scale: float = 0.03,
    input_zero: int = 121,
) -> tuple[torch_w8a8.Int8Linear, Operands]:
    generator = torch.Generator().manual_seed(seed)
    grids = (rows if per_row else 1, 1)
    operands = Operands(
        codes=torch.randint(0, 256, (rows, columns), generator=generator).to(torch.uint8),
        scales=torch.rand(grids, generator=generator) * 0.02 + 1e-4,
        zeros=torch.full(grids, 128.0),
        bias=torch.randn(rows, generator=generator) if bias else None,
        input_scale=input_scale,
        input_zero=input_zero,
    )
    problem = Problem(rows, columns, 8, columns, True, kind, "cpu", dtype)
    return torch_w8a8.Int8Linear(problem, operands), operands


def near_tie(scaled: Tensor) -> Tensor:
    """Where float32 may round x / step the other way: within a few ulp of a half."""
    return ((scaled - scaled.floor()) - 0.5).abs() <= 8 * U32 * scaled.abs().clamp_min(1)


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 150),
    columns=st.integers(1, 300),
    m=st.sampled_from([1, 2, 3, 17, 64]),
    kind=st.sampled_from(["token", "tensor", "dynamic_tensor", "dynamic_token"]),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    seed=st.integers(0, 2**16),
    bias=st.booleans(),
    per_row=st.booleans(),
    scale=st.floats(1e-3, 2.0),
    zero=st.integers(0, 255),
)
def test_within_the_bound(
    rows: int,
    columns: int,
    m: int,
    kind: ActivationKind,
    dtype: torch.dtype,
    seed: int,
    bias: bool,
    per_row: bool,
    scale: float,
    zero: int,
) -> None:
    """Sums of codes are exact; scaling costs a few float32 roundings, the output one of its own.
    A code may differ by one where float32 sees a tie that float64 does not."""
    layer, o = layer_of(
        rows, columns, kind, dtype,
        seed=seed, bias=bias, per_row=per_row, input_scale=scale, input_zero=zero,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(m, columns, generator=generator) * 5).to(dtype)
    kept = x.clone()
    y = layer(x)
    assert y.shape == (m, rows)
    assert y.dtype == dtype
    assert torch.equal(x, kept)
    input_scale = scale if kind == "tensor" else None
    want = reference.w8a8_linear(
        x.double(), o.codes, o.scales, o.zeros, columns, o.bias, input_scale, zero, kind
    )
    step: Tensor | float = scale
    if kind == "token":
        step = x.double().abs().amax(-1, keepdim=True) / 127
    elif kind != "tensor":
        step, exact = reference.dynamic_grid(x.double(), kind == "dynamic_token")
        # Where the zero-point itself is near a tie, a whole row moves by a step.
        low = x.double().amin(-1, True) if kind == "dynamic_token" else x.double().amin()
        if bool(near_tie(-low.clamp_max(0) / step).any()):
            return
        assert bool(((exact >= 0) & (exact <= 255)).all())
    weight = (o.codes.double() - 128).abs() * o.scales.double()
    flips = near_tie(x.double() / step).double() @ weight.T * step
    reach = 255 * scale if kind == "tensor" else float("inf")
    size = x.double().abs().clamp(max=reach) @ weight.T
    bound = flips + 8 * U32 * size + 4 * U32 * want.abs()
    if o.bias is not None:
        bound = bound + 4 * U32 * o.bias.double().abs()
    if dtype == torch.bfloat16:
        bound = bound + U * (want.abs() + bound)
    assert bool(((y.double() - want).abs() <= bound + 1e-30).all())
    assert torch.equal(layer.codes(), o.codes)


def test_this_machine_runs_it() -> None:
    assert dispatch.probe(torch_w8a8.KERNEL) is None


def test_real_shapes_and_threads(threads: int) -> None:
    for kind in ("token", "tensor"):
        layer, o = layer_of(192, 576, kind, torch.float32)
        x = torch.randn(70, 576, generator=torch.Generator().manual_seed(1))
        input_scale = o.input_scale if kind == "tensor" else None
        want = reference.w8a8_linear(
            x, o.codes, o.scales, o.zeros, 576, o.bias, input_scale, o.input_zero
        )
        torch.testing.assert_close(layer(x).double(), want, rtol=1e-4, atol=1e-3)
        alone = torch.cat([layer(row) for row in x.split(1)])
        torch.testing.assert_close(layer(x), alone, rtol=1e-6, atol=1e-5)


@given(
    values=st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=50),
    scale=st.floats(1e-3, 10),
    zero=st.integers(0, 255),
)
def test_codes_are_rounded_to_nearest(values: list[float], scale: float, zero: int) -> None:
    x = torch.tensor([values])
    codes = torch_w8a8.quantize_tensor(x, scale, zero)
    scaled = x.double() / scale
    want = (scaled.round() + zero).clamp(0, 255)
    off = (codes.double() - want).abs()
    assert codes.dtype == torch.uint8
    assert bool((off <= near_tie(scaled)).all())


@given(values=st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=50))
def test_row_codes_are_rounded_to_nearest(values: list[float]) -> None:
    x = torch.tensor([values])
    codes, steps = torch_w8a8.quantize_rows(x)
    assert codes.dtype == torch.uint8
    scaled = x.double() / (x.double().abs().amax() / 127).clamp_min(1e-14)
    off = (codes.double() - 128 - scaled.round()).abs()
    assert bool((off <= near_tie(scaled)).all())
    assert float(steps) == pytest.approx(float(x.abs().max()) / 127, rel=1e-6, abs=1e-12)


def test_chunks_do_not_change_the_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(9, 50, generator=torch.Generator().manual_seed(1))
    whole, (codes, steps) = torch_w8a8.quantize_tensor(x, 0.1, 7), torch_w8a8.quantize_rows(x)
    monkeypatch.setattr(torch_w8a8, "CHUNK", 100)
    assert torch.equal(torch_w8a8.quantize_tensor(x, 0.1, 7), whole)
    again, steps_again = torch_w8a8.quantize_rows(x)
    assert torch.equal(again, codes)
    assert torch.equal(steps_again, steps)
    monkeypatch.setattr(torch_w8a8, "CHUNK", 10)
    assert torch.equal(torch_w8a8.quantize_tensor(x, 0.1, 7), whole)


@pytest.mark.parametrize("kind", ["token", "tensor"])
def test_zero_rows_and_huge_values(kind: ActivationKind) -> None:
    layer, o = layer_of(8, 16, kind, torch.float32, bias=False, input_scale=0.5, input_zero=100)
    x = torch.zeros(3, 16)
    x[1, 2], x[2, 3] = 1e30, -1e30
    y = layer(x)
    assert bool((y[0] == 0).all())
    weight = (o.codes.double() - 128) * o.scales.double()
    high, low = (1e30, -1e30) if kind == "token" else ((255 - 100) * 0.5, -100 * 0.5)
    torch.testing.assert_close(y[1].double(), weight[:, 2] * high, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(y[2].double(), weight[:, 3] * low, rtol=1e-5, atol=1e-6)


def test_memory_is_one_copy_of_the_codes() -> None:
    layer, _ = layer_of(192, 576, "token", torch.bfloat16, bias=False)
    kept = layer.tensors()
    assert kept["packed"].nbytes == 192 * 576
    assert sum(tensor.nbytes for tensor in kept.values()) == 192 * (576 + 4 + 4)
