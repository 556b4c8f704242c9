"""Quantizing inside of training: weights pass through their grid, gradients around the rounding.

With w a weight, s > 0 the step of its group and z its zero-point (kept as a float, used rounded),

    v = round(w / s) + round(z)      q = clamp(v, 0, 2^bits - 1)      w^ = (q - round(z)) s

Rounding is taken for the identity in the backward pass (straight-through), clamping is not:

    dw^/dw = 1 inside of the range (0 <= v <= 2^bits - 1), else 0
    dw^/ds = (q - round(z)) - w/s inside, q - round(z) outside
    dw^/dz = 0 inside, -s outside

Sources: Bengio et al. 2013 (arXiv 1308.3432, straight-through); Esser et al. 2020 (LSQ, arXiv
1902.08153, eq. 3); Bhalgat et al. 2020 (LSQ+, arXiv 2004.09576, eq. 4-6, the zero-point); Chen et
al. 2024 (EfficientQAT, arXiv 2407.11062, eq. 1-2 and 4-6).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _FakeQuantize(torch.autograd.Function):
    """The formulas above; weights [rows, groups, size], steps and zeros [rows, groups, 1].

    Written with few temporaries in float32: this runs over every weight at every training step.
    """

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, scale: Tensor, zero: Tensor, bits: int, dtype: torch.dtype
    ) -> Tensor:
        rounded = torch.round(zero)
        ratio = weight / scale
        level = torch.round(ratio)
        low, high = -rounded, (2**bits - 1) - rounded
        clamped = torch.clamp(level, low, high)
        inside = clamped == level
        # d/ds: what rounding moved the weight by, in steps; beyond the range, the level itself.
        slope = torch.where(inside, clamped - ratio, clamped)
        ctx.save_for_backward(slope, inside, scale)
        return (clamped * scale).to(dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        slope, inside, scale = ctx.saved_tensors
        grad = grads[0].float()
        passed = grad * inside
        d_scale = (grad * slope).sum(-1, keepdim=True) if ctx.needs_input_grad[1] else None
        d_zero = None
        if ctx.needs_input_grad[2]:
            d_zero = (passed.sum(-1, keepdim=True) - grad.sum(-1, keepdim=True)) * scale
        return passed if ctx.needs_input_grad[0] else None, d_scale, d_zero, None, None


_apply: Any = _FakeQuantize.apply


def fake_quantize(
    weight: Tensor, scale: Tensor, zero: Tensor, bits: int, group_size: int, dtype: torch.dtype
) -> Tensor:
    """w^ of the module's formulas: `dtype` [rows, columns].

    weight: float32 [rows, columns]; scale, zero: float32 [rows, groups]; the last group may be
    shorter than `group_size`.
    """
    rows, columns = weight.shape
    whole = columns // group_size
    cut = whole * group_size
    parts = []
    if whole:
        part = _apply(
            weight[:, :cut].unflatten(1, (whole, group_size)),
            scale[:, :whole, None],
            zero[:, :whole, None],
            bits,
            dtype,
        )
        parts.append(part.reshape(rows, cut))
    if cut < columns:
        rest = (weight[:, None, cut:], scale[:, whole:, None], zero[:, whole:, None])
        parts.append(_apply(*rest, bits, dtype).reshape(rows, columns - cut))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)
