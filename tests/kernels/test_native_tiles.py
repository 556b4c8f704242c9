"""Many rows at once: more rows, columns and outputs than the caches take whole, down to the bit.

Where steps are 1 and sums stay below 2^24, float32 holds every product exactly: then the kernels
have to give it, in whatever parts they take it.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import build, native, native_probe, reference
from tests.kernels import native_bounds as bounds

pytestmark = pytest.mark.xdist_group("native")


@pytest.fixture(autouse=True, scope="module")
def _compiled() -> Iterator[None]:
    """On this machine's own level, and with the threads as they were afterwards."""
    try:
        build.library(build.chosen())
    except build.BuildError as error:
        pytest.skip(str(error))
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def whole(*shape: int, below: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-below, below + 1, shape, generator=generator)


def exact_case(rows: int, columns: int, m: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """(weight, x, their product) of whole numbers, int64."""
    weight, x = (
        whole(rows, columns, below=127, seed=seed),
        whole(m, columns, below=3, seed=seed + 1),
    )
    x[:, 0] = 127 * (1 - 2 * (torch.arange(m) % 2))  # max |x|: the step of a row is 1
    return weight, x, (x.double() @ weight.double().T).long()


SHAPES = [
    (40, 2200, 500),  # columns in two parts
    (33, 6500, 520),  # seven parts, rows in two blocks
    (560, 130, 515),  # outputs past the caches, rows in two blocks
    (530, 70, 500),  # outputs that are not aligned
    (1040, 33, 300),  # fewer steps than rows to write
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("threads", [1, 2])
def test_sums_of_whole_numbers_are_exact(shape: tuple[int, int, int], threads: int) -> None:
    """8-bit weights and inputs with steps of 1 in every mode, and bfloat16, with a bias."""
    torch.set_num_threads(threads)
    rows, columns, m = shape
    weight, x, want = exact_case(rows, columns, m, seed=rows)
    bias = whole(rows, below=1000, seed=2).float()
    want = want + bias.long()
    assert want.abs().max() < 2**24
    ones = torch.ones(rows, 1)
    packed = native.Matrix.affine((weight + 128).byte(), ones, ones * 128, 8, columns)
    shifted = x.clone()
    shifted[:, 0] = 127
    shifted[:, 1] = -128  # together a range of 255, so that its step is 1
    more = (shifted.double() @ weight.double().T).long() + bias.long()
    for how, data, product in (
        (native.How(native.INT8_ROW), x, want),
        (native.How(native.INT8_GIVEN, 1.0, 128), x, want),
        (native.How(native.INT8_GIVEN, 1.0, 120), x.clamp(-100, 100), None),
        (native.How(native.INT8_RANGE_ROW), shifted, more),
        (native.How(native.INT8_RANGE), shifted, more),
        (native.How(native.BF16), x, want),
    ):
        if product is None:
            product = (data.double() @ weight.double().T).long() + bias.long()
        y = packed.linear(data.float(), how, bias)
        assert torch.equal(y.long(), product), how.mode
        assert torch.equal(y, y.round())
    plain = native.Matrix.plain(weight)
    assert torch.equal(plain.linear(x.float(), native.How(native.BF16), bias).long(), want)


@settings(deadline=None, max_examples=25)
@given(
    rows=st.integers(1, 100),
    columns=st.integers(1000, 2300),
    m=st.integers(480, 560),
    bits=st.sampled_from([2, 3, 4, 8, 16]),
    mode=st.sampled_from([native.BF16, native.INT8_ROW]),
    threads=st.sampled_from([1, 2]),
    seed=st.integers(0, 2**16),
)
def test_parts_of_columns(
    rows: int, columns: int, m: int, bits: int, mode: int, threads: int, seed: int
) -> None:
    """Random weights in groups whose parts begin anywhere, within the bounds of `native_bounds`."""
    torch.set_num_threads(threads)
    if bits == 16:
        case, mode = bounds.plain(rows, columns, seed=seed), native.BF16
    elif mode == native.INT8_ROW:
        case = bounds.affine(rows, columns, 8, 0, zeros="whole", wide=False, seed=seed)
    else:
        case = bounds.affine(rows, columns, bits, 60, zeros="fractional", wide=True, seed=seed)
    x = bounds.noise(m, columns, seed=seed)
    level = native.native().level.name
    want, bound = bounds.expected(case, x, None, native.How(mode), level)
    y = case.matrix.linear(x, native.How(mode))
    assert bool(((y.double() - want).abs() <= bound).all())


def test_near_ties_round_as_division_does() -> None:
    """A product with 1 / step falls on the other side of some ties; an identity as weight shows
    the codes."""
    identity = 128 + torch.eye(64, dtype=torch.uint8)
    ones = torch.ones(64, 1)
    packed = native.Matrix.affine(identity, ones, ones * 128, 8, 64)
    steps = torch.rand(200, generator=torch.Generator().manual_seed(1)) + 0.01
    for step in steps.tolist():
        x = ((torch.arange(64 * 8) % 250 - 124.5) * torch.tensor(step)).view(8, 64)
        codes = reference.quantize_tensor(x, step, 128) - 128
        y = packed.linear(x, native.How(native.INT8_GIVEN, step, 128))
        assert torch.equal(torch.round(y / step), codes)


@pytest.mark.parametrize("mode", [native.INT8_ROW, native.BF16])
@pytest.mark.parametrize("rows", [1, 40])
def test_joined_matrices_read_one_input(rows: int, mode: int) -> None:
    """Bit for bit as apart, also where the first of them does not share."""
    made = [native_probe.random_matrix(n, 96, 8, 96) for n in (48, 32, 48)]
    x = torch.randn(rows, 96)
    apart, joined = torch.zeros(rows, 48), torch.zeros(rows, 48)
    native_probe.multiply_each(made, x, apart, native.How(mode))
    native_probe.multiply_each(made, x, joined, native.How(mode), [False, True, True])
    assert torch.equal(apart, joined)


@pytest.mark.parametrize(
    ("joined", "message"),
    [([True, False], "first one False"), ([False], "2 flags"), ([False, True], "cannot share")],
)
def test_wrong_sharing_is_refused(joined: list[bool], message: str) -> None:
    made = [native_probe.random_matrix(16, columns, 8, columns) for columns in (96, 64)]
    with pytest.raises(ValueError, match=message):
        native_probe.multiply_each(
            made, torch.randn(2, 96), torch.zeros(2, 16), native.How(native.INT8_ROW), joined
        )


def test_room_is_memory_of_the_shape_asked_for() -> None:
    for rows, columns in ((0, 5), (3, 7), (1000, 1000)):
        made = native_probe.room(rows, columns).fill_(1.5)
        assert made.shape == (rows, columns)
        assert made.dtype == torch.float32
        assert bool((made == 1.5).all())
