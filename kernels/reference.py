"""What every op means, in plain torch: the fallback, and the oracle of the tests.

The weight is w = (code - zero) * scale with one grid for each row and group of columns.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kernels.base import ActivationKind

TILE = 4 * 1024 * 1024
"""Weights that `tiled_linear` dequantizes at a time (16 MiB as float32)."""


def dequantize(codes: Tensor, scales: Tensor, zeros: Tensor, group_size: int) -> Tensor:
    """(code - zero) * scale [rows, columns] in the dtype of `scales`.

    codes [rows, columns]; scales, zeros [rows or 1, groups]; the last group may be ragged."""
    columns = codes.shape[1]
    scale = scales.repeat_interleave(group_size, 1)[:, :columns]
    zero = zeros.repeat_interleave(group_size, 1)[:, :columns]
    return (codes.to(scales.dtype) - zero) * scale


def affine_linear(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor, group_size: int, bias: Tensor | None
) -> Tensor:
    """y = x @ w.T + bias for x [m, columns], everything in the dtype of `x`."""
    weight = dequantize(codes, scales.to(x.dtype), zeros.to(x.dtype), group_size)
    return torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))


def sample(logits: Tensor, temperature: float, top_p: float, uniform: float) -> int:
    """A token of p = softmax(logits / temperature): tokens in falling order of p (the lower id
    first among equals), of these the fewest that together have at least `top_p`, of these the first
    up to which they have more than `uniform` of what all of these have.

    logits: float [vocabulary]; temperature above 0; top_p above 0, 1 keeps all; uniform: the one
    random number, from 0, below 1. Sums are float64. Holtzman et al. 2020, arXiv 1904.09751.
    Raises: ValueError where there are no probabilities: a logit is NaN, or the largest infinite."""
    falling, order = logits.double().sort(descending=True, stable=True)
    # The largest logit becomes 0 first: a tiny temperature then overflows to -inf, not to NaN.
    mass = torch.exp((falling - falling[0]) / temperature).cumsum(0)
    if not bool(mass[-1].isfinite()):
        raise ValueError("the logits give no probabilities: one is NaN, or the largest infinite")
    if top_p < 1:
        mass = mass[: int(torch.searchsorted(mass, top_p * mass[-1])) + 1]
    drawn = int(torch.searchsorted(mass, uniform * mass[-1], right=True))
    # Where rounding brings the product up to the whole mass: the last token that adds to it.
    return int(order[min(drawn, int(torch.searchsorted(mass, mass[-1])))])


def quantize_tensor(x: Tensor, scale: float, zero: int) -> Tensor:
    """Codes 0 to 255 (as float) of x ~ (code - zero) * scale: one grid for the whole tensor."""
    return torch.round(x / scale).add_(zero).clamp_(0, 255)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes -127 to 127 (as float) and steps [m, 1], step = max|x| / 127: one grid a row."""
    steps = x.abs().amax(-1, keepdim=True).clamp_min(1e-12) / 127
    return torch.round(x / steps), steps


def dynamic_grid(x: Tensor, per_row: bool) -> tuple[Tensor, Tensor]:
    """(step, zero), each [m, 1] or [1, 1], of the grid that spans x at run time:

        step = (max(x, 0) - min(x, 0)) / 255        zero = round(-min(x, 0) / step)

    ONNX's DynamicQuantizeLinear (opset 11), which rounds ties to even as torch does. An input of
    zeros gets a tiny step."""
    if not x.numel():
        return x.new_ones(1, 1), x.new_zeros(1, 1)
    low, high = (x.amin(-1, True), x.amax(-1, True)) if per_row else (x.amin(), x.amax())
    low, high = low.clamp_max(0).reshape(-1, 1), high.clamp_min(0).reshape(-1, 1)
    step = ((high - low) / 255).clamp_min(1e-12)
    return step, torch.round(-low / step).clamp_(0, 255)


