"""Packed weights in the native kernels' layout."""

from __future__ import annotations

import torch

from kernels import native
from kernels.native_linear import MODES
from quantlab.packing import AffineWeight, CodebookWeight, GGMLWeight, OutlierWeight, PackedWeight


def matrix_of(weight: PackedWeight) -> tuple[native.Matrix, native.How | None]:
    """The weight, and how its input enters where the weight says so (None: as the caller likes).

    Raises: NotImplementedError for a weight that has no native form.
    """
    if isinstance(weight, AffineWeight):
        codes, scales, zeros = weight.unpacked()
        group = min(weight.group_size, weight.shape[1])
        matrix = native.Matrix.affine(codes, scales, zeros, weight.bits, group)
        if weight.activation is None:
            return matrix, None
        a = weight.activation
        return matrix, native.How(MODES[a.kind], a.scale, a.zero)
    if isinstance(weight, OutlierWeight):
        codes = weight.codes.view(torch.uint8) ^ 128
        scales = weight.scales[:, None]
        middle = torch.full_like(scales, 128.0)
        matrix = native.Matrix.affine(codes, scales, middle, 8, weight.shape[1])
        how = native.How(native.INT8_ROW)
        if weight.threshold:
            how = native.How(native.INT8_OUTLIERS, threshold=weight.threshold)
        return matrix, how
    raise NotImplementedError(f"no native layout for {type(weight).__name__}")
