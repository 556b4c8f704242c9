"""8-bit weight-only kernel against float64, on odd shapes and on both of its paths."""

from __future__ import annotations

import pytest
import torch

from kernels import dispatch, torch_int8
from kernels.base import Operands, Problem

pytestmark = pytest.mark.usefixtures("without_native")


@pytest.mark.parametrize("shape", [(64, 64), (50, 72), (7, 33), (130, 576), (1, 1)])
@pytest.mark.parametrize("tokens", [1, 3, torch_int8.UNPACK_FROM, 40])
@pytest.mark.parametrize("bias", [True, False])
def test_products_are_within_their_bound(shape: tuple[int, int], tokens: int, bias: bool) -> None:
    rows, columns = shape
    generator = torch.Generator().manual_seed(rows)
    codes = torch.randint(0, 256, shape, generator=generator).to(torch.uint8)
    scales = torch.rand(rows, 1, generator=generator) + 0.1
    added = torch.randn(rows, generator=generator) if bias else None
    x = torch.randn(tokens, columns, generator=generator).bfloat16()
    problem = Problem(rows, columns, 8, columns, True, None, "cpu", torch.bfloat16)
    choice, layer = dispatch.prepare(
        problem, lambda: Operands(codes, scales, torch.full((rows, 1), 128.0), added)
    )
    assert (choice.kernel, choice.execution) == (torch_int8.NAME, "packed")
    assert layer is not None
    assert torch.equal(layer.codes(), codes)
    y = layer(x)
    weight = (codes.double() - 128) * scales.double()
    exact = x.double() @ weight.T + (0 if added is None else added.double())
    # The sum is rounded to bfloat16 before and after scaling; float32 sums err by far less.
    size = x.double().abs() @ weight.abs().T
    bound = 2**-8 * 1.01 * (2 * exact.abs() + (0 if added is None else added.abs())) + 2**-20 * size
    assert y.dtype == torch.bfloat16
    assert y.shape == (tokens, rows)
    assert bool(((y.double() - exact).abs() <= bound + 1e-6).all())


def test_what_it_cannot_do_it_says() -> None:
    kernel = torch_int8.KERNEL
    good = Problem(64, 64, 8, 64, True, None, "cpu", torch.bfloat16)
    assert kernel.refusal(good) is None
    for change, reason in (
        ({"group_size": 32}, "no groups within a row"),
        ({"symmetric": False}, "no zero-points"),
        ({"activation": "token"}, "takes no 8-bit inputs"),
        ({"bits": 4}, "no 4-bit codes"),
    ):
        assert reason in str(kernel.refusal(Problem(**{**vars(good), **change})))
