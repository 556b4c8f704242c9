"""What the INT8 methods share: packing 8-bit weights, and one fixed grid for an input."""

from __future__ import annotations

import torch
from torch import Tensor

from quantlab.grid import find_grid, range_to_grid, spread, to_codes
from quantlab.packing import Activation, AffineWeight, affine


def pack_int8(
    weight: Tensor, activation: Activation, *, per_channel: bool = True, bits: int = 8
) -> AffineWeight:
    """Weights on an absmax grid a row, or one for the whole matrix, with the input's scheme.

    weight: float [rows, columns] -> codes 1 to 255 around 128, float32 scales [rows or 1, 1].
    `bits` 7 keeps the codes within 64 to 192 of the same 8 (ONNX Runtime's reduce_range).
    """
    weight = weight.float()
    columns = weight.shape[1]
    grouped = weight if per_channel else weight.reshape(1, -1)
    step, zero = find_grid(grouped, bits, grouped.shape[1], symmetric=True)
    codes = to_codes(weight, spread(step, columns, columns), spread(zero, columns, columns), bits)
    codes = codes.add_(128 - 2 ** (bits - 1))
    return affine(codes, step, None, 8, columns, scale_dtype=torch.float32, activation=activation)


def static_activation(low: Tensor, high: Tensor) -> Activation:
    """One 8-bit grid with a zero-point, fixed, that spans [low, high] and 0. Scalars."""
    step, zero = range_to_grid(low, high, 8, False)
    return Activation("tensor", float(step), int(zero))
