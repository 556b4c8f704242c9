"""Quantizing and measuring give the same with the native loops and without them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels import native_solve
from quantlab.compensation import compensate, inverse_factor
from quantlab.engine import Sampler
from quantlab.grid import find_grid, refit_scales, spread, to_codes
from quantlab.methods.awq import AWQConfig, rounding_error
from quantlab.metrics.divergence import compare_logits

pytestmark = pytest.mark.xdist_group("native")


def both(monkeypatch: pytest.MonkeyPatch, call: Callable[[], tuple[Tensor, ...]]) -> None:
    """What `call` answers is the same, to float32, where native loops run and where they do not."""
    ran: list[bool] = []
    ready = native_solve.ready

    def noted(*tensors: Tensor | None) -> bool:
        ran.append(ready(*tensors))
        return ran[-1]

    monkeypatch.setattr(native_solve, "ready", noted)
    native = call()
    if not ran or not all(ran):
        pytest.skip("there are no native kernels on this machine")
    monkeypatch.setattr(native_solve, "ready", lambda *tensors: False)
    for got, want in zip(native, call(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.fixture
def weight() -> Tensor:
    return torch.randn(33, 100, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def moment() -> Tensor:
    x = torch.randn(200, 100, generator=torch.Generator().manual_seed(4))
    return x.t() @ x / 200


def test_drawn_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = 3 * torch.randn(500, generator=torch.Generator().manual_seed(5))

    def draws() -> tuple[Tensor, ...]:
        sampler = Sampler(0.9, 0.95, seed=7)
        return (torch.tensor([sampler(logits) for _ in range(50)]),)

    both(monkeypatch, draws)


@pytest.mark.parametrize("owing", [False, True])
def test_compensation(
    weight: Tensor, moment: Tensor, owing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = torch.argsort(moment.diagonal(), descending=True)
    upper = inverse_factor(moment[order][:, order], torch.zeros(100, dtype=torch.bool), 0.1)
    grids = find_grid(weight, 3, 32, symmetric=False)
    debt = (upper * 0.01).triu(1) if owing else None

    def answers() -> tuple[Tensor, ...]:
        found = compensate(weight, order, upper, grids, 3, 32, debt=debt)
        return found.codes, found.scale, found.zero, found.values()

    both(monkeypatch, answers)


def test_refitted_scales(weight: Tensor, moment: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of a moment and codes that do not lie in order, as views of others do."""
    scale, zero = find_grid(weight, 4, 32, symmetric=False, scale_dtype=torch.float16)
    codes = to_codes(weight, spread(scale, 32, 100), spread(zero, 32, 100), 4).t().clone().t()
    answer = torch.float32
    both(
        monkeypatch,
        lambda: (
            refit_scales(weight, codes, scale, zero, 32, moment, damping=0.1, scale_dtype=answer),
        ),
    )


@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
def test_clipping(
    weight: Tensor,
    moment: Tensor,
    weighed: bool,
    symmetric: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    both(
        monkeypatch,
        lambda: find_grid(
            *(weight, 4, 32),
            symmetric=symmetric,
            clip=True,
            moment=moment if weighed else None,
            scale_dtype=torch.float16,
        ),
    )


@pytest.mark.parametrize("symmetric", [False, True])
def test_awq_errors(weight: Tensor, symmetric: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    config = AWQConfig(bits=4, symmetric=symmetric)
    scale = torch.linspace(0.5, 2.0, 100)
    both(monkeypatch, lambda: (rounding_error(weight, scale, 32, config),))


def test_divergences(monkeypatch: pytest.MonkeyPatch) -> None:
    p, q = (torch.randn(4, 300, generator=torch.Generator().manual_seed(n)) for n in (1, 2))
    both(monkeypatch, lambda: compare_logits(p, q, torch.tensor([1, 2, 3, 299])))
