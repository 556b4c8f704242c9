"""What the INT8 methods share: packing 8-bit weights, and one fixed grid for an input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quantlab.grid import TINY, find_grid, range_to_grid, to_codes
from quantlab.methods import base
from quantlab.packing import Activation, AffineWeight, Storage, affine
from quantlab.packing.storage import Inputs


def pack_int8(
    weight: Tensor, activation: Activation, *, per_channel: bool = True, largest: int = 127
) -> AffineWeight:
    """Weights on an absmax grid a row, or one for the whole matrix, with the input's scheme.

    weight: float [rows, columns] -> codes 128 - `largest` to 128 + `largest`, float32 scales
    [rows or 1, 1], max|w| / `largest`.
    """
    weight = weight.float()
    columns = weight.shape[1]
    grouped = weight if per_channel else weight.reshape(1, -1)
    step, zero = find_grid(grouped, 8, grouped.shape[1], symmetric=True)
    if largest != 127:
        step = grouped.abs().amax(1, keepdim=True).div_(largest).clamp_min_(TINY)
    codes = to_codes(weight, step, zero, 8)
    return affine(codes, step, None, 8, columns, scale_dtype=torch.float32, activation=activation)


def static_activation(low: Tensor, high: Tensor) -> Activation:
    """One 8-bit grid with a zero-point, fixed, that spans [low, high] and 0. Scalars."""
    step, zero = range_to_grid(low, high, 8, False)
    return Activation("tensor", float(step), int(zero))


def int8_storage(config: Any, activation: Inputs, *, per_channel: bool = True) -> Storage:
    """What `pack_int8` makes, for `Quantizer.storage`."""
    outer = config.outer_bits() if isinstance(config, base.WeightConfig) else (16, 16)
    return Storage(
        "affine", (8,), None, True, one_scale=not per_channel, activation=activation, outer=outer
    )
