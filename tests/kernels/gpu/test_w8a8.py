"""Triton's W8A8 in its interpreter: codes bit for bit, products against whole numbers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import gpu, reference
from kernels.base import ActivationKind, Operands, Problem

pytest.importorskip("triton")

from kernels.gpu import w8a8

pytestmark = pytest.mark.usefixtures("interpreted")

U32 = 2.0**-24
U = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: U32}
TINY = 2.0**-25
"""Half the distance between the smallest numbers of float16."""


def layer_of(
    rows: int,
    columns: int,
    kind: ActivationKind,
    dtype: torch.dtype = torch.bfloat16,
    *,
    seed: int = 0,
    bias: bool = True,
    per_row: bool = True,
    input_scale: float = 0.03,
    input_zero: int = 121,
) -> tuple[w8a8.Int8Linear, Operands]:
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
    layer = gpu.W8A8.prepare(problem, operands)
    assert isinstance(layer, w8a8.Int8Linear)
    return layer, operands


def expected(x: Tensor, o: Operands, kind: ActivationKind) -> Tensor:
    """The reference on float32 inputs: float32 steps, whole numbers, then float64."""
    scale = o.input_scale if kind == "tensor" else None
    return reference.w8a8_linear(
        x.float(), o.codes, o.scales, o.zeros, x.shape[1], o.bias, scale, o.input_zero, kind
    )


def bound(y: Tensor, o: Operands, dtype: torch.dtype) -> Tensor:
    """How far the kernel may be from the exact y. The codes and their sums are the same; the sum is
    rounded to float32, multiplied by the step and by the scale, the bias is added, and the output
    rounded. The step of the reference is a float64 where the kernel's is a float32, for a grid from
    calibration: one more rounding. 1% covers products of errors."""
    bias = torch.zeros(y.shape[1]) if o.bias is None else o.bias
    error = 4 * U32 * (y - bias.double()).abs() + U32 * y.abs()
    return 1.01 * (error + U[dtype] * (y.abs() + error)) + TINY


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 200),
    columns=st.integers(1, 300),
    m=st.sampled_from([1, 2, 3, 16, 17, 70, 130]),
    kind=st.sampled_from(gpu.W8A8.activations),
    dtype=st.sampled_from(gpu.W8A8.dtypes),
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
    layer, o = layer_of(
        rows, columns, kind, dtype,
        seed=seed, bias=bias, per_row=per_row, input_scale=scale, input_zero=zero,
    )  # fmt: skip
    x = (torch.randn(m, columns, generator=torch.Generator().manual_seed(seed)) * 5).to(dtype)
    kept = x.clone()
    y = layer(x)
    assert (y.shape, y.dtype) == ((m, rows), dtype)
    assert torch.equal(x, kept)
    want = expected(x, o, kind)
    assert bool(((y.double() - want).abs() <= bound(want, o, dtype)).all())
    assert torch.equal(layer.codes(), o.codes)


def codes_of(layer: w8a8.Int8Linear, x: Tensor) -> Tensor:
    """The int8 codes of x that the layer multiplies, padding included."""
    first = layer.launches(x, x.new_empty(x.shape[0], layer.rows))[0]
    first.run(x)
    codes = first.arguments["codes"]
    assert isinstance(codes, Tensor)
    return codes


@settings(deadline=None, max_examples=40)
@given(
    values=st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=50),
    scale=st.floats(1e-3, 10),
    zero=st.integers(0, 255),
)
def test_codes_are_those_of_the_reference(values: list[float], scale: float, zero: int) -> None:
    """Bit for bit, ties and clamped ones too; the padding is worth 0 or meets zero weights."""
    x = torch.tensor([values])
    n = len(values)
    rows, step = reference.quantize_rows(x)
    layer, _ = layer_of(8, n, "token", torch.float32)
    codes = codes_of(layer, x)
    assert torch.equal(codes[:, :n].float(), rows)
    assert not bool(codes[:, n:].any())
    assert not bool(layer.packed[:, n:].any())
    whole = reference.quantize_tensor(x, scale, zero)
    layer, _ = layer_of(8, n, "tensor", torch.float32, input_scale=scale, input_zero=zero)
    assert torch.equal(codes_of(layer, x)[:, :n].float() + 128, whole)
    assert step.shape == (1, 1)


def test_ties_go_to_the_even_code() -> None:
    layer, _ = layer_of(8, 6, "tensor", torch.float32, input_scale=0.5, input_zero=100)
    x = torch.tensor([[0.25, 0.75, 1.25, -0.25, -0.75, -1.25]])
    assert codes_of(layer, x)[0, :6].tolist() == [-28, -26, -26, -28, -30, -30]


def test_long_rows_are_quantized_in_pieces() -> None:
    """The largest value lies beyond the first piece of the row."""
    columns = 2 * w8a8.QUANTIZED + 7
    layer, o = layer_of(3, columns, "token", torch.float32)
    x = torch.randn(2, columns, generator=torch.Generator().manual_seed(1))
    x[0, -1], x[1, w8a8.QUANTIZED] = 50.0, -60.0
    want = expected(x, o, "token")
    assert bool(((layer(x).double() - want).abs() <= bound(want, o, torch.float32)).all())


@pytest.mark.parametrize("kind", ["token", "tensor"])
def test_zero_rows_and_huge_values(kind: ActivationKind) -> None:
    layer, o = layer_of(8, 16, kind, torch.float32, bias=False, input_scale=0.5, input_zero=100)
    x = torch.zeros(3, 16)
    x[1, 2], x[2, 3] = 1e30, -1e30
    y = layer(x)
    assert bool((y[0] == 0).all())
    weight = (o.codes.double() - 128) * o.scales.double()
    high, low = (1e30, -1e30) if kind == "token" else ((255 - 100) * 0.5, -100 * 0.5)
    torch.testing.assert_close(y[1].double(), weight[:, 2] * high, rtol=1e-6, atol=0)
    torch.testing.assert_close(y[2].double(), weight[:, 3] * low, rtol=1e-6, atol=0)


def test_the_largest_sums_stay_in_int32() -> None:
    """255 * 128 for each of the most columns that are taken; one more block is refused."""
    columns = w8a8.LONGEST
    codes = torch.zeros(1, columns, dtype=torch.uint8)  # -128
    operands = Operands(codes, torch.ones(1, 1), torch.full((1, 1), 128.0), None, 1.0, 0)
    problem = Problem(1, columns, 8, columns, True, "tensor", "cpu", torch.float32)
    layer = gpu.W8A8.prepare(problem, operands)
    assert float(layer(torch.full((1, columns), 255.0))) == -255 * 128 * columns
    too_long = Problem(1, columns + 1, 8, columns + 1, True, "tensor", "cpu", torch.float32)
    with pytest.raises(RuntimeError, match="could leave int32"):
        gpu.W8A8.prepare(too_long, operands)


def test_no_rows_of_x() -> None:
    for kind in gpu.W8A8.activations:
        assert kind is not None
        layer, _ = layer_of(40, 96, kind)
        assert layer(torch.empty(0, 96, dtype=torch.bfloat16)).shape == (0, 40)


def test_memory_is_one_copy_of_the_codes() -> None:
    layer, _ = layer_of(192, 576, "token", bias=False)
    kept = layer.tensors()
    assert kept["packed"].nbytes == 192 * 576
    assert sum(tensor.nbytes for tensor in kept.values()) == 192 * (576 + 4)


def test_the_probe_passes_and_notices_a_wrong_product(monkeypatch: pytest.MonkeyPatch) -> None:
    w8a8.probe("cpu")
    right = w8a8.Int8Linear.__call__
    monkeypatch.setattr(w8a8.Int8Linear, "__call__", lambda self, x: right(self, x) * 1.01)
    with pytest.raises(RuntimeError, match="product"):
        w8a8.probe("cpu")