def quantize_dynamic(x: Tensor, per_row: bool) -> tuple[Tensor, Tensor]:
    """(code - zero, step) of `dynamic_grid`, codes 0 to 255."""
    step, zero = dynamic_grid(x, per_row)
    return torch.round(x / step).add_(zero).clamp_(0, 255).sub_(zero), step


def quantize_input(
    x: Tensor, input_scale: float | None, input_zero: int, kind: ActivationKind | None = None
) -> tuple[Tensor, Tensor | float]:
    """(code - zero, step) of the input, float32: per tensor with `input_scale`, per row if None,
    or by the grid of `kind` where that is a dynamic one."""
    x = x if x.dtype == torch.float64 else x.float()
    if kind in ("dynamic_tensor", "dynamic_token"):
        return quantize_dynamic(x, kind == "dynamic_token")
    if input_scale is None:
        return quantize_rows(x)
    return quantize_tensor(x, input_scale, input_zero).sub_(input_zero), input_scale


def split_outliers(x: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, steps [m, 1], outlier columns int64 [n]) of x [m, columns]; codes as `quantize_rows`.

    A column with any |x| >= threshold is an outlier: its codes are 0. The steps of the rows follow
    from every value below the threshold, also those that stand in outlier columns.
    """
    x = x if x.dtype == torch.float64 else x.float()
    large = x.abs() >= threshold
    columns = large.any(0).nonzero().flatten()
    codes, steps = quantize_rows(x.masked_fill(large, 0))
    return codes.index_fill_(1, columns, 0), steps, columns


def outlier_linear(
    x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, threshold: float
) -> Tensor:
    """LLM.int8(): outlier columns of x meet the dequantized weights, the rest are integer products.

    codes: int8 [rows, columns]; scales: [rows]. Everything in float64 [m, rows]: exact sums.
    """
    inner, steps, columns = split_outliers(x, threshold)
    total = (inner.double() @ codes.double().T) * steps.double()
    total += x[:, columns].double() @ codes[:, columns].double().T
    total = total * scales.double()
    return total if bias is None else total + bias.double()


def w8a8_linear(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    group_size: int,
    bias: Tensor | None,
    input_scale: float | None,
    input_zero: int = 0,
    kind: ActivationKind | None = None,
) -> Tensor:
    """Integer codes times integer codes, summed exactly, then scaled: float64 [m, rows].

    y[m, n] = step_x[m] * sum_g scale[n, g] * (sum_{k in g} (qx - zero_x)[m, k] (q - zero)[n, k])

    The inner sums are whole numbers far below 2**53, so float64 arithmetic is exact.
    `input_scale` None quantizes each row of x by its largest magnitude, else the whole tensor; a
    dynamic `kind` finds its grid in x instead.
    """
    centred, step = quantize_input(x, input_scale, input_zero, kind)
    centred = centred.double()
    total = torch.zeros(x.shape[0], codes.shape[0], dtype=torch.float64, device=x.device)
    for group in range(scales.shape[1]):
        columns = slice(group * group_size, (group + 1) * group_size)
        integers = codes[:, columns].double() - zeros[:, group, None].double()
        total += (centred[:, columns] @ integers.T) * scales[:, group].double()
    total = total * step
    return total if bias is None else total + bias.double()


def tiled_linear(
    x: Tensor,
    dequantize_rows: Callable[[int, int], Tensor],
    rows: int,
    bias: Tensor | None,
    tile: int = TILE,
) -> Tensor:
    """y = x @ w.T + bias where only a tile of w exists at a time.

    dequantize_rows(first, last) gives rows first to last - 1 of w; they are rounded to the dtype
    of x [m, columns] and multiplied in it. Peak memory: about `tile` weights.
    """
    step = max(1, tile // x.shape[1])
    if rows <= step:
        weight = dequantize_rows(0, rows).to(x.dtype)
        return torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))
    y = x.new_empty(x.shape[0], rows)
    for first in range(0, rows, step):
        last = min(first + step, rows)
        y[:, first:last] = x @ dequantize_rows(first, last).to(x.dtype).T
    return y if bias is None else y.add_(bias.to(x.dtype))
