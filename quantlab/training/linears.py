"""Linears under training: `FakeLinear` learns weight, step and zero-point, `StepLinear` only steps.

Both compute with the dequantized weight in the dtype of the matrix product (bfloat16 where the CPU
has it), while what is learned stays in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from quantlab.grid import spread, to_codes
from quantlab.packing import AffineWeight, affine
from quantlab.training.fake_quant import fake_quantize


def product_dtype(x: Tensor) -> torch.dtype:
    """What a matrix product with `x` runs in: autocast's dtype where it is on, else that of x."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype


class FakeLinear(nn.Module):
    """A linear whose weight is rounded at every forward pass. `weight` float32 [out, in], `scale`
    and `zero` float32 [out, groups] are parameters; `bias` is that of the original."""

    def __init__(
        self, linear: nn.Linear, weight: Tensor, scale: Tensor, zero: Tensor, bits: int, group: int
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bits, self.group_size = bits, min(group, linear.in_features)
        self.weight = nn.Parameter(weight.detach().float().clone())
        self.scale = nn.Parameter(scale.detach().float().clone())
        self.zero = nn.Parameter(zero.detach().float().clone())
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        weight = fake_quantize(
            self.weight, self.scale, self.zero, self.bits, self.group_size, product_dtype(x)
        )
        return functional.linear(x, weight, self.bias)

    @torch.no_grad()
    def settle(self) -> None:
        """Keep every step positive: a step below a thousandth of the mean one is set to that."""
        self.scale.clamp_min_(float(self.scale.mean().clamp_min(1e-6)) * 1e-3)
        self.zero.clamp_(0, 2**self.bits - 1)

    @torch.no_grad()
    def codes(self) -> tuple[Tensor, Tensor]:
        """(codes [out, in], zeros [out, groups]), whole numbers as float32."""
        zero = torch.round(self.zero).clamp_(0, 2**self.bits - 1)
        columns = self.in_features
        steps = spread(self.scale, self.group_size, columns)
        codes = to_codes(self.weight, steps, spread(zero, self.group_size, columns), self.bits)
        return codes, zero


class _Dequantize(torch.autograd.Function):
    """centred [rows, groups, size] times scale [rows, groups, 1]; a gradient for scale alone."""

    @staticmethod
    def forward(ctx: Any, scale: Tensor, centred: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(centred)
        return (centred * scale).to(dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (centred,) = ctx.saved_tensors
        return (grads[0].float() * centred).sum(-1, keepdim=True), None, None


_dequantize: Any = _Dequantize.apply


class StepLinear(nn.Module):
    """A linear with fixed codes and zero-points; `scale` (float32 [out, groups]) is learned.

    codes and zeros: whole numbers as any float dtype, [out, in] and [out, groups].
    """

    centred: Tensor
    zeros: Tensor

    def __init__(
        self, codes: Tensor, scale: Tensor, zeros: Tensor, bits: int, group: int, bias: Any
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = codes.shape
        self.bits, self.group_size = bits, min(group, codes.shape[1])
        self.scale = nn.Parameter(scale.detach().float().clone())
        centred = codes - spread(zeros, self.group_size, codes.shape[1])
        # Whole numbers up to 15: exact in eight bits.
        self.register_buffer("centred", centred.to(torch.int8), persistent=False)
        self.register_buffer("zeros", zeros.detach().clone(), persistent=False)
        self.bias = bias

    @classmethod
    def of(cls, linear: FakeLinear) -> StepLinear:
        """The linear with its weight frozen to codes."""
        codes, zeros = linear.codes()
        return cls(codes, linear.scale, zeros, linear.bits, linear.group_size, linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = self.centred.shape
        dtype, size = product_dtype(x), self.group_size
        whole = columns // size
        cut = whole * size
        parts = []
        if whole:
            centred = self.centred[:, :cut].unflatten(1, (whole, size))
            part = _dequantize(self.scale[:, :whole, None], centred, dtype)
            parts.append(part.reshape(rows, cut))
        if cut < columns:
            part = _dequantize(self.scale[:, whole:, None], self.centred[:, None, cut:], dtype)
            parts.append(part.reshape(rows, columns - cut))
        weight = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        return functional.linear(x, weight, self.bias)

    @torch.no_grad()
    def settle(self) -> None:
        """Keep every step positive, as `FakeLinear.settle` does."""
        self.scale.clamp_min_(float(self.scale.mean().clamp_min(1e-6)) * 1e-3)

    def codes(self) -> Tensor:
        """[out, in], whole numbers as float32."""
        return self.centred + spread(self.zeros, self.group_size, self.in_features)

    @torch.no_grad()
    def packed(self) -> AffineWeight:
        """The weight at rest, steps in float16."""
        return affine(self.codes(), self.scale, self.zeros, self.bits, self.group_size)
