"""Triton's W4A16 in its interpreter, against float64 within a bound that counts every rounding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import gpu, reference
from kernels.base import Operands, Problem

pytest.importorskip("triton")

from kernels.gpu import w4a16

pytestmark = pytest.mark.usefixtures("interpreted")

U32 = 2.0**-24
U = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
TINY = 2.0**-25
"""Half the distance between the smallest numbers of float16."""


def layer_of(
    rows: int,
    columns: int,
    group_size: int,
    bits: int = 4,
    dtype: torch.dtype = torch.bfloat16,
    *,
    seed: int = 0,
    bias: bool = True,
    per_row: bool = True,
    symmetric: bool = False,
    half_scales: bool = True,
) -> tuple[w4a16.GridLinear, Operands]:
    generator = torch.Generator().manual_seed(seed)
    grids = (rows if per_row else 1, -(-columns // group_size))
    scales = torch.rand(grids, generator=generator) * 0.02 + 1e-4
    zeros = torch.randint(0, 2**bits, grids, generator=generator).float()
    operands = Operands(
        codes=torch.randint(0, 2**bits, (rows, columns), generator=generator).to(torch.uint8),
        scales=scales.half().float() if half_scales else scales,
        zeros=torch.full(grids, 2.0 ** (bits - 1)) if symmetric else zeros,
        bias=torch.randn(rows, generator=generator) if bias else None,
    )
    problem = Problem(rows, columns, bits, group_size, symmetric, None, "cpu", dtype)
    layer = gpu.W4A16.prepare(problem, operands)
    assert isinstance(layer, w4a16.GridLinear)
    return layer, operands


def bound(x: Tensor, o: Operands, group_size: int, layer: w4a16.GridLinear, y: Tensor) -> Tensor:
    """How far float32 sums and one rounding of the output may be from the exact y (float64).

    Products of a 16-bit float (at most 11 significant bits) and a whole number up to 255 are exact
    in float32. A sum of n numbers errs by at most n - 1 roundings of the sum of their magnitudes,
    in any order: within a block, over the blocks, over the parts. One more rounding each for the
    product with the scale and the bias. 1% covers products of errors.
    """
    weight = reference.dequantize(o.codes, o.scales.double(), o.zeros.double(), group_size).abs()
    size = x.double().abs() @ weight.T
    roundings = layer.block + layer.blocks + w4a16.PARTS + 1
    error = roundings * U32 * size
    if o.bias is not None:
        error = error + U32 * (size + o.bias.double().abs())
    return 1.01 * (error + U[x.dtype] * (y.abs() + error)) + TINY


@settings(deadline=None, max_examples=80)
@given(
    rows=st.integers(1, 200),
    columns=st.integers(1, 400),
    group=st.sampled_from([32, 64, 96, 128, 160, 256, 0]),
    bits=st.sampled_from(gpu.W4A16.bits),
    dtype=st.sampled_from(gpu.W4A16.dtypes),
    m=st.sampled_from([1, 2, 3, 16, 17, 70]),
    seed=st.integers(0, 2**16),
    bias=st.booleans(),
    per_row=st.booleans(),
    symmetric=st.booleans(),
    half_scales=st.booleans(),
    multiprocessors=st.sampled_from([1, 4, 108]),
)
def test_within_the_bound(
    rows: int,
    columns: int,
    group: int,
    bits: int,
    dtype: torch.dtype,
    m: int,
    seed: int,
    bias: bool,
    per_row: bool,
    symmetric: bool,
    half_scales: bool,
    multiprocessors: int,
) -> None:
    """Few multiprocessors: no sum is split. Many: up to PARTS parts."""
    group_size = min(group or columns, columns)
    layer, o = layer_of(
        rows, columns, group_size, bits, dtype,
        seed=seed, bias=bias, per_row=per_row, symmetric=symmetric, half_scales=half_scales,
    )  # fmt: skip
    layer.multiprocessors = multiprocessors
    x = torch.randn(m, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)
    kept = x.clone()
    y = layer(x)
    assert (y.shape, y.dtype) == ((m, rows), dtype)
    assert y.is_contiguous()
    assert torch.equal(x, kept)
    want = reference.affine_linear(x.double(), o.codes, o.scales, o.zeros, group_size, o.bias)
    assert bool(((y.double() - want).abs() <= bound(x, o, group_size, layer, want)).all())
    assert torch.equal(layer.codes(), o.codes)


def test_real_shapes() -> None:
    """A ragged last group (576 = 4 * 128 + 64), rows of x for every program and tile."""
    layer, o = layer_of(192, 576, 128, seed=3)
    generator = torch.Generator().manual_seed(5)
    for m in (1, 2, 64, 130):
        x = torch.randn(m, 576, generator=generator).to(torch.bfloat16)
        want = reference.affine_linear(x.double(), o.codes, o.scales, o.zeros, 128, o.bias)
        assert bool(((layer(x).double() - want).abs() <= bound(x, o, 128, layer, want)).all())


def test_every_program_reads_the_same_weights() -> None:
    """The identity reads the weights back, rounded once: by rows, by tiles, split or not."""
    layer, o = layer_of(100, 96, 32, bias=False)
    exact = reference.dequantize(o.codes, o.scales, o.zeros, 32).T.to(torch.bfloat16)
    eye = torch.eye(96, dtype=torch.bfloat16)
    for multiprocessors in (1, 108):
        layer.multiprocessors = multiprocessors
        assert torch.equal(torch.cat([layer(row) for row in eye.split(1)]), exact)
        assert torch.equal(torch.cat([layer(part) for part in eye.split(16)]), exact)
        assert torch.equal(layer(eye), exact)


@pytest.mark.parametrize("m", [1, 5])
@pytest.mark.parametrize(
    ("multiprocessors", "parts"),
    [(1, 1), (8, 4), (1000, 9)],
)
def test_sums_are_split_where_tiles_are_few(m: int, multiprocessors: int, parts: int) -> None:
    """32 rows are one tile of 64, or two of 16 for one row of x; 576 columns are 9 blocks of 64."""
    layer, _ = layer_of(32, 576, 64, bias=False)
    layer.multiprocessors = multiprocessors * (1 if m == 5 else 2)
    x = torch.randn(m, 576).to(torch.bfloat16)
    launches = layer.launches(x, x.new_empty(m, 32))
    first = launches[0]
    assert first.arguments["blocks_per_part"] * first.grid[2 if m > 1 else 1] >= 9
    assert first.grid[2 if m > 1 else 1] == (5 if parts == 4 else parts)
    assert len(launches) == (1 if parts == 1 else 2)


def test_the_parts_are_added_in_a_fixed_order() -> None:
    layer, _ = layer_of(40, 576, 64)
    x = torch.randn(3, 576).to(torch.float16)
    assert torch.equal(layer(x), layer(x))
    program = layer.launches(x, x.new_empty(3, 40))[1]
    assert program.program is w4a16.add_parts
    assert program.arguments["parts"] > 1


def test_no_rows_of_x() -> None:
    layer, _ = layer_of(40, 96, 32)
    assert layer(torch.empty(0, 96, dtype=torch.bfloat16)).shape == (0, 40)


def test_rows_of_x_that_are_not_contiguous() -> None:
    layer, _ = layer_of(40, 96, 32)
    x = torch.randn(3, 192).to(torch.bfloat16)[:, ::2]
    assert torch.equal(layer(x), layer(x.contiguous()))


@pytest.mark.parametrize(
    ("columns", "group_size", "expected"),
    [
        (576, 64, 64),
        (576, 128, 64),  # 128 would pad to 640 columns
        (1536, 128, 128),
        (576, 576, 64),
        (1536, 1536, 128),
        (96, 96, 32),
        (1536, 192, 64),
        (1536, 160, 32),
        (40, 40, 64),
    ],
)
def test_best_block(columns: int, group_size: int, expected: int) -> None:
    assert w4a16.best_block(columns, group_size) == expected


@pytest.mark.parametrize(("bits", "width"), [(2, 2), (3, 4), (4, 4), (5, 8), (7, 8), (8, 8)])
def test_packed_bytes_are_the_documented_ones(bits: int, width: int) -> None:
    """Bytes laid out by hand: block by block, row by row, the first code in the low bits."""
    rows, columns, block = 3, 70, 32
    codes = (torch.arange(rows * columns).reshape(rows, columns) * 11 % 2**bits).to(torch.uint8)
    laid = bytearray()
    per = 8 // width
    for first in range(0, columns, block):
        for row in range(rows):
            for start in range(first, first + block, per):
                byte = 0
                for place, column in enumerate(range(start, start + per)):
                    if column < columns:
                        byte |= int(codes[row, column]) << (place * width)
                laid.append(byte)
    assert w4a16.width_of(bits) == width
    packed = w4a16.pack(codes, width, block)
    assert bytes(packed.flatten().tolist()) == bytes(laid)
    assert torch.equal(w4a16.unpack(packed, width, columns), codes)


def test_memory_is_one_copy_of_the_codes() -> None:
    """4 bits a weight, and for each group of 64 a float16 scale and a zero-point of one byte."""
    layer, _ = layer_of(192, 576, 64, bias=False)
    total = sum(tensor.nbytes for tensor in layer.tensors().values())
    assert total * 8 == 192 * 576 * (4 + 24 / 64)


def test_scales_keep_their_precision() -> None:
    assert layer_of(40, 96, 32)[0].scales.dtype == torch.float16
    layer, o = layer_of(40, 96, 32, half_scales=False)
    assert torch.equal(layer.scales.T, o.scales)


@pytest.mark.parametrize("zero", [2.5, -1.0, 256.0])
def test_zero_points_that_do_not_fit_are_refused(zero: float) -> None:
    codes = torch.zeros(8, 32, dtype=torch.uint8)
    operands = Operands(codes, torch.ones(8, 1), torch.full((8, 1), zero))
    problem = Problem(8, 32, 4, 32, False, None, "cpu", torch.bfloat16)
    with pytest.raises(RuntimeError, match="zero-points"):
        gpu.W4A16.prepare(problem, operands)


def test_the_probe_passes_and_notices_a_wrong_product(monkeypatch: pytest.MonkeyPatch) -> None:
    w4a16.probe("cpu")
    right = w4a16.GridLinear.__call__
    monkeypatch.setattr(w4a16.GridLinear, "__call__", lambda self, x: right(self, x) * 1.01)
    with pytest.raises(RuntimeError, match="product"):
        w4a16.probe("cpu")
