"""Fake quantization against a slow reference, its gradients against autograd and differences."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quantlab.training.fake_quant import fake_quantize
from quantlab.training.linears import FakeLinear, StepLinear
from tests.tiny import random


class Through(torch.autograd.Function):
    """Rounding that lets gradients through."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return torch.round(x)

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> Tensor:
        return grads[0]


def slow(weight: Tensor, scale: Tensor, zero: Tensor, bits: int, group: int) -> Tensor:
    """The definition, weight by weight, rounding straight through; clamping as autograd has it."""
    rows = []
    for i in range(weight.shape[0]):
        row = []
        for j in range(weight.shape[1]):
            s, z = scale[i, j // group], Through.apply(zero[i, j // group])
            level = Through.apply(weight[i, j] / s) + z
            row.append((level.clamp(0, 2**bits - 1) - z) * s)
        rows.append(torch.stack(row))
    return torch.stack(rows)


def case(bits: int, columns: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Weights of which some lie far outside of the range, on both sides."""
    groups = -(-columns // group)
    weight = random(3, columns, seed=bits)
    scale = 0.6 / 2**bits * (3 + random(3, groups, seed=1).abs())
    zero = torch.rand(3, groups, generator=torch.Generator().manual_seed(2)) * (2**bits - 1)
    return weight, scale, zero


@pytest.mark.parametrize(("columns", "group"), [(16, 8), (20, 8), (6, 6), (5, 8)])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_values_and_gradients_are_those_of_the_definition(
    bits: int, columns: int, group: int
) -> None:
    given = [tensor.requires_grad_(True) for tensor in case(bits, columns, group)]
    again = [tensor.detach().double().requires_grad_(True) for tensor in given]
    fast = fake_quantize(*given, bits, min(group, columns), torch.float32)
    exact = slow(*again, bits, group)
    torch.testing.assert_close(fast.double(), exact, rtol=1e-5, atol=1e-6)
    outside = (exact - again[0]).abs() > spread_of(again[1], group, columns)
    assert bool(outside.any()), "the case has clamped weights"
    pull = random(3, columns, seed=9)
    fast.backward(pull)
    exact.backward(pull.double())
    for mine, reference in zip(given, again, strict=True):
        assert mine.grad is not None
        assert reference.grad is not None
        torch.testing.assert_close(mine.grad.double(), reference.grad, rtol=1e-4, atol=1e-5)


def spread_of(scale: Tensor, group: int, columns: int) -> Tensor:
    return scale.detach().repeat_interleave(group, 1)[:, :columns]


def test_the_step_s_gradient_is_that_of_lsq() -> None:
    """Esser et al. 2020, equation 3: -w/s + round(w/s) inside, -Q_N and Q_P outside."""
    weight = torch.tensor([[-2.0, -0.9, 0.26, 0.74, 5.0]])
    scale, zero = torch.tensor([[0.5]], requires_grad=True), torch.tensor([[2.0]])
    for index, expected in enumerate([-2.0, -2.0 + 1.8, 1.0 - 0.52, 1.0 - 1.48, 1.0]):
        scale.grad = None
        fake_quantize(weight, scale, zero, 2, 5, torch.float32)[0, index].backward()
        assert scale.grad is not None
        assert float(scale.grad) == pytest.approx(expected, abs=1e-6)


def test_outside_of_the_range_gradients_are_finite_differences() -> None:
    """Where w^ is smooth in s and z (clamped weights) the slope needs no straight-through."""
    weight, scale, zero = torch.tensor([[9.0, -9.0]]), torch.tensor([[0.7]]), torch.tensor([[1.0]])
    pull = torch.tensor([[0.3, -1.1]])

    def value(s: Tensor, z: Tensor) -> float:
        low, high = -z * s, (3 - z) * s
        return float((pull * torch.cat([high, low], 1)).sum())

    s, z = scale.clone().requires_grad_(True), zero.clone().requires_grad_(True)
    fake_quantize(weight, s, z, 2, 2, torch.float32).backward(pull)
    h = 1e-2
    assert s.grad is not None
    assert z.grad is not None
    slope = (value(scale + h, zero) - value(scale - h, zero)) / (2 * h)
    assert float(s.grad) == pytest.approx(slope, abs=1e-4)
    slope = (value(scale, zero + h) - value(scale, zero - h)) / (2 * h)
    assert float(z.grad) == pytest.approx(slope, abs=1e-4)


@pytest.mark.parametrize("columns", [16, 20])
def test_frozen_codes_answer_as_the_linear_they_come_from(columns: int) -> None:
    """And the gradient of their steps is that of (code - zero) * step."""
    weight, scale, zero = case(3, columns, 8)
    plain = torch.nn.Linear(columns, 3)
    fake = FakeLinear(plain, weight, scale, zero, 3, 8)
    fixed = StepLinear.of(fake)
    x = random(5, columns, seed=3)
    torch.testing.assert_close(fixed(x), fake(x), rtol=1e-5, atol=1e-5)
    fixed(x).square().sum().backward()
    steps = scale.clone().requires_grad_(True)
    codes, zeros = fake.codes()
    centred = codes - zeros.repeat_interleave(8, 1)[:, :columns]
    dense = centred * steps.repeat_interleave(8, 1)[:, :columns]
    torch.nn.functional.linear(x, dense, plain.bias).square().sum().backward()
    assert fixed.scale.grad is not None
    torch.testing.assert_close(fixed.scale.grad, steps.grad, rtol=1e-4, atol=1e-4)


def test_packed_weights_mean_what_was_trained() -> None:
    weight, scale, zero = case(2, 20, 8)
    fake = FakeLinear(torch.nn.Linear(20, 3), weight, scale.half().float(), zero, 2, 8)
    dense = fake_quantize(fake.weight, fake.scale, fake.zero, 2, 8, torch.float32)
    packed = StepLinear.of(fake).packed()
    torch.testing.assert_close(packed.dequantize(), dense.detach(), rtol=1e-5, atol=1e-6)
    assert packed.bits == 2


def test_steps_stay_positive() -> None:
    weight, scale, zero = case(2, 16, 8)
    fake = FakeLinear(torch.nn.Linear(16, 3), weight, scale, zero, 2, 8)
    with torch.no_grad():
        fake.scale[0, 0], fake.zero[1, 0] = -1.0, 7.0
    fake.settle()
    assert float(fake.scale.detach().min()) > 0
    assert float(fake.zero.detach().max()) <= 3
