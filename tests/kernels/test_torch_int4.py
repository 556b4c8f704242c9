"""torch's int4 kernel, both paths, against float64 within a bound that counts every rounding."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import dispatch, reference, torch_int4
from kernels.base import Operands, Problem

U = 2.0**-8  # the largest relative error of rounding to bfloat16 (8 significant bits)
U32 = 2.0**-24

pytestmark = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"),
    reason="torch packs int4 weights for x86 with AVX2 or AVX-512",
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
    group_size: int,
    *,
    seed: int = 0,
    bias: bool = True,
    per_row: bool = True,
) -> tuple[torch_int4.Int4Linear, Operands]:
    generator = torch.Generator().manual_seed(seed)
    groups = -(-columns // group_size)
    grids = (rows if per_row else 1, groups)
    operands = Operands(
        codes=torch.randint(0, 16, (rows, columns), generator=generator).to(torch.uint8),
        scales=torch.rand(grids, generator=generator) * 0.02 + 1e-4,
        zeros=torch.randint(0, 16, grids, generator=generator).float(),
        bias=torch.randn(rows, generator=generator) if bias else None,
    )
    problem = Problem(rows, columns, 4, group_size, False, None, "cpu", torch.bfloat16)
    return torch_int4.Int4Linear(problem, operands), operands


def exact_and_bound(x: Tensor, o: Operands, group_size: int) -> tuple[Tensor, Tensor]:
    """The product in float64, and how far the kernel may be from it.

    The scale is rounded once and the shift (8 - zero) * scale once more, a weight may be rounded
    (unpacked path), sums are float32, and the output is rounded before and after adding the
    (rounded) bias. 2% covers products of errors.
    """
    rows, columns = o.codes.shape
    scale = o.scales.double().repeat_interleave(group_size, 1)[:, :columns].expand(rows, -1)
    zero = o.zeros.double().repeat_interleave(group_size, 1)[:, :columns].expand(rows, -1)
    weight = (o.codes.double() - zero) * scale
    off = U * weight.abs() + U * (8 - zero).abs() * scale + U * weight.abs()
    x = x.double()
    y = x @ weight.T
    size = x.abs() @ ((o.codes.double() - 8).abs() * scale + (8 - zero).abs() * scale).T
    error = x.abs() @ off.T + 2 * columns * U32 * size
    error = error + U * y.abs()
    if o.bias is not None:
        bias = o.bias.double()
        y = y + bias
        error = error + U * bias.abs() + U * y.abs()
    return y, 1.02 * error + 1e-30


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(1, 200),
    columns=st.integers(1, 500),
    group=st.sampled_from([32, 64, 96, 128, 160, 256, 0]),
    m=st.sampled_from([1, 2, 3, 5, 33, 47, 48, 49, 70]),
    seed=st.integers(0, 2**16),
    bias=st.booleans(),
    per_row=st.booleans(),
)
def test_within_the_bound(
    rows: int, columns: int, group: int, m: int, seed: int, bias: bool, per_row: bool
) -> None:
    group_size = min(group or columns, columns)
    layer, operands = layer_of(rows, columns, group_size, seed=seed, bias=bias, per_row=per_row)
    x = torch.randn(m, columns, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)
    kept = x.clone()
    y = layer(x)
    assert y.shape == (m, rows)
    assert y.dtype == torch.bfloat16
    assert y.is_contiguous()
    assert torch.equal(x, kept)
    exact, bound = exact_and_bound(x, operands, group_size)
    assert bool(((y.double() - exact).abs() <= bound).all())
    assert torch.equal(layer.codes(), operands.codes)


def test_this_machine_runs_it() -> None:
    assert dispatch.probe(torch_int4.KERNEL) is None


def test_agrees_with_the_reference_op(threads: int) -> None:
    """Real shapes, ragged last group (576 = 4 * 128 + 64), one row and many, 1 and 2 threads."""
    layer, o = layer_of(192, 576, 128, seed=3)
    generator = torch.Generator().manual_seed(5)
    for m in (1, 16, torch_int4.UNPACK_FROM, 130):
        x = torch.randn(m, 576, generator=generator).to(torch.bfloat16)
        want = reference.affine_linear(x.double(), o.codes, o.scales, o.zeros, 128, o.bias)
        exact, bound = exact_and_bound(x, o, 128)
        torch.testing.assert_close(want, exact, rtol=1e-9, atol=1e-9)
        assert bool(((layer(x).double() - want).abs() <= bound).all())


def test_both_paths_use_the_same_numbers() -> None:
    """The identity reads the weights back: the two paths must give equal bfloat16 values."""
    layer, _ = layer_of(100, 96, 32, bias=False)
    eye = torch.eye(96, dtype=torch.bfloat16)
    few = torch.cat([layer(part) for part in eye.split(8)])
    assert torch_int4.UNPACK_FROM <= 96
    assert torch.equal(few, layer(eye))


def test_panels_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, _ = layer_of(300, 64, 64)
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    whole = layer(x)
    monkeypatch.setattr(torch_int4, "PANEL", 64 * 128)
    assert torch.equal(layer(x), whole)
    panelled, _ = layer_of(300, 64, 64)  # packed in parts as well
    assert torch.equal(panelled.packed, layer.packed)


def test_float32_panels_where_bfloat16_is_not_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, operands = layer_of(70, 96, 32)
    monkeypatch.setattr(torch_int4, "matmul_dtype", lambda: torch.float32)
    x = torch.randn(60, 96, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    exact, bound = exact_and_bound(x, operands, 32)
    assert bool(((layer(x).double() - exact).abs() <= bound).all())


def test_code_equal_to_zero_point_is_nearly_nothing() -> None:
    """The shift is made from the rounded scale, so the two errors cancel at code = zero."""
    layer, o = layer_of(64, 32, 32, bias=False)
    eye = torch.eye(32, dtype=torch.bfloat16)
    weight = layer(eye).T.double()
    at_zero = o.codes == o.zeros
    limit = (U * (8 - o.zeros).abs() * o.scales.double() * 1.01).expand_as(weight)
    assert bool(at_zero.any())
    assert bool((weight.abs() <= limit)[at_zero].all())


@pytest.mark.parametrize(
    ("columns", "group_size", "expected"),
    [
        (576, 64, 64),
        (576, 128, 64),  # 128 would pad to 640 columns
        (576, 576, 64),  # a grid a row, cut into equal ones
        (1536, 1536, 256),
        (1024, 256, 256),
        (96, 96, 32),
        (1536, 192, 64),
        (1000, 256, 256),
        (40, 40, 64),
    ],
)
def test_best_group(columns: int, group_size: int, expected: int) -> None:
    assert torch_int4.best_group(columns, group_size) == expected


@pytest.mark.parametrize("block", [64, 32])
def test_unpack_inverts_the_documented_layout(block: int) -> None:
    """Bytes laid out by hand as torch documents them for AVX-512 (64) and AVX2 (32)."""
    codes = (torch.arange(128 * 6).reshape(128, 6) * 11 % 16).to(torch.uint8)
    half = block // 2
    laid = bytearray()
    for first in range(0, 128, block):
        for column in range(6):
            for j in range(half):
                low, high = codes[first + j, column], codes[first + half + j, column]
                laid.append(int(low) | int(high) << 4)
    packed = torch.frombuffer(laid, dtype=torch.uint8).view(128, 3)
    assert torch.equal(torch_int4.unpack(packed, block), codes)


def test_memory_is_one_copy_of_the_codes() -> None:
    """Far below the 16 bits of bfloat16: 4 bits and a pair of bfloat16 for each group of 64."""
    layer, _ = layer_of(192, 576, 64, bias=False)
    total = sum(tensor.nbytes for tensor in layer.tensors().values())
    assert total * 8 == 192 * 576 * 4.5


def test_an_unknown_layout_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    torch_int4.block_rows.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(torch_int4, "pack", lambda codes: codes[:, ::2].contiguous())
        with pytest.raises(RuntimeError, match="unknown layout"):
            torch_int4.block_rows()
    torch_int4.block_rows.cache_clear()
