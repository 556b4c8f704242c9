"""The C++ kernels of every level against float64, within bounds that `native_bounds` derives."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import dispatch, native, native_linear
from kernels.base import Operands, Problem
from tests.kernels import native_bounds as bounds
from tests.kernels.native_bounds import Case

pytestmark = pytest.mark.xdist_group("native")

ANY_WEIGHT = (native.EXACT, native.BF16, native.INT8_BLOCK)
ANY_GRID = (*ANY_WEIGHT, native.INT8_ROW)
ONE_GRID_A_ROW = (native.INT8_ROW, native.INT8_GIVEN, native.INT8_RANGE_ROW, native.INT8_RANGE)
W8A8 = (*ONE_GRID_A_ROW, native.INT8_OUTLIERS)


@pytest.fixture(autouse=True, scope="module")
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def misaligned(tensor: Tensor) -> Tensor:
    """A copy that starts 4 bytes behind an aligned address."""
    room = torch.empty(tensor.numel() + 1)
    assert room.data_ptr() % 16 == 0
    return room[1:].view(tensor.shape).copy_(tensor)


def check(case: Case, x: Tensor, how: native.How, level: str, *, bias: bool = True) -> Tensor:
    """The product lies within the bound of the exact one; nothing that goes in is changed."""
    rows, _ = case.weight.shape
    b = misaligned(bounds.noise(rows, seed=rows)) if bias else None
    x = misaligned(x)
    kept = x.clone()
    y = case.matrix.linear(x, how, b)
    assert y.shape == (x.shape[0], rows)
    assert torch.equal(x, kept)
    want, bound = bounds.expected(case, x, b, how, level)
    over = (y.double() - want).abs() - bound
    assert bool((over <= 0).all()), f"{float(over.max())} above the bound {float(bound.max())}"
    return y


def inputs(rows: int, columns: int, seed: int, spread: float) -> Tensor:
    """Normal inputs whose columns differ in size, as those of a model do."""
    sizes = torch.exp(spread * bounds.noise(columns, seed=seed + 1))
    return bounds.noise(rows, columns, seed=seed) * sizes


shapes = st.tuples(st.integers(1, 70), st.one_of(st.integers(1, 200), st.sampled_from([256, 576])))
some_rows = st.one_of(st.integers(1, 40), st.sampled_from([1, 5, 6, 16, 17, 33]))
group_sizes = st.sampled_from([4, 8, 12, 20, 28, 32, 36, 64, 96, 128, 0])
seeds = st.integers(0, 2**16)


@settings(deadline=None, max_examples=80)
@given(
    shape=shapes,
    bits=st.integers(2, 8),
    group=group_sizes,
    zeros=st.sampled_from(bounds.ZERO_POINTS),
    wide=st.booleans(),
    m=some_rows,
    mode=st.sampled_from(ANY_GRID),
    threads=st.sampled_from([1, 2]),
    bias=st.booleans(),
    seed=seeds,
    spread=st.sampled_from([0.0, 1.5]),
)
def test_grids_of_2_to_8_bits(
    level: str,
    shape: tuple[int, int],
    bits: int,
    group: int,
    zeros: str,
    wide: bool,
    m: int,
    mode: int,
    threads: int,
    bias: bool,
    seed: int,
    spread: float,
) -> None:
    torch.set_num_threads(threads)
    case = bounds.affine(*shape, bits, group, zeros=zeros, wide=wide, seed=seed)
    check(case, inputs(m, shape[1], seed, spread), native.How(mode), level, bias=bias)
    assert case.codes is not None
    assert torch.equal(case.matrix.codes(), case.codes)


@settings(deadline=None, max_examples=40)
@given(
    shape=shapes,
    group=st.one_of(st.none(), group_sizes),
    wide=st.booleans(),
    m=some_rows,
    mode=st.sampled_from(ANY_WEIGHT),
    threads=st.sampled_from([1, 2]),
    bias=st.booleans(),
    seed=seeds,
)
def test_tables_and_bfloat16_weights(
    level: str,
    shape: tuple[int, int],
    group: int | None,
    wide: bool,
    m: int,
    mode: int,
    threads: int,
    bias: bool,
    seed: int,
) -> None:
    """`group` None: bfloat16 weights."""
    torch.set_num_threads(threads)
    if group is None:
        case = bounds.plain(*shape, seed=seed)
    else:
        case = bounds.table(*shape, group, wide=wide, seed=seed)
    check(case, inputs(m, shape[1], seed, 1.0), native.How(mode), level, bias=bias)
    if case.codes is not None:
        assert torch.equal(case.matrix.codes(), case.codes)


@settings(deadline=None, max_examples=80)
@given(
    shape=shapes,
    wide=st.booleans(),
    m=some_rows,
    mode=st.sampled_from(W8A8),
    step=st.floats(2.0**-7, 0.5, width=32),
    zero=st.integers(0, 255),
    threshold=st.sampled_from([1.0, 3.0, 6.0, 1e3]),
    threads=st.sampled_from([1, 2]),
    bias=st.booleans(),
    seed=seeds,
    spread=st.sampled_from([0.0, 1.5]),
    shifted=st.booleans(),
)
def test_8_bit_inputs(
    level: str,
    shape: tuple[int, int],
    wide: bool,
    m: int,
    mode: int,
    step: float,
    zero: int,
    threshold: float,
    threads: int,
    bias: bool,
    seed: int,
    spread: float,
    shifted: bool,
) -> None:
    torch.set_num_threads(threads)
    case = bounds.affine(*shape, 8, 0, zeros="middle", wide=wide, seed=seed)
    x = inputs(m, shape[1], seed, spread)
    x = x.abs() if shifted else x
    check(case, x, native.How(mode, step, zero, threshold), level, bias=bias)


@pytest.mark.parametrize("mode", [*W8A8, native.INT8_BLOCK])
@pytest.mark.parametrize("m", [2, 7])
def test_ties_go_to_even(level: str, m: int, mode: int) -> None:
    """Steps of 1 and of 1/4 and inputs at half of them, and a row of zeros."""
    case = bounds.affine(20, 96, 8, 0, zeros="middle", wide=True, seed=1)
    x = ((torch.arange(96 * m) * 7 % 253) - 126).view(m, 96) / 2
    x[:, ::32] = 127  # the step a row and a block
    x[-1] = 0
    check(case, x, native.How(mode, 0.25, 121, 1e3), level)
    check(case, x, native.How(mode, 1.0, 0, 1e3), level, bias=False)


@pytest.mark.parametrize("mode", [native.EXACT, native.BF16, *W8A8])
def test_blocks_of_inputs(level: str, mode: int) -> None:
    """So many columns and rows that AMX takes the input in parts that stay in cache."""
    columns, m = (8256, 116) if mode in W8A8 else (4160, 116)
    case = bounds.affine(40, columns, 8, 0, zeros="middle", wide=True, seed=2)
    check(case, inputs(m, columns, 3, 0.0), native.How(mode, 0.03, 121, 3.0), level)


@pytest.mark.parametrize("zeros", bounds.ZERO_POINTS)
@pytest.mark.parametrize("mode", [native.EXACT, native.INT8_BLOCK])
def test_columns_in_parts(level: str, mode: int, zeros: str) -> None:
    """So many columns that the unpacked codes of a pair of blocks are taken in parts."""
    case = bounds.affine(40, 16448, 4, 96, zeros=zeros, wide=False, seed=4)
    check(case, inputs(19, 16448, 5, 1.0), native.How(mode), level)


@pytest.mark.parametrize("mode", [native.EXACT, native.INT8_BLOCK, *W8A8])
def test_threads_do_not_change_a_bit(level: str, mode: int) -> None:
    case = bounds.affine(200, 160, 8, 0, zeros="middle", wide=False, seed=4)
    for m in (1, 5, 20):
        x = inputs(m, 160, m, 1.0)
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(case.matrix.linear(x, native.How(mode, 0.03, 121, 3.0)))
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])


def test_no_rows_and_strided_inputs(level: str) -> None:
    case = bounds.affine(20, 50, 4, 12, zeros="whole", wide=False, seed=5)
    for mode in range(8):
        if mode in ANY_GRID:
            assert case.matrix.linear(torch.empty(0, 50), native.How(mode)).shape == (0, 20)
    wide = bounds.noise(7, 100, seed=6)
    how = native.How(native.EXACT)
    assert torch.equal(
        case.matrix.linear(wide[:, ::2], how), case.matrix.linear(wide[:, ::2].clone(), how)
    )


def test_python_threads_wait_for_each_other(level: str) -> None:
    """The page may run two models at once; a pool whose loop is overwritten hangs or mixes them."""
    torch.set_num_threads(2)
    shared = native.native()
    cases = [bounds.affine(300, 200, 4, 20, zeros="whole", wide=True, seed=s) for s in (7, 8)]
    x, how = inputs(3, 200, 9, 0.0), native.How(native.EXACT)
    want = [case.matrix.linear(x, how) for case in cases]
    right = [0, 0]

    def multiply(index: int) -> None:
        torch.set_num_threads(2)
        assert native.native() is shared
        for _ in range(300):
            right[index] += torch.equal(cases[index].matrix.linear(x, how), want[index])

    workers = [threading.Thread(target=multiply, args=(i,), daemon=True) for i in (0, 1)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert right == [300, 300]


def test_the_level_that_was_asked_for_runs(level: str) -> None:
    assert native.native().level.name == level
    assert native.native().library.ql_level() == native.native().level.number


@pytest.mark.parametrize(
    "kernel", [native_linear.WEIGHT_ONLY, native_linear.W8A8], ids=["w", "w8a8"]
)
def test_the_kernels_are_chosen_and_pass_their_probe(level: str, kernel: object) -> None:
    dispatch.probe.cache_clear()
    kind = None if kernel is native_linear.WEIGHT_ONLY else "dynamic_tensor"
    problem = Problem(20, 128, 8, 128, True, kind, "cpu", torch.bfloat16)
    choice, found = dispatch.choose(problem)
    assert found is kernel
    assert choice.kernel.startswith(native_linear.NAME)
    assert choice.execution == "packed"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", [None, "token", "tensor", "outlier"])
def test_a_layer_is_the_product_in_its_dtype(
    level: str, kind: str | None, dtype: torch.dtype
) -> None:
    """`NativeLinear` passes grids shared by all rows, the input's grid and the bias on."""
    generator = torch.Generator().manual_seed(10)
    codes = torch.randint(0, 256, (24, 80), generator=generator).to(torch.uint8)
    bias = bounds.noise(24, seed=11).to(dtype)
    shared = torch.full((1, 1), 128.0)
    operands = Operands(codes, torch.full((1, 1), 0.01), shared, bias, 0.02, 100, 2.5)
    problem = Problem(24, 80, 8, 80, True, kind, "cpu", dtype)  # type: ignore[arg-type]
    layer = native_linear.NativeLinear(problem, operands)
    x = inputs(3, 80, 12, 0.0).to(dtype)
    how = native.How(native_linear.MODES[kind], 0.02, 100, 2.5)
    weight = (codes.double() - 128) * float(torch.tensor(0.01))
    size = (codes.double() + 128) * float(torch.tensor(0.01))
    case = Case(layer.matrix, codes, weight, size, 80)
    want, bound = bounds.expected(case, x.float(), bias, how, level)
    y = layer(x)
    assert y.dtype == dtype
    last = 2.0**-8 if dtype == torch.bfloat16 else 0.0  # rounding the result
    assert bool(((y.double() - want).abs() <= bound + last * (want.abs() + bound)).all())
    assert torch.equal(layer.codes(), codes)
